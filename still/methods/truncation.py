"""The last t tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Eviction, LayerView


@dataclass
class Truncation(Eviction):
    """Keeps the last `slots` tokens, which had read the rest of the context before it was dropped."""

    name: ClassVar[str] = "truncation"

    def score(self, view: LayerView) -> torch.Tensor:
        """Later is better, `[batch, kv_heads, tokens]`."""
        return torch.arange(view.tokens, device=view.keys.device).expand(view.keys.shape[:3])
