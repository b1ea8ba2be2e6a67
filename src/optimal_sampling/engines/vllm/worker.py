"""vLLM's worker and model runner, with what q* needs of every request in them.

The runner tells the composite model what each row of logits is for, gives both models their own prompts, and keeps the
traces. Built on vLLM's first model runner (`VLLM_USE_V2_MODEL_RUNNER=0`), whose `_model_forward` is made to be
overridden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from optimal_sampling.engines.base import bad_logits_message
from optimal_sampling.engines.vllm.composite import OptimalSamplingForCausalLM
from optimal_sampling.engines.vllm.cpu_fixes import apply_cpu_fixes
from optimal_sampling.engines.vllm.lanes import Lane, Span, lane_of
from optimal_sampling.engines.vllm.mixing import Row
from optimal_sampling.engines.vllm.options import OTHER_IDS, RequestOptions
from optimal_sampling.engines.vllm.plugin import check_version
from optimal_sampling.engines.vllm.scheduler import TEACHER_IDS
from optimal_sampling.engines.vllm.traces import TraceStore
from optimal_sampling.errors import ConfigError

__all__ = ["OptimalSamplingWorker"]

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


@dataclass(frozen=True, slots=True)
class Tenant:
    """What the runner keeps of a request. `other_ids`: the prompt of the role that vLLM does not plan for."""

    options: RequestOptions
    other_role: str = ""
    other_ids: Tensor | None = None


class RunnerMixin:
    """Goes before a GPUModelRunner among the bases; `adopt` makes one out of a runner that is there already."""

    def adopt(self: Any) -> None:
        """What a constructor would do."""
        self.tenants: dict[str, Tenant] = {}
        self.traces = TraceStore()
        self._scheduled: Any = None
        self._rows: list[Row] = []
        self._first_rows: list[int] = []

    # ------------------------------------------------------------------------------------------ a step

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Remember what is scheduled while vLLM's own step runs."""
        self._admit(scheduler_output)
        self._scheduled = scheduler_output
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._scheduled = None

    def _admit(self: Any, scheduler_output: Any) -> None:
        default = self.get_model().default
        for request_id in scheduler_output.finished_req_ids:
            self.tenants.pop(request_id, None)
        self.traces.finish(scheduler_output.finished_req_ids)
        for new in scheduler_output.scheduled_new_reqs:
            extra = new.sampling_params.extra_args or {}
            options = RequestOptions.read(extra, new.sampling_params.temperature, default)
            role = "student" if OTHER_IDS in extra else "teacher" if TEACHER_IDS in extra else ""
            ids = extra.get(OTHER_IDS, extra.get(TEACHER_IDS))
            self.tenants[new.req_id] = Tenant(options, role, None if ids is None else torch.tensor(ids))

    def _model_forward(
        self: Any,
        input_ids: Tensor | None = None,
        positions: Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Both models over the step; each over its own tokens where a request's prompts differ."""
        model: OptimalSamplingForCausalLM = self.get_model()
        if self._scheduled is None:  # a trial run
            model.expected = None
            return super()._model_forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]
        self._announce(model)
        tenants = [self.tenants[request_id] for request_id in self.input_batch.req_ids]
        needs_student = any(tenant.options.mode == "mixture" for tenant in tenants)
        own = {tenant.other_role for tenant in tenants}
        if needs_student and own == {""}:
            return super()._model_forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]
        teacher = self._role_forward("teacher", tenants, input_ids, positions)
        student = teacher.new_zeros(teacher.shape[0], model.hidden_sizes["student"])
        if needs_student:
            student = self._role_forward("student", tenants, input_ids, positions)
        return torch.cat([teacher, student], -1)

    def _announce(self: Any, model: OptimalSamplingForCausalLM) -> None:
        """Tell the model what the rows of logits are for: per request, its next token and one per draft."""
        drafts = self._scheduled.scheduled_spec_decode_tokens
        rows: list[Row] = []
        self._first_rows = []
        for index, request_id in enumerate(self.input_batch.req_ids):
            count = len(drafts.get(request_id, ())) + 1
            end = (
                int(self.input_batch.num_computed_tokens_cpu[index]) + self._scheduled.num_scheduled_tokens[request_id]
            )
            first = end - count + 1 - self.requests[request_id].num_prompt_tokens
            self._first_rows.append(len(rows))
            options = self.tenants[request_id].options
            rows.extend(Row(request_id, first + offset, options) for offset in range(count))
        model.expected = self._rows = rows

    # ------------------------------------------------------------------------------------------ two prompts

    def _role_forward(self: Any, role: str, tenants: Sequence[Tenant], input_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states of one model, at the places of vLLM's flat batch; 0 where it has no token."""
        module = getattr(self.get_model(), role)
        if all(tenant.other_role != role for tenant in tenants):
            hidden: Tensor = module(input_ids, positions)
            return hidden
        lane = lane_of(self._spans(role, tenants), input_ids)
        result = torch.zeros(
            input_ids.shape[0], self.get_model().hidden_sizes[role], dtype=self.model_config.dtype, device=self.device
        )
        if lane.requests:
            metadata, slots = self._lane_metadata(role, lane)
            count = len(lane.input_ids)
            with set_forward_context(metadata, self.vllm_config, num_tokens=count, slot_mapping=slots):
                result[lane.rows] = module(lane.input_ids, lane.positions.to(positions.dtype))
        return result

    def _spans(self: Any, role: str, tenants: Sequence[Tenant]) -> list[Span]:
        scheduled = self._scheduled.num_scheduled_tokens
        return [
            Span(
                scheduled[request_id],
                int(self.input_batch.num_computed_tokens_cpu[index]),
                self.requests[request_id].num_prompt_tokens,
                tenant.other_ids if tenant.other_role == role else None,
            )
            for index, (request_id, tenant) in enumerate(zip(self.input_batch.req_ids, tenants, strict=True))
        ]

    def _lane_metadata(self: Any, role: str, lane: Lane) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Attention metadata and slots of one model's layers: the requests' own blocks at the lane's positions."""
        table = self.input_batch.block_table[0]
        blocks = table.get_device_tensor(len(self.input_batch.req_ids))
        blocks = blocks[torch.tensor(lane.requests, device=blocks.device)].contiguous()
        size = table.block_size
        slot = blocks[lane.owner, lane.positions // size].long() * size + lane.positions % size
        starts = torch.zeros(len(lane.requests) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(lane.query_lengths), 0, out=starts[1:])
        lengths = torch.tensor(lane.lengths, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(self.device),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=len(lane.requests),
            num_actual_tokens=len(lane.input_ids),
            max_query_len=max(lane.query_lengths),
            max_seq_len=max(lane.lengths),
            block_table_tensor=blocks,
            slot_mapping=slot,
            causal=True,
            positions=lane.positions,
        )
        metadata: dict[str, Any] = {}
        for group in (group for groups in self.attn_groups for group in groups):
            names = [name for name in group.layer_names if name.startswith(f"{role}.")]
            if names:
                metadata |= dict.fromkeys(names, group.get_metadata_builder().build(0, common))
        return metadata, dict.fromkeys(metadata, slot)

    # ------------------------------------------------------------------------------------------ drawing

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        """A row of an unfinished prompt draws nothing that counts, so its seeded generator is put aside.

        vLLM turns the generator back instead, which those of a CPU cannot do.
        """
        generators = self.input_batch.generators
        discarded = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0]
        aside = {int(index): generators.pop(int(index)) for index in discarded if int(index) in generators}
        try:
            return super().sample_tokens(grammar_output)  # type: ignore[misc]
        finally:
            generators.update(aside)

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, and the traces of the tokens that it finds drawn."""
        result = super()._bookkeeping_sync(*args, **kwargs)  # type: ignore[misc]
        self._record(result[3])
        self._rows = []
        return result

    def _record(self: Any, drawn: Sequence[Sequence[int]]) -> None:
        """`drawn`: the tokens of each request of the step, none for an unfinished prompt."""
        mixed = self.get_model().mixed
        if mixed is None or not self._rows:
            return
        if bool(mixed.bad.any()):
            self._record_bad(mixed.bad.tolist(), drawn)
        traced = [
            (first, tokens)
            for first, tokens in zip(self._first_rows, drawn, strict=True)
            if tokens and self._rows[first].options.trace != "off"
        ]
        if not traced:
            return
        rows = [first + offset for first, tokens in traced for offset in range(len(tokens))]
        values = mixed.trace(rows, [token for _, tokens in traced for token in tokens])
        taken = 0
        for first, tokens in traced:
            row = self._rows[first]
            self.traces.add(row.request_id, row.position, values[taken : taken + len(tokens)])
            taken += len(tokens)

    def _record_bad(self: Any, bad: list[list[bool]], drawn: Sequence[Sequence[int]]) -> None:
        for first, tokens in zip(self._first_rows, drawn, strict=True):
            for offset in range(len(tokens)):
                row, flags = self._rows[first + offset], bad[first + offset]
                if any(flags):
                    self.traces.fail(row.request_id, bad_logits_message(row.position, *flags))


class OptimalSamplingWorker(PlatformWorker):  # type: ignore[misc]
    """The platform's worker, its model runner with `RunnerMixin` in it."""

    def init_device(self) -> None:
        """As the platform does, then refuse what would be sampled wrongly, and adopt the runner."""
        check_version()
        apply_cpu_fixes()
        super().init_device()
        runner = self.model_runner
        if not isinstance(runner, GPUModelRunner):
            raise ConfigError("the vLLM engine runs on vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0")
        if self.vllm_config.scheduler_config.async_scheduling:
            raise ConfigError("async_scheduling is not supported by the vLLM engine: pass async_scheduling=False")
        runner.__class__ = type("OptimalSamplingModelRunner", (RunnerMixin, type(runner)), {})
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
