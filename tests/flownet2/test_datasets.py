"""Layouts of datasets, on folders laid out by hand after the datasets' own descriptions."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flownet2 import write_flow
from flownet2.datasets import DatasetError, Sample, samples

HEIGHT, WIDTH = 4, 6


def flow(value: float, scale: int = 1) -> np.ndarray:
    return np.full((scale * HEIGHT, scale * WIDTH, 2), value, np.float32)


def lay_out(root: Path, *files: str) -> None:
    """Write small files; those of flow hold 1.0, masks are white on the left."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("1\n2\n2\n")
        elif "mask" in path.name:
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            mask[:, :2] = 100
            np.save(path, mask)
        elif "occ" in str(path.parent.name) and path.suffix == ".png":
            write_flow(path, flow(1), "kitti")
        elif path.parent.parts[-2:] == ("viper", "flow"):
            np.savez(path, u=flow(1)[..., 0], v=flow(1)[..., 1])
        elif path.suffix in (".flo", ".flo5", ".pfm", ".npy", ".npz"):
            write_flow(path, flow(1, 2 if path.suffix == ".flo5" else 1))
        else:
            Image.new("RGB", (WIDTH, HEIGHT), "white").save(path)


def pairs(found: list[Sample], root: Path) -> list[tuple[str, str, str, str]]:
    return [
        (one.title, one.sequence, *(path.relative_to(root).as_posix() for path in paths))
        for one in found
        for paths in [(one.first, one.second)]
    ]


