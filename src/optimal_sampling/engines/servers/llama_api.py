"""The dialect of llama.cpp's `llama-server`: its own `/completion`, with token ids in and out.

Its lists are of a softmax over the logits, before any sampler (`post_sampling_probs` is off). It
leaves out the list of a token after which the text drawn so far ends within a character.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optimal_sampling.engines.servers.dialect import AFFINITY, Call, Dialect, prefixes
from optimal_sampling.engines.servers.model import DraftedToken, Scoring, TokenList
from optimal_sampling.engines.servers.replies import BadReply, field, numbers, shown, token_list

__all__ = ["LlamaDialect"]

_PATH = "/completion"
_SURELY = 1e5
"""Bias of a logit that makes its token the one drawn."""
_RAISED = 50.0
"""Bias that makes tokens likelier than all others, and leaves their float32 right to 4e-6."""
_HALF_ULP = 2.0**-24
"""Of 1 in float32: the error of each addition, as the server adds up a vocabulary one by one."""
_FIELDS = ("index", "model", "tokens", "stop_type", "completion_probabilities")


@dataclass(frozen=True)
class LlamaDialect(Dialect):
    """Completions of token ids. The prompts of one request are texts of their own to the server."""

    kind = "llama.cpp"
    scorings = ("one_slot",)
    chosen_are_relative = True

    slots: int = 1
    """Texts that the server keeps at once."""
    whole: int | None = None
    """A token that is a whole character, so that no list is left out after it. The server draws it
    where lists alone are wanted: a bias is none of the list. None: it draws the likeliest."""

    def next_tokens(self, prefix: Sequence[int], top_k: int) -> Call[TokenList]:
        """As in `Dialect`."""
        body = self._list_body([*prefix], top_k)
        return Call(_PATH, lambda reply: self._first_list(reply, top_k), body)

    def count_rows(self, prefix: Sequence[int]) -> Call[int]:
        """Not needed: /v1/models has it."""
        raise NotImplementedError

    def chosen(self, prefix: Sequence[int], ids: Sequence[int]) -> Call[dict[int, float]]:
        """As in `Dialect`, by probabilities that biases have raised above those of other tokens.

        None where the token drawn ends within a character.
        """
        biases = dict.fromkeys(ids, _RAISED)
        if self.whole is not None:
            biases[self.whole] = 2 * _RAISED
        raised = {"temperature": 1.0, "post_sampling_probs": True, "logit_bias": [*biases.items()]}
        body = self._body([*prefix], 1, len(biases), **raised) | self._slot

        def read(reply: Any) -> dict[int, float]:
            found: dict[int, float] = {}
            for entry in self._entries(reply)[:1]:
                for each in field(entry, "top_probs", list):
                    token, value = field(each, "id", int), field(each, "prob", float)
                    if token in biases and value > 0:
                        found[token] = math.log(value) - biases[token]
            return {token: found[token] for token in ids if token in found}

        return Call(_PATH, read, body)

    def draft(
        self, prefix: Sequence[int], count: int, top_k: int, temperature: float, seed: int
    ) -> Call[list[DraftedToken]]:
        """As in `Dialect`, up to the first token without a list.

        There is none of a token within a character, and of those that the server has drafted
        itself (`--model-draft`, `--spec-type`).
        """
        body = self._body([*prefix], count, top_k, temperature=temperature, seed=seed)

        def read(reply: Any) -> list[DraftedToken]:
            entries, tokens = self._entries(reply), numbers(reply, "tokens")
            if not 1 <= len(tokens) <= count or len(entries) > len(tokens):
                raise BadReply(
                    f"asked for at most {count} tokens, got {len(tokens)} and {len(entries)} lists"
                )
            drafted = []
            for token, entry in zip(tokens, entries, strict=False):
                listed = field(entry, "top_logprobs", list)
                if field(entry, "id", int) != token or not listed:
                    break
                drafted.append(DraftedToken(token, self._list(listed, top_k)))
            return drafted

        return Call(_PATH, read, body)

    def score(
        self, prefix: Sequence[int], continuation: Sequence[int], top_k: int, way: Scoring
    ) -> Call[list[TokenList]]:
        """As in `Dialect`. The server takes one prefix after the other in one slot, where each adds
        a token to what is kept.

        In several slots at once, as the server would have it, each of them has to catch up with the
        text, and a cache that they share may be too small, which fails.
        """
        prompts = prefixes(prefix, continuation)

        def read(reply: Any) -> list[TokenList]:
            replies = reply if isinstance(reply, list) else [reply]
            if len(replies) != len(prompts):
                raise BadReply(f"asked for {len(prompts)} completions, got {len(replies)}")
            if [field(each, "index", int) for each in replies] != [*range(len(prompts))]:
                raise BadReply("completions in another order than their prompts")
            return [self._first_list(each, top_k) for each in replies]

        return Call(_PATH, read, self._list_body(prompts, top_k) | self._slot)

    def tokenize(self, text: str) -> Call[list[int]]:
        """As in `Dialect`."""
        body = {"content": text, "add_special": False, "parse_special": True}
        return Call("/tokenize", lambda reply: numbers(reply, "tokens"), body)

    def detokenize(self, ids: Sequence[int]) -> Call[str]:
        """As in `Dialect`."""
        return Call("/detokenize", lambda reply: field(reply, "content", str), {"tokens": [*ids]})

    def ends_text(self, prefix: Sequence[int], token: int) -> Call[bool]:
        """As in `Dialect`."""
        body = self._body([*prefix], 2, 1, logit_bias=[[token, _SURELY]])

        def read(reply: Any) -> bool:
            return field(reply, "stop_type", str) == "eos"

        return Call(_PATH, read, body)

    @property
    def _slot(self) -> dict[str, int]:
        """The slot of the text, for requests of which there may be several at once."""
        return {"id_slot": AFFINITY.get() % self.slots}

    def _list_body(self, prompt: Any, top_k: int) -> dict[str, Any]:
        biases = [] if self.whole is None else [[self.whole, _SURELY]]
        return self._body(prompt, 1, top_k, logit_bias=biases)

    def _body(self, prompt: Any, tokens: int, top_k: int, **given: Any) -> dict[str, Any]:
        """A request that no sampler or bias of the server's own command line changes."""
        return {
            "model": self.model,
            "prompt": prompt,
            "n_predict": tokens,
            "n_probs": top_k,
            "cache_prompt": True,
            "return_tokens": True,
            "response_fields": _FIELDS,
            "samplers": ["temperature"],
            "temperature": 0.0,
            "mirostat": 0,
            "ignore_eos": False,
            "logit_bias": [],
            **given,
        }

    def _entries(self, reply: Any) -> list[Any]:
        """One for each token drawn that has a list."""
        if not isinstance(reply, Mapping):
            raise BadReply(f"expected an object, got {shown(reply)}")
        model = reply.get("model")
        if self.reply_models and model is not None and model not in self.reply_models:
            raise BadReply(f"the reply is of the model {shown(model)!r}", "wrong_model")
        return field({_FIELDS[-1]: [], **reply}, _FIELDS[-1], list)

    def _first_list(self, reply: Any, top_k: int) -> TokenList:
        entries = self._entries(reply)
        if len(entries) != 1:
            raise BadReply(f"lists of {len(entries)} positions, where one was asked for")
        return self._list(field(entries[0], "top_logprobs", list), top_k)

    def _list(self, entries: Sequence[Any], top_k: int) -> TokenList:
        row = {field(entry, "id", int): field(entry, "logprob", object) for entry in entries}
        if len(row) < len(entries):
            raise BadReply(f"an id occurs twice in a list: {shown(entries)}")
        if self.rows is not None and top_k >= self.rows:
            return token_list(row, 0, self.vocab_size, self.rows)
        tokens = token_list(row, top_k, self.vocab_size)
        error = tokens.sum_error + (self.rows or 0) * _HALF_ULP
        return replace(tokens, sum_error=error)
