"""vLLM's scheduler, for requests with a prompt for each model.

vLLM plans memory and prefill for one prompt. Of two it is given the longer: the tokens of the
shorter one are aligned with its end, so no further block or step is needed.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from optimal_sampling.engines.vllm.request_options import (
    STUDENT_IDS,
    TEACHER_IDS,
    is_of_one_model,
)

__all__ = ["OptimalSamplingScheduler"]


class OptimalSamplingScheduler(Scheduler):  # type: ignore[misc]
    """Plans for the longer prompt; keeps blocks out of the prefix cache that only one model filled.

    A cached block is found by its token ids, which say nothing of the other model's part of it.
    """

    def add_request(self, request: Request) -> None:
        """Add a request to the waiting queue."""
        extra = request.sampling_params.extra_args if request.sampling_params else None
        if extra and (STUDENT_IDS in extra or is_of_one_model(extra)):
            student_ids = extra.get(STUDENT_IDS)
            if student_ids is not None and len(student_ids) > len(request.prompt_token_ids):
                _plan_for_student(request, extra, list(student_ids))
            _exclude_from_prefix_cache(request)
        super().add_request(request)


def _plan_for_student(request: Request, extra: dict[str, Any], student_ids: list[int]) -> None:
    """Make the student's prompt the one that vLLM plans for."""
    rest = {key: value for key, value in extra.items() if key != STUDENT_IDS}
    # A copy: within one process, the caller holds the same object.
    request.sampling_params = request.sampling_params.clone()
    request.sampling_params.extra_args = {**rest, TEACHER_IDS: list(request.prompt_token_ids)}
    request.prompt_token_ids = student_ids
    request.num_prompt_tokens = len(student_ids)
    request._all_token_ids[:] = student_ids


def _exclude_from_prefix_cache(request: Request) -> None:
    request.skip_reading_prefix_cache = True
    request.cache_salt = f"{request.cache_salt or ''}:{request.request_id}"
    request.block_hashes.clear()
    request.update_block_hashes()
