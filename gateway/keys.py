"""API keys."""

import hashlib
import hmac
from pathlib import Path
from typing import Annotated

from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from gateway.errors import Unauthorized

_ASKED = "only where the operator has set `GATEWAY_API_KEYS_FILE`"
_bearer = HTTPBearer(auto_error=False, scheme_name="bearer", description=_ASKED)
_header = APIKeyHeader(name="X-API-Key", auto_error=False, scheme_name="header", description=_ASKED)


class KeyCheck:
    """A dependency that asks for one of the keys in a file: one a line, `#` begins a comment.

    Without a file it asks for none. Digests of one length are compared, each with all, so that the
    time tells nothing.

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
                    f"GATEWAY_API_KEYS_FILE: {file} holds no key; put one on each line"
                )

    async def __call__(
        self,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
        header: Annotated[str | None, Security(_header)],
    ) -> None:
        """Let a request with a key pass.

        Raises:
            Unauthorized: it has none, or another one.
        """
        if self._digests is None:
            return
        digest = _digest(bearer.credentials.strip() if bearer else header or "")
        if not any([hmac.compare_digest(digest, known) for known in self._digests]):
            raise Unauthorized(
                "Send a key that is known here, as `Authorization: Bearer KEY` or "
                "`X-API-Key: KEY`.",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
