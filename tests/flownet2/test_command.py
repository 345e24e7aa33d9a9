"""The commands beside `run`: pair, convert, view, evaluate, models."""

from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from flownet2 import read_flow, service, write_flow
from flownet2.colours import colours
from flownet2.measures import warp
from launch import triton
from tests.support.command import fail, flownet2, succeed
from tests.support.gateway_stack import Gateway, free_port, picture

WIDTH, HEIGHT = 80, 56


def closed_form(first: Image.Image, second: Image.Image) -> np.ndarray:
    return (np.asarray(second, np.float32) - np.asarray(first, np.float32))[..., :2] / 8


def write_images(*paths: Path) -> list[Image.Image]:
    images = [picture(seed, WIDTH, HEIGHT) for seed in range(len(paths))]
    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return images


def constant(u: float, v: float) -> np.ndarray:
    return np.broadcast_to(np.array([u, v], np.float32), (HEIGHT, WIDTH, 2)).copy()


@pytest.mark.parametrize("output", ["flow.flo", "flow.npy", "flow.npz", "flow.pfm"])
def test_pair(tmp_path: Path, gateway: Gateway, output: str) -> None:
    images = write_images(tmp_path / "a.png", tmp_path / "b.png")
    said = succeed(
        "pair", tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / output, server=gateway.url
    )
    flow = closed_form(*images)
    np.testing.assert_array_equal(read_flow(tmp_path / output), flow)
    lengths = np.hypot(*np.moveaxis(flow, 2, 0))
    assert f"{WIDTH}x{HEIGHT}" in said
    assert f"{lengths.mean():.2f}" in said
    assert f"{lengths.max():.2f}" in said


def test_pair_says_what_is_wrong_in_a_line(tmp_path: Path, gateway: Gateway) -> None:
    write_images(tmp_path / "a.png")
    arguments = ("pair", tmp_path / "a.png", tmp_path / "missing.png", "-o")
    assert "missing.png" in fail(*arguments, tmp_path / "flow.flo", server=gateway.url)
    assert ".bmp" in fail(*arguments, tmp_path / "flow.bmp", server=gateway.url)
    assert flownet2("pair", "a.png").returncode == 2
    assert not list(tmp_path.glob("flow.*"))


def test_without_a_server_it_says_what_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWNET2_URL", "http://127.0.0.1:9")
    assert "--server" in fail("models")
    assert "is not a server" in fail("models", server="127.0.0.1:5003")


def test_a_checkout_starts_a_server_for_as_long_as_the_command_runs(
    tmp_path: Path, closed_form_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path / "a.png", tmp_path / "b.png")
    monkeypatch.delenv("FLOWNET2_URL", raising=False)
    monkeypatch.setenv("MODEL_REPOSITORY", str(closed_form_repository))
    monkeypatch.setattr(service, "DEFAULT_SERVER", f"http://127.0.0.1:{free_port()}")
    before = psutil.Process().children(recursive=True)
    succeed("pair", tmp_path / "a.png", tmp_path / "b.png", "-o", tmp_path / "flow.flo")
    np.testing.assert_array_equal(read_flow(tmp_path / "flow.flo"), closed_form(*images))
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def test_convert(tmp_path: Path) -> None:
    flow = np.random.default_rng(0).normal(0, 9, (HEIGHT, WIDTH, 2)).astype(np.float32)
    write_flow(tmp_path / "a.flo", flow)
    succeed("convert", tmp_path / "a.flo", tmp_path / "b.png", format="kitti")
    succeed("convert", tmp_path / "b.png", tmp_path / "c.pfm")
    assert np.abs(read_flow(tmp_path / "c.pfm") - flow).max() <= 0.0079  # a 128th, rounded
    succeed("convert", tmp_path / "a.flo", tmp_path / "d.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "d.png")), colours(flow))
    assert "d.png" in fail("convert", tmp_path / "d.png", tmp_path / "e.flo")


def test_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    (second,) = write_images(tmp_path / "b.png")
    flow = constant(6, -3)
    write_flow(tmp_path / "a.flo", flow)

    def view(**options: object) -> np.ndarray:
        path = succeed("view", tmp_path / "a.flo", **options).strip()
        return np.asarray(Image.open(path).convert("RGB")).astype(int)

    shown = view()
    np.testing.assert_array_equal(shown[:HEIGHT, :WIDTH], colours(flow))
    legend = shown[10:107, WIDTH + 10 : WIDTH + 107]
    middle, reach = 48, 48 / np.hypot(6, 3)
    there = legend[round(middle - 2.9 * reach), round(middle + 5.8 * reach)]
    assert np.abs(there - shown[0, 0]).max() < 40  # the wheel has the flow's colour where it points
    warped = view(**{"as": "warp", "image": tmp_path / "b.png"})
    assert np.abs(warped - warp(np.asarray(second), flow)).max() <= 0.5
    arrows = view(**{"as": "arrows"})
    assert (arrows != 255).any()


def test_models(gateway: Gateway, closed_form_triton: triton.Triton) -> None:
    for server in (gateway.url, f"grpc://{closed_form_triton.address.grpc}"):
        said = succeed("models", server=server)
        assert "flownet2" in said
        assert "closed form" in said


def figures(printed: str) -> dict[str, list[str]]:
    """Rows of a printed table, by their first column."""
    rows = [line.split("\t") for line in printed.splitlines() if "\t" in line]
    return {row[0]: row[1:] for row in rows}


def test_errors_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    truth = constant(3, -4)
    truth[:8] = (30, 40)
    truth[8] = np.nan
    write_flow("truth.png", truth, "kitti")
    estimate = np.where(np.isnan(truth), 7, truth) + np.float32([0, 4])
    estimate[:8] = (30, 42)
    write_flow("flow.flo", estimate)
    slow, fast = (HEIGHT - 9) * WIDTH, 8 * WIDTH
    epe = (4 * slow + 2 * fast) / (slow + fast)
    assert figures(succeed("evaluate", "flow.flo", "truth.png"))["flow.flo"] == [
        "1", f"{epe:.2f}", f"{100 * slow / (slow + fast):.2f} %", "4.00", "", "2.00", "",
    ]  # fmt: skip
    write_flow("small.flo", estimate[1:])
    assert "80x55" in fail("evaluate", "small.flo", "truth.png")


def lay_out_sintel(root: Path) -> None:
    training = root / "training"
    for kind in ("clean", "final"):
        frames = [training / kind / "alley_1" / f"frame_000{n}.png" for n in (1, 2, 3)]
        images = write_images(*frames)
    for number in (1, 2):
        flow = training / "flow" / "alley_1" / f"frame_000{number}.flo"
        flow.parent.mkdir(parents=True, exist_ok=True)
        write_flow(flow, closed_form(*images[number - 1 : number + 1]) + np.float32([number, 0]))
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:, : 10 * number] = 255
        for name in ("occlusions", "invalid"):
            file = training / name / "alley_1" / f"frame_000{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask if name == "occlusions" else mask[::-1] * 0).save(file)


