"""The dialect of vLLM's OpenAI-compatible server, which the fake server speaks too.

Log-probabilities are of the model as it is: temperature, penalties and truncation do not change
them (`--logprobs-mode raw_logprobs`, the default), and the request switches them off anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimal_sampling.engines.servers.dialect import Call, Dialect, prefixes
from optimal_sampling.engines.servers.model import DraftedToken, Scoring, TokenList
from optimal_sampling.engines.servers.replies import BadReply, field, numbers, shown, token_list

__all__ = ["MOST_CHOSEN_IDS", "VllmDialect"]

MOST_CHOSEN_IDS = 128
"""Of one request, by vLLM's sampling_params.py."""

_PATH = "/v1/completions"
_PREFIX = "token_id:"
_NEUTRAL = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""The model's generation config would set them otherwise."""


class VllmDialect(Dialect):
    """Completions of token ids, with keys `token_id:N` in the lists."""

    kind = "vllm"
    scorings = ("prompts", "prompt_logprobs", "echo")

    def next_tokens(self, prefix: Sequence[int], top_k: int) -> Call[TokenList]:
        """As in `Dialect`."""
        body = self._body([*prefix], 1, self._logprobs(top_k))
        return Call(_PATH, lambda reply: self._lists(self._choices(reply, 1)[0], 1, top_k)[0], body)

    def count_rows(self, prefix: Sequence[int]) -> Call[int]:
        """As in `Dialect`. Rejected where --max-logprobs is below it."""

        def read(reply: Any) -> int:
            (row,) = self._rows(self._choices(reply, 1)[0], 1)
            if sorted(row) != [*range(len(row))]:
                raise BadReply(f"asked for all tokens, got {len(row)} with gaps")
            return len(row)

        return Call(_PATH, read, self._body([*prefix], 1, -1))

    def chosen(self, prefix: Sequence[int], ids: Sequence[int]) -> Call[dict[int, float]]:
        """As in `Dialect`. The server takes at most MOST_CHOSEN_IDS."""
        body = self._body([*prefix], 1, len(ids), logprob_token_ids=[*ids])

        def read(reply: Any) -> dict[int, float]:
            (row,) = self._rows(self._choices(reply, 1)[0], 1)
            chosen = token_list({each: row[each] for each in ids if each in row}, 0, None, None)
            values = dict(zip(chosen.ids.tolist(), chosen.log_p.tolist(), strict=True))
            if len(values) < len({*ids}):
                raise BadReply(f"asked for the ids {shown([*ids])}, got {shown([*values])}")
            return values

        return Call(_PATH, read, body)

    def draft(
        self, prefix: Sequence[int], count: int, top_k: int, temperature: float, seed: int
    ) -> Call[list[DraftedToken]]:
        """As in `Dialect`. The seed is sent where it has an effect."""
        given = {"temperature": temperature, **({"seed": seed} if temperature else {})}
        body = self._body([*prefix], count, self._logprobs(top_k), **given)

        def read(reply: Any) -> list[DraftedToken]:
            choice = self._choices(reply, 1)[0]
            tokens = numbers(choice, "token_ids")
            if not 1 <= len(tokens) <= count:
                raise BadReply(f"asked for at most {count} tokens, got {len(tokens)}")
            lists = self._lists(choice, len(tokens), top_k)
            return [DraftedToken(*each) for each in zip(tokens, lists, strict=True)]

        return Call(_PATH, read, body)

    def score(
        self, prefix: Sequence[int], continuation: Sequence[int], top_k: int, way: Scoring
    ) -> Call[list[TokenList]]:
        """As in `Dialect`."""
        if way == "prompts":
            return self._score_prompts(prefixes(prefix, continuation), top_k)
        wanted = len(continuation) + 1
        whole = [*prefix, *continuation]
        k = self._logprobs(top_k)
        given = {"echo": True} if way == "echo" else {"prompt_logprobs": k}
        body = self._body(whole, 1, k, **given)

        def read(reply: Any) -> list[TokenList]:
            choice = self._choices(reply, 1)[0]
            if way == "echo":
                return self._lists(choice, len(whole) + 1, top_k, last=wanted)
            of_prompt = field(choice, "prompt_logprobs", list)
            if len(of_prompt) != len(whole):
                raise BadReply(f"{len(of_prompt)} prompt_logprobs of {len(whole)} tokens")
            rows = [_prompt_row(row) for row in of_prompt[len(prefix) :]]
            lists = [self._list(row, top_k) for row in rows]
            return [*lists, *self._lists(choice, 1, top_k)]

        return Call(_PATH, read, body)

    def _score_prompts(self, prompts: list[list[int]], top_k: int) -> Call[list[TokenList]]:
        def read(reply: Any) -> list[TokenList]:
            choices = self._choices(reply, len(prompts))
            return [self._lists(choice, 1, top_k)[0] for choice in choices]

        return Call(_PATH, read, self._body(prompts, 1, self._logprobs(top_k)))

    def tokenize(self, text: str) -> Call[list[int]]:
        """As in `Dialect`."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return Call("/tokenize", lambda reply: numbers(reply, "tokens"), body)

    def detokenize(self, ids: Sequence[int]) -> Call[str]:
        """As in `Dialect`."""
        body = {"model": self.model, "tokens": [*ids]}
        return Call("/detokenize", lambda reply: field(reply, "prompt", str), body)

    def ends_text(self, prefix: Sequence[int], token: int) -> Call[bool]:
        """As in `Dialect`."""
        body = self._body([*prefix], 2, 1, allowed_token_ids=[token])

        def read(reply: Any) -> bool:
            choice = self._choices(reply, 1)[0]
            reason = field(choice, "finish_reason", str)
            return numbers(choice, "token_ids") == [token] and reason == "stop"

        return Call(_PATH, read, body)

    def _logprobs(self, top_k: int) -> int:
        return -1 if self._is_full(top_k) else top_k

    def _is_full(self, top_k: int) -> bool:
        return self.rows is not None and top_k >= self.rows

    def _body(self, prompt: Any, tokens: int, logprobs: int, **given: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "logprobs": logprobs,
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            **_NEUTRAL,
            **given,
        }

    def _choices(self, reply: Any, count: int) -> list[Any]:
        """The choices of a reply, in the order of the prompts."""
        model = field(reply, "model", str)
        if self.reply_models and model not in self.reply_models:
            raise BadReply(f"the reply is of the model {shown(model)!r}", "wrong_model")
        choices = field(reply, "choices", list)
        if [field(choice, "index", int) for choice in choices] != [*range(count)]:
            raise BadReply(f"asked for {count} choices, got {shown(choices)}")
        return choices

    def _lists(
        self, choice: Any, count: int, top_k: int, *, last: int | None = None
    ) -> list[TokenList]:
        """The lists of a choice of `count` tokens, or of its last ones."""
        rows = self._rows(choice, count, last or count)
        return [self._list(row, top_k) for row in rows]

    def _rows(self, choice: Any, count: int, last: int | None = None) -> list[dict[int, Any]]:
        """Log-probabilities by id of the `last` positions of a choice of `count` tokens."""
        logprobs = field(field(choice, "logprobs", dict), "top_logprobs", list)
        if len(logprobs) != count:
            raise BadReply(f"lists of {len(logprobs)} positions, where {count} were asked for")
        return [_row(each) for each in logprobs[count - (last or count) :]]

    def _list(self, row: Mapping[int, Any], top_k: int) -> TokenList:
        if self._is_full(top_k):
            return token_list(row, 0, self.vocab_size, self.rows)
        return token_list(row, top_k, self.vocab_size)


def _row(row: Any) -> dict[int, Any]:
    if not isinstance(row, Mapping):
        raise BadReply(f"a list must be an object, got {shown(row)}")
    texts = [name.removeprefix(_PREFIX) for name in row if name.startswith(_PREFIX)]
    if len(texts) < len(row) or not all(text.isdecimal() for text in texts):
        raise BadReply(
            f"the keys of a list must be token ids, as {_PREFIX}5; got {shown([*row])}: "
            "the server ignores return_tokens_as_token_ids"
        )
    values = dict(zip(map(int, texts), row.values(), strict=True))
    if len(values) < len(row):
        raise BadReply(f"an id occurs twice in a list: {shown([*row])}")
    return values


def _prompt_row(row: Any) -> dict[int, Any]:
    if not isinstance(row, Mapping) or not all(name.isdecimal() for name in row):
        raise BadReply(f"a list of prompt_logprobs must be an object by token ids: {shown(row)}")
    return {int(name): field(value, "logprob", object) for name, value in row.items()}
