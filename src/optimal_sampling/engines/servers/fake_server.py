"""An HTTP server of a table of logits, in vLLM's dialect: for tests, and for trying the engine.

The logits of the next token are a row of the table, chosen by the last token, as in engines/toy.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any, Self

import numpy as np
from jaxtyping import Float64

from optimal_sampling.engines.servers.access import address_of
from optimal_sampling.engines.servers.vllm_api import MOST_CHOSEN_IDS

__all__ = ["FakeModel", "FakeServer", "random_tables"]

_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_LOWEST = -9999.0


class Refused(Exception):
    """A request that the server does not serve, and the status of its reply."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class FakeModel:
    """A table of logits, and the limits of the server that has it."""

    logits: Float64[np.ndarray, "rows rows"]
    """Row i holds the logits of the token after token i."""
    name: str = "fake"
    max_logprobs: int = 20
    """Most tokens of a list; -1: all."""
    context_length: int = 4096
    stop_ids: frozenset[int] = frozenset({0})
    tokenizer: Any = None
    """A tokenizer of Transformers; None: a letter per token."""
    api_key: str | None = field(default=None, repr=False)
    log_p: Float64[np.ndarray, "rows rows"] = field(init=False, repr=False)
    order: np.ndarray = field(init=False, repr=False)
    """Ids of every row, the likeliest first."""

    def __post_init__(self) -> None:
        logits = np.asarray(self.logits, np.float64)
        largest = logits.max(axis=-1, keepdims=True)
        with np.errstate(invalid="ignore"):  # rows of nothing but -inf are refused when asked for
            total = np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True))
            object.__setattr__(self, "log_p", logits - largest - total)
        object.__setattr__(self, "order", np.argsort(-self.log_p, axis=-1, kind="stable"))

    @property
    def rows(self) -> int:
        """Number of ids."""
        return len(self.log_p)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text."""
        if self.tokenizer is not None:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [byte % self.rows for byte in text.encode()]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        if self.tokenizer is not None:
            return str(self.tokenizer.decode(ids))
        return "".join(_ALPHABET[token % len(_ALPHABET)] for token in ids)

    def likeliest(self, last: int, k: int, *extra: int) -> dict[str, float]:
        """The list after a token, as vLLM writes it; k = -1: all ids."""
        row = self.log_p[last]
        if np.isnan(row).any():
            raise Refused("Out of range float values are not JSON compliant")
        ids = [*extra, *self.order[last][: None if k == -1 else k].tolist()]
        return {f"token_id:{token}": max(float(row[token]), _LOWEST) for token in ids}

    def draw(self, last: int, body: Mapping[str, Any], rng: np.random.Generator) -> int:
        """The next token, as a request wants it drawn."""
        row = self.log_p[last]
        if allowed := body.get("allowed_token_ids"):
            row = np.where(
                np.isin(np.arange(self.rows), allowed), np.maximum(row, _LOWEST), -np.inf
            )
        if temperature := body.get("temperature", 1.0):
            row = row / temperature + rng.gumbel(size=self.rows)
        return int(row.argmax())


def random_tables(
    size: int, seed: int = 0
) -> tuple[Float64[np.ndarray, "rows rows"], Float64[np.ndarray, "rows rows"]]:
    """Tables of normal logits, student and teacher: the teacher's are sharper and disturbed."""
    rng = np.random.default_rng(seed)
    student = rng.normal(size=(size, size))
    return student, 1.5 * student + rng.normal(size=(size, size))


