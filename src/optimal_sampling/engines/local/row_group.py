"""Rows that go through a model together, over the cache that its `generate` would hand on.

Texts are right-aligned: a shorter one has filler on its left, which the attention mask hides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Group", "StockRow", "filler_mask", "merge"]

LAYERS = {
    "DummyLayer",
    "DynamicLayer",
    "DynamicIndexedLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}
"""Classes of Transformers' cache layers that `_parts` knows."""
TOKENS = {
    "keys": (0, 2),
    "values": (0, 2),
    "indexer_keys": (0, 1),
    "indexer_position_ids": (1, 2),
}
"""Tensors of a cache layer that grow with the text: the axes of rows and of tokens."""
STATES = ("conv_states", "recurrent_states")
"""Dictionaries of tensors whose first axis is the rows, and that do not grow."""
ALIGNED = ("attention_mask", "position_ids")
"""Arguments that `Group.align` makes."""


@dataclass(slots=True, eq=False)
class StockRow:
    """One row: the tokens that no forward pass has seen, and the group in which the others were."""

    pending: list[int] = field(default_factory=list)
    length: int = 0
    """Tokens that the model's cache holds."""
    group: Group | None = None


@dataclass(slots=True, eq=False)
class Group:
    """Rows that go through the model together."""

    rows: list[StockRow]
    ids: Int[Tensor, "rows tokens"]
    """Those that the cache holds, right-aligned."""
    kwargs: dict[str, Any]
    """What `generate` hands from one forward pass to the next, the cache among it."""

    def keep(self, rows: list[StockRow]) -> None:
        """Drop every row but these, which are in the group's order."""
        if len(rows) == len(self.rows):
            return
        index = torch.tensor([self.rows.index(row) for row in rows], device=self.ids.device)
        count = len(self.rows)
        self.ids = self.ids[index]
        for name, value in self.kwargs.items():
            if hasattr(value, "reorder_cache"):
                value.reorder_cache(index)
            elif isinstance(value, Tensor) and value.shape[:1] == (count,) and count > 1:
                self.kwargs[name] = value[index]
        self.rows = rows

    def fit(self, width: int) -> None:
        """Add filler on the left of every row, or take it away, up to this many tokens."""
        more = width - self.ids.shape[1]
        if not more:
            return
        self.ids = _resized(self.ids, 1, width)
        for layer in _layers(self.kwargs):
            _fit_layer(layer, more)

    def align(self) -> None:
        """Make the mask and the positions anew, after rows were dropped or added.

        They include the next token, which `generate` counts as soon as it is drawn.
        """
        lengths = [row.length for row in self.rows]
        self.fit(max(lengths))
        known = torch.tensor(lengths, device=self.ids.device) + 1
        mask = filler_mask(known, self.ids.shape[1] + 1)
        # all ones mean the same as none, which lets a model skip its mask
        self.kwargs["attention_mask"] = None if mask.all() else mask
        if self.kwargs.get("position_ids") is not None:
            self.kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)

    def joins(self, other: Group) -> bool:
        """Whether `merge` can join the two groups' caches and other arguments."""
        one, two = self.kwargs, other.kwargs
        if one.keys() != two.keys() or not (_is_known(self) and _is_known(other)):
            return False
        shapes = [[_shape(part) for part in _all_parts(kwargs)] for kwargs in (one, two)]
        plain = [name for name in one if name not in ALIGNED and not _is_cache(one[name])]
        return shapes[0] == shapes[1] and all(one[name] == two[name] for name in plain)


def filler_mask(lengths: Int[Tensor, " rows"], width: int) -> Int[Tensor, "rows width"]:
    """1 where a right-aligned row has a token of its own, 0 where it has filler."""
    position = torch.arange(width, device=lengths.device)
    return (position >= width - lengths[:, None]).long()


