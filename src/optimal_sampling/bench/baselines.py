"""The same work as a user of Transformers would write it: `generate` in static batches.

Prompts are padded on the left, and a batch runs until its longest text has ended.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from optimal_sampling.bench.workload import ModelPair, Workload
from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import log_q, make_pair, solve
from optimal_sampling.types import Request

__all__ = ["transformers_generate"]


class StudentMixture(LogitsProcessor):  # type: ignore[misc]
    """Turns the teacher's scores into log q*. Runs the student with a cache of its own."""

    def __init__(self, student: Any, mask: Int[Tensor, "batch prompt"]) -> None:
        self.student = student
        self.mask = mask
        self.mixture = MixtureConfig()
        self.cache = DynamicCache(config=student.config)

    # the mixture's buffers are kept per thread, and those that an engine has left are
    # inference tensors
    @torch.inference_mode()
    def __call__(
        self, input_ids: Int[Tensor, "batch length"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """log q* over the student's vocabulary, -inf beyond."""
        student = self._student_logits(input_ids)
        width = scores.shape[1]
        vocab = min(student.shape[1], width)
        models = make_pair(student[:, :vocab], scores[:, :vocab], self.mixture)
        position = torch.zeros_like(input_ids[:, 0])
        solved = solve(models, position, self.mixture, ess=False)
        return pad(log_q(solved), (0, width - vocab), value=-torch.inf)

    def _student_logits(
        self, input_ids: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch vocab"]:
        seen = self.cache.get_seq_length()
        self.mask = pad(self.mask, (0, input_ids.shape[1] - self.mask.shape[1]), value=1)
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
    teacher = pair.stock_teacher_for_assistant if assisted else pair.stock("teacher")
    student = pair.stock("student")
    settings: dict[str, Any] = {"assistant_model": student} if assisted else {}
    stop = pair.vocabulary.stop_ids if workload.natural_end else frozenset()
    tokens = 0
    for first in range(0, len(workload.requests), batch_size):
        batch = workload.requests[first : first + batch_size]
        ids, mask = (x.to(teacher.device) for x in _left_padded(batch, pair.vocabulary.pad_id))
        if mix:
            settings["logits_processor"] = LogitsProcessorList([StudentMixture(student, mask)])
        most = max(request.max_new_tokens for request in batch)
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
        tokens += _count(batch, output[:, ids.shape[1] :], stop)
    return tokens


def _left_padded(
    batch: tuple[Request, ...], pad_id: int
) -> tuple[Int[Tensor, "batch prompt"], Int[Tensor, "batch prompt"]]:
    """Token ids, and 1 where they are no filler."""
    prompts = [torch.tensor(request.teacher_prompt_ids) for request in batch]
    ones = [torch.ones_like(prompt) for prompt in prompts]
    ids = pad_sequence(prompts, batch_first=True, padding_value=pad_id, padding_side="left")
    return ids, pad_sequence(ones, batch_first=True, padding_side="left")


def _count(
    batch: tuple[Request, ...], output: Int[Tensor, "batch length"], stop: frozenset[int]
) -> int:
    """Tokens up to and including the first stop id of every row, and within its request."""
    total = 0
    for request, row in zip(batch, output.tolist(), strict=True):
        asked = row[: request.max_new_tokens]
        total += next((i for i, token in enumerate(asked, 1) if token in stop), len(asked))
    return total
