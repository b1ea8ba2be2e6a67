"""vLLM's scheduler, for requests whose two prompts differ.

vLLM plans memory and prefill for one prompt. Of two it is given the longer: the shorter one's tokens then lie at the
end of the plan, and both models need no block and no step that was not planned.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from optimal_sampling.engines.vllm.options import OTHER_IDS, is_teacher_alone

__all__ = ["TEACHER_IDS", "OptimalSamplingScheduler"]

TEACHER_IDS = "optimal_sampling_teacher_ids"
"""Key of the teacher's prompt ids in `extra_args`, where vLLM's prompt is the student's."""


class OptimalSamplingScheduler(Scheduler):  # type: ignore[misc]
    """Prompts swapped where the student's is longer; no prefix caching where a block means more than its tokens."""

    def add_request(self, request: Request) -> None:
        """See the module."""
        extra = request.sampling_params.extra_args if request.sampling_params else None
        if extra and (OTHER_IDS in extra or is_teacher_alone(extra)):
            student_ids = extra.get(OTHER_IDS)
            if student_ids is not None and len(student_ids) > len(request.prompt_token_ids):
                _plan_for_student(request, extra, list(student_ids))
            _keep_blocks_private(request)
        super().add_request(request)


def _plan_for_student(request: Request, extra: dict[str, Any], student_ids: list[int]) -> None:
    rest = {key: value for key, value in extra.items() if key != OTHER_IDS}
    # The caller's parameters are not ours to change: in one process, the front end holds the same object.
    request.sampling_params = request.sampling_params.clone()
    request.sampling_params.extra_args = {**rest, TEACHER_IDS: list(request.prompt_token_ids)}
    request.prompt_token_ids = student_ids
    request.num_prompt_tokens = len(student_ids)
    request._all_token_ids[:] = student_ids


def _keep_blocks_private(request: Request) -> None:
    """The tokens of a block do not tell what the other model has in it: nobody else may find it."""
    request.skip_reading_prefix_cache = True
    request.cache_salt = f"{request.cache_salt or ''}:{request.request_id}"
    request.block_hashes.clear()
    request.update_block_hashes()
