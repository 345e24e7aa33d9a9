"""Clients of the service: `http://` asks a gateway, `grpc://` a Triton itself."""

import asyncio
import io
import json
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeVar
from urllib.parse import urlsplit

import numpy as np

from flownet2.contract import (
    FLOW_OUTPUT,
    IMAGE_INPUTS,
    IMAGE_TYPE,
    MINIMUM_SIDE,
    MODEL_NAME,
)
from flownet2.errors import Error, requires_extra
from flownet2.formats import Flow, Mask
from flownet2.images import Frame, ImageError, Pixels, Source
from flownet2.measures import occluded
from flownet2.models import Model
from flownet2.triton import CHANNEL, failure

DEFAULT_SERVER = "http://127.0.0.1:5003"
Direction = Literal["forward", "backward", "both"]
T = TypeVar("T")

PROBLEM = "urn:problem-type:flownet2:"
UNREACHABLE = PROBLEM + "unreachable"

REST_SECONDS = 1.0
"""How long an endpoint that refused or failed is left alone, unless it names a time itself."""


class FlowError(Error):
    """There is no flow: the images are refused, or no server returns one.

    Attributes:
        type: the problem's name, the same as the gateway's (`urn:problem-type:flownet2:…`).
        detail: what is wrong and what to change.
        field: the image or parameter that is wrong.
        unavailable: whether servers are full or away; the images are not the cause.
    """

    unavailable = False

    def __init__(self, type: str, detail: str, field: str | None = None) -> None:
        super().__init__(detail)
        self.type = type
        self.detail = detail
        self.field = field


@dataclass(frozen=True)
class Result:
    """A flow, and what comes with it where `direction` is "both".

    Attributes:
        flow: float32 `[H, W, 2]` in pixels of the images, u to the right and v down; from the
            first image to the second, or with "backward" from the second to the first.
        flow_backward: with "both" the flow from the second image to the first.
        occluded: with "both" what the second image does not show of the first, bool `[H, W]`.
    """

    flow: Flow
    flow_backward: Flow | None = None
    occluded: Mask | None = None


class _Unavailable(Exception):
    """The endpoint does not answer now; another one may, or this one after some seconds."""

    def __init__(self, error: FlowError, seconds: float = REST_SECONDS) -> None:
        super().__init__(error.detail)
        self.error = error
        self.seconds = seconds


class _Endpoint(Protocol):
    """One server."""

    async def flow(self, first: Frame, second: Frame, both: bool) -> Result: ...

    async def models(self) -> list[Model]: ...

    async def close(self) -> None: ...


class _Gateway:
    """A gateway: takes image files, returns `.npy` or `.npz`."""

    def __init__(self, url: str, model: str | None, api_key: str | None, timeout: float) -> None:
        import httpx2  # noqa: PLC0415  slow to import, and only needed here

        self._httpx2 = httpx2
        self._url = url
        self._query = {"size": "native", **({"model": model} if model else {})}
        # A proxy that the environment names is for the way out.
        local = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
        self._client = httpx2.AsyncClient(
            base_url=url,
            timeout=httpx2.Timeout(timeout + 10.0, connect=10.0),
            limits=httpx2.Limits(max_connections=None),
            headers={
                "X-Request-Timeout": f"{timeout:g}",
                **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            },
            trust_env=not local,
        )

    async def flow(self, first: Frame, second: Frame, both: bool) -> Result:
        files = {
            name: (name, await asyncio.to_thread(frame.file))
            for name, frame in zip(IMAGE_INPUTS, (first, second), strict=True)
        }
        response = await self._ask(
            "POST",
            "/estimate_flow/",
            params={**self._query, **({"direction": "both"} if both else {})},
            files=files,
            headers={"Accept": f"application/x-{'npz' if both else 'npy'}"},
        )
        content: Any = np.load(io.BytesIO(response), allow_pickle=False)
        if not both:
            return Result(content)
        return Result(*(content[name] for name in ("flow", "flow_backward", "occluded")))

    async def models(self) -> list[Model]:
        found = json.loads(await self._ask("GET", "/models"))["models"]
        return [Model.from_json(model) for model in found]

    async def _ask(self, method: str, path: str, **options: Any) -> bytes:
        try:
            response = await self._client.request(method, path, **options)
        except self._httpx2.TransportError as error:
            raise _Unavailable(_unreachable(self._url, error)) from error
        if response.status_code == self._httpx2.codes.OK:
            content: bytes = response.content
            return content
        raise self._error(response)

    def _error(self, response: Any) -> FlowError | _Unavailable:
        try:
            problem = response.json()
            error = FlowError(problem["type"], problem["detail"], problem.get("field"))
        except (ValueError, KeyError, TypeError):  # something else than a gateway is there
            error = FlowError(
                PROBLEM + "unexpected-response",
                f"{self._url} responds with {response.status_code} {response.reason_phrase}: it "
                "is not a FlowNet2 gateway, or a proxy in front of one",
            )
        if response.status_code not in (502, 503) or error.type == PROBLEM + "model-failed":
            return error
        seconds = response.headers.get("Retry-After", "")
        return _Unavailable(error, float(seconds) if seconds.isdecimal() else REST_SECONDS)

    async def close(self) -> None:
        await self._client.aclose()


