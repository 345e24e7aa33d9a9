"""A model folder of a Triton repository.

``model_repository/flownet2/`` holds the files that all models share and git tracks:
``config.pbtxt``, ``1/*.py``, which Triton's Python backend runs, and in ``configs/`` the
configurations that Triton's ``--model-config-name`` selects instead. The files that differ between
models are beside them in the version folder: the network, ``description.pbtxt``, which the launcher
appends to the configuration, and the golden pair.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import onnx

from export.golden import write_golden
from export.half import to_half
from flownet2 import contract

TEMPLATE = Path(__file__).parents[1] / "model_repository" / "flownet2"
CONFIGURATIONS = ("config.pbtxt", "configs/tensorrt.pbtxt")
MODEL, HALF_MODEL = "model.onnx", "model_fp16.onnx"
DESCRIPTION, GOLDEN = "description.pbtxt", "golden.npz"


def write_model(
    repository: Path,
    name: str,
    model: onnx.ModelProto,
    description: Mapping[str, str],
    precision: Literal["fp32", "fp16"] = "fp32",
    reduce: bool = True,
) -> Path:
    """Write ``<repository>/<name>`` with its configurations and version 1.

    Files are replaced atomically, so that a server that starts meanwhile reads complete files, and
    only if they differ.

    Args:
        model: the network in float32. The flow of the golden pair is computed with it.
        description: parameters of the served model, which the gateway's list of models shows:
            ``network``, ``parameters``, ``weights_source``, ``weights_license``. ``model_sha256``,
            of the network with its weights, is added.
        precision: precision of ``model.onnx``, which CPUs run.
        reduce: let GPUs run half precision and CPUs bfloat16 in the wide convolutions. If it is
            False and `precision` is "fp32", no ``model_fp16.onnx`` is written, and all engines run
            float32.

    Returns:
        The model's folder.
    """
    folder = repository / name
    version = folder / "1"
    for configuration in CONFIGURATIONS:
        _copy(TEMPLATE / configuration, folder / configuration)
    for module in (TEMPLATE / "1").glob("*.py"):
        _copy(module, version / module.name)
    _copy(Path(contract.__file__), version / "flownet2" / "contract.py")
    digest = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    with replacing(version / DESCRIPTION) as new:
        text = as_parameters({**description, "model_sha256": digest})
        new.write_text(text, encoding="utf-8")
    half = to_half(model) if reduce or precision == "fp16" else None
    with replacing(version / MODEL) as new:
        onnx.save(model, new)
        with replacing(version / GOLDEN) as golden:
            write_golden(new, golden)
        if half and precision == "fp16":
            onnx.save(half, new)
    if half:
        with replacing(version / HALF_MODEL) as new:
            onnx.save(half, new)
    else:
        (version / HALF_MODEL).unlink(missing_ok=True)
    return folder


def as_parameters(description: Mapping[str, str]) -> str:
    """Return parameters as the text of a ``config.pbtxt``."""
    quoted = ((key, json.dumps(value, ensure_ascii=False)) for key, value in description.items())
    return "".join(
        f'parameters {{ key: "{key}" value {{ string_value: {value} }} }}\n'
        for key, value in quoted
    )


def _copy(source: Path, target: Path) -> None:
    if not (target.is_file() and target.read_bytes() == source.read_bytes()):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as new:
            shutil.copyfile(source, new)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path to write to, which atomically replaces the target at the end."""
    new = target.with_name(f".{target.name}.new")
    try:
        yield new
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
