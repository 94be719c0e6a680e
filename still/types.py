"""The two records that every way to make a small cache shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache


class CompactKV(NamedTuple):
    """One layer's compact slots.

    Attributes:
        keys: `[batch, kv_heads, slots, head_dim]`, rotated with the model's own RoPE.
        values: `[batch, kv_heads, slots, head_dim]`.
        beta: additive pre-softmax bias `[batch, kv_heads, slots]`, or None for no bias.
    """

    keys: torch.Tensor
    values: torch.Tensor
    beta: torch.Tensor | None = None


@dataclass
class Reading:
    """What the frozen model kept of a context that it has read. Nobody may change `cache`.

    Attributes:
        input_ids: `[batch, tokens]`.
        cache: the full cache of the context.
        attention_mask: `[batch, tokens]`, zeros on the left of shorter rows, or None.
        queries: for each full-attention layer the rotated queries `[batch, query_heads, tokens, head_dim]`,
            kept only when a method needs them.
        seconds: wall time of the forward pass.
    """

    input_ids: torch.Tensor
    cache: Cache
    attention_mask: torch.Tensor | None = None
    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0
