"""The protocol that every way to make a small cache follows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..budgets import resolve_slots
from ..rope import Rotary, full_attention_layers
from ..types import CompactKV, Reading


@dataclass
class LayerView:
    """One full-attention layer of equally long rows, as a method sees it.

    Attributes:
        layer: index of the layer.
        keys: `[batch, kv_heads, tokens, head_dim]`, rotated at `positions`.
        values: `[batch, kv_heads, tokens, head_dim]`.
        positions: logical positions `[tokens]` or `[batch, tokens]`.
        slots: how many slots to keep, between 1 and `tokens`.
        queries: rotated queries `[batch, query_heads, tokens, head_dim]` in fp32 times the layer's softmax scale, so
            that `queries @ keys^T` are the attention logits; None unless the method needs them.
        rotary: the model's rotary tables; None unless the method needs them.
    """

    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    slots: int
    queries: torch.Tensor | None = None
    rotary: Rotary | None = None

    @property
    def tokens(self) -> int:
        """Tokens in each row."""
        return self.keys.shape[2]

    def grouped_queries(self) -> torch.Tensor:
        """Queries by the KV head that they read, `[batch, kv_heads, queries_per_kv_head, tokens, head_dim]`, fp32."""
        if self.queries is None:
            raise ValueError("this method needs the context's queries: call read(..., queries=True)")
        return self.queries.float().unflatten(1, (self.keys.shape[1], -1))


@dataclass
class Method:
    """A way to make a small cache; the fields of a subclass are its hyper-parameters.

    Attributes:
        name: what the registry and result rows call it.
        query_aware: it saw the question before it chose.
        synthesis: it makes new entries (compaction) instead of choosing some (eviction).
        needs_queries: it needs `read(..., queries=True)`.
        needs_rotary: it needs the model's rotary tables.
        uses_beta: its slots carry a bias, so the model must run `attn_implementation="still"`.
        fixed_size: its size does not follow the budget (full, none and the quantised caches).
    """

    name: ClassVar[str] = ""
    query_aware: ClassVar[bool] = False
    synthesis: ClassVar[bool] = False
    needs_queries: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = False
    uses_beta: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = False

    def compact(self, model, reading: Reading, slots: int | None = None, ratio: float | None = None) -> Cache:
        """Make a small cache of what was read; `reading.cache` is left as it was.

        Args:
            model: the frozen model.
            reading: of the context.
            slots: slots per KV head (a row with fewer tokens keeps all of them), or
            ratio: tokens per slot; each row of a padded batch gets the slots of its own length.

        Returns:
            A `StillCache` at the context's logical length.

        Raises:
            ValueError: the budget does not fit, or the reading lacks what the method needs.
        """
        rows = row_lengths(reading)
        budgets = self.budgets(rows, slots, ratio)
        return self.build(model, reading, self.compact_rows(model, reading, rows, budgets), budgets)

    def build(self, model, reading: Reading, layers: dict[int, CompactKV], budgets: list[int]) -> Cache:
        """A `StillCache` of compact layers; sliding-window and linear-attention layers are copied as they are."""
        from ..cache import StillCache

        return StillCache.from_layers(
            model.config,
            layers,
            reading.input_ids.shape[-1],
            source=reading.cache,
            token_ids=reading.input_ids,
            attention_mask=reading.attention_mask,
            row_slots=budgets,
            provenance={"method": self.name, "options": self.options(), "query_aware": self.query_aware},
        )

    def compact_layer(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        slots: int,
        queries: torch.Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> CompactKV:
        """Compact one layer of equally long rows; see `LayerView` for the shapes."""
        return self.compact_view(LayerView(layer, keys, values, positions, slots, queries, rotary))

    def compact_view(self, view: LayerView) -> CompactKV:
        """Compact one layer; what a subclass writes."""
        raise NotImplementedError(f"{type(self).__name__} works on whole caches: call compact")

    def budgets(self, rows: list[int], slots: int | None, ratio: float | None) -> list[int]:
        """Slots of each row of a batch."""
        if slots is not None and slots > max(rows):
            raise ValueError(f"slots is {slots}; it must lie between 1 and the context's {max(rows)} tokens")
        return [resolve_slots(tokens, None if slots is None else min(slots, tokens), ratio) for tokens in rows]

    @torch.no_grad()
    def compact_rows(self, model, reading: Reading, rows: list[int], budgets: list[int]) -> dict[int, CompactKV]:
        """Compact each full-attention layer, each row from its own tokens, shorter rows' slots on the right.

        Returns:
            For each layer `[batch, kv_heads, max(budgets), head_dim]`, asserted.
        """
        if self.needs_queries and not reading.queries:
            raise ValueError(f"{self.name} needs the context's queries: call read(model, ids, queries=True)")
        rotary = Rotary.for_model(model) if self.needs_rotary else None
        groups: dict[tuple[int, int], list[int]] = {}
        for row, shape in enumerate(zip(rows, budgets, strict=True)):
            groups.setdefault(shape, []).append(row)
        layers = {}
        for layer in full_attention_layers(model.config):
            source = reading.cache.layers[layer]
            parts = []
            for (tokens, slots), members in groups.items():
                at = slice(None) if len(groups) == 1 else torch.tensor(members, device=source.keys.device)
                keys, values = source.keys[at, :, -tokens:], source.values[at, :, -tokens:]
                queries = None
                if self.needs_queries:
                    queries = reading.queries[layer][at, :, -tokens:].float() * attention_scale(model, layer)
                positions = torch.arange(tokens, device=keys.device)
                kv = self.compact_layer(layer, keys, values, positions, slots, queries, rotary)
                if kv.keys.shape[2] != slots or kv.values.shape[2] != slots:
                    raise RuntimeError(f"{self.name} kept {kv.keys.shape[2]} slots in layer {layer}, not {slots}")
                parts.append(kv)
            layers[layer] = join_rows(parts, list(groups.values()), max(budgets))
        return layers

    def options(self) -> dict[str, Any]:
        """The hyper-parameters that fit into a result row: plain values, in the order of the fields."""
        plain = (str, int, float, bool, type(None))
        return {item.name: value for item in fields(self) if isinstance(value := getattr(self, item.name), plain)}


@dataclass
class Eviction(Method):
    """Keeps the entries with the highest scores, per KV head, at the positions where they stood."""

    def score(self, view: LayerView) -> torch.Tensor:
        """Worth of every entry, `[batch, kv_heads, tokens]`; infinite for those that must stay."""
        raise NotImplementedError

    def select(self, view: LayerView) -> torch.Tensor:
        """Indices of the kept entries `[batch, kv_heads, slots]`, in the order of their positions."""
        return self.score(view).topk(view.slots, dim=-1).indices.sort(dim=-1).values

    def compact_view(self, view: LayerView) -> CompactKV:
        """The selected keys and values, bit for bit."""
        index = self.select(view)[..., None]
        return CompactKV(*(x.gather(2, index.expand(-1, -1, -1, x.shape[-1])) for x in (view.keys, view.values)))


def row_lengths(reading: Reading) -> list[int]:
    """Real tokens in each row of the batch."""
    if reading.attention_mask is None:
        return [reading.input_ids.shape[-1]] * reading.input_ids.shape[0]
    return reading.attention_mask.long().sum(-1).tolist()


def join_rows(parts: list[CompactKV], rows: list[list[int]], width: int) -> CompactKV:
    """One `CompactKV` of all rows from groups of them; narrower groups get columns of zeros on the left."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([row for group in rows for row in group]).argsort()
    joined = []
    for tensors in zip(*parts, strict=True):
        if tensors[0] is None:
            joined.append(None)
            continue
        inner = (0, 0) if tensors[0].ndim == 4 else ()
        whole = torch.cat([nn.functional.pad(x, (*inner, width - x.shape[2], 0)) for x in tensors])
        joined.append(whole[order.to(whole.device)])
    return CompactKV(*joined)


def attention_scale(model, layer: int) -> float:
    """Softmax scale of a layer's attention, as the model has it.

    Raises:
        ValueError: the layer does not say its scale.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    scale = getattr(getattr(decoder.layers[layer], "self_attn", None), "scaling", None)
    if scale is None:
        raise ValueError(f"layer {layer} of {type(decoder).__name__} has no self_attn.scaling; its logits are unknown")
    return float(scale)
