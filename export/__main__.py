"""Command line of the export: weights or an ONNX file in, a Triton model out.

``python -m export --network FlowNet2 --weights FILE --repository DIR`` exports a FlowNet2 network,
``python -m export --onnx FILE --name NAME --license TEXT --repository DIR`` wraps any two-image
network, and ``python -m export tensorrt --repository DIR --name NAME`` builds the TensorRT engine
of an exported model on this machine's GPU.
"""

import argparse
import dataclasses
import logging
import sys
import tempfile
from pathlib import Path

import onnx

from export.engine.build import build_engine
from export.repository import write_model
from export.wrap import LIKE, RANGES, ImageInput, WrapError, wrap
from flownet2.contract import GRID, MODEL_NAME
from flownet2.errors import Error

OFFICIAL = "official"

# PyTorch is imported only where it is used, because images that build engines do not have it.


def main(arguments: list[str]) -> int:
    """Run the command given by the arguments and return its exit status."""
    try:
        if arguments[:1] == ["tensorrt"]:
            _build_engine(arguments[1:])
            return 0
        parser = _parser()
        options = parser.parse_args(arguments)
        _check(parser, options)
        if options.onnx:
            _wrap(options)
        else:
            _export(options)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _build_engine(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m export tensorrt",
        description="Build the TensorRT engine of an exported model on this machine's GPU.",
    )
    parser.add_argument("--repository", required=True, type=Path, metavar="DIR")
    parser.add_argument("--name", default=MODEL_NAME, help="the model (default: %(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    build_engine(options.repository, options.name)


def _parser() -> argparse.ArgumentParser:
    from export.networks import NETWORKS  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Export a network as a Triton model. `python -m export tensorrt --help` builds "
        "the TensorRT engine of an exported model.",
    )
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument(
        "--network",
        choices=NETWORKS,
        metavar="NETWORK",
        help=f"{', '.join(NETWORKS)}; upper case is full width, lower case 3/8",
    )
    network.add_argument(
        "--onnx", type=Path, metavar="FILE", help="ONNX file of any network from two images to flow"
    )
    parser.add_argument("--repository", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--name", help=f"name of the model (default: {MODEL_NAME}; required with --onnx)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        default="fp32",
        help="precision of model.onnx, which CPUs run (default: %(default)s). GPUs run FlowNet2 "
        "networks in fp16, and those of --onnx in this precision",
    )

    weights = parser.add_argument_group("with --network")
    weights.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="Caffe .caffemodel or .caffemodel.h5, a checkpoint of NVIDIA/flownet2-pytorch, "
        "ptlflow, mmflow or FlowNetPytorch, or our .safetensors; "
        f"`{OFFICIAL}` downloads the official weights, which are for research only",
    )
    weights.add_argument(
        "--downloads",
        type=Path,
        default=Path("weights/official"),
        metavar="DIR",
        help="folder for downloads (default: %(default)s)",
    )

    wrapping = parser.add_argument_group("with --onnx")
    wrapping.add_argument(
        "--license", metavar="TEXT", help="licence of the weights, shown with the model (required)"
    )
    wrapping.add_argument(
        "--like",
        choices=LIKE,
        help="preset for the images of this network, in place of the options below",
    )
    wrapping.add_argument("--range", choices=RANGES, help="values of the images (default: 0..255)")
    wrapping.add_argument(
        "--mean",
        nargs=3,
        type=float,
        metavar="X",
        help="subtracted from the channels before the division by --std",
    )
    wrapping.add_argument("--std", nargs=3, type=float, metavar="X", help="divides the channels")
    wrapping.add_argument("--bgr", action="store_true", default=None, help="BGR instead of RGB")
    wrapping.add_argument(
        "--multiple", type=int, metavar="N", help="the sides are multiples of N pixels (default: 8)"
    )
    wrapping.add_argument(
        "--least", type=int, metavar="N", help="the sides have at least N pixels (default: 16)"
    )
    wrapping.add_argument(
        "--fit",
        choices=("pad", "resize"),
        help="how images are brought to such sides (default: pad)",
    )
    wrapping.add_argument("--output", metavar="NAME", help="the output that is the flow")
    wrapping.add_argument(
        "--size",
        type=_size,
        metavar="HEIGHTxWIDTH",
        help="compute at this size only, and resize images to it and the flow back",
    )
    return parser


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Check what argparse cannot express; a violation ends the program with status 2."""
    if options.network and not options.weights:
        parser.error("--network needs --weights")
    if options.onnx and not (options.name and options.license):
        parser.error("--onnx needs --name and --license")
    if options.onnx and options.name == MODEL_NAME:
        parser.error(f"--name {MODEL_NAME} is kept for FlowNet2 networks: choose another name")
    options.name = options.name or MODEL_NAME
    if Path(options.name).name != options.name or options.name.startswith("."):
        parser.error(f"--name {options.name!r} is not a folder name")


def _export(options: argparse.Namespace) -> None:
    from export.graph import export_onnx  # noqa: PLC0415
    from export.networks import NETWORKS  # noqa: PLC0415
    from export.weights import load_weights  # noqa: PLC0415

    weights: Path = options.weights
    if str(weights) == OFFICIAL:
        from export.weights.download import official_weights  # noqa: PLC0415

        weights = official_weights(options.network, options.downloads)
    model, file = load_weights(NETWORKS[options.network], weights)
    print(file.description)
    description = {
        "network": options.network,
        "parameters": str(sum(p.numel() for p in model.parameters())),
        "weights_source": file.source,
        "weights_license": file.license,
    }
    folder = write_model(
        options.repository, options.name, export_onnx(model), description, options.precision
    )
    print(f"{options.network} with {weights} -> {folder}")


def _wrap(options: argparse.Namespace) -> None:
    from export.proof import MEMORY_LIMIT, check, measure_memory  # noqa: PLC0415

    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(ImageInput)}
    images = dataclasses.replace(
        LIKE[options.like] if options.like else ImageInput(),
        **{key: value for key, value in given.items() if value is not None},
    )
    wrapped = wrap(options.onnx, images, options.output, options.size)
    network = options.onnx.stem
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(wrapped.model, file)
        batches, warnings = check(file, any_size=wrapped.size is None)
        memory = measure_memory(file)
    if wrapped.size:
        height, width = wrapped.size
        warnings.append(
            f"it computes at {width}x{height} only: images are resized to that and the flow back, "
            "which costs accuracy"
        )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    metadata = {"network": network, "precision": "fp32"}
    metadata["memory"] = f"{memory.linear} {memory.square}"
    onnx.helper.set_model_props(wrapped.model, metadata | ({} if batches else {"batch": "1"}))
    limit = memory.max_pixels()
    if limit < GRID[0] * GRID[1]:
        raise WrapError(
            f"the network needs more than {MEMORY_LIMIT / 2**30:.0f} GiB of memory for images of "
            f"{GRID[1]}x{GRID[0]}"
        )
    description = {
        "network": network,
        "parameters": str(wrapped.parameters),
        "weights_source": options.onnx.name,
        "weights_license": options.license,
        "max_pixels": str(limit),
    }
    target = write_model(
        options.repository,
        options.name,
        wrapped.model,
        description,
        options.precision,
        reduce=False,
    )
    print(f"{options.onnx} -> {target}, for images of up to {limit} pixels")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
