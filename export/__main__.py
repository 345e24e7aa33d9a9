"""Command line: weights in, Triton model out.

``python -m export --network FlowNet2 --weights FILE --repository DIR`` writes one model;
``python -m export tensorrt --repository DIR --name NAME`` builds its engine on the GPU at hand.
"""

import argparse
import logging
import sys
from pathlib import Path

from export.engine.build import build_engine
from export.engine.gpu import EngineError
from export.half import to_half
from export.repository import write_model
from flownet2.contract import MODEL_NAME

OFFICIAL = "official"

# PyTorch is imported where it is used: where engines are built there is none.


def main(arguments: list[str]) -> int:
    """Run the command that the arguments ask for; returns the exit status."""
    if arguments[:1] == ["tensorrt"]:
        return _tensorrt(arguments[1:])
    return _export(_parser().parse_args(arguments))


def _tensorrt(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m export tensorrt",
        description="Build the TensorRT engine of an exported model on the GPU at hand.",
    )
    parser.add_argument("--repository", required=True, type=Path, metavar="DIR")
    parser.add_argument("--name", default=MODEL_NAME, help="the model (default: %(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        build_engine(options.repository, options.name)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    from export.networks import NETWORKS  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Export a FlowNet2 network with its weights as a Triton model. "
        "(`python -m export tensorrt --help`: build the TensorRT engine of an exported model.)",
    )
    parser.add_argument(
        "--network",
        required=True,
        choices=NETWORKS,
        metavar="NAME",
        help=f"{', '.join(NETWORKS)}; upper case is full width, lower case 3/8",
    )
    parser.add_argument(
        "--weights",
        required=True,
        type=Path,
        metavar="FILE",
        help="Caffe .caffemodel or .caffemodel.h5, NVIDIA .pth.tar, or our .safetensors; "
        f"`{OFFICIAL}`: those of the release, for research only, are downloaded",
    )
    parser.add_argument(
        "--downloads",
        type=Path,
        default=Path("weights/official"),
        metavar="DIR",
        help="where downloads are kept (default: %(default)s)",
    )
    parser.add_argument("--repository", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--name", default=MODEL_NAME, help="the model's name (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        default="fp32",
        help="of model.onnx, which the CPU runs (default: %(default)s); GPUs run fp16 either way",
    )
    return parser


def _export(options: argparse.Namespace) -> int:
    from export.graph import export_onnx  # noqa: PLC0415
    from export.networks import NETWORKS  # noqa: PLC0415
    from export.weights import WeightsError, load_weights  # noqa: PLC0415

    if Path(options.name).name != options.name or options.name.startswith("."):
        print(f"error: --name {options.name!r} is not a folder name", file=sys.stderr)
        return 2
    weights: Path = options.weights
    try:
        if str(weights) == OFFICIAL:
            from export.weights.download import official_weights  # noqa: PLC0415

            weights = official_weights(options.network, options.downloads)
        model, file = load_weights(NETWORKS[options.network], weights)
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    description = {
        "network": options.network,
        "parameters": str(sum(p.numel() for p in model.parameters())),
        "weights_source": file.source,
        "weights_license": file.license,
    }
    proto = export_onnx(model)
    if options.precision == "fp16":
        proto = to_half(proto)
    folder = write_model(options.repository, options.name, proto, description)
    print(f"{options.network} with {weights} -> {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
