"""One call of `generate`: rounds of forward passes, from logits to tokens, until every request is served.

A round of width n: the student makes n one-token forwards over its last token and its own n - 1 drafts; the teacher
makes one forward over the same n tokens; from both rows of logits follows q*, and from q* and the noise the token, at
each of the n positions. What is emitted ends with the first token that differs from its draft. Width 1 is plain
decoding. Both caches hold all but the last token of a row, so giving up drafts is not advancing a length.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.config import EngineConfig, MixtureConfig
from optimal_sampling.distribution import Step, gumbel, keys_tensor, step
from optimal_sampling.distribution.single import single_step
from optimal_sampling.engines.base import bad_logits_message, prompt_problem
from optimal_sampling.engines.local.forward import ModelRunner
from optimal_sampling.engines.local.kv_cache import KVCache
from optimal_sampling.engines.local.scheduler import CacheSpec, Chunk, Limits, Round, Scheduler, Sequence
from optimal_sampling.types import Completion, FinishReason, Request, TokenTrace

__all__ = ["Lane", "Run", "RunSetting"]


@dataclass(frozen=True, slots=True)
class RunSetting:
    """What a run needs to know beside its models."""

    roles: tuple[str, ...]
    """Name of each context: `student` and `teacher`, or one of them alone."""
    mixture: MixtureConfig
    options: EngineConfig
    stop_ids: frozenset[int]
    vocab_size: int
    context_lengths: tuple[int | None, ...]
    """Per context."""
    embeddings: tuple[int, ...]
    """Per context, the number of ids that its model knows."""
    memory: int
    """Bytes for the caches."""
    capture: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What a round's tensors hold before they are copied to the host."""

    drafts: Int[Tensor, "rows drafts"]
    step: Step
    """Rows * width tokens, row by row."""
    captured: dict[str, Float[Tensor, "tokens vocab"]]


class Lane:
    """One model with its cache, and the contexts of every row that live in it."""

    def __init__(self, runner: ModelRunner, contexts: tuple[int, ...], bytes_per_token: int) -> None:
        self.runner = runner
        self.contexts = contexts
        self.cache = KVCache()
        self.spec = CacheSpec(contexts, bytes_per_token)

    def bytes_with(self, rows: int, length: int) -> int:
        """Memory of the cache with room for this many rows of this length."""
        return rows * len(self.contexts) * length * self.spec.bytes_per_token

    def holds(self, rows: int, length: int) -> bool:
        """Whether the cache has this room already."""
        return rows * len(self.contexts) <= self.cache.slots and length <= self.cache.length

    def move(self, source: int, target: int, rows: list[Sequence]) -> None:
        """Copy a row's contexts to another row's slots."""
        width = len(self.contexts)
        for i, context in enumerate(self.contexts):
            self.cache.move(source * width + i, target * width + i, rows[target].cached[context])

    def clear(self, row: int) -> None:
        """Zero a row's slots."""
        for i in range(len(self.contexts)):
            self.cache.clear(row * len(self.contexts) + i)

    def forward(
        self, plan: Round, rows: list[Sequence], drafts: Int[Tensor, "rows drafts"], offset: int = 0
    ) -> list[Float[Tensor, "rows width vocab"]]:
        """Logits per context after each row's last known token and its drafts.

        With an `offset` the last known token and `offset - 1` drafts are cached already: feed `drafts` after them.
        """
        width = len(self.contexts)
        idle = [row * width + i for row, ready in enumerate(plan.ready) if not ready for i in range(width)]
        start = np.array([s.known(c) - 1 + offset for s in rows for c in self.contexts])
        tokens = drafts.repeat_interleave(width, 0) if width > 1 else drafts
        chunks: list[Chunk] = []
        if offset == 0:
            last = torch.tensor([[s.last(c)] for s in rows for c in self.contexts], device=drafts.device)
            tokens = torch.cat([last, tokens], 1)
            pairs = [(i, chunk) for i, context in enumerate(self.contexts) for chunk in plan.chunks[context]]
            chunks = [Chunk(chunk.slot * width + i, chunk.start, chunk.ids) for i, chunk in pairs]
        logits = self.runner.forward(self.cache, tokens, start, idle, chunks)
        return [logits[i::width] for i in range(width)]


