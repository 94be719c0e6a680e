"""SnapKV: the last queries vote for what they attend to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn.functional import avg_pool1d
from transformers.cache_utils import Cache

from ..reading import read_after
from ..types import Reading
from .base import Eviction, LayerView, row_lengths


@dataclass
class SnapKV(Eviction):
    """Keeps what the queries of an observation window attend to, smoothed over neighbours (arXiv 2404.14469).

    Query-agnostic by default: the window is the end of the context itself, and it is kept. With `question_ids` the
    window is the question, read after the context, and nothing of the context is kept unseen: query-aware.

    Attributes:
        window: queries that vote. Where there are no more slots than this, the window shrinks to half the slots.
        kernel_size: odd width of the average over neighbouring votes.
        question_ids: `[batch or 1, question_tokens]`, or None.
    """

    window: int = 32
    kernel_size: int = 5
    question_ids: torch.Tensor | None = field(default=None, repr=False)

    name: ClassVar[str] = "snapkv"
    needs_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                f"window is {self.window} and kernel_size {self.kernel_size}; they must be 1 or more, kernel_size odd"
            )

    @property
    def query_aware(self) -> bool:
        """Whether the question is in the window."""
        return self.question_ids is not None

    def score(self, view: LayerView) -> torch.Tensor:
        """Votes `[batch, kv_heads, tokens]`: infinite for a window of the context, minus infinite for a question."""
        if self.question_ids is not None:
            window, worth = self.question_ids.shape[-1], -torch.inf
        else:
            window, worth = self.window if view.slots > self.window else max(1, view.slots // 2), torch.inf
        votes = self.votes(view.grouped_queries()[..., -window:, :], view.keys)
        return torch.cat([votes, votes.new_full((*votes.shape[:2], window), worth)], dim=-1)

    def votes(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Mean smoothed attention of the last queries on the keys before them.

        Args:
            queries: `[batch, kv_heads, queries_per_kv_head, window, head_dim]`, scaled.
            keys: `[batch, kv_heads, tokens, head_dim]`, the window's own keys last.

        Returns:
            `[batch, kv_heads, tokens - window]`.
        """
        window, tokens = queries.shape[-2], keys.shape[2]
        logits = queries @ keys.float()[:, :, None].transpose(-1, -2)
        order = torch.arange(tokens, device=keys.device)
        logits = logits.masked_fill(order > order[tokens - window :, None], -torch.inf)
        seen = logits.softmax(-1)[..., : tokens - window].mean(dim=-2)
        if not seen.shape[-1]:
            return seen.mean(dim=2)
        flat = seen.flatten(0, 2)[:, None]
        half = self.kernel_size // 2
        return avg_pool1d(flat, self.kernel_size, stride=1, padding=half)[:, 0].unflatten(0, seen.shape[:3]).mean(dim=2)

    def compact(self, model, reading: Reading, slots: int | None = None, ratio: float | None = None) -> Cache:
        """As every method; with `question_ids` the question is read on a copy of the full cache first."""
        if self.question_ids is None:
            return super().compact(model, reading, slots, ratio)
        rows = row_lengths(reading)
        asked = read_after(model, reading, self.question_ids, queries=True)
        longer = [tokens + self.question_ids.shape[-1] for tokens in rows]
        budgets = self.budgets(rows, slots, ratio)
        return self.build(model, reading, self.compact_rows(model, asked, longer, budgets, rows), budgets)
