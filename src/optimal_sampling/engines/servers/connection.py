"""One server over HTTP: single attempts within a deadline, and what kind of failure each was."""

from __future__ import annotations

import asyncio
import json
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from optimal_sampling.engines.servers.access import Access
from optimal_sampling.engines.servers.dialect import Call
from optimal_sampling.engines.servers.limit import AdaptiveLimit
from optimal_sampling.engines.servers.pool import KEEP_ALIVE, ClientPool
from optimal_sampling.engines.servers.replies import BadReply, FailureKind, decoded, shown
from optimal_sampling.engines.servers.statistics import ServerStatistics
from optimal_sampling.errors import ConfigError, UserError

if TYPE_CHECKING:
    import httpx

__all__ = ["AttemptFailed", "Connection"]

T = TypeVar("T")

_MOST_IDLE_CUTS = 5
"""In a row; a server that closes more connections is failing."""

_SURELY_KEPT = 0.9 * KEEP_ALIVE
"""Seconds after which an idle connection is still used, unless the server has closed it."""

_FINAL: frozenset[FailureKind] = frozenset(
    {"tls", "redirected", "unauthorized", "not_found", "rejected"}
)
"""What a further attempt cannot change."""
_OF_SERVER: frozenset[FailureKind] = frozenset(
    {"tls", "redirected", "unauthorized", "not_found", "wrong_model"}
)
"""What all requests to the same server meet, if it is not of the one request."""
_DOWN: frozenset[FailureKind] = frozenset({"refused", "reset", "timeout", "unavailable"})
"""What other requests to the same server would meet too, for a while."""
_LOST_SIGHT: frozenset[FailureKind] = frozenset({"refused", "reset", "truncated", "unavailable"})
"""After which the server may be another process."""
_BAD_REPLY: frozenset[FailureKind] = frozenset(
    {"server_error", "truncated", "malformed", "invalid", "wrong_model"}
)
"""What another attempt may well be answered without."""
_OVERLOAD: frozenset[FailureKind] = frozenset({"timeout", "rate_limited", "unavailable"})
_OF_STATUS: dict[int, FailureKind] = {
    **dict.fromkeys((301, 302, 303, 307, 308), "redirected"),
    401: "unauthorized",
    402: "unauthorized",
    403: "unauthorized",
    404: "not_found",
    408: "timeout",
    425: "unavailable",
    429: "rate_limited",
    502: "unavailable",
    503: "unavailable",
    504: "timeout",
}
_FULL = "Context size has been exceeded"
"""What llama.cpp's server says where its slots share a cache, which is too small for the texts that
are in it at the moment."""


class AttemptFailed(Exception):
    """One attempt of a request failed."""

    def __init__(
        self, url: str, kind: FailureKind, reason: str, retry_after: float | None = None
    ) -> None:
        super().__init__(f"{url}: {kind}: {reason}")
        self.url = url
        self.kind = kind
        self.reason = reason
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""
        self.of_server = False
        """Whether the server was found to fail every request likewise."""

    @property
    def is_final(self) -> bool:
        """Whether a further attempt would fail likewise. One that the server fails for all may
        not: a key or a model is put right, or another server is asked."""
        return self.kind in _FINAL and not self.of_server

    @property
    def may_be_of_server(self) -> bool:
        """Whether the server may fail every request likewise."""
        return self.kind in _OF_SERVER

    @property
    def is_bad_reply(self) -> bool:
        """Whether a reply came, and cannot be used."""
        return self.kind in _BAD_REPLY

    @property
    def is_lost_sight(self) -> bool:
        """Whether what answers next may be another process."""
        return self.kind in _LOST_SIGHT

    @property
    def is_down(self) -> bool:
        """Whether the server cannot be used at the moment."""
        return self.kind in _DOWN

    @property
    def may_take_long(self) -> bool:
        """Whether it may pass with time alone, such as that of a restart."""
        return self.is_down or self.kind == "rate_limited"


class _Trace:
    """What happened to a request on its way, as httpcore tells it."""

    def __init__(self, on_connect: Callable[[], None]) -> None:
        self.connected = False
        self.answered = False
        self._on_connect = on_connect

    async def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.started":
            self.connected = True
            self._on_connect()
        self.answered |= event.endswith("receive_response_headers.complete")

    @property
    def is_idle_cut(self) -> bool:
        """An idle connection was used, and was closed before the first byte of a reply."""
        return not self.connected and not self.answered


