"""The clients against a real gateway and Triton whose flow is known in closed form."""

import asyncio
import concurrent.futures
import contextlib
import copy
import gc
import http.server
import io
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flownet2 import AsyncClient, Client, FlowError, service
from flownet2.client import Direction
from flownet2.measures import occluded
from launch import triton
from tests.support.gateway_stack import Gateway, free_port, picture, wait_until


@pytest.fixture(params=["http", "grpc"])
def client(
    request: pytest.FixtureRequest, gateway: Gateway, closed_form_triton: triton.Triton
) -> Iterator[Client]:
    address = (
        gateway.url if request.param == "http" else f"grpc://{closed_form_triton.address.grpc}"
    )
    with Client(address) as running:
        yield running


def address(client: Client) -> str:
    (url,) = client.urls
    return url


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
    """An HTTP server that returns prepared responses, and then repeats the last response."""

    def __init__(
        self,
        *answers: tuple[int, dict[str, str], bytes] | None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.headers: list[dict[str, str]] = []
        script = list(answers)
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def do_GET(self) -> None:
                outer.headers.append(dict(self.headers))
                answer = script.pop(0) if len(script) > 1 else script[0]
                if answer is None:  # dies in the middle
                    self.close_connection = True
                    return
                if answer is SLOW:
                    self.close_connection = True
                    outer.ended.wait(30)
                    return
                status, headers, content = answer
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        self.ended = threading.Event()
        self.server = Server((host, port), Handler)
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server.server_port}"

    def __enter__(self) -> "Scripted":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()


SLOW = (0, {}, b"")
"""Stands for no answer at all."""


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


WRONG_SERVERS = (
    *("127.0.0.1:5003", "ftp://a", "http://a,", "grpc://", "http://[::1", "http://a:port"),
    *("grpc://a", "grpc://a:8001/b", "http://a:70000"),
)


@pytest.mark.parametrize("server", WRONG_SERVERS)
def test_addresses_that_are_none(server: str) -> None:
    with pytest.raises(FlowError, match="is not a server") as caught:
        Client(server)
    assert caught.value.field == "server"


def test_wrong_arguments(frames: tuple[np.ndarray, np.ndarray]) -> None:
    for field, options in (
        ("timeout", {"timeout": 0}),
        ("timeout", {"timeout": None}),
        ("api_key", {"api_key": "s\u00e9same"}),
    ):
        with pytest.raises(FlowError) as caught:
            Client("http://127.0.0.1:1", **options)
        assert caught.value.field == field
    with Client("http://127.0.0.1:1") as client:
        for field, options in (
            ("direction", {"direction": "backwards"}),
            ("direction", {"direction": None}),
            ("max_edge", {"max_edge": 8}),
        ):
            with pytest.raises(FlowError) as caught:
                client.flow(*frames, **options)
            assert caught.value.field == field


def test_images_that_are_none(client: Client, frames: tuple[np.ndarray, np.ndarray]) -> None:
    for image in (None, 7, [[1]], frames[0].astype(np.float32), io.StringIO("text")):
        with pytest.raises(FlowError, match="image2") as caught:
            client.flow(frames[0], image)
        assert caught.value.type.endswith(":not-an-image")


def test_deep_images_are_scaled_or_refused(client: Client) -> None:
    deep = np.linspace(0, 1, 40 * 50, dtype=np.float32).reshape(40, 50)
    black = np.zeros((40, 50, 3), np.uint8)
    flow = client.flow(Image.fromarray(deep), black).flow
    np.testing.assert_array_equal(flow[..., 0], np.rint(deep * 255) / -8)
    with pytest.raises(FlowError, match="scale them to 0 to 1"):
        client.flow(Image.fromarray(deep * 2), black)


def test_reduced_images(client: Client) -> None:
    images = [picture(seed, 160, 80) for seed in (1, 2)]
    small = [np.asarray(one.resize((64, 32), Image.Resampling.LANCZOS)) for one in images]
    flow = client.flow(*images, max_edge=64).flow
    np.testing.assert_array_equal(flow, closed_form(*small))
    assert client.flow(*images, max_edge=160).flow.shape == (80, 160, 2)


def test_a_named_server_that_starts_late_is_waited_for() -> None:
    port = free_port()
    models = (200, {}, b'{"models": []}')
    said: list[str] = []
    with contextlib.ExitStack() as stack:

        def say(line: str) -> None:
            said.append(line)
            stack.enter_context(Scripted(models, port=port))

        url = f"http://127.0.0.1:{port}"
        assert stack.enter_context(service.server(url, say)) == url
    assert len(said) == 1


def test_a_server_without_models_is_asked_again() -> None:
    def models(*names: str) -> tuple[int, dict[str, str], bytes]:
        listed = [{"name": name, "default": True} for name in names]
        return 200, {}, json.dumps({"models": listed}).encode()

    with Scripted(models(), models("flownet2")) as server, Client(server.url) as client:
        assert client.model().name == "flownet2"
    with Scripted(models("other")) as server, Client(server.url, model="flownet2") as client:
        with pytest.raises(FlowError, match="it serves other") as caught:
            client.model()
        assert not caught.value.unavailable


def test_the_model_of_a_client(client: Client) -> None:
    assert client.model().name == "flownet2"
    assert client.model().network == "FlowNet2"


