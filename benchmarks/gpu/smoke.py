"""What only a GPU can show, in under four minutes: stops at the first check that fails.

    PYTHONPATH=src python3 benchmarks/gpu/smoke.py           shapes of Qwen2.5-3B and 1.5B
    PYTHONPATH=src python3 benchmarks/gpu/smoke.py --tiny    small shapes, on whatever there is

Random weights; nothing is downloaded. Exit code 1 where a check fails, with its traceback. On a
CPU the checks of what is not there are skipped by name.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from attention_check import CASES, TINY_CASES, Heads, largest_error
from forward_check import Pass, check_overlap, check_padding, check_replay, milliseconds
from mixture_check import RULES, check_rows
from optimal_sampling.bench.architectures import RandomPair
from optimal_sampling.bench.harness import hardware
from optimal_sampling.bench.workload import Variant
from optimal_sampling.config import ModelConfig
from optimal_sampling.engines.local.paged.attention_backends import (
    choose_backend,
    installed_operator,
)
from optimal_sampling.engines.local.paged.page_manager import PAGE
from optimal_sampling.engines.local.paged.page_runner import PageRunner
from optimal_sampling.engines.local.run import DraftCounts, GenerationLoop, QueuedRound
from round_profile import Change, change_loop, waiting

__all__ = ["TINY", "Smoke", "main", "run_checks"]


class Skipped(Exception):
    """Why a check has nothing to check here."""


AHEAD_ROUNDS = 16
"""Rounds that are drawn with and without a round ahead."""


@dataclass(frozen=True)
class Scale:
    """Sizes of all checks."""

    teacher: str
    student: str
    vocab: int
    rows: Sequence[int]
    """Of the mixture."""
    shapes: Sequence[tuple[int, int]]
    """(rows, width) of recorded passes."""
    chunks: Sequence[Sequence[int]]
    """Tokens of the prompt chunks of recorded passes."""
    keys: int
    """Most tokens that a row of theirs has cached."""
    heads: Sequence[Heads]
    batch: int
    tokens: int
    """Of the texts that are drawn."""


FULL = Scale(
    teacher="Qwen2.5-3B",
    student="Qwen2.5-1.5B",
    vocab=151_936,
    rows=(1, 32, 160),
    shapes=((1, 1), (32, 1), (32, 5)),
    chunks=((77, 1, 30), (130, 90), (300, 5, 150), (560, 440)),
    keys=600,
    heads=(Heads(16, 2, 128), Heads(12, 2, 128), Heads(14, 2, 64), Heads(16, 8, 128)),
    batch=32,
    tokens=24,
)
TINY = Scale(
    teacher="tiny",
    student="tiny",
    vocab=1000,
    rows=(1, 3),
    shapes=((1, 1), (4, 1), (4, 5)),
    chunks=((20, 3, 1),),
    keys=30,
    heads=(Heads(4, 2, 16),),
    batch=3,
    tokens=6,
)


def note_waits(loop: GenerationLoop, waits: list[str]) -> None:
    """Collect PyTorch's warnings of waits for the GPU while a round is queued ahead."""
    queue = loop._queue_ahead

    def noting(queued: QueuedRound) -> QueuedRound | None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return queue(queued)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                found = map(str, (one.message for one in caught))
                waits.extend(message for message in found if "synchron" in message)

    if torch.cuda.is_available():
        loop._queue_ahead = noting  # type: ignore[method-assign]


