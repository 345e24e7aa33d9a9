"""The golden pair decides which engine serves."""

import re
from pathlib import Path

import numpy as np
import pytest

from export.golden import golden_images
from export.served.engines import EngineError, Flow, Golden, Images, first_that_is_right

FLOW = np.full((1, 512, 512, 2), (1.5, -2.0), np.float32)


class Fake:
    """An engine whose flow is off by so many pixels, in the last of its runs."""

    name, device = "fake", "cpu"

    def __init__(self, precision: str, error: float = 0, first_runs: int = 0) -> None:
        self.precision, self.error, self.first_runs = precision, error, first_runs
        self.runs = 0

    def __call__(self, image1: Images, image2: Images) -> Flow:
        self.runs += 1
        last = self.runs == self.first_runs + 1
        return FLOW + np.float32(last * self.error) * np.array([0.6, 0.8], np.float32)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden(*golden_images(), FLOW)


@pytest.mark.parametrize(
    ("precision", "small", "large"),
    [("fp32", 0.0009, 0.0011), ("fp16", 0.049, 0.051), ("bf16", 0.049, 0.051)],
)
def test_limits_are_those_of_the_precision(
    golden: Golden, precision: str, small: float, large: float
) -> None:
    right, wrong = Fake(precision, small, first_runs=2), Fake(precision, large, first_runs=2)
    assert golden.difference(right) == pytest.approx(small, rel=0.01)
    with pytest.raises(EngineError, match=re.escape(f"differs by {large:.4f} px on average")):
        golden.difference(wrong)


def test_flow_that_is_not_a_number_is_wrong(golden: Golden) -> None:
    with pytest.raises(EngineError, match="nan"):
        golden.difference(Fake("fp16", np.nan))


def test_wrong_and_missing_engines_are_passed_over(golden: Golden) -> None:
    lines: list[str] = []

    def missing() -> Fake:
        raise ModuleNotFoundError("No module named 'onnxruntime'")

    right = Fake("fp32")
    candidates = [
        ("first", missing),
        ("second", lambda: Fake("bf16", 3)),
        ("third", lambda: right),
        ("fourth", lambda: Fake("fp32")),
    ]
    engine, difference = first_that_is_right(candidates, golden, lines.append)
    assert engine is right
    assert difference == 0
    assert lines == [
        "first is not used: No module named 'onnxruntime'",
        "second is not used: its flow of the golden pair differs by 3.0000 px on average, "
        "more than 0.0500 px",
    ]
    with pytest.raises(EngineError, match="no engine"):
        first_that_is_right(candidates[:2], golden, lines.append)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 not the whole file"])
def test_golden_pair_that_cannot_be_read_names_the_remedy(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "golden.npz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(EngineError, match=r"golden\.npz cannot be read: .*Export the model again"):
        Golden.read(file)


def test_the_golden_pair_moves_as_its_maker_says() -> None:
    """The second image, shifted back by the motion at its centre, is the first one there."""
    first, second = (image[0].astype(float) for image in golden_images())
    centre = np.s_[192:320, 192:320]
    moved = np.s_[191:319, 193:321], np.s_[191:319, 194:322]  # 1.5 to the right is between them
    between = sum(second[window] for window in moved) / 2
    assert np.abs(between - first[centre]).mean() < 0.3 * np.abs(second - first)[centre].mean()
    assert first[centre].std() > 30
