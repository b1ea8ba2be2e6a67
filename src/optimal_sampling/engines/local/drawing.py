"""The tensors of a round: logits of both models at every position of its width, and the tokens that follow.

A round of width n: the student makes n one-token forwards over its last token and its own n - 1 drafts; the teacher
makes one forward over the same n tokens; from both rows of logits follows q*, and from q* and the noise the token, at
each of the n positions. What is emitted ends with the first token that differs from its draft. Width 1 is plain
decoding. A draft is argmax(log p_student + noise) with the noise of its position, so it is the token itself wherever
q* and the student agree on the argmax.

Where both roles have the same weights there is no cheaper drafter: drafts are looked up in the text, and both contexts
of all n tokens are one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from optimal_sampling.config import LocalOptions, MixtureConfig
from optimal_sampling.distribution import NoiseKeys, Step, draft, gumbel, keys_tensor, step
from optimal_sampling.distribution.fused import runs_fused
from optimal_sampling.distribution.single import single_step
from optimal_sampling.engines.local.clock import Clock
from optimal_sampling.engines.local.drafting import DraftPolicy, PerRound
from optimal_sampling.engines.local.lane import Lane
from optimal_sampling.engines.local.overlap import Overlap
from optimal_sampling.engines.local.scheduler import Round, Sequence
from optimal_sampling.engines.local.transfer import to_device

__all__ = ["Drawer", "Drawn", "RunSetting"]

BLOCK = 2**22
"""Most numbers of noise that are made ahead."""


@dataclass(frozen=True, slots=True)
class RunSetting:
    """What a run needs to know beside its models."""

    roles: tuple[str, ...]
    """Name of each context: `student` and `teacher`, or one of them alone."""
    mixture: MixtureConfig
    options: LocalOptions
    stop_ids: frozenset[int]
    vocab_size: int
    context_lengths: tuple[int | None, ...]
    """Per context."""
    embeddings: tuple[int, ...]
    """Per context, the number of ids that its model knows."""
    memory: int
    """Bytes for the caches."""
    pages: int | None
    """Pages per cache; None: caches of slots."""
    positions: int
    """Most tokens whose logits are held at once."""
    capture: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What a round's tensors hold before they are copied to the host."""

    drafts: Int64[Tensor, "rows drafts"]
    step: Step
    """Rows * width tokens, row by row."""
    captured: dict[str, Float[Tensor, "tokens vocab"]]
    confidences: Seq[Seq[float]]
    """Per draft and row, how sure the drafter was."""
    clock: Clock
    """Two laps: all drafter steps, and the verification."""

    @property
    def width(self) -> int:
        """Positions per row."""
        return self.drafts.shape[1] + 1

    def packed(self) -> Float32[Tensor, "tokens columns"]:
        """The draft of every position, 0 at a row's last, before `Step.pack`: one copy to the host."""
        drafts = torch.nn.functional.pad(self.drafts, (0, 1)).reshape(-1, 1)
        return torch.cat([drafts.to(torch.float32), self.step.pack()], 1)


class Noise:
    """Gumbel noise of a round's positions, made at once where it is small; where a kernel makes it, only its keys."""

    def __init__(self, rows: list[Sequence], width: int, vocab: int, device: torch.device) -> None:
        self._keys = to_device(keys_tensor([s.request.noise_key for s in rows]).numpy(), device)
        self._first = to_device(np.array([len(s.output) for s in rows]), device)
        self._vocab = vocab
        self._by_kernel = runs_fused(device)
        self._made: list[Float32[Tensor, "rows vocab"]] = []
        if not self._by_kernel and width > 1 and len(rows) * width * vocab <= BLOCK:
            keys, positions = self._keys.repeat(width), self.positions(width).T.reshape(-1)
            self._made = list(gumbel(keys, positions, vocab).view(width, len(rows), vocab))

    def positions(self, width: int) -> Int64[Tensor, "rows width"]:
        """Of the tokens in their completions."""
        return self._first[:, None] + torch.arange(width, device=self._first.device)

    def at(self, offset: int) -> Float32[Tensor, "rows vocab"] | NoiseKeys:
        """Noise of every row's next token but `offset`."""
        if self._by_kernel:
            return NoiseKeys(self._keys, self._first + offset)
        return self._tensor_at(offset)

    def _tensor_at(self, offset: int) -> Float32[Tensor, "rows vocab"]:
        while len(self._made) <= offset:
            self._made.append(gumbel(self._keys, self._first + len(self._made), self._vocab))
        return self._made[offset]

    def upto(self, width: int) -> Float32[Tensor, "tokens vocab"] | NoiseKeys:
        """Noise of rows * width tokens, row by row."""
        if self._by_kernel:
            return NoiseKeys(self._keys.repeat_interleave(width), self.positions(width).reshape(-1))
        if width == 1:
            return self._tensor_at(0)
        return torch.stack([self._tensor_at(i) for i in range(width)], 1).flatten(0, 1)


