"""The sample pairs that ship."""

from pathlib import Path

SAMPLES = Path(__file__).parent.parent / "samples"


def sample_folders() -> list[Path]:
    """Return the folders of the pairs."""
    return sorted(file.parent for file in SAMPLES.glob("*/frame0.png"))
