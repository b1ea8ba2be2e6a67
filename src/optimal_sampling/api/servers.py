"""`EnhancedDualVLLMCoordinator`: lists of prompts for two models behind servers, asynchronously.

In names of arguments and outputs, `theta` is the student and `t` the teacher.
"""

from __future__ import annotations

import asyncio
import math
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from optimal_sampling.api.batch import prompt_lists, whole_number
from optimal_sampling.config import DraftTokens, MixtureConfig, ServersOptions
from optimal_sampling.engines.servers.drafting import DraftWidth
from optimal_sampling.engines.servers.engine import (
    check_text,
    check_whole,
    close_models,
    served_models,
    start_models,
)
from optimal_sampling.engines.servers.mixing import DrawnToken, ListMixer, check_mixture
from optimal_sampling.engines.servers.model import ServedModel
from optimal_sampling.engines.servers.probe import check_tokenizers
from optimal_sampling.engines.servers.row import OnToken, ServedPair
from optimal_sampling.errors import ConfigError, EngineError, ServerError
from optimal_sampling.types import AlphaMethod, Completion, Request, prompt_id
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["CoordinatorResult", "EnhancedCoordinatorConfig", "EnhancedDualVLLMCoordinator"]

_UNKNOWN_VOCABULARY = 1 << 31
_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""How the bytes of a character are decoded, where its last ones are in a token to come."""
_HISTORIES = {
    "kl_theta_history": "kl_student_restricted",
    "kl_t_history": "kl_teacher_restricted",
    "ess_theta_history": "ess_student",
    "ess_t_history": "ess_teacher",
    "entropy_history": "entropy",
    "covered_theta_history": "covered_student",
    "covered_t_history": "covered_teacher",
    "tv_bound_history": "tv_bound",
}
"""Fields of a result, and what they are called in a TokenTrace."""


_OWN_NAMES = {
    "student_url": "theta_url",
    "teacher_url": "t_url",
    "student_model": "theta_model",
    "teacher_model": "t_model",
    "student_api_key_env": "theta_api_key_env",
    "teacher_api_key_env": "t_api_key_env",
    "student_api_key_file": "theta_api_key_file",
    "teacher_api_key_file": "t_api_key_file",
    "server_top_k": "top_k",
    "batch_size": "max_concurrent_requests",
    "server_timeout": "request_timeout",
    "server_retry_seconds": "retry_seconds",
    "teacher_support_top_p": "target_top_p",
    "teacher_support_top_k": "target_top_k",
}
"""Options of the engine and of the mixture, and what the config here calls them."""


@dataclass(frozen=True)
class EnhancedCoordinatorConfig:
    """Where the servers are, and the distribution of every token. Raises ConfigError.

    `theta_url` and `t_url`: an address, or several of servers of the same model.
    """

    theta_url: str | Sequence[str] = "http://localhost:9000"
    t_url: str | Sequence[str] = "http://localhost:9001"
    top_k: int = 20
    """Likeliest tokens to ask each server for."""
    force_first_token: bool = True
    """Draw the first token from the teacher alone."""
    constraint_to_target: bool = True
    """Restrict both models to the teacher's nucleus of the mass `target_top_p`."""
    target_top_p: float = 0.95
    target_top_k: int = -1
    """With `constraint_to_target`, also to the teacher's k likeliest tokens; -1: off."""
    alpha_method: AlphaMethod = "kl_symmetry"
    fixed_alpha: float = 0.5
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    temperature: float = 1.0
    tokenizer: str | None = None
    """Folder or hub id of both models' tokenizer; None: the servers encode and decode."""
    theta_model: str | None = None
    """Name at the server; None: the only model that it has."""
    t_model: str | None = None
    theta_api_key_env: str | None = None
    """Environment variable with the API key."""
    t_api_key_env: str | None = None
    theta_api_key_file: str | None = None
    """File with the API key, in place of a variable."""
    t_api_key_file: str | None = None
    tv_tolerance: float | None = None
    """Ask for more tokens where q may be further than this from the exact one (docs/servers.md)."""
    draft_tokens: DraftTokens = "auto"
    max_concurrent_requests: int = 100
    """Most prompts in progress at once."""
    request_timeout: float = 60.0
    """Seconds after which an answer is no longer waited for."""
    retry_seconds: float = 300.0
    """Seconds during which a request that a server does not answer is sent again."""

    def __post_init__(self) -> None:
        if not isinstance(self.tokenizer, str | None):
            raise ConfigError(f"tokenizer must be a folder or a hub id, got {self.tokenizer!r}")
        try:
            mixture, options = self.mixture, self.options
        except ConfigError as error:
            name, _, problem = str(error).partition(" ")
            raise ConfigError(f"{_OWN_NAMES.get(name, name)} {problem}") from error
        if options.server_top_k != -1:
            check_mixture(mixture)

    @classmethod
    def conservative(cls, **changes: Any) -> Self:
        """Strong guidance by the teacher: its nucleus of 90%."""
        return cls(**{"target_top_p": 0.90, **changes})

    @classmethod
    def balanced(cls, **changes: Any) -> Self:
        """The recommended one: the teacher's nucleus of 95%."""
        return cls(**{"target_top_p": 0.95, **changes})

    @classmethod
    def exploratory(cls, **changes: Any) -> Self:
        """More diversity: neither a first token of the teacher's nor its nucleus."""
        return cls(**{"force_first_token": False, "constraint_to_target": False, **changes})

    @property
    def mixture(self) -> MixtureConfig:
        """The distribution of every token."""
        support: dict[str, Any] = {}
        if self.constraint_to_target:
            support["teacher_support_top_p"] = self.target_top_p
            support["teacher_support_top_k"] = self.target_top_k
        return MixtureConfig(
            alpha_method=self.alpha_method,
            fixed_alpha=self.fixed_alpha,
            alpha_min=self.alpha_min,
            alpha_max=self.alpha_max,
            temperature=self.temperature,
            force_first_token=self.force_first_token,
            **support,
        )

    @property
    def options(self) -> ServersOptions:
        """Options of the engine."""
        return ServersOptions(
            student_url=_addresses("theta_url", self.theta_url),
            teacher_url=_addresses("t_url", self.t_url),
            student_model=self.theta_model,
            teacher_model=self.t_model,
            student_api_key_env=self.theta_api_key_env,
            teacher_api_key_env=self.t_api_key_env,
            student_api_key_file=self.theta_api_key_file,
            teacher_api_key_file=self.t_api_key_file,
            server_top_k=self.top_k,
            tv_tolerance=self.tv_tolerance,
            draft_tokens=self.draft_tokens,
            batch_size=self.max_concurrent_requests,
            server_timeout=self.request_timeout,
            server_retry_seconds=self.retry_seconds,
        )