class _Triton:
    """A Triton: takes pixels, returns their flow."""

    def __init__(self, url: str, model: str | None, timeout: float) -> None:
        with requires_extra("grpc"):
            import tritonclient.grpc.aio as triton  # noqa: PLC0415  slow, and only needed here

        self._triton = triton
        self._url = url
        self._model = model or MODEL_NAME
        self._timeout = timeout
        self._client = triton.InferenceServerClient(
            urlsplit(url).netloc,
            # A name may stand for several Tritons, as that of a headless service does.
            channel_args=[*CHANNEL, ("grpc.lb_policy_name", "round_robin")],
        )

    async def flow(self, first: Frame, second: Frame, both: bool) -> Result:
        pixels1, pixels2 = [await asyncio.to_thread(frame.pixels) for frame in (first, second)]
        if not both:
            return Result(await self._infer(pixels1, pixels2))
        # Two requests, which Triton may join to a batch: not every engine takes two at any size.
        forward, backward = await asyncio.gather(
            self._infer(pixels1, pixels2), self._infer(pixels2, pixels1)
        )
        return Result(forward, backward, await asyncio.to_thread(occluded, forward, backward))

    async def _infer(self, first: Pixels, second: Pixels) -> Flow:
        inputs = []
        for name, pixels in zip(IMAGE_INPUTS, (first, second), strict=True):
            inputs.append(self._triton.InferInput(name, [1, *pixels.shape], IMAGE_TYPE))
            inputs[-1].set_data_from_numpy(pixels[None])
        result = await self._ask(
            lambda: self._client.infer(
                self._model,
                inputs,
                timeout=int(self._timeout * 1e6),  # bounds the time in Triton's queue
                client_timeout=self._timeout,
            )
        )
        flow: Flow = result.as_numpy(FLOW_OUTPUT)[0]
        return flow

    async def models(self) -> list[Model]:
        async def describe(name: str, version: str) -> Model:
            config = (await self._ask(lambda: self._client.get_model_config(name, version))).config
            return Model.from_parameters(
                name,
                config.parameters,
                version=version,
                backend=config.backend,
                default=name == MODEL_NAME,
            )

        # Of those that are ready; the repository's index is for the operator alone.
        statistics = await self._ask(self._client.get_inference_statistics)
        return [await describe(one.name, one.version) for one in statistics.model_stats]

    async def _ask(self, call: Callable[[], Awaitable[Any]]) -> Any:
        from tritonclient.utils import InferenceServerException  # noqa: PLC0415

        try:
            return await call()
        except InferenceServerException as error:
            raise self._error(error) from error

    def _error(self, error: Any) -> FlowError | _Unavailable:
        message = str(error.message() or "")
        kind = failure(str(error.status() or "").removeprefix("StatusCode."), message)
        detail = f"{self._url}: {message}"
        match kind:
            case "unavailable":
                return _Unavailable(_unreachable(self._url, message))
            case "queue-full":
                return _Unavailable(FlowError(PROBLEM + kind, detail))
            case "deadline-exceeded":
                detail = (
                    f"{self._url} had no flow within {self._timeout:g} s: give it a longer timeout"
                )
            case "image-too-large":
                detail = (
                    "the images are larger than the model's TensorRT engine takes: make them "
                    "smaller"
                )
        return FlowError(PROBLEM + kind, detail, "model" if kind == "unknown-model" else None)

    async def close(self) -> None:
        await self._client.close()


def _unreachable(url: str, reason: object) -> FlowError:
    return FlowError(UNREACHABLE, f"nothing answers at {url} ({str(reason) or repr(reason)})")


@dataclass(eq=False)
class _Load:
    """What is known of an endpoint: requests under way, and until when it is left alone."""

    url: str
    endpoint: _Endpoint | None = None
    under_way: int = 0
    rests_until: float = 0.0


