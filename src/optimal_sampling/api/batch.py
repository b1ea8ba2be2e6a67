"""Base class for lists of prompts: prompts to requests, completions to rows in prompt order."""

from __future__ import annotations

import math
import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from optimal_sampling.config import MixtureConfig, ModelConfig
from optimal_sampling.engines.base import Engine
from optimal_sampling.errors import ConfigError, EngineError, PromptError
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.types import Completion, Request, prompt_id
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["MIXTURE_OPTIONS", "BatchSampler", "prompt_lists", "taken", "whole_number"]

MIXTURE_OPTIONS = frozenset(
    {
        "trust_region",
        "schedule_start",
        "schedule_end",
        "schedule_tokens",
        "veto_min_p",
        "interleaved_top_k",
        "interleaved_min_p",
        "arithmetic_weight",
        "teacher_support_min_p",
    }
)
"""Fields of MixtureConfig that the constructors take as keyword arguments."""


class BatchSampler:
    """Base class: two models loaded once, in an engine that a subclass opens as `_engine`."""

    vocabulary: Vocabulary
    """The token ids that both models share, and both tokenizers."""
    notes: dict[str, str]
    """How the models run on this machine: device, attention, fallbacks."""
    _engine: Engine
    _mixture: MixtureConfig

    def __init__(self, models: ModelConfig) -> None:
        self.vocabulary = Vocabulary.load(
            models.student,
            models.teacher,
            models.trust_remote_code,
            revisions=models.revisions,
            granularity=models.granularity,
        )
        self._closed = False
        self._warned: set[str] = set()
        self._warn_once(self.vocabulary.notes, stacklevel=4)

    def close(self) -> None:
        """Free the models. Closing twice is safe; `generate` is then no longer possible."""
        self._closed = True
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"this {type(self).__name__} is closed; make a new one")

    def _warn_once(self, notes: Sequence[str], stacklevel: int) -> None:
        """Warn of each note once, at the line of the caller's code that `stacklevel` leads to."""
        for note in notes:
            if note not in self._warned:
                self._warned.add(note)
                warnings.warn(note, stacklevel=stacklevel)

    def _mixture_of_call(
        self, temperature: float, top_p: float, top_k: int, force_first_token: bool
    ) -> MixtureConfig:
        return replace(
            self._mixture,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            force_first_token=force_first_token,
        )

    def _text(self, completion: Completion) -> str:
        """Text of a completion, without its special tokens."""
        if completion.byte_level is not None:
            return completion.byte_level.text
        return self.vocabulary.decode(completion.token_ids)

    def _sample(
        self,
        engine: Engine,
        renderer: PromptRenderer,
        prompts: Iterable[tuple[str, str]],
        seed: int,
        max_new_tokens: int,
    ) -> list[Completion]:
        """One per (student's, teacher's) prompts, in their order; of no tokens where one failed.

        Warns of failed prompts.
        """
        jobs = list(_requests(renderer, prompts, seed, max_new_tokens))
        results = {request.key: Completion.failed(request, error) for request, error in jobs}
        for completion in engine.generate(request for request, error in jobs if not error):
            request = completion.request
            if completion.error:
                completion = Completion.failed(request, completion.error)
            results[request.key] = completion
        rows = [results[request.key] for request, _ in jobs]
        failed = [(place, row.error) for place, row in enumerate(rows) if row.error]
        if failed:
            place, error = failed[0]
            message = f"{len(failed)} of {len(rows)} prompts failed; prompt {place}: {error}"
            warnings.warn(message, stacklevel=3)
        return rows


def _requests(
    renderer: PromptRenderer, prompts: Iterable[tuple[str, str]], seed: int, max_new_tokens: int
) -> Iterator[tuple[Request, str]]:
    """Requests, each with "" or the reason why its prompt cannot be rendered.

    The k-th occurrence of a prompt is its sample k.
    """
    seen: Counter[str] = Counter()
    for place, (student, teacher) in enumerate(prompts):
        error = ""
        identity = f"prompt {place}"
        student_ids: tuple[int, ...] = ()
        teacher_ids: tuple[int, ...] = ()
        try:
            prompt = renderer.render_texts(student, teacher)
            identity = prompt_id(prompt.student_text, prompt.teacher_text)
            student_ids, teacher_ids = prompt.student_ids, prompt.teacher_ids
        except PromptError as reason:
            error = str(reason)
        yield (
            Request(identity, seen[identity], seed, student_ids, teacher_ids, max_new_tokens),
            error,
        )
        seen[identity] += 1


def prompt_lists(
    prompts: Iterable[str], others: Iterable[str] | None, name: str
) -> tuple[list[str], list[str]]:
    """`prompts` and the other model's prompts, `name`, as lists of one length.

    Generators are read once. Without `others` both lists are `prompts`. Raises ConfigError.
    """
    own = _listed("prompts", prompts)
    other = own if others is None else _listed(name, others)
    if len(own) != len(other):
        raise ConfigError(
            f"there are {len(own)} prompts but {len(other)} {name}; give one of each per row"
        )
    return own, other


def _listed(name: str, prompts: Iterable[str]) -> list[str]:
    """The prompts as a list. A single string is refused: it would be one prompt per letter."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise ConfigError(f"{name} must be a list of strings, got {prompts!r}")
    given = list(prompts)
    if not all(isinstance(prompt, str) for prompt in given):
        raise ConfigError(f"{name} must be a list of strings")
    return given


def whole_number(name: str, value: Any, least: float = -math.inf) -> int:
    """The value of the option `name` as an int. Raises ConfigError."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} must be a whole number, got {value!r}") from None
    if number < least:
        raise ConfigError(f"{name} must be at least {least}, got {number}")
    return number


def taken(kwargs: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """The keyword arguments of these names."""
    return {name: value for name, value in kwargs.items() if name in names}
