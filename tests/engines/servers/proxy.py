"""A proxy in front of a server that breaks replies: every fault by name, or a share at random.

Which request meets which fault is a function of the seed, the request's body and how often that
body was seen before; not of the order of arrival.
"""

import contextlib
import hashlib
import http.client
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = (
    "reset",
    "idle_cut",
    "rate_limited",
    "server_error",
    "unavailable",
    "stall",
    "slow",
    "truncated",
    "malformed",
    "missing_field",
    "nan",
    "wrong_length",
    "duplicated_id",
    "wrong_model",
)


class Proxy:
    """Passes requests on to `url`. Only completions are broken, and only while `rate` says so."""

    def __init__(self, url, faults=FAULTS, rate=0.0, seed=0, retry_after="0", stall=3.0):
        self.target = urlsplit(url).netloc
        self.faults = tuple(faults)
        self.rate = rate
        self.seed = seed
        self.retry_after = retry_after
        self.stall = stall  # seconds, longer than the deadline of the client
        self.made = Counter()  # faults by name
        self.passed = Counter()  # whole replies by body
        self.seen = Counter()
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.cut()
        self._server.server_close()
        self._thread.join()

    def fault_of(self, body):
        """The fault of the next request with a body; None: none."""
        with self.lock:
            number = self.seen[body]
            self.seen[body] += 1
        digest = hashlib.blake2b(b"%d %d " % (self.seed, number) + body, digest_size=8).digest()
        rng = random.Random(digest)
        return rng.choice(self.faults) if rng.random() < self.rate else None

    def count(self, name):
        with self.lock:
            self.made[name] += 1


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close waits for them
    request_queue_size = 512

    def __init__(self, *args):
        super().__init__(*args)
        self.connections = set()

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def cut(self):
        for each in self.connections:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        pass  # the client gave up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self):
        super().setup()
        self.upstream = http.client.HTTPConnection(self.server.proxy.target, timeout=60)
        self.replies = 0

    def finish(self):
        self.upstream.close()
        with contextlib.suppress(OSError):  # the client gave up
            super().finish()

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send(*self.forward("GET", b""))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        proxy = self.server.proxy
        fault = proxy.fault_of(body) if self.path == "/v1/completions" else None
        if fault == "idle_cut" and not self.replies:
            fault = None  # the connection is new
        status, content = (0, b"") if fault == "reset" else self.forward("POST", body)
        if fault is None or status not in (0, 200):
            with proxy.lock:
                proxy.passed[body] += status == 200
            self.send(status, content)
            return
        proxy.count(fault)
        getattr(self, fault)(content)

    def forward(self, method, body):
        headers = {"Content-Type": "application/json"}
        if "Authorization" in self.headers:
            headers["Authorization"] = self.headers["Authorization"]
        self.upstream.request(method, self.path, body or None, headers)
        reply = self.upstream.getresponse()
        return reply.status, reply.read()

    def send(self, status, content, length=None, **headers):
        self.replies += 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def drop(self, *, abruptly):
        self.close_connection = True
        if abruptly:  # RST in place of FIN
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        else:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def change(self, content, change):
        reply = json.loads(content)
        change(reply)
        self.send(200, json.dumps(reply).encode())

    def reset(self, content):
        self.drop(abruptly=True)

    def idle_cut(self, content):
        self.drop(abruptly=False)

    def rate_limited(self, content):
        self.send(
            429, b'{"error": {"message": "slow down"}}', Retry_After=self.server.proxy.retry_after
        )

    def server_error(self, content):
        self.send(500, b"Internal Server Error")

    def forbidden(self, content):
        self.send(403, b'{"error": {"message": "not this text"}}')

    def unavailable(self, content):
        self.send(503, b"")

    def stall(self, content):
        time.sleep(self.server.proxy.stall)
        self.drop(abruptly=False)

    def slow(self, content):
        self.send(200, content[:1], length=len(content))
        for start in range(1, len(content), 64):
            time.sleep(self.server.proxy.stall * 64 / len(content))
            self.wfile.write(content[start : start + 64])
            self.wfile.flush()

    def truncated(self, content):
        self.send(200, content[: len(content) // 2], length=len(content))
        self.drop(abruptly=False)

    def malformed(self, content):
        self.send(200, content[: len(content) // 2])

    def missing_field(self, content):
        self.change(content, lambda reply: reply["choices"][-1].pop("logprobs"))

    def nan(self, content):
        def change(reply):
            row = reply["choices"][-1]["logprobs"]["top_logprobs"][-1]
            row[next(iter(row))] = float("nan")

        self.change(content, change)

    def wrong_length(self, content):
        self.change(content, lambda reply: reply["choices"][-1]["logprobs"]["top_logprobs"].pop())

    def duplicated_id(self, content):
        text = content.decode()
        place = text.index('"token_id:')
        entry = text[place : text.index(",", place)].rstrip("}")
        self.send(200, f"{text[:place]}{entry}, {text[place:]}".encode())

    def wrong_model(self, content):
        self.change(content, lambda reply: reply.update(model="another"))
