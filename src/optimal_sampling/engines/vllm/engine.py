"""`VllmEngine`: the composite model in vLLM, by the contract of engines/base.py.

vLLM draws, with a seed per request. Tokens are a function of the seed unless the batch changes the
last bits of a logit, or the V1 model runner has drafts.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from optimal_sampling.config import EngineOptions, MixtureConfig, ModelConfig, VllmOptions
from optimal_sampling.engines.base import Engine, prompt_problem
from optimal_sampling.engines.vllm.cpu_threads import choose_threads
from optimal_sampling.engines.vllm.engine_arguments import engine_arguments, prepare_environment
from optimal_sampling.engines.vllm.in_process import end_with, starting
from optimal_sampling.engines.vllm.request_options import MODES, RequestOptions, TraceLevel
from optimal_sampling.engines.vllm.start_failure import GUARD, first_line, reason_passed_on
from optimal_sampling.engines.vllm.trace_store import TraceRows, Traces
from optimal_sampling.errors import ConfigError, EngineError
from optimal_sampling.types import TRACE_FIELDS, Completion, FinishReason, Mode, Request, TokenTrace
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["VllmEngine"]

_LOG_Q = TRACE_FIELDS.index("log_q")


class _End:
    """The type of what follows the last request."""


_END = _End()


@dataclass(frozen=True, slots=True)
class _ActiveRequest:
    """A request inside vLLM."""

    request: Request
    internal_id: str
    """vLLM's id of the request, which traces have."""
    started: float
    """Seconds of `time.perf_counter`."""