def lay_out_kitti(root: Path) -> None:
    training = root / "training"
    images = write_images(*(training / "image_2" / f"00000{n}.png" for n in ("0_10", "0_11")))
    truth = closed_form(*images) + np.float32([0, 1])
    for name in ("flow_occ", "flow_noc"):
        (training / name).mkdir()
        write_flow(training / name / "000000_10.png", truth, "kitti")
        truth[:10] = np.nan


def lay_out_middlebury(root: Path) -> None:
    images = write_images(*(root / "other-data" / "Venus" / f"frame{n}.png" for n in (10, 11)))
    (root / "other-gt-flow" / "Venus").mkdir(parents=True)
    write_flow(root / "other-gt-flow" / "Venus" / "flow10.flo", closed_form(*images) + 1)


def lay_out_chairs(root: Path) -> None:
    for number in (1, 2):
        images = write_images(*(root / "data" / f"0000{number}_img{n}.ppm" for n in (1, 2)))
        write_flow(root / "data" / f"0000{number}_flow.flo", closed_form(*images) + number)
    (root / "FlyingChairs_train_val.txt").write_text("1\n2\n")


def lay_out_things(root: Path) -> None:
    scene = root / "frames_cleanpass" / "TEST" / "A" / "0000" / "left"
    images = write_images(*(scene / f"000{n}.png" for n in (6, 7)))
    flow = root / "optical_flow" / "TEST" / "A" / "0000" / "into_future" / "left"
    flow.mkdir(parents=True)
    for number in (6, 7):
        write_flow(flow / f"OpticalFlowIntoFuture_000{number}_L.pfm", closed_form(*images) + 1)


@pytest.mark.parametrize(
    ("dataset", "rows"),
    [
        ("sintel", {"sintel clean": ("2", 1.5, 1.67), "sintel final": ("2", 1.5, 1.67)}),
        ("kitti", {"kitti 2015": ("1", 1.0, 1.0)}),
        ("middlebury", {"middlebury": ("1", 2**0.5, None)}),
        ("chairs", {"chairs": ("1", 2 * 2**0.5, None)}),
        ("things", {"things cleanpass": ("1", 2**0.5, None)}),
    ],
)
def test_errors_of_a_server_on_a_benchmark(
    tmp_path: Path,
    gateway: Gateway,
    dataset: str,
    rows: dict[str, tuple[str, float, float | None]],
) -> None:
    globals()[f"lay_out_{dataset}"](tmp_path)
    said = succeed("evaluate", tmp_path, dataset=dataset, server=gateway.url)
    found = figures(said)
    for name, (pairs, epe, occluded) in rows.items():
        assert found[name][0] == pairs
        assert float(found[name][1]) == pytest.approx(epe, abs=0.011)
        assert found[name][6] == (f"{occluded:.2f}" if occluded else "")
    if dataset == "kitti":
        assert found["kitti 2015"][7:] == ["10.06", "30.37 %"]
        assert "table 4" in said


def test_a_folder_that_is_no_benchmark(tmp_path: Path, gateway: Gateway) -> None:
    assert "sintel" in fail("evaluate", tmp_path, dataset="sintel", server=gateway.url)
    assert flownet2("evaluate", tmp_path).returncode == 2