@dataclass
class Smoke:
    """The checks, in order, over one pair of models."""

    scale: Scale
    models: ModelConfig
    pair: RandomPair = field(init=False)

    def __post_init__(self) -> None:
        scale = self.scale
        self.pair = RandomPair(self.models, scale.teacher, scale.student, prompt_tokens=20)
        self.pair.kv_memory_gib = None if self.gpu else 0.1
        self.device, self.dtype = self.pair.device, self.pair.dtype

    @property
    def gpu(self) -> bool:
        """Whether this is one."""
        return torch.cuda.is_available() and self.models.device != "cpu"

    def versions(self) -> str:
        """Hardware and software, and what PyTorch's attention takes."""
        facts = hardware(self.models)
        for name in ("triton", "flash_attn", "numpy"):
            found = importlib.util.find_spec(name)
            version = getattr(__import__(name), "__version__", "unknown") if found else ""
            facts[name] = version or "not installed"
        if self.gpu:
            facts["free_gib"] = round(torch.cuda.mem_get_info(self.device)[0] / 2**30, 1)
        facts["operator"] = installed_operator().problem or "has what pages need"
        facts["platform"] = platform.platform()
        return ", ".join(f"{name} {value}" for name, value in facts.items())

    @torch.inference_mode()
    def attention(self) -> str:
        """The backend that `auto` takes, in every case and for every kind of heads."""
        choice = choose_backend("auto", self.device, self.dtype, {128}, set())
        if choice.backend is None:
            if self.gpu:
                raise AssertionError(choice.note)
            raise Skipped(choice.note)
        cases = CASES if self.scale is FULL else TINY_CASES
        worst = 0.0
        for heads in self.scale.heads:
            for case in cases:
                error = largest_error(choice.backend, case, heads, self.device, self.dtype)
                worst = max(worst, error)
        return f"{choice.note}; largest error {worst:.2g} over {len(cases)} cases"

    @torch.inference_mode()
    def mixture(self) -> str:
        """The fused programs against PyTorch's path."""
        if not self.gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise Skipped("the fused programs need a GPU, or TRITON_INTERPRET=1")
        for rows in self.scale.rows:
            for dtype in (torch.float32, self.dtype):
                check_rows(rows, self.scale.vocab, self.device, dtype)
        return f"{self.scale.rows} rows of {self.scale.vocab}"

    @torch.inference_mode()
    def rules(self) -> str:
        """Veto, support and the likeliest token in the fused programs, against PyTorch's path."""
        if not self.gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise Skipped("the fused programs need a GPU, or TRITON_INTERPRET=1")
        rows = self.scale.rows[1]
        for mixture in RULES.values():
            check_rows(rows, self.scale.vocab, self.device, self.dtype, mixture)
        return f"{rows} rows: {', '.join(RULES)}"

    def load(self) -> str:
        """Both models with random weights, and what will run."""
        notes = self.pair.loaded().notes()
        if self.gpu and "SDPA" in notes["attention"]:
            raise AssertionError(f"not Flash Attention over pages: {notes['attention']}")
        return ", ".join(f"{name} {value}" for name, value in notes.items())

    @torch.inference_mode()
    def replay(self) -> str:
        """Recorded passes of both models against eager ones."""
        counts = []
        for role in ("teacher", "student"):
            for rows, width in self.scale.shapes:
                one = self._pass(role, rows, width)
                counts.append(check_replay(one))
                one.close()
        if self.gpu and not all(counts):
            raise AssertionError(f"graphs recorded after each shape: {counts}")
        return f"bit for bit at {self.scale.shapes}; graphs {counts}"

    @torch.inference_mode()
    def chunks(self) -> str:
        """Recorded passes with prompt chunks, which have surplus tokens and empty segments."""
        plain, wide = self.scale.shapes[1:]
        cases = [(plain, counts) for counts in ((), *self.scale.chunks)]
        cases.append((wide, self.scale.chunks[0]))
        found = [
            f"{role} {self._with_chunks(role, shape, counts)}"
            for role in ("teacher", "student")
            for shape, counts in cases
        ]
        return "tokens of chunks beside rows x width: " + ", ".join(found)

    def _with_chunks(self, role: str, shape: tuple[int, int], counts: Sequence[int]) -> str:
        """Check one pass, and time it: recorded, and unpadded and launched kernel by kernel."""
        rows, width = shape
        one = self._pass(role, rows, width, counts)
        if not check_replay(one) and self.gpu:
            raise AssertionError("no graph was recorded")
        error = check_padding(one)
        ours, unpadded = (milliseconds(each, self.device) for each in (one, one.unpadded))
        one.close()
        return (
            f"{sum(counts)} + {rows}x{width}: {ours:.2f} not {unpadded:.1f} ms (error {error:.1g})"
        )

    @torch.inference_mode()
    def overlap(self) -> str:
        """Both models at once against one after the other."""
        rows, width = self.scale.shapes[1]
        student, teacher = (self._pass(role, rows, width) for role in ("student", "teacher"))
        check_overlap(student, teacher, self.device)
        student.close()
        teacher.close()
        return "bit for bit"

    def texts(self) -> str:
        """Lockstep and drafts, end to end, and that nothing was given up on the way."""
        scale, found = self.scale, []
        for drafts in (0, 4, "auto"):
            workload = self.pair.workload(scale.batch, scale.tokens)
            variant = Variant(draft_tokens=drafts, acceptance=0.9)
            recorder = self.pair.engine(workload, scale.batch, variant).record(workload.requests)
            assert recorder.whole.tokens == scale.batch * scale.tokens
            rate, counts = recorder.whole.rate(), recorder.loop.counts
            ahead = f"{counts.ahead} of {counts.rounds} rounds ahead"
            found.append(f"drafts {drafts}: {rate:.0f} tokens/s, {ahead}")
        recordings = self.pair.loaded().pair.recorded_graphs
        assert not (recordings and recordings.off), recordings
        return ", ".join(found) + f" (with recording); {recordings}"

    def ahead(self) -> str:
        """The tokens of rounds without and with drafts, with and without a round ahead."""
        found = []
        for drafts in (0, 4):
            waits: list[str] = []
            texts, counts = self._texts(drafts, lambda loop, waits=waits: note_waits(loop, waits))
            expected, _ = self._texts(drafts, waiting)
            for key, tokens in texts.items():
                shorter = min(len(tokens), len(expected[key]))
                if not shorter or tokens[:shorter] != expected[key][:shorter]:
                    raise AssertionError(f"rounds ahead with {drafts} drafts draw other tokens")
            if self.gpu and counts.ahead < counts.rounds / 2:
                raise AssertionError(f"{counts.ahead} of {counts.rounds} rounds queued ahead")
            if waits and len(waits) >= counts.ahead:
                raise AssertionError(f"queueing a round waits for the GPU: {waits[-1]}")
            found.append(f"drafts {drafts}: {counts.ahead} of {counts.rounds}, {len(waits)} waits")
        return "the same tokens; rounds ahead with " + "; ".join(found)

    def _texts(self, drafts: int, change: Change) -> tuple[dict[str, list[int]], DraftCounts]:
        """What is drawn in AHEAD_ROUNDS rounds, in which no text ends: all have one shape."""
        workload = self.pair.workload(self.scale.batch, (AHEAD_ROUNDS + 2) * (drafts + 1))
        variant = Variant(draft_tokens=drafts, acceptance=0.7)
        engine = self.pair.engine(workload, self.scale.batch, variant)
        change_loop(engine, change)
        engine.stop = lambda rounds: rounds >= AHEAD_ROUNDS
        loop = engine.record(workload.requests).loop
        return {row.request.id: row.output for row in loop.scheduler.running}, loop.counts

    def _pass(self, role: str, rows: int, width: int, chunks: Sequence[int] = ()) -> Pass:
        runner = self.pair.loaded().pair.runners[role]
        if not isinstance(runner, PageRunner):
            raise Skipped("no pages here")
        keys = max(self.scale.keys, *chunks, 1)
        pages = rows * (-(-(keys + 64) // PAGE) + 4)
        return Pass.of(runner, (rows, width), keys, pages * PAGE, chunks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes, on whatever there is")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=240, help="stop after so many")
    asked = parser.parse_args(arguments)
    if not asked.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here: --tiny tries the script")
    faulthandler.dump_traceback_later(asked.seconds, exit=True)
    smoke = Smoke(TINY if asked.tiny else FULL, ModelConfig(device=asked.device))
    try:
        passed = run_checks(smoke)
    finally:
        faulthandler.cancel_dump_traceback_later()
    print("smoke: passed" if passed else "smoke: FAILED", flush=True)
    return 0 if passed else 1


def run_checks(smoke: Smoke) -> bool:
    """Whether all passed. Those after the first that fails are not run."""
    checks = (
        smoke.versions,
        smoke.attention,
        smoke.mixture,
        smoke.rules,
        smoke.load,
        smoke.replay,
        smoke.chunks,
        smoke.overlap,
        smoke.texts,
        smoke.ahead,
    )
    return all(run(check) for check in checks)


def run(check: Callable[[], str]) -> bool:
    """Whether a check passed, or had nothing to check. Prints its time and what it found."""
    started = time.perf_counter()
    outcome = "ok"
    try:
        found = check()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Skipped as reason:
        outcome, found = "skipped", str(reason)
    except Exception:
        outcome, found = "FAILED", traceback.format_exc()
    seconds = time.perf_counter() - started
    print(f"{check.__name__:<10} {outcome:<8} {seconds:6.1f} s  {found}", flush=True)
    return outcome != "FAILED"


if __name__ == "__main__":
    sys.exit(main())
