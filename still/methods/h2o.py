"""H2O: heavy hitters of accumulated attention, and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Eviction, LayerView


@dataclass
class H2O(Eviction):
    """Keeps the tokens that all queries together attended to most, and the most recent ones (arXiv 2306.14048).

    The paper evicts one token at a time while it decodes; after a prefill that reduces to one choice from attention
    accumulated over all queries of the context, which is what is computed here, exactly, for each KV head (the sum
    over the query heads that share it).

    Attributes:
        heavy: share of the slots that goes to heavy hitters; the rest is recent.
        chunk: queries whose attention is held in memory at a time.
    """

    heavy: float = 0.5
    chunk: int = 512

    name: ClassVar[str] = "h2o"
    needs_queries: ClassVar[bool] = True

    def score(self, view: LayerView) -> torch.Tensor:
        """Accumulated attention `[batch, kv_heads, tokens]`, infinite for the recent window."""
        total = self.accumulated(view)
        recent = view.slots - int(view.slots * self.heavy)
        total[..., view.tokens - recent :] = torch.inf
        return total

    def accumulated(self, view: LayerView) -> torch.Tensor:
        """Causal softmax attention that each key got from all queries, `[batch, kv_heads, tokens]`, fp32."""
        queries, keys = view.grouped_queries(), view.keys.float()[:, :, None]
        total = keys.new_zeros(view.keys.shape[:3])
        order = torch.arange(view.tokens, device=keys.device)
        for start in range(0, view.tokens, self.chunk):
            part = queries[..., start : start + self.chunk, :]
            end = start + part.shape[-2]
            logits = part @ keys[..., :end, :].transpose(-1, -2)
            logits = logits.masked_fill(order[:end] > order[start:end, None], -torch.inf)
            total[..., :end] += logits.softmax(-1).sum(dim=(2, 3))
        return total
