"""The running gateway in front of a real Triton: responses, errors, limits, probes, shutdown."""

import base64
import contextlib
import gzip
import http.client
import http.server
import io
import json
import re
import resource
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import httpx2
import numpy as np
import pytest
import zstandard
from PIL import Image

from flownet2 import measures
from flownet2.colours import colours
from launch import triton
from tests.support.gateway_stack import (
    ROOT,
    Gateway,
    as_json,
    encoded,
    expected_flow,
    picture,
    run_gateway,
    wait_until,
)
from tests.support.hostile_images import bad_images, no_palette

PATH = "/estimate_flow/"
CASES = ROOT.parent / "shared" / "cases" / "http"
FIRST, SECOND = picture(1, 200, 120), picture(2, 200, 120)
BODY = as_json(encoded(FIRST), encoded(SECOND))
FILES = {"image1": encoded(FIRST), "image2": encoded(SECOND)}


def check_problem(
    response: httpx2.Response, status: int, slug: str, field: str | None = None
) -> None:
    """The response is a complete problem document."""
    assert (response.status_code, response.headers["content-type"]) == (
        status,
        "application/problem+json",
    ), response.text
    document = response.json()
    assert document["type"] == f"urn:problem-type:flownet2:{slug}"
    assert document["status"] == status
    assert document["title"]
    assert document["detail"].endswith((".", "`"))
    assert document.get("field") == field
    assert document["request_id"] == response.headers["x-request-id"]