class FakeServer:
    """A model at an address of this machine, while the `with` block lasts. Port 0: any free one."""

    def __init__(self, model: FakeModel, port: int = 0, host: str = "127.0.0.1") -> None:
        self.model = model
        self._http = _Listener((host, port), _Handler)
        self._http.model = model
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self.port = int(self._http.server_address[1])
        self.url = address_of(host, self.port)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server and cut its connections."""
        self._http.shutdown()
        self._http.cut()
        self._http.server_close()
        self._thread.join()


class _Listener(ThreadingHTTPServer):
    daemon_threads = False  # server_close waits for them, and they end with their connections
    request_queue_size = 512
    model: FakeModel

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error."""

    def cut(self) -> None:
        """Cut all connections."""
        for each in [*self._open]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet per reply
    server: _Listener

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged."""

    def do_GET(self) -> None:
        self._answer({"/health": dict, "/v1/models": self._models})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._body = self.rfile.read(length)
        self._answer(
            {
                "/v1/completions": lambda: _completion(self.server.model, self._json()),
                "/tokenize": lambda: {"tokens": self.server.model.tokenize(self._json()["prompt"])},
                "/detokenize": lambda: {
                    "prompt": self.server.model.detokenize(self._json()["tokens"])
                },
            }
        )

    def _models(self) -> dict[str, Any]:
        model = self.server.model
        card = {"id": model.name, "object": "model", "owned_by": "optimal-sampling"}
        return {"object": "list", "data": [{**card, "max_model_len": model.context_length}]}

    def _json(self) -> dict[str, Any]:
        try:
            body = json.loads(self._body)
        except ValueError as error:
            raise Refused(f"the body is no JSON: {error}") from error
        if body.get("model") not in (None, self.server.model.name):
            raise Refused(f"The model `{body['model']}` does not exist.", 404)
        return dict(body)

    def _answer(self, answers: Mapping[str, Any]) -> None:
        try:
            self._check_key()
            if self.path not in answers:
                raise Refused("Not Found", 404)
            status, reply = 200, answers[self.path]()
        except Refused as refused:
            status = refused.status
            reply = {"error": {"message": str(refused), "type": "BadRequestError", "code": status}}
        except Exception as error:  # of a request that has another form
            status, reply = 500, {"error": {"message": repr(error), "code": 500}}
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _check_key(self) -> None:
        key = self.server.model.api_key
        given = self.headers.get("Authorization")
        if key is not None and self.path.startswith("/v1") and given != f"Bearer {key}":
            raise Refused("Unauthorized", 401)


def _completion(model: FakeModel, body: Mapping[str, Any]) -> dict[str, Any]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        prompt = model.tokenize(prompt)
    if not isinstance(prompt, list) or not prompt:
        raise Refused("prompt must be token ids or a text, and not empty")
    prompts = prompt if isinstance(prompt[0], list) else [prompt]
    _check_logprobs(model, body)
    choices = [_choice(model, body, each) for each in prompts]
    for index, choice in enumerate(choices):
        choice["index"] = index
    usage = {"completion_tokens": sum(len(choice["token_ids"]) for choice in choices)}
    reply = {"object": "text_completion", "model": model.name, "choices": choices}
    return {**reply, "usage": usage}


def _check_logprobs(model: FakeModel, body: Mapping[str, Any]) -> None:
    """Raises Refused with vLLM's words for more log-probabilities than the server gives."""
    most = model.rows if model.max_logprobs == -1 else model.max_logprobs
    for name in ("logprobs", "prompt_logprobs"):
        asked = body.get(name) or 0
        asked = model.rows if asked == -1 else asked
        if asked > most and not body.get("logprob_token_ids"):
            raise Refused(
                f"Requested sample {name} of {asked}, which is greater than max allowed: {most}"
            )
    ids = body.get("logprob_token_ids") or []
    if len(ids) > MOST_CHOSEN_IDS:
        raise Refused(
            f"Requested logprob_token_ids of length {len(ids)}, which is greater than "
            f"max allowed: {MOST_CHOSEN_IDS}"
        )


def _choice(model: FakeModel, body: Mapping[str, Any], prompt: list[int]) -> dict[str, Any]:
    count = body.get("max_tokens", 16)
    if len(prompt) + count > model.context_length:
        raise Refused(
            f"This model's maximum context length is {model.context_length} tokens, and the "
            f"request has {len(prompt)} and wants {count} more"
        )
    if not all(isinstance(token, int) and 0 <= token < model.rows for token in prompt):
        raise Refused("prompt has token ids outside the vocabulary")
    tokens, reason = _drawn(model, body, prompt, count)
    whole = [*prompt, *tokens]
    k = body.get("logprobs")
    chosen = body.get("logprob_token_ids") or ()
    rows: list[dict[str, float] | None] = []
    if k is not None:
        for place in range(len(prompt), len(whole)):
            extra = (whole[place], *chosen)
            rows.append(model.likeliest(whole[place - 1], 0 if chosen else k, *extra))
    is_echo = bool(body.get("echo"))
    if is_echo:
        rows = [*_prompt_rows(model, prompt, k or 0), *rows]
    choice: dict[str, Any] = {
        "text": model.detokenize(tokens),
        "finish_reason": reason,
        "token_ids": tokens,
        "logprobs": None if k is None else {"top_logprobs": rows},
    }
    if (k := body.get("prompt_logprobs")) is not None:
        choice["prompt_logprobs"] = [
            row and {name[9:]: {"logprob": value} for name, value in row.items()}
            for row in _prompt_rows(model, prompt, k)
        ]
    return choice


def _prompt_rows(model: FakeModel, prompt: list[int], k: int) -> list[dict[str, float] | None]:
    return [None, *(model.likeliest(last, k, token) for last, token in pairwise(prompt))]


def _drawn(
    model: FakeModel, body: Mapping[str, Any], prompt: list[int], count: int
) -> tuple[list[int], str]:
    rng = np.random.default_rng(body.get("seed"))
    tokens: list[int] = []
    while len(tokens) < count:
        last = tokens[-1] if tokens else prompt[-1]
        if math.isnan(model.log_p[last][0]):
            raise Refused("Out of range float values are not JSON compliant")
        tokens.append(model.draw(last, body, rng))
        if tokens[-1] in model.stop_ids:
            return tokens, "stop"
    return tokens, "length"
