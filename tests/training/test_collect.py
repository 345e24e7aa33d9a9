"""The choice among a package's pictures, in a folder that the test writes."""

from pathlib import Path

import numpy as np
from PIL import Image

from training.collect import collect


def test_textured_photographs_and_cutouts_are_taken(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    unpacked, target = tmp_path / "unpacked", tmp_path / "target"
    for folder in (unpacked, target / "photos", target / "cutouts"):
        folder.mkdir(parents=True)

    def write(name: str, height: int, width: int) -> None:
        blocks = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(unpacked / name)

    write("large_1600x2400.png", 1600, 2400)
    write("large_400x600.png", 400, 600)  # the same in another size
    write("wall_nm.png", 400, 400)  # a normal map
    write("small.png", 160, 400)
    Image.new("RGB", (400, 400), (9, 9, 9)).save(unpacked / "flat.png")
    (unpacked / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    cutout = np.zeros((900, 900, 4), np.uint8)
    cutout[100:868, 200:584] = (1, 2, 3, 255)
    Image.fromarray(cutout).save(unpacked / "cutout.png")

    assert collect("package", unpacked, target) == (1, 1)
    with Image.open(target / "photos" / "package_0000.jpg") as photo:
        assert photo.size == (2160, 1440)
    with Image.open(target / "cutouts" / "package_0000.png") as taken:
        assert taken.size == (192, 384)
        assert taken.getextrema() == ((1, 1), (2, 2), (3, 3), (255, 255))