class TestResponses:
    def test_json_is_the_replaced_services(self, gateway: Gateway) -> None:
        response = gateway.client.post(PATH, json=BODY)
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        document = response.json()
        assert document.keys() == {"flow", "scale_x_back_factor", "scale_y_back_factor"}
        assert (document["scale_x_back_factor"], document["scale_y_back_factor"]) == (
            200 / 512,
            120 / 512,
        )
        flow = np.array(document["flow"], np.float32)
        assert flow.shape == (512, 512, 2)
        np.testing.assert_allclose(flow, expected_flow(FIRST, SECOND), atol=1e-6)

    @pytest.mark.parametrize(
        "content_type",
        [
            None,
            "application/x-www-form-urlencoded",
            "text/plain; charset=utf-8",
            "application/ld+json",
        ],
    )
    def test_json_under_whatever_clients_call_it(
        self, gateway: Gateway, content_type: str | None
    ) -> None:
        headers = {"Content-Type": content_type} if content_type else {}
        response = gateway.client.post(PATH, content=json.dumps(BODY), headers=headers)
        assert response.status_code == 200

    def test_path_without_its_slash(self, gateway: Gateway) -> None:
        assert gateway.client.post(PATH.rstrip("/"), json=BODY).status_code == 200

    @pytest.mark.parametrize(
        ("name", "decode"), [("gzip", gzip.decompress), ("zstd", zstandard.decompress)]
    )
    def test_compressed(
        self, gateway: Gateway, name: str, decode: Callable[[bytes], bytes]
    ) -> None:
        with gateway.client.stream(
            "POST", PATH, json=BODY, headers={"Accept-Encoding": name}
        ) as response:
            raw = b"".join(response.iter_raw())
        assert response.headers["content-encoding"] == name
        assert "Accept-Encoding" in response.headers["vary"]
        plain = gateway.client.post(PATH, json=BODY, headers={"Accept-Encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert decode(raw) == plain.content

    @pytest.mark.parametrize(
        ("coding", "compress"),
        [("gzip", gzip.compress), ("deflate", zlib.compress), ("zstd", zstandard.compress)],
    )
    def test_compressed_requests(
        self, gateway: Gateway, coding: str, compress: Callable[[bytes], bytes]
    ) -> None:
        content = json.dumps(BODY).encode()
        headers = {"Content-Encoding": coding}
        response = gateway.client.post(PATH, content=compress(content), headers=headers)
        assert response.content == gateway.client.post(PATH, content=content).content

    def test_an_image_element_gets_the_picture(self, gateway: Gateway) -> None:
        headers = {"Accept": "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"}
        response = gateway.client.post(PATH, json=BODY, headers=headers)
        assert response.headers["content-type"] == "image/png"
        with Image.open(io.BytesIO(response.content)) as image:
            assert image.mode == "RGB"
            assert image.getpixel((0, 0)) == pytest.approx(
                tuple(colours(expected_flow(FIRST, SECOND))[0, 0]), abs=1
            )

    @pytest.mark.skipif(not CASES.is_dir(), reason="the folder shared/cases is not there")
    @pytest.mark.parametrize("name", ["bom", "utf16le", "repr"])
    def test_bodies_of_public_reports(self, gateway: Gateway, name: str) -> None:
        response, plain = (
            gateway.client.post(PATH, content=(CASES / f"{case}.json").read_bytes())
            for case in (name, "plain")
        )
        if name == "repr":
            check_problem(response, 422, "bad-base64", "image1_base64")
            assert "b'" in response.json()["detail"]
        else:
            assert response.content == plain.content

    @pytest.mark.parametrize("size", ["512", "native"])
    def test_binary_formats_agree(self, gateway: Gateway, size: str) -> None:
        def post(accept: str) -> httpx2.Response:
            response = gateway.client.post(
                PATH, files=FILES, params={"size": size}, headers={"Accept": accept}
            )
            assert (response.status_code, response.headers["content-type"]) == (200, accept)
            scale = [float(response.headers[f"x-scale-{axis}-back-factor"]) for axis in "xy"]
            assert scale == ([1, 1] if size == "native" else [200 / 512, 120 / 512])
            return response

        flow = np.load(io.BytesIO(post("application/x-npy").content))
        if size == "native":
            first, second = (np.asarray(image, np.float32) for image in (FIRST, SECOND))
            np.testing.assert_array_equal(flow, (second - first)[..., :2] / 8)
        else:
            np.testing.assert_allclose(flow, expected_flow(FIRST, SECOND), atol=1e-6)
        height, width, _ = flow.shape
        flo = post("application/x-flo").content
        assert flo == struct.pack("<4sii", b"PIEH", width, height) + flow.tobytes()
        for accept in ("image/png", "image/x-kitti-flow"):
            with Image.open(io.BytesIO(post(accept).content)) as image:
                assert (image.format, image.size) == ("PNG", (width, height))

    @pytest.mark.parametrize(("side", "batches"), [(200, 1), (600, 2)])
    def test_both_directions(
        self, gateway: Gateway, closed_form_triton: triton.Triton, side: int, batches: int
    ) -> None:
        """One batch of two if a GPU supports that size, else two, with the single flows."""

        def counted(name: str) -> float:
            text = httpx2.get(closed_form_triton.address.metrics).text
            return float(re.search(rf'^{name}{{model="flownet2",.*}} (\S+)$', text, re.M)[1])

        def post(direction: str, accept: str) -> httpx2.Response:
            response = gateway.client.post(
                PATH,
                files={f"image{i}": encoded(picture(i, side, 40)) for i in (1, 2)},
                params={"direction": direction, "size": "native"},
                headers={"Accept": accept},
            )
            return response.raise_for_status()

        npy = "application/x-npy"
        there, back = (
            np.load(io.BytesIO(post(direction, npy).content))
            for direction in ("forward", "backward")
        )
        np.testing.assert_array_equal(back, -there)  # the model's closed form
        before = counted("nv_inference_count"), counted("nv_inference_exec_count")
        arrays = np.load(io.BytesIO(post("both", "application/x-npz").content))
        assert counted("nv_inference_count") == before[0] + 2
        assert counted("nv_inference_exec_count") == before[1] + batches
        np.testing.assert_array_equal(arrays["flow"], there)
        np.testing.assert_array_equal(arrays["flow_backward"], back)
        np.testing.assert_array_equal(arrays["occluded"], measures.occluded(there, back))
        assert arrays["scale_x_back_factor"] == arrays["scale_y_back_factor"] == 1
        document = post("both", "application/json").json()
        np.testing.assert_array_equal(np.float32(document["flow_backward"]), back)
        with Image.open(io.BytesIO(base64.b64decode(document["occluded"]))) as mask:
            assert (mask.format, mask.mode) == ("PNG", "1")
            np.testing.assert_array_equal(np.asarray(mask), arrays["occluded"])

    def test_occlusion_is_that_of_the_grid(self, gateway: Gateway) -> None:
        """It is computed in pixels of the 512 grid, not in those of the images."""
        arrays = np.load(
            io.BytesIO(
                gateway.client.post(
                    PATH,
                    json=BODY,
                    params={"direction": "both"},
                    headers={"Accept": "application/x-npz"},
                ).content
            )
        )
        scale = np.float32([200 / 512, 120 / 512])
        there, back = (arrays[name] / scale for name in ("flow", "flow_backward"))
        assert (arrays["occluded"] == measures.occluded(there, back)).mean() > 0.999  # rounding

    def test_models(self, gateway: Gateway) -> None:
        models = {model["name"]: model for model in gateway.client.get("/models").json()["models"]}
        assert models["flownet2"] == {
            "name": "flownet2",
            "version": "1",
            "network": "FlowNet2",
            "parameters": 162518850,
            "weights_source": "closed form",
            "weights_license": "GPL-3.0-or-later",
            "model_sha256": None,
            "max_pixels": None,
            "default": True,
        }
        assert models["limited"]["max_pixels"] == 512 * 512
        # Those that keep the contract.
        assert models.keys() == {"flownet2", "limited", "slow", "nan", "far", "raising"}


class TestErrors:
    @pytest.mark.parametrize("size", ["512", "native"])
    def test_every_broken_image(self, gateway: Gateway, size: str) -> None:
        good = encoded(picture(1))
        for name, file in bad_images():
            files = {"image1": good, "image2": file}
            response = gateway.client.post(PATH, params={"size": size}, files=files)
            assert response.status_code in (413, 415, 422), name
            assert response.json()["field"] == "image2", name
        lines = [json.loads(line) for line in gateway.log.read_text().splitlines()]
        assert "unhandled" not in [line["message"] for line in lines]

    def test_colours_without_a_palette(self, gateway: Gateway) -> None:
        files = {"image1": no_palette(), "image2": no_palette()}
        response = gateway.client.post(PATH, params={"size": "native"}, files=files)
        check_problem(response, 422, "damaged-image", "image1")

    @pytest.mark.parametrize(
        ("content", "status", "slug", "field"),
        [
            ("", 400, "bad-json", None),
            ("[]", 400, "bad-json", None),
            ("[" * 10**6, 400, "bad-json", None),
            ('{"image1_base64": %s}' % ("9" * 5000), 422, "wrong-type", "image1_base64"),
            ('{"image1_base64": "\\udc00"}', 400, "bad-json", None),
            ("{}", 422, "missing-field", "image1_base64"),
            (json.dumps(BODY | {"extra": 1}), 422, "unexpected-field", "extra"),
            (json.dumps(BODY | {"image2_base64": 5}), 422, "wrong-type", "image2_base64"),
            (json.dumps(BODY | {"image2_base64": "%%%"}), 422, "bad-base64", "image2_base64"),
            (
                json.dumps(BODY | {"image1_base64": "aGVsbG8="}),
                422,
                "not-an-image",
                "image1_base64",
            ),
            (
                json.dumps(as_json(encoded(FIRST), encoded(picture(2, 120, 200)))),
                422,
                "sizes-differ",
                "image2_base64",
            ),
        ],
    )
    def test_bodies(
        self, gateway: Gateway, content: str, status: int, slug: str, field: str | None
    ) -> None:
        check_problem(gateway.client.post(PATH, content=content), status, slug, field)

    @pytest.mark.parametrize(
        ("headers", "status", "slug", "field"),
        [
            ({"Accept": "text/html"}, 406, "not-acceptable", "Accept"),
            # Header lines of the same name form a list: this request is accepted up to its body.
            (
                [("Accept", "text/html"), ("Accept", "image/png"), ("Content-Type", "text/csv")],
                415,
                "unsupported-media-type",
                "Content-Type",
            ),
            ({"Content-Type": "image/png"}, 415, "unsupported-media-type", "Content-Type"),
            ({"Content-Type": "multipart/form-data"}, 400, "bad-multipart", "Content-Type"),
            ({"Content-Encoding": "br"}, 415, "unsupported-media-type", "Content-Encoding"),
            ({"Content-Encoding": "gzip"}, 400, "bad-encoding", "Content-Encoding"),
            ({"X-Request-Timeout": "soon"}, 422, "invalid-parameter", "X-Request-Timeout"),
            ({"X-Request-Timeout": "-1"}, 422, "invalid-parameter", "X-Request-Timeout"),
            ({"X-Request-Timeout": "nan"}, 422, "invalid-parameter", "X-Request-Timeout"),
        ],
    )
    def test_headers(
        self,
        gateway: Gateway,
        headers: dict[str, str] | list[tuple[str, str]],
        status: int,
        slug: str,
        field: str,
    ) -> None:
        response = gateway.client.post(PATH, content=json.dumps(BODY), headers=headers)
        check_problem(response, status, slug, field)

    def test_parameters_paths_and_methods(self, gateway: Gateway) -> None:
        client = gateway.client
        response = client.post(PATH, params={"size": "1024"}, json=BODY)
        check_problem(response, 422, "invalid-parameter", "size")
        response = client.post(PATH, params={"model": "nosuch"}, json=BODY)
        check_problem(response, 404, "unknown-model", "model")
        assert "far, flownet2, limited, nan, raising, slow" in response.json()["detail"]
        check_problem(
            client.post(PATH, params={"model": "wrong_type"}, json=BODY),
            404,
            "unknown-model",
            "model",
        )
        check_problem(client.get("/v2/repository/index"), 404, "not-found")
        check_problem(client.post("/v2/models/flownet2/unload"), 404, "not-found")
        response = client.get(PATH)
        check_problem(response, 405, "method-not-allowed")
        assert response.headers["allow"] == "POST"
        small = encoded(picture(1, 15, 60))
        response = client.post(
            PATH, params={"size": "native"}, files={"image1": small, "image2": small}
        )
        check_problem(response, 422, "image-too-small", "image1")

    def test_the_pixel_limit_of_a_model(self, gateway: Gateway) -> None:
        def post(width: int, height: int, **query: str) -> httpx2.Response:
            files = {f"image{i}": encoded(picture(i, width, height)) for i in (1, 2)}
            headers = {"Accept": "application/x-npz"}
            query = {"model": "limited", **query}
            return gateway.client.post(PATH, params=query, files=files, headers=headers)

        assert post(800, 600).status_code == 200  # resized to 512x512
        assert post(500, 512, size="native").status_code == 200
        assert post(500, 512, size="native", direction="both").status_code == 200
        for size in ((513, 512), (100, 2049)):
            response = post(*size, size="native")
            check_problem(response, 413, "image-too-large", "image1")
            assert "262144" in response.json()["detail"]
            assert "limited" in response.json()["detail"]

    def test_the_body_limit_counts_received_bytes(self, gateway: Gateway) -> None:
        def endless() -> object:
            for _ in range(80):
                yield b" " * 2**20

        check_problem(gateway.client.post(PATH, content=endless()), 413, "body-too-large")
        with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as line:
            line.sendall(
                b"POST /estimate_flow/ HTTP/1.1\r\nHost: a\r\n"
                b"Content-Length: 99999999999999999999\r\n\r\n"
            )
            assert b" 413 " in line.recv(4096)

    @pytest.mark.parametrize(
        "sent",
        [
            b"nonsense\r\n\r\n",
            b"GET /livez HTTP/1.1\r\n\r\n",
            b"POST /estimate_flow/ HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n"
            b"Content-Length: 2\r\n\r\n",
            b"POST /estimate_flow/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZ\r\n",
            b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 2**17,
        ],
    )
    def test_bytes_that_are_not_http(self, gateway: Gateway, sent: bytes) -> None:
        with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as line:
            line.sendall(sent)
            response = http.client.HTTPResponse(line)
            response.begin()
            document = json.loads(response.read())
        assert (response.status, response.reason) == (400, "Bad Request")
        assert response.headers["Content-Type"] == "application/problem+json"
        assert document["type"] == "urn:problem-type:flownet2:bad-request"
        assert document["request_id"] == response.headers["X-Request-ID"]
        assert response.headers["Connection"] == "close"

    def test_models_that_fail(self, gateway: Gateway) -> None:
        for model in ("nan", "far"):
            response = gateway.client.post(PATH, params={"model": model}, json=BODY)
            check_problem(response, 502, "model-failed")
            assert "finite" in response.json()["detail"]
        response = gateway.client.post(PATH, params={"model": "raising"}, json=BODY)
        check_problem(response, 502, "model-failed")
        assert "a fault made on purpose" in response.json()["detail"]


class TestTime:
    def test_deadline(self, gateway: Gateway) -> None:
        response = gateway.client.post(
            PATH, params={"model": "slow"}, json=BODY, headers={"X-Request-Timeout": "0.4"}
        )
        check_problem(response, 504, "deadline-exceeded")

    def test_full_queues_and_deadlines_are_distinguished(
        self, gateway: Gateway, closed_form_repository: Path
    ) -> None:
        """The slow model computes one request for 2 s and queues two more. The deadline of the
        second request is shorter, and at least three of five others find the queue full."""
        responses: list[httpx2.Response] = []

        def events(name: str) -> int:
            journal = closed_form_repository / "journal"
            return journal.read_text().count(name) if journal.exists() else 0

        def post(timeout: str) -> threading.Thread:
            def work() -> None:
                url = f"{gateway.url}{PATH}?model=slow"
                headers = {"X-Request-Timeout": timeout}
                responses.append(httpx2.post(url, json=BODY, headers=headers, timeout=60))

            thread = threading.Thread(target=work)
            thread.start()
            return thread

        before = events("started")
        clients = [post("60")]
        wait_until(lambda: events("started") > before)
        clients += [post("0.5"), *(post("60") for _ in range(5))]
        for client in clients:
            client.join()
        outcomes = [
            response.json()["type"].rpartition(":")[2] if response.status_code != 200 else "ok"
            for response in responses
        ]
        assert set(outcomes) <= {"deadline-exceeded", "ok", "queue-full"}
        assert outcomes.count("queue-full") >= 3
        full = next(response for response in responses if response.status_code == 503)
        assert int(full.headers["retry-after"]) >= 1

    def test_a_client_that_disconnects_cancels_its_inference(
        self, gateway: Gateway, closed_form_repository: Path
    ) -> None:
        journal = closed_form_repository / "journal"
        journal.touch()
        started, cancelled = (journal.read_text().count(x) for x in ("started", "cancelled"))
        content = json.dumps(BODY).encode()
        with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as line:
            line.sendall(
                b"POST /estimate_flow/?model=slow HTTP/1.1\r\nHost: a\r\nX-Request-ID: leaves\r\n"
                b"Content-Length: %d\r\n\r\n" % len(content) + content
            )
            wait_until(lambda: journal.read_text().count("started") > started)
        wait_until(lambda: journal.read_text().count("cancelled") > cancelled)
        wait_until(
            lambda: any(
                '"leaves"' in line and '"client-gone"' in line
                for line in gateway.log.read_text().splitlines()
            )
        )

    def test_body_that_never_comes(self, gateway: Gateway) -> None:
        with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as line:
            line.sendall(
                b"POST /estimate_flow/ HTTP/1.1\r\nHost: a\r\nX-Request-Timeout: 0.3\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
            line.settimeout(30)
            assert b" 408 " in line.recv(4096)


class TestObservability:
    def test_request_ids(self, gateway: Gateway) -> None:
        response = gateway.client.get("/livez", headers={"X-Request-ID": "mine-1.2"})
        assert response.headers["x-request-id"] == "mine-1.2"
        for insane in ("a b", "x" * 200, "é".encode(), "<script>"):
            response = gateway.client.get("/livez", headers={"X-Request-ID": insane})
            assert len(response.headers["x-request-id"]) == 32

    def test_log_lines_are_json_with_the_id(self, gateway: Gateway) -> None:
        gateway.client.post(PATH, json=BODY, headers={"X-Request-ID": "logged"})
        lines = [json.loads(line) for line in gateway.log.read_text().splitlines()]
        line = next(line for line in lines if line.get("request_id") == "logged")
        assert (line["method"], line["path"], line["status"], line["outcome"]) == (
            "POST",
            PATH,
            200,
            "ok",
        )
        assert line["stages"].keys() == {"read", "decode", "queue", "resize", "infer", "encode"}

    def test_server_timing(self, gateway: Gateway) -> None:
        header = gateway.client.post(PATH, json=BODY).headers["server-timing"]
        times = {
            name: float(duration)
            for name, duration in (part.split(";dur=") for part in header.split(", "))
        }
        assert times.keys() == {"read", "decode", "queue", "resize", "infer", "encode", "total"}
        assert sum(times.values()) - times["total"] <= times["total"]

    def test_metrics(self, gateway: Gateway) -> None:
        def value(name: str) -> float:
            text = gateway.client.get("/metrics").text
            return float(
                next(
                    (line for line in text.splitlines() if line.startswith(name + " ")), "x 0"
                ).split()[-1]
            )

        ok = 'flownet2_requests_total{outcome="ok",path="/estimate_flow/"}'
        bad = 'flownet2_requests_total{outcome="bad-json",path="/estimate_flow/"}'
        infer = 'flownet2_stage_seconds_count{stage="infer"}'
        before = value(ok), value(bad), value(infer)
        gateway.client.post(PATH, json=BODY)
        gateway.client.post(PATH, content="?")
        wait_until(lambda: (value(ok), value(bad)) == (before[0] + 1, before[1] + 1))
        assert value(infer) == before[2] + 1
        assert value("flownet2_admitted") == 0
        assert value("flownet2_endpoints_serving") == 1

    def test_health(self, gateway: Gateway) -> None:
        assert gateway.get("/livez") == gateway.get("/readyz") == 200
        health = gateway.client.get("/healthz").json()
        assert health["status"] == "ok"
        assert health["model"]["version"] == "1"
        (server,) = health["triton"]
        assert server["version"] == "2.51.0"
        assert server["backends"] == ["python"]
        assert "wrong_type: output flow is FP16" in server["error"]
        assert (
            "wrong_name: input frame2 is UINT8" in server["error"]
            or "image2 is absent" in server["error"]
        )

    def test_pages_have_security_headers(self, gateway: Gateway) -> None:
        for path in ("/", "/docs", "/models", "/nowhere"):
            headers = gateway.client.get(path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert "access-control-allow-origin" not in headers
            assert "server" not in headers


class TestOtherSettings:
    def test_keys_and_cors(self, closed_form_triton: triton.Triton, tmp_path: Path) -> None:
        keys = tmp_path / "keys"
        keys.write_text("# for the tests\nfirst-key\nsecond-key\n")
        with run_gateway(
            closed_form_triton.address.grpc,
            tmp_path / "log",
            GATEWAY_API_KEYS_FILE=str(keys),
            GATEWAY_CORS_ORIGINS="https://a.example, https://b.example",
        ) as gateway:
            client = gateway.client
            wait_until(lambda: gateway.get("/readyz") == 200)
            assert client.get("/healthz").json() == {"status": "ok"}
            assert client.get("/healthz", headers={"X-API-Key": "wrong"}).json().keys() == {
                "status"
            }
            detailed = client.get("/healthz", headers={"X-API-Key": "first-key"}).json()
            assert detailed["triton"][0]["address"] == closed_form_triton.address.grpc
            for path in ("/models", "/metrics", PATH):
                response = client.request("POST" if path == PATH else "GET", path)
                check_problem(response, 401, "unauthorized")
                assert response.headers["www-authenticate"] == "Bearer"
            for headers in (
                {"Authorization": "Bearer first-key"},
                {"authorization": "bearer second-key"},
                {"X-API-Key": "second-key"},
            ):
                assert client.get("/models", headers=headers).status_code == 200
            for headers in (
                {"Authorization": "Bearer first-ke"},
                {"Authorization": "Basic first-key"},
                {"X-API-Key": ""},
                {"X-API-Key": "# for the tests"},
            ):
                check_problem(client.get("/models", headers=headers), 401, "unauthorized")
            preflight = client.options(
                PATH,
                headers={"Origin": "https://b.example", "Access-Control-Request-Method": "POST"},
            )
            assert preflight.headers["access-control-allow-origin"] == "https://b.example"
            refused = client.options(
                PATH,
                headers={"Origin": "https://c.example", "Access-Control-Request-Method": "POST"},
            )
            check_problem(refused, 400, "cors-refused")
            assert "access-control-allow-origin" not in refused.headers
        assert "first-key" not in (tmp_path / "log").read_text()

    def test_overload(self, closed_form_triton: triton.Triton, tmp_path: Path) -> None:
        with run_gateway(
            closed_form_triton.address.grpc,
            tmp_path / "log",
            GATEWAY_MAX_IN_FLIGHT="1",
            GATEWAY_MAX_WAITING="1",
            GATEWAY_RETRY_AFTER_S="7",
        ) as gateway:
            wait_until(lambda: gateway.get("/readyz") == 200)
            port = int(gateway.url.rpartition(":")[2])
            head = b"POST /estimate_flow/ HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n"
            with (
                socket.create_connection(("127.0.0.1", port)) as first,
                socket.create_connection(("127.0.0.1", port)) as second,
            ):
                first.sendall(head)
                second.sendall(head)
                wait_until(lambda: "flownet2_admitted 2.0" in gateway.client.get("/metrics").text)
                response = gateway.client.post(PATH, json=BODY)
                check_problem(response, 503, "overloaded")
                assert response.headers["retry-after"] == "7"
            wait_until(lambda: "flownet2_admitted 0.0" in gateway.client.get("/metrics").text)
            assert gateway.client.post(PATH, json=BODY).status_code == 200

    def test_connections_without_requests(self, tmp_path: Path) -> None:
        """Half a head, or none, ends after a while; many such connections do not block others."""
        with run_gateway("127.0.0.1:1", tmp_path / "log", descriptors=80) as gateway:
            address = ("127.0.0.1", int(gateway.url.rpartition(":")[2]))
            with contextlib.ExitStack() as stack:
                half = stack.enter_context(socket.create_connection(address))
                for _ in range(150):
                    stack.enter_context(socket.create_connection(address))
                assert gateway.get("/livez") == 200
                began = time.monotonic()
                half = stack.enter_context(socket.create_connection(address))
                half.settimeout(0.5)
                ended = False
                while not ended:
                    assert time.monotonic() - began < 20
                    with contextlib.suppress(TimeoutError):
                        ended = half.recv(1) == b""
                    with contextlib.suppress(OSError):
                        half.sendall(b"GET /livez HTTP/1.1\r\n" if not ended else b"")

    def test_idle_connections_outlive_the_limit_of_a_head(self, tmp_path: Path) -> None:
        """An idle connection is closed after its own time. A head that has begun gets five seconds,
        also on a connection that was idle."""
        get = b"GET /livez HTTP/1.1\r\nHost: a\r\n"

        def ask(line: socket.socket) -> None:
            line.sendall(get + b"\r\n")
            response = b""
            while not response.endswith(b'{"status":"ok"}'):
                response += line.recv(4096)

        with run_gateway("127.0.0.1:1", tmp_path / "log", GATEWAY_KEEP_ALIVE_S="8") as gateway:
            address = ("127.0.0.1", int(gateway.url.rpartition(":")[2]))
            with contextlib.ExitStack() as stack:
                idle, half = (
                    stack.enter_context(socket.create_connection(address)) for _ in range(2)
                )
                for line in (idle, half):
                    line.settimeout(30)
                    ask(line)
                answered = time.monotonic()
                half.sendall(get)
                assert half.recv(1) == b""
                assert 4 < time.monotonic() - answered < 7
                ask(idle)  # after longer than a head may take
                answered = time.monotonic()
                assert idle.recv(1) == b""
                assert 7 < time.monotonic() - answered < 15

    @pytest.mark.parametrize("host", ["::", "[::1]", "localhost", "x86_64-conda-linux-gnu"])
    def test_hosts(self, tmp_path: Path, host: str) -> None:
        """IPv6 addresses and names; one that does not resolve is ignored with a warning."""
        with run_gateway("127.0.0.1:1", tmp_path / "log", HOST=host) as gateway:
            port = gateway.url.rpartition(":")[2]
            addresses = {"::": ["127.0.0.1", "[::1]"], "[::1]": ["[::1]"]}.get(host, ["127.0.0.1"])
            for address in addresses:
                assert httpx2.get(f"http://{address}:{port}/livez").status_code == 200
        assert ("does not resolve" in (tmp_path / "log").read_text()) == ("conda" in host)

    def test_pythons_warnings_are_lines_of_json(self, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text(
            "import threading, warnings\n"
            "def warn(): warnings.warn('made on purpose', UserWarning)\n"
            "threading.Timer(3, warn).start()\n"
        )
        log = tmp_path / "log"
        with run_gateway("127.0.0.1:1", log, PYTHONPATH=str(tmp_path)):
            wait_until(lambda: "made on purpose" in log.read_text())
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        (warning,) = (line for line in lines if line["message"] == "made on purpose")
        assert (warning["level"], warning["category"]) == ("warning", "UserWarning")

    def test_slow_readers_are_counted(
        self, closed_form_triton: triton.Triton, tmp_path: Path
    ) -> None:
        """A response of 20 MB that is not read stays counted until the client disconnects."""
        large = encoded(Image.new("RGB", (1024, 1024)))
        content = json.dumps(as_json(large, large)).encode()
        with run_gateway(closed_form_triton.address.grpc, tmp_path / "log") as gateway:
            wait_until(lambda: gateway.get("/readyz") == 200)
            with socket.socket() as line:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                line.connect(("127.0.0.1", int(gateway.url.rpartition(":")[2])))
                line.sendall(
                    b"POST /estimate_flow/?size=native HTTP/1.1\r\nHost: a\r\n"
                    b"Content-Length: %d\r\n\r\n" % len(content) + content
                )
                assert line.recv(100).startswith(b"HTTP/1.1 200")
                assert "flownet2_admitted 1.0" in gateway.client.get("/metrics").text
            wait_until(lambda: "flownet2_admitted 0.0" in gateway.client.get("/metrics").text)

    def test_traces_join_the_clients(
        self, closed_form_triton: triton.Triton, tmp_path: Path
    ) -> None:
        """A collector gets the request's span, a child of the client's."""
        pytest.importorskip("opentelemetry.sdk")
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (  # noqa: PLC0415
            ExportTraceServiceRequest,
        )

        received: list[ExportTraceServiceRequest] = []

        class Collector(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers["Content-Encoding"] == "gzip":
                    data = gzip.decompress(data)
                received.append(ExportTraceServiceRequest.FromString(data))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
            threading.Thread(target=collector.serve_forever).start()
            with run_gateway(
                closed_form_triton.address.grpc,
                tmp_path / "log",
                OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.server_port}",
            ) as gateway:
                wait_until(lambda: gateway.get("/readyz") == 200)
                trace, parent = "ab" * 16, "cd" * 8
                headers = {"traceparent": f"00-{trace}-{parent}-01"}
                assert gateway.client.post(PATH, json=BODY, headers=headers).status_code == 200
            collector.shutdown()
        spans = [
            span
            for request in received
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        span = next(span for span in spans if span.name == "POST /estimate_flow/")
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace, parent)
        attributes = {attribute.key for attribute in span.attributes}
        assert {"flownet2.outcome", "flownet2.stage.infer_ms"} <= attributes

    @pytest.mark.parametrize(
        ("variable", "value"),
        [
            ("GATEWAY_MAX_IN_FLIGHT", "0"),
            ("GATEWAY_MAX_BUFFERED_BYTES", "5"),
            ("GATEWAY_API_KEYS_FILE", "/nonexistent"),
            ("TRITON_ENDPOINTS", "triton"),
            ("GATEWAY_IMAGE_FORMATS", "PNG,NOSUCH"),
        ],
    )
    def test_bad_settings_are_named(self, tmp_path: Path, variable: str, value: str) -> None:
        gateway = Gateway(**{"endpoints": "127.0.0.1:1", "log": tmp_path / "log", variable: value})
        gateway.client.close()
        assert gateway.process.wait(60) == 2
        assert variable.removeprefix("GATEWAY_").lower() in (tmp_path / "log").read_text().lower()


class TestMemory:
    def test_many_large_bodies_within_1_gib(
        self, closed_form_triton: triton.Triton, tmp_path: Path
    ) -> None:
        """200 clients post 20 MB each to a process that may have 1 GiB of address space."""
        noise = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), np.uint8)
        image = encoded(Image.fromarray(noise), compress_level=0)
        content = json.dumps(as_json(image, image)).encode()
        assert len(content) > 20e6
        outcomes: list[str] = []
        with run_gateway(closed_form_triton.address.grpc, tmp_path / "log") as gateway:
            wait_until(lambda: gateway.get("/readyz") == 200)
            resource.prlimit(gateway.process.pid, resource.RLIMIT_AS, (2**30, 2**30))

            def post() -> None:
                line = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=300)
                headers = {"Accept": "application/x-npy", "X-Request-Timeout": "120"}
                with contextlib.closing(line):
                    line.request("POST", PATH, content, headers)
                    response = line.getresponse()
                    data = response.read()
                ok = response.status == 200 and len(data) > 2**21
                outcomes.append("ok" if ok else json.loads(data)["type"].rpartition(":")[2])

            clients = [threading.Thread(target=post) for _ in range(200)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            assert len(outcomes) == 200
            assert set(outcomes) == {"ok", "overloaded"}
            assert gateway.client.post(PATH, json=BODY).status_code == 200


class TestLife:
    def test_without_triton(self, tmp_path: Path) -> None:
        with run_gateway("127.0.0.1:1", tmp_path / "log") as gateway:
            for response in (gateway.client.post(PATH, json=BODY), gateway.client.get("/readyz")):
                check_problem(response, 503, "inference-unavailable")
                assert response.headers["retry-after"] == "1"
            assert gateway.get("/livez") == 200
            rejected = 'flownet2_rejected_total{reason="inference-unavailable"}'
            assert f"{rejected} 1.0\n" in gateway.client.get("/metrics").text  # no probe counts
            for path in ("/livez", "/readyz", "/healthz", "/metrics"):
                head = gateway.client.head(path)
                assert (head.status_code, head.content) == (gateway.get(path), b"")
            assert gateway.client.get("/healthz").json()["status"] == "unavailable"
            assert gateway.client.get("/models").json() == {"models": []}

    def test_shutdown_does_not_wait_for_abandoned_threads(
        self, closed_form_triton: triton.Triton, tmp_path: Path
    ) -> None:
        """Decoding that never ends: its request gets a 504, and the process can still exit."""
        (tmp_path / "sitecustomize.py").write_text(
            "import time\nfrom PIL import ImageFile\n"
            "ImageFile.ImageFile.load = lambda self: time.sleep(3600)\n"
        )
        with run_gateway(
            closed_form_triton.address.grpc, tmp_path / "log", PYTHONPATH=str(tmp_path)
        ) as gateway:
            wait_until(lambda: gateway.get("/readyz") == 200)
            response = gateway.client.post(PATH, json=BODY, headers={"X-Request-Timeout": "2"})
            check_problem(response, 504, "deadline-exceeded")
            assert "flownet2_slots_used 1.0" in gateway.client.get("/metrics").text
            gateway.process.send_signal(signal.SIGTERM)
            assert gateway.process.wait(30) == 0

    def test_sigterm_finishes_requests_in_flight(
        self, closed_form_triton: triton.Triton, tmp_path: Path
    ) -> None:
        with run_gateway(
            closed_form_triton.address.grpc, tmp_path / "log", GATEWAY_SHUTDOWN_DELAY_S="0.7"
        ) as gateway:
            wait_until(lambda: gateway.get("/readyz") == 200)
            responses: list[int] = []

            def post() -> None:
                url = f"{gateway.url}{PATH}?model=slow"
                responses.append(httpx2.post(url, json=BODY, timeout=60).status_code)

            client = threading.Thread(target=post)
            client.start()
            wait_until(lambda: "slots_used 1.0" in gateway.client.get("/metrics").text)
            gateway.process.send_signal(signal.SIGTERM)
            wait_until(lambda: gateway.get("/readyz") == 503)
            client.join()
            assert responses == [200]
            assert gateway.process.wait(30) == 0