def _addresses(name: str, given: str | Sequence[str]) -> tuple[str, ...]:
    addresses = (given,) if isinstance(given, str) else given
    if not isinstance(addresses, list | tuple) or not addresses:
        raise ConfigError(f"{name} must be an address, or a list of them, got {given!r}")
    return tuple(addresses)


@dataclass(frozen=True)
class CoordinatorResult:
    """One completion. Histories have a number per token."""

    generated_text: str
    """Without the token that ended it, and what follows a stop string."""
    generated_ids: list[int]
    """The token that ended it included."""
    alpha_history: list[float]
    """The teacher's weight."""
    finish_reason: str
    """`stop`, `length` or `error`."""
    error: str = ""
    """Why the prompt failed."""
    kl_theta_history: list[float] = field(default_factory=list)
    """KL(q || p_theta), nats, with p_theta restricted to the teacher's nucleus where both are. This
    and all below with `return_diagnostics`."""
    kl_t_history: list[float] = field(default_factory=list)
    """KL(q || p_t), likewise."""
    ess_theta_history: list[float] = field(default_factory=list)
    ess_t_history: list[float] = field(default_factory=list)
    ess_ratio_history: list[float] = field(default_factory=list)
    """ess_t / ess_theta; above 1 where q is closer to the teacher."""
    entropy_history: list[float] = field(default_factory=list)
    covered_theta_history: list[float] = field(default_factory=list)
    """The student's mass in its list."""
    covered_t_history: list[float] = field(default_factory=list)
    tv_bound_history: list[float] = field(default_factory=list)
    """The most that the total variation between q and the exact q can be."""

    def without_diagnostics(self) -> CoordinatorResult:
        """With `alpha_history` alone of the histories."""
        empty: dict[str, Any] = {name: [] for name in (*_HISTORIES, "ess_ratio_history")}
        return replace(self, **empty)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, that which ended the text included."""
        return len(self.generated_ids)


class _Coder:
    """Texts to ids and back, by a tokenizer or by the servers; and the ids that end a text."""

    def __init__(self, models: Mapping[str, ServedModel], tokenizer: str | None) -> None:
        self.models = models
        self.vocabulary = Vocabulary.load(tokenizer, tokenizer) if tokenizer else None
        self.stop_ids: frozenset[int] = frozenset()
        self.size = _UNKNOWN_VOCABULARY

    async def start(self) -> None:
        """Compare the tokenizers of a started pair. Raises TokenizerMismatchError, ServerError."""
        facts = [model.facts for model in self.models.values()]
        if self.vocabulary is not None:
            await check_text(self.models, self.vocabulary)
            self.stop_ids, self.size = self.vocabulary.stop_ids, self.vocabulary.size
            return
        await check_tokenizers(self.models)
        self.stop_ids = frozenset().union(*(each.stop_ids for each in facts))
        self.size = min([each.vocab_size for each in facts if each.vocab_size] or [self.size])

    def rows(self) -> dict[str, int | None]:
        """Number of ids of the models that may have more than the vocabulary; None: unknown."""
        if self.size == _UNKNOWN_VOCABULARY:
            return {}
        return {role: model.facts.vocab_size for role, model in self.models.items()}

    async def encode(self, role: str, text: str) -> tuple[int, ...]:
        """Ids of a prompt."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ServerError(
                f"the {role}'s prompt holds half a character (a lone surrogate): {error}"
            ) from error
        if self.vocabulary is None:
            return tuple(await self.models[role].tokenize(text))
        tokenizer = self.vocabulary.student_tokenizer
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    async def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        if self.vocabulary is None:
            return await self.models["teacher"].detokenize(ids)
        return self.vocabulary.decode(ids)


