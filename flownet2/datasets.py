"""Layouts of public optical-flow datasets: paths of each pair's frames, true flow and masks.

A layout is a row of `DATASETS`: paths below the dataset's folder as it is unpacked, with fields in
braces. `{sequence}` is a name without slashes, `{path}` any number of folders, `{number}` the first
frame's number, `{next}` and `{previous}` the numbers beside it with as many digits, and `{split}`
the folder of a split. `.*` at the end of a path stands for any suffix.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from flownet2.errors import Error
from flownet2.formats import Flow, Mask, known, read_flow

Split = Literal["training", "evaluation"]


class DatasetError(Error):
    """Raised for a folder without the dataset's layout; the message says what is missing."""


@dataclass(frozen=True)
class Layout:
    """Paths of a set of pairs in a dataset.

    Attributes:
        title: name of the set of pairs.
        truth: the true flow.
        first: the first frame.
        second: the second frame.
        occlusions: mask, above zero for pixels that are hidden in the second frame.
        visible_truth: the true flow of visible pixels only, as in KITTI.
        invalid: mask, above zero for pixels that are not evaluated.
        supersampled: whether the truth has four vectors for each pixel, as in Spring.
        leads_out: whether the last flow of a sequence has no second frame.
        splits: names of the training and of the evaluation split.
        alternative: whether it is used only if the previous layout finds no pairs.
        split_list: file with a line for each number in `{sequence}`: 1 for training, 2 for
            evaluation.
    """

    title: str
    truth: str
    first: str
    second: str
    occlusions: str | None = None
    visible_truth: str | None = None
    invalid: str | None = None
    supersampled: bool = False
    leads_out: bool = False
    splits: tuple[str, str] = ("", "")
    alternative: bool = False
    split_list: str | None = None


def _sintel(kind: str) -> Layout:
    frame = f"training/{kind}/{{sequence}}/frame_"
    return Layout(
        f"sintel {kind}",
        "training/flow/{sequence}/frame_{number}.flo",
        frame + "{number}.png",
        frame + "{next}.png",
        occlusions="training/occlusions/{sequence}/frame_{number}.png",
        invalid="training/invalid/{sequence}/frame_{number}.png",
    )


def _kitti(year: int, frames: str, alternative: bool = False) -> Layout:
    return Layout(
        f"kitti {year}",
        "training/flow_occ/{sequence}_10.png",
        f"training/{frames}/{{sequence}}_10.png",
        f"training/{frames}/{{sequence}}_11.png",
        visible_truth="training/flow_noc/{sequence}_10.png",
        alternative=alternative,
    )


def _things(kind: str) -> Layout:
    frame = f"frames_{kind}/{{split}}/{{path}}/left/"
    return Layout(
        f"things {kind}",
        "optical_flow/{split}/{path}/into_future/left/OpticalFlowIntoFuture_{number}_L.pfm",
        frame + "{number}.*",
        frame + "{next}.*",
        leads_out=True,
        splits=("TRAIN", "TEST"),
    )


def _things_subset(kind: str) -> Layout:
    return Layout(
        f"things subset {kind}",
        "{split}/flow/left/into_future/{number}.flo",
        f"{{split}}/image_{kind}/left/{{number}}.png",
        f"{{split}}/image_{kind}/left/{{next}}.png",
        occlusions="{split}/flow_occlusions/left/into_future/{number}.png",
        leads_out=True,
        splits=("train", "val"),
    )


def _spring(side: str, direction: str) -> Layout:
    frame = f"train/{{sequence}}/frame_{side}/frame_{side}_"
    flow = f"flow_{direction}_{side}"
    return Layout(
        "spring",
        f"train/{{sequence}}/{flow}/{flow}_{{number}}.flo5",
        frame + "{number}.png",
        frame + ("{next}.png" if direction == "FW" else "{previous}.png"),
        supersampled=True,
    )


SPRING_VIEWS = tuple((side, direction) for side in ("left", "right") for direction in ("FW", "BW"))

