"""What both of vLLM's model runners share: who is in a step, which tokens each model sees, and the traces.

A runner tells `StepMixin` what is scheduled and in which order; its own file holds the hooks by which it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.base import bad_logits_message
from optimal_sampling.engines.vllm.lanes import Lane, Span, lane_of
from optimal_sampling.engines.vllm.mixing import Row
from optimal_sampling.engines.vllm.options import OTHER_IDS, RequestOptions
from optimal_sampling.engines.vllm.scheduler import TEACHER_IDS
from optimal_sampling.engines.vllm.traces import TraceStore

__all__ = ["StepMixin"]


@dataclass(frozen=True, slots=True)
class Tenant:
    """What the runner keeps of a request. `other_ids`: the prompt of the role that vLLM does not plan for."""

    options: RequestOptions
    prompt_length: int
    """Of the prompt that vLLM plans for."""
    other_role: str = ""
    other_ids: Tensor | None = None

    @classmethod
    def of(cls, new: Any, default: MixtureConfig) -> Tenant:
        """From vLLM's data of a new request."""
        extra = new.sampling_params.extra_args or {}
        options = RequestOptions.read(extra, new.sampling_params.temperature, default)
        role = "student" if OTHER_IDS in extra else "teacher" if TEACHER_IDS in extra else ""
        ids = extra.get(OTHER_IDS, extra.get(TEACHER_IDS))
        return cls(
            options, len(new.prompt_token_ids), role, None if ids is None else torch.tensor(ids)
        )


@dataclass(frozen=True, slots=True)
class Part:
    """A request's part of a step: `scheduled` tokens after `computed` ones, the last `drafts` of them drafts."""

    request_id: str
    tenant: Tenant
    scheduled: int
    computed: int
    drafts: int

    def rows(self) -> list[Row]:
        """What its rows of logits are for: its next token, and one more per draft."""
        first = self.computed + self.scheduled - self.drafts - self.tenant.prompt_length
        return [
            Row(self.request_id, first + offset, self.tenant.options)
            for offset in range(self.drafts + 1)
        ]

    def span(self, role: str) -> Span:
        """Its tokens for the lane of one model."""
        tenant = self.tenant
        own_ids = tenant.other_ids if tenant.other_role == role else None
        return Span(self.scheduled, self.computed, tenant.prompt_length, own_ids)


