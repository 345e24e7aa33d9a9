"""Formats of a flow, read back by independent readers."""

import colorsys
import io
import struct
import zlib

import numpy as np
import orjson
import pytest
from PIL import Image

from gateway import encoding


@pytest.fixture
def flow() -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.normal(0, 40, (7, 11, 2)).astype(np.float32)


def test_json_keeps_every_float32(flow: np.ndarray) -> None:
    document = orjson.loads(encoding.to_json(flow, 2.5, 0.75))
    assert document["scale_x_back_factor"] == 2.5
    assert document["scale_y_back_factor"] == 0.75
    np.testing.assert_array_equal(np.array(document["flow"], np.float32), flow)


def test_npy_is_float32(flow: np.ndarray) -> None:
    read = np.load(io.BytesIO(encoding.to_npy(flow)), allow_pickle=False)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, flow)


def test_flo_has_middleburys_layout(flow: np.ndarray) -> None:
    data = encoding.to_flo(flow)
    assert data[:4] == b"PIEH"
    assert struct.unpack("<ii", data[4:12]) == (11, 7)
    u_of_row_2_column_3, v = struct.unpack_from("<ff", data, 12 + (2 * 11 + 3) * 8)
    assert (u_of_row_2_column_3, v) == tuple(flow[2, 3])
    assert len(data) == 12 + flow.nbytes


def read_png16(data: bytes) -> np.ndarray:
    """A 16-bit RGB PNG, by the PNG specification, one byte at a time."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        content = data[place + 8 : place + 8 + size]
        (checksum,) = struct.unpack_from(">I", data, place + 8 + size)
        assert checksum == zlib.crc32(kind + content)
        chunks[kind] = chunks.get(kind, b"") + content
        place += 12 + size
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour, rest) == (16, 2, [0, 0, 0])
    raw = zlib.decompress(chunks[b"IDAT"])
    stride = width * 6
    rows = []
    for y in range(height):
        line = bytearray(raw[y * (stride + 1) : (y + 1) * (stride + 1)])
        assert line.pop(0) == 1
        for i in range(6, stride):
            line[i] = (line[i] + line[i - 6]) % 256
        rows.append(np.frombuffer(bytes(line), ">u2").reshape(width, 3))
    return np.stack(rows)


def test_kitti_reads_back_to_a_64th(flow: np.ndarray) -> None:
    flow[3, 4] = (600, 0)  # beyond what the format holds
    flow[0, 0] = (0, -512)  # its least value
    data = encoding.to_kitti(flow)
    pixels = read_png16(data)
    valid = pixels[..., 2] == 1
    assert not valid[3, 4]
    assert valid.sum() == valid.size - 1
    assert (pixels[3, 4] == 0).all()
    read = (pixels[..., :2].astype(np.float64) - 2**15) / 64
    assert np.abs(read - flow)[valid].max() <= 1 / 128
    with Image.open(io.BytesIO(data)) as image:  # another reader takes the file too
        image.load()
        assert image.size == (11, 7)


def middlebury_colour(u: float, v: float, longest: float) -> list[int]:
    """One pixel's colour as the paper's authors define it: steps of 15, 6, 4, 11, 13, 6."""
    wheel: list[list[int]] = []
    for count, rising, falling, full in (
        (15, 1, None, 0),
        (6, None, 0, 1),
        (4, 2, None, 1),
        (11, None, 1, 2),
        (13, 0, None, 2),
        (6, None, 2, 0),
    ):
        for i in range(count):
            colour = [0, 0, 0]
            colour[full] = 255
            if rising is not None:
                colour[rising] = 255 * i // count
            if falling is not None:
                colour[falling] = 255 - 255 * i // count
            wheel.append(colour)
    radius = float(np.hypot(u, v)) / longest
    place = (np.arctan2(-v, -u) / np.pi + 1) / 2 * (len(wheel) - 1)
    low = int(place)
    pixel = []
    for channel in range(3):
        first, second = wheel[low][channel], wheel[(low + 1) % len(wheel)][channel]
        value = ((1 - (place - low)) * first + (place - low) * second) / 255
        value = 1 - radius * (1 - value) if radius <= 1 else value * 0.75
        pixel.append(int(255 * value))
    return pixel


@pytest.mark.parametrize("maximum", [None, 30.0])
def test_colours_are_middleburys(flow: np.ndarray, maximum: float | None) -> None:
    picture = encoding.colours(flow, maximum).astype(int)
    longest = maximum or float(np.hypot(flow[..., 0], flow[..., 1]).max())
    for y, x in np.ndindex(flow.shape[:2]):
        expected = middlebury_colour(*map(float, flow[y, x]), longest)
        assert np.abs(picture[y, x] - expected).max() <= 1


def test_no_motion_is_white_and_a_turn_goes_round_the_hues() -> None:
    assert (encoding.colours(np.zeros((2, 2, 2), np.float32)) == 255).all()
    angles = np.linspace(0.2, 6.0, 40)
    ring = np.stack([np.cos(angles), np.sin(angles)], -1)[None].astype(np.float32)
    hues = [colorsys.rgb_to_hsv(*pixel)[0] for pixel in encoding.colours(ring)[0] / 255]
    assert (np.diff(hues) >= 0).all()


def test_picture_is_a_png_of_the_colours(flow: np.ndarray) -> None:
    with Image.open(io.BytesIO(encoding.to_picture(flow))) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), encoding.colours(flow))
