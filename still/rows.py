"""Rows of a padded batch: how long they are, and what was compacted apart, back in one record."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from .types import CompactKV


def join_rows(parts: Sequence[CompactKV], rows: Sequence[Sequence[int]]) -> CompactKV:
    """One record of all rows from groups of rows with different numbers of slots.

    Rows with fewer slots get columns of zeros on the left: of the whole row in uniform records, of each head in ragged
    ones, whose `row_counts` then say what is live. All parts are uniform, or all are ragged.

    Args:
        parts: one record for each group.
        rows: the rows of each group, by their place in the batch.
    """
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([row for group in rows for row in group]).argsort()

    def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = torch.cat(tensors)
        return whole[order.to(whole.device)]

    if parts[0].counts is None:
        width = max(part.keys.shape[2] for part in parts)
        return CompactKV(
            stacked([_left(part.keys, 2, width) for part in parts]),
            stacked([_left(part.values, 2, width) for part in parts]),
            None if parts[0].beta is None else stacked([_left(part.beta, 2, width) for part in parts]),
        )
    widths = [max(counts) for counts in zip(*(part.counts for part in parts), strict=True)]

    def heads(part: CompactKV, name: str) -> torch.Tensor:
        x = getattr(part, name)
        if name == "positions":
            x = x.expand(len(part.keys), -1)
        own = x.split(part.counts, dim=1)
        return torch.cat([_left(head, 1, n) for head, n in zip(own, widths, strict=True)], dim=1)

    def joined(name: str) -> torch.Tensor | None:
        return None if getattr(parts[0], name) is None else stacked([heads(part, name) for part in parts])

    live = [part.counts for part, group in zip(parts, rows, strict=True) for _ in group]
    tables = {name: joined(name) for name in ("keys", "values", "beta", "positions")}
    return CompactKV(**tables, counts=tuple(widths), row_counts=tuple(live[place] for place in order.tolist()))


def _left(x: torch.Tensor, dim: int, width: int) -> torch.Tensor:
    """`x` with zeros on the left of a dim, up to `width`."""
    return pad(x, (0, 0) * (x.ndim - 1 - dim) + (width - x.shape[dim], 0))


def cached_lengths(cache: Cache, attention_mask: torch.Tensor | None) -> list[int]:
    """Real tokens of each row of a full cache, under a mask `[batch, tokens]` of left padding or None.

    Raises:
        ValueError: there is none, in the cache or in a row, or the mask has another length.
    """
    tokens = cache.get_seq_length()
    if tokens < 1:
        raise ValueError("the cache is empty; read a context into it first")
    if attention_mask is None:
        layer = next(layer for layer in cache.layers if getattr(layer, "keys", None) is not None)
        return [tokens] * layer.keys.shape[0]
    if attention_mask.shape[-1] != tokens:
        raise ValueError(f"the attention mask covers {attention_mask.shape[-1]} tokens, the cache holds {tokens}")
    rows = attention_mask.long().sum(-1).tolist()
    if min(rows) < 1:
        raise ValueError(f"row {rows.index(min(rows))} of the batch has no token")
    return rows
