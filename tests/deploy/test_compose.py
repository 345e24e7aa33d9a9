"""docker-compose.yml and what it mounts: checked by Docker Compose, and against the project."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.app import create_app
from gateway.settings import Settings
from launch import triton
from launch.triton import Address
from tests.support import dockerfile
from tests.support.gateway_stack import Gateway

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
PUBLISHED = ROOT / "deploy" / "publish-triton.yml"
PROMETHEUS = ROOT / "deploy" / "prometheus" / "prometheus.yml"
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "flownet2.json"

# Metrics that Triton has on machines with a GPU alone (docs/user_guide/metrics.md of its sources).
GPU_METRICS = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"}


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    return found


def composed(*profiles: str, files: tuple[Path, ...] = (COMPOSE,), **environment: str) -> Any:
    """What Docker Compose makes of the files."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if not shutil.which(command[0]):
            continue
        if subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            break
    else:
        pytest.skip("Docker Compose is not installed (apt-get install docker-compose)")
    options = [part for file in files for part in ("-f", str(file))]
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [*command, *options, "config"],
        cwd=ROOT,
        env=inherited | environment | {"COMPOSE_PROFILES": ",".join(profiles)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["services"]


def port_of(published: Any) -> tuple[str, int, int]:
    """Address, published and container's port, of either form that Compose prints."""
    if isinstance(published, dict):
        return published["host_ip"], int(published["published"]), int(published["target"])
    address, outer, inner = published.removesuffix("/tcp").rsplit(":", 2)
    return address, int(outer), int(inner)


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_compose_takes_each_profile(profile: str) -> None:
    found = composed(profile)
    triton_service, gateway = found[f"triton-{profile}"], found[f"gateway-{profile}"]
    assert not triton_service.get("ports")
    assert [port_of(one) for one in gateway["ports"]] == [("127.0.0.1", 5003, 5003)]
    waits = gateway["depends_on"][f"triton-{profile}"]
    assert waits["condition"] == "service_healthy"
    assert "triton" in triton_service["networks"]["inside"]["aliases"]


def test_the_contracts_variables_move_the_ports() -> None:
    moved = {
        "HOST": "127.0.0.2",
        "PORT": "6003",
        "TRITON_HTTP_PORT": "9000",
        "TRITON_GRPC_PORT": "9001",
        "TRITON_METRICS_PORT": "9002",
    }
    found = composed("gpu", "monitoring", files=(COMPOSE, PUBLISHED), **moved)
    assert [port_of(one) for one in found["gateway-gpu"]["ports"]] == [("127.0.0.2", 6003, 5003)]
    assert sorted(port_of(one) for one in found["triton-gpu"]["ports"]) == [
        ("127.0.0.2", 9000, 8000),
        ("127.0.0.2", 9001, 8001),
        ("127.0.0.2", 9002, 8002),
    ]
    assert {"prometheus", "grafana"} <= found.keys()


def test_make_up_names_profiles_that_exist() -> None:
    up = re.search(r"docker compose --profile \$\(if (.*?)\) up", (ROOT / "Makefile").read_text())
    assert up is not None
    *_, gpu, cpu = up[1].split(",")
    profiles = {name: service["profiles"] for name, service in services().items()}
    for profile in (gpu, cpu.strip(")")):
        assert sum(profile in one for one in profiles.values()) == 2


def test_images_are_built_from_what_is_there() -> None:
    for name, service in services().items():
        if "build" in service:
            stages = dockerfile.read(ROOT / service["build"]["dockerfile"])
            assert service["build"].get("target", "") in {stage.name for stage in stages}, name
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), f"{name} is not pinned"


def test_environment_variables_are_known() -> None:
    gateway = {
        str(field.validation_alias or f"GATEWAY_{name}".upper())
        for name, field in Settings.model_fields.items()
    }
    source = "".join((ROOT / "launch" / name).read_text() for name in ("triton.py", "ports.py"))
    for name, service in services().items():
        for variable in service.get("environment", {}):
            if name.startswith("gateway"):
                assert variable in gateway
            elif name.startswith("triton"):
                assert f'"{variable}"' in source
            else:
                assert variable.startswith("GF_")


