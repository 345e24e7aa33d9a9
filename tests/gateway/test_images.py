"""Decoding: correct pixels for every mode, a client error for every broken file, no crash."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gateway import images
from gateway.admission import SLOT_BYTES
from gateway.errors import (
    AnimatedImage,
    DamagedImage,
    GatewayError,
    ImageTooLarge,
    ImageTooSmall,
    NotAnImage,
    SizesDiffer,
    UnsupportedImageFormat,
)
from tests.support.gateway_stack import ROOT, encoded, picture
from tests.support.hostile_images import (
    avif_with_exif,
    bad_images,
    good_images,
    grey_tiff,
    interlaced,
    no_palette,
    repetitive_exif,
    tiff,
)

CASES = ROOT.parent / "shared" / "cases" / "deep"

FORMATS = ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM"]
GOOD = dict(good_images())
BAD = dict(bad_images())
MAX_PIXELS = 64_000_000

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(autouse=True)
def _pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    images.configure_pillow(MAX_PIXELS, FORMATS)


def prepare(file: bytes, native: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The second image of a pair through the whole decoding path."""
    pair = images.open_pair({"image1": file, "image2": file}, FORMATS, max_pixels)
    if native:
        images.check_native(pair["image2"], "image2", 2**22)
    images.load(pair["image1"], "image1")
    return images.to_rgb(images.load(pair["image2"], "image2"), "image2", native)


def as_before(file: bytes) -> np.ndarray:
    """The pixels that the FlowNet2 Docker image's service computes from a file."""
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.resize((512, 512), Image.Resampling.LANCZOS).convert("RGB"))


@pytest.mark.parametrize("name", GOOD)
def test_unusual_files_are_read_as_before(name: str) -> None:
    file = GOOD[name]
    pixels = prepare(file)
    assert (pixels.shape, pixels.dtype) == ((512, 512, 3), np.uint8)
    if name != "png-16-bit":
        np.testing.assert_array_equal(pixels, as_before(file))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    grey = picture(3, mode="L")
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    np.testing.assert_array_equal(prepare(encoded(wide)), as_before(encoded(grey)))
    ramp = np.arange(0, 2**16, 2**8, dtype=np.uint16).reshape(16, 16)
    scaled = prepare(encoded(Image.fromarray(ramp)), native=True)
    np.testing.assert_array_equal(scaled[..., 0], np.rint(ramp / 65535 * 255))


@pytest.mark.parametrize("kind", ["pgm", "tiff", "tiff-deflate", "tiff-12-bit", "float", "png"])
def test_deep_images_are_scaled_by_the_range_of_their_type(kind: str) -> None:
    """Whatever the file's type, the pixels are those of the 8-bit image, not clipped ones."""
    ramp = np.linspace(0, 1, 64 * 48).reshape(48, 64)
    deep = np.rint(ramp * 65535).astype(np.uint16)
    file = {
        "pgm": lambda: b"P5 64 48 65535\n" + deep.astype(">u2").tobytes(),
        "tiff": lambda: encoded(Image.fromarray(deep), "TIFF"),
        "tiff-deflate": lambda: encoded(Image.fromarray(deep), "TIFF", compression="tiff_deflate"),
        "tiff-12-bit": lambda: tiff(grey_tiff(bits=12), twelve_bits(np.rint(ramp * 4095))),
        "float": lambda: encoded(Image.fromarray(ramp.astype(np.float32)), "TIFF"),
        "png": lambda: encoded(Image.fromarray(deep)),
    }[kind]()
    scaled = prepare(file, native=True)[..., 0]
    assert np.abs(scaled - ramp * 255).max() <= 0.55
    assert (scaled.min(), scaled.max()) == (0, 255)


def twelve_bits(values: np.ndarray) -> bytes:
    """Pairs of 12-bit values in three bytes each."""
    first, second = values.astype(np.uint16).reshape(-1, 2).T
    parts = (first >> 4, (first & 15) << 4 | second >> 8, second & 255)
    return np.stack(parts, axis=1).astype(np.uint8).tobytes()


@pytest.mark.skipif(not CASES.is_dir(), reason="the folder shared/cases is not there")
@pytest.mark.parametrize("kind", ["g16_{}.pgm", "f01_{}.tif", "g16_{}.png"])
def test_deep_cases(kind: str) -> None:
    for index in (0, 1):
        deep = prepare((CASES / kind.format(index)).read_bytes(), native=True).astype(int)
        plain = prepare((CASES / f"g8_{index}.png").read_bytes(), native=True)
        assert np.abs(deep - plain).max() <= 1


