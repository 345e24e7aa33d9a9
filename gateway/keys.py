"""API keys."""

import hashlib
import hmac
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from gateway.errors import Unauthorized

_NEEDED = "needed only if the operator has set `GATEWAY_API_KEYS_FILE`"
_bearer = HTTPBearer(auto_error=False, scheme_name="bearer", description=_NEEDED)
_header = APIKeyHeader(
    name="X-API-Key", auto_error=False, scheme_name="header", description=_NEEDED
)


class ApiKeys:
    """The API keys of a file, one per line; a line that starts with `#` is a comment.

    Digests of equal length are compared with every key, so that the time reveals nothing.

    Args:
        file: the file, or None to require no key.

    Raises:
        ValueError: the file holds no key.
    """

    def __init__(self, file: Path | None) -> None:
        self._digests: list[bytes] | None = None
        if file:
            lines = (line.strip() for line in file.read_text().splitlines())
            self._digests = [_digest(line) for line in lines if line and not line.startswith("#")]
            if not self._digests:
                raise ValueError(
                    f"GATEWAY_API_KEYS_FILE: {file} holds no key; write one on each line"
                )

    def accept(self, key: str) -> bool:
        """Return True if the key is one of the file's, or if there is no file."""
        if self._digests is None:
            return True
        digest = _digest(key)
        return any([hmac.compare_digest(digest, known) for known in self._digests])


async def has_key(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    header: Annotated[str | None, Security(_header)],
) -> bool:
    """Return True if a request has a valid key or needs none; a dependency of endpoints."""
    keys: ApiKeys = request.app.state.gateway.keys
    return keys.accept(bearer.credentials.strip() if bearer else header or "")


async def require_key(accepted: Annotated[bool, Depends(has_key)]) -> None:
    """Reject a request without a valid key; a dependency of endpoints.

    Raises:
        Unauthorized: the key is missing or wrong.
    """
    if not accepted:
        raise Unauthorized(
            "Send a valid API key, as `Authorization: Bearer KEY` or `X-API-Key: KEY`.",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