class Drawer:
    """Draws the tokens of rounds. `policy` says how far to draft; it is told what drafting cost."""

    def __init__(self, lanes: list[Lane], setting: RunSetting, policy: DraftPolicy) -> None:
        self.lanes = lanes
        self.setting = setting
        self.policy = policy
        self.device = lanes[0].runner.device
        self.overlap = Overlap(self.device)

    def draw(self, plan: Round, rows: list[Sequence]) -> Drawn:
        """One round, without touching the sequences."""
        noise = Noise(rows, plan.width, self.setting.vocab_size, self.device)
        if len(self.lanes) == 2:
            if (
                self.overlap.works and self.policy.most == 0
            ):  # else the policy has to know what each model costs
                return self._side_by_side(plan, rows, noise)
            return self._with_student(plan, rows, noise)
        return self._at_once(plan, rows, noise)

    def _with_student(self, plan: Round, rows: list[Sequence], noise: Noise) -> Drawn:
        """The student steps and drafts while that pays, then the teacher verifies."""
        student, teacher = self.lanes
        clock = Clock(self.device)
        expected = PerRound(self.policy, plan.ready)
        forced = self.policy.forced()
        drafts = torch.empty(len(rows), 0, dtype=torch.int64, device=self.device)
        logits: list[Float[Tensor, "rows vocab"]] = []
        while True:
            logits.append(student.forward(plan, rows, drafts[:, -1:], offset=len(logits))[0][:, 0])
            if len(logits) == plan.width or len(logits) == forced:
                break
            token = draft(logits[-1], noise.at(len(logits) - 1), self.setting.mixture)
            if not expected.wants(self._confidence(logits[-1], token), insist=forced is not None):
                break
            drafts = torch.cat([drafts, token[:, None]], 1)
        clock.mark()
        [teacher_logits] = teacher.forward(plan, rows, drafts)
        clock.mark()
        return self._finish(
            (torch.stack(logits, 1), teacher_logits), drafts, noise, expected.confidences, clock
        )

    def _side_by_side(self, plan: Round, rows: list[Sequence], noise: Noise) -> Drawn:
        """One position, for which neither model waits for the other."""
        student, teacher = self.lanes
        drafts = torch.empty(len(rows), 0, dtype=torch.int64, device=self.device)
        clock = Clock(self.device)
        with self.overlap.beside():
            [teacher_logits] = teacher.forward(plan, rows, drafts)
        [student_logits] = student.forward(plan, rows, drafts)
        clock.mark()
        self.overlap.join()
        clock.mark()
        return self._finish((student_logits, teacher_logits), drafts, noise, [], clock)

    def _confidence(
        self, logits: Float[Tensor, "rows vocab"], token: Int64[Tensor, " rows"]
    ) -> list[float]:
        """The student's probability of its drafts. On a GPU it would cost a synchronisation each: one class for all."""
        if self.device.type != "cpu":
            return [0.95] * len(token)
        scaled = logits.float().numpy() * np.float32(1 / self.setting.mixture.temperature)
        with np.errstate(all="ignore"):
            others = np.exp(scaled - np.take_along_axis(scaled, token.numpy()[:, None], -1)).sum(-1)
            sure: list[float] = np.nan_to_num(1 / others).tolist()
        return sure

    def _at_once(self, plan: Round, rows: list[Sequence], noise: Noise) -> Drawn:
        """One model: both contexts of the last token and of what was looked up, in one forward pass."""
        clock = Clock(self.device)
        width = self.policy.forced() or plan.width
        found, confidences = self._looked_up(plan, rows, min(width, plan.width) - 1)
        drafts = to_device(np.array(found, dtype=np.int64).reshape(len(rows), -1), self.device)
        clock.mark()
        logits = self.lanes[0].forward(plan, rows, drafts)
        clock.mark()
        return self._finish(tuple(logits), drafts, noise, confidences, clock)

    def _looked_up(
        self, plan: Round, rows: list[Sequence], most: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Drafts of equal length for every row; rows with fewer are filled up with what will be rejected."""
        if most < 1:
            return [[] for _ in rows], []
        pairs = zip(rows, plan.ready, strict=True)
        found = [
            self._shared_ids(s.lookup.propose(s.output, most)) if ready else []
            for s, ready in pairs
        ]
        expected = PerRound(self.policy, plan.ready)
        insist = self.policy.forced() is not None
        for i in range(max(map(len, found))):
            if not expected.wants(
                [self.LOOKED_UP if i < len(f) else 0.0 for f in found], insist=insist
            ):
                break
        assert all(0 <= token < self.setting.vocab_size for f in found for token in f)
        filled = [(f + [0] * expected.drafted)[: expected.drafted] for f in found]
        return filled, [list(c) for c in expected.confidences]

    def _shared_ids(self, ids: list[int]) -> list[int]:
        """Up to the first id that cannot be drawn: a prompt may hold ids outside the shared vocabulary."""
        return list(takewhile(lambda token: token < self.setting.vocab_size, ids))

    LOOKED_UP = 0.85
    """Class of confidence of a draft that was looked up."""

    def _finish(
        self,
        logits: tuple[Float[Tensor, "rows width vocab"], ...],
        drafts: Int[Tensor, "rows drafts"],
        noise: Noise,
        confidences: Seq[Seq[float]],
        clock: Clock,
    ) -> Drawn:
        """From logits to tokens."""
        setting, width = self.setting, drafts.shape[1] + 1
        flat = [x.flatten(0, 1) for x in logits]
        captured = {f"{role}_logits": x for role, x in zip(setting.roles, flat, strict=True)}
        if len(flat) == 1:
            drawn = single_step(flat[0], noise.upto(width), setting.mixture, setting.roles[0])
        else:
            positions = noise.positions(width).reshape(-1)
            keep = "log_q" in setting.capture
            drawn = step(
                flat[0], flat[1], noise.upto(width), positions, setting.mixture, keep_log_q=keep
            )
            if drawn.log_q is not None:
                captured["log_q"] = drawn.log_q
        return Drawn(drafts, drawn, captured, confidences, clock)
