"""The clients: `Client` for threads, `AsyncClient` for asyncio.

A call goes to the least busy server. A server that is full or fails gets no request until the time
it asks for has passed, and the call goes to another one. Backends hold the connections.
"""

import asyncio
import concurrent.futures
import contextlib
import copy
import os
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar, get_args
from urllib.parse import urlsplit

from flownet2.backends import Backend, Gateway, Result, Triton, Unavailable, deadline_exceeded
from flownet2.contract import IMAGE_INPUTS, MINIMUM_SIDE, MODEL_NAME
from flownet2.errors import PROBLEM, FlowError
from flownet2.images import Frame, ImageError, Source, shrunk
from flownet2.models import Model

DEFAULT_SERVER = "http://127.0.0.1:5003"
Direction = Literal["forward", "backward", "both"]
T = TypeVar("T")

_GRACE_SECONDS = 0.1
"""Time beyond the deadline in which a backend reports its own, more precise error."""


@dataclass(eq=False)
class _Server:
    """A server with its connection and state.

    Attributes:
        in_flight: requests that were sent or wait for the server.
        retry_at: time of the event loop until which the server gets no request.
        error: error of the last request that found the server full or unreachable.
    """

    url: str
    backend: Backend | None = None
    in_flight: int = 0
    retry_at: float = 0.0
    error: FlowError | None = None


_inherited: list[list[_Server]] = []
"""Connections of a parent process: closing or freeing them here would disturb the parent."""


