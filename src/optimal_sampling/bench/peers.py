"""The same work as a user of Transformers would write it: `generate` in static batches.

Prompts are padded on the left and a batch runs until its longest text has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from optimal_sampling.bench.workload import Bench, Workload
from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import step
from optimal_sampling.types import Request

__all__ = ["StudentMixture", "transformers_generate"]


class StudentMixture(LogitsProcessor):  # type: ignore[misc]
    """Turns the teacher's scores into log q*: runs the student over what is new, with a cache of its own."""

    def __init__(
        self, student: Any, mask: Int[Tensor, "batch prompt"], mixture: MixtureConfig
    ) -> None:
        self.student = student
        self.mask = mask
        self.mixture = mixture
        self.cache = DynamicCache()

    def __call__(
        self, input_ids: Int[Tensor, "batch length"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """log q* over the student's vocabulary, -inf beyond."""
        seen = self.cache.get_seq_length()
        new = input_ids[:, seen:]
        self.mask = torch.nn.functional.pad(
            self.mask, (0, input_ids.shape[1] - self.mask.shape[1]), value=1
        )
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, seen:]
        output = self.student(
            input_ids=new,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            logits_to_keep=1,
        )
        student = output.logits[:, -1]
        vocab = min(student.shape[-1], scores.shape[-1])
        noise = torch.zeros(len(student), vocab, device=student.device)
        position = torch.zeros(len(student), dtype=torch.long, device=student.device)
        drawn = step(
            student[:, :vocab], scores[:, :vocab], noise, position, self.mixture, keep_log_q=True
        )
        assert drawn.log_q is not None
        return torch.nn.functional.pad(drawn.log_q, (0, scores.shape[-1] - vocab), value=-torch.inf)


def transformers_generate(
    bench: Bench, workload: Workload, batch_size: int, mix: bool = False, assisted: bool = False
) -> int:
    """Sample the teacher with `generate`, or q* through a logits processor (`mix`). Returns the number of tokens.

    `assisted`: the student drafts for the teacher (Transformers' assisted generation), batch 1 only.
    """
    teacher = bench.stock_teacher_for_assistant() if assisted else bench.stock("teacher")
    student = bench.stock("student")
    tokens = 0
    for batch in _batches(workload.requests, batch_size):
        ids, mask = (x.to(teacher.device) for x in _left_padded(batch, bench.vocabulary.pad_id))
        processors = LogitsProcessorList(
            [StudentMixture(student, mask, MixtureConfig())] if mix else []
        )
        most = batch[0].max_new_tokens
        stop = sorted(bench.vocabulary.stop_ids)
        torch.manual_seed(0)
        output = teacher.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=most,
            min_new_tokens=None if workload.natural_end else most,
            eos_token_id=stop or None,
            pad_token_id=bench.vocabulary.pad_id,
            logits_processor=processors,
            **({"assistant_model": student} if assisted else {}),
        )
        tokens += _count(
            output[:, ids.shape[1] :], frozenset(stop) if workload.natural_end else frozenset()
        )
    return tokens


def _batches(requests: tuple[Request, ...], size: int) -> Iterator[tuple[Request, ...]]:
    for first in range(0, len(requests), size):
        yield requests[first : first + size]


def _left_padded(
    batch: tuple[Request, ...], pad_id: int
) -> tuple[Int[Tensor, "batch prompt"], Int[Tensor, "batch prompt"]]:
    longest = max(len(r.teacher_prompt_ids) for r in batch)
    rows = [
        [pad_id] * (longest - len(r.teacher_prompt_ids)) + list(r.teacher_prompt_ids) for r in batch
    ]
    ids = torch.tensor(rows)
    counts = torch.tensor([len(r.teacher_prompt_ids) for r in batch])
    mask = (torch.arange(longest) >= (longest - counts)[:, None]).long()
    return ids, mask


def _count(output: Int[Tensor, "batch length"], stop: frozenset[int]) -> int:
    """Tokens up to and including the first stop id of every row."""
    total = 0
    for row in output.tolist():
        ends = [i for i, token in enumerate(row) if token in stop]
        total += ends[0] + 1 if ends else len(row)
    return total
