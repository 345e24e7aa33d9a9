"""The two kinds of servers behind a client: a gateway over HTTP, and Triton over gRPC."""

import asyncio
import io
import ipaddress
import json
import os
from collections.abc import Awaitable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from flownet2.contract import FLOW_OUTPUT, IMAGE_INPUTS, MODEL_NAME
from flownet2.errors import PROBLEM, UNREACHABLE, FlowError, requires_extra
from flownet2.formats import Flow, Mask
from flownet2.images import Frame, Pixels
from flownet2.measures import occluded
from flownet2.models import Model
from flownet2.triton import CHANNEL, INFER, failure, infer_request

RETRY_SECONDS = 1.0
"""Pause before the next request to a failed server that did not say when to retry."""
_NPY_HEADER_BYTES = 1024
"""Upper bound on the size of the header of a three-dimensional `.npy` file."""
CONNECT_SECONDS = 10.0
"""Time limit for a connection; a call to several servers then tries another one."""


@dataclass(frozen=True)
class Result:
    """The flow of a pair.

    Attributes:
        flow: float32 `[H, W, 2]`, u to the right and v down, in pixels of the images as computed;
            from the first image to the second, or with direction "backward" from the second to the
            first.
        flow_backward: with direction "both" the flow from the second image to the first.
        occluded: with direction "both" the occlusion mask, bool `[H, W]`: pixels of the first image
            that are hidden in the second.
    """

    flow: Flow
    flow_backward: Flow | None = None
    occluded: Mask | None = None


class Unavailable(Exception):
    """Raised when a server is full or unreachable: retry on another server, or after a pause."""

    def __init__(self, error: FlowError, seconds: float = RETRY_SECONDS) -> None:
        super().__init__(error.detail)
        self.error = FlowError(error.type, error.detail, error.field, unavailable=True)
        self.seconds = seconds


class Backend(Protocol):
    """A connection to one server. Every method raises FlowError, or Unavailable."""

    async def flow(self, first: Frame, second: Frame, both: bool, timeout: float) -> Result:
        """Compute the flow of a pair, or of both directions, within `timeout` seconds."""

    async def models(self, timeout: float) -> list[Model]:
        """List the loaded models, within `timeout` seconds."""

    async def close(self) -> None:
        """Close the connection."""


