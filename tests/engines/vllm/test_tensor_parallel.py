"""Two processes of a CPU as two devices: students that are split and that are whole on each."""

import contextlib
import subprocess
import sys

import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.vllm.tensor_parallel import can_split
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Request
from tests.engines.vllm.rows import assert_rows, expected_rows, full_rows
from tests.engines.vllm.tiny import PROMPTS, VOCAB, Pair, tiny_model

FREE = MixtureConfig(alpha_min=0.0)
LIMIT = 5e-5  # sums over two devices have other last bits than sums over one


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A student with three heads, which two devices cannot share."""
    folder = str(tmp_path_factory.mktemp("odd"))
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    tiny_model(9, layers=1, vocab=VOCAB, **heads).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("drafts", [0, 2])
def test_two_devices_draw_from_q(folders, odd, drafts):
    """Guards: one device's reply taken for all, a wrong split, ranks that draw different tokens.

    With drafts the student is split, without it is whole on each device.
    """
    pair = Pair(folders["student"] if drafts else odd, folders["teacher"])
    settings = {"tensor_parallel_size": 2, "max_logprobs": -1}
    with contextlib.closing(pair.open(drafts, 8, mixture=FREE, **settings)) as engine:
        for student_ids, teacher_ids in PROMPTS:
            tokens, rows = full_rows(engine, FREE, student_ids, teacher_ids)
            wanted = expected_rows(pair, FREE, student_ids, teacher_ids, tokens)
            assert_rows(rows, wanted, LIMIT)
        requests = [
            Request(f"r{i}", 0, 7, tuple(student), tuple(teacher), 12)
            for i, (student, teacher) in enumerate(PROMPTS)
        ]
        for done in engine.generate(requests):
            assert not done.error
            assert len(done.trace["alpha"]) == len(done.token_ids) > 0


def test_drafts_of_a_student_that_cannot_be_split_are_refused(folders, odd):
    """Guards: an assertion of vLLM about heads, in a process of its own."""
    with pytest.raises(ConfigError, match="draft_tokens: vLLM demands"):
        Pair(odd, folders["teacher"]).open(2, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "devices", "expected"),
    [
        (4, 2, 96, 2, True),
        (3, 3, 96, 2, False),
        (4, 1, 96, 2, True),  # the one key-value head is repeated
        (6, 3, 96, 2, False),
        (4, 2, 97, 2, False),
        (8, 2, 96, 8, True),
    ],
)
def test_what_can_be_split(heads, kv_heads, width, devices, expected):
    """Guards: an assertion of vLLM's layers after minutes of loading."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = tiny_model(1, layers=1, intermediate_size=width, **sizes).config
    assert can_split(config, devices) == expected


UNGUARDED = """
import multiprocessing
from optimal_sampling.config import MixtureConfig, ModelConfig, VllmOptions
from optimal_sampling.engines.vllm.engine import VllmEngine
if multiprocessing.current_process().name == "MainProcess":
    started = multiprocessing.get_context("spawn").Process(target=print)
    started.start()
    started.join()
else:
    VllmEngine.load(ModelConfig(), MixtureConfig(), VllmOptions(), None)
"""


def test_a_script_without_a_main_guard_is_told(tmp_path):
    """Guards: a page of Python's about `freeze_support` in place of what to do."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert "under `if __name__ == '__main__':`" in ended.stderr.splitlines()[-1]
