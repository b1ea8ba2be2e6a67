"""The dialect of llama.cpp's `llama-server`: its own `/completion`, with token ids in and out.

Its lists are of a softmax over the logits, before any sampler (`post_sampling_probs` is off).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimal_sampling.engines.servers.dialect import Call, Dialect, prefixes
from optimal_sampling.engines.servers.model import DraftedToken, Scoring, TokenList
from optimal_sampling.engines.servers.replies import BadReply, field, numbers, shown, token_list

__all__ = ["LlamaDialect"]

_PATH = "/completion"


class LlamaDialect(Dialect):
    """Completions of token ids. The server scores the prompts of one request one by one."""

    kind = "llama.cpp"
    scorings = ("prompts",)

    def next_tokens(self, prefix: Sequence[int], top_k: int) -> Call[TokenList]:
        """As in `Dialect`."""
        body = self._body([*prefix], 1, top_k)
        return Call(_PATH, lambda reply: self._lists(reply, 1, top_k)[0], body)

    def count_rows(self, prefix: Sequence[int]) -> Call[int]:
        """Not needed: /v1/models has it."""
        raise NotImplementedError

    def chosen(self, prefix: Sequence[int], ids: Sequence[int]) -> Call[dict[int, float]]:
        """Not offered."""
        raise NotImplementedError

    def draft(
        self, prefix: Sequence[int], count: int, top_k: int, temperature: float, seed: int
    ) -> Call[list[DraftedToken]]:
        """As in `Dialect`."""
        body = self._body([*prefix], count, top_k, temperature=temperature, seed=seed)

        def read(reply: Any) -> list[DraftedToken]:
            entries = field(reply, "completion_probabilities", list)
            if not 1 <= len(entries) <= count:
                raise BadReply(f"asked for at most {count} tokens, got {len(entries)}")
            tokens = [field(entry, "id", int) for entry in entries]
            lists = self._lists(reply, len(entries), top_k)
            return [DraftedToken(*each) for each in zip(tokens, lists, strict=True)]

        return Call(_PATH, read, body)

    def score(
        self, prefix: Sequence[int], continuation: Sequence[int], top_k: int, way: Scoring
    ) -> Call[list[TokenList]]:
        """As in `Dialect`."""
        prompts = prefixes(prefix, continuation)

        def read(reply: Any) -> list[TokenList]:
            replies = reply if isinstance(reply, list) else [reply]
            if len(replies) != len(prompts):
                raise BadReply(f"asked for {len(prompts)} completions, got {len(replies)}")
            if [field(each, "index", int) for each in replies] != [*range(len(prompts))]:
                raise BadReply("completions in another order than their prompts")
            return [self._lists(each, 1, top_k)[0] for each in replies]

        return Call(_PATH, read, self._body(prompts, 1, top_k))

    def tokenize(self, text: str) -> Call[list[int]]:
        """As in `Dialect`."""
        body = {"content": text, "add_special": False, "parse_special": True}
        return Call("/tokenize", lambda reply: numbers(reply, "tokens"), body)

    def detokenize(self, ids: Sequence[int]) -> Call[str]:
        """As in `Dialect`."""
        return Call("/detokenize", lambda reply: field(reply, "content", str), {"tokens": [*ids]})

    def ends_text(self, prefix: Sequence[int], token: int) -> Call[bool]:
        """As in `Dialect`."""
        body = self._body([*prefix], 2, 1, logit_bias=[[token, 1e5]])

        def read(reply: Any) -> bool:
            return field(reply, "stop_type", str) == "eos"

        return Call(_PATH, read, body)

    def _body(self, prompt: Any, tokens: int, top_k: int, **given: Any) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "n_predict": tokens,
            "n_probs": top_k,
            "cache_prompt": True,
            "return_tokens": True,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
            **given,
        }

    def _lists(self, reply: Any, count: int, top_k: int) -> list[TokenList]:
        model = reply.get("model") if isinstance(reply, Mapping) else None
        if self.reply_models and model is not None and model not in self.reply_models:
            raise BadReply(f"the reply is of the model {shown(model)!r}", "wrong_model")
        entries = field(reply, "completion_probabilities", list)
        if len(entries) != count:
            raise BadReply(f"lists of {len(entries)} positions, where {count} were asked for")
        return [self._list(field(entry, "top_logprobs", list), top_k) for entry in entries]

    def _list(self, entries: Sequence[Any], top_k: int) -> TokenList:
        row = {field(entry, "id", int): field(entry, "logprob", object) for entry in entries}
        if len(row) < len(entries):
            raise BadReply(f"an id occurs twice in a list: {shown(entries)}")
        if self.rows is not None and top_k >= self.rows:
            return token_list(row, 0, self.vocab_size, self.rows)
        return token_list(row, top_k, self.vocab_size)
