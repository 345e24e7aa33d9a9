"""The Kubernetes manifests: built by kustomize, checked against schemas and the project."""

import functools
import json
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from gateway.cluster import RESOLVE_SECONDS
from gateway.settings import Settings
from launch.triton import STOP_SECONDS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
CRDS = ROOT / "build" / "crds"
OVERLAYS = ("gpu", "cpu", "kserve", "bulk")
COMPONENTS = ("monitoring", "scaling")
OLDEST = "1.30"

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
    return {(item["kind"], item["metadata"]["name"]): item for item in found}


@functools.cache
def overlay(name: str) -> Manifests:
    """An overlay with every component that fits it."""
    components = {"bulk": (), "kserve": ("monitoring",)}.get(name, COMPONENTS)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(FOLDER, folder, dirs_exist_ok=True)) / name
        with (copy / "kustomization.yaml").open("a") as file:
            file.write(f"components: [{', '.join(f'../{name}' for name in components)}]\n")
        return build(copy)


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    name: str = request.param
    return overlay(name)


@pytest.fixture
def distinct() -> list[Any]:
    """The manifests of all overlays, each once."""
    every = [item for name in OVERLAYS for item in overlay(name).values()]
    return list({json.dumps(item): item for item in every}.values())


def pods(manifests: Manifests) -> Iterator[tuple[str, dict[str, str], Any]]:
    """Name, labels and specification of every pod that the manifests make."""
    for (kind, name), item in manifests.items():
        if kind in ("Deployment", "Job"):
            template = item["spec"]["template"]
            yield name, template["metadata"]["labels"], template["spec"]
        elif kind == "InferenceService":
            predictor = item["spec"]["predictor"]
            runtime = manifests["ServingRuntime", predictor["model"]["runtime"]]["spec"]
            yield name, predictor["labels"], predictor | runtime


def containers(pod: Any) -> list[Any]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def test_every_file_belongs_to_a_kustomization() -> None:
    named: set[Path] = set()
    for file in FOLDER.rglob("kustomization.yaml"):
        resources = yaml.safe_load(file.read_text())["resources"]
        named |= {file, *((file.parent / resource).resolve() for resource in resources)}
    assert set(FOLDER.rglob("*.yaml")) <= named


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_the_api_takes_every_manifest(distinct: list[Any], version: str) -> None:
    for item in distinct:
        if custom(item):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kubernetes_validate.validate(item, version, strict=True)


def custom(manifest: Any) -> bool:
    """Return True if its kind belongs to an extension of Kubernetes."""
    group: str = manifest["apiVersion"].partition("/")[0]
    return group in ("keda.sh", "serving.kserve.io", "monitoring.coreos.com")


def strict(schema: Any) -> Any:
    """A schema that allows no field besides those that it names."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(value) for name, value in schema.items()}
    closed = isinstance(schema.get("properties"), dict) and "type" in schema
    if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def test_extensions_take_what_is_theirs(distinct: list[Any]) -> None:
    definitions = [yaml.load(file.read_text(), yaml.CSafeLoader) for file in CRDS.glob("*.yaml")]
    if not definitions:
        pytest.skip("build/crds lacks the CRD files of KEDA's and KServe's releases")
    schemas = {
        (f"{item['spec']['group']}/{version['name']}", item["spec"]["names"]["kind"]): version
        for item in definitions
        for version in item["spec"]["versions"]
    }
    for item in distinct:
        if version := schemas.get((item["apiVersion"], item["kind"])):
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {}
            jsonschema.Draft202012Validator(schema).validate(item)


def test_environment_variables_are_the_gateways(manifests: Manifests) -> None:
    for name, _, pod in pods(manifests):
        if name != "gateway":
            continue
        environment = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
        assert environment.keys() <= {
            str(field.validation_alias or f"GATEWAY_{setting}".upper())
            for setting, field in Settings.model_fields.items()
        }
        service, _, port = environment["TRITON_ENDPOINTS"].partition(":")
        found = manifests["Service", service]["spec"]
        assert found["clusterIP"] == "None", "its name must stand for every pod"
        assert int(port) in {item["port"] for item in found["ports"]}


def test_a_pod_has_time_to_stop(manifests: Manifests) -> None:
    for name, labels, pod in pods(manifests):
        container = pod["containers"][0]
        if name == "gateway":
            environment = {item["name"]: item["value"] for item in container["env"]}
            needed = float(environment["GATEWAY_SHUTDOWN_DELAY_S"])
            probe = container["readinessProbe"]
            assert needed > probe["periodSeconds"] * probe["failureThreshold"]
            needed += Settings.model_fields["shutdown_grace_s"].default
        elif labels["app.kubernetes.io/name"] == "triton":
            _, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
            assert float(seconds) > RESOLVE_SECONDS, "every gateway has looked its name up again"
            needed = float(seconds) + STOP_SECONDS
        else:
            continue
        assert pod["terminationGracePeriodSeconds"] > needed


def test_names_labels_and_ports_fit(manifests: Manifests) -> None:
    labels = [found for _, found, _ in pods(manifests)]
    ports = {
        port["name"]
        for _, _, pod in pods(manifests)
        for container in containers(pod)
        for port in container.get("ports", [])
    }

    def selects(selector: dict[str, str]) -> bool:
        return any(selector.items() <= found.items() for found in labels)

    for (kind, _), item in manifests.items():
        spec = item["spec"]
        if kind == "Service":
            assert selects(spec["selector"])
            assert {port["targetPort"] for port in spec["ports"]} <= ports
        elif kind in ("Deployment", "PodDisruptionBudget"):
            assert selects(spec["selector"]["matchLabels"])
        elif kind in ("HorizontalPodAutoscaler", "ScaledObject"):
            assert ("Deployment", spec["scaleTargetRef"]["name"]) in manifests
        elif kind == "ServiceMonitor":
            services = [s for (kind, _), s in manifests.items() if kind == "Service"]
            assert all(
                spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
                for service in services
            )
            named = {port["name"] for service in services for port in service["spec"]["ports"]}
            assert {endpoint["port"] for endpoint in spec["endpoints"]} <= named


def test_pods_have_no_more_rights_than_they_need(manifests: Manifests) -> None:
    for name, _, pod in pods(manifests):
        for container in containers(pod):
            security = pod.get("securityContext", {}) | container["securityContext"]
            assert security["runAsNonRoot"] is True, name
            assert security["seccompProfile"]["type"] == "RuntimeDefault"
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]


def test_volumes_are_declared(manifests: Manifests) -> None:
    claims = {name for kind, name in manifests if kind == "PersistentVolumeClaim"}
    for _, _, pod in pods(manifests):
        declared = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {m["name"] for container in containers(pod) for m in container["volumeMounts"]}
        assert mounted == declared.keys()
        for volume in declared.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in claims