class Connection:
    """A server, its limit of requests in flight, and its address. Cancelling closes the socket."""

    def __init__(
        self, url: str, pool: ClientPool, access: Access, statistics: ServerStatistics
    ) -> None:
        self.url = url
        self.limit = AdaptiveLimit(most=access.most_in_flight)
        self.answered = 0
        self.on_open: Callable[[bool], None] = _nothing
        """Called when a connection is opened; True: in place of an idle one that the server has
        closed."""
        self._kept_until: weakref.WeakKeyDictionary[httpx.AsyncClient, float]
        self._kept_until = weakref.WeakKeyDictionary()
        self._pool = pool
        self._deadline = access.deadline
        self._key = access.key
        self._statistics = statistics

    async def attempt(self, call: Call[T], *, is_counted: bool = True) -> T:
        """The reply to one request, in one attempt. Raises AttemptFailed.

        `is_counted`: whether the statistics count it where it is answered.
        """
        async with self.limit:
            started = time.monotonic()
            try:
                async with self._pool.client(self.url) as client:
                    answer = self._read(call, await self._sent(call, client))
            except AttemptFailed as failure:
                self._statistics.errors[failure.kind] += 1
                if failure.kind in _OVERLOAD:
                    self.limit.overloaded(started)
                raise
            if is_counted:
                self._statistics.answered(time.monotonic() - started)
            self.answered += 1
            self.limit.answered()
            return answer

    async def _sent(self, call: Call[Any], client: httpx.AsyncClient) -> httpx.Response:
        """The whole reply. An idle connection that the server has closed costs no attempt."""
        import httpx

        for cuts in range(_MOST_IDLE_CUTS + 1):
            # httpcore opens a connection anew without a word, where it sees the end of an idle one
            was_kept = time.monotonic() < self._kept_until.get(client, 0.0)
            trace = _Trace(partial(self.on_open, was_kept))
            request = self._request(call, client, trace)
            try:
                async with asyncio.timeout(self._deadline):
                    reply = await client.send(request)
                is_kept = reply.headers.get("Connection", "").lower() != "close"
                self._kept_until[client] = time.monotonic() + _SURELY_KEPT if is_kept else 0.0
                return reply
            except TimeoutError as error:
                reason = f"no whole reply within {self._deadline:g} s"
                raise self._failed("timeout", reason) from error
            except (httpx.RequestError, RuntimeError) as error:
                self._pool.check_open()
                if not isinstance(error, httpx.RequestError):
                    raise
                if trace.is_idle_cut and cuts < _MOST_IDLE_CUTS:
                    self._statistics.idle_cuts += 1
                    continue
                kind = _kind_of(error, trace)
                raise self._failed(kind, str(error) or type(error).__name__) from error
        raise AssertionError("the last cut raises")

    def _request(self, call: Call[Any], client: httpx.AsyncClient, trace: _Trace) -> httpx.Request:
        import httpx

        headers = {"Accept-Encoding": "identity"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key.reveal()}"
        content = None
        if call.body is not None:
            content = json.dumps(call.body, separators=(",", ":")).encode()
            headers["Content-Type"] = "application/json"
        method = "GET" if call.body is None else "POST"
        given: dict[str, Any] = {"content": content, "headers": headers}
        try:
            return client.build_request(
                method, self.url + call.path, extensions={"trace": trace}, **given
            )
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ConfigError(f"{self.url!r} is no address of a server: {error}") from error

    def _read(self, call: Call[T], reply: httpx.Response) -> T:
        if reply.status_code != 200:
            kind = _OF_STATUS.get(reply.status_code)
            default: FailureKind = "server_error" if reply.status_code >= 500 else "rejected"
            text = _error_text(reply)
            if default == "server_error" and _FULL in text:
                kind = "rate_limited"
            raise self._failed(
                kind or default,
                f"status {reply.status_code} of {call.path}: {text}",
                _retry_after(reply.headers.get("Retry-After", "")),
            )
        try:
            return call.read(decoded(reply.content))
        except BadReply as error:
            raise self._failed(error.kind, f"{call.path}: {error}") from error
        except UserError as error:
            raise type(error)(self._without_key(str(error))) from None
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            reason = f"{call.path}: {type(error).__name__}: {error}"
            raise self._failed("invalid", reason) from error

    def _without_key(self, text: str) -> str:
        return self._key.hidden_in(text) if self._key else text

    def _failed(
        self, kind: FailureKind, reason: str, retry_after: float | None = None
    ) -> AttemptFailed:
        return AttemptFailed(self.url, kind, self._without_key(reason), retry_after)


def _nothing(was_closed: bool) -> None:
    """Nobody asked."""


def _kind_of(error: httpx.RequestError, trace: _Trace) -> FailureKind:
    import httpx

    if isinstance(error, httpx.ConnectTimeout):
        return "timeout"
    if isinstance(error, httpx.ConnectError):
        return "tls" if "SSL" in str(error) or "certificate" in str(error) else "refused"
    return "truncated" if trace.answered else "reset"


def _error_text(reply: httpx.Response) -> str:
    """The server's own words, of vLLM's and OpenAI's form of errors or another, in one line."""
    if location := reply.headers.get("Location"):
        return f"it leads to {shown(location)}, which is not followed; give that address"
    try:
        error = json.loads(reply.content)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        text = reply.content.decode(errors="replace")
    printable = "".join(each if each.isprintable() else " " for each in text)
    return shown(" ".join(printable.split())) or "no reason given"


def _retry_after(value: str) -> float | None:
    """Seconds of a header `Retry-After`: a number or a date."""
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
