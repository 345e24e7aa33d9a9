"""Archives for benchmarks, from hand-laid test splits, against the benchmarks' published rules."""

import signal
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flownet2 import formats
from tests.support.command import command, fail, flownet2
from tests.support.frames import HEIGHT, WIDTH, closed_form, write_images
from tests.support.gateway_stack import Gateway

KITTI = [f"testing/image_2/00000{n}_{t}.png" for n in (0, 1) for t in (10, 11)]
SINTEL = [f"test/{k}/wall/frame_000{n}.png" for k in ("clean", "final") for n in (1, 2, 3)]
SPRING = [
    f"test/0003/frame_{side}/frame_{side}_000{n}.png" for side in ("left", "right") for n in (1, 2)
]


def lay_out(root: Path, files: list[str]) -> dict[str, Image.Image]:
    return dict(zip(files, write_images(*(root / file for file in files)), strict=True))


def submit(folder: Path, archive: Path, dataset: str, gateway: Gateway) -> str:
    ended = flownet2("submit", folder, "-o", archive, dataset=dataset, server=gateway.url)
    assert ended.returncode == 0, ended.stderr
    assert "the benchmark will refuse the archive" in ended.stderr  # these splits are not whole
    return ended.stdout


def flows(archive: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(archive) as file:
        assert file.testzip() is None
        return {
            name: formats.READABLE[Path(name).suffix](file.read(name)) for name in file.namelist()
        }


def test_kitti_is_10_to_11_alone(tmp_path: Path, gateway: Gateway) -> None:
    images = lay_out(tmp_path, KITTI)
    archive = tmp_path / "submission.zip"
    assert "2 flows of KITTI 2015" in submit(tmp_path, archive, "kitti", gateway)
    found = flows(archive)
    assert sorted(found) == ["flow/000000_10.png", "flow/000001_10.png"]
    for name, flow in found.items():
        frames = [images[f"testing/image_2/{name[5:11]}_{t}.png"] for t in (10, 11)]
        assert np.abs(flow - closed_form(*frames)).max() <= 1 / 128
    assert not (tmp_path / "submission.zip.files").exists()
    assert submit(tmp_path / "testing", archive, "kitti", gateway)  # the split's folder alone


def test_kitti_2012_has_its_flow_in_the_root(tmp_path: Path, gateway: Gateway) -> None:
    lay_out(tmp_path, [f"testing/image_0/000000_{t}.png" for t in (10, 11)])
    submit(tmp_path, tmp_path / "a.zip", "kitti", gateway)
    assert list(flows(tmp_path / "a.zip")) == ["000000_10.png"]


def test_sintel_has_both_passes(tmp_path: Path, gateway: Gateway) -> None:
    images = lay_out(tmp_path, SINTEL)
    submit(tmp_path, tmp_path / "a.zip", "sintel", gateway)
    found = flows(tmp_path / "a.zip")
    assert sorted(found) == [
        f"{kind}/wall/frame_000{n}.flo" for kind in ("clean", "final") for n in (1, 2)
    ]
    for name, flow in found.items():
        number = int(name[-5])
        frames = [images[f"test/{name[:-8]}000{n}.png"] for n in (number, number + 1)]
        np.testing.assert_array_equal(flow, closed_form(*frames))


def test_spring_has_both_views_and_directions(tmp_path: Path, gateway: Gateway) -> None:
    images = lay_out(tmp_path, SPRING)
    submit(tmp_path, tmp_path / "a.zip", "spring", gateway)
    found = flows(tmp_path / "a.zip")
    for side in ("left", "right"):
        frames = [images[f"test/0003/frame_{side}/frame_{side}_000{n}.png"] for n in (1, 2)]
        for direction, number, pair in (("FW", 1, frames), ("BW", 2, frames[::-1])):
            name = f"flow_{direction}_{side}"
            flow = found.pop(f"0003/{name}/{name}_000{number}.flo5")
            np.testing.assert_array_equal(flow, closed_form(*pair))
    assert not found


def test_splits_that_are_not_whole_are_refused(tmp_path: Path, gateway: Gateway) -> None:
    def refused(dataset: str) -> str:
        arguments = ("submit", tmp_path, "-o", tmp_path / "a.zip")
        return fail(*arguments, dataset=dataset, server=gateway.url)

    assert "no test split of kitti" in refused("kitti")
    lay_out(tmp_path, KITTI)
    (tmp_path / KITTI[3]).unlink()
    assert "000001_11.png is missing" in refused("kitti")
    lay_out(tmp_path, SINTEL[:3])
    assert "no frames test/final" in refused("sintel")
    lay_out(tmp_path, [*SINTEL, "test/clean/wall/frame_0005.png"])
    assert "frame_0004.png is missing" in refused("sintel")
    assert not (tmp_path / "a.zip").exists()


def test_an_interrupted_run_is_resumed(tmp_path: Path, gateway: Gateway) -> None:
    lay_out(tmp_path, SINTEL)
    archive, kept = tmp_path / "a.zip", tmp_path / "a.zip.files"
    arguments = ("submit", tmp_path, "-o", archive, "--jobs", 1)
    process = subprocess.Popen(
        command(*arguments, dataset="sintel", server=gateway.url), stderr=subprocess.PIPE
    )
    first = kept / "clean/wall/frame_0001.flo"
    while not first.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not archive.exists()
    marked = formats.from_flo(first.read_bytes()) + 1  # a flow that is there is not computed again
    first.write_bytes(formats.to_flo(marked))
    second = kept / "clean/wall/frame_0002.flo"
    second.write_bytes(formats.to_flo(marked)[:-8])  # but one that is cut off is
    submit(tmp_path, archive, "sintel", gateway)
    found = flows(archive)
    assert len(found) == 4
    np.testing.assert_array_equal(found["clean/wall/frame_0001.flo"], marked)
    assert all(flow.shape == (HEIGHT, WIDTH, 2) for flow in found.values())


def test_results_of_another_dataset_are_not_mixed_in(tmp_path: Path, gateway: Gateway) -> None:
    lay_out(tmp_path / "one", KITTI)
    lay_out(tmp_path / "two", KITTI)
    archive = tmp_path / "a.zip"
    kept = tmp_path / "a.zip.files"
    kept.mkdir()
    (kept / "submission.json").write_text("{}")
    arguments = ("submit", tmp_path / "two", "-o", archive)
    assert "another run" in flownet2(*arguments, dataset="kitti", server=gateway.url).stderr
    assert not archive.exists()


def test_kitti_clips_long_vectors_and_says_so(
    tmp_path: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flownet2.submit.KITTI_LIMITS", (-512.0, 1.0))
    images = lay_out(tmp_path, KITTI[:2])
    ended = flownet2(
        "submit", tmp_path, "-o", tmp_path / "a.zip", dataset="kitti", server=gateway.url
    )
    flow = closed_form(*images.values())
    share = (flow > 1).any(axis=2).mean()
    assert f"000000_10.png: {share:.2%} of the vectors are clipped" in ended.stderr
    (found,) = flows(tmp_path / "a.zip").values()
    assert np.abs(found - np.minimum(flow, 1)).max() <= 1 / 128