class _Text:
    """The text of a completion in progress, cut at stop strings."""

    def __init__(self, coder: _Coder, stop: Sequence[str]) -> None:
        self.coder = coder
        self.stop_ids = coder.stop_ids
        self.stop = stop
        self.ids: list[int] = []
        self.text = ""
        self.has_ended = False

    async def take(self, drawn: DrawnToken) -> bool:
        """One more token; whether the text has ended."""
        ids = [*self.ids, drawn.token]
        await self._set(ids, is_whole=drawn.token in self.stop_ids)
        return self.has_ended

    async def finish(self, ids: Sequence[int]) -> None:
        """All tokens of a text that has ended."""
        await self._set(ids, is_whole=True)

    async def _set(self, ids: Sequence[int], *, is_whole: bool) -> None:
        self.ids = [token for token in ids if token not in self.stop_ids]
        text = await self.coder.decode(self.ids) if self.ids else ""
        known = text if is_whole else text.rstrip(_HALF_CHARACTER)
        places = [known.find(stop) for stop in self.stop if stop in known]
        self.has_ended = is_whole or bool(places)
        self.text = text[: min(places)] if places else text

    @property
    def settled(self) -> str:
        """What later tokens cannot change."""
        if self.has_ended:
            return self.text
        text = self.text.rstrip(_HALF_CHARACTER)
        longest = max(map(len, self.stop), default=1)
        for length in range(min(longest, len(text) + 1) - 1, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop):
                return text[:-length]
        return text