DATASETS: dict[str, tuple[Layout, ...]] = {
    "sintel": (_sintel("clean"), _sintel("final")),
    "kitti": (
        _kitti(2015, "image_2"),
        _kitti(2012, "colored_0"),
        _kitti(2012, "image_0", alternative=True),
    ),
    # The layout of `samples/`.
    "pairs": tuple(
        Layout(
            "pairs",
            f"{{sequence}}/gt{suffix}",
            "{sequence}/frame0.*",
            "{sequence}/frame1.*",
            occlusions="{sequence}/occlusions.png",
            invalid="{sequence}/invalid.png",
        )
        for suffix in (".flo", ".png")
    ),
    "middlebury": (
        Layout(
            "middlebury",
            "other-gt-flow/{sequence}/flow{number}.flo",
            "other-data/{sequence}/frame{number}.png",
            "other-data/{sequence}/frame{next}.png",
        ),
    ),
    "chairs": (
        Layout(
            "chairs",
            "data/{sequence}_flow.flo",
            "data/{sequence}_img1.ppm",
            "data/{sequence}_img2.ppm",
            split_list="FlyingChairs_train_val.txt",
        ),
    ),
    "things": (
        _things("cleanpass"),
        _things("finalpass"),
        _things_subset("clean"),
        _things_subset("final"),
    ),
    "spring": tuple(_spring(*view) for view in SPRING_VIEWS),
    "hd1k": (
        Layout(
            "hd1k",
            "hd1k_flow_gt/flow_occ/{sequence}_{number}.png",
            "hd1k_input/image_2/{sequence}_{number}.png",
            "hd1k_input/image_2/{sequence}_{next}.png",
            leads_out=True,
        ),
    ),
    "viper": (
        Layout(
            "viper",
            "{split}/flow/{sequence}/{sequence}_{number}.npz",
            "{split}/img/{sequence}/{sequence}_{number}.*",
            "{split}/img/{sequence}/{sequence}_{next}.*",
            leads_out=True,
            splits=("train", "val"),
        ),
    ),
    "tartanair": (
        Layout(
            "tartanair",
            "{path}/flow/{number}_{next}_flow.npy",
            "{path}/image_left/{number}_left.png",
            "{path}/image_left/{next}_left.png",
            invalid="{path}/flow/{number}_{next}_mask.npy",
        ),
    ),
}


@dataclass(frozen=True)
class Sample:
    """A pair of frames and the files of its true flow and masks.

    Attributes:
        title: the set that the pair belongs to, such as "sintel clean".
        sequence: the sequence or scene within the set; or the pair's name if there is none.
        supersampled: whether the truth has twice the frames' height and width. Its vectors are in
            pixels of the frames.
    """

    title: str
    sequence: str
    first: Path
    second: Path
    truth: Path
    occlusions: Path | None = None
    visible_truth: Path | None = None
    invalid: Path | None = None
    supersampled: bool = False

    def read(self) -> tuple[Flow, Mask | None]:
        """Read the true flow, NaN at pixels that are not evaluated, and the occlusion mask if any.

        Raises:
            FormatError: the flow or a mask is damaged, or their sizes differ.
            OSError: a file cannot be read.
        """
        flow = read_flow(self.truth)
        if self.invalid is not None:
            flow[_mask(self.invalid, flow)] = np.nan
        if self.visible_truth is not None:
            visible = read_flow(self.visible_truth)
            return flow, known(flow) & ~_fitting(known(visible), flow, self.visible_truth)
        return flow, None if self.occlusions is None else _mask(self.occlusions, flow)


def _mask(path: Path, flow: Flow) -> Mask:
    """Read a mask, a picture or a .npy file, of the size of a flow."""
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                values = np.asarray(image.convert("L"))
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow and NumPy raise many types on damaged files
        raise DatasetError(f"{path} cannot be read as a mask: {error}") from error
    return _fitting(values > 0, flow, path)


def _fitting(mask: Mask, flow: Flow, path: Path) -> Mask:
    if mask.shape != flow.shape[:2]:
        raise DatasetError(f"{path} differs in size from the true flow beside it")
    return mask


