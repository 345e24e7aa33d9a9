"""Write the sample pairs that the repository shows: procedural textures only, so that no one
else's picture is in them, and seeds that training never uses.

    python -m training.samples --out samples
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from flownet2.formats import to_flo
from training.generator import load_textures, render

SAMPLE_SEED = 1 << 41
HEIGHT, WIDTH = 256, 320


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.samples", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("samples"))
    parser.add_argument("--count", type=int, default=3)
    arguments = parser.parse_args()
    scenes = render(SAMPLE_SEED, arguments.count, HEIGHT, WIDTH, load_textures(None), blur=False)
    for number in range(arguments.count):
        folder = arguments.out / f"layers_{number}"
        folder.mkdir(parents=True, exist_ok=True)
        for frame in range(2):
            pixels = scenes.frames[frame, number].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"frame{frame}.png", optimize=True)
        flow = scenes.flow[number].permute(1, 2, 0).to(torch.float32).numpy()
        (folder / "gt.flo").write_bytes(to_flo(flow))


if __name__ == "__main__":
    main()
