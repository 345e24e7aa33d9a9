"""The shipped model, assembled without PyTorch, which `make serve` does not install.

``python -m export.shipped --repository DIR`` fills the weights of ``weights/flownet2.safetensors``
into the graph ``weights/flownet2.onnx``, which :func:`export.graph.network_graph` wrote
(``python -m export.shipped --write-graph`` updates it). The result equals that of ``python -m
export``. With ``--keep-other``, a model of other weights that was exported under the same name is
kept.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors import safe_open

from export.repository import DESCRIPTION, MODEL, write_model
from flownet2.contract import MODEL_NAME

FOLDER = Path(__file__).parent.parent / "weights"
WEIGHTS = FOLDER / "flownet2.safetensors"
GRAPH = FOLDER / "flownet2.onnx"
SHIPPED = "shipped_weights"  # a parameter that only this model's description has


def shipped_model() -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return the shipped network and its description.

    They are the result of :func:`export.graph.export_onnx` and the argument `description` of
    :func:`export.repository.write_model`.
    """
    with safe_open(WEIGHTS, framework="np") as file:
        metadata = file.metadata()
        tensors: dict[str, NDArray[np.generic]] = {
            name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
        }
    for mean in ("mean1", "mean2"):
        tensors[mean] = np.array(json.loads(metadata[mean])).reshape(3, 1, 1)
    model = onnx.load(GRAPH)
    for initializer in model.graph.initializer:
        if not initializer.raw_data and initializer.dims:
            tensor = tensors[_name_in_file(initializer.name)]
            assert list(tensor.shape) == list(initializer.dims), initializer.name
            initializer.raw_data = tensor.astype("<f4").tobytes()
    description = {
        "network": metadata["network"],
        "parameters": str(sum(t.size for name, t in tensors.items() if "." in name)),
        "weights_source": metadata["source"],
        "weights_license": metadata["license"],
        SHIPPED: "yes",
    }
    return model, description


def write_shipped(repository: Path) -> str:
    """Write the shipped model to ``<repository>/flownet2``; return the name of its network."""
    model, description = shipped_model()
    write_model(repository, MODEL_NAME, model, description)
    return description["network"]


def _name_in_file(parameter: str) -> str:
    """blocks.net1.decoder.predict6.weight -> net1.predict6.weight, the name in a weights file."""
    parts = parameter.split(".")
    return ".".join((parts[1], *parts[-2:])) if len(parts) > 1 else parameter


def holds_other_model(repository: Path) -> bool:
    """Return True if ``<repository>/flownet2`` holds an exported model of other weights."""
    version = repository / MODEL_NAME / "1"
    if not ((version / MODEL).is_file() and (version / DESCRIPTION).is_file()):
        return False
    return SHIPPED not in (version / DESCRIPTION).read_text(encoding="utf-8")


def write_graph() -> None:
    """Write the graph of the shipped weights' network; needs PyTorch."""
    from export.graph import network_graph  # noqa: PLC0415
    from export.networks import NETWORKS  # noqa: PLC0415

    with safe_open(WEIGHTS, framework="np") as file:
        network = NETWORKS[file.metadata()["network"]]
    onnx.save(network_graph(network), GRAPH)


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m export.shipped", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--repository", type=Path, metavar="DIR")
    action.add_argument("--write-graph", action="store_true")
    parser.add_argument(
        "--keep-other", action="store_true", help="leave a model of other weights as it is"
    )
    options = parser.parse_args(arguments)
    if options.write_graph:
        write_graph()
    elif options.keep_other and holds_other_model(options.repository):
        print(
            f"{options.repository / MODEL_NAME} keeps its other weights; `make model` replaces them"
        )
    else:
        print(f"{write_shipped(options.repository)} -> {options.repository / MODEL_NAME}")


if __name__ == "__main__":
    main(sys.argv[1:])
