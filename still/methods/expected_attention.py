"""Expected attention: what Gaussian queries of the future will attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..rope import rotate, unrotate
from .base import Eviction, LayerView


@dataclass
class ExpectedAttention(Eviction):
    """Keeps the entries with the largest expected attention of future queries (arXiv 2510.00636).

    The context's un-rotated queries give a Gaussian for each query head; it is turned by the rotary matrix averaged
    over the next positions, and a key's expected logit is `mu k + k^T Sigma k / 2` (equation 8, with the softmax scale
    in the queries). Softmax over the keys, mean over the query heads of a KV head, times the norm of the value.

    Attributes:
        future: positions after the context that the rotation is averaged over.
        n_sink: first tokens, always kept and left out of the statistics; at most half of the slots.
        use_covariance: add the quadratic term.
        use_vnorm: weigh by the norm of the values.
        epsilon: added to the attention before the norm is multiplied in.
    """

    future: int = 512
    n_sink: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    name: ClassVar[str] = "expected_attention"
    needs_queries: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True

    def score(self, view: LayerView) -> torch.Tensor:
        """Expected attention `[batch, kv_heads, tokens]`, infinite for the sinks."""
        sink = min(self.n_sink, view.slots // 2, view.tokens - 1)
        mean, covariance = self.future_queries(view, sink)
        keys, values = view.keys[:, :, sink:].float(), view.values[:, :, sink:].float()
        logits = torch.einsum("bhgd,bhtd->bhgt", mean, keys)
        if covariance is not None:
            logits = logits + torch.einsum("bhtd,bhgde,bhte->bhgt", keys, covariance, keys) / 2
        worth = logits.softmax(-1).mean(dim=2)
        if self.use_vnorm:
            worth = (worth + self.epsilon) * values.norm(dim=-1)
        return torch.nn.functional.pad(worth, (sink, 0), value=torch.inf)

    def future_queries(self, view: LayerView, sink: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean `[batch, kv_heads, group, head_dim]` and covariance `[.., head_dim, head_dim]` of future queries."""
        plain = unrotate(view.queries.float(), *view.rotary.cos_sin(view.layer, view.positions))[:, :, sink:]
        mean = plain.mean(dim=2, keepdim=True)
        ahead = torch.arange(self.future, device=plain.device) + view.positions.max() + 1
        cos, sin = (table.mean(dim=1, keepdim=True) for table in view.rotary.cos_sin(view.layer, ahead))
        turned = rotate(mean, cos, sin).squeeze(2)
        covariance = None
        if self.use_covariance:
            centred = rotate(plain - mean, cos, sin)
            covariance = torch.einsum("bhnd,bhne->bhde", centred, centred) / centred.shape[2]
            covariance = covariance.unflatten(1, (view.keys.shape[1], -1))
        return turned.unflatten(1, (view.keys.shape[1], -1)), covariance
