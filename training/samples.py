"""Write generated image pairs with their flow, from seeds outside the training range.

    python -m training.samples --out samples --name layers --count 3
    python -m training.samples --out runs/validation --name seen --count 24 --size 384 512 \\
        --textures runs/textures/training --augment

Without --textures all textures are procedural, so the pairs contain no third-party pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from flownet2.formats import write_flow
from training.generator import render
from training.pool import photometric
from training.textures import Textures

SAMPLE_SEED = 1 << 41  # far from the seeds of training scenes
RENDER_BATCH = 4


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.samples", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("samples"))
    parser.add_argument("--name", default="layers", help="folder names before the number")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), help="height and width")
    parser.add_argument("--textures", type=Path, help="folder of training.collect's output")
    parser.add_argument(
        "--augment", action="store_true", help="with training's effects, noise and colour changes"
    )
    parser.add_argument("--displacement", type=float, default=1.0, help="scale of the motions")
    parser.add_argument(
        "--driving", action="store_true", help="scenes with a camera that moves forward"
    )
    arguments = parser.parse_args()
    textures = Textures(arguments.textures)
    for number in range(arguments.count):
        batch, index_in_batch = divmod(number, RENDER_BATCH)
        if index_in_batch == 0:
            seed = SAMPLE_SEED + arguments.seed + batch
            height, width = arguments.size
            scenes = render(
                seed,
                RENDER_BATCH,
                height,
                width,
                textures,
                arguments.displacement,
                arguments.driving,
                arguments.augment,
            )
            frames = scenes.frames
            if arguments.augment:
                images = photometric(frames, torch.Generator().manual_seed(seed))
                frames = (images.flip(2) * 255).round().to(torch.uint8)
        folder = arguments.out / f"{arguments.name}_{number:02}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, frame in enumerate(frames[:, index_in_batch]):
            Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / f"frame{index}.png")
        write_flow(folder / "gt.flo", scenes.flow[index_in_batch].permute(1, 2, 0).numpy())
        Image.fromarray(scenes.occluded[index_in_batch].numpy()).save(folder / "occlusions.png")


if __name__ == "__main__":
    main()