@contextlib.contextmanager
def silent_server(accepting: bool) -> Iterator[str]:
    """The address of a server that never answers; with `accepting` False it does not connect."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(8 if accepting else 0)
        address = listener.getsockname()
        for _ in range(0 if accepting else 2):  # fill the queue of connections
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        yield f"127.0.0.1:{address[1]}"


@pytest.mark.parametrize(
    ("scheme", "accepting", "name"),
    [
        ("http", True, "deadline-exceeded"),
        ("http", False, "unreachable"),
        ("grpc", True, "unreachable"),  # gRPC waits for the server's settings
        ("grpc", False, "unreachable"),
    ],
)
def test_timeout_is_the_deadline_of_a_call(
    scheme: str, accepting: bool, name: str, frames: tuple[np.ndarray, np.ndarray]
) -> None:
    with (
        silent_server(accepting) as address,
        Client(f"{scheme}://{address}", timeout=1.5) as client,
    ):
        began = time.monotonic()
        with pytest.raises(FlowError) as caught:
            client.flow(*frames)
        assert time.monotonic() - began < 3
        assert caught.value.type.endswith(f":{name}")


def test_a_request_that_took_too_long_is_not_sent_again(
    frames: tuple[np.ndarray, np.ndarray],
) -> None:
    with Scripted(SLOW) as server, Client(server.url, timeout=0.5) as client:
        with pytest.raises(FlowError, match="longer timeout") as caught:
            client.flow(*frames)
        assert caught.value.type.endswith(":deadline-exceeded")
        assert len(server.headers) == 1
        assert float(server.headers[0]["X-Request-Timeout"]) <= 0.5


def test_retries_end_at_the_deadline(frames: tuple[np.ndarray, np.ndarray]) -> None:
    with Scripted(FULL) as server, Client(server.url, timeout=2.5) as client:
        began = time.monotonic()
        with pytest.raises(FlowError, match="full") as caught:
            client.flow(*frames)
        assert time.monotonic() - began < 3
        assert caught.value.unavailable
        assert len(server.headers) == 3


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_responses_of_other_servers(
    frames: tuple[np.ndarray, np.ndarray], direction: Direction
) -> None:
    flow = closed_form(*frames)
    _, _, content = npy(flow)
    for response in (
        (200, {"Content-Type": "text/html"}, b"<html>Sign in</html>"),
        (200, {}, b""),
        (200, {}, content[:-4]),
        npy(flow[:-1]),
        npy(flow.astype(np.float64)),
        (200, {"Content-Encoding": "gzip"}, content),
        (302, {"Location": "/login"}, b""),
        (504, {}, b"<html>Gateway Timeout</html>"),
    ):
        with Scripted(response) as server, Client(server.url) as client:
            with pytest.raises(FlowError, match=server.url) as caught:
                client.flow(*frames, direction=direction)
            assert caught.value.type.endswith(":unexpected-response")


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "http://[::1", "x://", "http://a:b"])
def test_proxies_that_cannot_be_used(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with Client("http://gateway.invalid", patience=0) as client, pytest.raises(FlowError):
        client.models()


def test_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "[::1]")
    black = np.zeros((20, 30, 3), np.uint8)
    try:
        server = Scripted(npy(np.zeros((20, 30, 2), np.float32)), host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server, Client(server.url) as client:
        assert client.flow(black, black).flow.shape == (20, 30, 2)


FORK = """
import os, sys
import numpy as np
from flownet2 import Client, FlowError
client = Client(sys.argv[1], timeout=20)
image = np.zeros((64, 64, 3), np.uint8)
if sys.argv[2] == "used":
    client.flow(image, image)
child = os.fork()
if child == 0:
    try:
        print("child", client.flow(image, image).flow.shape, flush=True)
    except FlowError as error:
        print("child", error.type, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent", client.flow(image, image).flow.shape)
client.close()
"""


@pytest.mark.parametrize("before", ["unused", "used"])
def test_a_client_works_after_a_fork(client: Client, before: str) -> None:
    url = address(client)
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", FORK, url, before],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=True,
    )
    forked = "urn:problem-type:flownet2:forked"  # gRPC does not work then
    child = forked if url.startswith("grpc") and before == "used" else "(64, 64, 2)"
    lines = [line for line in done.stdout.splitlines() if "fork_posix.cc" not in line]
    assert lines == [f"child {child}", "parent (64, 64, 2)"]


def test_a_dropped_client_leaves_nothing(
    client: Client, frames: tuple[np.ndarray, np.ndarray]
) -> None:
    url = address(client)
    before = threading.active_count()
    for _ in range(5):
        Client(url).flow(*frames)
    gc.collect()
    wait_until(lambda: threading.active_count() <= before)


def test_a_closed_client(client: Client, frames: tuple[np.ndarray, np.ndarray]) -> None:
    client.flow(*frames)
    client.close()
    client.close()
    for use in (lambda: client.flow(*frames), client.models, client.__enter__):
        with pytest.raises(FlowError, match="is closed"):
            use()

    async def use_closed() -> None:
        asynchronous = AsyncClient(address(client))
        await asynchronous.close()
        await asynchronous.flow(*frames)

    with pytest.raises(FlowError, match="is closed"):
        asyncio.run(use_closed())


def test_closing_ends_the_calls_of_other_threads(frames: tuple[np.ndarray, np.ndarray]) -> None:
    with Scripted(SLOW) as server, concurrent.futures.ThreadPoolExecutor() as threads:
        client = Client(server.url)
        call = threads.submit(client.flow, *frames)
        wait_until(lambda: server.headers)
        client.close()
        with pytest.raises(FlowError, match="is closed"):
            call.result(10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # never closed
def test_a_client_in_one_event_loop_after_another(
    client: Client, frames: tuple[np.ndarray, np.ndarray]
) -> None:
    asynchronous = AsyncClient(address(client))
    for _ in range(2):
        asyncio.run(asynchronous.flow(*frames))
    del asynchronous
    gc.collect()


def test_errors_survive_a_process_boundary() -> None:
    error = FlowError("urn:a", "what is wrong", "image1", unavailable=True)
    for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert vars(copied) == vars(error)
        assert str(copied) == "what is wrong"
