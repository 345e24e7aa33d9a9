"""The OpenAPI document and the documentation describe what the gateway does."""

import base64
import json
import re

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance

from gateway.app import create_app
from gateway.errors import ClientGone, GatewayError
from gateway.settings import Settings
from tests.support.gateway_stack import ROOT, Gateway, encoded, picture


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch) -> dict:
    for name in ("PORT", "HOST", "TRITON_ENDPOINTS", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    return json.loads(json.dumps(create_app(Settings()).openapi()))


def test_openapi_json_is_current(document: dict) -> None:
    committed = json.loads((ROOT / "openapi.json").read_text())
    assert committed == document, "run `python -m gateway.openapi > openapi.json`"


def test_the_documentation_lists_every_error() -> None:
    page = (ROOT / "docs" / "http-api.md").read_text()
    errors = GatewayError.__subclasses__()
    assert len(errors) > 20
    for error in errors:
        if error is not ClientGone:  # which no client sees
            assert re.search(rf"^\| {error.status} \|.*`{error.slug}`", page, re.M), error.slug


# Half of the strings that stand for images are images.
IMAGES = [encoded(picture(seed), format) for seed, format in ((1, "PNG"), (2, "JPEG"), (3, "WEBP"))]
schemathesis.openapi.format(
    "byte",
    st.sampled_from([base64.b64encode(image).decode() for image in IMAGES]) | st.text(max_size=50),
)
schemathesis.openapi.format("binary", st.sampled_from(IMAGES) | st.binary(max_size=50))


OPERATIONS = [
    (method, path)
    for path, item in json.loads((ROOT / "openapi.json").read_text())["paths"].items()
    for method in item
]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_schemathesis(
    gateway: Gateway, method: str, path: str, mode: schemathesis.GenerationMode
) -> None:
    """Valid and invalid requests made from the document: no crash, and no undeclared response.

    Not every string is an image, so a request that fits the schema may be refused.
    """
    operation = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")[path][method]

    @settings(
        max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        response = case.call(timeout=60)
        if response.status_code in (408, 504):  # its deadline was too short
            return
        assert response.status_code < 500, response.text
        case.validate_response(response, excluded_checks=[positive_data_acceptance])

    try:
        check()
    except Unsatisfiable:
        pytest.skip("an operation without parameters has no wrong requests")
