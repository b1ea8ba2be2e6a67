"""Messages between driver and workers."""

import math
import socket
import threading

import pytest
import torch

from optimal_sampling.config import MixtureConfig, ModelConfig, VllmOptions
from optimal_sampling.engines.fleet.channel import DriverEnd, WorkerEnd
from optimal_sampling.engines.fleet.messages import (
    Begin,
    Broken,
    Finished,
    Progress,
    Ready,
    Run,
    Setup,
    Started,
    Submit,
    decode,
    encode,
)
from optimal_sampling.types import TRACE_FIELDS, ByteLevel, Completion, Request, TokenTrace
from tests.engines.fleet.engines import SmallTablesOptions

REQUEST = Request("a\ud800", 3, 2**62, (1, 2), (1, 2, 70_000), 5)
SAME_PROMPTS = Request("b", 0, -1, (5,), (5,), 1)
MESSAGES = [
    Setup(ModelConfig(device="cpu"), MixtureConfig(top_k=3), SmallTablesOptions(), "student", "1"),
    Begin(Run(7, MixtureConfig(), "mixture", VllmOptions(vllm=("a=1", "b=2")), ("log_q",))),
    Submit(7, ((0, REQUEST), (1, SAME_PROMPTS))),
    Submit(7, ()),
    Ready(32, 6, (0, 3), ("mixture",), (), True, {"device": "cpu"}),
    Started(7, 1),
    Progress(7, 12),
    Broken("it raised E: \ud800", "ModelError"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was(message):
    """Guards: options of another class, lists in place of tuples, prompts of the other model."""
    assert decode(encode(message)) == message


def test_a_completion_arrives_with_the_same_bits():
    """Guards: records that differ in the last digit between a fleet and one engine."""
    rows = [tuple(math.pi * (i + 1) / (j + 3) for j in range(len(TRACE_FIELDS))) for i in range(3)]
    rows[1] = (math.nan, math.inf, -math.inf, -0.0, *rows[1][4:])
    captured = {
        "top_ids": torch.arange(18, dtype=torch.int32).reshape(3, 2, 3),
        "top_log_p": torch.full((3, 2, 3), -0.1, dtype=torch.float16),
        "log_q": torch.rand(3, 7),
    }
    drawn = ByteLevel("\u00e9 2", {"student": 0.1 + 0.2}, True, TokenTrace.from_rows(rows[::2]))
    sent = Completion(
        REQUEST,
        (5, 6, 0),
        "stop",
        TokenTrace.from_rows(rows),
        seconds=0.1,
        captured=captured,
        byte_level=drawn,
    )
    came = decode(encode(Finished.of(7, 4, sent))).completion(REQUEST)
    assert (came.request, came.token_ids, came.seconds) == (REQUEST, (5, 6, 0), 0.1)
    assert str(came.trace) == str(sent.trace)  # NaN is not equal to itself
    assert came.byte_level == drawn
    for name, tensor in captured.items():
        assert came.captured[name].dtype == tensor.dtype
        assert torch.equal(came.captured[name], tensor)
    failed = Completion.failed(REQUEST, "why")
    assert decode(encode(Finished.of(7, 4, failed))).completion(REQUEST) == failed


def test_half_a_message_waits_for_the_rest():
    """Guards: a driver that waits for a worker which hangs in the middle of a message."""
    ours, theirs = socket.socketpair()
    end = DriverEnd(ours)
    data = encode(Progress(7, 3))
    framed = len(data).to_bytes(8, "little") + data
    theirs.sendall(framed[:11])
    assert list(end.receive()) == []
    theirs.sendall(framed[11:] + framed)
    assert list(end.receive()) == [Progress(7, 3), Progress(7, 3)]
    assert not end.is_closed
    theirs.close()
    assert list(end.receive()) == []
    assert end.is_closed
    end.close()


def test_orders_wait_until_the_worker_reads():
    """Guards: a driver that waits for a worker which reads nothing."""
    ours, theirs = socket.socketpair()
    end, worker = DriverEnd(ours), WorkerEnd(theirs)
    order = Submit(1, ((0, Request("a", 0, 0, tuple(range(100_000)), (1,), 5)),))
    for _ in range(3):
        end.send(order)
    assert end.has_unsent
    assert [_read(end, worker) for _ in range(3)] == [order] * 3
    assert not end.has_unsent
    end.close()
    theirs.close()


def _read(end, worker):
    """The next order, the driver sending what waits meanwhile."""
    result = []
    thread = threading.Thread(target=lambda: result.append(worker.receive()))
    thread.start()
    while thread.is_alive():
        end.flush()
        thread.join(0.01)
    return result[0]
