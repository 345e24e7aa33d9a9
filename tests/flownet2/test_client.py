"""The clients against a real gateway and Triton whose flow is known in closed form."""

import asyncio
import http.server
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flownet2 import AsyncClient, Client, FlowError
from flownet2.measures import occluded
from launch import triton
from tests.support.gateway_stack import Gateway, free_port, picture


@pytest.fixture(params=["http", "grpc"])
def client(
    request: pytest.FixtureRequest, gateway: Gateway, closed_form_triton: triton.Triton
) -> Iterator[Client]:
    address = (
        gateway.url if request.param == "http" else f"grpc://{closed_form_triton.address.grpc}"
    )
    with Client(address) as running:
        yield running


@pytest.fixture
def frames() -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.asarray(picture(seed, 83, 47)) for seed in (1, 2))
    return first, second


def closed_form(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (second.astype(np.float32) - first)[..., :2] / 8


@pytest.mark.parametrize("given", ["path", "string", "bytes", "pillow", "array", "bitmap"])
def test_flow_of_images_in_every_form(
    client: Client, frames: tuple[np.ndarray, np.ndarray], tmp_path: Path, given: str
) -> None:
    images: list[object] = []
    for number, frame in enumerate(frames):
        image = Image.fromarray(frame)
        path = tmp_path / f"{number}.{'bmp' if given == 'bitmap' else 'png'}"
        image.save(path)
        forms = {"bytes": path.read_bytes(), "pillow": image, "array": frame, "string": str(path)}
        images.append(forms.get(given, path))
    result = client.flow(*images)
    assert result.flow.dtype == np.float32
    np.testing.assert_array_equal(result.flow, closed_form(*frames))
    assert result.flow_backward is None
    assert result.occluded is None


def test_directions(client: Client, frames: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(
        client.flow(*frames, direction="backward").flow, closed_form(*frames[::-1])
    )


def test_both_directions_and_what_is_occluded(
    client: Client, frames: tuple[np.ndarray, np.ndarray]
) -> None:
    both = client.flow(*frames, direction="both")
    np.testing.assert_array_equal(both.flow, closed_form(*frames))
    np.testing.assert_array_equal(both.flow_backward, closed_form(*frames[::-1]))
    np.testing.assert_array_equal(both.occluded, occluded(both.flow, -both.flow))
    assert both.occluded.dtype == bool


def test_sixteen_bit_grey_is_scaled(client: Client) -> None:
    deep = np.linspace(0, 65535, 40 * 50).reshape(40, 50).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "PNG")
    flow = client.flow(file.getvalue(), np.zeros((40, 50, 3), np.uint8)).flow
    np.testing.assert_allclose(flow[..., 0], deep / (-257 * 8), atol=0.07)


def test_mistakes_are_told_alike(
    client: Client, frames: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    def problem(*images: object) -> tuple[str, str | None, str]:
        with pytest.raises(FlowError) as caught:
            client.flow(*images)
        return caught.value.type.rpartition(":")[2], caught.value.field, caught.value.detail

    first, second = frames
    assert problem(first, second[:-1])[:2] == ("sizes-differ", "image2")
    assert problem(first[:15], second[:15])[:2] == ("image-too-small", "image1")
    missing = problem(first, tmp_path / "missing.png")
    assert missing[0] == "not-an-image"
    assert "missing.png" in missing[2]
    assert problem(b"no image", second)[0] == "not-an-image"


def test_a_model_that_is_not_there(gateway: Gateway, closed_form_triton: triton.Triton) -> None:
    for server in (gateway.url, f"grpc://{closed_form_triton.address.grpc}"):
        with Client(server, model="flownet3") as client, pytest.raises(FlowError) as caught:
            client.flow(picture(1), picture(2))
        assert caught.value.type.endswith(":unknown-model")
        assert caught.value.field == "model"


def test_models(client: Client) -> None:
    (model,) = (one for one in client.models() if one.name == "flownet2")
    assert (model.network, model.parameters) == ("FlowNet2", 162518850)
    assert model.weights_source == "closed form"


def test_async(gateway: Gateway, frames: tuple[np.ndarray, np.ndarray]) -> None:
    async def ask() -> list[np.ndarray]:
        async with AsyncClient(gateway.url) as client:
            results = await asyncio.gather(*(client.flow(*frames) for _ in range(8)))
            return [one.flow for one in results]

    for flow in asyncio.run(ask()):
        np.testing.assert_array_equal(flow, closed_form(*frames))


class Scripted:
    """An HTTP server that gives prepared answers, the last one again and again."""

    def __init__(self, *answers: tuple[int, dict[str, str], bytes] | None) -> None:
        self.headers: list[dict[str, str]] = []
        script = list(answers)
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.headers.append(dict(self.headers))
                self.rfile.read(int(self.headers["Content-Length"]))
                answer = script.pop(0) if len(script) > 1 else script[0]
                if answer is None:  # dies in the middle
                    self.close_connection = True
                    return
                status, headers, content = answer
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Scripted":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def npy(flow: np.ndarray) -> tuple[int, dict[str, str], bytes]:
    file = io.BytesIO()
    np.save(file, flow)
    return 200, {}, file.getvalue()


FULL = (
    503,
    {"Retry-After": "1", "Content-Type": "application/problem+json"},
    json.dumps({"type": "urn:problem-type:flownet2:overloaded", "detail": "full"}).encode(),
)


def test_a_full_server_is_asked_again_when_it_says(frames: tuple[np.ndarray, np.ndarray]) -> None:
    flow = closed_form(*frames)
    with Scripted(FULL, FULL, npy(flow)) as server, Client(server.url) as client:
        began = time.monotonic()
        np.testing.assert_array_equal(client.flow(*frames).flow, flow)
        assert time.monotonic() - began >= 2


def test_a_server_that_stays_full_or_away_is_given_up(
    frames: tuple[np.ndarray, np.ndarray],
) -> None:
    with Scripted(FULL) as server, Client(server.url, patience=0) as client:
        with pytest.raises(FlowError, match="full") as caught:
            client.flow(*frames)
        assert caught.value.type.endswith(":overloaded")
    for scheme in ("http", "grpc"):
        address = f"{scheme}://127.0.0.1:{free_port()}"
        with Client(address, patience=0) as client, pytest.raises(FlowError, match=address):
            client.flow(*frames)


def test_endpoints_share_the_work_and_one_that_dies_loses_nothing(
    gateway: Gateway, closed_form_triton: triton.Triton, frames: tuple[np.ndarray, np.ndarray]
) -> None:
    async def ask(server: str) -> list[np.ndarray]:
        async with AsyncClient(server) as client:
            results = await asyncio.gather(*(client.flow(*frames) for _ in range(24)))
            return [one.flow for one in results]

    flow = npy(closed_form(*frames))
    with Scripted(flow) as one, Scripted(flow) as other:
        asyncio.run(ask(f"{one.url},{other.url}"))
        assert min(len(one.headers), len(other.headers)) >= 8
    with Scripted(flow, None) as dying:
        servers = f"{dying.url}, {gateway.url}, grpc://{closed_form_triton.address.grpc}"
        flows = asyncio.run(ask(servers))
        assert len(dying.headers) > 1
    for flow in flows:
        np.testing.assert_array_equal(flow, closed_form(*frames))


def test_the_key_and_the_server_come_from_the_environment(
    frames: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Scripted(npy(closed_form(*frames))) as server:
        monkeypatch.setenv("FLOWNET2_API_KEY", "secret")
        monkeypatch.setenv("FLOWNET2_URL", server.url)
        with Client() as client:
            client.flow(*frames)
        assert server.headers[0]["Authorization"] == "Bearer secret"


def test_addresses_that_are_none() -> None:
    for server in ("127.0.0.1:5003", "ftp://a", "http://a,", "grpc://"):
        with pytest.raises(FlowError, match="is not a server"):
            Client(server)