def samples(dataset: str, folder: Path, split: Split = "evaluation") -> list[Sample]:
    """List the pairs of a dataset that are in a folder, in order.

    Args:
        dataset: a key of `DATASETS`.
        folder: the dataset as it is unpacked, or its folder of the split.
        split: the split, for datasets that have splits. If only the training split is there, its
            pairs are listed instead, and their titles say so.

    Raises:
        DatasetError: the folder has no pair, or the list of its split does not fit.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder")
    pairs = _of_split(dataset, folder, split)
    if not pairs and split == "evaluation":
        pairs = [
            replace(sample, title=f"{sample.title}, training split")
            for sample in _of_split(dataset, folder, "training")
        ]
    if not pairs:
        truth, first = DATASETS[dataset][0].truth, DATASETS[dataset][0].first
        raise DatasetError(
            f"{folder} is not laid out as {dataset}: there is no true flow {truth} "
            f"with frames {first}"
        )
    return pairs


def _of_split(dataset: str, folder: Path, split: Split) -> list[Sample]:
    pairs: list[Sample] = []
    before = 0
    for layout in DATASETS[dataset]:
        if not (layout.alternative and before):
            found = list(_samples(layout, folder, split))
            before = len(found)
            pairs += found
    return pairs


def _samples(layout: Layout, folder: Path, split: Split) -> Iterator[Sample]:
    name = layout.splits[split == "evaluation"]
    paths = {
        field: path.replace("{split}", name)
        for field, path in vars(layout).items()
        if isinstance(path, str) and field not in ("title", "split_list")
    }
    top = paths["truth"].split("/")[0]
    if top in ("training", "train", "val") and not (folder / top).is_dir():
        paths = {field: path.partition("/")[2] for field, path in paths.items()}
    part = _split_list(folder / layout.split_list, split) if layout.split_list else None
    for fields in matches(folder, paths["truth"]):
        files = {field: filled(folder, path, fields) for field, path in paths.items()}
        if part is not None and not part(fields["sequence"]):
            continue
        if not files["first"].parent.is_dir():  # a pass (such as Sintel's final) that is not there
            continue
        if layout.leads_out and not files["second"].exists():
            after = fields | {"number": fields["next"]}
            if not filled(folder, paths["truth"], after).exists():
                continue
        masks = {
            field: path if path.exists() else None
            for field, path in files.items()
            if field in ("occlusions", "visible_truth", "invalid")
        }
        yield Sample(
            layout.title,
            fields.get("sequence") or fields.get("path") or fields["number"],
            files["first"],
            files["second"],
            files["truth"],
            supersampled=layout.supersampled,
            **masks,
        )


def _split_list(path: Path, split: Split) -> Callable[[str], bool] | None:
    """Return a function that tests if a pair is in the split; None if there is no list."""
    if not path.exists():
        return None
    lines = path.read_text().split()

    def part(name: str) -> bool:
        if not name.isdecimal() or not 1 <= int(name) <= len(lines):
            raise DatasetError(f"{path} has no line for the pair {name}")
        return lines[int(name) - 1] == ("1" if split == "training" else "2")

    return part


_FIELDS = {"sequence": "[^/]+", "path": ".+", "number": r"\d+", "next": r"\d+"}


def matches(folder: Path, template: str) -> Iterator[dict[str, str]]:
    """Yield the fields of each file below a folder that matches a path with fields, by name.

    `next` and `previous` are added to the fields if there is a `number`.
    """
    pattern, seen = "", set[str]()
    for text, field in re.findall(r"([^{]*)(?:\{(\w+)\})?", template):
        pattern += re.escape(text)
        if field:
            pattern += f"(?P={field})" if field in seen else f"(?P<{field}>{_FIELDS[field]})"
            seen.add(field)
    for path in sorted(folder.glob(re.sub(r"\{(\w+)\}", _wildcard, template))):
        fit = re.fullmatch(pattern, path.relative_to(folder).as_posix())
        if fit and not path.name.startswith("."):
            fields = fit.groupdict()
            if "number" in fields:
                number, width = int(fields["number"]), len(fields["number"])
                fields["next"] = f"{number + 1:0{width}}"
                fields["previous"] = f"{number - 1:0{width}}"
            yield fields


def _wildcard(field: re.Match[str]) -> str:
    return "**" if field[1] == "path" else "*"


def filled(folder: Path, template: str, fields: Mapping[str, str]) -> Path:
    """Fill in the fields of a path; replace `.*` by the suffix of the file that exists."""
    path = folder / template.format_map(fields)
    if path.suffix == ".*":
        return next(iter(sorted(path.parent.glob(path.name))), path.with_suffix(".png"))
    return path
