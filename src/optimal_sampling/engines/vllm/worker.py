"""vLLM's worker, with what q* needs of every request in its model runner."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from optimal_sampling.engines.vllm.cpu_fixes import apply_cpu_fixes
from optimal_sampling.engines.vllm.first_runner import FirstRunnerMixin
from optimal_sampling.engines.vllm.plugin import check_version
from optimal_sampling.engines.vllm.second_runner import SecondRunnerMixin
from optimal_sampling.errors import ConfigError

__all__ = ["OptimalSamplingWorker"]

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class OptimalSamplingWorker(PlatformWorker):  # type: ignore[misc]
    """The platform's worker, its model runner with our hooks in it."""

    def init_device(self) -> None:
        """As the platform does, then refuse what would be sampled wrongly, and adopt the runner."""
        check_version()
        apply_cpu_fixes()
        super().init_device()
        if self.vllm_config.scheduler_config.async_scheduling:
            raise ConfigError(
                "async_scheduling is not supported by the vLLM engine: pass async_scheduling=False"
            )
        runner = self.model_runner
        hooks = SecondRunnerMixin if self.use_v2_model_runner else FirstRunnerMixin
        runner.__class__ = type("OptimalSamplingModelRunner", (hooks, type(runner)), {})
        runner.adopt()

    def initialize_from_config(self, kv_cache_config: Any) -> Any:
        """Refuse models whose memory is not one kind of block."""
        groups = len(kv_cache_config.kv_cache_groups)
        if groups != 1:
            raise ConfigError(
                f"these models keep {groups} kinds of caches (sliding windows or states); the vLLM engine supports "
                "models whose layers all attend to the whole text"
            )
        return super().initialize_from_config(kv_cache_config)

    def take_traces(self, request_ids: list[str]) -> dict[str, tuple[list[list[float]], str]]:
        """Traces and errors of finished requests; they are forgotten here. For vLLM's `collective_rpc`."""
        return self.model_runner.traces.take(request_ids)  # type: ignore[no-any-return]

    def take_named_traces(self, beginnings: list[str]) -> dict[str, tuple[list[list[float]], str]]:
        """`take_traces` of the requests whose names begin so."""
        return self.model_runner.traces.take_named(beginnings)  # type: ignore[no-any-return]