def test_gateways_find_triton_by_its_alias_and_port() -> None:
    found = services()
    (alias,) = found["triton-gpu"]["networks"]["inside"]["aliases"]
    endpoint = found["gateway-gpu"]["environment"]["TRITON_ENDPOINTS"]
    assert endpoint == f"{alias}:{Address('', 8000, 8001, 8002).grpc_port}"


def test_volumes_are_declared_and_mounted_where_the_images_use_them() -> None:
    declared = yaml.safe_load(COMPOSE.read_text())["volumes"].keys()
    used = set()
    stages = {stage.name: stage for stage in dockerfile.read(ROOT / "Dockerfile.triton")}
    for name, service in services().items():
        for mount in service.get("volumes", []):
            source, target, *_ = mount.split(":")
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
                continue
            used.add(source)
            if name.startswith("triton"):
                assert any(
                    word == target or word.startswith(f"{target}/")
                    for word in stages[""].last("CMD").words
                )
            elif name == "export":
                assert any(target in run.rest.split() for run in stages["export"].all("RUN"))
    assert used == set(declared)


def test_containers_have_no_more_rights_than_they_need() -> None:
    for name, service in services().items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name
        if name != "export":
            assert service["mem_limit"], name


def test_nobody_logs_in_to_grafana() -> None:
    settings = services()["grafana"]["environment"]
    assert settings["GF_AUTH_ANONYMOUS_ENABLED"] == "true"
    assert "GF_AUTH_ANONYMOUS_ORG_ROLE" not in settings, "a viewer unless told otherwise"
    # Neither by form nor by HTTP's own authentication; and no admin has the password admin.
    assert settings["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert settings["GF_AUTH_BASIC_ENABLED"] == "false"
    assert settings["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"


# Monitoring ------------------------------------------------------------------------------------


def test_prometheus_scrapes_names_and_ports_that_exist() -> None:
    aliases = {
        alias
        for service in services().values()
        if isinstance(service.get("networks"), dict)
        for alias in (service["networks"]["inside"] or {}).get("aliases", [])
    }
    ports = {"gateway": 5003, "triton": 8002}
    for job in yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]:
        (discovered,) = job["dns_sd_configs"]
        assert set(discovered["names"]) <= aliases
        assert discovered["port"] == ports[discovered["names"][0]]


def test_promtool_takes_the_configuration() -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    subprocess.run(["promtool", "check", "config", PROMETHEUS], check=True, capture_output=True)


def expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_dashboards_queries_are_promql(tmp_path: Path) -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    rules = [
        {"record": f"rule:{number}", "expr": text.replace("$__rate_interval", "1m")}
        for number, text in enumerate(expressions())
    ]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", file], check=True, capture_output=True)


def test_the_dashboard_shows_metrics_that_exist(
    gateway: Gateway, closed_form_triton: triton.Triton
) -> None:
    counted = names(httpx.get(f"{gateway.url}/metrics").text)
    served = names(httpx.get(closed_form_triton.address.metrics).text) | GPU_METRICS
    asked = {
        name
        for text in expressions()
        for name in re.findall(r"\b(?:flownet2|nv|process)_\w+", text)
    }
    assert asked - counted - served == set()
    assert asked & counted
    assert asked & served


def test_the_dashboard_asks_for_the_path_that_is_counted() -> None:
    paths = {pattern for text in expressions() for pattern in re.findall(r'path=~"(.*?)"', text)}
    assert paths == {"/estimate_flow/?"}
    assert "/estimate_flow/" in create_app(Settings()).openapi()["paths"]


def names(exposition: str) -> set[str]:
    """Names of the metrics, and of a histogram's series."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", exposition, re.M):
        found.add(name)
        if kind == "histogram":
            found |= {f"{name}_{series}" for series in ("bucket", "sum", "count")}
    return found


def test_grafana_finds_dashboard_and_source() -> None:
    (source,) = yaml.safe_load((GRAFANA / "datasources.yml").read_text())["datasources"]
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == source["uid"]
    grafana = services()["grafana"]
    (prometheus,) = services()["prometheus"]["ports"]
    assert source["url"] == f"http://prometheus:{prometheus.rpartition(':')[2]}"
    mounts = dict(mount.split(":")[:2] for mount in grafana["volumes"])
    inside = mounts["./deploy/grafana/dashboards"]
    (provider,) = yaml.safe_load((GRAFANA / "dashboards" / "dashboards.yml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"] == inside
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{inside}/{DASHBOARD.name}"
