"""One `generate` call: requests become sequences, rounds extend them, and ended ones completions.

Every cache holds all but the last token of a row, so giving up drafts is not counting them. The
same holds for a round that is queued ahead: what it made for texts that ended is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from optimal_sampling.distribution import top_tokens
from optimal_sampling.engines.base import bad_logits_message
from optimal_sampling.engines.device import HostCopy
from optimal_sampling.engines.local.drafting import DraftPolicy, Lookup
from optimal_sampling.engines.local.emission import Drawing, Emission
from optimal_sampling.engines.local.memory import KVMemory
from optimal_sampling.engines.local.round import RunSettings, SampledRound, Sampler
from optimal_sampling.engines.local.runner import CachedModel
from optimal_sampling.engines.local.scheduler import RoundPlan, Scheduler, Sequence
from optimal_sampling.types import TRACE_FIELDS, Completion, FinishReason, Request, TokenTrace

__all__ = ["DraftCounts", "GenerationLoop", "QueuedRound"]


@dataclass(slots=True)
class DraftCounts:
    """What speculation did in one `generate` call."""

    rounds: int = 0
    ahead: int = 0
    """Rounds that were queued before the tokens of the one before were waited for."""
    drafted: int = 0
    """Tokens drafted for rows that were decoding."""
    accepted: int = 0
    """Of these, tokens of a completion after which the round went on."""


@dataclass(slots=True, eq=False)
class QueuedRound:
    """A round whose tokens are not yet waited for."""

    plan: RoundPlan
    """Where the round is queued ahead, corrected once the round before it is finished."""
    rows: list[Sequence]
    sampled: SampledRound
    packed: HostCopy
    started: float
    ahead: bool
    """It was queued before the tokens of the round before it were waited for."""


class GenerationLoop:
    """State of one `generate` call."""

    def __init__(
        self,
        models: list[CachedModel],
        settings: RunSettings,
        policy: DraftPolicy,
        sampler: Sampler,
    ) -> None:
        self.models = models
        self.settings = settings
        self.policy = policy
        self.sampler = sampler
        self.counts = DraftCounts()
        self.runs_ahead = (
            all(model.runner.runs_ahead for model in models)
            and not settings.keeps_logits  # which are read after the wait
        )
        """Whether a round is queued before the tokens of the one before it are waited for."""
        self._finished = 0.0
        """When the latest round was."""
        self._is_stop = np.zeros(settings.vocab_size, dtype=bool)
        self._is_stop[[token for token in settings.stop_ids if token < settings.vocab_size]] = True
        self.memory = KVMemory([model.cache.manager for model in models], settings.memory)
        self.scheduler = Scheduler(settings.limits, self.memory)

    def completions(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """Serve the requests in rounds."""
        source = self._admissible(requests)
        while True:
            plan = self._next_plan(source)
            for sequence, reason in self.scheduler.rejected:
                yield self._completion(sequence, "error", reason)
            self.scheduler.rejected.clear()
            if plan is not None:
                yield from self._rounds(plan, source)
            elif not self.scheduler.waiting:
                return

    def close(self) -> None:
        """Free the caches."""
        for model in self.models:
            model.cache.release()

    def _next_plan(self, source: Iterator[Sequence | None]) -> RoundPlan | None:
        """A round with drafts or a plain one, as the policy wants it."""
        plain = self._wants_plain()
        plan = self.scheduler.next_round(source, 1 if plain else self.policy.most + 1)
        if plan is not None and plan.width == 1 and self._plain_differs and not plain:
            self.policy.no_room()
        return plan

    def _wants_plain(self) -> bool:
        """Whether the next round is to be plain."""
        return self._plain_differs and self.policy.plain_next(len(self.scheduler.running))

    @property
    def _plain_differs(self) -> bool:
        """Whether a plain round runs in another way than a round with drafts."""
        return self.runs_ahead or self.sampler.overlap.works

    def _admissible(self, requests: Iterable[Request | None]) -> Iterator[Sequence | None]:
        """Requests as sequences, without those that no model's context can hold."""
        for request in requests:
            if request is None:
                yield None
                continue
            prompts = tuple(request.prompt_ids(role) for role in self.settings.roles)
            sequence = Sequence(request, prompts)
            if self.policy.most:
                sequence.lookup = Lookup(sequence.prompts)
            problem = self.settings.problem(request)
            if problem:
                self.scheduler.rejected.append((sequence, problem))
            else:
                yield sequence

    # a round

    def _rounds(self, plan: RoundPlan, source: Iterator[Sequence | None]) -> Iterator[Completion]:
        """The planned round, and those after it that need no other plan.

        Another plan is needed where a text ends, or where one arrives that may be admitted.

        Each of these is queued before the tokens of the one before it are waited for.
        """
        queued: QueuedRound | None = self._queue(plan)
        while queued is not None:
            certain = self.runs_ahead and not self.scheduler.has_arrived(source)
            ahead = self._queue_ahead(queued) if certain else None
            done = self._finish(queued, ahead)
            self.scheduler.finish(list(done))
            queued = ahead if ahead is not None and any(ahead.plan.ready) else None
            yield from done.values()

    @torch.inference_mode()
    def _queue(self, plan: RoundPlan, before: SampledRound | None = None) -> QueuedRound:
        """Queue a round; `before` as in `Sampler.sample`."""
        started = time.perf_counter()
        rows = self.scheduler.running
        if before is None:
            self._prepare(plan, rows)
        sampled = self.sampler.sample(plan, rows, before)
        self.counts.rounds += 1
        packed = HostCopy(sampled.packed())
        return QueuedRound(plan, rows, sampled, packed, started, before is not None)

    def _queue_ahead(self, queued: QueuedRound) -> QueuedRound | None:
        """The round after this one, where its plan is certain unless a text ends."""
        # what is looked up follows from tokens that the host does not have
        most = self.policy.most + 1 if len(self.models) > 1 else 1
        plan = self.scheduler.following(queued.plan, queued.sampled.width, most)
        if plan is None:
            return None
        if self._wants_plain():
            plan = replace(plan, width=1)
        elif plan.width == 1:
            return None
        self.counts.ahead += 1
        return self._queue(plan, queued.sampled)

    @torch.inference_mode()
    def _finish(self, queued: QueuedRound, ahead: QueuedRound | None) -> dict[int, Completion]:
        """Wait for a round's tokens and append them. The texts that end, by row.

        `ahead`: the round that is queued after it, whose plan is corrected.
        """
        for context, chunks in enumerate(queued.plan.chunks):
            for chunk in chunks:
                queued.rows[chunk.row].cached[context] += len(chunk.ids)
        done = self._emit(queued, ahead)
        finished = time.perf_counter()
        if self.policy.most and queued.sampled.settled and not any(queued.plan.chunks):
            self._observe(queued, finished)
        self._finished = finished
        return done

    def _observe(self, queued: QueuedRound, finished: float) -> None:
        """Tell the policy what a round without prompt tokens has cost."""
        sampled, rows = queued.sampled, len(queued.rows)
        started = max(queued.started, self._finished)
        all_ready = all(queued.plan.ready)
        if queued.plan.width == 1 and self._plain_differs:
            if queued.ahead == self.runs_ahead and all_ready:
                self.policy.observe_plain(rows, finished - started)
            return
        if queued.ahead and not all_ready:
            return  # after a text has ended others may have used the time
        *drafting, verification = sampled.stopwatch.laps()
        rest = finished - started - sum(drafting) - verification
        self.policy.observe_round(sampled.width, rows, sum(drafting), verification, rest)

    def _prepare(self, plan: RoundPlan, rows: list[Sequence]) -> None:
        """Move rows, and give them room for this round, and for one that is queued ahead."""
        for model in self.models:
            for source, target in plan.moves:
                model.move(source, target, rows[target])
        width = plan.width
        if self.runs_ahead and self.memory.fits(plan.lengths, 2 * width):
            width *= 2
        for i in self.memory.reservations(plan.lengths, width):
            self.models[i].cache.make_room(plan.lengths, width)

    # from tensors to completions

    def _emit(self, queued: QueuedRound, ahead: QueuedRound | None) -> dict[int, Completion]:
        """Give every ready row its tokens. The copy to the host is the only wait for a GPU."""
        plan, rows, sampled = queued.plan, queued.rows, queued.sampled
        packed = queued.packed.wait().reshape(len(rows), sampled.width, -1)
        tokens = packed[:, :, 1].astype(np.int64)
        drawing = Drawing(
            tokens=tokens,
            drafts=packed[:, :-1, 0].astype(np.int64),
            bad=packed[:, :, 2] + packed[:, :, 3] > 0,
            stops=self._is_stop[tokens],
            left=plan.left,
        )
        emission = Emission.of(drawing, plan.ready)
        if ahead is not None:
            ahead.plan = ahead.plan.begun(sampled.width - emission.counts, emission.ended)
        self._learn(sampled, drawing, emission, plan.ready)
        self._extend(plan, rows, drawing, emission, packed[:, :, 4:])
        self._keep_captured(sampled, rows, emission)
        done = {}
        for row, reason in emission.ended.items():
            error = self._error(rows[row], packed[row]) if reason == "error" else ""
            if not (error and self._recomputes(row, rows[row])):
                done[row] = self._completion(rows[row], reason, error)
        return done

    def _extend(
        self,
        plan: RoundPlan,
        rows: list[Sequence],
        drawing: Drawing,
        emission: Emission,
        trace: Float[np.ndarray, "rows width fields"],
    ) -> None:
        """Append tokens and their diagnostics, and count what the caches now hold."""
        texts = drawing.tokens.tolist()
        trace = np.ascontiguousarray(trace)
        view, per_token = trace.data.cast("B"), trace.strides[1]
        ends = (emission.counts * per_token).tolist()
        cached = (plan.lengths + emission.counts[:, None] - 1).tolist()
        counts, per_row = emission.counts.tolist(), trace.strides[0]
        for row, sequence in enumerate(rows):
            if plan.ready[row]:
                first = row * per_row
                sequence.outputs[0].extend(texts[row][: counts[row]])
                sequence.trace += view[first : first + ends[row]]
                sequence.cached = cached[row]

    def _recomputes(self, row: int, sequence: Sequence) -> bool:
        """Clear a row with bad logits. Whether it is computed again, without drafts.

        A draft that is not in the text may have put NaN into its caches. If the text itself is the
        cause, the next round shows it.
        """
        for model in self.models:
            model.clear(row)
        if not self.policy.most or sequence.lockstep:
            return False
        sequence.lockstep = True
        sequence.evict()
        return True

    def _error(self, sequence: Sequence, packed: Float[np.ndarray, "width fields"]) -> str:
        """Which model's logits were bad, at the place after the text."""
        [student, teacher] = packed[packed[:, 2:4].any(1).argmax(), 2:4].astype(bool).tolist()
        return bad_logits_message(len(sequence.output), student, teacher)

    def _keep_captured(
        self, sampled: SampledRound, rows: list[Sequence], emission: Emission
    ) -> None:
        captured = self._captured(sampled)
        if not captured:
            return
        for row, count in enumerate(emission.counts.tolist()):
            first = row * sampled.width
            for i in range(first, first + count):
                rows[row].captured.append({name: x[i] for name, x in captured.items()})

    def _captured(self, sampled: SampledRound) -> dict[str, Tensor]:
        """What `capture` and `top_tokens` ask for, on the host: a row per token."""
        if not self.settings.capture:
            return self._top_tokens(sampled)
        pairs = zip(self.settings.roles, sampled.logits, strict=True)
        made = {f"{role}_logits": logits.flatten(0, 1) for role, logits in pairs}
        if sampled.step.log_q is not None:
            made["log_q"] = sampled.step.log_q
        kept = {name: x.float().cpu() for name, x in made.items() if name in self.settings.capture}
        return kept | self._top_tokens(sampled)

    def _top_tokens(self, sampled: SampledRound) -> dict[str, Tensor]:
        settings = self.settings
        if not settings.top_tokens:
            return {}
        logits = [each.flatten(0, 1) for each in sampled.logits]
        ids, log_p = top_tokens(logits, sampled.step, settings.mixture, settings.top_tokens)
        return {"top_ids": ids.cpu(), "top_log_p": log_p.to(torch.float16).cpu()}

    def _learn(
        self, sampled: SampledRound, drawing: Drawing, emission: Emission, ready: list[bool]
    ) -> None:
        """Count drafts and tell the policy which were accepted.

        Drafts after a rejection or after the end of the completion tell nothing.
        """
        count = sampled.width - 1
        if not count:
            return
        self.counts.drafted += count * sum(ready)
        places, emitted = np.arange(count), emission.counts[:, None]
        accepted = drawing.accepted
        tried = places < emitted  # none of a row that is not ready
        self.counts.accepted += int((accepted & (places + 1 < emitted)).sum())
        self.policy.observe_drafts(np.stack(sampled.confidences, 1), accepted, tried)

    def _completion(self, sequence: Sequence, reason: FinishReason, error: str) -> Completion:
        trace = np.frombuffer(sequence.trace, np.float32).reshape(-1, len(TRACE_FIELDS))
        columns = zip(TRACE_FIELDS, map(tuple, trace.T.tolist()), strict=True)
        names = sequence.captured[0] if sequence.captured else {}
        return Completion(
            request=sequence.request,
            token_ids=tuple(sequence.output),
            finish_reason=reason,
            trace=TokenTrace(dict(columns)),
            error=error,
            seconds=time.perf_counter() - sequence.started,
            captured={name: torch.stack([c[name] for c in sequence.captured]) for name in names},
        )
