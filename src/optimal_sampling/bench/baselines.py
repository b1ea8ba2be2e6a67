"""The same work as a user of Transformers would write it: `generate` in static batches.

Prompts are padded on the left, and a batch runs until its longest text has ended.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from optimal_sampling.bench.workload import ModelPair, Workload
from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import step
from optimal_sampling.types import Request

__all__ = ["transformers_generate"]


class StudentMixture(LogitsProcessor):  # type: ignore[misc]
    """Turns the teacher's scores into log q*. Runs the student with a cache of its own."""

    def __init__(
        self, student: Any, mask: Int[Tensor, "batch prompt"], mixture: MixtureConfig
    ) -> None:
        self.student = student
        self.mask = mask
        self.mixture = mixture
        self.cache = DynamicCache()

    # the mixture's buffers are kept per thread, and those that an engine has left are
    # inference tensors
    @torch.inference_mode()
    def __call__(
        self, input_ids: Int[Tensor, "batch length"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """log q* over the student's vocabulary, -inf beyond."""
        student = self._student_logits(input_ids)
        rows, vocab = len(student), min(student.shape[-1], scores.shape[-1])
        noise = torch.zeros(rows, vocab, device=student.device)
        position = torch.zeros(rows, dtype=torch.long, device=student.device)
        both = student[:, :vocab], scores[:, :vocab]
        log_q = step(*both, noise, position, self.mixture, keep_log_q=True).log_q
        assert log_q is not None
        return torch.nn.functional.pad(log_q, (0, scores.shape[-1] - vocab), value=-torch.inf)

    def _student_logits(
        self, input_ids: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch vocab"]:
        seen = self.cache.get_seq_length()
        added = input_ids.shape[1] - self.mask.shape[1]
        self.mask = torch.nn.functional.pad(self.mask, (0, added), value=1)
        output = self.student(
            input_ids=input_ids[:, seen:],
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(-1) - 1).clamp(min=0)[:, seen:],
            past_key_values=self.cache,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def transformers_generate(
    pair: ModelPair, workload: Workload, batch_size: int, mix: bool = False, assisted: bool = False
) -> int:
    """Sample the teacher with `generate`, or q* through a logits processor (`mix`).

    `assisted`: the student drafts for the teacher (assisted generation), at batch 1 only.
    Returns the number of tokens.
    """
    teacher = pair.stock_teacher_for_assistant() if assisted else pair.stock("teacher")
    student = pair.stock("student")
    settings: dict[str, Any] = {"assistant_model": student} if assisted else {}
    stop = pair.vocabulary.stop_ids if workload.natural_end else frozenset()
    tokens = 0
    for first in range(0, len(workload.requests), batch_size):
        batch = workload.requests[first : first + batch_size]
        ids, mask = (x.to(teacher.device) for x in _left_padded(batch, pair.vocabulary.pad_id))
        if mix:
            processor = StudentMixture(student, mask, MixtureConfig())
            settings["logits_processor"] = LogitsProcessorList([processor])
        most = batch[0].max_new_tokens
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
            eos_token_id=sorted(pair.vocabulary.stop_ids) or None,
            pad_token_id=pair.vocabulary.pad_id,
            **settings,
        )
        tokens += _count(output[:, ids.shape[1] :], stop)
    return tokens


def _left_padded(
    batch: tuple[Request, ...], pad_id: int
) -> tuple[Int[Tensor, "batch prompt"], Int[Tensor, "batch prompt"]]:
    prompts = [r.teacher_prompt_ids for r in batch]
    longest = max(map(len, prompts))
    ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _count(output: Int[Tensor, "batch length"], stop: frozenset[int]) -> int:
    """Tokens up to and including the first stop id of every row."""
    total = 0
    for row in output.tolist():
        ends = [i for i, token in enumerate(row) if token in stop]
        total += ends[0] + 1 if ends else len(row)
    return total
