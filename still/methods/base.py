"""The protocol that every way to make a small cache follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache

from ..budgets import Split, resolve_slots
from ..reading import check_unmoved
from ..rope import Rotary, full_attention_layers
from ..rows import join_rows
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
        heads: which KV heads of the layer these are; None for all of them.
    """

    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    slots: int
    queries: torch.Tensor | None = None
    rotary: Rotary | None = None
    heads: Sequence[int] | None = None

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
        split: how the slots are divided over layers and KV heads; None for equal numbers. The cache is ragged then, and
            the model must run `attn_implementation="still"`.
        name: what the registry and result rows call it.
        query_aware: it saw the question before it chose.
        synthesis: it makes new entries (compaction) instead of choosing some (eviction).
        needs_queries: it needs `read(..., queries=True)`.
        needs_rotary: it needs the model's rotary tables.
        uses_beta: its slots carry a bias, so the model must run `attn_implementation="still"`.
        fixed_size: its size does not follow the budget (full, none and the quantised caches).
        takes_split: its heads may have unequal numbers of slots.
    """

    split: Split | None = field(default=None, repr=False, kw_only=True)

    name: ClassVar[str] = ""
    query_aware: ClassVar[bool] = False
    synthesis: ClassVar[bool] = False
    needs_queries: ClassVar[bool] = False
    needs_rotary: ClassVar[bool] = False
    uses_beta: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = False
    takes_split: ClassVar[bool] = True

    @property
    def needs_still_attention(self) -> bool:
        """Whether its caches need `attn_implementation="still"`."""
        return self.uses_beta or self.split is not None

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
            row_slots=budgets if self.split is None else None,
            provenance={"method": self.name, "options": self.options(), "query_aware": self.query_aware},
            floor=1 if self.split is None else self.split.floor,
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
        heads: Sequence[int] | None = None,
    ) -> CompactKV:
        """Compact one layer, or some heads of it, of equally long rows; see `LayerView` for the shapes."""
        return self.compact_view(LayerView(layer, keys, values, positions, slots, queries, rotary, heads))

    def compact_layers(
        self,
        states: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
        positions: torch.Tensor,
        slots: int,
        queries: Mapping[int, torch.Tensor] | None = None,
        rotary: Rotary | None = None,
    ) -> dict[int, CompactKV]:
        """Compact layers of equally long rows, `states` their keys and values; see `LayerView` for the shapes."""
        asked = queries or {}
        return {i: self.compact_layer(i, *own, positions, slots, asked.get(i), rotary) for i, own in states.items()}

    def compact_view(self, view: LayerView) -> CompactKV:
        """Compact one layer; what a subclass writes."""
        raise NotImplementedError(f"{type(self).__name__} works on whole caches: call compact")

    def budgets(self, rows: list[int], slots: int | None, ratio: float | None) -> list[int]:
        """Slots of each row of a batch."""
        if slots is not None and slots > max(rows):
            raise ValueError(f"slots is {slots}; it must lie between 1 and the context's {max(rows)} tokens")
        return [resolve_slots(tokens, None if slots is None else min(slots, tokens), ratio) for tokens in rows]

    @torch.no_grad()
    def compact_rows(
        self, model, reading: Reading, rows: list[int], budgets: list[int], most: list[int] | None = None
    ) -> dict[int, CompactKV]:
        """Compact each full-attention layer, each row from its own tokens, shorter rows' slots on the right.

        Args:
            rows: tokens of each row.
            budgets: slots of each row per KV head.
            most: most slots that one head of each row may get; `rows` unless given.

        Returns:
            For each layer `[batch, kv_heads, max(budgets), head_dim]`, asserted, or ragged where there is a split.
        """
        if self.needs_queries and not reading.queries:
            raise ValueError(f"{self.name} needs the context's queries: call read(model, ids, queries=True)")
        rotary = Rotary.for_model(model) if self.needs_rotary else None
        groups: dict[tuple[int, int, int], list[int]] = {}
        for row, shape in enumerate(zip(rows, budgets, rows if most is None else most, strict=True)):
            groups.setdefault(shape, []).append(row)
        counts = {shape: self.head_counts(model, shape[2], shape[1]) for shape in groups}
        layers = {}
        for layer in full_attention_layers(model.config):
            source = reading.cache.layers[layer]
            parts = []
            for shape, members in groups.items():
                tokens, slots, _ = shape
                at = slice(None) if len(groups) == 1 else torch.tensor(members, device=source.keys.device)
                keys, values = source.keys[at, :, -tokens:], source.values[at, :, -tokens:]
                queries = None
                if self.needs_queries:
                    queries = reading.queries[layer][at, :, -tokens:].float() * attention_scale(model, layer)
                positions = torch.arange(tokens, device=keys.device)
                if counts[shape]:
                    own = counts[shape][layer]
                    parts.append(self.compact_heads(layer, keys, values, positions, own, queries, rotary))
                    continue
                kv = self.compact_layer(layer, keys, values, positions, slots, queries, rotary)
                if kv.keys.shape[2] != slots or kv.values.shape[2] != slots:
                    raise RuntimeError(f"{self.name} kept {kv.keys.shape[2]} slots in layer {layer}, not {slots}")
                parts.append(kv)
            layers[layer] = join_rows(parts, list(groups.values()))
        return layers

    def head_counts(self, model, tokens: int, slots: int) -> dict[int, tuple[int, ...]]:
        """Slots of each KV head by layer, `slots` for the average one; empty without a split."""
        if self.split is None:
            return {}
        from ..compactor import fingerprint

        heads = model.config.get_text_config(decoder=True).num_key_value_heads
        split = self.split.check(full_attention_layers(model.config), heads, fingerprint(model))
        return split.counts(tokens, slots)

    def compact_heads(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        counts: Sequence[int],
        queries: torch.Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> CompactKV:
        """Compact one layer to a number of slots for each KV head, those with the same number together.

        A head with a slot for every token is left as it is.

        Returns:
            A ragged record.
        """
        packed: dict[int, tuple[torch.Tensor | None, ...]] = {}
        for count in set(counts):
            which = [head for head, own in enumerate(counts) if own == count]
            asked = None if queries is None else queries.unflatten(1, (len(counts), -1))[:, which].flatten(1, 2)
            kept = keys[:, which], values[:, which]
            kv = CompactKV(*(x[:, :, :0] for x in kept))
            if count == keys.shape[2]:
                kv = CompactKV(*kept)
            elif count:
                kv = self.compact_layer(layer, *kept, positions, count, asked, rotary, which)
            if kv.keys.shape[2] != count:
                raise RuntimeError(f"{self.name} kept {kv.keys.shape[2]} slots in layer {layer}, not {count}")
            beta = kv.keys.new_zeros(kv.keys.shape[:3]) if kv.beta is None and self.uses_beta else kv.beta
            for place, head in enumerate(which):
                packed[head] = tuple(None if x is None else x[:, place] for x in (kv.keys, kv.values, beta))
        heads = zip(*(packed[head] for head in range(len(counts))), strict=True)
        return CompactKV(*(None if x[0] is None else torch.cat(x, dim=1) for x in heads), counts=tuple(counts))

    def even(self) -> Method:
        """This method without a split."""
        return replace(self, split=None)

    def options(self) -> dict[str, Any]:
        """The hyper-parameters that fit into a result row: plain values, in the order of the fields."""
        plain = (str, int, float, bool, type(None))
        own = [item.name for item in fields(self) if item.name != "split"]
        options = {name: value for name in own if isinstance(value := getattr(self, name), plain)}
        return options if self.split is None else {**options, "split": self.split.source}


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
    """Real tokens in each row of the batch.

    Raises:
        ValueError: the cache is of other tokens by now.
    """
    check_unmoved(reading.cache, reading.input_ids)
    if reading.attention_mask is None:
        return [reading.input_ids.shape[-1]] * reading.input_ids.shape[0]
    return reading.attention_mask.long().sum(-1).tolist()


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