THINGS = "frames_cleanpass/TEST/A/0003/left"
FLOW = "optical_flow/TEST/A/0003/into_future/left/OpticalFlowIntoFuture"
LAYOUTS: dict[str, tuple[list[str], list[tuple[str, str, str, str]]]] = {
    "sintel": (
        [
            *(f"training/{k}/alley_1/frame_000{n}.png" for k in ("clean", "final") for n in (1, 2)),
            "training/flow/alley_1/frame_0001.flo",
            "test/clean/wall/frame_0001.png",
        ],
        [
            (f"sintel {kind}", "alley_1", f"{folder}_0001.png", f"{folder}_0002.png")
            for kind in ("clean", "final")
            for folder in [f"training/{kind}/alley_1/frame"]
        ],
    ),
    "kitti": (
        [
            *(f"training/colored_0/000003_{n}.png" for n in (10, 11)),
            *(f"training/image_0/000003_{n}.png" for n in (10, 11)),
            "training/flow_occ/000003_10.png",
        ],
        [
            (
                "kitti 2012",
                "000003",
                "training/colored_0/000003_10.png",
                "training/colored_0/000003_11.png",
            )
        ],
    ),
    "middlebury": (
        [*(f"other-data/Venus/frame{n}.png" for n in (10, 11)), "other-gt-flow/Venus/flow10.flo"],
        [("middlebury", "Venus", "other-data/Venus/frame10.png", "other-data/Venus/frame11.png")],
    ),
    "chairs": (
        # Part of the dataset with its whole list: pair 1 is for training, pair 2 is missing.
        [
            *(
                f"data/0000{n}_{end}"
                for n in (1, 3)
                for end in ("img1.ppm", "img2.ppm", "flow.flo")
            ),
            "data/._00003_flow.flo",
            "FlyingChairs_train_val.txt",
        ],
        [("chairs", "00003", "data/00003_img1.ppm", "data/00003_img2.ppm")],
    ),
    "things": (
        # The last flow of a scene leads out of it.
        [f"{THINGS}/000{n}.webp" for n in (6, 7)] + [f"{FLOW}_000{n}_L.pfm" for n in (6, 7)],
        [("things cleanpass", "A/0003", f"{THINGS}/0006.webp", f"{THINGS}/0007.webp")],
    ),
    "things subset": (
        [
            *(f"{s}/image_clean/left/000000{n}.png" for s in ("train", "val") for n in (0, 1)),
            *(f"{s}/flow/left/into_future/0000000.flo" for s in ("train", "val")),
        ],
        [
            (
                "things subset clean",
                "0000000",
                "val/image_clean/left/0000000.png",
                "val/image_clean/left/0000001.png",
            )
        ],
    ),
    "spring": (
        [
            *(f"train/0001/frame_right/frame_right_000{n}.png" for n in (1, 2)),
            "train/0001/flow_FW_right/flow_FW_right_0001.flo5",
            "train/0001/flow_BW_right/flow_BW_right_0002.flo5",
        ],
        [
            ("spring", "0001", *(f"train/0001/frame_right/frame_right_{n}.png" for n in numbers))
            for numbers in (("0001", "0002"), ("0002", "0001"))
        ],
    ),
    "hd1k": (
        [
            *(f"hd1k_input/image_2/000004_00{n}.png" for n in (10, 11)),
            *(f"hd1k_flow_gt/flow_occ/000004_00{n}.png" for n in (10, 11)),
        ],
        [
            (
                "hd1k",
                "000004",
                "hd1k_input/image_2/000004_0010.png",
                "hd1k_input/image_2/000004_0011.png",
            )
        ],
    ),
    "viper": (
        [*(f"val/img/001/001_0000{n}.jpg" for n in (1, 2)), "val/flow/001/001_00001.npz"],
        [("viper", "001", "val/img/001/001_00001.jpg", "val/img/001/001_00002.jpg")],
    ),
    "tartanair": (
        [
            *(f"office/office/Easy/P000/image_left/00000{n}_left.png" for n in (0, 1)),
            "office/office/Easy/P000/flow/000000_000001_flow.npy",
            "office/office/Easy/P000/flow/000000_000001_mask.npy",
        ],
        [
            (
                "tartanair",
                "office/office/Easy/P000",
                "office/office/Easy/P000/image_left/000000_left.png",
                "office/office/Easy/P000/image_left/000001_left.png",
            )
        ],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pairs_of_a_dataset(tmp_path: Path, name: str) -> None:
    files, expected = LAYOUTS[name]
    lay_out(tmp_path, *files)
    found = samples(name.partition(" ")[0], tmp_path)
    assert pairs(found, tmp_path) == expected
    for sample in found:
        assert sample.first.exists()
        assert sample.second.exists()
        truth, _ = sample.read()
        scale = 2 if sample.supersampled else 1
        assert truth.shape == (scale * HEIGHT, scale * WIDTH, 2)
        assert sample.supersampled == (name == "spring")
    for folder in ("training", "val", "train"):  # the folder of the split is taken as well
        if (tmp_path / folder).is_dir() and name != "things subset":
            assert len(samples(name.partition(" ")[0], tmp_path / folder)) == len(expected)


def test_training_splits(tmp_path: Path) -> None:
    lay_out(tmp_path / "things", *LAYOUTS["things subset"][0])
    (found,) = samples("things", tmp_path / "things", "training")
    assert found.first == tmp_path / "things/train/image_clean/left/0000000.png"
    lay_out(tmp_path / "chairs", *LAYOUTS["chairs"][0])
    (found,) = samples("chairs", tmp_path / "chairs", "training")
    assert (found.title, found.sequence) == ("chairs", "00001")
    (tmp_path / "chairs/data/00003_flow.flo").unlink()
    (found,) = samples("chairs", tmp_path / "chairs")
    assert (found.title, found.sequence) == ("chairs, training split", "00001")


def test_masks(tmp_path: Path) -> None:
    lay_out(tmp_path / "tartanair", *LAYOUTS["tartanair"][0])
    (sample,) = samples("tartanair", tmp_path / "tartanair")
    truth, occluded = sample.read()
    assert occluded is None
    assert np.isnan(truth[:, :2]).all()
    assert (truth[:, 2:] == 1).all()

    lay_out(tmp_path / "kitti", *LAYOUTS["kitti"][0])
    visible = flow(1)
    visible[0] = np.nan
    (tmp_path / "kitti/training/flow_noc").mkdir()
    write_flow(tmp_path / "kitti/training/flow_noc/000003_10.png", visible, "kitti")
    (sample,) = samples("kitti", tmp_path / "kitti")
    truth, occluded = sample.read()
    assert (truth == 1).all()
    assert occluded is not None
    assert occluded[0].all()
    assert not occluded[1:].any()


def test_a_missing_frame_is_not_passed_over(tmp_path: Path) -> None:
    files = LAYOUTS["things"][0]
    lay_out(tmp_path, *files, f"{FLOW}_0008_L.pfm")
    assert [sample.second.exists() for sample in samples("things", tmp_path)] == [True, False]


def test_folders_and_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for name in ("sintel", "spring"):
        with pytest.raises(DatasetError, match=f"not laid out as {name}"):
            samples(name, tmp_path)
    lay_out(tmp_path, "data/00004_flow.flo", *LAYOUTS["chairs"][0])
    with pytest.raises(DatasetError, match="no line for the pair 00004"):
        samples("chairs", tmp_path)


def test_damaged_masks_are_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, *LAYOUTS["sintel"][0])
    mask = tmp_path / "training/invalid/alley_1/frame_0001.png"
    mask.parent.mkdir(parents=True)
    sizes = Image.new("L", (WIDTH, HEIGHT + 1))
    sizes.save(mask)
    with pytest.raises(DatasetError, match=r"invalid.*size"):
        samples("sintel", tmp_path)[0].read()
    mask.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DatasetError, match=r"invalid.*cannot be read"):
        samples("sintel", tmp_path)[0].read()
