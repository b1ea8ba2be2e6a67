"""Which token ids mean the same to both models.

    resolve   the name of a model -> a folder or a hub id
    tokens    tokenizer, end tokens and sizes of one model, read without its weights
    shared    `Vocabulary`: the ids that both models share

Transformers is imported when a tokenizer is loaded.
"""

from optimal_sampling.vocabulary.resolve import resolve_model
from optimal_sampling.vocabulary.shared import Vocabulary
from optimal_sampling.vocabulary.tokens import ModelTokens, load_tokens

__all__ = ["ModelTokens", "Vocabulary", "load_tokens", "resolve_model"]
