"""Our engines as a model of lm-evaluation-harness, for `lm_eval.simple_evaluate`.

    with load(ModelConfig(student=MODEL, teacher=MODEL), mode="student") as engine:
        simple_evaluate(
            EngineLM(engine),
            tasks=["optimal_sampling_gsm8k"],
            task_manager=TaskManager(include_path=TASKS),
            apply_chat_template=True,
        )

The command line `lm_eval` takes the tasks (`--include_path`) and models of its own; it cannot load
this one. Importing this module imports lm-eval.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optimal_sampling.config import MixtureConfig, PromptConfig
from optimal_sampling.engines.base import Engine
from optimal_sampling.errors import (
    ConfigError,
    MissingDependencyError,
    PromptError,
    did_you_mean,
)
from optimal_sampling.prompts import PromptRenderer, RenderedPrompt
from optimal_sampling.types import Completion, Request, prompt_id

try:
    from lm_eval.api.model import LM
except ImportError as missing:
    raise MissingDependencyError(
        "the bridge needs lm-eval: pip install '.[eval]' in the folder of this package"
    ) from missing

__all__ = ["TASKS", "EngineLM"]

TASKS = str(Path(__file__).parent / "lm_eval_tasks")
"""Folder of the tasks `optimal_sampling_<benchmark>`, for `include_path`."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the most tokens of a completion, in lm-eval's order of precedence."""
_KNOWN = (*_LENGTHS, "until", "do_sample", "temperature", "top_p", "top_k")


@dataclass(frozen=True)
class _Settings:
    """How the completions of some requests are drawn."""

    mixture: MixtureConfig
    max_new_tokens: int
    until: tuple[str, ...]
    """Texts at which a completion is cut."""


class EngineLM(LM):  # type: ignore[misc]  # lm-eval has no types
    """The models of an engine, in the mode of the engine.

    With `apply_chat_template=True` prompts are rendered as by `generate`, with the options of
    `prompt`; otherwise they are plain text. `max_new_tokens` holds where a task does not say it.
    A prompt that fails counts as an empty completion, with a warning. Tasks that ask for the
    likelihood of given texts, or begin the answer themselves (`gen_prefix`), raise ConfigError.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: PromptConfig | None = None,
        *,
        seed: int = 0,
        max_new_tokens: int = 256,
    ) -> None:
        super().__init__()
        vocabulary = engine.vocabulary
        if vocabulary is None:
            raise ConfigError("this engine has no tokenizers; open it with optimal_sampling.load")
        self._engine = engine
        self._vocabulary = vocabulary
        self._seed = seed
        self._max_new_tokens = max_new_tokens
        self._chat = PromptRenderer(prompt or PromptConfig(), vocabulary)
        self._plain = PromptRenderer(PromptConfig(chat_template=False), vocabulary)
        self._rendered: dict[str, RenderedPrompt] = {}

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer whose chat template is applied."""
        return str(self._tokenizer.name_or_path)

    @property
    def _tokenizer(self) -> Any:
        return getattr(self._vocabulary, f"{self._engine.roles[0]}_tokenizer")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat template, which lm-eval writes into its log."""
        return str(self._tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation. Raises ConfigError where it ends with an answer."""
        if not add_generation_prompt or chat_history[-1]["role"] != "user":
            raise ConfigError(
                "tasks that begin the answer themselves (gen_prefix) are not possible"
            )
        prompt = self._chat.render({"messages": chat_history})
        is_teacher = self._engine.roles[0] == "teacher"
        text = prompt.teacher_text if is_teacher else prompt.student_text
        self._rendered[text] = prompt
        return text

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """One completion per request, in their order, cut at the first of the texts `until`.

        The k-th occurrence of a request is its sample k. Raises ConfigError for an option that the
        engine does not have.
        """
        settings = [self._settings(request.args[1]) for request in requests]
        texts = [""] * len(requests)
        failures: list[str] = []
        for group in dict.fromkeys(settings):
            places = [place for place, each in enumerate(settings) if each == group]
            contexts = [str(requests[place].args[0]) for place in places]
            completions = self._complete(contexts, group)
            for place, completion in zip(places, completions, strict=True):
                failures += [completion.error] if completion.error else []
                texts[place] = self._text(completion, group)
        self._warn_of(failures, len(requests))
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Raises ConfigError: an engine draws texts and does not score given ones."""
        raise ConfigError(
            f"{_task_of(requests)} asks for the likelihood of given texts, which the engines do "
            "not compute; take tasks with output_type generate_until"
        )

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Raises ConfigError, as `loglikelihood` does."""
        self.loglikelihood(requests)
        return []

    def _settings(self, options: Mapping[str, Any]) -> _Settings:
        """Greedy unless `do_sample` or, without it, a temperature above 0 says otherwise."""
        for name in options:
            if name not in _KNOWN:
                raise ConfigError(
                    f"unknown generation option {name!r}{did_you_mean(name, _KNOWN)}; "
                    f"there are: {', '.join(_KNOWN)}"
                )
        temperature = options.get("temperature")
        samples = options.get("do_sample")
        samples = bool(temperature) if samples is None else samples and temperature != 0
        drawn = {name: options[name] for name in ("top_p", "top_k") if name in options}
        lengths = [options[name] for name in _LENGTHS if options.get(name) is not None]
        until = options.get("until") or []
        return _Settings(
            mixture=replace(
                self._engine.mixture,
                temperature=float(temperature or 1) if samples else 1.0,
                **(drawn if samples else {"top_p": 1.0, "top_k": 1}),
            ),
            max_new_tokens=int(lengths[0]) if lengths else self._max_new_tokens,
            until=tuple(filter(None, [until] if isinstance(until, str) else until)),
        )

    def _complete(self, contexts: Sequence[str], settings: _Settings) -> list[Completion]:
        """One completion per context, in their order; a failed one says why."""
        jobs = [*self._jobs(contexts, settings.max_new_tokens)]
        done = {request.key: Completion.failed(request, error) for request, error in jobs}
        engine = self._engine.view(mixture=settings.mixture)
        for completion in engine.generate(request for request, error in jobs if not error):
            done[completion.request.key] = completion
        return [done[request.key] for request, _ in jobs]

    def _jobs(self, contexts: Iterable[str], max_new_tokens: int) -> Iterable[tuple[Request, str]]:
        """Requests, each with "" or the reason why its prompt cannot be served."""
        seen: Counter[str] = Counter()
        for place, context in enumerate(contexts):
            error, identity = "", f"prompt {place}"
            student: tuple[int, ...] = ()
            teacher: tuple[int, ...] = ()
            try:
                prompt = self._rendered.get(context) or self._plain.render_texts(context)
                identity = prompt_id(prompt.student_text, prompt.teacher_text)
                student, teacher = prompt.student_ids, prompt.teacher_ids
            except PromptError as reason:
                error = str(reason)
            sample = seen[identity]
            seen[identity] += 1
            yield Request(identity, sample, self._seed, student, teacher, max_new_tokens), error

    def _text(self, completion: Completion, settings: _Settings) -> str:
        if completion.error:
            return ""
        text = self._vocabulary.decode(completion.token_ids)
        for ending in settings.until:
            text = text.partition(ending)[0]
        return text

    def _warn_of(self, failures: Sequence[str], total: int) -> None:
        if failures:
            warnings.warn(
                f"{len(failures)} of {total} prompts failed and count as empty completions; "
                f"the first: {failures[0]}",
                stacklevel=3,
            )


def _task_of(requests: Sequence[Any]) -> str:
    """Name of the task that asks."""
    name = requests[0].task_name if requests else None
    return f"task {name}" if name else "a task"
