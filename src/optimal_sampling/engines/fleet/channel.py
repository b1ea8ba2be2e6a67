"""Messages over a socket: each has its length before it.

The driver's end waits for nothing, so that a worker that hangs in the middle of a message holds up
nobody. The worker's end waits.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from optimal_sampling.engines.fleet.messages import Event, Order, decode, encode, event_of

__all__ = ["DriverEnd", "WorkerEnd"]

_LENGTH = 8  # bytes of a length
_CHUNK = 1 << 20


class DriverEnd:
    """Orders out, events in, without waiting."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.is_closed = False
        """The worker has closed its end."""
        self._received = bytearray()
        self._waiting = bytearray()
        sock.setblocking(False)

    @property
    def has_unsent(self) -> bool:
        """Bytes wait until the socket takes them."""
        return bool(self._waiting)

    def send(self, order: Order) -> None:
        """Send as much as the socket takes now, and the rest later."""
        self.send_bytes(encode(order))

    def send_bytes(self, data: bytes) -> None:
        """Send an order that is encoded already."""
        self._waiting += len(data).to_bytes(_LENGTH, "little") + data
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        try:
            while self._waiting:
                sent = self.socket.send(self._waiting)
                del self._waiting[:sent]
        except BlockingIOError:
            return
        except OSError:
            self._waiting.clear()  # the worker has died, which reading shows

    def receive(self) -> Iterator[Event]:
        """The events that have arrived whole."""
        return map(event_of, self.receive_bytes())

    def receive_bytes(self) -> Iterator[bytes]:
        """The same, encoded."""
        self._read()
        while len(self._received) >= _LENGTH:
            end = _LENGTH + int.from_bytes(self._received[:_LENGTH], "little")
            if len(self._received) < end:
                return
            data = bytes(memoryview(self._received)[_LENGTH:end])
            del self._received[:end]
            yield data

    def _read(self) -> None:
        try:
            while data := self.socket.recv(_CHUNK):
                self._received += data
            self.is_closed = True
        except BlockingIOError:
            return
        except OSError:
            self.is_closed = True

    def close(self) -> None:
        """Close the socket. Closing twice is safe."""
        with contextlib.suppress(OSError):
            self.socket.close()


class WorkerEnd:
    """Events out, from any thread; orders in. Raises OSError or EOFError where the driver died."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._lock = threading.Lock()

    def send(self, event: Event) -> None:
        """Send an event."""
        data = encode(event)
        with self._lock:
            self.socket.sendall(len(data).to_bytes(_LENGTH, "little") + data)

    def receive(self) -> Order:
        """The next order."""
        length = int.from_bytes(self._exactly(_LENGTH), "little")
        order: Order = decode(self._exactly(length))
        return order

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self.socket.recv(min(_CHUNK, count - len(data)))
            if not part:
                raise EOFError
            data += part
        return bytes(data)
