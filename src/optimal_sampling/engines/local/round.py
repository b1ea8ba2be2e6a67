"""The tensors of a round: logits of both models at each of its positions, and the tokens drawn.

In a round of width n the student makes n one-token forward passes over the last token and its own
n - 1 drafts; the teacher makes one pass over the same n tokens. From both rows of logits follows
q*, and from q* and the noise the token, at each of the n positions. What is emitted ends with the
first token that differs from its draft. Width 1 is plain decoding. A draft is
argmax(log p_student + noise) with the noise of its position, so it is the token itself wherever q*
and the student agree on the argmax.

Where both roles have the same weights there is no cheaper drafter: drafts are looked up in the
text, and both contexts of all n tokens are one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import Drawn, draft, single_step, step
from optimal_sampling.engines.base import prompt_problem
from optimal_sampling.engines.device import Overlap, Stopwatch, to_device
from optimal_sampling.engines.local.drafting import DraftPolicy, PerRound
from optimal_sampling.engines.local.round_noise import RoundNoise
from optimal_sampling.engines.local.runner import CachedModel, Carried
from optimal_sampling.engines.local.scheduler import Limits, RoundPlan, Sequence
from optimal_sampling.types import Request

__all__ = ["RunSettings", "SampledRound", "Sampler"]


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Settings of one `generate` call."""

    roles: tuple[str, ...]
    """Name of each context: `student` and `teacher`, or one of them alone."""
    mixture: MixtureConfig
    limits: Limits
    stop_ids: frozenset[int]
    vocab_size: int
    embeddings: tuple[int, ...]
    """Per context, the number of ids that its model knows."""
    memory: int
    """Bytes for all caches."""
    capture: frozenset[str] = frozenset()
    top_tokens: int = 0
    """Of every token, how many of the likeliest are kept."""

    def problem(self, request: Request) -> str:
        """Why a request cannot be served, "" if it can."""
        prompts = [request.prompt_ids(role) for role in self.roles]
        return prompt_problem(self.roles, prompts, self.limits.context_lengths, self.embeddings)

    @property
    def keeps_logits(self) -> bool:
        """Whether logits are needed once the tokens are drawn."""
        return bool(self.capture) or self.top_tokens > 0

    @property
    def keeps_log_q(self) -> bool:
        """Whether q is needed of the whole vocabulary."""
        mixture = self.mixture
        follows_from_alpha = mixture.is_geometric and not mixture.has_support
        return "log_q" in self.capture or (self.top_tokens > 0 and not follows_from_alpha)


@dataclass(frozen=True, slots=True, eq=False)
class SampledRound:
    """Tensors of a round before they are copied to the host."""

    drafts: Int64[Tensor, "rows drafts"]
    logits: Seq[Float[Tensor, "rows width vocab"]]
    """Per context, at the drafts' positions and at the one after; none where nobody asked.

    The round after it may be queued while this one is not finished, and needs the memory.
    """
    step: Drawn
    """Rows * width tokens, row by row."""
    noise: RoundNoise
    confidences: Seq[Float[np.ndarray, " rows"]]
    """Per draft, the probability that the drafter gave it in each row; 0: there was none."""
    stopwatch: Stopwatch
    """Laps of the drafter, one for all or several; the last lap is both models' last passes."""
    settled: bool
    """The round cost what such rounds will always cost."""

    @property
    def width(self) -> int:
        """Positions per row."""
        return self.drafts.shape[1] + 1

    def carried(self) -> Carried:
        """What the next round of the same rows starts from, should no text end in this one."""
        if self.width == 1:
            return Carried(self.step.token, self.noise.first + 1)
        tokens = self.step.token.view(-1, self.width)
        accepted = tokens[:, :-1] == self.drafts
        drawn = accepted.cumprod(1).sum(1) + 1
        last = tokens.gather(1, drawn[:, None] - 1)[:, 0]
        return Carried(last, self.noise.first + drawn, behind=self.width - drawn)

    def packed(self) -> Float32[Tensor, "tokens columns"]:
        """Draft (0 at a row's last position), then `Drawn.pack`: one copy to the host."""
        drafts = torch.nn.functional.pad(self.drafts, (0, 1)).reshape(-1, 1)
        return torch.cat([drafts.to(torch.float32), self.step.pack()], 1)