class Gateway:
    """A gateway: takes image files, and returns a `.npy` or `.npz` file."""

    def __init__(self, url: str, model: str | None, api_key: str | None) -> None:
        import httpx2  # noqa: PLC0415  slow to import, and only needed here

        self._httpx2 = httpx2
        self._url = url
        self._query = {"size": "native", **({"model": model} if model else {})}
        try:
            self._client = httpx2.AsyncClient(
                base_url=url,
                limits=httpx2.Limits(max_connections=None),
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                # Proxies from the environment are not used for servers on this machine.
                trust_env=not _is_local(urlsplit(url).hostname or ""),
            )
        except Exception as error:  # a proxy or certificate file from the environment
            raise FlowError(
                PROBLEM + "invalid-parameter",
                f"no connection to {url} can be made: {error}. Check the server's URL, and the "
                "environment's proxies (HTTPS_PROXY, ALL_PROXY, NO_PROXY) and SSL_CERT_FILE",
                "server",
            ) from error

    async def flow(self, first: Frame, second: Frame, both: bool, timeout: float) -> Result:
        deadline = asyncio.get_running_loop().time() + timeout
        contents = await asyncio.to_thread(lambda: (first.file(), second.file()))
        files = {
            name: (name, content) for name, content in zip(IMAGE_INPUTS, contents, strict=True)
        }
        response = await self._request(
            "POST",
            "/estimate_flow/",
            deadline - asyncio.get_running_loop().time(),
            params={**self._query, **({"direction": "both"} if both else {})},
            files=files,
            accept=f"application/x-{'npz' if both else 'npy'}",
        )
        width, height = first.size()
        return self._result(response, both, height, width)

    def _result(self, content: bytearray, both: bool, height: int, width: int) -> Result:
        flow_array: tuple[str, tuple[int, ...]] = ("float32", (height, width, 2))
        expected = {"flow": flow_array}
        if both:
            expected |= {"flow_backward": flow_array, "occluded": ("bool", (height, width))}
        try:
            loaded: Any = (
                np.load(io.BytesIO(content), allow_pickle=False)
                if both
                else {"flow": _npy_array(content)}
            )
            arrays = {name: loaded[name] for name in expected}
            found = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
        except Exception as error:  # NumPy raises almost any exception for damaged files
            raise self._unexpected(f"no NumPy file ({error})") from error
        if found != expected:
            raise self._unexpected(f"{found} instead of {expected}")
        return Result(**arrays)

    async def models(self, timeout: float) -> list[Model]:
        content = await self._request("GET", "/models", timeout)
        try:
            return [Model.from_json(description) for description in json.loads(content)["models"]]
        except (ValueError, KeyError, TypeError) as error:
            raise self._unexpected("no list of models") from error

    async def _request(
        self, method: str, path: str, timeout: float, accept: str = "*/*", **options: Any
    ) -> bytearray:
        """Return the body of a response with status 200."""
        httpx2 = self._httpx2
        if timeout <= 0:
            raise deadline_exceeded(self._url)
        content = bytearray()
        try:
            async with self._client.stream(
                method,
                path,
                timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
                headers={"Accept": accept, "X-Request-Timeout": f"{timeout:.3f}"},
                **options,
            ) as response:
                async for chunk in response.aiter_bytes():
                    content += chunk
        except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
            raise deadline_exceeded(self._url) from error
        except (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol) as error:
            raise FlowError(PROBLEM + "invalid-parameter", f"{self._url}: {error}") from error
        except httpx2.TransportError as error:
            raise Unavailable(unreachable(self._url, error)) from error
        except httpx2.HTTPError as error:
            raise self._unexpected(str(error)) from error
        if response.status_code == HTTPStatus.OK:
            return content
        raise self._error(response, content)

    def _error(self, response: Any, content: bytearray) -> FlowError | Unavailable:
        error = self._unexpected(f"{response.status_code} {response.reason_phrase}")
        try:
            problem = json.loads(content)
            name, detail, field = problem["type"], problem["detail"], problem.get("field")
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        else:
            if isinstance(name, str) and isinstance(detail, str):
                if response.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                    detail = _too_large(detail)
                error = FlowError(name, detail, field)
        if response.status_code not in (429, 502, 503) or error.type == PROBLEM + "model-failed":
            return error
        seconds = response.headers.get("Retry-After", "")
        return Unavailable(error, float(seconds) if seconds.isdecimal() else RETRY_SECONDS)

    def _unexpected(self, response: str) -> FlowError:
        return FlowError(
            PROBLEM + "unexpected-response",
            f"{self._url} responds with {response}: it is not a FlowNet2 gateway, or there is a "
            "proxy in front of it",
        )

    async def close(self) -> None:
        await self._client.aclose()


_grpc_pid: int | None = None
"""The process that used gRPC first; gRPC does not work in processes forked from it."""


