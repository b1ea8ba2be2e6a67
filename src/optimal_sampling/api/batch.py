"""Base class for lists of prompts: prompts to requests, completions to rows in prompt order."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from optimal_sampling.config import MixtureConfig, ModelConfig
from optimal_sampling.engines.base import Engine
from optimal_sampling.errors import ConfigError, EngineError, PromptError
from optimal_sampling.prompts import PromptRenderer, RenderedPrompt
from optimal_sampling.types import Completion, Request, prompt_id
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["MIXTURE_OPTIONS", "BatchSampler", "Row", "check_length", "prompt_lists", "taken"]

MIXTURE_OPTIONS = frozenset({"trust_region", "schedule_start", "schedule_end", "schedule_tokens"})
"""Fields of MixtureConfig that the constructors take as keyword arguments."""


@dataclass(slots=True)
class Row:
    """Result of one prompt: a completion, or the reason why there is none."""

    completion: Completion | None = None
    error: str = ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids of the completion, none where the prompt failed."""
        return self.completion.token_ids if self.completion else ()

    @property
    def finish_reason(self) -> str:
        """`stop`, `length` or `error`."""
        return self.completion.finish_reason if self.completion else "error"

    def trace(self, name: str) -> tuple[float, ...]:
        """A column of the completion's trace, empty where the prompt failed."""
        return self.completion.trace[name] if self.completion else ()


class BatchSampler:
    """Base class: two models loaded once, in an engine that a subclass opens as `_engine`."""

    vocabulary: Vocabulary
    """The token ids that both models share, and both tokenizers."""
    notes: dict[str, str]
    """How the models run on this machine: device, attention, fallbacks."""
    _engine: Engine
    _mixture: MixtureConfig

    def __init__(self, models: ModelConfig) -> None:
        self.vocabulary = Vocabulary.load(models.student, models.teacher, models.trust_remote_code)
        self._closed = False
        self._warned: set[str] = set()
        self._warn_once(self.vocabulary.notes, stacklevel=4)

    def close(self) -> None:
        """Free the models. Closing twice is safe; `generate` is then no longer possible."""
        self._closed = True
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
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

    def _sample(
        self,
        engine: Engine,
        renderer: PromptRenderer,
        prompts: Iterable[tuple[str, str]],
        seed: int,
        max_new_tokens: int,
    ) -> list[Row]:
        """One row per (student's, teacher's) prompts, in their order. Warns of failed prompts."""
        rendered = [_render(renderer, *pair) for pair in prompts]
        rows = [Row(error=prompt if isinstance(prompt, str) else "") for prompt in rendered]
        requests = _requests(rendered, seed, max_new_tokens)
        places = {(each.id, each.sample_index): place for place, each in requests.items()}
        for completion in engine.generate(requests.values()):
            row = rows[places[completion.request.id, completion.request.sample_index]]
            if completion.finish_reason == "error":
                row.error = completion.error
            else:
                row.completion = completion
        failed = [(place, row.error) for place, row in enumerate(rows) if row.error]
        if failed:
            place, error = failed[0]
            message = f"{len(failed)} of {len(rows)} prompts failed; prompt {place}: {error}"
            warnings.warn(message, stacklevel=3)
        return rows


def _render(renderer: PromptRenderer, student: str, teacher: str) -> RenderedPrompt | str:
    """Both prompts, or why there are none."""
    try:
        return renderer.render_texts(student, teacher)
    except PromptError as error:
        return str(error)


def _requests(
    rendered: Sequence[RenderedPrompt | str], seed: int, max_new_tokens: int
) -> dict[int, Request]:
    """Requests by place. The k-th occurrence of a prompt is its sample k."""
    seen: Counter[str] = Counter()
    requests = {}
    for place, prompt in enumerate(rendered):
        if isinstance(prompt, str):
            continue
        identity = prompt_id(prompt.student_text, prompt.teacher_text)
        requests[place] = Request(
            id=identity,
            sample_index=seen[identity],
            seed=seed,
            student_prompt_ids=prompt.student_ids,
            teacher_prompt_ids=prompt.teacher_ids,
            max_new_tokens=max_new_tokens,
        )
        seen[identity] += 1
    return requests


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
    given = [] if isinstance(prompts, str) else list(prompts)
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in given):
        raise ConfigError(f"{name} must be a list of strings")
    return given


def check_length(name: str, tokens: int) -> None:
    """Raise ConfigError unless `tokens`, the option `name`, is a number of tokens."""
    if not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"{name} must be a whole number, at least 1, got {tokens}")


def taken(kwargs: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """The keyword arguments of these names."""
    return {name: value for name, value in kwargs.items() if name in names}
