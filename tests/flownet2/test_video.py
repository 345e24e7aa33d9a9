"""Decoding videos: orientation, the right stream, whole and damaged files."""

import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from flownet2.pairs import Position, Selection, Video
from flownet2.video import VideoError, frames
from tests.support.gateway_stack import picture
from tests.support.videos import write_video

CASES = Path(__file__).parents[3] / "shared" / "cases" / "video"
WIDTH, HEIGHT = 64, 48


def read(path: Path, **options: object) -> tuple[list[np.ndarray], list[int], str]:
    """Return the pictures that can be read, their numbers, and what is said to be wrong."""
    pictures, numbers = [], []
    try:
        for frame in frames(str(path), **options):
            pictures.append(frame.pixels())
            numbers.append(frame.number)
    except VideoError as error:
        return pictures, numbers, str(error)
    return pictures, numbers, ""


# a, b, c and d of x' = a x + c y and y' = b x + d y, as the header of a track has them.
MATRICES = {
    (1, 0, 0, 1): lambda image: image,
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (-1, 0, 0, -1): lambda image: np.rot90(image, 2),
    (0, 1, -1, 0): lambda image: np.rot90(image, -1),
    (0, -1, 1, 0): np.rot90,
    (0, 1, 1, 0): lambda image: image.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda image: np.rot90(image, 2).transpose(1, 0, 2),
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_video_is_turned_and_mirrored_as_its_header_says(
    tmp_path: Path, matrix: tuple[int, int, int, int]
) -> None:
    path = tmp_path / "film.mp4"
    images = write_video(path, 2, qp="0")
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # of version 0
    assert struct.unpack_from(">9i", content, place)[::4] == (1 << 16, 1 << 16, 1 << 30)
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", content, place, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    shown, _, _ = read(path)
    for image, expected in zip(shown, map(MATRICES[matrix], images), strict=True):
        assert image.shape == expected.shape
        assert np.abs(image.astype(int) - expected).mean() < 5


def test_mirrored_as_players_show_it() -> None:
    if not CASES.exists():
        pytest.skip("the cases are not here")
    upright, mirrored, turned = (read(CASES / f"{name}.mp4")[0] for name in ("a", "hflip", "rot90"))
    np.testing.assert_array_equal(mirrored, np.flip(upright, 2))
    np.testing.assert_array_equal(turned, np.rot90(upright, -1, (1, 2)))


@pytest.mark.parametrize(
    ("suffix", "video", "sound", "rate"),
    [
        ("mkv", "libx264", "aac", 44100),
        ("webm", "libvpx", "libopus", 48000),
        ("flv", "libx264", "aac", 44100),
        ("mp4", "libx264", "aac", 44100),
        ("ts", "libx264", "aac", 44100),
    ],
)
def test_a_video_shorter_than_its_sound_is_whole(
    tmp_path: Path, suffix: str, video: str, sound: str, rate: int
) -> None:
    path = tmp_path / f"film.{suffix}"
    write_video(path, 12, codec=video, pixels="yuv420p", sound=(sound, rate, 4))
    assert read(path)[1:] == (list(range(12)), "")


def test_cases_of_users() -> None:
    if not CASES.exists():
        pytest.skip("the cases are not here")
    for path in (*CASES.glob("*.*"), *CASES.glob("folder/*")):
        assert read(path)[1:] == (list(range(12)), ""), path
        assert read(path)[0][0].shape != (32, 32, 3), path  # the cover


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "ts"), ("mpeg2video", "mpg")])
def test_joined_recordings_are_whole(tmp_path: Path, codec: str, suffix: str) -> None:
    write_video(tmp_path / f"a.{suffix}", 30, codec=codec, pixels="yuv420p")
    joined = tmp_path / f"joined.{suffix}"
    joined.write_bytes((tmp_path / f"a.{suffix}").read_bytes() * 2)
    assert read(joined)[1:] == (list(range(60)), "")


