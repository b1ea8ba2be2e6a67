"""The engines that compare.py and gpu.py measure, each in a process of this file.

    python engines.py SETUP

opens one engine. Then every line "BATCH NEW REPEAT TRACE" of its input is a piece of work, and a
line of JSON on its output gives its tokens and seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ENGINES", "Setup"]

ENGINES = (
    "teacher",
    "student",
    "lockstep",
    "drafts",
    "auto drafts",
    "teacher + drafts",
    "local",
    "nested",
)

Run = Callable[[int, int, int, str], int]
"""(batch, new tokens of each sequence, repeat, trace level) -> number of tokens drawn.

Only vLLM with both models in it has alpha statistics to trace.
"""


@dataclass(frozen=True)
class Setup:
    """What is to be measured."""

    engine: str
    teacher: str
    student: str
    vocab: int
    context: int
    """Longest text, prompt included."""
    batch: int
    """Most sequences at once."""
    prompt: int
    drafts: int
    gpu: bool
    dummy: bool = False
    """The folders hold configs alone; weights are random."""

    def line(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


def vllm_settings(setup: Setup) -> dict[str, Any]:
    """vLLM's arguments that all engines share."""
    settings: dict[str, Any] = {
        "max_num_seqs": setup.batch,
        "max_num_batched_tokens": 8192,
        "disable_log_stats": True,
    }
    settings |= {"enable_prefix_caching": False, "max_model_len": setup.context}
    if setup.dummy:
        settings["load_format"] = "dummy"
    if not setup.gpu:
        settings |= {
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": 32,
            "kv_cache_memory_bytes": 1 << 28,
        }
    return settings


def plain_core(setup: Setup, model: str, **settings: Any) -> Any:
    """vLLM with one model, as it comes, in this process."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(model=model, skip_tokenizer_init=True, **{**vllm_settings(setup), **settings})
    )


def composite_core(setup: Setup) -> Any:
    """vLLM with both models in it."""
    from optimal_sampling.config import MixtureConfig, ModelConfig, VllmOptions
    from optimal_sampling.engines.vllm.engine import VllmEngine

    settings = vllm_settings(setup)
    drafts = {"drafts": setup.drafts, "auto drafts": "auto"}.get(setup.engine, 0)
    options = VllmOptions(batch_size=settings.pop("max_num_seqs"), draft_tokens=drafts)
    models = ModelConfig(teacher=setup.teacher, student=setup.student)
    return VllmEngine.load(
        models, MixtureConfig(), options, vocabulary_of(setup), settings=settings
    ).core


def vocabulary_of(setup: Setup) -> Any:
    """What the two models share: everything; nothing ends a text."""
    from optimal_sampling.vocabulary import Vocabulary

    contexts = {"student_context": setup.context, "teacher_context": setup.context}
    return Vocabulary(
        size=setup.vocab,
        stop_ids=frozenset(),
        student_rows=setup.vocab,
        teacher_rows=setup.vocab,
        **contexts,
    )


def prompts(setup: Setup, batch: int, repeat: int) -> list[list[int]]:
    """Token ids of a batch; no two repeats share a prefix."""
    top = min(30000, setup.vocab - 2)
    return [
        [1 + (i * 7919 + j * 104729 + repeat * 31) % top for j in range(setup.prompt)]
        for i in range(batch)
    ]


def vllm_run(setup: Setup, core: Any) -> Run:
    """All requests at once, stepped until they are done."""
    from vllm import SamplingParams

    from optimal_sampling.config import MixtureConfig
    from optimal_sampling.engines.vllm.request_options import RequestOptions

    def run(batch: int, new: int, repeat: int, trace: str) -> int:
        extra = RequestOptions(trace=trace).extra_args(MixtureConfig()) if trace != "off" else None
        params = SamplingParams(max_tokens=new, ignore_eos=True, detokenize=False, extra_args=extra)
        for i, ids in enumerate(prompts(setup, batch, repeat)):
            core.add_request(
                f"{batch}-{new}-{repeat}-{trace}-{i}", {"prompt_token_ids": ids}, params
            )
        count = 0
        while core.has_unfinished_requests():
            count += sum(len(done.outputs[0].token_ids) for done in core.step() if done.finished)
        return count

    return run


def local_run(setup: Setup) -> Run:
    """This package's local engine, in lockstep."""
    from optimal_sampling.config import LocalOptions, MixtureConfig, ModelConfig
    from optimal_sampling.engines import open_engine
    from optimal_sampling.types import Request

    models = ModelConfig(teacher=setup.teacher, student=setup.student)
    options = LocalOptions(batch_size=setup.batch, batch_invariant=False, draft_tokens=0)
    engine = open_engine(options, models, MixtureConfig(), vocabulary_of(setup))

    def run(batch: int, new: int, repeat: int, trace: str) -> int:
        requests = [
            Request(f"{repeat}-{i}", 0, 0, tuple(ids), tuple(ids), new)
            for i, ids in enumerate(prompts(setup, batch, repeat))
        ]
        return sum(len(done.token_ids) for done in engine.generate(requests))

    return run


def nested_run(setup: Setup) -> Run:
    """The predecessor's design; see nested.py."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    from nested import StudentInside

    # The inner engine sees every text again with each token: its prefix cache is what it lives on.
    inner = plain_core(setup, setup.student, max_logprobs=-1, enable_prefix_caching=True)
    StudentInside.student = inner
    return vllm_run(setup, plain_core(setup, setup.teacher, logits_processors=[StudentInside]))


def open_engine(setup: Setup) -> Run:
    """The engine that was asked for."""
    if setup.engine in ("teacher", "student"):
        return vllm_run(setup, plain_core(setup, getattr(setup, setup.engine)))
    if setup.engine == "teacher + drafts":
        from optimal_sampling.engines.vllm.cpu_fixes import apply_cpu_fixes

        apply_cpu_fixes()
        speculation = {
            "method": "draft_model",
            "model": setup.student,
            "num_speculative_tokens": setup.drafts,
        }
        speculation["draft_sample_method"] = "probabilistic"
        return vllm_run(setup, plain_core(setup, setup.teacher, speculative_config=speculation))
    if setup.engine == "local":
        return local_run(setup)
    if setup.engine == "nested":
        return nested_run(setup)
    return vllm_run(setup, composite_core(setup))


def main() -> None:
    """Open the engine and work until the input ends."""
    setup = Setup(**json.loads(sys.argv[1]))
    run = open_engine(setup)
    print("READY", flush=True)
    for line in sys.stdin:
        *numbers, trace = line.split()
        batch, new, repeat = map(int, numbers)
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = run(batch, new, repeat, trace)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print("DONE " + json.dumps({"tokens": tokens, "wall": wall, "cpu": cpu}), flush=True)


if __name__ == "__main__":
    main()
