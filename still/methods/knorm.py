"""Knorm: keys of small norm attract attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Eviction, LayerView


@dataclass
class Knorm(Eviction):
    """Keeps the keys of the smallest L2 norm (arXiv 2406.11430)."""

    name: ClassVar[str] = "knorm"

    def score(self, view: LayerView) -> torch.Tensor:
        """Minus the norm of each key, `[batch, kv_heads, tokens]`."""
        return -view.keys.float().norm(dim=-1)
