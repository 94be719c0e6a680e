"""Rows that go on behind one context, which none of them copies.

Many questions of one cache are a batch whose rows all begin alike. Repeated for each row, a context is read from memory
once a row and step; here it is attended to once by the queries of all rows, each row attends to its own tokens by
itself, and the two are merged by their log-sum-exps (Hydragen, Juravsky et al., arXiv 2402.05099).
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


class Behind(DynamicLayer):
    """A row's own keys and values, of each of many rows; they begin empty.

    Args:
        context: that all rows go on behind.
    """

    def __init__(self, context: Context):
        super().__init__()
        self.context = context

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store new tokens; the keys that are returned carry the context to `still_attention`."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return with_prefix(keys, Prefix(0, None, self.context)), values


def contexts(model, cache: Cache, room: int) -> list[Context] | None:
    """Each layer of a one-row cache as a context, or None where rows have to copy it.

    Args:
        model: that reads the rows, by `still.attention`; of full attention alone.
        cache: full or compact. It is left as it is, and must be until the rows are done.
        room: tokens that rows bring at most.
    """
    config = model.config.get_text_config(decoder=True)
    plain = not getattr(config, "attn_logit_softcapping", None) and pads_freely(config)
    own = model.config._attn_implementation
    # A model that ignores another attention would not see the context at all.
    if not plain or (own != NAME and not (own == "sdpa" and model._can_set_attn_implementation())):
        return None
    held = [_context(layer, room) for layer in cache.layers]
    return held if len(held) == config.num_hidden_layers and None not in held else None


def rows_behind(held: list[Context]) -> Cache:
    """A cache of rows that have no token yet."""
    return Cache(layers=[Behind(context) for context in held])


def _context(layer, room: int) -> Context | None:
    if not layer.is_initialized or len(layer.keys) != 1:
        return None
    if type(layer) is DynamicLayer:
        return Context(layer.keys, layer.values)
    if not isinstance(layer, CompactLayer) or layer.live is not None or layer.compacts_within(room):
        return None
    return Context(layer.keys, layer.values, layer.prefix)
