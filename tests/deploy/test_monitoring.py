"""Monitoring: every query is PromQL, and uses metrics that exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx2
import pytest
import yaml

from launch import triton
from tests.support.gateway_stack import Gateway

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus" / "prometheus.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "flownet2.json"
SCALED_OBJECT = DEPLOY / "kubernetes" / "scaling" / "scaled-object.yaml"

# Metrics that Triton has on machines with a GPU alone (docs/user_guide/metrics.md of its sources).
GPU_METRICS = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"}


def test_promtool_takes_the_configuration() -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    subprocess.run(["promtool", "check", "config", PROMETHEUS], check=True, capture_output=True)


def expressions() -> list[str]:
    """The queries of the dashboard, and the query by which Tritons scale."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    triggers = yaml.safe_load(SCALED_OBJECT.read_text())["spec"]["triggers"]
    return shown + [trigger["metadata"]["query"] for trigger in triggers]


def test_queries_are_promql(tmp_path: Path) -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    rules = [
        {"record": f"rule:{number}", "expr": text.replace("$__rate_interval", "1m")}
        for number, text in enumerate(expressions())
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", file], check=True, capture_output=True)


def test_queries_ask_for_metrics_that_exist(
    gateway: Gateway, closed_form_triton: triton.Triton
) -> None:
    counted = names(httpx2.get(f"{gateway.url}/metrics").text)
    served = names(httpx2.get(closed_form_triton.address.metrics).text) | GPU_METRICS
    asked = {
        name
        for text in expressions()
        for name in re.findall(r"\b(?:flownet2|nv|process)_\w+", text)
    }
    assert asked - counted - served == set()
    assert asked & counted
    assert asked & served


def names(exposition: str) -> set[str]:
    """Names of the metrics, and of a histogram's series."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", exposition, re.M):
        found.add(name)
        if kind == "histogram":
            found |= {f"{name}_{series}" for series in ("bucket", "sum", "count")}
    return found
