"""Images in every form that a user may have, as pixels and as files for a gateway."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flownet2 import png
from flownet2.images import Frame, ImageError
from tests.support.gateway_stack import encoded, picture

ROW = np.arange(0, 2**16, 257)
"""The 16-bit values that equal the 256 values of 8 bits."""
DEEP = np.stack([ROW, ROW[::-1]] * 10).astype(np.uint16)
SHALLOW = np.repeat((DEEP // 257).astype(np.uint8)[..., None], 3, axis=2)


def decoded(file: bytes) -> np.ndarray:
    """Decode a file as a gateway does, which clips what is deeper than 8 bits."""
    with Image.open(io.BytesIO(file)) as image:
        assert image.mode in ("L", "RGB")
        return np.asarray(image.convert("RGB"))


def grey_tiff(strip: bytes, bits: int, order: str) -> bytes:
    """A TIFF of DEEP's size, of one strip; `order` is "<" or ">"."""
    height, width = DEEP.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(strip))]
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(strip))
    return head + strip + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def packed_12_bit(values: np.ndarray) -> bytes:
    first, second = values[:, 0::2].astype(int), values[:, 1::2].astype(int)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2)
    return packed.astype(np.uint8).tobytes()


def pgm(values: np.ndarray, maximum: int) -> bytes:
    height, width = values.shape
    return b"P5 %d %d %d\n" % (width, height, maximum) + values.astype(">u2").tobytes()


def tiff(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values), "TIFF")


FLOATS = (DEEP / 65535).astype(np.float32)
SIXTEEN = Image.fromarray(DEEP)
DEEP_IMAGES = {
    "PNG": encoded(SIXTEEN),
    "PGM": pgm(DEEP, 65535),
    "PGM of 12 bits": pgm(np.rint(FLOATS * 4095), 4095),
    "TIFF": encoded(SIXTEEN, "TIFF"),
    "big-endian TIFF": grey_tiff(DEEP.astype(">u2").tobytes(), 16, ">"),
    "TIFF of 12 bits": grey_tiff(packed_12_bit(np.rint(FLOATS * 4095)), 12, "<"),
    "TIFF of floats": tiff(FLOATS),
    "JPEG 2000": encoded(SIXTEEN, "JPEG2000", irreversible=False),
    "Pillow image": SIXTEEN,
    "Pillow image of a PGM": Image.open(io.BytesIO(pgm(DEEP, 65535))),
    "Pillow image of floats": Image.fromarray(FLOATS),
}


@pytest.mark.parametrize("kind", DEEP_IMAGES)
def test_deep_images_are_scaled(kind: str) -> None:
    frame = Frame(DEEP_IMAGES[kind])
    np.testing.assert_array_equal(frame.pixels(), SHALLOW)
    np.testing.assert_array_equal(decoded(Frame(DEEP_IMAGES[kind]).file()), SHALLOW)
    assert frame.size() == SHALLOW.shape[1::-1]


REFUSED = {
    "int32 TIFF": tiff(DEEP.astype(np.int32)),
    "uint32 TIFF": tiff(DEEP.astype(np.uint32)),
    "float TIFF to 255": tiff(FLOATS * 255),
    "negative floats": tiff(FLOATS - 0.1),
    "NaN": tiff(np.where(FLOATS > 0.5, np.nan, FLOATS)),
    "Pillow image of integers": Image.fromarray(DEEP.astype(np.int32)),
    "array of 16 bits": DEEP,
    "array of floats": SHALLOW / 255,
    "grey array": SHALLOW[..., 0],
    "animation": encoded(picture(1), save_all=True, append_images=[picture(2)]),
    "text": b"no image",
    "nothing": b"",
    "None": None,
    "number": 7,
    "list": [[1, 2]],
    "text file": io.StringIO("text"),
    "function of rubbish": lambda: None,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_images_are_refused(kind: str) -> None:
    with pytest.raises(ImageError, match="the first") as caught:
        Frame(REFUSED[kind], "the first").pixels()
    assert " at 0x" not in str(caught.value)


class Tensor:
    """Like PyTorch's tensors: not a NumPy array, but convertible to one."""

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return np.asarray(picture(1))


def test_images_in_other_forms(tmp_path: Path) -> None:
    image = picture(1)
    file = encoded(image)
    path = tmp_path / "a.png"
    path.write_bytes(file)
    with path.open("rb") as opened:
        sources = [bytearray(file), memoryview(file), io.BytesIO(file), opened, Tensor()]
        for source in [*sources, path, str(path), lambda: np.asarray(image)]:
            np.testing.assert_array_equal(Frame(source).pixels(), np.asarray(image))


def test_files_that_a_gateway_takes_are_sent_unchanged() -> None:
    for file in (encoded(picture(1)), encoded(picture(1), "JPEG"), encoded(picture(1), "WEBP")):
        assert Frame(file).file() is file
    mpo = encoded(picture(1), "MPO", save_all=True, append_images=[picture(2)])
    for file in (encoded(picture(1), "BMP"), encoded(picture(1), "GIF"), mpo):
        frame = Frame(file)
        np.testing.assert_array_equal(decoded(frame.file()), frame.pixels())
        assert frame.file() is frame.file()


def test_sixteen_bit_colour_is_sent_as_it_is_decoded() -> None:
    pixels = np.asarray(picture(1), np.uint16) * 257
    file = png.encode(pixels)
    np.testing.assert_array_equal(Frame(file).pixels(), pixels // 257)
    sent = Frame(file).file()
    assert sent != file
    np.testing.assert_array_equal(decoded(sent), pixels // 257)
