"""vLLM's worker with a model runner that keeps each request's options of the mixture."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_utils import check_enough_kv_cache_memory

from optimal_sampling.engines.vllm.cpu_fixes import apply_cpu_fixes
from optimal_sampling.engines.vllm.kv_memory import keep_whole_text
from optimal_sampling.engines.vllm.model_check import check_models
from optimal_sampling.engines.vllm.plugin import check_version
from optimal_sampling.engines.vllm.runner_v1 import V1RunnerMixin
from optimal_sampling.engines.vllm.runner_v2 import V2RunnerMixin
from optimal_sampling.engines.vllm.start_failure import reported
from optimal_sampling.engines.vllm.trace_store import Traces
from optimal_sampling.errors import ConfigError

__all__ = ["OptimalSamplingWorker"]

logger = init_logger(__name__)

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class OptimalSamplingWorker(PlatformWorker):  # type: ignore[misc]
    """The platform's worker; its model runner gets `RunnerMixin` as a base class."""

    @reported
    def init_device(self) -> None:
        """vLLM's initialization, then the mixin. Raises ConfigError for asynchronous scheduling."""
        check_version()
        apply_cpu_fixes()
        super().init_device()
        if self.vllm_config.scheduler_config.async_scheduling:
            raise ConfigError(
                "async_scheduling is not supported by the vLLM engine: pass async_scheduling=False"
            )
        runner = self.model_runner
        mixin = V2RunnerMixin if self.use_v2_model_runner else V1RunnerMixin
        runner.__class__ = type("OptimalSamplingModelRunner", (mixin, type(runner)), {})
        runner.init_mixture_state()

    @reported
    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's loading. Raises ModelError, ConfigError."""
        return super().load_model(*args, **kwargs)

    @reported
    def determine_available_memory(self) -> int:
        """Memory for the KV cache in bytes. Raises ValueError where no request would fit."""
        available = int(super().determine_available_memory())
        is_fitted = self.model_config.original_max_model_len == -1  # to the memory, later
        if self.cache_config.num_gpu_blocks_override is None and not is_fitted:
            check_enough_kv_cache_memory(self.vllm_config, self.get_kv_cache_spec(), available)
        return available

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """Memory of each layer: of the whole text, also where it attends to a window only.

        vLLM frees what lies before the window of the prompt that it plans for; the other prompt's
        keys and values lie in the same blocks, at other positions.
        """
        return keep_whole_text(super().get_kv_cache_spec(), self.cache_config.block_size)

    @reported
    def initialize_from_config(self, kv_cache_config: Any) -> Any:
        """vLLM's memory. Raises ConfigError for models with more than one kind of block."""
        groups = len(kv_cache_config.kv_cache_groups)
        if groups != 1:
            raise ConfigError(
                f"these models keep {groups} kinds of caches (states, chunks of attention); the "
                "vLLM engine supports models whose layers keep the keys and values of every token"
            )
        return super().initialize_from_config(kv_cache_config)

    @reported
    def compile_or_warm_up_model(self) -> Any:
        """vLLM's warm-up, and the comparison of both models. Raises ModelError."""
        result = super().compile_or_warm_up_model()
        wanted = self.model_runner.get_model().settings.check_models
        self.model_notes = {}
        if wanted != "off":
            self.model_notes = check_models(self.model_runner, wanted)
        for role, note in self.model_notes.items():
            logger.info("%s compared with Transformers: %s", role, note)
        return result

    def take_model_notes(self) -> dict[str, str]:
        """What the comparison of both models found, by role."""
        return self.model_notes

    def take_traces(self, request_ids: list[str]) -> Traces:
        """Remove and return traces of finished requests. Called by vLLM's `collective_rpc`."""
        traces: Traces = self.model_runner.traces.take(request_ids)
        return traces

    def take_traces_by_prefix(self, prefixes: list[str]) -> Traces:
        """`take_traces` by the first characters of the request ids."""
        traces: Traces = self.model_runner.traces.take_by_prefix(prefixes)
        return traces
