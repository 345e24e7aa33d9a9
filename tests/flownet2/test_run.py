"""`flownet2 run` as a user has it: a process, real clips, a real Triton."""

import csv
import http.server
import json
import os
import signal
import struct
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from PIL import Image

from flownet2 import read_flow
from flownet2.colours import colours
from flownet2.formats import from_kitti
from flownet2.manifest import update_manifest
from flownet2.measures import occluded
from launch import triton, wheel
from tests.support.command import command, fail, flownet2, succeed
from tests.support.gateway_stack import ROOT, picture, wait_until
from tests.support.videos import write_video

WIDTH, HEIGHT = 64, 48


@pytest.fixture(scope="module")
def url(closed_form_triton: triton.Triton) -> str:
    return f"grpc://{closed_form_triton.address.grpc}"


def frames(folder: Path, count: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> list[np.ndarray]:
    """Frame files whose numeric order differs from the alphabetical order."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [picture(seed, *size) for seed in range(count)]
    for number, image in enumerate(images):
        image.save(folder / f"frame{number}.png")
    return [np.asarray(image) for image in images]


def closed_form(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (second.astype(np.float32) - first)[..., :2] / 8


def check_flows(folder: Path, images: list[np.ndarray], step: int = 1) -> None:
    """Every pair's .flo is there, holds the flow of its frames, and nothing else is there."""
    numbers = range(len(images) - step)
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{number:06}.flo" for number in numbers),
        "index.csv",
    ]
    for number in numbers:
        flow = read_flow(folder / f"{number:06}.flo")
        np.testing.assert_array_equal(flow, closed_form(images[number], images[number + step]))


def index(folder: Path) -> list[dict[str, str]]:
    with (folder / "index.csv").open() as file:
        return list(csv.DictReader(file))


def test_sources_of_all_kinds_in_one_run(tmp_path: Path, url: str) -> None:
    video = write_video(tmp_path / "film.mkv", 12)
    still = frames(tmp_path / "stills", 12)
    pairs = tmp_path / "pairs.txt"
    pairs.write_text(
        f"{tmp_path}/stills/frame0.png {tmp_path}/stills/frame3.png named/one.flo\n"
        "stills/frame1.png stills/frame4.png\n"
    )
    out = tmp_path / "out"
    succeed("run", tmp_path / "film.mkv", f"{tmp_path}/stills/*.png", pairs, "-o", out, server=url)
    check_flows(out / "film", video)
    check_flows(out / "stills", still)
    for name, (first, second) in {"named/one": (0, 3), "000001": (1, 4)}.items():
        flow = read_flow(out / "pairs" / f"{name}.flo")
        np.testing.assert_array_equal(flow, closed_form(still[first], still[second]))
    rows = index(out / "stills")
    assert [row["first"] for row in rows] == [f"frame{number}.png" for number in range(11)]


def test_formats_and_directions(tmp_path: Path, url: str) -> None:
    images = frames(tmp_path / "a", 3)
    out = tmp_path / "out"
    succeed(
        "run", tmp_path / "a", "-o", out, server=url,
        format="npy,npz,kitti,jpg,hdf5", direction="both", occlusion=True, bound=40,
    )  # fmt: skip
    forward, backward = closed_form(*images[:2]), closed_form(*images[1::-1])
    for flow, side in ((forward, ""), (backward, "_backward")):
        stem = f"{out}/a/000000{side}"
        np.testing.assert_array_equal(np.load(f"{stem}.npy"), flow)
        np.testing.assert_array_equal(np.load(f"{stem}.npz")["flow"], flow)
        assert np.abs(from_kitti(Path(f"{stem}.png").read_bytes()) - flow).max() <= 1 / 128
        with h5py.File(f"{stem}.h5") as file:
            np.testing.assert_array_equal(file["flow"][:], flow)
        for channel, axis in enumerate("xy"):
            grey = np.asarray(Image.open(f"{stem}_{axis}.jpg"), np.float32)
            expected = np.clip((flow[..., channel] + 40) * 255 / 80, 0, 255)
            assert np.abs(grey - expected).mean() < 2
    mask = np.asarray(Image.open(out / "a" / "000000_occluded.png"))
    np.testing.assert_array_equal(mask, occluded(forward, backward))
    assert len(index(out / "a")) == 2 * (2 * 6 + 1)


