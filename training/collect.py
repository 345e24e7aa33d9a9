"""Collect freely licensed photographs and cut-outs for the generator.

    python -m training.collect --out runs/textures

downloads Debian packages with ``apt-get download`` (it installs nothing and needs no root) and
unpacks them into a temporary folder. It writes their usable pictures to ``training/`` and, from
other packages, to ``held-out/``: ``photos/*.jpg`` and ``cutouts/*.png`` in each, with
``sources.txt``. The pictures are not part of the repository. Without them the generator uses
procedural textures.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

# Packages, with the licences that their Debian copyright files name.
PACKAGES = {
    "training": {
        "gnome-backgrounds": "CC-BY-SA-2.0, CC-BY-SA-3.0, CC-BY-2.0",
        "lomiri-wallpapers-16.04": "CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0, CC0-1.0",
        "lomiri-wallpapers-20.04": "CC-BY-SA-3.0",
        "mate-backgrounds": "GPL-2+, CC-BY-SA-4.0",
        "openclipart-png": "public domain",
        "plasma-workspace-wallpapers": "GPL-2+",
        "tuxpaint-stamps-default": "GPL-2",
        "ufoai-textures": "GPL-2+, GPL-3+, CC-BY-3.0, CC-BY-SA-3.0, public domain",
        "ukui-wallpapers": "CC-BY-SA-3.0",
    },
    "held-out": {
        "extremetuxracer-data": "GPL-2+",
        "python3-skimage": "BSD-3-Clause; its photographs CC0 or public domain",
    },
}
PICTURES = {".jpg", ".jpeg", ".png", ".webp"}
LEAST_PHOTO, LARGEST_PHOTO = 320, 1440  # pixels, the shorter side
LEAST_CUTOUT, LARGEST_CUTOUT = 64, 384  # the shorter and the longer side
LEAST_TEXTURE = 4.0  # mean difference of neighbouring grey values, summed over both directions


def unpack(package: str, folder: Path) -> None:
    """Download a Debian package, and unpack it and the game archives in it into `folder`."""
    folder.mkdir()
    try:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True)  # noqa: S603, S607
        (archive,) = folder.glob("*.deb")
        subprocess.run(["dpkg", "-x", archive.name, "."], cwd=folder, check=True)  # noqa: S603, S607
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"cannot fetch the Debian package {package}; run `apt-get update` first, or train "
            "on procedural textures (leave out --textures)"
        ) from error
    for game in folder.rglob("*.pk3"):
        zipfile.ZipFile(game).extractall(folder)


def pictures(folder: Path) -> Iterator[Path]:
    """Yield the pictures below a folder except normal maps, each in its largest size only."""
    largest: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURES and path.is_file() and not path.is_symlink():
            key = re.sub(r"[_-]?\d+x\d+|\.\w+$", "", str(path))
            if key not in largest or path.stat().st_size > largest[key].stat().st_size:
                largest[key] = path
    return (path for key, path in largest.items() if not key.endswith(("_nm", "_normal")))


def usable_photo(picture: Image.Image) -> Image.Image | None:
    """Shrink an opaque picture to a useful size; return None if it is too small or too flat."""
    shorter = min(picture.size)
    if shorter < LEAST_PHOTO:
        return None
    factor = min(1.0, LARGEST_PHOTO / shorter)
    picture = picture.convert("RGB").resize(
        (round(picture.width * factor), round(picture.height * factor)), Image.Resampling.LANCZOS
    )
    grey = np.asarray(picture.convert("L").resize((448, 448)), np.float32)
    texture = np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()
    return picture if texture >= LEAST_TEXTURE else None


def usable_cutout(picture: Image.Image) -> Image.Image | None:
    """Crop a picture to its opaque part; return None if the result is too small."""
    box = picture.getchannel("A").getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < LEAST_CUTOUT:
        return None
    picture = picture.crop(box)
    picture.thumbnail((LARGEST_CUTOUT, LARGEST_CUTOUT), Image.Resampling.LANCZOS)
    return picture


def collect(package: str, unpacked: Path, target: Path) -> tuple[int, int]:
    """Write a package's usable photographs and cut-outs below `target`; return their numbers."""
    counts = [0, 0]
    for path in pictures(unpacked):
        try:
            with Image.open(path) as opened:
                picture = opened.convert("RGBA")
        except OSError:  # damaged, or in a format that Pillow does not read
            continue
        cutout = picture.getchannel("A").getextrema()[0] == 0
        usable = usable_cutout(picture) if cutout else usable_photo(picture)
        if usable is None:
            continue
        name = f"{package}_{counts[cutout]:04}"
        counts[cutout] += 1
        if cutout:
            usable.save(target / "cutouts" / f"{name}.png", compress_level=1)
        else:
            usable.save(target / "photos" / f"{name}.jpg", quality=95, subsampling=0)
    return counts[0], counts[1]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m training.collect", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/textures"))
    arguments = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None  # wallpapers may exceed the limit
    for part, packages in PACKAGES.items():
        target: Path = arguments.out / part
        for kind in ("photos", "cutouts"):
            (target / kind).mkdir(parents=True)
        for package, licences in packages.items():
            with tempfile.TemporaryDirectory() as temporary:
                unpack(package, Path(temporary) / package)
                photos, cutouts = collect(package, Path(temporary), target)
            line = f"{package} ({licences}): {photos} photographs, {cutouts} cut-outs"
            print(line, flush=True)
            with (target / "sources.txt").open("a") as sources:
                sources.write(line + "\n")


if __name__ == "__main__":
    main()
