"""The HTTP clients of a model's servers: one pool, a client per request in flight.

httpcore looks at every connection of a client for every request, so that a client with many
connections is slow (1.0 ms of CPU per request with one, 2.4 ms with 64). Each client here has one.
"""

from __future__ import annotations

import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from optimal_sampling.errors import ConfigError, EngineError, MissingDependencyError

if TYPE_CHECKING:
    import httpx

__all__ = ["KEEP_ALIVE", "ClientPool"]

KEEP_ALIVE = 4.0
"""Seconds after which an idle connection is not used again. vLLM's server closes it after 5."""
_CONNECT = 10.0


class ClientPool:
    """Clients by address; the one that was used last is used next. Opened on use.

    Raises MissingDependencyError where httpx is not installed.
    """

    def __init__(self, keep_alive: float = KEEP_ALIVE) -> None:
        try:
            import httpx  # noqa: F401
            import tenacity  # noqa: F401 - replicas.py needs it
        except ImportError as error:
            raise MissingDependencyError(
                f"servers are asked with httpx and tenacity, and {error.name} is not installed: "
                "pip install '.[servers]' in the project's folder, or pip install httpx tenacity"
            ) from error
        if find_spec("sniffio") is None:  # httpcore tries to import it 14 times per request
            sys.modules.setdefault("sniffio", None)  # type: ignore[arg-type]
        self._keep_alive = keep_alive
        self._certificates = _certificates()
        self._free: dict[str, list[httpx.AsyncClient]] = {}
        self._all: list[httpx.AsyncClient] = []
        self._is_closed = False

    @asynccontextmanager
    async def client(self, url: str) -> AsyncIterator[httpx.AsyncClient]:
        """A client that nobody else uses, for a server.

        After a request that was given up or failed it is closed: httpcore may still count its
        connection as in use, and the next request would wait for it. Raises EngineError.
        """
        self.check_open()
        free = self._free.setdefault(url, [])
        client = free.pop() if free else self._open(url)
        try:
            yield client
        except BaseException:
            self._all.remove(client)
            await client.aclose()
            raise
        free.append(client)

    def check_open(self) -> None:
        """Raises EngineError after `aclose`."""
        if self._is_closed:
            raise EngineError("the connections to the servers were closed")

    async def aclose(self) -> None:
        """Close all connections. Requests in flight fail, and later ones are refused."""
        self._is_closed = True
        for client in [*self._all]:
            await client.aclose()

    def _open(self, url: str) -> httpx.AsyncClient:
        import httpx

        # a proxy of the environment leads to other machines
        is_local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        try:
            client = httpx.AsyncClient(
                verify=self._certificates,
                timeout=httpx.Timeout(None, connect=_CONNECT),
                limits=httpx.Limits(max_connections=1, keepalive_expiry=self._keep_alive),
                trust_env=not is_local,
            )
        except (ImportError, ValueError) as error:  # SOCKS without its package, or no proxy
            raise ConfigError(
                f"the proxy of the environment (HTTPS_PROXY, HTTP_PROXY or ALL_PROXY) cannot be "
                f"used: {error}; NO_PROXY={urlsplit(url).hostname} goes without it"
            ) from error
        self._all.append(client)
        return client


def _certificates() -> ssl.SSLContext:
    """The certificates that servers' are checked with. Raises ConfigError."""
    import httpx

    try:
        return httpx.create_ssl_context()
    except OSError as error:
        raise ConfigError(
            f"cannot read the certificates that SSL_CERT_FILE or SSL_CERT_DIR names: {error}"
        ) from error
