"""Random tokens: does choosing matter at all?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Eviction, LayerView


@dataclass
class Random(Eviction):
    """Keeps a random subset, drawn anew for each layer and KV head, the same for every row and every run.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0

    name: ClassVar[str] = "random"

    def score(self, view: LayerView) -> torch.Tensor:
        """Uniform noise `[batch, kv_heads, tokens]`."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + view.layer)
        heads = range(view.keys.shape[1]) if view.heads is None else view.heads
        noise = torch.rand(max(heads) + 1, view.tokens, generator=generator)[list(heads)]
        return noise.to(view.keys.device).expand(view.keys.shape[:3])