class VllmEngine(Engine):
    """One vLLM engine in this process."""

    modes = MODES
    options: VllmOptions
    vocabulary: Vocabulary

    def __init__(
        self,
        core: Any,
        mixture: MixtureConfig,
        options: VllmOptions,
        vocabulary: Vocabulary,
        mode: Mode = "mixture",
    ) -> None:
        self.core = core
        self.mixture = mixture
        self.base = mixture
        """The composite model's default mixture; requests have only the fields that differ."""
        self.options = options
        self.vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        self.stop_ids = vocabulary.stop_ids
        self.mode: Mode = mode
        self.trace: TraceLevel = "full"
        """Values kept per token."""
        self.max_active = options.batch_size
        """Most requests that vLLM was started for."""
        self.threads = ""
        """Note on the number of threads, "" where vLLM chose it."""
        self.failed = False
        """Whether vLLM ended by an error."""
        self._end: Callable[[], Any] = core.engine_core.shutdown
        self._request_count = 0
        self._steps = 0
        self._check_settings(options)

    @classmethod
    def load(
        cls,
        models: ModelConfig,
        mixture: MixtureConfig,
        options: VllmOptions,
        vocabulary: Vocabulary,
        mode: Mode = "mixture",
        settings: Mapping[str, Any] | None = None,
    ) -> VllmEngine:
        """Start vLLM and load both models. `settings`: vLLM's own arguments, by its names.

        Raises MissingDependencyError, ConfigError, ModelError.
        """
        # One process: scripts need no main guard, and no port is opened.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        _check_main_guard()
        prepare_environment()
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        models = _loaded(models, mode)
        given = {"skip_tokenizer_init": True, **options.settings, **(settings or {})}
        threads = choose_threads(int(given.get("tensor_parallel_size", 1)))
        arguments = engine_arguments(models, mixture, options, vocabulary, given)
        with starting():
            with reason_passed_on():
                core = LLMEngine.from_engine_args(EngineArgs(**arguments))
            engine = cls(core, mixture, options, vocabulary, mode)
            engine._end = end_with(core.engine_core)
        engine.threads = threads
        return engine

    def view(
        self,
        mixture: MixtureConfig | None = None,
        mode: Mode | None = None,
        options: EngineOptions | None = None,
        capture: frozenset[str] = frozenset(),
        trace: TraceLevel | None = None,
    ) -> Self:
        """As in `Engine`. The batch size is at most the one that vLLM was started with."""
        view = super().view(mixture, mode, options, capture)
        view.trace = trace or self.trace
        return view

    @property
    def rounds(self) -> int:
        """As in `Engine`: steps of vLLM."""
        return self._steps

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """Completions as they finish, as in `Engine`."""
        if self.core is None:
            raise EngineError("this engine was closed; open another one")
        waiting = iter(requests)
        active: dict[str, _ActiveRequest] = {}
        limit = min(self.options.batch_size, self.max_active)
        exhausted = False
        try:
            while active or not exhausted:
                while len(active) < limit and not exhausted:
                    request = next(waiting, _END)
                    if request is None:
                        break
                    if isinstance(request, _End):
                        exhausted = True
                    elif problem := self._problem(request):
                        yield Completion(request, (), "error", TokenTrace.from_rows([]), problem)
                    else:
                        name = f"{id(self)}-{self._request_count}"
                        self._request_count += 1
                        active[name] = self._add(name, request)
                if active:
                    yield from self._step(active)
        finally:
            internal_ids = [each.internal_id for each in active.values()]
            if not self.failed:
                self.core.abort_request(internal_ids, internal=True)

    def _problem(self, request: Request) -> str:
        """Why a request cannot be served, "" if it can."""
        roles = ("student", "teacher") if self.mode == "mixture" else (self.mode,)
        return prompt_problem(
            roles=roles,
            prompts=[getattr(request, f"{role}_prompt_ids") for role in roles],
            contexts=[self.core.model_config.max_model_len] * len(roles),
            rows=[self.vocabulary.rows_of(role) for role in roles],
        )

    def _add(self, name: str, request: Request) -> _ActiveRequest:
        """Add a request to vLLM."""
        started = time.perf_counter()
        is_student = self.mode == "student"
        ids = request.student_prompt_ids if is_student else request.teacher_prompt_ids
        prompt = {"prompt_token_ids": list(ids)}
        internal_id = str(self.core.add_request(name, prompt, self._sampling_params(request)))
        return _ActiveRequest(request, internal_id, started)

    def _sampling_params(self, request: Request) -> Any:
        """vLLM's SamplingParams of a request."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        mixture = self.mixture
        student_ids = None
        if self.mode == "mixture" and request.student_prompt_ids != request.teacher_prompt_ids:
            student_ids = request.student_prompt_ids
        options = RequestOptions(mixture, self.mode, self.trace, student_ids)
        truncated = mixture.top_k > 0 or mixture.top_p < 1
        return SamplingParams(
            temperature=mixture.temperature,
            top_k=mixture.top_k,
            top_p=mixture.top_p,
            seed=request.noise_key >> 1,
            max_tokens=request.max_new_tokens,
            stop_token_ids=sorted(self.stop_ids),
            logprobs=0 if truncated and self.trace == "full" else None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=options.extra_args(self.base),
        )

    def _step(self, active: dict[str, _ActiveRequest]) -> Iterator[Completion]:
        """One step of vLLM; the requests that it finishes leave `active`."""
        self._steps += 1
        try:
            outputs = [output for output in self.core.step() if output.finished]
        except Exception as reason:  # of vLLM or a model: any kind
            self.failed = True
            raise EngineError(f"vLLM failed and cannot go on: {_reason(reason)}") from reason
        if not outputs:
            return
        finished = [active.pop(output.request_id) for output in outputs]
        traces = self._take_traces([each.internal_id for each in finished])
        for each, output in zip(finished, outputs, strict=True):
            rows, error = traces[each.internal_id]
            yield self._completion(each, output.outputs[0], rows, error)

    def _take_traces(self, internal_ids: list[str]) -> Traces:
        replies: list[Traces] = self.core.collective_rpc("take_traces", args=(internal_ids,))
        return replies[0]

    def _completion(
        self, active: _ActiveRequest, output: Any, rows: TraceRows, error: str
    ) -> Completion:
        """A finished request. With an `error`, the tokens before the first that has no trace."""
        tokens = tuple(output.token_ids)
        rows = rows[: len(tokens)]  # without drafts accepted beyond a stop token
        if error:
            good = next((i for i, row in enumerate(rows) if math.isnan(row[0])), len(rows))
            tokens, rows = tokens[:good], rows[:good]
        if output.logprobs:  # those of the truncated q*
            for token, row, chosen in zip(tokens, rows, output.logprobs, strict=False):
                row[_LOG_Q] = chosen[token].logprob
        reason: FinishReason = "length"
        if error:
            reason = "error"
        elif tokens and tokens[-1] in self.stop_ids:
            reason = "stop"
        trace = TokenTrace.from_rows([tuple(row) for row in rows])
        seconds = time.perf_counter() - active.started
        return Completion(active.request, tokens, reason, trace, error, seconds)

    def notes(self) -> dict[str, str]:
        """Version, precision and memory of vLLM, and how it draws."""
        from optimal_sampling.engines.vllm.plugin import vllm_version

        config = self.core.vllm_config
        cache = config.cache_config
        notes = {
            **_check_notes(self.core),
            "vllm": vllm_version(),
            "model_runner": "second" if config.use_v2_model_runner else "first",
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "kv_blocks": f"{cache.num_gpu_blocks} of {cache.block_size} tokens",
            "draws": "by vLLM, from q*; seeded per request",
        }
        if self.threads:
            notes["threads"] = self.threads
        devices = config.parallel_config.tensor_parallel_size
        if devices > 1:
            notes["tensor_parallel"] = f"{devices} devices"
        speculation = config.speculative_config
        if speculation is not None:
            seeds = "and not reproducible by seed"
            if config.use_v2_model_runner:
                seeds = "seeded per request"
            notes["draws"] = f"by vLLM, from q*, with drafts: lossless, {seeds}"
            notes["draft_tokens"] = str(speculation.num_speculative_tokens)
        return notes

    def close(self) -> None:
        """End vLLM and free the models."""
        core, self.core = self.core, None
        if core is not None:
            self._end()


def _check_main_guard() -> None:
    """Raise ConfigError in a process that vLLM started, and that runs its parent's script again."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(f"processes were started, each of which imports this script: {GUARD}")


def _loaded(models: ModelConfig, mode: Mode) -> ModelConfig:
    """The models to load: in a mode of one model that one alone, for both roles."""
    if mode == "mixture":
        return models
    name, revision = getattr(models, mode), getattr(models, f"{mode}_revision")
    return replace(
        models, teacher=name, student=name, teacher_revision=revision, student_revision=revision
    )


def _check_notes(core: Any) -> dict[str, str]:
    """What the comparison of both models with Transformers found."""
    found: list[dict[str, str]] = core.collective_rpc("take_model_notes")
    return {f"check_{role}": note for role, note in found[0].items()}


def _reason(error: BaseException) -> str:
    """Kind and first line of an error of vLLM, which can be a page long."""
    return f"{type(error).__name__}: {first_line(str(error))}"
