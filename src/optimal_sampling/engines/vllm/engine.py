"""`VllmEngine`: a composite model in vLLM, behind the contract of engines/base.py.

vLLM draws, with a seed per request: the same request gives the same tokens as far as vLLM's seeds go. On its first
model runner that is not under speculation, on neither where a batch changes the last bits of logits.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from optimal_sampling.config import EngineOptions, MixtureConfig, ModelConfig, VllmOptions
from optimal_sampling.engines.base import Engine, prompt_problem
from optimal_sampling.engines.vllm.launch import engine_arguments, prepare_environment
from optimal_sampling.engines.vllm.options import MODES, RequestOptions, TraceLevel
from optimal_sampling.errors import EngineError
from optimal_sampling.types import TRACE_FIELDS, Completion, FinishReason, Mode, Request, TokenTrace
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["VllmEngine"]

_LOG_Q = TRACE_FIELDS.index("log_q")


@dataclass(slots=True)
class _Flight:
    """A request inside vLLM."""

    request: Request
    started: float


class VllmEngine(Engine):
    """One vLLM engine in this process."""

    modes = MODES
    options: VllmOptions

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
        """The mixture that the composite model was loaded with: requests carry what differs from it."""
        self.options = options
        self.vocabulary = vocabulary
        self.vocab_size = vocabulary.size
        self.stop_ids = vocabulary.stop_ids
        self.mode: Mode = mode
        self.trace: TraceLevel = "full"
        """What is kept of each token: `full` unless a view says less."""
        self.most_requests = options.batch_size
        self._flights = 0
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
        os.environ.setdefault(
            "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
        )  # scripts need no main guard, and no port is opened
        prepare_environment()
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        own: dict[str, Any] = {
            "max_num_seqs": options.batch_size,
            "max_num_batched_tokens": options.tokens_per_step,
            "skip_tokenizer_init": True,
        }
        if options.kv_memory_gib is not None:
            own["kv_cache_memory_bytes"] = int(options.kv_memory_gib * 2**30)
        arguments = engine_arguments(
            models, mixture, vocabulary, options.drafts_per_step, {**own, **(settings or {})}
        )
        core = LLMEngine.from_engine_args(EngineArgs(**arguments))
        return cls(core, mixture, options, vocabulary, mode)

    def view(
        self,
        mixture: MixtureConfig | None = None,
        mode: Mode | None = None,
        options: EngineOptions | None = None,
        capture: frozenset[str] = frozenset(),
        trace: TraceLevel | None = None,
    ) -> Self:
        """As in `Engine`. More requests than vLLM was started for are never in flight."""
        view = super().view(mixture, mode, options, capture)
        view.trace = trace or self.trace
        return view

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Serve the requests; see `Engine`."""
        if self.core is None:
            raise EngineError("this engine was closed; open another one")
        waiting = iter(requests)
        flights: dict[str, _Flight] = {}
        internal: dict[str, str] = {}
        try:
            more, room = True, min(self.options.batch_size, self.most_requests)
            while more or flights:
                while more and len(flights) < room:
                    request = next(waiting, None)
                    if request is None:
                        more = False
                        break
                    problem = self._problem(request)
                    if problem:
                        yield Completion(request, (), "error", TokenTrace.from_rows([]), problem)
                        continue
                    name = f"{id(self)}-{self._flights}"
                    self._flights += 1
                    internal[name] = self._add(name, request)
                    flights[name] = _Flight(request, time.perf_counter())
                yield from self._step(flights, internal)
        finally:
            self.core.abort_request([internal[name] for name in flights], internal=True)

    def _problem(self, request: Request) -> str:
        prompts = (request.student_prompt_ids, request.teacher_prompt_ids)
        limit = self.core.model_config.max_model_len
        vocabulary = self.vocabulary
        rows = (
            vocabulary.student_rows or vocabulary.size,
            vocabulary.teacher_rows or vocabulary.size,
        )
        return prompt_problem(("student", "teacher"), prompts, (limit, limit), rows)

    def _add(self, name: str, request: Request) -> str:
        """Hand a request to vLLM; its name in there."""
        from vllm.sampling_params import RequestOutputKind

        from vllm import SamplingParams

        differs = (
            self.mode == "mixture" and request.student_prompt_ids != request.teacher_prompt_ids
        )
        options = RequestOptions(
            self.mixture, self.mode, self.trace, request.student_prompt_ids if differs else None
        )
        truncated = self.mixture.top_k > 0 or self.mixture.top_p < 1
        params = SamplingParams(
            temperature=self.mixture.temperature,
            top_k=self.mixture.top_k,
            top_p=self.mixture.top_p,
            seed=request.noise_key >> 1,
            max_tokens=request.max_new_tokens,
            stop_token_ids=sorted(self.stop_ids),
            logprobs=0 if truncated and self.trace == "full" else None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=options.extra_args(self.base),
        )
        prompt = {"prompt_token_ids": list(request.teacher_prompt_ids)}
        return str(self.core.add_request(name, prompt, params))

    def _step(self, flights: dict[str, _Flight], internal: dict[str, str]) -> Iterator[Completion]:
        if not flights:
            return
        done = [output for output in self.core.step() if output.finished]
        traces = self._take([internal[output.request_id] for output in done]) if done else {}
        for output in done:
            flight = flights.pop(output.request_id)
            rows, error = traces[internal.pop(output.request_id)]
            yield self._completion(flight, output.outputs[0], rows, error)

    def _take(self, names: list[str]) -> dict[str, tuple[list[list[float]], str]]:
        taken: dict[str, tuple[list[list[float]], str]] = self.core.collective_rpc(
            "take_traces", args=(names,)
        )[0]
        return taken

    def _completion(
        self, flight: _Flight, output: Any, rows: list[list[float]], error: str
    ) -> Completion:
        tokens = tuple(output.token_ids)
        rows = rows[
            : len(tokens)
        ]  # drafts accepted beyond a stop token were never part of the completion
        if error:
            good = next((i for i, row in enumerate(rows) if math.isnan(row[0])), len(rows))
            tokens, rows = tokens[:good], rows[:good]
        if output.logprobs:
            for token, row, chosen in zip(tokens, rows, output.logprobs, strict=False):
                row[_LOG_Q] = chosen[token].logprob
        ended = bool(tokens) and tokens[-1] in self.stop_ids
        reason: FinishReason = "error" if error else "stop" if ended else "length"
        seconds = time.perf_counter() - flight.started
        return Completion(
            flight.request,
            tokens,
            reason,
            TokenTrace.from_rows([tuple(r) for r in rows]),
            error,
            seconds,
        )

    def notes(self) -> dict[str, str]:
        """Version, precision and memory of vLLM, and what its draws promise."""
        from optimal_sampling.engines.vllm.plugin import vllm_version

        config = self.core.vllm_config
        notes = {
            "vllm": vllm_version(),
            "model_runner": "second" if config.use_v2_model_runner else "first",
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "kv_blocks": f"{config.cache_config.num_gpu_blocks} of {config.cache_config.block_size} tokens",
            "draws": "by vLLM, from q*; seeded per request",
        }
        if config.speculative_config is not None:
            seeds = (
                "seeded per request"
                if config.use_v2_model_runner
                else "and not reproducible by seed"
            )
            notes["draws"] = f"by vLLM, from q*, with drafts: lossless, {seeds}"
            notes["draft_tokens"] = str(config.speculative_config.num_speculative_tokens)
        return notes

    def close(self) -> None:
        """End vLLM and free the models."""
        core, self.core = self.core, None
        if core is None:
            return
        core.engine_core.shutdown()
        del core
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