def test_orientation_of_tiff_and_avif_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("TIFF", "AVIF"):
        file = encoded(picture(1, 64, 48), format, exif=exif)
        assert prepare(file, native=True).shape[:2] in ((48, 64),), format


def test_no_message_holds_the_address_of_an_object() -> None:
    for name, file in BAD.items():
        with pytest.raises(GatewayError) as caught:
            prepare(file)
        assert " at 0x" not in caught.value.detail, name


def test_interlaced_has_the_pixels_of_the_plain_file() -> None:
    grey = np.asarray(picture(4, 37, 29, mode="L"))
    np.testing.assert_array_equal(prepare(interlaced(grey), native=True)[..., 1], grey)


def test_native_keeps_the_size_and_ignores_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert prepare(encoded(picture(1, 64, 48), "JPEG", exif=exif), native=True).shape == (48, 64, 3)


def test_metadata_is_not_looked_at() -> None:
    """Pillow would warn of each tag of this EXIF, and a warning is an error here."""
    file = encoded(picture(1), "JPEG", exif=repetitive_exif())
    np.testing.assert_array_equal(prepare(file), as_before(encoded(picture(1), "JPEG")))
    file = avif_with_exif(picture(1))
    np.testing.assert_array_equal(prepare(file), as_before(encoded(picture(1), "AVIF")))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("text", NotAnImage),
        ("zeros", NotAnImage),
        ("base64", NotAnImage),
        ("ico", NotAnImage),
        ("pdf", UnsupportedImageFormat),
        ("jpeg2000", UnsupportedImageFormat),
        ("animated-gif", AnimatedImage),
        ("animated-avif", AnimatedImage),
        ("animated-tiff", AnimatedImage),
        ("tiff-endless-pages", AnimatedImage),
        ("tiff-jpeg", UnsupportedImageFormat),
        ("tiff-of-signed", UnsupportedImageFormat),
        ("tiff-of-integers", UnsupportedImageFormat),
        ("tiff-of-unsigned-32", UnsupportedImageFormat),
        ("tiff-nan", UnsupportedImageFormat),
        ("tiff-255", UnsupportedImageFormat),
        ("tiff-overlapping-strips", DamagedImage),
        ("tiff-huge-tile", DamagedImage),
        ("tiff-bomb", ImageTooLarge),
        ("gif-many-blocks", DamagedImage),
        ("gif-bomb", ImageTooLarge),
        ("bmp-run-lengths", UnsupportedImageFormat),
        ("bmp-bomb", ImageTooLarge),
        ("ppm-of-text", UnsupportedImageFormat),
        ("pgm-of-10-bits", UnsupportedImageFormat),
        ("ppm-bomb", ImageTooLarge),
        ("avif-many-boxes", DamagedImage),
        ("animated-webp", AnimatedImage),
        ("animated-png", AnimatedImage),
        ("bomb-by-size", ImageTooLarge),
        ("webp-canvas-bomb", ImageTooLarge),
        ("absurd-size", ImageTooLarge),
        ("10000000-wide", ImageTooLarge),
        ("65501-high", ImageTooLarge),
        ("jpeg-many-scans", DamagedImage),
        ("png-many-chunks", DamagedImage),
        ("jpeg-many-segments", DamagedImage),
        ("jpeg-filled", DamagedImage),
        ("webp-many-chunks", DamagedImage),
        ("ztxt-bomb", DamagedImage),
        ("itxt-bomb", DamagedImage),
        ("many-texts", DamagedImage),
        ("wrong-crc", DamagedImage),
        ("png-head-jpeg-body", DamagedImage),
        ("webp-cut-0.5", DamagedImage),
    ],
)
def test_the_cause_is_named(name: str, error: type[GatewayError]) -> None:
    with pytest.raises(error):
        prepare(BAD[name])


@pytest.mark.parametrize("format", FORMATS)
def test_the_pixel_limit_is_exact(format: str) -> None:
    images.configure_pillow(40 * 30, FORMATS)
    assert prepare(encoded(picture(1, 40, 30), format), max_pixels=1200).shape == (512, 512, 3)
    with pytest.raises(ImageTooLarge, match="1200 pixels"):
        prepare(encoded(picture(1, 41, 30), format), max_pixels=1200)


