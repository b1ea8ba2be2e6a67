"""Messages between a fleet's driver and its workers, and their form as bytes.

A line of JSON; after it, for a completion, the numbers of its tokens as they are in memory. Floats
arrive with the same bits. No pickle.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, TypeAlias

from optimal_sampling.config import Checked, EngineOptions, MixtureConfig, ModelConfig
from optimal_sampling.types import ByteLevel, Completion, FinishReason, Mode, Request, TokenTrace

__all__ = [
    "Begin",
    "Broken",
    "Event",
    "Finished",
    "Order",
    "Progress",
    "Ready",
    "Run",
    "Setup",
    "Started",
    "Submit",
    "decode",
    "encode",
]


@dataclass(frozen=True)
class Run:
    """One call of `generate`: the settings of the worker's view of its engine."""

    number: int
    mixture: MixtureConfig
    mode: Mode
    options: EngineOptions
    capture: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setup:
    """Driver to worker, first: what to load."""

    models: ModelConfig
    mixture: MixtureConfig
    options: EngineOptions
    mode: Mode
    version: str
    """Of this package, in the driver."""
    memory: int | None = None
    """Bytes of the host's memory that this worker may fill; None: it is alone, or on a GPU."""
    sharing: int = 1
    """Workers that a given budget of caches is divided among."""


@dataclass(frozen=True)
class Begin:
    """Driver to worker: give up the run before, and serve requests of this one."""

    run: Run


@dataclass(frozen=True)
class Submit:
    """Driver to worker: requests of a run, each with its number in this driver."""

    run: int
    requests: tuple[tuple[int, Request], ...]


@dataclass(frozen=True)
class Ready:
    """The engine is loaded."""

    capacity: int
    """Most requests that the engine runs at once."""
    vocab_size: int
    stop_ids: tuple[int, ...]
    modes: tuple[Mode, ...]
    captures: tuple[str, ...]
    counts_rounds: bool
    """Rounds show that the engine goes on; where it counts none, only its completions do."""
    notes: Mapping[str, str]


@dataclass(frozen=True)
class Started:
    """The engine has taken a request: from now on it may be why the worker dies."""

    run: int
    number: int


@dataclass(frozen=True)
class Progress:
    """A sign of life."""

    run: int
    rounds: int
    """Rounds of the engine in this run so far."""


@dataclass(frozen=True)
class Finished:
    """The completion of a request by its number; the driver has the request itself."""

    run: int
    number: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    trace: TokenTrace
    error: str = ""
    seconds: float = 0.0
    captured: Mapping[str, Any] = field(default_factory=dict)
    """Tensors by name."""
    byte_level: ByteLevel | None = None

    @classmethod
    def of(cls, run: int, number: int, completion: Completion) -> Finished:
        """The message of a completion."""
        return cls(
            run,
            number,
            completion.token_ids,
            completion.finish_reason,
            completion.trace,
            completion.error,
            completion.seconds,
            completion.captured,
            completion.byte_level,
        )

    def completion(self, request: Request) -> Completion:
        """The completion of the request with this number."""
        return Completion(
            request,
            self.token_ids,
            self.finish_reason,
            self.trace,
            self.error,
            self.seconds,
            self.captured,
            self.byte_level,
        )


@dataclass(frozen=True)
class Broken:
    """The worker cannot go on, and ends."""

    cause: str
    kind: str = ""
    """Class of the error, where the user has to change something: trying again cannot help."""


Order: TypeAlias = Setup | Begin | Submit
Event: TypeAlias = Ready | Started | Progress | Finished | Broken

_KINDS = {
    each.__name__: each
    for each in (Setup, Begin, Submit, Ready, Started, Progress, Finished, Broken)
}


def encode(message: Order | Event) -> bytes:
    """A message as bytes."""
    values, tail = dict(vars(message)), b""
    if isinstance(message, Finished):
        values["trace"], values["captured"], tail = _packed(message)
    kind = type(message).__name__
    return json.dumps([kind, values], default=_plain).encode() + b"\n" + tail


def decode(data: bytes) -> Any:
    """The message that `encode` made these bytes of."""
    header, _, tail = data.partition(b"\n")
    kind, values = json.loads(header, object_hook=_from_plain)
    if kind == "Finished":
        values["trace"], values["captured"] = _unpacked(values, tail)
    if kind == "Submit":
        values["requests"] = [tuple(pair) for pair in values["requests"]]
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return _KINDS[kind](**values | lists)


def _plain(value: Any) -> Any:
    """What JSON lacks, as what it has: requests, runs, and options with the name of their class."""
    if isinstance(value, Request):
        ids = [list(value.student_prompt_ids), list(value.teacher_prompt_ids)]
        if ids[0] == ids[1]:
            ids = ids[:1]
        fields = [value.id, value.sample_index, value.seed, value.max_new_tokens]
        return {"request": [*fields, *ids]}
    if isinstance(value, Checked | Run):
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"class": name, "values": vars(value)}
    if isinstance(value, ByteLevel):
        return {"byte_level": {**asdict(value), "trace": dict(value.trace.columns)}}
    raise TypeError(f"{type(value).__name__} has no place in a message")


def _from_plain(value: dict[str, Any]) -> Any:
    if value.keys() == {"request"}:
        name, sample, seed, most, *ids = value["request"]
        return Request(name, sample, seed, tuple(ids[0]), tuple(ids[-1]), most)
    if value.keys() == {"byte_level"}:
        columns = value["byte_level"]["trace"].items()
        trace = TokenTrace({name: tuple(column) for name, column in columns})
        return ByteLevel(**{**value["byte_level"], "trace": trace})
    if value.keys() == {"class", "values"}:
        module, _, name = value["class"].partition(":")
        lists = {key: tuple(x) for key, x in value["values"].items() if isinstance(x, list)}
        return getattr(import_module(module), name)(**value["values"] | lists)
    return value


def _packed(message: Finished) -> tuple[list[str], dict[str, Any], bytes]:
    """Names of the trace, dtypes and shapes of what was captured, and all their numbers."""
    columns = message.trace.columns
    parts = [array("d", column).tobytes() for column in columns.values()]
    shapes: dict[str, Any] = {}
    for name, tensor in message.captured.items():
        values = tensor.numpy()
        shapes[name] = {"dtype": str(values.dtype), "shape": list(values.shape)}
        parts.append(values.tobytes())
    return list(columns), shapes, b"".join(parts)


def _unpacked(values: dict[str, Any], tail: bytes) -> tuple[TokenTrace, dict[str, Any]]:
    size = 8 * len(values["token_ids"])
    columns: dict[str, tuple[float, ...]] = {}
    for place, name in enumerate(values["trace"]):
        column = array("d")
        column.frombytes(tail[place * size : (place + 1) * size])
        columns[name] = tuple(column)
    captured, start = {}, len(columns) * size
    for name, form in values["captured"].items():
        captured[name], start = _tensor(tail, start, form)
    return TokenTrace(columns), captured


def _tensor(data: bytes, start: int, form: Mapping[str, Any]) -> tuple[Any, int]:
    """A captured tensor, and where the next one starts."""
    import numpy as np
    import torch

    count = int(np.prod(form["shape"]))
    values = np.frombuffer(data, form["dtype"], count, start).reshape(form["shape"])
    return torch.from_numpy(values.copy()), start + values.nbytes
