"""Two tabulated models over a handful of tokens: exact, instant, and every distribution can be written down.

The next token depends on the last one only: logits are a row of a table. Tests of the other parts use this engine,
and so can yours; it ships for that.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import gumbel, keys_tensor, step
from optimal_sampling.engines.base import Engine, bad_logits_message, prompt_problem
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Completion, FinishReason, Request, TokenTrace

__all__ = ["ToyEngine"]


class ToyEngine(Engine):
    """`student_logits` and `teacher_logits`: row i holds the logits of the token that follows token i.

    `context_length`: longest sequence, prompt included; a longer prompt is an error, as with real models.
    """

    def __init__(
        self,
        student_logits: Float[Tensor, "vocab vocab"],
        teacher_logits: Float[Tensor, "vocab vocab"],
        mixture: MixtureConfig,
        stop_ids: frozenset[int] = frozenset(),
        context_length: int = 4096,
    ) -> None:
        if student_logits.shape != teacher_logits.shape:
            raise ConfigError(
                f"tables of shapes {[*student_logits.shape]} and {[*teacher_logits.shape]} do not fit"
            )
        self.tables = {"student": student_logits.float(), "teacher": teacher_logits.float()}
        self.mixture = mixture
        self.vocab_size = student_logits.shape[-1]
        self.stop_ids = stop_ids
        self.context_length = context_length

    @classmethod
    def random(
        cls,
        mixture: MixtureConfig,
        vocab_size: int = 6,
        stop_ids: frozenset[int] = frozenset({0}),
        seed: int = 0,
        context_length: int = 4096,
    ) -> ToyEngine:
        """Tables of normal logits: the teacher's are the student's, sharper and disturbed."""
        generator = torch.Generator().manual_seed(seed)
        student = torch.randn(vocab_size, vocab_size, generator=generator)
        teacher = 1.5 * student + torch.randn(vocab_size, vocab_size, generator=generator)
        return cls(student, teacher, mixture, stop_ids, context_length)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """One request after the other."""
        for request in requests:
            started = time.perf_counter()
            prompts = (request.student_prompt_ids, request.teacher_prompt_ids)
            problem = prompt_problem(
                ("student", "teacher"), prompts, (self.context_length,) * 2, (self.vocab_size,) * 2
            )
            if problem:
                yield Completion(request, (), "error", TokenTrace.from_rows([]), problem)
                continue
            tokens, rows, reason, error = self._decode(request)
            seconds = time.perf_counter() - started
            yield Completion(
                request, tuple(tokens), reason, TokenTrace.from_rows(rows), error, seconds
            )

    def _decode(
        self, request: Request
    ) -> tuple[list[int], list[tuple[float, ...]], FinishReason, str]:
        tokens: list[int] = []
        rows: list[tuple[float, ...]] = []
        last = {
            "student": request.student_prompt_ids[-1],
            "teacher": request.teacher_prompt_ids[-1],
        }
        longest = max(len(request.student_prompt_ids), len(request.teacher_prompt_ids))
        keys = keys_tensor([request.noise_key])
        while len(tokens) < request.max_new_tokens and longest + len(tokens) < self.context_length:
            position = torch.tensor([len(tokens)])
            noise = gumbel(keys, position, self.vocab_size)
            student, teacher = (
                self.tables[role][last[role]][None] for role in ("student", "teacher")
            )
            values = step(student, teacher, noise, position, self.mixture).pack()[0].tolist()
            token, bad_student, bad_teacher = map(int, values[:3])
            if bad_student or bad_teacher:
                return (
                    tokens,
                    rows,
                    "error",
                    bad_logits_message(len(tokens), bad_student, bad_teacher),
                )
            tokens.append(token)
            rows.append(tuple(values[3:]))
            last = dict.fromkeys(last, token)
            if token in self.stop_ids:
                return tokens, rows, "stop", ""
        return tokens, rows, "length", ""
