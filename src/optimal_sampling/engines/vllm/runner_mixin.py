"""Steps of vLLM's model runners: their requests, the tokens of each model, and traces.

`RunnerMixin` holds what both of vLLM's model runners share; runner_v1.py and runner_v2.py override
the methods of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.base import bad_logits_message
from optimal_sampling.engines.device import to_device
from optimal_sampling.engines.vllm.mixing import LogitsRow
from optimal_sampling.engines.vllm.model_batch import ModelBatch, Span
from optimal_sampling.engines.vllm.request_options import (
    STUDENT_IDS,
    TEACHER_IDS,
    RequestOptions,
)
from optimal_sampling.engines.vllm.trace_store import TraceStore

__all__ = ["RunnerMixin"]


@dataclass(frozen=True, slots=True)
class RequestState:
    """What the runner keeps of a request."""

    options: RequestOptions
    prompt_length: int
    """Tokens of the prompt that vLLM plans for."""
    other_role: str = ""
    """The model with another prompt, "" if none."""
    other_ids: Int[Tensor, " other"] | None = None
    """That other prompt."""

    @classmethod
    def from_new(cls, new: Any, default: MixtureConfig) -> RequestState:
        """From vLLM's NewRequestData."""
        extra = new.sampling_params.extra_args or {}
        options = RequestOptions.read(extra, new.sampling_params.temperature, default)
        length = len(new.prompt_token_ids)
        for role, key in (("student", STUDENT_IDS), ("teacher", TEACHER_IDS)):
            if key in extra:
                return cls(options, length, role, torch.tensor(extra[key]))
        return cls(options, length)


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request's part of a step: `scheduled` tokens after `computed` ones, the last are drafts."""

    request_id: str
    state: RequestState
    scheduled: int
    computed: int
    drafts: int

    def logits_rows(self) -> list[LogitsRow]:
        """Its rows of logits: for its next token, and one more per draft."""
        end = self.computed + self.scheduled
        first = end - self.drafts - self.state.prompt_length
        return [
            LogitsRow(self.request_id, first + offset, self.state.options)
            for offset in range(self.drafts + 1)
        ]

    def span(self, role: str) -> Span:
        """Its tokens for one of the models."""
        state = self.state
        own_ids = state.other_ids if state.other_role == role else None
        return Span(self.scheduled, self.computed, state.prompt_length, own_ids)


