"""docker-compose.yml, checked by Docker Compose."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
PUBLISHED = ROOT / "deploy" / "publish-triton.yml"


def composed(*profiles: str, files: tuple[Path, ...] = (COMPOSE,), **environment: str) -> Any:
    """Return the configuration that Docker Compose makes of the files."""
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
    assert [port_of(port) for port in gateway["ports"]] == [("127.0.0.1", 5003, 5003)]
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
    assert [port_of(port) for port in found["gateway-gpu"]["ports"]] == [("127.0.0.2", 6003, 5003)]
    assert sorted(port_of(port) for port in found["triton-gpu"]["ports"]) == [
        ("127.0.0.2", 9000, 8000),
        ("127.0.0.2", 9001, 8001),
        ("127.0.0.2", 9002, 8002),
    ]
    assert {"prometheus", "grafana"} <= found.keys()


def test_containers_have_no_more_rights_than_they_need() -> None:
    every = composed("gpu", "cpu", "export", "monitoring")
    for name, service in every.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name
        if name != "export":
            assert service["mem_limit"], name
