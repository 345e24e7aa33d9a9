"""All Tritons behind the gateway: which there are, and a flow from one of them.

Not by gRPC's own `dns:///` with `round_robin`: it looks a name up again only when a connection
fails, so a Triton that is added gets no work; its retries cannot tell a lost connection from a
full queue, which Triton reports as UNAVAILABLE too; its health checks ask the server, and not
whether the model answers.
"""

import asyncio
import contextlib
import itertools
import logging
import socket

from flownet2.formats import Flow
from gateway.endpoint import Endpoint, EndpointLost, Model
from gateway.errors import DeadlineExceeded, InferenceUnavailable, UnknownModel
from gateway.images import Pixels

log = logging.getLogger("gateway.cluster")

RESOLVE_SECONDS = 2.0
FIRST_LOOK_SECONDS = 5.0


class Cluster:
    """All endpoints, asked in turns."""

    def __init__(self, hosts: list[str], default_model: str) -> None:
        """Take `host:port` strings; names stand for all of their addresses, now and later."""
        self._default_model = default_model
        self._hosts = [self._split(host) for host in hosts]
        self._addresses: dict[tuple[str, int], set[str]] = {}
        self._watches: dict[Endpoint, asyncio.Task[None]] = {}
        self._turn = itertools.count()
        self._resolvers: list[asyncio.Task[None]] = []

    @staticmethod
    def _split(host: str) -> tuple[str, int]:
        name, separator, port = host.rpartition(":")
        try:
            name.encode("idna")  # as resolving it does; checks the lengths of its labels
            valid = bool(separator and name) and port.isdecimal() and 0 < int(port) < 2**16
        except UnicodeError:
            valid = False
        if not valid:
            raise ValueError(f"TRITON_ENDPOINTS: {host!r} is not host:port")
        return name.strip("[]"), int(port)

    @property
    def endpoints(self) -> list[Endpoint]:
        """The endpoints there are, serving or not."""
        return list(self._watches)

    async def start(self) -> None:
        """Begin to resolve names and to watch endpoints, and wait until each was asked once: a
        process that takes another's place should not refuse what it could have served."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LOOK_SECONDS):
                await asyncio.gather(*(self._resolve(*host) for host in self._hosts))
                await asyncio.gather(*(one.asked.wait() for one in self.endpoints))
        self._resolvers = [asyncio.create_task(self._keep_resolving(*host)) for host in self._hosts]

    async def close(self) -> None:
        """Stop watching and close the connections."""
        for resolver in self._resolvers:
            resolver.cancel()
        for endpoint, watch in self._watches.items():
            watch.cancel()
            await endpoint.channel.close()
        self._watches.clear()

    async def _keep_resolving(self, host: str, port: int) -> None:
        """Follow one name's addresses, for ever."""
        while True:
            await asyncio.sleep(RESOLVE_SECONDS)
            await self._resolve(host, port)

    async def _resolve(self, host: str, port: int) -> None:
        """Watch one name's addresses; while it does not resolve, those it had."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
            self._addresses[host, port] = {
                f"[{ip}]:{port}" if ":" in str(ip) else f"{ip}:{port}" for *_, (ip, *_) in found
            }
            self._follow(set().union(*self._addresses.values()))
        except OSError as error:
            log.warning("%s does not resolve: %s", host, error)
        except Exception:  # whatever it is, it may pass
            log.exception("%s cannot be followed", host)

    def _follow(self, wanted: set[str]) -> None:
        """Watch these addresses and no others."""
        known = {endpoint.address: endpoint for endpoint in self._watches}
        for address in wanted - known.keys():
            endpoint = Endpoint(address, self._default_model)
            self._watches[endpoint] = asyncio.create_task(endpoint.watch())
        for address in known.keys() - wanted:
            # Requests in flight still hold it; its connection closes with the last of them.
            self._watches.pop(known[address]).cancel()

    def models(self) -> dict[str, Model]:
        """Every model that some endpoint serves."""
        return {
            name: model for endpoint in self.endpoints for name, model in endpoint.models.items()
        }

    def require(self, model: str) -> Model:
        """The model, if it is served at the moment.

        Raises:
            UnknownModel: others are served, and it is not the default.
            InferenceUnavailable: nothing is served, or the default is not.
        """
        models = self.models()
        if model in models:
            return models[model]
        unproven = any(model in endpoint.unproven for endpoint in self.endpoints)
        if models and not unproven and model != self._default_model:
            raise UnknownModel(
                f"There is no model {model[:40]!r}; there are {', '.join(sorted(models))}.",
                field="model",
            )
        raise InferenceUnavailable("No Triton serves the model at the moment. Try again later.")

    async def infer(
        self,
        model: str,
        image1: Pixels,
        image2: Pixels,
        *,
        deadline: float,
        request_id: str,
        headers: dict[str, str],
    ) -> Flow:
        """The flows from image1 to image2, both uint8 [N, height, width, 3].

        An endpoint that is lost meanwhile costs one more attempt, at another one.

        Args:
            model: name of the model.
            deadline: time of the event loop's clock at which nobody waits for the flow any more.
            request_id: passed to Triton.
            headers: gRPC metadata, for tracing.

        Raises:
            InferenceUnavailable: no endpoint, or two were lost.
            DeadlineExceeded, QueueFull, ImageTooLarge, ModelFailed: as Triton said.
        """
        lost: list[Endpoint] = []
        for _ in range(2):
            endpoint = self._pick(model, lost)
            if endpoint is None:
                break
            timeout = deadline - asyncio.get_running_loop().time()
            if timeout <= 0:
                raise DeadlineExceeded("The flow was not ready before the request's deadline.")
            try:
                return await endpoint.infer(
                    model, image1, image2, timeout=timeout, request_id=request_id, headers=headers
                )
            except EndpointLost as error:
                endpoint.lose(str(error))
                endpoint.unproven.add(model)
                lost.append(endpoint)
                log.warning(
                    "endpoint lost during a request: %s",
                    error,
                    extra={"endpoint": endpoint.address, "request_id": request_id},
                )
        raise InferenceUnavailable("No Triton serves the model at the moment. Try again later.")

    def _pick(self, model: str, lost: list[Endpoint]) -> Endpoint | None:
        able = [one for one in self.endpoints if model in one.models and one not in lost]
        return able[next(self._turn) % len(able)] if able else None
