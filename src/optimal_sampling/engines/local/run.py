"""One call of `generate`: requests become sequences, rounds extend them, and those that end become completions.

Both caches hold all but the last token of a row, so giving up drafts is not advancing a length.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float, Int

from optimal_sampling.engines.base import bad_logits_message, prompt_problem
from optimal_sampling.engines.local.drafting import DraftPolicy, Lookup
from optimal_sampling.engines.local.drawing import Drawer, Drawn, RunSetting
from optimal_sampling.engines.local.lane import Lane, grow_slots
from optimal_sampling.engines.local.paged.cache import PAGE
from optimal_sampling.engines.local.scheduler import Limits, Round, Scheduler, Sequence
from optimal_sampling.types import Completion, FinishReason, Request, TokenTrace

__all__ = ["Run"]


class Run:
    """The state of one `generate` call."""

    def __init__(
        self, lanes: list[Lane], setting: RunSetting, policy: DraftPolicy, drawer: Drawer
    ) -> None:
        self.lanes = lanes
        self.setting = setting
        self.policy = policy
        self.drawer = drawer
        self.rounds = self.drafted = self.accepted = 0
        self.scheduler = Scheduler(
            Limits(
                rows=setting.options.batch_size,
                prefill_chunk=setting.options.prefill_chunk,
                memory=setting.memory,
                caches=tuple(lane.spec for lane in lanes),
                context_lengths=setting.context_lengths,
                positions=setting.positions,
                pages=setting.pages,
                page=PAGE,
                kv_boundary=min(
                    (r for lane in lanes if (r := lane.runner.rules.kv_boundary)), default=None
                ),
                round_length=lambda length: max(
                    lane.runner.rules.slot_length(length) for lane in lanes
                ),
            )
        )

    def completions(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Serve the requests in rounds."""
        refused: list[Completion] = []
        source = self._admissible(requests, refused)
        while True:
            plan = self.scheduler.next_round(source, self.policy.width)
            yield from self._rejected()
            yield from refused
            refused.clear()
            if plan is not None:
                yield from self._round(plan)
            elif not self.scheduler.waiting:
                return

    def _admissible(
        self, requests: Iterable[Request], refused: list[Completion]
    ) -> Iterator[Sequence]:
        """Requests as sequences; those that no model's context can hold go to `refused` instead."""
        for request in requests:
            prompts = {"student": request.student_prompt_ids, "teacher": request.teacher_prompt_ids}
            sequence = Sequence(request, tuple(prompts[role] for role in self.setting.roles))
            sequence.evict()
            if self.policy.width > 1:
                sequence.lookup = Lookup(sequence.prompts)
            setting = self.setting
            problem = prompt_problem(
                setting.roles, sequence.prompts, setting.context_lengths, setting.embeddings
            )
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
        started = time.perf_counter()
        rows = self.scheduler.running
        self._prepare(plan, rows)
        for lane in self.lanes:
            lane.runner.settled = True
        drawn = self.drawer.draw(plan, rows)
        self.rounds += 1
        for context, chunks in enumerate(plan.chunks):
            for chunk in chunks:
                rows[chunk.slot].cached[context] += len(chunk.ids)
        done = self._emit(plan, rows, drawn)
        if not any(plan.chunks) and all(lane.runner.settled for lane in self.lanes):
            steps, verification = drawn.clock.laps()
            rest = time.perf_counter() - started - steps - verification
            self.policy.observe_round(drawn.width, len(rows), steps, verification, rest)
        return done

    def _prepare(self, plan: Round, rows: list[Sequence]) -> None:
        """Move rows, and give them room for this round."""
        for lane in self.lanes:
            for source, target in plan.moves:
                lane.move(source, target, rows)
        if self.setting.pages is None:
            grow_slots(self.lanes, plan.slots, plan.lengths, self.setting.memory)
            return
        for lane in self.lanes:
            lane.make_room(rows, plan.width)

    # from tensors to completions

    def _emit(self, plan: Round, rows: list[Sequence], drawn: Drawn) -> list[Completion]:
        """Hand every ready row its tokens. The copy to the host is the round's one synchronisation."""
        packed = drawn.packed().cpu().numpy().reshape(len(rows), drawn.width, -1)
        drafts, packed = packed[:, :-1, 0].astype(np.int64), packed[:, :, 1:]
        kept = {
            name: drawn.captured[name].float().cpu()
            for name in self.setting.capture
            if name in drawn.captured
        }
        done = []
        for row, sequence in enumerate(rows):
            if not plan.ready[row]:
                continue
            reason, error = self._extend(sequence, packed[row], drafts[row])
            emitted = sequence.known(0) - 1 - sequence.cached[0]
            self._learn(drawn, row, packed[row, :, 0], drafts[row], emitted)
            for i in range(emitted if kept else 0):
                sequence.captured.append(
                    {name: values[row * drawn.width + i] for name, values in kept.items()}
                )
            sequence.cached = [sequence.known(c) - 1 for c in range(len(sequence.prompts))]
            if reason is not None:
                done.append((row, self._completion(sequence, reason, error)))
            if error:
                for lane in self.lanes:
                    lane.clear(row)
        self.scheduler.finish([row for row, _ in done])
        return [completion for _, completion in done]

    def _learn(
        self,
        drawn: Drawn,
        row: int,
        tokens: Float[np.ndarray, " width"],
        drafts: Int[np.ndarray, " drafts"],
        emitted: int,
    ) -> None:
        """Count drafts and tell the policy which were accepted; those after a rejection or an end tell nothing."""
        self.drafted += len(drafts)
        for i in range(min(len(drafts), emitted)):
            accepted = bool(tokens[i] == drafts[i])
            self.accepted += accepted and i + 1 < emitted
            if drawn.confidences[i][row] > 0:
                self.policy.observe_draft(drawn.confidences[i][row], accepted)
            if not accepted:
                return

    def _extend(
        self,
        sequence: Sequence,
        packed: Float[np.ndarray, "width fields"],
        drafts: Int[np.ndarray, " drafts"],
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
            if len(sequence.output) >= sequence.request.max_new_tokens or self._context_full(
                sequence
            ):
                return "length", ""
            if i < len(drafts) and token != drafts[i]:
                break
        return None, ""

    def _context_full(self, sequence: Sequence) -> bool:
        limits = enumerate(self.setting.context_lengths)
        return any(
            limit is not None and sequence.known(context) >= limit for context, limit in limits
        )

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
