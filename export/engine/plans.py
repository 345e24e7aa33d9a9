"""Plan files, TensorRT's serialised engines, beside a model's network.

A plan fits one GPU type, one TensorRT, one plugin and one network. Its name contains a hash of all
of them, so that plans for several GPU types can share a volume. ``model.plan`` is a link to the
plan in use.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from export.engine.gpu import EngineError, Gpu
from export.repository import replacing

KEPT_PLANS = 2  # including the plan in use
LINK = "model.plan"


def plan_path(folder: Path, gpu: Gpu, tensorrt_version: str, built_from: Iterable[Path]) -> Path:
    """Return the plan's path, such as ``NVIDIA-L4-0123456789abcdef.plan`` in `folder`."""
    origin = hashlib.sha256(f"{gpu} {tensorrt_version}".encode())
    for path in built_from:
        with path.open("rb") as file:
            origin.update(hashlib.file_digest(file, "sha256").digest())
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu.name)
    return folder / f"{name}-{origin.hexdigest()[:16]}.plan"


def write_plan(plan: Path, content: Any) -> None:
    """Write a plan atomically, after removing old ones.

    Raises:
        EngineError: the folder is not writable, or the disk is full.
    """
    try:
        for old in _used_last(plan.parent)[KEPT_PLANS - 1 :]:
            old.unlink()
        with replacing(plan) as new:
            new.write_bytes(content)
    except OSError as error:
        size = memoryview(content).nbytes / 2**20
        raise EngineError(f"the engine ({size:.0f} MiB) cannot be written: {error}") from None


def use_plan(plan: Path) -> None:
    """Make ``model.plan`` a link to a plan beside it.

    Raises:
        EngineError: the folder is not writable.
    """
    try:
        plan.touch()
        with replacing(plan.with_name(LINK)) as new:
            new.unlink(missing_ok=True)  # left by a killed process
            new.symlink_to(plan.name)
    except OSError as error:
        raise EngineError(f"the engine cannot be linked: {error}") from None


def _used_last(folder: Path) -> list[Path]:
    plans = [file for file in folder.glob("*.plan") if not file.is_symlink()]
    return sorted(plans, key=lambda file: file.stat().st_mtime, reverse=True)
