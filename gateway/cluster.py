"""Discovery of all Tritons behind the gateway, and load balancing over them.

gRPC's own `dns:///` with `round_robin` does not suffice. It resolves a name again only after a
connection has failed, so a Triton that is added gets no requests. Its retries cannot tell a lost
connection from a full queue, which Triton reports as UNAVAILABLE too. Its health checks ask the
server, not the model.
"""

import asyncio
import contextlib
import itertools
import logging
import socket

from flownet2.formats import Flow
from flownet2.models import Model
from gateway.endpoint import Endpoint, EndpointLost
from gateway.errors import DeadlineExceeded, InferenceUnavailable, UnknownModel
from gateway.images import Pixels

log = logging.getLogger("gateway.cluster")

RESOLVE_SECONDS = 2.0
FIRST_CHECK_SECONDS = 5.0


class Cluster:
    """Round-robin load balancing over all Triton endpoints."""

    def __init__(self, hosts: list[str], default_model: str, metrics_port: int = 8002) -> None:
        """Set the endpoints.

        Args:
            hosts: `host:port` strings. A DNS name stands for all of its addresses, and is resolved
                again every few seconds.
            default_model: model of requests that name none.
            metrics_port: port of every Triton's metrics.

        Raises:
            ValueError: a string is not `host:port`.
        """
        self._default_model = default_model
        self._metrics_port = metrics_port
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
        """All endpoints, healthy or not."""
        return list(self._watches)

    async def start(self) -> None:
        """Start name resolution and health checks, and wait for the first check of every endpoint,
        so that a replacement process does not reject requests that it could serve."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_CHECK_SECONDS):
                await asyncio.gather(*(self._resolve(*host) for host in self._hosts))
                await asyncio.gather(*(endpoint.checked.wait() for endpoint in self.endpoints))
        self._resolvers = [asyncio.create_task(self._keep_resolving(*host)) for host in self._hosts]

    async def close(self) -> None:
        """Stop the health checks and close the connections."""
        for resolver in self._resolvers:
            resolver.cancel()
        for endpoint, watch in self._watches.items():
            watch.cancel()
            await endpoint.channel.close()
        self._watches.clear()

    async def _keep_resolving(self, host: str, port: int) -> None:
        """Resolve one name every few seconds until cancelled."""
        while True:
            await asyncio.sleep(RESOLVE_SECONDS)
            await self._resolve(host, port)

    async def _resolve(self, host: str, port: int) -> None:
        """Use the addresses of a name; keep the previous addresses if it does not resolve."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
            self._addresses[host, port] = {
                f"[{ip}]:{port}" if ":" in str(ip) else f"{ip}:{port}" for *_, (ip, *_) in found
            }
            self._use(set().union(*self._addresses.values()))
        except OSError as error:
            log.warning("%s does not resolve: %s", host, error)
        except Exception:  # a bug; try again
            log.exception("%s cannot be resolved", host)

    def _use(self, wanted: set[str]) -> None:
        """Check the endpoints at these addresses, and no others."""
        known = {endpoint.address: endpoint for endpoint in self._watches}
        for address in wanted - known.keys():
            endpoint = Endpoint(address, self._default_model, self._metrics_port)
            self._watches[endpoint] = asyncio.create_task(endpoint.watch())
        for address in known.keys() - wanted:
            # Its connection closes when the last request in flight has ended.
            self._watches.pop(known[address]).cancel()

    def models(self) -> dict[str, Model]:
        """Return the models that at least one endpoint serves, by name."""
        return {
            name: model for endpoint in self.endpoints for name, model in endpoint.models.items()
        }

    def require(self, model: str) -> Model:
        """Return a model that is served now.

        Raises:
            UnknownModel: others are served, but not this one, and it is not the default.
            InferenceUnavailable: no model is served, or the default is not, or this one is being
                checked after a failure.
        """
        models = self.models()
        if model in models:
            return models[model]
        unverified = any(model in endpoint.unverified for endpoint in self.endpoints)
        if models and not unverified and model != self._default_model:
            raise UnknownModel(
                f"The model {model[:40]!r} is not loaded. Loaded are {', '.join(sorted(models))}.",
                field="model",
            )
        raise InferenceUnavailable("No Triton serves the model at present. Try again later.")

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
        """Return the flows from image1 to image2; retry once on another endpoint if one fails.

        Args:
            model: name of the model.
            image1: first images, uint8 [N, height, width, 3].
            image2: second images, of the same shape.
            deadline: time on the event loop's clock when the client stops waiting.
            request_id: ID that Triton logs.
            headers: gRPC metadata, for tracing.

        Raises:
            InferenceUnavailable: no endpoint serves the model, or two failed.
            DeadlineExceeded, QueueFull, ImageTooLarge, ModelFailed: as Triton reports.
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
                endpoint.mark_unhealthy(model, str(error))
                lost.append(endpoint)
                log.warning(
                    "endpoint lost during a request: %s",
                    error,
                    extra={"endpoint": endpoint.address, "request_id": request_id},
                )
        raise InferenceUnavailable("No Triton serves the model at present. Try again later.")

    def _pick(self, model: str, lost: list[Endpoint]) -> Endpoint | None:
        healthy = [x for x in self.endpoints if model in x.models and x not in lost]
        return healthy[next(self._turn) % len(healthy)] if healthy else None