@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [
        ("libvpx", "webm", {"live": "1"}),
        ("libx264", "mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("libx264", "h264", {}),
    ],
)
def test_a_file_that_does_not_say_its_length_is_whole(
    tmp_path: Path, codec: str, suffix: str, options: dict[str, str]
) -> None:
    path = tmp_path / f"film.{suffix}"
    write_video(path, 30, codec=codec, pixels="yuv420p", **options)
    assert read(path)[1:] == (list(range(30)), "")


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("libx264", "mp4"),
        ("mpeg4", "mkv"),
        ("libx264", "ts"),
        ("mpeg4", "avi"),
    ],
)
def test_damage_is_told_and_makes_no_pair(tmp_path: Path, codec: str, suffix: str) -> None:
    path = tmp_path / f"film.{suffix}"
    write_video(path, 60, codec=codec, pixels="yuv420p")
    whole, _, _ = read(path)
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][30]
    content = bytearray(path.read_bytes())
    place = content.index(bytes(packet)[:16])
    damage = np.random.default_rng(0).integers(0, 256, 400, np.uint8).tobytes()
    content[place : place + 400] = damage
    path.write_bytes(content)
    pictures, numbers, problem = read(path)
    assert "film" in problem
    assert len(numbers) < 60
    assert numbers == sorted(set(numbers))
    # No frame that follows from damaged ones is taken for a good one.
    for number, image in zip(numbers, pictures, strict=True):
        assert min(np.abs(image.astype(int) - one).mean() for one in whole[number:]) == 0


@pytest.mark.parametrize("lost", [(12, 13), (0, 1)])
def test_lost_frames_keep_the_numbers_of_the_others(tmp_path: Path, lost: tuple[int, ...]) -> None:
    path = tmp_path / "film.mov"
    images = write_video(path, 40, codec="png", pixels="rgb24")
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    for number in lost:
        content[places[number] : places[number] + 64] = bytes(64)
    path.write_bytes(content)
    pictures, numbers, problem = read(path)
    assert numbers == [number for number in range(40) if number not in lost]
    assert f"2 frames are missing, the first at frame {lost[0]}" in problem
    for number, image in zip(numbers, pictures, strict=True):
        np.testing.assert_array_equal(image, images[number])
    pairs = pairs_until_error(Video(str(path), str(tmp_path)), Selection(step=2))
    whole = [n for n in range(38) if not {n, n + 1, n + 2} & set(lost)]
    assert pairs == [(n, n + 2) for n in whole]


def pairs_until_error(source: Video, selection: Selection) -> list[tuple[int, int]]:
    found = []
    pairs: Iterator[object] = source.pairs(selection, print)
    try:
        for pair in pairs:
            found.append((pair.first.number, pair.second.number))
    except Exception:
        return found
    return found


def test_interlaced_video(tmp_path: Path) -> None:
    path = tmp_path / "film.mkv"
    scene = np.asarray(picture(1, 2 * WIDTH, HEIGHT).resize((2 * WIDTH, HEIGHT)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "mpeg2video", rate=25, options={"flags": "+ildct+ilme", "qscale": "2"}
        )
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 8_000_000
        for number in range(8):
            image = scene[:, 4 * number : 4 * number + WIDTH].copy()
            image[1::2] = scene[1::2, 4 * number + 2 : 4 * number + 2 + WIDTH]  # half a frame later
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))

    def combs(image: np.ndarray) -> float:
        grey = image.astype(float).mean(axis=2)
        return float(np.abs(grey[1:-1] - (grey[:-2] + grey[2:]) / 2).mean())

    said: list[str] = []
    combed, _, _ = read(path, warn=said.append)
    smooth, numbers, _ = read(path, warn=said.append, deinterlace=True)
    assert len(said) == 1
    assert "--deinterlace" in said[0]
    assert numbers == list(range(8))
    assert combs(smooth[4]) < 0.7 * combs(combed[4])


def uneven(number: int) -> Fraction:
    return Fraction(number * number, 100)


@pytest.mark.parametrize(
    ("selection", "shown"),
    [
        (Selection(fps=10), [0, 3, 4, 5, 6, 7, 7, 8, 8]),
        (Selection(fps=2), [0, 7]),
        (Selection(start=Position(0.16, True), end=Position(0.5, True)), [4, 5, 6, 7]),
        (Selection(start=Position(3), end=Position(6)), [3, 4, 5]),
        (Selection(fps=10, start=Position(0.16, True), end=Position(0.5, True)), [4, 5, 6, 6]),
    ],
)
def test_frames_by_time(tmp_path: Path, selection: Selection, shown: list[int]) -> None:
    """Frames are at 0, 0.01, 0.04, 0.09 … 0.81 s; at 10 per second, those shown at each 0.1 s."""
    write_video(tmp_path / "film.mkv", 10, times=uneven)
    pairs = list(Video(str(tmp_path / "film.mkv"), "").pairs(selection, print))
    assert [int(pair.first.name) for pair in pairs] == shown[:-1]
    assert [int(pair.second.name) for pair in pairs] == shown[1:]
    if selection.fps:
        start = 0.16 if selection.start.seconds else 0
        times = [start + number / selection.fps for number in range(len(shown))]
        assert [pair.first.time for pair in pairs] == pytest.approx(times[:-1])
        assert [pair.number for pair in pairs] == list(range(len(pairs)))
