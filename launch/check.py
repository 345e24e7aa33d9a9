"""`python -m launch.check`: whether the Triton of this machine serves, by an inference.

Exits with 0 where it does, and otherwise with 1 and a sentence: for the probes of containers.
Triton's own readiness does not notice that the process of its Python backend has died.
"""

import http.client
import json
import sys
import urllib.error
import urllib.request
from http import HTTPStatus
from typing import Any

from flownet2.contract import IMAGE_INPUTS, IMAGE_TYPE, MINIMUM_SIDE
from launch.errors import LaunchError
from launch.ports import host_from_environment, port_from_environment

TIMEOUT_SECONDS = 2.0

# What runs on this machine is asked without the proxy that the environment may name.
open_directly = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class Canary:
    """Small inferences that show whether a Triton's models serve."""

    def __init__(self, host: str, port: int) -> None:
        """Name the Triton's HTTP address."""
        self._url = url(host, port)
        self._successes: dict[str, int] = {}

    def fault(self) -> str | None:
        """What keeps a loaded model from serving; None where all serve, or are merely busy.

        A model that has answered others since the last call is not asked.

        Raises:
            OSError: Triton does not answer.
        """
        for model in self._ask("/v2/models/stats")[1]["model_stats"]:
            name, count = model["name"], int(model["inference_stats"]["success"]["count"])
            before, self._successes[name] = self._successes.get(name), count
            if before is not None and count > before:
                continue
            try:
                status, body = self._ask(f"/v2/models/{name}/infer", _REQUEST)
            except TimeoutError:  # behind others in the queue
                continue
            if status == HTTPStatus.INTERNAL_SERVER_ERROR:
                return f"Triton's model {name} fails: {body['error']}"
            self._successes[name] += status == HTTPStatus.OK
        return None

    def _ask(self, path: str, body: object = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        try:
            with open_directly(self._url + path, data, timeout=TIMEOUT_SECONDS) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
        except (http.client.HTTPException, ValueError) as error:  # it ended in the middle
            raise OSError(f"no response from Triton: {error}") from error


_SHAPE = [1, MINIMUM_SIDE, MINIMUM_SIDE, 3]
_REQUEST = {
    "inputs": [
        {"name": name, "datatype": IMAGE_TYPE, "shape": _SHAPE, "data": [0] * 3 * MINIMUM_SIDE**2}
        for name in IMAGE_INPUTS
    ],
    "parameters": {"timeout": int(TIMEOUT_SECONDS * 1e6)},  # in the queue, microseconds
}


def answers_ok(host: str, port: int, path: str) -> bool:
    """True when a GET of `path` is answered with status 200."""
    try:
        with open_directly(url(host, port) + path, timeout=TIMEOUT_SECONDS) as response:
            return bool(response.status == HTTPStatus.OK)
    except (OSError, http.client.HTTPException):  # urllib's own errors are OSErrors too
        return False


def url(host: str, port: int) -> str:
    """URL that reaches a server bound to `host` on this machine."""
    return f"http://{reachable(host)}:{port}"


def reachable(host: str) -> str:
    """An address that reaches a server bound to `host` (0.0.0.0 is no destination)."""
    return {"0.0.0.0": "127.0.0.1"}.get(host, host)  # noqa: S104


def main() -> int:
    """Check the Triton that HOST and TRITON_HTTP_PORT name."""
    try:
        host = host_from_environment("HOST", "127.0.0.1")
        fault = Canary(host, port_from_environment("TRITON_HTTP_PORT", 8000)).fault()
    except (LaunchError, OSError) as error:
        fault = str(error)
    if fault:
        print(fault, file=sys.stderr)
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