class AsyncClient:
    """Client for one event loop; balances its calls over one or several servers."""

    def __init__(
        self,
        server: str | None = None,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        patience: float = 60.0,
    ) -> None:
        """Configure the servers; no connection is made yet.

        Args:
            server: URLs separated by commas: `http://…` or `https://…` of gateways,
                `grpc://host:port` of Tritons. Default: `FLOWNET2_URL`, else
                `http://127.0.0.1:5003`.
            model: name of the model. Default: the server's default model.
            api_key: key for gateways that require one. Default: `FLOWNET2_API_KEY`.
            timeout: seconds that a call may take, with all connections, retries and transfers.
            patience: seconds of `timeout` for which servers that are full or unreachable are
                retried.

        Raises:
            FlowError: a URL or another argument is invalid.
        """
        if not isinstance(timeout, int | float) or not timeout > 0:
            raise _invalid("timeout", f"timeout is {timeout!r}: give seconds, more than 0")
        server = server or os.environ.get("FLOWNET2_URL") or DEFAULT_SERVER
        self.urls = [_checked_url(url.strip().rstrip("/")) for url in server.split(",")]
        self._model = model
        self._api_key = (api_key or os.environ.get("FLOWNET2_API_KEY") or "").strip()
        if not (self._api_key.isascii() and self._api_key.isprintable()):
            raise _invalid("api_key", "the API key has characters other than printable ASCII")
        self._timeout = timeout
        self._patience = patience
        self._closed = False
        self._pid: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._servers: list[_Server] = []

    async def flow(
        self,
        image1: Source | Frame,
        image2: Source | Frame,
        *,
        direction: Direction = "forward",
        max_edge: int | None = None,
    ) -> Result:
        """Compute the optical flow between two images of one size, at that size.

        The images have at least 16x16 pixels. `Result` describes the flow.

        Args:
            image1: a path, a URL that fsspec reads, the bytes of an image file, a file opened in
                binary mode, a Pillow image, or uint8 RGB `[H, W, 3]`.
            image2: as `image1`.
            direction: "forward" from the first image to the second, "backward" the reverse, or
                "both".
            max_edge: reduce images with a longer edge to this length first, 16 pixels or more. The
                flow then has the reduced size, and is in pixels of it.

        Raises:
            FlowError: an argument is invalid, or no server returns a flow.
        """
        if direction not in get_args(Direction):
            raise _invalid(
                "direction",
                f"direction is {direction!r}: give one of {', '.join(get_args(Direction))}",
            )
        if max_edge is not None and max_edge < MINIMUM_SIDE:
            raise _invalid("max_edge", f"max_edge is {max_edge}: give {MINIMUM_SIDE} or more")

        async with self._deadline() as deadline:
            frames = await asyncio.to_thread(_checked, image1, image2, max_edge)
            first, second = frames[::-1] if direction == "backward" else frames
            return await self._request(
                lambda backend, timeout: backend.flow(first, second, direction == "both", timeout),
                deadline,
            )

    async def models(self) -> list[Model]:
        """List the models that a server has loaded.

        Raises:
            FlowError: no server answers.
        """
        async with self._deadline() as deadline:
            return await self._request(lambda backend, timeout: backend.models(timeout), deadline)

    async def model(self) -> Model:
        """Describe the model that this client uses.

        A server that has loaded no model at all, as while it restarts, counts as unavailable.

        Raises:
            FlowError: no server answers, or the one that does has not loaded the model.
        """
        async with self._deadline() as deadline:
            return await self._request(self._own_model, deadline)

    async def _own_model(self, backend: Backend, timeout: float) -> Model:
        models = await backend.models(timeout)
        for model in models:
            if model.name == self._model or (self._model is None and model.default):
                return model
        error = FlowError(
            PROBLEM + "unknown-model",
            f"{', '.join(self.urls)} serves no model {self._model or MODEL_NAME}; it serves "
            f"{', '.join(model.name for model in models) or 'none'}",
            "model",
        )
        raise error if models else Unavailable(error)

    @contextlib.asynccontextmanager
    async def _deadline(self) -> AsyncIterator[float]:
        """Limit a call to `timeout`; yield its deadline, a time of the event loop.

        Raises:
            FlowError: replaces every other error, including a missed deadline.
        """
        self._bind()
        deadline = asyncio.get_running_loop().time() + self._timeout
        task = asyncio.current_task()
        try:
            async with asyncio.timeout_at(deadline + _GRACE_SECONDS):
                yield deadline
        except TimeoutError as error:
            raise deadline_exceeded(", ".join(self.urls)) from error
        except ImageError as error:
            raise FlowError(PROBLEM + "not-an-image", str(error)) from error
        except asyncio.CancelledError as error:
            if self._closed and task and not task.cancelling():  # its connection, not the task
                raise _closed() from error
            raise

    def _bind(self) -> None:
        """Check that the client is open, and bind it to the running event loop.

        After a fork, or when the loop of earlier calls is closed, it makes new connections.
        """
        if self._closed:
            raise _closed()
        loop = asyncio.get_running_loop()
        if self._loop is loop and self._pid == os.getpid():
            return
        if self._pid not in (None, os.getpid()):
            _inherited.append(self._servers)
        elif self._loop is not None and not self._loop.is_closed():
            raise _invalid("client", "an AsyncClient works in one event loop: make one for each")
        self._pid = os.getpid()
        self._loop = loop
        self._servers = [_Server(url) for url in self.urls]

    async def _request(
        self, request: Callable[[Backend, float], Awaitable[T]], deadline: float
    ) -> T:
        """Send a request to the least busy server; retry while servers are unavailable.

        Args:
            request: called with the connection and the seconds left.
            deadline: time of the event loop.
        """
        loop = asyncio.get_running_loop()
        last_retry: float | None = None
        while True:
            now = loop.time()
            server = min(self._servers, key=lambda one: (max(one.retry_at - now, 0), one.in_flight))
            server.in_flight += 1
            try:
                if server.retry_at > now:
                    last_retry = last_retry or min(deadline, now + self._patience)
                    if server.retry_at > last_retry and server.error:
                        raise copy.copy(server.error)
                    await asyncio.sleep(server.retry_at - now)
                if self._closed:
                    raise _closed()
                return await request(self._backend(server), deadline - loop.time())
            except Unavailable as error:
                server.retry_at = loop.time() + error.seconds
                server.error = error.error
            finally:
                server.in_flight -= 1

    def _backend(self, server: _Server) -> Backend:
        if server.backend is None:
            server.backend = (
                Triton(server.url, self._model)
                if server.url.startswith("grpc:")
                else Gateway(server.url, self._model, self._api_key)
            )
        return server.backend

    async def close(self) -> None:
        """Close the connections; the client cannot be used any more."""
        self._closed = True
        if self._pid == os.getpid() and self._loop is asyncio.get_running_loop():
            for server in self._servers:
                if server.backend is not None:
                    await server.backend.close()
        self._servers = []

    async def __aenter__(self) -> Self:
        if self._closed:
            raise _closed()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Client:
    """Client for programs without an event loop; any number of threads may use it.

    It also works in a process that was forked after the client was made.
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
        """Take the arguments of `AsyncClient`."""

        def connect() -> AsyncClient:
            return AsyncClient(
                server, model=model, api_key=api_key, timeout=timeout, patience=patience
            )

        client = connect()
        self.urls = client.urls
        self._connect = connect
        self._closed = False
        self._worker = _Worker(client)

    def flow(
        self,
        image1: Source | Frame,
        image2: Source | Frame,
        *,
        direction: Direction = "forward",
        max_edge: int | None = None,
    ) -> Result:
        """Compute the optical flow between two images of one size; see `AsyncClient.flow`.

        Raises:
            FlowError: an argument is invalid, or no server returns a flow.
        """
        return self._run(
            lambda client: client.flow(image1, image2, direction=direction, max_edge=max_edge)
        )

    def models(self) -> list[Model]:
        """List the models that a server has loaded.

        Raises:
            FlowError: no server answers.
        """
        return self._run(lambda client: client.models())

    def model(self) -> Model:
        """Describe the model that this client uses; see `AsyncClient.model`.

        Raises:
            FlowError: no server answers, or the one that does has not loaded the model.
        """
        return self._run(lambda client: client.model())

    def _run(self, call: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
        if self._closed:
            raise _closed()
        if self._worker.pid != os.getpid():  # threads do not survive a fork
            _inherited_workers.append(self._worker)
            self._worker = _Worker(self._connect())
        return self._worker.run(call)

    def close(self) -> None:
        """Close the connections; the client cannot be used any more."""
        if not self._closed:
            self._closed = True
            self._worker.stop()

    def __enter__(self) -> Self:
        if self._closed:
            raise _closed()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """A thread with an event loop, which ends when the worker is dropped."""

    def __init__(self, client: AsyncClient) -> None:
        self.pid = os.getpid()
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(
            target=_run_loop, args=(self._loop, client), name="flownet2 client", daemon=True
        )
        self._thread.start()
        self._stop_loop = weakref.finalize(self, _stop_loop, self._loop, self.pid)
        self._stop_loop.atexit = False

    def run(self, call: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
        """Run a call in the loop, and return its result."""
        with self._lock:
            if self._stopped:
                raise _closed()
            future = asyncio.run_coroutine_threadsafe(call(self._client), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise _closed() from error
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Cancel the calls under way, close the connections and end the thread."""
        if self.pid != os.getpid():
            return
        with self._lock:
            self._stopped = True
        self._stop_loop()
        self._thread.join()


