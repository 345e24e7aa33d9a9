"""Pack freely licensed photographs and cut-outs into one texture file for the generator.

    python -m training.textures --out runs/textures.npz

downloads the Debian packages in :data:`PACKAGES` with ``apt-get download`` (no installation, no
root), unpacks them into a temporary folder, cuts textured tiles out of the photographs and scales
the cut-outs. The file holds two uint8 arrays, ``photos`` [P, 448, 448, 3] (RGB) and ``cutouts``
[K, 128, 128, 4] (RGBA), and ``sources``, one line for each package. It stays below 64 MB and is
not part of the repository; the generator also runs without it, on procedural textures alone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

UInt8Array = npt.NDArray[np.uint8]

PHOTO_SIZE = 448
CUTOUT_SIZE = 128
# Package and the licences that its Debian copyright file names.
PACKAGES = {
    "tuxpaint-stamps-default": "GPL-2",
    "mate-backgrounds": "GPL-2+, CC-BY-SA-4.0",
    "lomiri-wallpapers-16.04": "CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0, CC0-1.0",
    "lomiri-wallpapers-20.04": "CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0, CC0-1.0",
    "ukui-wallpapers": "CC-BY-SA-3.0",
    "gnome-backgrounds": "CC-BY-SA-3.0",
    "plasma-workspace-wallpapers": "GPL-2+",
}
CUTOUT_PACKAGE = "tuxpaint-stamps-default"


class TextureDownloadError(RuntimeError):
    """A Debian package could not be downloaded or unpacked."""


def unpack_packages(folder: Path) -> dict[str, Path]:
    """Download and unpack :data:`PACKAGES` below `folder`; the package folders by name."""
    unpacked = {}
    for package in PACKAGES:
        target = folder / package
        target.mkdir()
        try:
            subprocess.run(["apt-get", "download", package], cwd=target, check=True)  # noqa: S603, S607
            (archive,) = target.glob("*.deb")
            subprocess.run(["dpkg", "-x", archive.name, "."], cwd=target, check=True)  # noqa: S603, S607
        except (OSError, subprocess.CalledProcessError) as error:
            raise TextureDownloadError(
                f"cannot fetch the Debian package {package}; run `apt-get update` first, or train "
                "on procedural textures (leave out --textures)"
            ) from error
        unpacked[package] = target
    return unpacked


def photo_tiles(path: Path, random: np.random.Generator, count: int) -> Iterator[UInt8Array]:
    """Up to `count` square tiles of one picture, at random scales; flat tiles are left out."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    found = 0
    for _ in range(4 * count):
        # One tile shows between a quarter and two thirds of the picture's width.
        side = int(min(random.uniform(0.25, 0.67) * picture.width, picture.height))
        left = int(random.integers(0, picture.width - side + 1))
        top = int(random.integers(0, picture.height - side + 1))
        tile = picture.resize(
            (PHOTO_SIZE, PHOTO_SIZE),
            Image.Resampling.LANCZOS,
            box=(left, top, left + side, top + side),
        )
        values = np.asarray(tile)
        gray = values.mean(axis=2)
        if np.abs(np.diff(gray, axis=0)).mean() + np.abs(np.diff(gray, axis=1)).mean() < 4.0:
            continue
        yield values
        found += 1
        if found == count:
            return


def pack_photos(folders: list[Path], random: np.random.Generator, count: int) -> UInt8Array:
    """`count` tiles, as evenly from all pictures as they have texture.

    A wallpaper that comes in several sizes counts once, in its largest file.
    """
    largest: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() not in {".jpg", ".jpeg", ".png", ".webp"}:
                continue
            key = re.sub(r"[_-]?\d+x\d+|\.\w+$", "", str(path))
            if key not in largest or path.stat().st_size > largest[key].stat().st_size:
                largest[key] = path
    rounds: list[list[UInt8Array]] = [[], [], []]
    for path in largest.values():
        if path.stat().st_size > 300_000:  # smaller files are thumbnails and flat drawings
            for tiles, tile in zip(rounds, photo_tiles(path, random, len(rounds)), strict=False):
                tiles.append(tile)
    return np.stack([tile for tiles in rounds for tile in tiles][:count])


def pack_cutouts(folder: Path, random: np.random.Generator, count: int) -> UInt8Array:
    """`count` random stamps with an alpha channel, each scaled into a 128x128 square."""
    cutouts = []
    paths = sorted(folder.rglob("*.png"))
    for index in random.permutation(len(paths)):
        with Image.open(paths[index]) as opened:
            picture = opened.convert("RGBA")
        alpha = picture.getchannel("A")
        box = alpha.getbbox()
        if box is None or min(box[2] - box[0], box[3] - box[1]) < 64:
            continue
        if np.asarray(alpha).min() > 0:  # no transparent pixel: a photograph, not a cut-out
            continue
        picture = picture.crop(box)
        scale = (CUTOUT_SIZE - 4) / max(picture.size)
        picture = picture.resize(
            (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))),
            Image.Resampling.LANCZOS,
        )
        canvas = Image.new("RGBA", (CUTOUT_SIZE, CUTOUT_SIZE))
        canvas.paste(
            picture, ((CUTOUT_SIZE - picture.width) // 2, (CUTOUT_SIZE - picture.height) // 2)
        )
        cutouts.append(np.asarray(canvas))
        if len(cutouts) == count:
            break
    return np.stack(cutouts)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/textures.npz"))
    parser.add_argument("--photos", type=int, default=88)
    parser.add_argument("--cutouts", type=int, default=200)
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        unpacked = unpack_packages(Path(temporary))
        photos = pack_photos(
            [unpacked[package] for package in PACKAGES if package != CUTOUT_PACKAGE],
            random,
            arguments.photos,
        )
        cutouts = pack_cutouts(unpacked[CUTOUT_PACKAGE], random, arguments.cutouts)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sources = [f"{package} ({licence})" for package, licence in PACKAGES.items()]
    np.savez_compressed(arguments.out, photos=photos, cutouts=cutouts, sources=np.array(sources))
    size = arguments.out.stat().st_size / 1e6
    print(f"{arguments.out}: {len(photos)} photo tiles, {len(cutouts)} cut-outs, {size:.1f} MB")


if __name__ == "__main__":
    main()