class Triton:
    """A Triton server: takes pixels, and returns their flow."""

    def __init__(self, url: str, model: str | None) -> None:
        with requires_extra("grpc"):
            # Imported here because it is slow to import. The stub is used directly: tritonclient's
            # class around it takes twice the CPU time.
            from grpc import aio  # noqa: PLC0415
            from tritonclient.grpc import service_pb2  # noqa: PLC0415
            from tritonclient.grpc.service_pb2_grpc import (  # noqa: PLC0415
                GRPCInferenceServiceStub,
            )
        global _grpc_pid  # noqa: PLW0603  gRPC's state, too, is the process's
        if _grpc_pid not in (None, os.getpid()):
            raise FlowError(
                PROBLEM + "forked",
                "gRPC was used before this process was forked and does not work in it: start "
                "processes with 'spawn', make the first call after the fork, or use http://",
            )
        _grpc_pid = os.getpid()
        self._messages = service_pb2
        self._error_class = aio.AioRpcError
        self._url = url
        self._model = model or MODEL_NAME
        self._channel = aio.insecure_channel(
            urlsplit(url).netloc,
            # A host name may resolve to several Tritons, such as a headless service's in
            # Kubernetes.
            options=[*CHANNEL, ("grpc.lb_policy_name", "round_robin")],
        )
        self._stub = GRPCInferenceServiceStub(self._channel)
        self._model_infer = self._channel.unary_unary(
            INFER, response_deserializer=service_pb2.ModelInferResponse.FromString
        )

    async def flow(self, first: Frame, second: Frame, both: bool, timeout: float) -> Result:
        deadline = asyncio.get_running_loop().time() + timeout
        pixels1, pixels2 = await asyncio.to_thread(lambda: (first.pixels(), second.pixels()))
        timeout = deadline - asyncio.get_running_loop().time()
        if not both:
            return Result(await self._infer(pixels1, pixels2, timeout))
        # Two requests, which Triton may batch: not every engine takes a batch of two at any size.
        forward, backward = await asyncio.gather(
            self._infer(pixels1, pixels2, timeout), self._infer(pixels2, pixels1, timeout)
        )
        return Result(forward, backward, await asyncio.to_thread(occluded, forward, backward))

    async def _infer(self, first: Pixels, second: Pixels, timeout: float) -> Flow:
        request = infer_request(self._model, first[None], second[None], timeout)
        response = await self._request(self._model_infer(request, timeout=timeout))
        return self._flow(response, *first.shape[:2])

    def _flow(self, response: Any, height: int, width: int) -> Flow:
        outputs = [(out.name, out.datatype, list(out.shape)) for out in response.outputs]
        expected = [(FLOW_OUTPUT, "FP32", [1, height, width, 2])]
        sizes = [len(content) for content in response.raw_output_contents]
        if outputs != expected or sizes != [height * width * 2 * 4]:
            raise FlowError(
                PROBLEM + "unexpected-response",
                f"{self._url} returned {outputs} instead of {expected}: {self._model} is not a "
                "model of this project",
                "model",
            )
        flow: npt.NDArray[np.float32] = np.frombuffer(response.raw_output_contents[0], np.float32)
        if not np.isfinite(flow).all():
            raise FlowError(PROBLEM + "model-failed", f"{self._url} returned NaN or infinity")
        return flow.reshape(height, width, 2).copy()  # the message's own memory is read-only

    async def models(self, timeout: float) -> list[Model]:
        async def describe(name: str, version: str) -> Model:
            request = self._messages.ModelConfigRequest(name=name, version=version)
            response = await self._request(self._stub.ModelConfig(request, timeout=timeout))
            return Model.from_parameters(
                name,
                response.config.parameters,
                version=version,
                backend=response.config.backend,
                default=name == MODEL_NAME,
            )

        # Statistics list the models that are ready; the repository index needs the admin key.
        request = self._messages.ModelStatisticsRequest()
        statistics = await self._request(self._stub.ModelStatistics(request, timeout=timeout))
        return [await describe(model.name, model.version) for model in statistics.model_stats]

    async def _request(self, call: Awaitable[Any]) -> Any:
        try:
            return await call
        except self._error_class as error:
            raise self._error(error.code().name, error.details() or "") from error

    def _error(self, code: str, message: str) -> FlowError | Unavailable:
        name = failure(code, message)
        detail = f"{self._url}: {message}"
        match name:
            case "unavailable":
                return Unavailable(unreachable(self._url, message))
            case "queue-full":
                return Unavailable(FlowError(PROBLEM + name, detail))
            case "deadline-exceeded":
                return deadline_exceeded(self._url)
            case "image-too-large":
                detail = _too_large(f"{self._url}: the images are larger than the model takes")
        return FlowError(PROBLEM + name, detail, "model" if name == "unknown-model" else None)

    async def close(self) -> None:
        await self._channel.close()


def _npy_array(content: bytearray) -> npt.NDArray[Any]:
    """Return the array of a `.npy` file, which shares the memory of `content`."""
    npy: Any = np.lib.format
    file = io.BytesIO(memoryview(content)[:_NPY_HEADER_BYTES])
    npy.read_magic(file)
    shape, fortran_order, dtype = npy.read_array_header_1_0(file)
    array = np.frombuffer(content, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if fortran_order else "C")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def unreachable(url: str, reason: object) -> FlowError:
    """Return the error for a server that does not answer."""
    return FlowError(UNREACHABLE, f"nothing answers at {url} ({str(reason) or repr(reason)})")


def deadline_exceeded(server: str) -> FlowError:
    """Return the error for a server that took too long."""
    return FlowError(
        PROBLEM + "deadline-exceeded", f"{server} did not answer in time: allow a longer timeout"
    )


def _too_large(detail: str) -> str:
    """Replace the advice in a server's message with the client's option."""
    fact = detail.partition(". ")[0].rstrip(".")
    return f"{fact}: reduce the images with max_edge (--max-edge of the command)"
