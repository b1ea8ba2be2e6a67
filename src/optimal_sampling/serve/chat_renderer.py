"""Messages of a chat request -> token ids of either model, by vLLM's own renderer.

vLLM renders the request's messages for the teacher. The student's are rendered by a copy of that
renderer with the student's tokenizer, so that every option of the request means the same to both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError
from vllm.tokenizers.hf import get_cached_tokenizer

from optimal_sampling.serve.request_body import RequestError

__all__ = ["ChatRenderer"]


class ChatRenderer:
    """vLLM's `OnlineRenderer` of each role. `state`: that of vLLM's application."""

    def __init__(self, state: Any, student_tokenizer: Any) -> None:
        teacher = state.online_renderer
        student = copy.copy(teacher)
        tokenizer = get_cached_tokenizer(student_tokenizer)
        student.renderer = type(teacher.renderer)(state.vllm_config, tokenizer)
        self._renderers = {"student": student, "teacher": teacher}

    async def token_ids(self, role: str, body: Mapping[str, Any], name: str) -> tuple[int, ...]:
        """The prompt of a request's body. `name`: the field that its messages came in.

        Raises RequestError for what vLLM or the model's template refuses.
        """
        try:
            request = ChatCompletionRequest(**body)
            result = await self._renderers[role].render_chat(request)
        except (ValidationError, VLLMValidationError, ValueError, TypeError) as error:
            raise RequestError(f"{name} cannot be rendered: {error}", name) from error
        if isinstance(result, ErrorResponse):
            raise RequestError(result.error.message, name)
        _, (prompt,) = result
        return tuple(prompt["prompt_token_ids"])
