"""The contract of engines. `tests/engines/conformance.py` is the suite that every engine passes."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Self, get_args

from optimal_sampling.config import EngineOptions, MixtureConfig
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Completion, Mode, Request, WorkerStatus

if TYPE_CHECKING:
    from optimal_sampling.vocabulary import Vocabulary

__all__ = ["Engine", "bad_logits_message", "prompt_problem"]


class Engine(ABC):
    """Two models and a mixture; requests in, completions out as they finish.

    What every engine promises:

    - One completion per request, in the order of finishing, never two and never none.
    - The tokens of a completion are a function of its request, the mixture and the two models: not
      of the other requests, their order, or the batch size.
    - Requests are pulled from the iterable only as there is room, so an endless iterable is fine.
    - A request that cannot be served (a prompt longer than the context, NaN logits) gives a
      completion with `finish_reason="error"` that says why; the others go on.
    - A None among the requests says that none is waiting now. The engine goes on with what it has
      and asks again, or ends where it has nothing.
    - Closing the iterator gives up what is in flight. The engine can then be used again.
    - A completion ends with the first id of `stop_ids` ("stop") or after `max_new_tokens` tokens,
      or where the context of one of the models is full ("length").

    One `generate` at a time. `EngineError` is raised where no request can go on.
    """

    modes: ClassVar[frozenset[Mode]] = frozenset(get_args(Mode))
    """Modes that this engine has."""
    captures: ClassVar[frozenset[str]] = frozenset()
    """Names of the rows per token that this engine can keep in `Completion.captured`."""

    options: EngineOptions
    """Options in use; of the class that belongs to this engine."""
    mixture: MixtureConfig
    """Temperature, top-k and top-p hold in every mode, the rest in the mode `mixture`."""
    mode: Mode
    """What tokens are drawn from."""
    capture: frozenset[str] = frozenset()
    """Rows that are kept per token, by name."""
    vocabulary: Vocabulary | None = None
    """Of the two models; None where an engine was made without tokenizers."""
    vocab_size: int
    """Number of token ids that both models share; all ids drawn are below it."""
    stop_ids: frozenset[int]
    """Ids that end a completion: the union over both models."""

    @abstractmethod
    def generate(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """Serve the requests; yields completions as they finish."""

    @property
    def rounds(self) -> int | None:
        """Rounds of the latest `generate` so far, which show that it goes on; None: not counted.

        May be read from another thread.
        """
        return None

    @property
    def roles(self) -> tuple[str, ...]:
        """The models that take part, in the order of their contexts."""
        return ("student", "teacher") if self.mode == "mixture" else (self.mode,)

    def view(
        self,
        mixture: MixtureConfig | None = None,
        mode: Mode | None = None,
        options: EngineOptions | None = None,
        capture: frozenset[str] = frozenset(),
    ) -> Self:
        """The same loaded models with other settings. Costs nothing, and changes nothing here.

        None keeps a setting; `capture` is empty unless given. Closing a view closes the models of
        all views. Raises ConfigError for a mode or a capture that the engine does not have, and for
        options that were fixed when the models were loaded.
        """
        view = copy.copy(self)
        view.mixture = mixture or self.mixture
        view.mode = mode or self.mode
        view.options = options or self.options
        view.capture = capture
        view._check_settings(self.options)
        return view

    def _check_settings(self, loaded: EngineOptions) -> None:
        if self.mode not in self.modes:
            raise ConfigError(
                f"the engine {loaded.name} has no mode {self.mode!r}; it has: "
                f"{', '.join(sorted(self.modes))}"
            )
        unknown = self.capture - self.captures
        if unknown:
            raise ConfigError(
                f"cannot capture {', '.join(sorted(unknown))}; the engine {loaded.name} has: "
                f"{', '.join(sorted(self.captures)) or 'nothing to capture'}"
            )
        if type(self.options) is not type(loaded):
            raise ConfigError(f"options of the engine {self.options.name} given to {loaded.name}")
        for name in sorted(loaded.fixed):
            before, now = getattr(loaded, name), getattr(self.options, name)
            if now != before:
                raise ConfigError(
                    f"{name} was {before!r} when the models were loaded and cannot become {now!r}; "
                    "open another engine"
                )

    def workers(self) -> Sequence[WorkerStatus]:
        """The workers that share the work of this engine; none where it does its own."""
        return ()

    def watch(self, tick: Callable[[], None]) -> None:  # noqa: B027 - having no workers is valid
        """Have a function called about once a second while workers are waited for."""

    def notes(self) -> dict[str, str]:
        """How this engine runs on this machine (device, attention, fallbacks), by name."""
        return {}

    def close(self) -> None:  # noqa: B027 - having nothing to free is a valid answer
        """Free models and memory. Closing twice is safe."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def prompt_problem(
    roles: Sequence[str],
    prompts: Sequence[Sequence[int]],
    contexts: Sequence[int | None],
    rows: Sequence[int],
) -> str:
    """Why prompts cannot be served: empty, too long, ids without an embedding. "" if they can.

    `rows`: number of embeddings of each model; ids of a prompt may lie beyond the shared ones.
    """
    for role, prompt, limit, known in zip(roles, prompts, contexts, rows, strict=True):
        if not prompt:
            return f"the {role}'s prompt has no tokens"
        if limit is not None and len(prompt) >= limit:
            return f"the {role}'s prompt has {len(prompt)} tokens, and its context holds {limit}"
        if not 0 <= min(prompt) <= max(prompt) < known:
            return f"the {role}'s prompt has token ids outside its vocabulary of {known}"
    return ""


def bad_logits_message(position: int, bad_student: object, bad_teacher: object) -> str:
    """Error message of a request whose logits at a position define no distribution."""
    names = [name for name, bad in (("student", bad_student), ("teacher", bad_teacher)) if bad]
    return (
        f"the {' and the '.join(names)} gave logits with NaN, +inf or nothing but -inf "
        f"at token {position}"
    )
