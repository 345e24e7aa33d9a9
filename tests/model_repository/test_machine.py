"""Cores and memory of the machine, or of the container."""

from pathlib import Path

import psutil
import pytest

from export.served.machine import available_cores, available_memory


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000\n", 4),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("10000 100000\n", 1),
        ("900000 100000\n", 4),
        (None, 4),
    ],
)
def test_threads_follow_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, quota: str | None, cores: int
) -> None:
    def read_text(path: Path, **options: object) -> str:
        assert str(path) == "/sys/fs/cgroup/cpu.max"
        if quota is None:
            raise FileNotFoundError(path)
        return quota

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 5})
    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_cores() == cores


@pytest.mark.parametrize(
    ("limit", "memory"), [("max\n", None), (f"{2**30}\n", 2**30), (None, None)]
)
def test_memory_is_that_of_the_container(
    monkeypatch: pytest.MonkeyPatch, limit: str | None, memory: int | None
) -> None:
    def read_text(path: Path, **options: object) -> str:
        assert str(path) == "/sys/fs/cgroup/memory.max"
        if limit is None:
            raise FileNotFoundError(path)
        return limit

    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_memory() == (memory or psutil.virtual_memory().total)