class Run:
    """The state of one `generate` call."""

    def __init__(self, lanes: list[Lane], setting: RunSetting) -> None:
        self.lanes = lanes
        self.setting = setting
        self.rounds = 0
        self.device = lanes[0].runner.device
        self.scheduler = Scheduler(
            Limits(
                rows=setting.options.batch_size,
                prefill_chunk=setting.options.prefill_chunk,
                memory=setting.memory,
                caches=tuple(lane.spec for lane in lanes),
                context_lengths=setting.context_lengths,
                round_length=lambda length: max(lane.runner.rules.slot_length(length) for lane in lanes),
            )
        )

    def completions(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Serve the requests in rounds."""
        refused: list[Completion] = []
        source = self._admissible(requests, refused)
        while True:
            plan = self.scheduler.next_round(source)
            yield from self._rejected()
            yield from refused
            refused.clear()
            if plan is not None:
                yield from self._round(plan)
            elif not self.scheduler.waiting:
                return

    def _admissible(self, requests: Iterable[Request], refused: list[Completion]) -> Iterator[Sequence]:
        """Requests as sequences; those that no model's context can hold go to `refused` instead."""
        for request in requests:
            prompts = {"student": request.student_prompt_ids, "teacher": request.teacher_prompt_ids}
            sequence = Sequence(request, tuple(prompts[role] for role in self.setting.roles))
            sequence.evict()
            setting = self.setting
            problem = prompt_problem(setting.roles, sequence.prompts, setting.context_lengths, setting.embeddings)
            if problem:
                refused.append(self._completion(sequence, "error", problem))
            else:
                yield sequence

    def _rejected(self) -> Iterator[Completion]:
        for sequence, reason in self.scheduler.rejected:
            yield self._completion(sequence, "error", reason)
        self.scheduler.rejected.clear()

    # a round

    @torch.inference_mode()
    def _round(self, plan: Round) -> list[Completion]:
        rows = self.scheduler.running
        self._prepare(plan, rows)
        drawn = self._draw(plan, rows)
        self.rounds += 1
        for context, chunks in enumerate(plan.chunks):
            for chunk in chunks:
                rows[chunk.slot].cached[context] += len(chunk.ids)
        return self._emit(plan, rows, drawn)

    def _prepare(self, plan: Round, rows: list[Sequence]) -> None:
        """Move rows and grow caches; all caches take the planned shape where growing alone exceeds the budget."""
        for lane in self.lanes:
            for source, target in plan.moves:
                lane.move(source, target, rows)
        wanted = list(zip(self.lanes, plan.lengths, strict=True))
        small = [(lane, length) for lane, length in wanted if not lane.holds(plan.slots, length)]
        if not small:
            return
        kept = [lane for lane, length in wanted if lane.holds(plan.slots, length)]
        total = sum(lane.bytes_with(plan.slots, length) for lane, length in small)
        total += sum(lane.cache.slots * lane.cache.length * lane.spec.bytes_per_token for lane in kept)
        for lane, length in small if total <= self.setting.memory else wanted:
            lane.cache.reshape(plan.slots * len(lane.contexts), length)

    def _draw(self, plan: Round, rows: list[Sequence]) -> Drawn:
        """Logits of both models after every row's last token and drafts, and the tokens that follow from them."""
        setting = self.setting
        keys = keys_tensor([s.request.noise_key for s in rows]).to(self.device)
        position = torch.tensor([len(s.output) for s in rows], device=self.device)
        noise = gumbel(keys, position, setting.vocab_size)
        drafts = position.new_zeros(len(rows), 0)
        logits = [x[:, 0] for lane in self.lanes for x in lane.forward(plan, rows, drafts)]
        captured = {f"{role}_logits": x for role, x in zip(setting.roles, logits, strict=True)}
        if len(logits) == 1:
            return Drawn(drafts, single_step(logits[0], noise, setting.mixture, setting.roles[0]), captured)
        drawn = step(*logits, noise, position, setting.mixture, keep_log_q="log_q" in setting.capture)
        if drawn.log_q is not None:
            captured["log_q"] = drawn.log_q
        return Drawn(drafts, drawn, captured)

    # from tensors to completions

    def _emit(self, plan: Round, rows: list[Sequence], drawn: Drawn) -> list[Completion]:
        """Hand every ready row its tokens. The copy to the host is the round's one synchronisation."""
        packed = drawn.step.pack().cpu().numpy().reshape(len(rows), plan.width, -1)
        drafts = drawn.drafts.cpu().numpy()
        kept = {name: drawn.captured[name].float().cpu() for name in self.setting.capture if name in drawn.captured}
        done = []
        for row, sequence in enumerate(rows):
            if not plan.ready[row]:
                continue
            reason, error = self._extend(sequence, packed[row], drafts[row])
            for i in range(sequence.known(0) - 1 - sequence.cached[0] if kept else 0):
                sequence.captured.append({name: values[row * plan.width + i] for name, values in kept.items()})
            sequence.cached = [sequence.known(c) - 1 for c in range(len(sequence.prompts))]
            if reason is not None:
                done.append((row, self._completion(sequence, reason, error)))
            if error:
                for lane in self.lanes:
                    lane.clear(row)
        self.scheduler.finish([row for row, _ in done])
        return [completion for _, completion in done]

    def _extend(
        self, sequence: Sequence, packed: Float[np.ndarray, "width fields"], drafts: Int[np.ndarray, " drafts"]
    ) -> tuple[FinishReason | None, str]:
        """Append tokens up to and including the first that differs from its draft, or that ends the completion."""
        for i, values in enumerate(packed):
            token, bad_student, bad_teacher = map(int, values[:3])
            if bad_student or bad_teacher:
                return "error", bad_logits_message(len(sequence.output), bad_student, bad_teacher)
            sequence.output.append(token)
            sequence.trace.append(values[3:])
            if token in self.setting.stop_ids:
                return "stop", ""
            if len(sequence.output) >= sequence.request.max_new_tokens or self._context_full(sequence):
                return "length", ""
            if i < len(drafts) and token != drafts[i]:
                break
        return None, ""

    def _context_full(self, sequence: Sequence) -> bool:
        limits = enumerate(self.setting.context_lengths)
        return any(limit is not None and sequence.known(context) >= limit for context, limit in limits)

    def _completion(self, sequence: Sequence, reason: FinishReason, error: str) -> Completion:
        rows = np.stack(sequence.trace).tolist() if sequence.trace else []
        names = sequence.captured[0] if sequence.captured else {}
        return Completion(
            request=sequence.request,
            token_ids=tuple(sequence.output),
            finish_reason=reason,
            trace=TokenTrace.from_rows(rows),
            error=error,
            seconds=time.perf_counter() - sequence.started,
            captured={name: torch.stack([c[name] for c in sequence.captured]) for name in names},
        )