def test_sizes_must_be_one() -> None:
    files = {"image1": encoded(picture(1, 40, 30)), "image2": encoded(picture(1, 30, 40))}
    with pytest.raises(SizesDiffer, match=r"image1 has 40x30 .* image2 30x40"):
        images.open_pair(files, FORMATS, MAX_PIXELS)


def test_colours_without_a_palette_are_damage() -> None:
    """Resizing makes them black; Pillow converts them at their own size with an AssertionError."""
    assert prepare(no_palette()).shape == (512, 512, 3)
    with pytest.raises(DamagedImage):
        prepare(no_palette(), native=True)


def test_native_limits() -> None:
    with pytest.raises(ImageTooSmall):
        prepare(encoded(picture(1, 15, 40)), native=True)
    assert prepare(encoded(picture(1, 16, 40)), native=True).shape == (40, 16, 3)
    with pytest.raises(ImageTooLarge):
        prepare(encoded(Image.new("L", (2**11, 2**11 + 1))), native=True)
    with pytest.raises(ImageTooLarge, match="multiple of 64"):  # the model sees 128 rows for 65
        prepare(encoded(Image.new("L", (40_000, 65))), native=True)


DECODE = """
import sys
from gateway import images
FORMATS = sys.argv[2].split(",")
images.configure_pillow(64_000_000, FORMATS)
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
file = open(sys.argv[1], "rb").read()
image = images.open_pair({"a": file, "b": file}, FORMATS, 64_000_000)["a"]
counted, before = images.working_bytes({"a": image}, native=False), peak()
images.to_rgb(images.load(image, "a"), "a", native=False)
print(counted, peak() - before)
"""


@pytest.mark.parametrize(
    ("mode", "format", "options"),
    [
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("I;16", "PNG", {}),
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
        ("CMYK", "JPEG", {"progressive": True, "subsampling": 0}),
        ("RGB", "WEBP", {"method": 0}),
        ("RGB", "AVIF", {"speed": 10}),
        ("RGBA", "AVIF", {"speed": 10}),
        ("RGB", "BMP", {}),
        ("L", "GIF", {}),
        ("RGB", "PPM", {}),
        ("I;16", "PPM", {}),
        ("RGB", "TIFF", {"compression": "tiff_deflate"}),
        ("RGB", "TIFF", {"compression": "tiff_lzw", "strip_size": 2**30}),
        ("I;16", "TIFF", {}),
        ("F", "TIFF", {}),
    ],
)
def test_memory_is_counted_as_it_is_used(
    mode: str, format: str, options: dict[str, object], tmp_path: Path
) -> None:
    """Decoding uses no more memory than is counted, plus the minimum of a request."""
    (tmp_path / "file").write_bytes(encoded(Image.new(mode, (3000, 2000)), format, **options))
    command = [sys.executable, "-c", DECODE, str(tmp_path / "file"), ",".join(FORMATS)]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    counted, used = map(int, output.split())
    assert used < counted + SLOT_BYTES
    assert counted < 2 * used  # and not far from it


def refused_or_read(file: bytes) -> None:
    status, shape = 200, (512, 512, 3)
    try:
        shape = prepare(file).shape
    except GatewayError as error:
        status = error.status
    assert status < 500
    assert shape == (512, 512, 3)


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    format=st.sampled_from(FORMATS),
    mode=st.sampled_from(["RGB", "L"]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    cut=st.floats(0, 1),
    tail=st.binary(max_size=40),
)
def test_mutated_files_never_crash(
    format: str, mode: str, edits: list[tuple[float, int]], cut: float, tail: bytes
) -> None:
    images.configure_pillow(2**20, FORMATS)
    file = bytearray(encoded(picture(2, 24, 17, mode), format))
    for place, value in edits:
        file[int(place * len(file))] = value
    refused_or_read(bytes(file[: int(cut * len(file)) or 1]) + tail)


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    head=st.sampled_from(
        [
            b"",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff",
            b"RIFF\x20\0\0\0WEBPVP8 ",
            b"GIF89a",
            b"BM",
            b"II*\0\x08\0\0\0",
            b"MM\0*\0\0\0\x08",
            b"P5 ",
            b"\0\0\0\x18ftypavif",
        ]
    ),
    tail=st.binary(max_size=300),
)
def test_any_bytes_never_crash(head: bytes, tail: bytes) -> None:
    images.configure_pillow(2**20, FORMATS)
    refused_or_read(head + tail)
