"""A row of a dataset -> the student's prompt and the teacher's prompt, as text and as token ids.

rows      a row -> its conversation; `{column}` in the text of a user turn
chat      one model's chat template and tokenizer: turns -> text -> ids
renderer  `PromptRenderer`: a row -> the two prompts
"""

from optimal_sampling.prompts.renderer import PromptRenderer, RenderedPrompt
from optimal_sampling.prompts.rows import PROMPT_COLUMNS

__all__ = ["PROMPT_COLUMNS", "PromptRenderer", "RenderedPrompt"]
