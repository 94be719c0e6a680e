"""Rows that go on behind a context, which none of them copies.

Many questions of one cache are a batch whose rows all begin alike. Repeated for each row, a context is read from memory
once a row and step; here it is attended to once by the queries of all rows, each row attends to its own tokens by
itself, and the two are merged by their log-sum-exps (Hydragen, Juravsky et al., arXiv 2402.05099). Some rows of a batch
may stand behind one context and some behind another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicLayer

from .attention import NAME, Prefix, with_prefix
from .cache_layer import CompactLayer
from .kernels.prefix_attention import merge_attention, prefix_attention
from .rope import pads_freely


@dataclass(frozen=True)
class Context:
    """What one layer holds of it, for queries of many rows that see all of it.

    Attributes:
        keys: `[1, kv_heads, columns, head_dim]`, rotated.
        values: `[1, kv_heads, columns, value_dim]`.
        prefix: what its first columns want beside that; None where there is nothing.
    """

    keys: torch.Tensor
    values: torch.Tensor
    prefix: Prefix | None = None

    def attend(self, query: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of queries `[rows, query_heads, queries, head_dim]`: output and log-sum-exp."""
        rows, _, queries, _ = query.shape
        folded = query.transpose(0, 1).flatten(1, 2)[None]  # all rows' queries are one row's
        bias, ragged = (None, None) if self.prefix is None else (self.prefix.bias, self.prefix.slots)
        parts = [] if ragged is None else [ragged.attend(folded, scale)]
        if columns := self.keys.shape[2]:
            if bias is not None:
                bias = F.pad(bias, (0, columns - bias.shape[2]))
            parts.append(prefix_attention(folded, self.keys, self.values, bias, scale))
        out, lse = (each[0].unflatten(1, (rows, queries)).transpose(0, 1) for each in reduce(merge_attention, parts))
        return out, lse


@dataclass(frozen=True)
class Contexts:
    """Those of one layer behind which the rows of a batch stand.

    Attributes:
        each: context, and how many rows stand behind it; in the order of the rows.
    """

    each: tuple[tuple[Context, int], ...]

    def attend(self, query: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Context.attend`, each row behind its own."""
        rows = query.split([rows for _, rows in self.each])
        parts = [context.attend(own, scale) for (context, _), own in zip(self.each, rows, strict=True)]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(each) for each in zip(*parts, strict=True))

    def select(self, indices: torch.Tensor) -> Contexts:
        """Of the rows at these ascending indices alone."""
        owner = torch.arange(len(self.each)).repeat_interleave(torch.tensor([rows for _, rows in self.each]))
        left = owner[indices.cpu()].bincount(minlength=len(self.each)).tolist()
        return Contexts(tuple((context, rows) for (context, _), rows in zip(self.each, left, strict=True) if rows))


class Behind(DynamicLayer):
    """A row's own keys and values, of each of many rows; they begin empty.

    Args:
        contexts: that the rows go on behind.
    """

    def __init__(self, contexts: Contexts):
        super().__init__()
        self.contexts = contexts

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store new tokens; the keys that are returned carry the contexts to `still_attention`."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return with_prefix(keys, values, Prefix(0, None, self.contexts))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows, in the order that they have."""
        super().batch_select_indices(indices)
        self.contexts = self.contexts.select(indices)


def goes_behind(model) -> bool:
    """Whether rows of this model can stand behind a context: it takes another attention, and all of it is full."""
    config, own = model.config.get_text_config(decoder=True), model.config._attn_implementation
    if getattr(config, "attn_logit_softcapping", None) or not pads_freely(config):
        return False
    # A model that ignores another attention would not see the context at all.
    return own == NAME or (own == "sdpa" and model._can_set_attn_implementation())


def contexts(model, cache: Cache, room: int) -> list[Context] | None:
    """Each layer of a one-row cache as a context, or None where rows have to copy it.

    Args:
        model: that reads the rows, by `still.attention`; see `goes_behind`.
        cache: full or compact. It is left as it is, and must be until the rows are done.
        room: tokens that rows bring at most.
    """
    if not goes_behind(model):
        return None
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    held = [_context(layer, room) for layer in cache.layers]
    return held if len(held) == layers and None not in held else None


def rows_behind(*held: tuple[list[Context], int]) -> Cache:
    """A cache of rows that have no token yet, so many behind each context; for every layer one, as `contexts` gives."""
    layers = zip(*([(context, rows) for context in own] for own, rows in held), strict=True)
    return Cache(layers=[Behind(Contexts(each)) for each in layers])


def _context(layer, room: int) -> Context | None:
    if not layer.is_initialized or len(layer.keys) != 1:
        return None
    if type(layer) is DynamicLayer:
        return Context(layer.keys, layer.values)
    if not isinstance(layer, CompactLayer) or layer.live is not None or layer.compacts_within(room):
        return None
    return Context(layer.keys, layer.values, layer.prefix)
