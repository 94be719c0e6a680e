"""How a window becomes slots: shared by the backends, which play, and by the trainers, which make them again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from transformers import Cache

from ...attention import NAME as ATTENTION
from ...cache import StillCache
from ...methods.base import Method, attention_scale
from ...reading import read
from ...rope import Rotary, full_attention_layers
from ...types import CompactKV
from ..cells import UNEVEN

Raw = Mapping[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values `[1, kv_heads, tokens, head_dim]` of each full-attention layer."""


def exact_cache(model, base_ids: Sequence[int], full: Cache | None = None) -> StillCache:
    """A cache of S and U, each token an entry of its own.

    Args:
        model: the policy.
        base_ids: of S and U.
        full: a cache of full attention that has read them, and more behind them; they are read unless given.
    """
    tokens = len(base_ids)
    if full is None:
        full = read(model, torch.tensor([list(base_ids)], device=model.device)).cache
    states = {i: (full.layers[i].keys, full.layers[i].values) for i in full_attention_layers(model.config)}
    layers = {i: CompactKV(*(x[:, :, :tokens] for x in own)) for i, own in states.items()}
    return StillCache.from_layers(model.config, layers, tokens, source=full, positions=torch.arange(tokens))


def fingerprint(method: Method | None) -> str:
    """Sixteen hex digits of the weights that make a method's slots; empty where it has none."""
    compactor = getattr(method, "compactor", None)
    if compactor is None:
        return ""
    found = hashlib.sha256()
    for name, tensor in sorted(compactor.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def called(method: Method) -> str:
    """What commands and rows call a method: with a split of its slots it is another one."""
    return method.name if method.split is None else method.name + UNEVEN


def check_attention(method: Method, model) -> None:
    """Refuse a model whose attention cannot serve a method's slots.

    Raises:
        ValueError: says why, and how to load it.
    """
    if method.needs_still_attention and model.config._attn_implementation != ATTENTION:
        why = "are divided unevenly" if method.split is not None else "carry a bias"
        raise ValueError(f"the slots of {method.name} {why}: load the model with attn_implementation='still'")


class SlotMaker:
    """Makes slots with one method for one model; differentiable where the method is.

    Args:
        method: ready to compact.
        model: whose keys and values they are.
    """

    def __init__(self, method: Method, model):
        self.method, self.model = method, model
        self.rotary = Rotary.for_model(model) if method.needs_rotary else None

    def append(
        self, raw: Raw, positions: torch.Tensor, count: int, queries: Mapping[int, torch.Tensor]
    ) -> tuple[dict[int, CompactKV], torch.Tensor | None]:
        """Slots of a window alone, and where they are rotated (None: spread evenly).

        Args:
            raw: of the window.
            positions: logical positions `[tokens]`.
            count: slots.
            queries: rotated ones `[1, query_heads, tokens, head_dim]`, for methods that need them.
        """
        method, asked = self.method, {}
        if method.needs_queries:
            asked = {i: seen.float() * attention_scale(self.model, i) for i, seen in queries.items()}
        if counts := method.head_counts(self.model, len(positions), count):
            return {
                i: method.compact_heads(i, *own, positions, counts[i], asked.get(i), self.rotary)
                for i, own in raw.items()
            }, None
        return method.compact_layers(raw, positions, count, asked, self.rotary), self._where(positions, count)

    def recompact(
        self, cache: StillCache, base: int, raw: Raw, positions: torch.Tensor, count: int
    ) -> tuple[dict[int, CompactKV], torch.Tensor | None]:
        """Slots of what is held and of a window, together.

        Args:
            cache: whose first `base` slots are S and U and whose further ones are compacted again.
            base: tokens of S and U.
            raw: of the window.
            positions: of the window `[tokens]`.
            count: slots in all.

        Raises:
            ValueError: slots with a bias, unequal ones, or those of a method that looks at queries cannot be compacted
                again.
        """
        if self.method.split is not None:
            raise ValueError("slots that are divided unevenly cannot be compacted again; raise the budget")
        both, every = {}, None
        for layer in cache.compact_layers:
            if layer.beta is not None or self.method.needs_queries:
                raise ValueError(f"slots of {self.method.name} cannot be compacted again; raise the budget")
            old = layer.slot_positions[0, base:].to(positions.device)
            every = torch.cat((old.to(torch.promote_types(old.dtype, torch.long)), positions))
            held = (x[:, :, base : layer.slots] for x in (layer.keys, layer.values))
            both[layer.index] = tuple(torch.cat(pair, dim=2) for pair in zip(held, raw[layer.index], strict=True))
        return self.method.compact_layers(both, every, count, rotary=self.rotary), self._where(every, count)

    def _where(self, positions: torch.Tensor, count: int) -> torch.Tensor | None:
        if self.method.name == "full":
            return positions
        compactor = getattr(self.method, "compactor", None)
        return None if compactor is None else compactor.slot_positions(positions, count)
