"""Which token ids mean the same to both models.

    tokens        a model by name: its folder, tokenizer, end tokens and sizes, without its weights
    model_folder  what the folder of a model has to hold
    turn_end      the token with which a chat template ends turns
    thinking      the markers around a model's reasoning, from its chat template
    hub_access    whether the hub can be reached at all
    token_bytes   what every token of a tokenizer writes
    shared        `Vocabulary`: the ids that both models share

Transformers is imported when a tokenizer is loaded.
"""

from optimal_sampling.vocabulary.hub_access import hub_problem
from optimal_sampling.vocabulary.shared import Vocabulary
from optimal_sampling.vocabulary.token_bytes import TokenBytes, continued_ids
from optimal_sampling.vocabulary.tokens import ModelTokens, fetch_model, load_tokens, resolve_model

__all__ = [
    "ModelTokens",
    "TokenBytes",
    "Vocabulary",
    "continued_ids",
    "fetch_model",
    "hub_problem",
    "load_tokens",
    "resolve_model",
]
