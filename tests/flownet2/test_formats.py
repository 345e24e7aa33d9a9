"""Formats of a flow, read back by independent readers, and written by independent writers."""

import colorsys
import io
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from PIL import Image

from flownet2 import FormatError, formats, read_flow, write_flow
from flownet2.colours import colours


@pytest.fixture
def flow() -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.normal(0, 40, (7, 11, 2)).astype(np.float32)


def test_npy_is_float32(flow: np.ndarray) -> None:
    read = np.load(io.BytesIO(formats.to_npy(flow)), allow_pickle=False)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, flow)


def test_flo_has_middleburys_layout(flow: np.ndarray) -> None:
    data = formats.to_flo(flow)
    assert data[:4] == b"PIEH"
    assert struct.unpack("<ii", data[4:12]) == (11, 7)
    u_of_row_2_column_3, v = struct.unpack_from("<ff", data, 12 + (2 * 11 + 3) * 8)
    assert (u_of_row_2_column_3, v) == tuple(flow[2, 3])
    assert len(data) == 12 + flow.nbytes


def read_png16(data: bytes) -> np.ndarray:
    """A 16-bit RGB PNG, by the PNG specification, one byte at a time."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, position = {}, 8
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        content = data[position + 8 : position + 8 + size]
        (checksum,) = struct.unpack_from(">I", data, position + 8 + size)
        assert checksum == zlib.crc32(kind + content)
        chunks[kind] = chunks.get(kind, b"") + content
        position += 12 + size
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
    flow[3, 4] = np.nan
    flow[0, 0] = (0, -512)  # its least value
    flow[0, 1] = (511.98, 0)
    data = formats.to_kitti(flow)
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


def test_kitti_refuses_vectors_that_it_cannot_hold(tmp_path: Path, flow: np.ndarray) -> None:
    flow[3, 4:6] = (600, 0)
    with pytest.raises(FormatError, match=r"2 of 77 vectors \(2\.60%\).*512"):
        write_flow(tmp_path / "a.png", flow, "kitti")
    assert not (tmp_path / "a.png").exists()


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
    position = (np.arctan2(-v, -u) / np.pi + 1) / 2 * (len(wheel) - 1)
    low = int(position)
    pixel = []
    for channel in range(3):
        first, second = wheel[low][channel], wheel[(low + 1) % len(wheel)][channel]
        value = ((1 - (position - low)) * first + (position - low) * second) / 255
        value = 1 - radius * (1 - value) if radius <= 1 else value * 0.75
        pixel.append(int(255 * value))
    return pixel


@pytest.mark.parametrize("maximum", [None, 30.0])
def test_colours_are_middleburys(flow: np.ndarray, maximum: float | None) -> None:
    picture = colours(flow, maximum).astype(int)
    longest = maximum or float(np.hypot(flow[..., 0], flow[..., 1]).max())
    for y, x in np.ndindex(flow.shape[:2]):
        expected = middlebury_colour(*map(float, flow[y, x]), longest)
        assert np.abs(picture[y, x] - expected).max() <= 1


def test_no_motion_is_white_and_a_turn_goes_round_the_hues() -> None:
    assert (colours(np.zeros((2, 2, 2), np.float32)) == 255).all()
    angles = np.linspace(0.2, 6.0, 40)
    ring = np.stack([np.cos(angles), np.sin(angles)], -1)[None].astype(np.float32)
    hues = [colorsys.rgb_to_hsv(*pixel)[0] for pixel in colours(ring)[0] / 255]
    assert (np.diff(hues) >= 0).all()


def test_picture_is_a_png_of_the_colours(flow: np.ndarray) -> None:
    with Image.open(io.BytesIO(formats.to_picture(flow))) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), colours(flow))


@pytest.mark.parametrize(
    ("file", "format", "step"),
    [
        ("a.flo", None, 0),
        ("a.npy", None, 0),
        ("a.npz", None, 0),
        ("a.pfm", None, 0),
        ("a.h5", None, 0),
        ("a.flo5", None, 0),
        ("a.png", "kitti", 1 / 128),
    ],
)
def test_what_is_written_is_read_with_unknown_flow_as_nan(
    tmp_path: Path, flow: np.ndarray, file: str, format: str | None, step: float
) -> None:
    flow[2, 3] = np.nan
    write_flow(tmp_path / file, flow, format)
    read = read_flow(tmp_path / file)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(read), np.isnan(flow))
    assert np.nanmax(np.abs(read - flow)) <= step


def test_kitti_files_of_another_writer_are_read(tmp_path: Path, flow: np.ndarray) -> None:
    coded = np.zeros((7, 11, 3), np.uint16)
    coded[..., :2] = np.rint(flow * 64 + 2**15)
    coded[1:, :, 2] = 1
    cv2.imwrite(str(tmp_path / "a.png"), coded[..., ::-1])
    read = read_flow(tmp_path / "a.png")
    assert np.isnan(read[0]).all()
    np.testing.assert_array_equal(read[1:], (coded[1:, :, :2].astype(np.float32) - 2**15) / 64)


def test_unknown_flow_of_a_flo_file_is_nan(flow: np.ndarray) -> None:
    flow[1, 2, 0] = 1e10
    read = formats.from_flo(b"PIEH" + struct.pack("<ii", 11, 7) + flow.tobytes())
    assert np.isnan(read[1, 2]).all()
    assert np.isnan(read).sum() == 2


def pfm(flow: np.ndarray, header: bytes, order: str = "<") -> bytes:
    channels = np.concatenate([flow, np.zeros((*flow.shape[:2], 1))], axis=2)
    return header + channels.astype(f"{order}f4").tobytes()


@pytest.mark.parametrize("order", "<>")
def test_pfm_has_the_lowest_row_first_in_either_byte_order(
    tmp_path: Path, flow: np.ndarray, order: str
) -> None:
    scale = {"<": b"-1.0", ">": b"1"}[order]
    (tmp_path / "a.pfm").write_bytes(pfm(flow[::-1], b"PF\n11 7\n" + scale + b"\n", order))
    np.testing.assert_array_equal(read_flow(tmp_path / "a.pfm"), flow)
    np.testing.assert_array_equal(
        cv2.imdecode(np.frombuffer(formats.to_pfm(flow), np.uint8), cv2.IMREAD_UNCHANGED)[
            ..., :0:-1
        ],
        flow,
    )


def test_photoshops_pfm_has_the_highest_row_first(flow: np.ndarray) -> None:
    # Width and height stand on lines of their own: darktable, pull request 17716.
    np.testing.assert_array_equal(formats.from_pfm(pfm(flow, b"PF\n11\n7\n-1.000000\n")), flow)


@pytest.mark.parametrize("suffix", [".h5", ".flo5"])
def test_hdf5_has_the_data_set_flow(tmp_path: Path, flow: np.ndarray, suffix: str) -> None:
    write_flow(tmp_path / f"written{suffix}", flow)
    with h5py.File(tmp_path / f"written{suffix}") as file:
        np.testing.assert_array_equal(file["flow"][()], flow)
    with h5py.File(tmp_path / f"read{suffix}", "w") as file:
        file.create_dataset("flow", data=flow.astype(">f8"), compression="gzip", chunks=(3, 4, 2))
    np.testing.assert_array_equal(read_flow(tmp_path / f"read{suffix}"), flow)


def test_hdf5_does_not_lead_to_other_files(tmp_path: Path, flow: np.ndarray) -> None:
    write_flow(tmp_path / "other.h5", flow)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["flow"] = h5py.ExternalLink("other.h5", "flow")
    with pytest.raises(FormatError, match="no dataset"):
        read_flow(tmp_path / "a.h5")


def test_vipers_npz_has_the_components_by_name(tmp_path: Path, flow: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", u=flow[..., 0].astype(np.float16), v=flow[..., 1])
    read = read_flow(tmp_path / "a.npz")
    np.testing.assert_array_equal(read[..., 0], flow[..., 0].astype(np.float16))
    np.testing.assert_array_equal(read[..., 1], flow[..., 1])


def test_vectors_that_are_not_finite_are_unknown(tmp_path: Path, flow: np.ndarray) -> None:
    written = flow.astype(np.float64)
    written[1, 1, 0], written[2, 2, 1], written[3, 3] = np.inf, np.nan, 1e300
    np.save(tmp_path / "a.npy", written)
    read = read_flow(tmp_path / "a.npy")
    for position in ((1, 1), (2, 2), (3, 3)):
        assert np.isnan(read[position]).all()
        flow[position] = np.nan
    np.testing.assert_array_equal(read, flow)


READABLE = ["flo", "flo5", "npy", "npz", "pfm", "kitti", "hdf5"]


@pytest.mark.parametrize("name", READABLE)
def test_files_that_are_cut_off_or_of_another_kind_are_refused(
    tmp_path: Path, flow: np.ndarray, name: str
) -> None:
    format = formats.FORMATS[name]
    path = tmp_path / f"a{format.suffix}"
    content = format.encode(flow)
    others = [formats.FORMATS[other].encode(flow) for other in READABLE]
    wrong = [b"", b"PF\n1 1\n", b"PF.48 32.-1.0", formats.to_picture(flow)]
    wrong += [other for other in others if other[:4] != content[:4]]
    wrong += [content[:end] for end in range(1, len(content), len(content) // 40)]
    for data in wrong:
        path.write_bytes(data)
        with pytest.raises(FormatError, match="a\\."):
            read_flow(path)


@pytest.mark.parametrize("name", READABLE)
def test_damaged_files_are_refused_or_read_but_nothing_else_happens(
    flow: np.ndarray, name: str
) -> None:
    format = formats.FORMATS[name]
    content = format.encode(flow)
    random = np.random.default_rng(7)
    decode = format.decode
    assert decode is not None
    for _ in range(300):
        damaged = bytearray(content)
        # Most damage is done to the first bytes, which are the header in most formats.
        ends = (len(content), 128) if random.random() < 0.5 else (128, 16)
        for position in random.integers(0, ends, 2):
            damaged[min(position, len(content) - 1)] = random.integers(256)
        try:
            read = decode(bytes(damaged))
        except FormatError:
            continue
        assert read.dtype == np.float32
        assert read.shape[2] == 2


def test_kitti_pngs_with_a_flipped_bit_are_refused(flow: np.ndarray) -> None:
    content = formats.to_kitti(flow)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 4
        with pytest.raises(FormatError):
            formats.from_kitti(bytes(damaged))


def npy_header(shape: str, dtype: str = "<f4") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def zipped(name: str, content: bytes, claimed: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
        archive.infolist()[0].file_size = claimed
    return file.getvalue()


def chunked_hdf5(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as content:
        content.create_dataset("flow", shape, "f4", chunks=(64, 64, 2))
    return file.getvalue()


HUGE = 2**31 - 1
LIES = {
    "flo": b"PIEH" + struct.pack("<ii", HUGE, HUGE) + bytes(64),
    "pfm": b"PF\n999999999 999999999\n-1.0\n" + bytes(64),
    "npy": npy_header(f"({HUGE}, {HUGE}, 2)") + bytes(64),
    "npz": zipped("flow.npy", npy_header(f"({HUGE}, {HUGE}, 2)"), 2**62),
    "hdf5": chunked_hdf5((HUGE, HUGE, 2)),
}


@pytest.mark.parametrize("name", LIES)
def test_sizes_that_a_file_does_not_have_are_refused_before_memory_is_taken(name: str) -> None:
    decode = formats.FORMATS[name].decode
    assert decode is not None
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            decode(LIES[name])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 7, 11), np.float32),
        np.zeros((7, 11, 2), np.int16),
        np.zeros((7, 11, 2), np.complex64),
        np.zeros((0, 11, 2), np.float32),
        np.zeros((7, 11), [("u", "f4"), ("v", "f4")]),
        np.float32(3),
    ],
)
def test_arrays_that_are_no_flow_are_refused(array: np.ndarray) -> None:
    for save, read in (
        (np.save, formats.from_npy),
        (lambda f, a: np.savez(f, flow=a), formats.from_npz),
    ):
        file = io.BytesIO()
        save(file, array)
        with pytest.raises(FormatError):
            read(file.getvalue())


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError):
        read_flow(tmp_path / "a.npy")


def test_unknown_flow_is_black(flow: np.ndarray) -> None:
    flow[0, 0] = np.nan
    picture = colours(flow)
    assert (picture[0, 0] == 0).all()
    flow[0, 0] = 0
    np.testing.assert_array_equal(picture[1:], colours(flow)[1:])
