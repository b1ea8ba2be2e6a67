"""An engine of two tables: the logits of the next token are a row chosen by the last token.

It needs no model, and all its distributions can be written down, which tests use.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from optimal_sampling.config import MixtureConfig, ModelConfig, ToyOptions
from optimal_sampling.distribution import gumbel, keys_tensor, single_step, step
from optimal_sampling.engines.base import Engine, bad_logits_message, prompt_problem
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Completion, FinishReason, Mode, Request, TokenTrace
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["ToyEngine"]


class ToyEngine(Engine):
    """`student_logits` and `teacher_logits`: row i holds the logits of the token after token i.

    `context_length`: longest sequence, prompt included.
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
                f"tables of shapes {[*student_logits.shape]} and "
                f"{[*teacher_logits.shape]} do not fit"
            )
        self.tables = {"student": student_logits.float(), "teacher": teacher_logits.float()}
        self.options = ToyOptions()
        self.mixture = mixture
        self.mode: Mode = "mixture"
        self.vocab_size = student_logits.shape[-1]
        self.stop_ids = stop_ids
        self.context_length = context_length

    @classmethod
    def load(
        cls,
        models: ModelConfig,
        mixture: MixtureConfig,
        options: ToyOptions,
        vocabulary: Vocabulary,
        mode: Mode = "mixture",
    ) -> ToyEngine:
        """Random tables over the vocabulary. The two models give their tokenizers only."""
        engine = cls.random(mixture, vocabulary.size, vocabulary.stop_ids)
        engine.vocabulary = vocabulary
        return engine.view(mode=mode, options=options)

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

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """One request after the other."""
        for request in requests:
            if request is None:
                continue
            started = time.perf_counter()
            prompts = [request.prompt_ids(role) for role in self.roles]
            contexts = [self.context_length] * len(prompts)
            rows = [self.vocab_size] * len(prompts)
            problem = prompt_problem(self.roles, prompts, contexts, rows)
            if problem:
                yield Completion.failed(request, problem)
                continue
            tokens, values, reason, error = self._decode(request)
            trace = TokenTrace.from_rows(values)
            seconds = time.perf_counter() - started
            yield Completion(request, tuple(tokens), reason, trace, error, seconds)

    def _decode(
        self, request: Request
    ) -> tuple[list[int], list[tuple[float, ...]], FinishReason, str]:
        tokens: list[int] = []
        rows: list[tuple[float, ...]] = []
        prompts = {role: request.prompt_ids(role) for role in self.roles}
        last = {role: prompt[-1] for role, prompt in prompts.items()}
        longest = max(map(len, prompts.values()))
        keys = keys_tensor([request.noise_key])
        while len(tokens) < request.max_new_tokens and longest + len(tokens) < self.context_length:
            position = torch.tensor([len(tokens)])
            noise = gumbel(keys, position, self.vocab_size)
            logits = [self.tables[role][token][None] for role, token in last.items()]
            if self.mode == "mixture":
                drawn = step(logits[0], logits[1], noise, position, self.mixture)
            else:
                drawn = single_step(logits[0], noise, self.mixture, self.mode)
            values = drawn.pack()[0].tolist()
            token, bad_student, bad_teacher = map(int, values[:3])
            if bad_student or bad_teacher:
                error = bad_logits_message(len(tokens), bad_student, bad_teacher)
                return tokens, rows, "error", error
            tokens.append(token)
            rows.append(tuple(values[3:]))
            last = dict.fromkeys(last, token)
            if token in self.stop_ids:
                return tokens, rows, "stop", ""
        return tokens, rows, "length", ""