def test_a_colour_video_has_one_scale_and_the_times_of_its_source(tmp_path: Path, url: str) -> None:
    def uneven(number: int) -> Fraction:
        return Fraction(number * number, 100)

    images = write_video(tmp_path / "film.mkv", 11, (63, 47), times=uneven)
    out = tmp_path / "out"
    succeed(
        "run", tmp_path / "film.mkv", "-o", out, server=url,
        format="mp4", max_flow=30, side_by_side=True,
    )  # fmt: skip
    with av.open(str(out / "film" / "flow.mp4")) as container:
        shown = list(container.decode(video=0))
    assert [frame.time for frame in shown] == pytest.approx([n * n / 100 for n in range(10)])
    for number, frame in enumerate(shown):
        read = frame.to_ndarray(format="rgb24")
        assert read.shape == (48, 126, 3)
        expected = colours(closed_form(images[number], images[number + 1]), 30)
        assert np.abs(read[:47, 63:].astype(float) - expected).mean() < 20
        assert np.abs(read[:47, :63].astype(float) - images[number]).mean() < 20
    assert sorted(path.name for path in (out / "film").iterdir()) == ["flow.mp4", "index.csv"]


def test_frames_apart_a_stretch_and_a_longest_edge(tmp_path: Path, url: str) -> None:
    images = frames(tmp_path / "a", 9)
    out = tmp_path / "out"
    succeed("run", tmp_path / "a", "-o", out, server=url, step=2, start=3, end=7)
    names = sorted(path.name for path in (out / "a").glob("*.flo"))
    assert names == ["000003.flo", "000004.flo"]
    flow = read_flow(out / "a" / "000004.flo")
    np.testing.assert_array_equal(flow, closed_form(images[4], images[6]))
    succeed("run", tmp_path / "a", "-o", tmp_path / "small", server=url, max_edge=32)
    assert read_flow(tmp_path / "small" / "a" / "000000.flo").shape == (24, 32, 2)


@pytest.mark.parametrize("pixels", ["gray", "yuv420p10le"])
def test_grey_and_ten_bit_video(tmp_path: Path, url: str, pixels: str) -> None:
    images = write_video(tmp_path / "film.mkv", 3, pixels=pixels)
    succeed("run", tmp_path / "film.mkv", "-o", tmp_path / "out", server=url)
    flow = read_flow(tmp_path / "out" / "film" / "000001.flo")
    if pixels == "gray":
        images = [
            np.asarray(Image.fromarray(image).convert("L").convert("RGB")) for image in images
        ]
    assert np.abs(flow - closed_form(images[1], images[2])).mean() < 1


def test_rotated_video_is_upright(tmp_path: Path, url: str) -> None:
    path = tmp_path / "film.mp4"
    images = write_video(path, 3)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # the matrix of the track's header, version 0
    assert struct.unpack_from(">9i", content, place)[::4] == (1 << 16, 1 << 16, 1 << 30)
    quarter_clockwise = (0, 1 << 16, 0, -(1 << 16), 0, 0, HEIGHT << 16, 0, 1 << 30)
    struct.pack_into(">9i", content, place, *quarter_clockwise)
    path.write_bytes(content)
    succeed("run", path, "-o", tmp_path / "out", server=url)
    flow = read_flow(tmp_path / "out" / "film" / "000001.flo")
    upright = [np.rot90(image, -1) for image in images]
    assert flow.shape == (WIDTH, HEIGHT, 2)
    assert np.abs(flow - closed_form(upright[1], upright[2])).mean() < 2


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_video_that_is_cut_off_gives_what_can_be_read(
    tmp_path: Path, url: str, suffix: str
) -> None:
    path = tmp_path / f"film.{suffix}"
    write_video(path, 60, codec="mpeg4", pixels="yuv420p", movflags="faststart")
    succeed("run", path, "-o", tmp_path / "whole", server=url)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    said = fail("run", path, "-o", tmp_path / "out", server=url)
    assert f"film.{suffix}" in said
    kept = len(list((tmp_path / "out" / "film").glob("*.flo")))
    assert 20 < kept < 45
    assert f"frame {kept + 1}" in said


