"""Which tokens mean the same to both models, and how a row becomes two prompts.

    resolve   a model's name -> a folder or hub id
    tokens    what a model's tokenizer and configs say, without its weights
    shared    `Vocabulary`: the ids that both models mean the same by
    rows      a dataset's row -> problem, earlier turns, privileged context
    template  `{column}` in a user turn
    prompts   `PromptRenderer`: a row -> the two prompts' texts and ids

Knows nothing of logits, engines or records. Transformers is imported when a tokenizer is loaded.
"""

from optimal_sampling.vocabulary.prompts import PromptRenderer, RenderedPrompt
from optimal_sampling.vocabulary.resolve import resolve_model
from optimal_sampling.vocabulary.rows import Conversation, PromptError, conversation_of, problem_of
from optimal_sampling.vocabulary.shared import Vocabulary
from optimal_sampling.vocabulary.tokens import ModelTokens, load_tokens

__all__ = [
    "Conversation",
    "ModelTokens",
    "PromptError",
    "PromptRenderer",
    "RenderedPrompt",
    "Vocabulary",
    "conversation_of",
    "load_tokens",
    "problem_of",
    "resolve_model",
]
