"""The pairs that ship, as files."""

from pathlib import Path

SAMPLES = Path(__file__).parent.parent / "samples"


def sample_folders() -> list[Path]:
    """Folders of the pairs."""
    return sorted(file.parent for file in SAMPLES.glob("*/frame0.png"))