_inherited_workers: list[_Worker] = []
"""Workers of a parent process, whose loop shares its file descriptors with the parent's."""


def _run_loop(loop: asyncio.AbstractEventLoop, client: AsyncClient) -> None:
    loop.run_forever()
    loop.run_until_complete(_end(client))
    loop.close()


async def _end(client: AsyncClient) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()
    await asyncio.get_running_loop().shutdown_default_executor()


def _stop_loop(loop: asyncio.AbstractEventLoop, pid: int) -> None:
    if pid == os.getpid():
        loop.call_soon_threadsafe(loop.stop)


def _checked(
    image1: Source | Frame, image2: Source | Frame, max_edge: int | None
) -> tuple[Frame, Frame]:
    """Return both images as frames of one size, reduced to `max_edge`."""
    frames = [
        _reduced(image if isinstance(image, Frame) else Frame(image, name), max_edge)
        for name, image in zip(IMAGE_INPUTS, (image1, image2), strict=True)
    ]
    sizes = [frame.size() for frame in frames]
    for name, size in zip(IMAGE_INPUTS, sizes, strict=True):
        if min(size) < MINIMUM_SIDE:
            raise FlowError(
                PROBLEM + "image-too-small",
                f"{name} is {_by(size)}: give images of at least {_by((MINIMUM_SIDE,) * 2)} pixels",
                name,
            )
    if sizes[0] != sizes[1]:
        raise FlowError(
            PROBLEM + "sizes-differ",
            f"the first image is {_by(sizes[0])} and the second {_by(sizes[1])}: "
            "give two images of one size",
            IMAGE_INPUTS[1],
        )
    return frames[0], frames[1]


def _reduced(frame: Frame, max_edge: int | None) -> Frame:
    if max_edge is None or max(frame.size()) <= max_edge:
        return frame
    return Frame(lambda: shrunk(frame.pixels(), max_edge))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        port, rest = parts.port, parts.path + parts.query
        kinds = {"http": True, "https": True, "grpc": port is not None and not rest}
        valid = bool(parts.hostname) and kinds.get(parts.scheme, False)
    except ValueError:  # a port that is not a number, or an unmatched bracket
        valid = False
    if not valid:
        raise _invalid(
            "server", f"{url!r} is not a server: give http://host:port or grpc://host:port"
        )
    return url


def _invalid(field: str, detail: str) -> FlowError:
    return FlowError(PROBLEM + "invalid-parameter", detail, field)


def _closed() -> FlowError:
    return FlowError(PROBLEM + "client-closed", "the client is closed: make a new one")