class EnhancedDualVLLMCoordinator:
    """Asks two servers, mixes what they say, and draws. An asynchronous context manager.

    Raises ConfigError, EngineError where a server does not answer at the start,
    TokenizerMismatchError.
    """

    def __init__(self, config: EnhancedCoordinatorConfig) -> None:
        if not isinstance(config, EnhancedCoordinatorConfig):
            raise ConfigError(f"config must be an EnhancedCoordinatorConfig, got {config!r}")
        self.config = config
        self._models: dict[str, ServedModel] = {}
        self._pair: ServedPair | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._prompts = self._failed = 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Connect to both servers, and compare their tokenizers. Raises EngineError where they are
        connected."""
        if self._loop is not None:
            raise EngineError("the coordinator is connected already: close it, or make another one")
        options = self.config.options
        self._models = served_models(options, "mixture")
        self._loop = asyncio.get_running_loop()
        try:
            self._coder = _Coder(self._models, self.config.tokenizer)
            await start_models(self._models)
            await self._coder.start()
            if options.server_top_k == -1:
                check_whole(self._models, self._coder.size)
        except ServerError as error:
            await self.close()
            raise EngineError(
                f"prompts are texts, which the servers have to encode: {error}"
            ) from error
        except BaseException:
            await self.close()
            raise
        self._pair = self._new_pair(options)

    def _new_pair(self, options: ServersOptions) -> ServedPair:
        student, teacher = self._models["student"].facts, self._models["teacher"].facts
        coder = self._coder
        can_draft = student.can_draft and teacher.scoring is not None
        return ServedPair(
            models=self._models,
            mixer=ListMixer(self.config.mixture, "mixture", coder.size, coder.rows()),
            top_k=options.server_top_k,
            tolerance=options.tv_tolerance,
            stop_ids=coder.stop_ids,
            contexts={"student": student.context_length, "teacher": teacher.context_length},
            rows=dict.fromkeys(self._models, coder.size),
            width=DraftWidth(options.draft_tokens, can_draft),
        )

    async def close(self) -> None:
        """Close the connections. Closing twice is safe."""
        self._check_loop()
        self._loop = self._pair = None
        await close_models(self._models)

    def _check_loop(self) -> None:
        """Raises EngineError in another event loop than that of the connections."""
        if self._loop not in (None, asyncio.get_running_loop()):
            raise EngineError(
                "the coordinator was connected in another event loop: use it within one "
                "asyncio.run(...), or one `async with`"
            )

    @property
    def pair(self) -> ServedPair:
        """The two models. Raises EngineError where they are not connected."""
        if self._pair is None:
            raise EngineError(
                "the coordinator is not connected: use `async with` or `await start()`"
            )
        return self._pair

    async def generate_batch_dual_prompts(
        self,
        prompts_theta: Sequence[str],
        prompts_t: Sequence[str] | None = None,
        max_tokens: int = 100,
        return_diagnostics: bool = False,
        *,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[CoordinatorResult]:
        """One result per prompt, in their order; `prompts_t` where the teacher's differ.

        A text ends before the first of the strings `stop`. Equal prompts give different texts. A
        prompt that fails has an `error`, and there is a warning. Raises ConfigError, and
        EngineError where a server is gone and no prompt is finished.
        """
        student, teacher = prompt_lists(prompts_theta, prompts_t, "prompts_t")
        jobs = _numbered(student, teacher, whole_number("seed", seed))
        length = whole_number("max_tokens", max_tokens, least=1)
        stops = _listed("stop", stop)
        _ = self.pair
        self._check_loop()
        room = asyncio.Semaphore(self.config.max_concurrent_requests)

        async def completed(job: _Job) -> CoordinatorResult:
            async with room:
                text = _Text(self._coder, stops)
                on_token = text.take if stops else None
                return await self._completed(job, length, text, on_token)

        results = await _finished([asyncio.ensure_future(completed(job)) for job in jobs])
        failed = [(place, each.error) for place, each in enumerate(results) if each.error]
        self._count(len(results), len(failed))
        if failed:
            place, error = failed[0]
            message = f"{len(failed)} of {len(results)} prompts failed; prompt {place}: {error}"
            warnings.warn(message, stacklevel=2)
        return results if return_diagnostics else [each.without_diagnostics() for each in results]

    async def generate_stream(
        self,
        prompt_theta: str,
        prompt_t: str | None = None,
        max_tokens: int = 100,
        *,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> AsyncIterator[str]:
        """The text of one completion in pieces, as its tokens are drawn.

        Leaving the loop gives the rest up. Raises ConfigError, ServerError where the prompt fails.
        """
        teachers = None if prompt_t is None else [prompt_t]
        student, teacher = prompt_lists([prompt_theta], teachers, "prompt_t")
        [job] = _numbered(student, teacher, whole_number("seed", seed))
        length = whole_number("max_tokens", max_tokens, least=1)
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        _ = self.pair
        self._check_loop()
        text = _Text(self._coder, _listed("stop", stop))
        sent = 0

        async def on_token(drawn: DrawnToken) -> bool:
            nonlocal sent
            has_ended = await text.take(drawn)
            settled = text.settled
            pieces.put_nowait(settled[sent:])
            sent = len(settled)
            return has_ended

        work = asyncio.ensure_future(self._completed(job, length, text, on_token))
        work.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                if piece:
                    yield piece
            result = await work
            if result.error:
                raise ServerError(result.error)
            if len(text.text) > sent:
                yield text.text[sent:]
        finally:
            work.cancel()

    def get_statistics(self) -> dict[str, Any]:
        """Prompts, tokens, rounds, bounds; by model the servers that are left out, with the reason,
        and requests, retries, errors, latencies."""
        counts = self.pair.counts
        names = {"student": "theta", "teacher": "t"}
        models = self.pair.models.items()
        return {
            "prompts": self._prompts,
            "failed_prompts": self._failed,
            "success_rate": 1 - self._failed / self._prompts if self._prompts else math.nan,
            "tokens": counts.tokens,
            "rounds": counts.rounds,
            "tokens_per_round": counts.tokens / counts.rounds if counts.rounds else math.nan,
            "drafted_tokens": counts.drafted,
            "accepted_tokens": counts.accepted,
            "longer_lists": counts.asked_again,
            "tv_bound_mean": counts.mean_bound,
            "tv_bound_max": counts.largest_bound,
            "left_out": {names[role]: model.left_out() for role, model in models},
            **{names[role]: model.figures() for role, model in models},
        }

    def _count(self, prompts: int, failed: int) -> None:
        self._prompts += prompts
        self._failed += failed

    async def _completed(
        self, job: _Job, length: int, text: _Text, on_token: OnToken | None
    ) -> CoordinatorResult:
        """One prompt from text to text."""
        try:
            ids = [await self._coder.encode(*each) for each in job.prompts.items()]
            request = Request(job.id, job.sample_index, job.seed, ids[0], ids[1], length)
            done = await self.pair.complete(request, on_token)
            if not text.has_ended:
                await text.finish(done.token_ids)
        except ServerError as failure:
            return CoordinatorResult("", [], [], "error", str(failure))
        return _result(done, text.text)


async def _finished(tasks: Sequence[asyncio.Task[CoordinatorResult]]) -> list[CoordinatorResult]:
    """All results. Where a server is gone, what is finished is kept and the others are given up;
    raises EngineError where nothing is."""
    try:
        return await asyncio.gather(*tasks)
    except EngineError as error:
        lost = CoordinatorResult("", [], [], "error", str(error))
        ended = [task.done() and not task.cancelled() and not task.exception() for task in tasks]
        results = [
            task.result() if is_kept else lost for task, is_kept in zip(tasks, ended, strict=True)
        ]
        if all(each.error for each in results):
            raise
        return results
    finally:
        for task in tasks:
            task.cancel()


@dataclass(frozen=True)
class _Job:
    """A prompt of each model, and which of equal ones it is."""

    prompts: dict[str, str]
    sample_index: int
    seed: int

    @property
    def id(self) -> str:
        """Content hash of the prompts."""
        return prompt_id(self.prompts["student"], self.prompts["teacher"])


def _numbered(student: Sequence[str], teacher: Sequence[str], seed: int) -> list[_Job]:
    """The k-th occurrence of a pair of prompts is its sample k."""
    seen: Counter[tuple[str, str]] = Counter()
    jobs = []
    for pair in zip(student, teacher, strict=True):
        jobs.append(_Job({"student": pair[0], "teacher": pair[1]}, seen[pair], seed))
        seen[pair] += 1
    return jobs


def _listed(name: str, texts: Sequence[str]) -> list[str]:
    """A text or several, none of them empty. Raises ConfigError."""
    given = [texts] if isinstance(texts, str) else list(texts or ())
    if not all(isinstance(text, str) and text for text in given):
        raise ConfigError(f"{name} must be a list of strings that are not empty, got {texts!r}")
    return given


def _result(done: Completion, text: str) -> CoordinatorResult:
    trace = done.trace
    histories = {name: list(trace.columns.get(own, ())) for name, own in _HISTORIES.items()}
    return CoordinatorResult(
        generated_text=text,
        generated_ids=list(done.token_ids),
        alpha_history=list(trace["alpha"]),
        finish_reason=done.finish_reason,
        error=done.error,
        ess_ratio_history=list(trace.ess_ratio),
        **histories,
    )
