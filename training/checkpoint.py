"""Checkpoints of a run: a folder of pieces, replaced as a whole."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import torch

PIECE_BYTES = 15_000_000


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as pieces below 16 MB; an interrupted write leaves the last one whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    fresh = folder.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for number, start in enumerate(range(0, len(content), PIECE_BYTES)):
        (fresh / f"{number:03}.bin").write_bytes(content[start : start + PIECE_BYTES])
    old = folder.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether :func:`save_checkpoint` has written there."""
    return folder.exists() or folder.with_suffix(".old").exists()


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote last, without executing anything in it."""
    if not folder.exists():  # a write was interrupted between its two renamings
        folder = folder.with_suffix(".old")
    content = b"".join(piece.read_bytes() for piece in sorted(folder.glob("*.bin")))
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    return state
