"""KeyDiff: keys unlike the others carry what is distinct."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import cosine_similarity, normalize

from .base import Eviction, LayerView


@dataclass
class KeyDiff(Eviction):
    """Keeps the keys least similar to the mean direction of all keys (arXiv 2504.15364, section 3)."""

    name: ClassVar[str] = "keydiff"

    def score(self, view: LayerView) -> torch.Tensor:
        """Minus the cosine between each key and the mean of the normalised keys, `[batch, kv_heads, tokens]`."""
        keys = view.keys.float()
        anchor = normalize(keys, dim=-1).mean(dim=2, keepdim=True)
        return -cosine_similarity(keys, anchor, dim=-1)