def merge(groups: list[Group]) -> Group:
    """One group of several that join; it takes their caches. `align` has to follow."""
    width = max(group.ids.shape[1] for group in groups)
    for group in groups:
        group.fit(width)
    first = groups[0]
    for layers in zip(*(_layers(group.kwargs) for group in groups), strict=True):
        # layer by layer, so that little is held twice
        for same in zip(*map(_parts, layers), strict=True):
            joined = torch.cat([part.tensor for part in same], same[0].row_axis)
            for part in same:
                part.holder[part.name] = None
            same[0].holder[same[0].name] = joined
    first.ids = torch.cat([group.ids for group in groups])
    first.rows = [row for group in groups for row in group.rows]
    for row in first.rows:
        row.group = first
    return first


class _Part(NamedTuple):
    """One tensor of a cache layer."""

    holder: dict[Any, Any]
    name: Any
    row_axis: int
    token_axis: int | None

    @property
    def tensor(self) -> Tensor:
        found: Tensor = self.holder[self.name]
        return found


def _is_cache(value: Any) -> bool:
    return hasattr(value, "layers")


def _layers(kwargs: dict[str, Any]) -> list[Any]:
    return [layer for value in kwargs.values() if _is_cache(value) for layer in value.layers]


def _parts(layer: Any) -> Iterator[_Part]:
    """The tensors of a layer that it has made so far."""
    own = vars(layer)
    for name, (row_axis, token_axis) in TOKENS.items():
        if own.get(name) is not None:
            yield _Part(own, name, row_axis, token_axis)
    for name in STATES:
        for key, state in own.get(name, {}).items():
            if state is not None:
                yield _Part(own[name], key, 0, None)


def _all_parts(kwargs: dict[str, Any]) -> list[_Part]:
    return [part for layer in _layers(kwargs) for part in _parts(layer)]


def _shape(part: _Part) -> tuple[Any, ...]:
    """What has to be equal in caches that are joined."""
    rest = [
        size
        for axis, size in enumerate(part.tensor.shape)
        if axis not in (part.row_axis, part.token_axis)
    ]
    return part.name, part.tensor.ndim, part.tensor.dtype, tuple(rest)


def _is_known(group: Group) -> bool:
    """Whether all that the group's forward passes are given is of kinds known here."""
    caches = [value for value in group.kwargs.values() if _is_cache(value)]
    layers = _layers(group.kwargs)
    names = {(type(x).__module__, type(x).__name__) for x in layers}
    if [type(cache).__name__ for cache in caches] != ["DynamicCache"]:
        return False
    if not names <= {("transformers.cache_utils", name) for name in LAYERS}:
        return False
    width = group.ids.shape[1]
    if any(_tokens(layer) not in (None, width) for layer in layers):
        return False
    rest = [v for k, v in group.kwargs.items() if k not in ALIGNED and not _is_cache(v)]
    positions = group.kwargs.get("position_ids")
    return (positions is None or positions.ndim == 2) and all(
        value is None or isinstance(value, (bool, int, str)) for value in rest
    )


def _tokens(layer: Any) -> int | None:
    """Tokens of a layer's text; None for a layer that holds none, such as a recurrent one."""
    if vars(layer).get("keys") is None:
        return None
    length: int = layer.get_seq_length()
    return length


def _fit_layer(layer: Any, more: int) -> None:
    length = _tokens(layer)
    if length is None:
        return
    length += more
    if hasattr(layer, "cumulative_length"):  # a window, of which the last tokens are kept
        layer.cumulative_length = length
        length = min(length, layer.sliding_window - 1)
    for part in _parts(layer):
        if part.token_axis is not None:
            part.holder[part.name] = _resized(part.tensor, part.token_axis, length)


def _resized(tensor: Tensor, axis: int, length: int) -> Tensor:
    """The last `length` entries along an axis, with zeros before them where there are fewer."""
    more = length - tensor.shape[axis]
    if more <= 0:
        return tensor.narrow(axis, -more, length)
    behind = tensor.ndim - 1 - axis
    return pad(tensor, (0, 0) * behind + (more, 0))
