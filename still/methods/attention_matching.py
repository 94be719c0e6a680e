"""Attention Matching: chosen keys, a fitted bias, least-squares values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..rope import rotate, unrotate
from ..types import CompactKV
from .base import LayerView, Method


@dataclass
class AttentionMatching(Method):
    """Matches the attention mass and output of reference queries, per KV head (arXiv 2602.16284, section 3).

    With `A` the attention of the reference queries on all keys: keep the keys with the largest root mean square of
    `A` (or choose them by orthogonal matching pursuit on the mass); fit weights `w = exp(beta)` so that the kept keys
    carry the whole mass, `A_kept w = 1`, by nonnegative least squares in a box; fit values by least squares so that
    the softmax over the biased slots gives the outputs of the full cache.

    The reference queries are the context's own, moved to positions right after it, where they see all keys:
    query-agnostic, and no forward besides the reading. Rows of `A` are divided by their mass, so each query counts
    the same; values are pulled towards the originals rather than to zero.

    Attributes:
        keys: `"attention"` or `"omp"`.
        references: most reference queries per KV head, taken at even steps.
        future: the queries are moved to the first `future` positions after the context, over and over.
        box: bound on `|beta|`.
        iterations: of the nonnegative least squares (accelerated projected gradient).
        omp_step: keys that matching pursuit adds between two fits.
        ridge: pull on values and weights, relative to the mean square of the features.
    """

    keys: str = "attention"
    references: int = 1024
    future: int = 256
    box: float = 3.0
    iterations: int = 100
    omp_step: int = 4
    ridge: float = 1e-4

    name: ClassVar[str] = "attention_matching"
    synthesis: ClassVar[bool] = True
    needs_queries: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True
    uses_beta: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.keys not in ("attention", "omp"):
            raise ValueError(f"keys is {self.keys!r}; choose 'attention' or 'omp'")

    def compact_view(self, view: LayerView) -> CompactKV:
        """Kept keys `[batch, kv_heads, slots, head_dim]`, fitted values and beta."""
        logits = self.reference_queries(view) @ view.keys.float().transpose(-1, -2)
        attention = logits.softmax(-1)
        if self.keys == "omp":
            index = self.pursue(attention, view.slots)
        else:
            index = attention.square().mean(dim=-2).topk(view.slots, dim=-1).indices
        index = index.sort(dim=-1).values
        mass = attention.gather(-1, index[..., None, :].expand(*attention.shape[:-1], -1))
        weights = self.fit_weights(mass)

        def kept(x: torch.Tensor) -> torch.Tensor:
            return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))

        values = self.fit_values(mass, weights, attention @ view.values.float(), kept(view.values).float())
        dtype = view.keys.dtype
        return CompactKV(kept(view.keys), values.to(dtype), weights.log().to(dtype))

    def reference_queries(self, view: LayerView) -> torch.Tensor:
        """Queries `[batch, kv_heads, references, head_dim]` that stand after the context."""
        queries = unrotate(view.queries.float(), *view.rotary.cos_sin(view.layer, view.positions))
        where = torch.arange(view.tokens, device=queries.device) % self.future + view.positions.max() + 1
        queries = rotate(queries, *view.rotary.cos_sin(view.layer, where))
        queries = queries.unflatten(1, (view.keys.shape[1], -1)).flatten(2, 3)
        count = queries.shape[2]
        if count > self.references:
            queries = queries[:, :, torch.linspace(0, count - 1, self.references, device=queries.device).long()]
        return queries

    def fit_weights(self, mass: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
        """Weights `[.., slots]` in the box with `mass @ weights` nearest to 1, for `mass` `[.., references, slots]`."""
        low, high = torch.exp(torch.tensor([-self.box, self.box], dtype=torch.float32)).tolist()
        gram, target = mass.transpose(-1, -2) @ mass, mass.sum(dim=-2)
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None].clamp_min(1e-30)
        step = 1 / gram.abs().sum(-1).amax(-1)[..., None].clamp_min(1e-30).add(self.ridge * scale)
        weights = torch.ones_like(target) if start is None else start
        ahead, momentum = weights, 1.0
        for _ in range(self.iterations):
            slope = (gram @ ahead[..., None])[..., 0] - target + self.ridge * scale * (ahead - 1)
            new = (ahead - step * slope).clamp(low, high)
            after = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead, weights, momentum = new + (momentum - 1) / after * (new - weights), new, after
        return weights

    def fit_values(
        self, mass: torch.Tensor, weights: torch.Tensor, outputs: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        """Values `[.., slots, head_dim]` for which the biased slots give `outputs`, near `start` where undecided."""
        attention = mass * weights[..., None, :]
        attention = attention / attention.sum(-1, keepdim=True).clamp_min(1e-30)
        gram = attention.transpose(-1, -2) @ attention
        pull = self.ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None].clamp_min(1e-30)
        gram = gram + torch.diag_embed(pull.expand(gram.shape[:-1]))
        return start + torch.linalg.solve(gram, attention.transpose(-1, -2) @ (outputs - attention @ start))

    def pursue(self, attention: torch.Tensor, slots: int) -> torch.Tensor:
        """Indices `[batch, kv_heads, slots]` that orthogonal matching pursuit picks to carry the mass."""
        norms = attention.norm(dim=-2).clamp_min(1e-30)
        left = torch.ones_like(attention[..., 0])
        index = torch.empty(*attention.shape[:2], 0, dtype=torch.long, device=attention.device)
        free = torch.zeros_like(norms)
        weights = norms[..., :0]
        while index.shape[-1] < slots:
            fit = (left[..., None, :] @ attention)[..., 0, :] / norms + free
            new = fit.topk(min(self.omp_step, slots - index.shape[-1]), dim=-1).indices
            free = free.scatter(-1, new, -torch.inf)
            index = torch.cat([index, new], dim=-1)
            mass = attention.gather(-1, index[..., None, :].expand(*attention.shape[:-1], -1))
            weights = self.fit_weights(mass, torch.cat([weights, torch.ones_like(new, dtype=weights.dtype)], dim=-1))
            left = 1 - (mass @ weights[..., None])[..., 0]
        return index
