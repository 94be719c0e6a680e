"""The two records that every way to make a small cache shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache


class CompactKV(NamedTuple):
    """One layer's compact slots: uniform over its KV heads, or ragged where `counts` is given.

    Uniform, `[batch, kv_heads, slots, head_dim]`. Ragged, the heads' slots are packed one head after the other:
    `[batch, sum(counts), head_dim]`, head `h` from column `sum(counts[:h])` on, `counts[h]` columns long.

    Attributes:
        keys: rotated with the model's own RoPE.
        values: as `keys`.
        beta: additive pre-softmax bias, as `keys` without their last dimension; None for no bias.
        counts: slots of each KV head, which may differ; None in a uniform record.
        positions: logical positions at which the slots are rotated, `[batch or 1, slots]`, of a ragged record
            `[batch or 1, sum(counts)]`; None where the producer does not know (they are spread evenly then).
        row_counts: live slots of each row and KV head of a ragged record, `[batch][kv_heads]`, where rows of a padded
            batch have fewer than `counts`; a row's dead columns stand on the left of each head's. None: all are live.
    """

    keys: torch.Tensor
    values: torch.Tensor
    beta: torch.Tensor | None = None
    counts: tuple[int, ...] | None = None
    positions: torch.Tensor | None = None
    row_counts: tuple[tuple[int, ...], ...] | None = None


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
