"""Markdown tables of results, and a description of the machine."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from export.served.machine import available_cores, has_bfloat16


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns after the first are numbers, aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def machine() -> str:
    """Return a line with CPU, cores and Python version of this machine."""
    facts = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    cpu = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        cpu += f" (family {facts['cpu family']}, model {facts['model']})"
    return (
        f"{cpu}, {available_cores()} cores, "
        f"{'with' if has_bfloat16() else 'without'} bfloat16 arithmetic, "
        f"load {os.getloadavg()[0]:.1f} at the start, Python {platform.python_version()}"
    )


def bypass_proxies() -> None:
    """Let this process and its children connect to this machine's servers without a proxy.

    gRPC, httpx2 and perf_analyzer use the proxy that the environment names even for 127.0.0.1.
    """
    exceptions = (os.environ.get("no_proxy"), os.environ.get("NO_PROXY"), "127.0.0.1")
    os.environ["no_proxy"] = ",".join(filter(None, exceptions))


def milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds with three significant digits."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
