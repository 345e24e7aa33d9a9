"""`python -m launch.check`: health check of this machine's Triton, by an inference.

Exits with status 0 if every loaded model returns a flow, otherwise with 1 and a message. The
containers use it as their probe, because Triton's own readiness stays true when its Python backend
has crashed.
"""

import http.client
import json
import sys
import urllib.error
import urllib.request
from http import HTTPStatus
from typing import Any

from flownet2.contract import FLOW_OUTPUT, IMAGE_TYPE
from flownet2.triton import health_check
from launch.errors import LaunchError
from launch.ports import bracketed, host_from_environment, port_from_environment, reachable

TIMEOUT_SECONDS = 2.0

# Ignore the environment's proxies: the servers run on this machine.
open_directly = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class HealthCheck:
    """Health checks of all models that a Triton has loaded."""

    def __init__(self, host: str, port: int) -> None:
        """Set the Triton's HTTP address."""
        self._url = url(host, port)
        self._successes: dict[str, int] = {}

    def fault(self) -> str | None:
        """Return what is wrong with a loaded model, or None if all serve or are merely busy.

        A model that has computed a flow since the last call is not checked.

        Raises:
            OSError: Triton does not answer.
        """
        statistics = self._request("/v2/models/stats").get("model_stats", [])
        for model in statistics:
            name, count = model["name"], int(model["inference_stats"]["success"]["count"])
            before, self._successes[name] = self._successes.get(name), count
            if before is not None and count > before:
                continue
            try:
                self._infer(name)
            except TimeoutError:  # busy: queued behind other requests
                continue
            except urllib.error.HTTPError as error:
                with error:
                    if error.code == HTTPStatus.INTERNAL_SERVER_ERROR:
                        return f"Triton's model {name} fails: {reason(error)}"
            else:
                self._successes[name] += 1
        return None

    def _infer(self, model: str) -> None:
        groups = self._request(f"/v2/models/{model}/config").get("instance_group", [])
        images = health_check(gpu=any(group.get("kind") == "KIND_GPU" for group in groups))
        head = json.dumps(
            {
                "inputs": [
                    {
                        "name": name,
                        "datatype": IMAGE_TYPE,
                        "shape": image.shape,
                        "parameters": {"binary_data_size": image.nbytes},
                    }
                    for name, image in images.items()
                ],
                "outputs": [{"name": FLOW_OUTPUT, "parameters": {"binary_data": True}}],
                "parameters": {"timeout": int(TIMEOUT_SECONDS * 1e6)},  # queue limit, microseconds
            }
        ).encode()
        body = b"".join([head, *(image.tobytes() for image in images.values())])
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(head)),
        }
        self._open(f"/v2/models/{model}/infer", body, headers)

    def _request(self, path: str) -> dict[str, Any]:
        try:
            found = json.loads(self._open(path))
        except urllib.error.HTTPError as error:
            with error:
                raise OSError(f"Triton answers {path} with {error.code}: {reason(error)}") from None
        except ValueError as error:
            raise OSError(f"Triton's answer to {path} is not JSON") from error
        return found if isinstance(found, dict) else {}

    def _open(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> bytes:
        request = urllib.request.Request(self._url + path, body, headers or {})  # noqa: S310
        try:
            with open_directly(request, timeout=TIMEOUT_SECONDS) as response:
                content: bytes = response.read()
                return content
        except http.client.HTTPException as error:  # the connection was closed within the response
            raise OSError(f"no answer from Triton: {error!r}") from error


def reason(error: urllib.error.HTTPError) -> str:
    """Return the message in Triton's error response; the body may have any form."""
    try:
        body = error.read().decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return str(error)
    try:
        return without_stack(str(json.loads(body)["error"]))
    except (ValueError, LookupError, TypeError):  # from a proxy, or cut off
        return body[:200] or str(error)


def without_stack(message: str) -> str:
    """Return Triton's message without the Python stack that the Python backend adds."""
    return message.partition("\n\nAt:")[0]


def answers_ok(host: str, port: int, path: str) -> bool:
    """Return True if a GET of `path` is answered with status 200."""
    try:
        with open_directly(url(host, port) + path, timeout=TIMEOUT_SECONDS) as response:
            return bool(response.status == HTTPStatus.OK)
    except (OSError, http.client.HTTPException):  # urllib's own errors are OSErrors too
        return False


def url(host: str, port: int) -> str:
    """Return the URL of a server on this machine that is bound to `host`."""
    return f"http://{bracketed(reachable(host))}:{port}"


def main() -> int:
    """Check the Triton that HOST and TRITON_HTTP_PORT name."""
    try:
        host = host_from_environment()
        fault = HealthCheck(host, port_from_environment("TRITON_HTTP_PORT", 8000)).fault()
    except (LaunchError, OSError) as error:
        fault = str(error)
    if fault:
        print(fault, file=sys.stderr)
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