class StepMixin:
    """Goes before a model runner among the bases; `adopt` makes one out of a runner that is there already."""

    def adopt(self: Any) -> None:
        """What a constructor would do."""
        self.tenants: dict[str, Tenant] = {}
        self.traces = TraceStore()
        self._parts: list[Part] = []
        self._needs_student = False
        self._apart: set[str] = set()
        """Roles whose tokens in this step are not those of vLLM's plan."""
        self._rows: list[Row] = []
        self._first_rows: list[int] = []

    # ------------------------------------------------------------------------------------------ a step

    def _admit(self: Any, scheduler_output: Any) -> None:
        """Take in new requests, let go of finished ones, and note what each has to do in this step."""
        default = self.get_model().default
        for request_id in scheduler_output.finished_req_ids:
            self.tenants.pop(request_id, None)
        self.traces.finish(scheduler_output.finished_req_ids)
        running = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(running.req_ids, running.num_computed_tokens, strict=True))
        for new in scheduler_output.scheduled_new_reqs:
            self.tenants[new.req_id] = Tenant.of(new, default)
            computed[new.req_id] = new.num_computed_tokens
        drafts = scheduler_output.scheduled_spec_decode_tokens
        self._parts = [
            Part(name, self.tenants[name], scheduled, computed[name], len(drafts.get(name, ())))
            for name, scheduled in scheduler_output.num_scheduled_tokens.items()
        ]
        tenants = [part.tenant for part in self._parts]
        self._needs_student = any(tenant.options.mode == "mixture" for tenant in tenants)
        self._apart = {tenant.other_role for tenant in tenants} - {""}

    def _announce(self: Any, request_ids: Sequence[str]) -> None:
        """Put the step into the runner's order, and tell the model what the rows of logits are for."""
        parts = {part.request_id: part for part in self._parts}
        self._parts = [parts[request_id] for request_id in request_ids]
        self._rows, self._first_rows = [], []
        for part in self._parts:
            self._first_rows.append(len(self._rows))
            self._rows += part.rows()
        self.get_model().expected = self._rows

    # ------------------------------------------------------------------------------------------ two prompts

    def _is_common(self: Any) -> bool:
        """Whether both models run, over the same tokens: then the step is as vLLM planned it."""
        return self._needs_student and not self._apart

    def _forward_apart(self: Any, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states of both models, each over its own tokens, at the places of vLLM's flat batch. 0 elsewhere.

        A model that follows vLLM's plan goes first: some attention backends keep one plan, and a lane makes its own.
        """
        sizes = self.get_model().hidden_sizes
        hidden = {
            role: torch.zeros(
                len(input_ids), size, dtype=self.model_config.dtype, device=self.device
            )
            for role, size in sizes.items()
        }
        for role in sorted(sizes, key=self._apart.__contains__):
            if role == "teacher" or self._needs_student:
                forward = self._lane_forward if role in self._apart else self._own_forward
                forward(role, input_ids, positions, hidden[role])
        return torch.cat([hidden["teacher"], hidden["student"]], -1)

    def _own_forward(
        self: Any, role: str, input_ids: Tensor, positions: Tensor, out: Tensor
    ) -> None:
        out.copy_(getattr(self.get_model(), role)(input_ids, positions))

    def _lane_forward(
        self: Any, role: str, input_ids: Tensor, positions: Tensor, out: Tensor
    ) -> None:
        lane = lane_of([part.span(role) for part in self._parts], input_ids)
        if not lane.requests:
            return
        metadata, slots = self._lane_metadata(role, lane)
        with set_forward_context(
            metadata, self.vllm_config, num_tokens=len(lane.input_ids), slot_mapping=slots
        ):
            out[lane.rows] = getattr(self.get_model(), role)(
                lane.input_ids, lane.positions.to(positions.dtype)
            )

    def _blocks(self: Any) -> tuple[Tensor, int]:
        """Block table of the step, [requests, blocks], in its order; and tokens per block. Each runner's own."""
        raise NotImplementedError

    def _lane_metadata(
        self: Any, role: str, lane: Lane
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Attention metadata and slots of one model's layers: the requests' own blocks at the lane's positions."""
        blocks, size = self._blocks()
        blocks = blocks[torch.tensor(lane.requests, device=blocks.device)].contiguous()
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
                metadata |= dict.fromkeys(names, group.build_metadata(common))
        return metadata, dict.fromkeys(metadata, slot)

    # ------------------------------------------------------------------------------------------ traces

    def _record(self: Any, drawn: Sequence[Sequence[int]]) -> None:
        """`drawn`: the tokens of each request of the step, none for an unfinished prompt."""
        mixed, rows, self._rows = self.get_model().mixed, self._rows, []
        if mixed is None or not rows:
            return
        if bool(mixed.bad.any()):
            self._record_bad(rows, mixed.bad.tolist(), drawn)
        traced = [
            (first, tokens)
            for first, tokens in zip(self._first_rows, drawn, strict=True)
            if tokens and rows[first].options.trace != "off"
        ]
        if not traced:
            return
        places = [first + offset for first, tokens in traced for offset in range(len(tokens))]
        values = mixed.trace(places, [token for _, tokens in traced for token in tokens])
        taken = 0
        for first, tokens in traced:
            self.traces.add(
                rows[first].request_id, rows[first].position, values[taken : taken + len(tokens)]
            )
            taken += len(tokens)

    def _record_bad(
        self: Any, rows: list[Row], bad: list[list[bool]], drawn: Sequence[Sequence[int]]
    ) -> None:
        for first, tokens in zip(self._first_rows, drawn, strict=True):
            for place in range(first, first + len(tokens)):
                if any(bad[place]):
                    message = bad_logits_message(rows[place].position, *bad[place])
                    self.traces.fail(rows[place].request_id, message)