class RunnerMixin:
    """A base class in front of one of vLLM's model runners. The runner exists before the mixin."""

    def init_mixture_state(self: Any) -> None:
        """Set the attributes below, as a constructor would."""
        self.request_states: dict[str, RequestState] = {}
        self.traces = TraceStore()
        self._scheduled: list[ScheduledRequest] = []
        self._needs_student = False
        self._separate_roles: set[str] = set()
        """Models whose tokens in this step are not those of vLLM's plan."""
        self._rows: list[LogitsRow] = []
        self._first_rows: list[int] = []
        """Index into `_rows` of each request's first row."""

    # ------------------------------------------------------------------------------ step

    def _update_requests(self: Any, scheduler_output: Any) -> None:
        """Add new requests, remove finished ones, and note the part of each in this step."""
        default = self.get_model().default
        for request_id in scheduler_output.finished_req_ids:
            self.request_states.pop(request_id, None)
        self.traces.finish(scheduler_output.finished_req_ids)
        running = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(running.req_ids, running.num_computed_tokens, strict=True))
        for new in scheduler_output.scheduled_new_reqs:
            self.request_states[new.req_id] = RequestState.from_new(new, default)
            computed[new.req_id] = new.num_computed_tokens
        drafts = scheduler_output.scheduled_spec_decode_tokens
        self._scheduled = [
            ScheduledRequest(
                request_id=name,
                state=self.request_states[name],
                scheduled=scheduled,
                computed=computed[name],
                drafts=len(drafts.get(name, ())),
            )
            for name, scheduled in scheduler_output.num_scheduled_tokens.items()
        ]
        states = [each.state for each in self._scheduled]
        needs_student = self.get_model().needs_student
        self._needs_student = any(needs_student(state.options.mode) for state in states)
        self._separate_roles = {state.other_role for state in states} - {""}

    def _set_order(self: Any, request_ids: Sequence[str]) -> None:
        """Order the step as the runner does, and tell the model what its rows of logits are for."""
        by_id = {each.request_id: each for each in self._scheduled}
        self._scheduled = [by_id[request_id] for request_id in request_ids]
        self._rows = []
        self._first_rows = []
        for each in self._scheduled:
            self._first_rows.append(len(self._rows))
            self._rows += each.logits_rows()
        self.get_model().expected = self._rows

    # ------------------------------------------------------------------------------ two prompts

    def _is_common(self: Any) -> bool:
        """Whether both models run over the same tokens, as vLLM planned the step."""
        return self._needs_student and not self._separate_roles

    def _forward_separately(
        self: Any, input_ids: Int[Tensor, " tokens"], positions: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens hidden"]:
        """Hidden states of both models at the places of vLLM's flat batch; 0 elsewhere.

        A model that follows vLLM's plan runs first: some attention backends keep a single plan,
        which the batch of the other one replaces.
        """
        sizes = self.get_model().hidden_sizes
        kind = {"dtype": self.model_config.dtype, "device": self.device}
        hidden = {role: torch.zeros(len(input_ids), size, **kind) for role, size in sizes.items()}
        for role in sorted(sizes, key=self._separate_roles.__contains__):
            if role == "student" and not self._needs_student:
                continue
            if role in self._separate_roles:
                self._forward_own_batch(role, input_ids, positions.dtype, hidden[role])
            else:
                hidden[role].copy_(getattr(self.get_model(), role)(input_ids, positions))
        return torch.cat([hidden["teacher"], hidden["student"]], -1)

    def _forward_own_batch(
        self: Any,
        role: str,
        input_ids: Int[Tensor, " tokens"],
        positions_dtype: torch.dtype,
        out: Float[Tensor, "tokens hidden"],
    ) -> None:
        """One model over its own tokens of the step; its hidden states are written into `out`."""
        batch = ModelBatch.from_spans([each.span(role) for each in self._scheduled], input_ids)
        if not batch.requests:
            return
        model = getattr(self.get_model(), role)
        metadata, slots = self._attention_metadata(role, batch, *self._blocks())
        with set_forward_context(
            metadata, self.vllm_config, num_tokens=len(batch.input_ids), slot_mapping=slots
        ):
            out[batch.places] = model(batch.input_ids, batch.positions.to(positions_dtype))

    # ------------------------------------------------------------------------------ model check

    def most_tokens(self: Any) -> int:
        """Tokens that fit into the memory, of which one block is vLLM's own."""
        return int((self.kv_cache_config.num_blocks - 1) * self._block_size())

    def role_logits(
        self: Any, role: str, ids: Int[Tensor, " tokens"], piece: int
    ) -> Float[Tensor, "rows vocab"]:
        """Logits of one model at the last tokens of a text, which is run in pieces of `piece`.

        Only before the first request: it uses the first blocks of the memory.
        """
        size = self._block_size()
        count = -(-len(ids) // size)
        ids = ids.to(self.device, torch.int32)  # as vLLM's: compiled models take no other type
        blocks = torch.arange(1, count + 1, dtype=torch.int32, device=self.device)[None]
        piece = min(piece, self.vllm_config.scheduler_config.max_num_batched_tokens)
        model = getattr(self.get_model(), role)
        logits = []
        for start in range(0, len(ids), piece):
            part = ids[start : start + piece]
            batch = ModelBatch.from_spans([Span(len(part), start, len(ids))], part)
            metadata, slots = self._attention_metadata(role, batch, blocks, size)
            with set_forward_context(
                metadata, self.vllm_config, num_tokens=len(part), slot_mapping=slots
            ):
                hidden = model(batch.input_ids, batch.positions)
            logits.append(model.compute_logits(hidden[-8:]))
        return torch.cat(logits)

    def _block_size(self: Any) -> int:
        raise NotImplementedError

    def _blocks(self: Any) -> tuple[Int[Tensor, "requests blocks"], int]:
        """Block table of the step in its order, and tokens per block."""
        raise NotImplementedError

    def _attention_metadata(
        self: Any, role: str, batch: ModelBatch, blocks: Int[Tensor, "requests blocks"], size: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Attention metadata and slots of one model's layers, in the requests' own blocks."""
        blocks = blocks[to_device(np.array(batch.requests), blocks.device)].contiguous()
        block = blocks[batch.owners, batch.positions // size].long()
        slots = block * size + batch.positions % size
        common = self._common_metadata(batch, blocks, slots)
        metadata: dict[str, Any] = {}
        for group in (group for groups in self.attn_groups for group in groups):
            names = [name for name in group.layer_names if name.startswith(f"{role}.")]
            if names:
                metadata |= dict.fromkeys(names, group.build_metadata(common))
        return metadata, dict.fromkeys(metadata, slots)

    def _common_metadata(
        self: Any,
        batch: ModelBatch,
        blocks: Int[Tensor, "requests blocks"],
        slots: Int[Tensor, " tokens"],
    ) -> CommonAttentionMetadata:
        starts = np.cumsum([0, *batch.query_lengths], dtype=np.int32)
        lengths = np.array(batch.lengths, dtype=np.int32)
        return CommonAttentionMetadata(
            query_start_loc=to_device(starts, self.device),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=to_device(lengths, self.device),
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
            num_reqs=len(batch.requests),
            num_actual_tokens=len(batch.input_ids),
            max_query_len=max(batch.query_lengths),
            max_seq_len=max(batch.lengths),
            block_table_tensor=blocks,
            slot_mapping=slots,
            causal=True,
            positions=batch.positions,
            is_prefilling=torch.tensor(batch.is_prefilling),
        )

    # ------------------------------------------------------------------------------ traces

    def _record(self: Any, drawn: Sequence[Sequence[int]]) -> None:
        """Store traces. `drawn`: tokens per request of the step, none for an unfinished prompt."""
        mixed = self.get_model().mixed
        rows, self._rows = self._rows, []
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
        values = iter(mixed.trace(places, [token for _, tokens in traced for token in tokens]))
        for first, tokens in traced:
            row = rows[first]
            self.traces.add(row.request_id, row.position, [next(values) for _ in tokens])

    def _record_bad(
        self: Any, rows: list[LogitsRow], bad: list[list[bool]], drawn: Sequence[Sequence[int]]
    ) -> None:
        """Store the errors of drawn tokens whose logits cannot be drawn from."""
        for first, tokens in zip(self._first_rows, drawn, strict=True):
            for place in range(first, first + len(tokens)):
                if any(bad[place]):
                    message = bad_logits_message(rows[place].position, *bad[place])
                    self.traces.fail(rows[place].request_id, message)
