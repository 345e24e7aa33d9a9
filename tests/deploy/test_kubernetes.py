"""The Kubernetes manifests: built by kustomize, held against the API's schemas and the project."""

import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.app import create_app
from gateway.settings import Settings
from tests.support import dockerfile

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("gpu", "cpu")
VERSION = "1.30"  # the oldest that is meant to work

Manifests = dict[tuple[str, str], Any]  # by kind and name


def build(folder: Path) -> Manifests:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    found = list(yaml.safe_load_all(done.stdout))
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return build(FOLDER / request.param)


def workloads(manifests: Manifests) -> dict[str, Any]:
    """The pod templates, by name."""
    return {
        name: one["spec"]["template"]
        for (kind, name), one in manifests.items()
        if kind in ("Deployment", "StatefulSet")
    }


def container_of(template: Any) -> Any:
    (container,) = template["spec"]["containers"]
    return container


def probes(template: Any) -> Iterator[Any]:
    for name, value in container_of(template).items():
        if name.endswith("Probe"):
            yield value["httpGet"]


def test_every_file_belongs_to_a_kustomization() -> None:
    named: set[Path] = set()
    for file in FOLDER.rglob("kustomization.yaml"):
        named.add(file)
        for resource in yaml.safe_load(file.read_text())["resources"]:
            path = (file.parent / resource).resolve()
            assert path.exists(), path
            named.add(path)
    assert {file.resolve() for file in FOLDER.rglob("*.yaml")} <= named


def test_the_api_takes_every_manifest(manifests: Manifests) -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate"
    ).validate
    for one in manifests.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            validate(one, VERSION, strict=True)


def test_the_monitoring_component_fits_both(tmp_path: Path) -> None:
    for overlay in OVERLAYS:
        folder = tmp_path / overlay
        shutil.copytree(FOLDER, folder)
        file = folder / overlay / "kustomization.yaml"
        file.write_text(file.read_text() + "components: [../monitoring]\n")
        found = build(folder / overlay)
        monitor = found["ServiceMonitor", "flownet2"]["spec"]
        (wanted,) = monitor["selector"]["matchLabels"].items()
        ports: set[str] = set()
        for name in ("gateway", "triton"):
            service = found["Service", name]
            assert wanted in service["metadata"]["labels"].items()
            ports |= {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["endpoints"]} <= ports
        assert ("NetworkPolicy", "triton-metrics") in found


def test_ports_and_users_are_those_of_the_images(manifests: Manifests) -> None:
    for name, file in (("gateway", "Dockerfile.gateway"), ("triton", "Dockerfile.triton")):
        image = dockerfile.read(ROOT / file)[-1]
        template = workloads(manifests)[name]
        ports = [port["containerPort"] for port in container_of(template)["ports"]]
        assert [str(port) for port in ports] == image.last("EXPOSE").words
        security = template["spec"]["securityContext"]
        assert f"{security['runAsUser']}:{security['runAsGroup']}" == image.last("USER").rest


def test_images_have_the_names_that_compose_gives_them(manifests: Manifests) -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    built = {service["image"] for service in services.values() if "build" in service}
    for template in workloads(manifests).values():
        assert container_of(template)["image"] in built


def test_probes_ask_what_is_there(manifests: Manifests) -> None:
    routes = set(create_app(Settings()).openapi()["paths"])
    triton = {"/v2/health/ready", "/v2/health/live"}
    for name, template in workloads(manifests).items():
        asked = list(probes(template))
        assert {probe["path"] for probe in asked} <= (routes if name == "gateway" else triton)
        names = {port["name"] for port in container_of(template)["ports"]}
        assert {probe["port"] for probe in asked} <= names
        assert {"readinessProbe", "livenessProbe"} <= container_of(template).keys()


def test_environment_variables_are_the_gateways(manifests: Manifests) -> None:
    known = {
        str(field.validation_alias or f"GATEWAY_{name}".upper())
        for name, field in Settings.model_fields.items()
    }
    environment = {
        one["name"]: one["value"] for one in container_of(workloads(manifests)["gateway"])["env"]
    }
    assert environment.keys() <= known
    name, _, port = environment["TRITON_ENDPOINTS"].partition(":")
    service = manifests["Service", name]["spec"]
    assert service["clusterIP"] == "None", "its name must stand for every pod"
    assert int(port) in {one["port"] for one in service["ports"]}


def test_a_pod_has_time_to_stop(manifests: Manifests) -> None:
    template = workloads(manifests)["gateway"]
    environment = {one["name"]: one["value"] for one in container_of(template)["env"]}
    needed = float(environment["GATEWAY_SHUTDOWN_DELAY_S"])
    needed += Settings.model_fields["shutdown_grace_s"].default
    assert template["spec"]["terminationGracePeriodSeconds"] > needed


def test_selectors_and_targets_fit(manifests: Manifests) -> None:
    templates = workloads(manifests)
    labels = [template["metadata"]["labels"] for template in templates.values()]

    def selects(selector: dict[str, str]) -> bool:
        return any(selector.items() <= one.items() for one in labels)

    ports = {port["name"] for one in templates.values() for port in container_of(one)["ports"]}
    for (kind, _), one in manifests.items():
        spec = one["spec"]
        if kind == "Service":
            assert selects(spec["selector"])
            assert {port["targetPort"] for port in spec["ports"]} <= ports
        elif kind in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
            assert selects(spec["selector"]["matchLabels"])
        elif kind == "HorizontalPodAutoscaler":
            target = spec["scaleTargetRef"]
            assert (target["kind"], target["name"]) in manifests
            resources = container_of(templates[target["name"]])["resources"]
            assert "cpu" in resources["requests"], "utilization is a share of the request"
        elif kind == "NetworkPolicy":
            assert selects(spec["podSelector"]["matchLabels"])
            for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
                for port in rule["ports"]:
                    assert port["port"] in ports | {53}
        else:
            pytest.fail(f"nothing here knows {kind}")
    service = manifests["StatefulSet", "triton"]["spec"]["serviceName"]
    assert ("Service", service) in manifests


def test_pods_have_no_more_rights_than_they_need(manifests: Manifests) -> None:
    for template in workloads(manifests).values():
        pod, container = template["spec"], container_of(template)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]


def test_volumes_are_mounted_where_the_image_writes(manifests: Manifests) -> None:
    for (kind, name), one in manifests.items():
        if kind not in ("Deployment", "StatefulSet"):
            continue
        pod = one["spec"]["template"]["spec"]
        declared = {volume["name"] for volume in pod["volumes"]}
        declared |= {
            claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", [])
        }
        mounts = {
            mount["name"]: mount["mountPath"]
            for mount in container_of(one["spec"]["template"])["volumeMounts"]
        }
        assert mounts.keys() == declared
        if name == "triton":
            command = dockerfile.read(ROOT / "Dockerfile.triton")[-1].last("CMD").words
            assert Path(command[3]).is_relative_to(mounts["engines"])


def test_what_differs_is_the_gpu() -> None:
    gpu = build(FOLDER / "gpu")["StatefulSet", "triton"]["spec"]
    cpu = build(FOLDER / "cpu")["StatefulSet", "triton"]["spec"]
    assert container_of(gpu["template"])["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in str(cpu)
    assert [claim["metadata"]["name"] for claim in gpu["volumeClaimTemplates"]] == ["engines"]
    assert "volumeClaimTemplates" not in cpu