class Sampler:
    """Draws the tokens of rounds. `policy` says how far to draft."""

    GPU_CONFIDENCE = 0.95
    """Of every draft on a GPU, where the probability itself would cost a synchronisation."""
    LOOKUP_CONFIDENCE = 0.85
    """Of every draft that was looked up."""

    def __init__(
        self, models: list[CachedModel], settings: RunSettings, policy: DraftPolicy
    ) -> None:
        self.models = models
        self.settings = settings
        self.policy = policy
        self.device = models[0].runner.device
        self.overlap = Overlap(self.device)
        self.measures_confidence = self.device.type == "cpu"
        """The drafter's probabilities are on the host, where the policy needs them."""

    def sample(
        self, plan: RoundPlan, rows: list[Sequence], before: SampledRound | None = None
    ) -> SampledRound:
        """One round. The sequences are left as they are.

        `before`: the round of the same rows whose tokens `rows` do not have yet.
        """
        if before is None:
            carried = None
            noise = RoundNoise.of(rows, plan.width, self.settings.vocab_size, self.device)
        else:
            carried = before.carried()
            noise = before.noise.following(carried.first, plan.width)
        if len(self.models) == 1:
            return self._with_lookup(plan, rows, noise, carried)
        if self.overlap.works:
            return self._side_by_side(plan, rows, noise, carried)
        return self._in_turn(plan, rows, noise, carried)

    def _in_turn(
        self, plan: RoundPlan, rows: list[Sequence], noise: RoundNoise, carried: Carried | None
    ) -> SampledRound:
        """The student steps and drafts while that pays, then the teacher verifies."""
        student, teacher = self.models
        stopwatch = Stopwatch(self.device)
        expected = PerRound(self.policy, plan.ready)
        forced = self.policy.forced()
        drafts = self._no_drafts(rows)
        steps: list[Float[Tensor, "rows vocab"]] = []
        settled = True
        while True:
            stopwatch.mark()
            [logits], lasting = student.forward(plan, rows, drafts[:, -1:], len(steps), carried)
            steps.append(logits[:, 0])
            settled &= lasting
            if len(steps) == plan.width or len(steps) == forced:
                break
            token = self._drafted(steps[-1], noise, len(steps) - 1)
            if not expected.wants(self._confidence(steps[-1], token), insist=forced is not None):
                break
            drafts = torch.cat([drafts, token[:, None]], 1)
        [verified], lasting = teacher.forward(plan, rows, drafts, carried=carried)
        stopwatch.mark()
        both = [torch.stack(steps, 1), verified]
        return SampledRound(
            drafts=drafts,
            logits=both if self.settings.keeps_logits else [],
            step=self._draw(both, noise),
            noise=noise,
            confidences=expected.confidences,
            stopwatch=stopwatch,
            settled=settled and lasting,
        )

    def _side_by_side(
        self, plan: RoundPlan, rows: list[Sequence], noise: RoundNoise, carried: Carried | None
    ) -> SampledRound:
        """The student drafts, then it reads its last draft while the teacher verifies all.

        How far it drafts is not known from its logits, so the last draft is known to be the last.
        """
        student, teacher = self.models
        stopwatch = Stopwatch(self.device)
        expected = PerRound(self.policy, plan.ready)
        drafts = self._no_drafts(rows)
        steps: list[Float[Tensor, "rows vocab"]] = []
        settled = True
        while self._wants_draft(expected, plan):
            [logits], lasting = student.forward(plan, rows, drafts[:, -1:], len(steps), carried)
            steps.append(logits[:, 0])
            settled &= lasting
            token = self._drafted(steps[-1], noise, len(steps) - 1)
            drafts = torch.cat([drafts, token[:, None]], 1)
        stopwatch.mark()
        with self.overlap.beside():
            [verified], verify_lasting = teacher.forward(plan, rows, drafts, carried=carried)
        [logits], lasting = student.forward(plan, rows, drafts[:, -1:], len(steps), carried)
        self.overlap.join()
        stopwatch.mark()
        both = [torch.stack([*steps, logits[:, 0]], 1), verified]
        return SampledRound(
            drafts=drafts,
            logits=both if self.settings.keeps_logits else [],
            step=self._draw(both, noise),
            noise=noise,
            confidences=expected.confidences,
            stopwatch=stopwatch,
            settled=settled and lasting and verify_lasting,
        )

    def _wants_draft(self, expected: PerRound, plan: RoundPlan) -> bool:
        """Whether one more token is drafted, before the student's step that gives it."""
        forced, width = self.policy.forced(), expected.drafted + 1
        if width in (plan.width, forced):
            return False
        confidences = np.full(len(plan.ready), self.GPU_CONFIDENCE)
        return expected.wants(confidences, insist=forced is not None)

    def _no_drafts(self, rows: list[Sequence]) -> Int64[Tensor, "rows drafts"]:
        return torch.empty(len(rows), 0, dtype=torch.int64, device=self.device)

    def _confidence(
        self, logits: Float[Tensor, "rows vocab"], token: Int64[Tensor, " rows"]
    ) -> Float[np.ndarray, " rows"]:
        """The student's probability of its drafts."""
        if not self.measures_confidence:
            return np.full(len(token), self.GPU_CONFIDENCE)
        scaled = logits.float().numpy() * np.float32(1 / self.settings.mixture.temperature)
        drafted = np.take_along_axis(scaled, token.numpy()[:, None], -1)
        with np.errstate(all="ignore"):
            confidences = 1 / np.exp(scaled - drafted).sum(-1)
        known: Float[np.ndarray, " rows"] = np.nan_to_num(confidences)
        return known

    def _with_lookup(
        self, plan: RoundPlan, rows: list[Sequence], noise: RoundNoise, carried: Carried | None
    ) -> SampledRound:
        """One model: the last token and what was looked up, in all contexts, in one pass."""
        stopwatch = Stopwatch(self.device)
        width = self.policy.forced() or plan.width
        found, confidences = self._looked_up(plan, rows, min(width, plan.width) - 1)
        drafts = to_device(np.array(found, dtype=np.int64).reshape(len(rows), -1), self.device)
        stopwatch.mark()
        logits, settled = self.models[0].forward(plan, rows, drafts, carried=carried)
        stopwatch.mark()
        return SampledRound(
            drafts=drafts,
            logits=logits if self.settings.keeps_logits else [],
            step=self._draw(logits, noise),
            noise=noise,
            confidences=confidences,
            stopwatch=stopwatch,
            settled=settled,
        )

    def _looked_up(
        self, plan: RoundPlan, rows: list[Sequence], most: int
    ) -> tuple[list[list[int]], list[Float[np.ndarray, " rows"]]]:
        """Drafts of equal number for every row, and their confidences.

        Rows with fewer get id 0 with confidence 0.
        """
        if most < 1:
            return [[] for _ in rows], []
        found = [
            self._shared_ids(s.lookup.propose(s.output, most)) if ready else []
            for s, ready in zip(rows, plan.ready, strict=True)
        ]
        expected = PerRound(self.policy, plan.ready)
        insist = self.policy.forced() is not None
        counts = np.array([len(ids) for ids in found])
        for i in range(counts.max()):
            sure = self.LOOKUP_CONFIDENCE * (counts > i)
            if not expected.wants(sure, insist=insist):
                break
        count = expected.drafted
        return [(ids + [0] * count)[:count] for ids in found], expected.confidences

    def _shared_ids(self, ids: list[int]) -> list[int]:
        """Up to the first id that no model shares, which cannot be drawn: prompts may hold them."""
        return list(takewhile(lambda token: token < self.settings.vocab_size, ids))

    def _drafted(
        self, logits: Float[Tensor, "rows vocab"], noise: RoundNoise, offset: int
    ) -> Int64[Tensor, " rows"]:
        """The student's draft for the token `offset` places after every row's next one."""
        return draft(logits, noise.at(offset), self.settings.mixture)

    def _draw(self, logits: Seq[Float[Tensor, "rows width vocab"]], noise: RoundNoise) -> Drawn:
        """From logits in order of contexts to tokens."""
        settings, width = self.settings, logits[0].shape[1]
        flat = [x.flatten(0, 1) for x in logits]
        if len(flat) == 1:
            return single_step(flat[0], noise.upto(width), settings.mixture, settings.roles[0])
        return step(
            flat[0],
            flat[1],
            noise.upto(width),
            noise.positions(width).reshape(-1),
            settings.mixture,
            keep_log_q=settings.keeps_log_q,
        )
