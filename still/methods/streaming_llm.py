"""StreamingLLM: attention sinks and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..rope import rotate, unrotate
from ..types import CompactKV
from .base import Eviction, LayerView


@dataclass
class StreamingLLM(Eviction):
    """Keeps the first few tokens and the most recent ones (arXiv 2309.17453, section 3.2).

    Attributes:
        n_sink: first tokens to keep, at most half of the slots.
        renumber: the paper's positions inside the cache: the kept keys are turned to stand side by side right before
            the next token. Off, they keep the positions where they stood.
    """

    n_sink: int = 4
    renumber: bool = False

    name: ClassVar[str] = "streaming_llm"

    @property
    def needs_rotary(self) -> bool:
        """Only re-numbering turns keys."""
        return self.renumber

    def score(self, view: LayerView) -> torch.Tensor:
        """Sinks before all others, then later is better, `[batch, kv_heads, tokens]`."""
        worth = torch.arange(view.tokens, device=view.keys.device)
        worth[: min(self.n_sink, view.slots // 2)] += view.tokens
        return worth.expand(view.keys.shape[:3])

    def compact_view(self, view: LayerView) -> CompactKV:
        """The kept entries, at their own positions or side by side."""
        kept = super().compact_view(view)
        if not self.renumber:
            return kept
        index = self.select(view)[:, 0]
        stood = view.positions.expand(index.shape[0], -1).gather(1, index)
        stand = view.positions.expand(index.shape[0], -1)[:, -view.slots :]
        turned = unrotate(kept.keys.float(), *view.rotary.cos_sin(view.layer, stood))
        turned = rotate(turned, *view.rotary.cos_sin(view.layer, stand))
        return CompactKV(turned.to(kept.keys.dtype), kept.values)