class AsyncClient:
    """Asks one or several servers for flow; for one event loop.

    Every endpoint is used, the least busy first. One that refuses or fails is left alone for as
    long as it asks, a second by default, and its requests go to another one.
    """

    def __init__(
        self,
        server: str | None = None,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        patience: float = 60.0,
    ) -> None:
        """Name the servers; nothing is asked yet.

        Args:
            server: URLs separated by commas, `http://…` or `https://…` of gateways and
                `grpc://host:port` of Tritons; by default `FLOWNET2_URL`, else
                `http://127.0.0.1:5003`.
            model: name of the model; by default the server's.
            api_key: for gateways that want one; by default `FLOWNET2_API_KEY`.
            timeout: seconds that one request may take.
            patience: seconds for which servers that are full or away are asked again.

        Raises:
            FlowError: a URL is none of these.
        """
        server = server or os.environ.get("FLOWNET2_URL") or DEFAULT_SERVER
        self.urls = [url.strip().rstrip("/") for url in server.split(",")]
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https", "grpc") or not parts.netloc:
                raise FlowError(
                    PROBLEM + "bad-server",
                    f"{url} is not a server: give http://host:port or grpc://host:port",
                )
        self._model = model
        self._api_key = api_key or os.environ.get("FLOWNET2_API_KEY")
        self._timeout = timeout
        self._patience = patience
        self._loads = [_Load(url) for url in self.urls]

    async def flow(
        self, image1: Source | Frame, image2: Source | Frame, *, direction: Direction = "forward"
    ) -> Result:
        """The optical flow between two images of one size, at that size.

        Args:
            image1: a path, a URL that fsspec reads, an image file's bytes, a Pillow image, or
                uint8 RGB `[H, W, 3]`.
            image2: as `image1`.
            direction: from the first to the second, the reverse, or both.

        Raises:
            FlowError: the images cannot be read or differ in size, or no server returns a flow.
        """
        try:
            first, second = await asyncio.to_thread(_checked, image1, image2)
            if direction == "backward":
                first, second = second, first
            return await self._share(lambda one: one.flow(first, second, direction == "both"))
        except ImageError as error:
            raise FlowError(PROBLEM + "not-an-image", str(error)) from error

    async def models(self) -> list[Model]:
        """The networks that a server has loaded; FlowError where none answers."""
        return await self._share(lambda endpoint: endpoint.models())

    async def model(self) -> Model:
        """The network that this client asks; FlowError where no server has it."""
        models = await self.models()
        for model in models:
            if model.name == self._model or (self._model is None and model.default):
                return model
        raise FlowError(
            PROBLEM + "unknown-model",
            f"{', '.join(self.urls)} serves no model {self._model or MODEL_NAME}; there are "
            f"{', '.join(model.name for model in models) or 'none'}",
            "model",
        )

    async def _share(self, ask: Callable[[_Endpoint], Awaitable[T]]) -> T:
        """Ask the least busy endpoint, and others while endpoints are not available."""
        loop = asyncio.get_running_loop()
        give_up: float | None = None
        while True:
            now = loop.time()
            load = min(self._loads, key=lambda one: (max(one.rests_until - now, 0), one.under_way))
            load.under_way += 1
            try:
                await asyncio.sleep(load.rests_until - now)
                return await ask(self._endpoint(load))
            except _Unavailable as error:
                load.rests_until = loop.time() + error.seconds
                give_up = give_up or loop.time() + self._patience
                if loop.time() + error.seconds > give_up and self._all_rest():
                    error.error.unavailable = True
                    raise error.error from error
            finally:
                load.under_way -= 1

    def _all_rest(self) -> bool:
        now = asyncio.get_running_loop().time()
        return all(load.rests_until > now for load in self._loads)

    def _endpoint(self, load: _Load) -> _Endpoint:
        if load.endpoint is None:
            load.endpoint = (
                _Triton(load.url, self._model, self._timeout)
                if load.url.startswith("grpc:")
                else _Gateway(load.url, self._model, self._api_key, self._timeout)
            )
        return load.endpoint

    async def close(self) -> None:
        """Close the connections."""
        for load in self._loads:
            if load.endpoint is not None:
                await load.endpoint.close()
                load.endpoint = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _checked(image1: Source | Frame, image2: Source | Frame) -> tuple[Frame, Frame]:
    """Both images, found to be of one size, and large enough."""
    first, second = (
        image if isinstance(image, Frame) else Frame(image, name)
        for name, image in zip(IMAGE_INPUTS, (image1, image2), strict=True)
    )
    sizes = first.size(), second.size()
    for name, size in zip(IMAGE_INPUTS, sizes, strict=True):
        if min(size) < MINIMUM_SIDE:
            raise FlowError(
                PROBLEM + "image-too-small",
                f"{name} is {_by(size)}; a side has at least {MINIMUM_SIDE} pixels",
                name,
            )
    if sizes[0] != sizes[1]:
        raise FlowError(
            PROBLEM + "sizes-differ",
            f"the first image is {_by(sizes[0])} and the second {_by(sizes[1])}: "
            "give two images of one size",
            IMAGE_INPUTS[1],
        )
    return first, second


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


class Client:
    """`AsyncClient` for programs without an event loop; any number of threads may use one."""

    def __init__(
        self,
        server: str | None = None,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        patience: float = 60.0,
    ) -> None:
        """See `AsyncClient`."""
        self._client = AsyncClient(
            server, model=model, api_key=api_key, timeout=timeout, patience=patience
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="flownet2 client", daemon=True
        )
        self._thread.start()

    def flow(self, image1: Source, image2: Source, *, direction: Direction = "forward") -> Result:
        """See `AsyncClient.flow`."""
        return self._run(self._client.flow(image1, image2, direction=direction))

    def models(self) -> list[Model]:
        """See `AsyncClient.models`."""
        return self._run(self._client.models())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Close the connections; the client cannot be used any more."""
        if self._thread.is_alive():
            self._run(self._client.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
