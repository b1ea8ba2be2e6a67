"""A logits processor of the teacher's vLLM that calls a second vLLM: the nested engine.

At every token it asks the student's engine for the log-probabilities of the whole vocabulary after
the whole text of every sequence, and mixes them with the teacher's at alpha = 1/2.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

__all__ = ["StudentInside"]


class StudentInside(LogitsProcessor):  # type: ignore[misc]
    """vLLM makes one itself, so the student's engine is set on the class before."""

    student: ClassVar[Any]
    _calls: ClassVar[int] = 0

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.texts: dict[int, tuple[list[int], list[int]]] = {}
        """By row of the batch: the prompt, and the list to which vLLM appends what is drawn."""

    def is_argmax_invariant(self) -> bool:
        """It is not."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Which sequence is in which row."""
        process_dict_updates(
            self.texts, batch_update, lambda params, prompt, output: (prompt or [], output)
        )

    def apply(self, logits: Tensor) -> Tensor:
        """The mixture's log-probabilities, up to a constant of each row."""
        texts = [[*self.texts[row][0], *self.texts[row][1]] for row in range(logits.shape[0])]
        return (
            logits.log_softmax(-1).add_(self._ask(texts, logits.shape[1]).to(self.device)).mul_(0.5)
        )

    def _ask(self, texts: list[list[int]], width: int) -> Tensor:
        """The student's log-probabilities of the next token, [texts, width]."""
        asked = SamplingParams(max_tokens=1, logprobs=-1, detokenize=False)
        names = []
        for ids in texts:
            type(self)._calls += 1
            names.append(str(self._calls))
            self.student.add_request(names[-1], {"prompt_token_ids": ids}, asked)
        rows = {}
        while self.student.has_unfinished_requests():
            for done in self.student.step():
                row = done.outputs[0].logprobs[0]
                rows[done.request_id] = [row[i].logprob for i in range(width)]
        return torch.tensor([rows[name] for name in names])
