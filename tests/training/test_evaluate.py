"""The evaluation against closed-form errors on folders that the tests write."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from flownet2.errors import Error
from flownet2.formats import to_flo, to_kitti
from training.evaluate import evaluate, opencv_methods, picture, score, table
from training.pairs import Pair, read_pairs

HEIGHT, WIDTH = 48, 64


def write_pair(folder: Path, flow: np.ndarray, kitti: bool = False) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for frame in range(2):
        pixels = random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"frame{frame}.png")
    if kitti:
        (folder / "gt.png").write_bytes(to_kitti(flow))
    else:
        (folder / "gt.flo").write_bytes(to_flo(flow))


def read_pair(folder: Path) -> Pair:
    return next(pair for pair in read_pairs(folder.parent) if pair.name == folder.name)


def constant(u: float, v: float) -> np.ndarray:
    return np.broadcast_to(np.array([u, v], np.float32), (HEIGHT, WIDTH, 2)).copy()


def test_errors_of_zero_flow_are_the_lengths_of_the_true_flows(tmp_path: Path) -> None:
    write_pair(tmp_path / "flo_a", constant(3, -4))
    write_pair(tmp_path / "flo_b", constant(0.6, 0.8))
    write_pair(tmp_path / "kitti_a", constant(-30, 40), kitti=True)
    pairs = list(read_pairs(tmp_path))
    scores = evaluate(pairs, {"zero flow": opencv_methods()["zero flow"]})["zero flow"]
    assert scores["flo_a"].epe == pytest.approx(5)
    assert scores["flo_b"].epe == pytest.approx(1)
    assert scores["kitti_a"].epe == pytest.approx(50)
    assert [scores[pair.name].errors.share_beyond(3) for pair in pairs] == [1, 0, 1]
    lines = table(pairs, {"zero flow": scores}).splitlines()
    assert "| **flo, mean of 2** | 3.00 |" in lines
    assert "| **all, mean of 3** | 18.67 |" in lines
    assert "| pixels off by more than 3, % | 66.7 |" in lines


def test_unknown_and_invalid_pixels_do_not_count(tmp_path: Path) -> None:
    flow = constant(3, -4)
    flow[:10] = 1e10
    write_pair(tmp_path / "sintel", flow)
    invalid = np.zeros((HEIGHT, WIDTH), np.uint8)
    invalid[:, :20] = 255
    Image.fromarray(invalid).save(tmp_path / "sintel" / "invalid.png")
    pair = read_pair(tmp_path / "sintel")
    assert pair.valid.sum() == (HEIGHT - 10) * (WIDTH - 20)
    estimate = constant(3, -4)
    estimate[:10] = estimate[:, :20] = 77
    assert score(estimate, pair).epe == 0


def test_visible_and_occluded_pixels_are_told_apart(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", constant(3, -4))
    flow = constant(0, 1)
    flow[:24] = (0, 20)
    write_pair(tmp_path / "a_b", flow)
    for name, share in (("a", 4), ("a_b", 2)):
        occluded = np.zeros((HEIGHT, WIDTH), np.uint8)
        occluded[:, : WIDTH // share] = 255
        Image.fromarray(occluded).save(tmp_path / name / "occlusions.png")
    pairs = list(read_pairs(tmp_path))
    lines = table(pairs, evaluate(pairs, {"zero": opencv_methods()["zero flow"]})).splitlines()
    # Visible: 3/4 of 5 px, 1/4 each of 1 and of 20 px; occluded: 1/4 each of 5, 1 and 20 px.
    assert "| a, visible | 7.20 |" in lines
    assert "| a, occluded | 8.67 |" in lines
    assert "| a, visible, 0 to 2 px | 1.00 |" in lines
    assert "| a, visible, 2 to 10 px | 5.00 |" in lines
    assert "| a, visible, 10 to 40 px | 20.00 |" in lines


def test_kitti_pixels_without_truth_do_not_count(tmp_path: Path) -> None:
    flow = constant(1, 2)
    flow[0, 0] = np.nan
    write_pair(tmp_path / "kitti", flow, kitti=True)
    pair = read_pair(tmp_path / "kitti")
    assert not pair.valid[0, 0]
    assert score(constant(1, 2), pair).epe == 0


def test_opencv_methods_find_a_shift(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    noise = random.integers(0, 256, (120, 160, 3), dtype=np.uint8)
    scene = cv2.GaussianBlur(noise, (0, 0), 2.0)
    scene = cv2.normalize(scene, None, 0, 255, cv2.NORM_MINMAX)
    first, second = scene[10:106, 10:138].copy(), scene[8:104, 7:135].copy()
    for name, method in opencv_methods().items():
        flow = method(first, second)
        assert flow.shape == (96, 128, 2)
        if name != "zero flow":
            np.testing.assert_allclose(np.median(flow, axis=(0, 1)), [3, 2], atol=0.3)


def test_pictures_stand_side_by_side(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", constant(3, -4))
    pair = read_pair(tmp_path / "a")
    shown = picture(pair, {"truth": lambda first, second: pair.flow})
    assert shown.shape == (HEIGHT, 3 * WIDTH, 3)
    np.testing.assert_array_equal(shown[:, WIDTH : 2 * WIDTH], shown[:, 2 * WIDTH :])


def test_folders_that_are_no_pairs_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(Error, match="not laid out as pairs"):
        list(read_pairs(tmp_path))
    write_pair(tmp_path / "a", constant(1, 1))
    (tmp_path / "a" / "gt.flo").write_bytes(b"PIEH" + bytes(20))
    with pytest.raises(Error, match=r"gt\.flo"):
        list(read_pairs(tmp_path))
    (tmp_path / "a" / "gt.flo").write_bytes(to_flo(constant(1, 1)))
    (tmp_path / "a" / "frame1.png").unlink()
    with pytest.raises(FileNotFoundError, match="frame1"):
        list(read_pairs(tmp_path))
