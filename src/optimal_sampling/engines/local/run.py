"""One `generate` call: requests become sequences, rounds extend them, and ended ones completions.

Every cache holds all but the last token of a row, so giving up drafts is not counting them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.distribution import top_tokens
from optimal_sampling.engines.base import bad_logits_message, prompt_problem
from optimal_sampling.engines.local.drafting import DraftPolicy, Lookup
from optimal_sampling.engines.local.memory import KVMemory
from optimal_sampling.engines.local.round import RunSettings, SampledRound, Sampler
from optimal_sampling.engines.local.runner import CachedModel
from optimal_sampling.engines.local.scheduler import RoundPlan, Scheduler, Sequence
from optimal_sampling.types import Completion, FinishReason, Request, TokenTrace

__all__ = ["DraftCounts", "GenerationLoop"]


@dataclass(slots=True)
class DraftCounts:
    """What speculation did in one `generate` call."""

    rounds: int = 0
    drafted: int = 0
    """Tokens drafted for rows that were decoding."""
    accepted: int = 0
    """Of these, tokens of a completion after which the round went on."""


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
        self.memory = KVMemory([model.cache.manager for model in models], settings.memory)
        self.scheduler = Scheduler(settings.limits, self.memory)

    def completions(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Serve the requests in rounds."""
        source = self._admissible(requests)
        while True:
            plan = self.scheduler.next_round(source, self.policy.most + 1)
            for sequence, reason in self.scheduler.rejected:
                yield self._completion(sequence, "error", reason)
            self.scheduler.rejected.clear()
            if plan is not None:
                yield from self._round(plan)
            elif not self.scheduler.waiting:
                return

    def close(self) -> None:
        """Free the caches."""
        for model in self.models:
            model.cache.release()

    def _admissible(self, requests: Iterable[Request]) -> Iterator[Sequence]:
        """Requests as sequences, without those that no model's context can hold."""
        settings = self.settings
        contexts, embeddings = settings.limits.context_lengths, settings.embeddings
        for request in requests:
            prompts = {"student": request.student_prompt_ids, "teacher": request.teacher_prompt_ids}
            sequence = Sequence(request, tuple(prompts[role] for role in settings.roles))
            if self.policy.most:
                sequence.lookup = Lookup(sequence.prompts)
            problem = prompt_problem(settings.roles, sequence.prompts, contexts, embeddings)
            if problem:
                self.scheduler.rejected.append((sequence, problem))
            else:
                yield sequence

    # a round

    @torch.inference_mode()
    def _round(self, plan: RoundPlan) -> list[Completion]:
        started = time.perf_counter()
        rows = self.scheduler.running
        self._prepare(plan, rows)
        sampled = self.sampler.sample(plan, rows)
        self.counts.rounds += 1
        for context, chunks in enumerate(plan.chunks):
            for chunk in chunks:
                rows[chunk.row].cached[context] += len(chunk.ids)
        done = self._emit(plan, rows, sampled)
        if sampled.settled and not any(plan.chunks):
            drafting, verification = sampled.stopwatch.laps()
            rest = time.perf_counter() - started - drafting - verification
            self.policy.observe_round(sampled.width, len(rows), drafting, verification, rest)
        return done

    def _prepare(self, plan: RoundPlan, rows: list[Sequence]) -> None:
        """Move rows, and give them room for this round."""
        for model in self.models:
            for source, target in plan.moves:
                model.move(source, target, rows[target])
        for i in self.memory.reservations(plan.lengths, plan.width):
            self.models[i].cache.make_room(plan.lengths, plan.width)

    # from tensors to completions

    def _emit(
        self, plan: RoundPlan, rows: list[Sequence], sampled: SampledRound
    ) -> list[Completion]:
        """Give every ready row its tokens. The copy to the host is the only wait for a GPU."""
        width = sampled.width
        packed = sampled.packed().cpu().numpy().reshape(len(rows), width, -1)
        drafts, packed = packed[:, :-1, 0].astype(np.int64), packed[:, :, 1:]
        captured = self._captured(sampled)
        done = []
        for row, sequence in enumerate(rows):
            if not plan.ready[row]:
                continue
            before = len(sequence.output)
            reason, error = self._extend(sequence, packed[row], drafts[row])
            emitted = len(sequence.output) - before
            self._learn(sampled, row, packed[row, :, 0], drafts[row], emitted)
            first = row * width
            for i in range(first, first + emitted if captured else first):
                sequence.captured.append({name: x[i] for name, x in captured.items()})
            sequence.cached = [known - 1 for known in sequence.lengths]
            for model in self.models if error else ():
                model.clear(row)
            if error and self.policy.most and not sequence.lockstep:
                # a draft that is not in the text may have put NaN into its caches: recompute it,
                # and go on without drafts; if the text itself is the cause, the next round shows it
                sequence.lockstep = True
                sequence.evict()
            elif reason is not None:
                done.append((row, self._completion(sequence, reason, error)))
        self.scheduler.finish([row for row, _ in done])
        return [completion for _, completion in done]

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
        self,
        sampled: SampledRound,
        row: int,
        tokens: Float[np.ndarray, " width"],
        drafts: Int[np.ndarray, " drafts"],
        emitted: int,
    ) -> None:
        """Count drafts and tell the policy which were accepted.

        Drafts after a rejection or after the end of the completion tell nothing.
        """
        self.counts.drafted += len(drafts)
        for i in range(min(len(drafts), emitted)):
            accepted = bool(tokens[i] == drafts[i])
            self.counts.accepted += accepted and i + 1 < emitted
            if sampled.confidences[i][row] > 0:
                self.policy.accept.observe(sampled.confidences[i][row], accepted)
            if not accepted:
                return

    def _extend(
        self,
        sequence: Sequence,
        packed: Float[np.ndarray, "width fields"],
        drafts: Int[np.ndarray, " drafts"],
    ) -> tuple[FinishReason | None, str]:
        """Append tokens up to the first that differs from its draft, or that ends the completion.

        Returns how the completion ended, if it did, and the error if it ended with one.
        """
        output = sequence.output
        for i, values in enumerate(packed):
            token, bad_student, bad_teacher = map(int, values[:3])
            if bad_student or bad_teacher:
                return "error", bad_logits_message(len(output), bad_student, bad_teacher)
            output.append(token)
            sequence.trace.append(values[3:])
            if token in self.settings.stop_ids:
                return "stop", ""
            if len(output) >= sequence.request.max_new_tokens or self._context_full(sequence):
                return "length", ""
            if i < len(drafts) and token != drafts[i]:
                break
        return None, ""

    def _context_full(self, sequence: Sequence) -> bool:
        pairs = zip(sequence.lengths, self.settings.limits.context_lengths, strict=True)
        return any(limit is not None and known >= limit for known, limit in pairs)

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