def test_bad_input_is_told_in_one_line(tmp_path: Path, url: str) -> None:
    out = tmp_path / "out"
    frames(tmp_path / "one", 1)
    frames(tmp_path / "sizes", 2)
    picture(5, 40, 40).save(tmp_path / "sizes" / "frame2.png")
    frames(tmp_path / "broken", 3)
    (tmp_path / "broken" / "frame1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "empty").mkdir()
    with av.open(str(tmp_path / "sound.mka"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    (tmp_path / "pairs.txt").write_text("a.png\n")
    for name, *expected in (
        ("missing.mp4", "missing.mp4 does not exist"),
        ("one", "one/frame0.png has 1 frame"),
        ("empty", "holds no images"),
        ("sizes", "frame1.png", "frame2.png", "64x48", "40x40"),
        ("broken", "frame1.png"),
        ("sound.mka", "sound.mka has no video"),
        ("pairs.txt", "pairs.txt, line 1"),
    ):
        said = fail("run", tmp_path / name, "-o", out / name, server=url)
        assert all(part in said for part in expected), said
    assert len(list((out / "sizes" / "sizes").glob("*.flo"))) == 1
    assert flownet2("run", tmp_path / "one", "-o", out, format="bmp").returncode == 2
    assert flownet2("run", tmp_path / "one", "-o", out, shard="2/2").returncode == 2


def test_vectors_that_kittis_png_cannot_hold_are_errors(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flownet2.formats.KITTI_SCALE", 2.0**14)  # as if it held 2 pixels
    frames(tmp_path / "frames", 2)
    arguments = ("run", tmp_path / "frames", "-o", tmp_path / "out")
    assert "vectors" in fail(*arguments, format="kitti", server=url)
    assert not list((tmp_path / "out").rglob("*.png"))


def test_errors_can_be_noted_and_skipped(tmp_path: Path, url: str) -> None:
    frames(tmp_path / "a" / "broken", 4)
    (tmp_path / "a" / "broken" / "frame1.png").write_bytes(b"nothing")
    images = frames(tmp_path / "a" / "good", 3)
    out = tmp_path / "out"
    result = flownet2(
        "run", tmp_path / "a" / "broken", tmp_path / "a" / "missing.mp4", tmp_path / "a" / "good",
        "-o", out, on_error="skip", server=url,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "3 errors skipped" in result.stdout
    check_flows(out / "good", images)
    assert [path.name for path in (out / "broken").glob("*.flo")] == ["000002.flo"]
    with (out / "errors.csv").open() as file:
        noted = [(row["source"], row["frames"]) for row in csv.DictReader(file)]
    assert noted == [
        ("broken", "frame0.png and frame1.png"),
        ("broken", "frame1.png and frame2.png"),
        ("missing", ""),
    ]


def test_results_that_cannot_be_written(tmp_path: Path, url: str) -> None:
    frames(tmp_path / "a", 2)
    said = fail("run", tmp_path / "a", "-o", "/dev/full/out", server=url)
    assert "/dev/full" in said


def test_another_run_is_refused_and_overwritten_on_demand(tmp_path: Path, url: str) -> None:
    images = frames(tmp_path / "a", 3)
    out = tmp_path / "out"
    succeed("run", tmp_path / "a", "-o", out, server=url, step=2, format="npy")
    said = fail("run", tmp_path / "a", "-o", out, server=url)
    assert "step was 2" in said
    assert "--overwrite" in said
    assert "model" in fail(
        "run", tmp_path / "a", "-o", out, server=url, step=2, format="npy", model="slow"
    )
    succeed("run", tmp_path / "a", "-o", out, server=url, overwrite=True)
    check_flows(out / "a", images)
    picture(9).save(tmp_path / "a" / "frame1.png")
    assert "has changed" in fail("run", tmp_path / "a", "-o", out, server=url)


def test_what_is_missing_or_damaged_is_done_again_and_no_more(tmp_path: Path, url: str) -> None:
    images = frames(tmp_path / "a", 6)
    out = tmp_path / "out"
    succeed("run", tmp_path / "a", "-o", out, server=url)
    before = (out / "a" / "index.csv").read_bytes()
    times = {path.name: path.stat().st_mtime_ns for path in (out / "a").glob("*.flo")}
    (out / "a" / "000001.flo").unlink()
    damaged = bytearray((out / "a" / "000003.flo").read_bytes())
    damaged[200] ^= 1
    (out / "a" / "000003.flo").write_bytes(damaged)
    succeed("run", tmp_path / "a", "-o", out, server=url)
    check_flows(out / "a", images)
    assert (out / "a" / "index.csv").read_bytes() == before
    changed = {
        path.name
        for path in (out / "a").glob("*.flo")
        if path.stat().st_mtime_ns != times[path.name]
    }
    assert changed == {"000001.flo", "000003.flo"}


def contents(out: Path) -> dict[str, object]:
    """A run's files, but for the video: x264 does not always code small frames the same way."""
    files: dict[str, object] = {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*.*")
        if path.suffix != ".mp4"
    }
    lines = (out / "film" / "index.csv").read_text().splitlines()
    return files | {"film/index.csv": [line for line in lines if "flow.mp4" not in line]}


def shown(out: Path) -> tuple[list[int | None], np.ndarray]:
    """Times and pictures of a run's video."""
    with av.open(str(out / "film" / "flow.mp4")) as container:
        pictures = list(container.decode(video=0))
    return [p.pts for p in pictures], np.stack([p.to_ndarray(format="rgb24") for p in pictures])


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_goes_on_where_it_was(
    tmp_path: Path, url: str, ending: signal.Signals
) -> None:
    write_video(tmp_path / "film.mkv", 120)
    arguments = ("run", tmp_path / "film.mkv", "--format", "flo,mp4", "--jobs", "2")
    once, twice = tmp_path / "once", tmp_path / "twice"
    succeed(*arguments, "-o", once, server=url)
    process = subprocess.Popen(
        command(*arguments, "-o", twice, server=url), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(list(twice.glob("film/*.flo"))) > 20)
    process.send_signal(ending)
    _, said = process.communicate(timeout=30)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[ending]
    done = {path.name: path.stat().st_mtime_ns for path in twice.glob("film/*.flo")}
    assert 20 < len(done) < 119
    if ending == signal.SIGINT:
        assert said.count("\n") == 1
        assert not [path for path in twice.rglob("*") if path.suffix == ".part"]
    succeed(*arguments, "-o", twice, server=url)
    files, expected = contents(twice), contents(once)
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == []
    (times, pictures), (expected_times, expected_pictures) = shown(twice), shown(once)
    assert times == expected_times
    assert np.abs(pictures.astype(float) - expected_pictures).mean() < 2
    again = [name for name, at in done.items() if (twice / "film" / name).stat().st_mtime_ns != at]
    assert len(again) <= 1  # written, but not in the index yet


def test_two_shards_make_the_whole(tmp_path: Path, url: str) -> None:
    videos = [write_video(tmp_path / f"film{number}.mkv", 4 + number) for number in range(5)]
    out = tmp_path / "out"
    shards = [
        subprocess.Popen(
            command("run", f"{tmp_path}/*.mkv", "-o", out, shard=f"{part}/2", server=url), cwd=ROOT
        )
        for part in (0, 1)
    ]
    assert [shard.wait(60) for shard in shards] == [0, 0]
    for number, images in enumerate(videos):
        check_flows(out / f"film{number}", images)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.flo")}
    succeed("run", f"{tmp_path}/*.mkv", "-o", out, server=url)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.flo")} == before


def test_many_agree_on_a_manifest_at_once(tmp_path: Path) -> None:
    sources = {f"film{number}": {"path": f"film{number}.mkv"} for number in range(500)}
    with ThreadPoolExecutor(8) as threads:
        for number in range(20):
            out = tmp_path / str(number)
            agreed = [
                threads.submit(update_manifest, str(out), {"model": "net"}, sources)
                for _ in range(8)
            ]
            for future in agreed:
                future.result()
            assert json.loads((out / "manifest.json").read_bytes())["sources"] == sources
            assert len(list(out.iterdir())) == 1


def test_a_server_that_goes_away_for_a_while_is_waited_for(
    tmp_path: Path, closed_form_repository: Path
) -> None:
    images = write_video(tmp_path / "film.mkv", 200)
    out = tmp_path / "out"
    address = triton.local_address()
    with wheel.serve(closed_form_repository, address=address) as server:
        process = subprocess.Popen(
            command("run", tmp_path / "film.mkv", "-o", out, server=f"grpc://{address.grpc}"),
            cwd=ROOT,
        )
        wait_until(lambda: len(list(out.glob("film/*.flo"))) > 10)
        server.child.kill()
    with wheel.serve(closed_form_repository, address=address):
        assert process.wait(120) == 0
    check_flows(out / "film", images)


def test_two_outputs_of_one_name_are_refused(tmp_path: Path, url: str) -> None:
    images = frames(tmp_path / "a", 3)
    out = tmp_path / "out"
    lines = ["a/frame0.png a/frame1.png clip.0001", "a/frame1.png a/frame2.png clip.0002"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    succeed("run", tmp_path / "list.txt", "-o", out, server=url)
    for number in (0, 1):
        flow = read_flow(out / "list" / f"clip.000{number + 1}.flo")
        np.testing.assert_array_equal(flow, closed_form(*images[number : number + 2]))
    for first, second, options in (
        ("x.flo", "x.png", {}),
        ("x", "./x", {}),
        ("x", "x_backward", {"direction": "both"}),
        ("000001", "", {}),
        ("x", "x_occluded", {"occlusion": True, "format": "png"}),
    ):
        lines = [f"a/frame0.png a/frame1.png {first}", f"a/frame1.png a/frame2.png {second}"]
        (tmp_path / "list.txt").write_text("# pairs\n" + "\n".join(lines))
        said = fail("run", tmp_path / "list.txt", "-o", tmp_path / "no", server=url, **options)
        assert "lines 2 and 3" in said
    assert not (tmp_path / "no").exists()


def test_nothing_found_is_a_failure(tmp_path: Path, url: str) -> None:
    out = tmp_path / "out"
    (tmp_path / "list.txt").write_text("# nothing\n")
    assert "lists nothing" in fail("run", tmp_path / "list.txt", "-o", out, server=url)
    frames(tmp_path / "one", 1)
    result = flownet2("run", tmp_path / "one", "-o", out, on_error="skip", server=url)
    assert result.returncode == 1
    assert "no pair" in result.stderr


def test_a_run_that_stops_names_what_is_not_done(tmp_path: Path, url: str) -> None:
    write_video(tmp_path / "b.avi", 30, codec="mpeg4", pixels="yuv420p")
    write_video(tmp_path / "c.mkv", 3)
    images = write_video(tmp_path / "a.mkv", 3)
    content = (tmp_path / "b.avi").read_bytes()
    (tmp_path / "b.avi").write_bytes(content[: len(content) * 6 // 10])
    said = fail("run", tmp_path, "-o", tmp_path / "out", server=url)
    assert "b.avi can be read up to frame" in said
    assert "1 other source is not done" in said
    check_flows(tmp_path / "out" / "a", images)
    result = flownet2("run", tmp_path, "-o", tmp_path / "out", on_error="skip", server=url)
    assert result.returncode == 0
    assert (tmp_path / "out" / "c" / "000001.flo").exists()


def test_overwriting_deletes_nothing_but_results(tmp_path: Path, url: str) -> None:
    frames(tmp_path / "a", 3)
    out = tmp_path / "out"
    succeed("run", tmp_path / "a", "-o", out, server=url)
    kept = {path: path.read_bytes() for path in out.rglob("*.*")}
    assert "missing" in fail("run", tmp_path / "missing", "-o", out, overwrite=True, server=url)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == kept
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    (out / "a" / "link").symlink_to(tmp_path)
    index_file = out / "a" / "index.csv"
    for name in ("../../victim.txt", str(victim), "link/victim.txt"):
        index_file.write_bytes(kept[index_file] + f"9,a,b,,,{name},4,00000000\n".encode())
        assert "victim.txt" in fail("run", tmp_path / "a", "-o", out, overwrite=True, server=url)
    assert victim.read_text() == "mine"
    for name in ("manifest.json", "a/index.csv"):
        other = tmp_path / name.replace("/", "_") / name
        other.parent.mkdir(parents=True)
        other.write_text('{"name": "another program\'s"}\n')
        root = tmp_path / name.replace("/", "_")
        for overwrite in ({}, {"overwrite": True}):
            said = fail("run", tmp_path / "a", "-o", root, server=url, **overwrite)
            assert "was not written by flownet2" in said
        assert "another program" in other.read_text()


def test_names_that_are_not_utf_8(tmp_path: Path, url: str) -> None:
    images = frames(tmp_path / "a", 3)
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    odd.mkdir()
    for number in range(3):
        name = os.fsdecode(b"f\xfc%d.png" % number)
        (tmp_path / "a" / f"frame{number}.png").rename(odd / name)
    write_video(odd / "film.mkv", 3)
    (odd / os.fsdecode(b"list\xe9.txt")).write_bytes(b"f\xfc0.png f\xfc1.png out\xe9\n")
    out = odd / os.fsdecode(b"out\xe9")
    arguments = ("run", odd, odd / os.fsdecode(b"list\xe9.txt"), "-o", out, "--format", "flo,mp4")
    for _ in range(2):  # the second finds what the first wrote
        line = command(*arguments, server=url)
        result = subprocess.run(
            list(map(os.fsencode, line)),
            cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
            capture_output=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    flow = read_flow(out / os.fsdecode(b"caf\xe9") / "000001.flo")
    np.testing.assert_array_equal(flow, closed_form(*images[1:]))
    assert (out / os.fsdecode(b"list\xe9") / os.fsdecode(b"out\xe9.flo")).exists()
    missing = ("run", odd / "missing.mp4", "-o", out)
    line = list(map(os.fsencode, command(*missing, server=url)))
    result = subprocess.run(line, cwd=ROOT, capture_output=True, check=False)
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"names": "mmaction"}, ["flow_x_00001.jpg", "flow_x_00002.jpg", "flow_y_00001.jpg"]),
        ({"names": "tsn"}, ["flow_x_00001.jpg", "flow_x_00002.jpg", "flow_y_00001.jpg"]),
        ({"names": "raft"}, ["frame0001.flo", "frame0002.flo"]),
        ({"names": "{stem}"}, ["frame0.flo", "frame1.flo"]),
        ({"names": "sub/{stem}-{number:03}", "format": "npy"}, ["sub/frame0-000.npy"]),
    ],
)
def test_names_that_other_programs_read(
    tmp_path: Path, url: str, options: dict[str, str], names: list[str]
) -> None:
    images = frames(tmp_path / "a", 3)
    succeed("run", tmp_path / "a", "-o", tmp_path / "out", server=url, **options)
    out = tmp_path / "out" / "a"
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*.*"))
    assert set(names) <= set(found)
    assert len(found) == 1 + (4 if found[0].endswith(".jpg") else 2)
    if found[0].endswith(".jpg"):
        grey = np.asarray(Image.open(out / "flow_y_00002.jpg"), np.float32)
        expected = np.clip((closed_form(*images[1:])[..., 1] + 20) * 255 / 40, 0, 255)
        assert np.abs(grey - expected).mean() < 2


def test_patterns_of_names_that_are_refused(tmp_path: Path, url: str) -> None:
    write_video(tmp_path / "film.mkv", 3)
    for pattern in ("{stem}", "{frame}", "../{number}", "/tmp/{number}", "{number", ".{number}"):
        said = fail("run", tmp_path / "film.mkv", "-o", tmp_path / "out", names=pattern, server=url)
        assert pattern in said
    assert not (tmp_path / "out").exists()


def test_the_shorter_edge(tmp_path: Path, url: str) -> None:
    frames(tmp_path / "wide", 2)
    frames(tmp_path / "high", 2, (30, 64))
    succeed("run", tmp_path, "-o", tmp_path / "out", server=url, short_edge=24)
    assert read_flow(tmp_path / "out" / "wide" / "000000.flo").shape == (24, 32, 2)
    assert read_flow(tmp_path / "out" / "high" / "000000.flo").shape == (51, 24, 2)


class _Film(http.server.BaseHTTPRequestHandler):
    """Serves one video, as a file or as a stream without a length."""

    content = b""

    found = True

    def do_GET(self) -> None:
        self.send_response(200 if self.found else 404)
        if self.path.startswith("/live"):
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_streams_and_pipes(tmp_path: Path, url: str) -> None:
    images = write_video(tmp_path / "film.mkv", 12)
    _Film.content = (tmp_path / "film.mkv").read_bytes()
    out = tmp_path / "out"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Film) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name in ("file.mkv?token=1", "live.mkv"):
            succeed("run", f"{address}/{name}", "-o", out / name, server=url)
            check_flows(out / name / name.partition(".")[0], images)
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.flo")}
        succeed("run", f"{address}/file.mkv?token=1", "-o", out / "file.mkv?token=1", server=url)
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*.flo")} == before
        said = fail("run", f"{address}/live.mkv", "-o", out / "live.mkv", server=url)
        assert "is live" in said
        _Film.found = False
        said = fail("run", f"{address}/live.mkv", "-o", out / "later", server=url)
        assert "live.mkv cannot be read as a video" in said
        assert "404" in said
        _Film.found = True
        succeed("run", f"{address}/live.mkv", "-o", out / "later", server=url)
        check_flows(out / "later" / "live", images)
        server.shutdown()
    line = command("run", "-", "-o", out / "pipe", server=url)
    with (tmp_path / "film.mkv").open("rb") as film:
        assert subprocess.run(line, cwd=ROOT, stdin=film, check=False).returncode == 0
    check_flows(out / "pipe" / "stdin", images)


def test_a_folder_of_many_kinds_that_is_killed_again_and_again(tmp_path: Path, url: str) -> None:
    films = {
        "run/a": write_video(tmp_path / "in" / "run" / "a.mkv", 40),
        "run/b": write_video(tmp_path / "in" / "run" / "b.mkv", 30),
        "jump/a": write_video(tmp_path / "in" / "jump" / "a.mkv", 35),
        "still": frames(tmp_path / "in" / "still", 20),
    }
    out = tmp_path / "out"
    line = command("run", tmp_path / "in", "-o", out, "--names", "raft", jobs=2, server=url)
    done = 0
    for round in range(3):
        process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL)
        wait_until(lambda enough=done + 15: len(list(out.rglob("*.flo"))) > enough)
        process.kill()
        process.wait()
        done = len(list(out.rglob("*.flo")))
        assert done < 121, round
    said = succeed(*line[3:])
    assert set(path.name for path in out.iterdir()) == {"run", "jump", "still", "manifest.json"}
    assert f"{121 - done}" in said or f"{122 - done}" in said
    for name, images in films.items():
        assert len(list((out / name).glob("*.flo"))) == len(images) - 1
        for number in range(len(images) - 1):
            flow = read_flow(out / name / f"frame{number + 1:04}.flo")
            np.testing.assert_array_equal(flow, closed_form(*images[number : number + 2]))
        rows = index(out / name)
        assert [int(row["number"]) for row in rows] == list(range(len(images) - 1))
