"""`StillCompactor`: one small Perceiver per full-attention layer turns a full KV cache into a compact one."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import ModelHubMixin
from torch import nn
from transformers.cache_utils import Cache

from .budgets import Split, resolve_slots
from .cache import StillCache
from .cache_compaction import MODES
from .calling import passing
from .compactor_io import find_compactor, read_compactor, write_compactor
from .config import StillConfig, fingerprint
from .kernels import latent_attention
from .perceiver import LayerPerceiver, perceive, plain
from .placement import Worth, contributions
from .reading import check_mask, check_unmoved, read
from .rope import Rotary, Turning, full_attention_layers, rotate, unrotate
from .rows import cached_lengths, join_rows
from .shared import Shared
from .together import Together, side_by_side
from .types import CompactKV, Reading
from .weights import remember, sample, warn_if_foreign

LATENTS, SOURCES = {"cpu": 5 * 2**18}, {"cpu": 2**24}
"""Bytes of latents, and of un-rotated keys and values, that are compacted at once: all layers of a small model, one of
a large one. Beyond them an operation takes longer than calling it, and its operands leave the cache."""
ELSEWHERE = 2**26
"""Likewise of either, on other devices."""
KEPT = 2**12
"""Tokens that every context begins with, whose rotary tables are kept from one compaction to the next: of a small
model's compaction they would be a twentieth."""


class StillCompactor(nn.Module, ModelHubMixin):
    """Compacts the KV cache of one frozen model.

    Attributes:
        config: what it is and what it was trained on.
        layers: a `LayerPerceiver` for each full-attention layer, by layer index.
        split: how slots are divided over layers and KV heads; None for equal numbers. See `with_split`.
    """

    def __init__(self, config: StillConfig, head_dim: int, kv_heads: int, layers: list[int]):
        super().__init__()
        self.config = config
        if config.scout is not None and not (config.placement and config.scout in layers):
            raise ValueError(
                f"scout is {config.scout}; it must be a full-attention layer ({layers}) of a compactor with a placement"
            )
        self.layers = nn.ModuleDict({str(i): LayerPerceiver(head_dim, kv_heads, config) for i in layers})
        side_by_side(list(self.layers.values()))
        self._whole: dict[tuple[int, ...], Together] = {}
        self._first: tuple[Turning, torch.Tensor] | None = None
        self.kv_heads = kv_heads
        self.split: Split | None = None
        self.rotary: Rotary | None = None
        self.model_config = None
        self._hub_mixin_config = None  # the mixin would write a second config, as it was at the start

    def _apply(self, *args, **kwargs):
        """As `.to` and its like call it: what was moved parameter by parameter is laid together again."""
        super()._apply(*args, **kwargs)
        side_by_side(list(self.layers.values()))
        self._whole, self._first = {}, None
        return self

    @classmethod
    def for_model(cls, model, slots: int | None = None, ratio: float | None = None, **options) -> StillCompactor:
        """A fresh compactor for `model`: untrained, it keeps a strided subset of the tokens.

        Heads narrower than 64 are too soft a start for that: it then mixes neighbouring tokens in.

        Args:
            model: a Hugging Face causal language model with rotary embeddings.
            slots: trained slots per KV head, or
            ratio: tokens per slot at the trained chunk (`chunk`, 1,024 tokens unless given in `options`).
            **options: fields of `StillConfig`.

        Raises:
            ValueError: the model cannot be compacted, or an option has no such value.
        """
        Rotary.for_model(model)  # refuses models that cannot be compacted
        options.setdefault("chunk", StillConfig.chunk)
        if slots is not None or ratio is not None:
            options["bank"] = resolve_slots(options["chunk"], slots, ratio)
        config = StillConfig(**options)
        config.base_model = config.base_model or getattr(model.config, "_name_or_path", "") or ""
        config.base_revision = config.base_revision or getattr(model.config, "_commit_hash", "") or ""
        config.base_fingerprint = fingerprint(model)
        return cls._shaped(config, model).bind(model)

    @classmethod
    def _shaped(cls, config: StillConfig, model) -> StillCompactor:
        text = model.config.get_text_config(decoder=True)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(config, head_dim, text.num_key_value_heads, full_attention_layers(text))

    def bind(self, model) -> StillCompactor:
        """Tie the compactor to `model`'s rotary tables and device. The model itself is not stored.

        Warns where the compactor was trained for other weights of the same shape, or for a model of another name.

        Raises:
            ValueError: the compactor was made for a model of another shape.
        """
        self._check_base(model)
        self.rotary = Rotary.for_model(model)
        self.model_config = model.config
        remember(model)
        if not self.config.steps and not self.config.base_weights:
            self.config.base_weights = sample(model)  # untrained: it belongs to what it is bound to
        else:
            warn_if_foreign(self.config, model)
        return self.to(device=model.device, dtype=torch.float32)

    def _check_base(self, model) -> None:
        theirs = fingerprint(model)
        if self.config.base_fingerprint and theirs != self.config.base_fingerprint:
            raise ValueError(
                f"this compactor was made for {self.config.base_model or 'another model'} "
                f"(fingerprint {self.config.base_fingerprint}), not for {model.config._name_or_path or 'this one'} "
                f"({theirs}): load the model that it was trained on"
            )

    def with_split(self, split: Split | str | Path | None = "own") -> StillCompactor:
        """This compactor, its weights shared, with the slots of a context divided in another way.

        Caches with unequal slots need `attn_implementation="still"` (see `still.attention.register`).

        Args:
            split: a `Split`, a JSON file of one, `"own"` for the one that the checkpoint carries, or None for equal
                numbers in every head.

        Raises:
            ValueError: the checkpoint carries no split, or the split is for another model.
        """
        if split == "own":
            if self.config.split is None:
                raise ValueError(
                    "this compactor carries no split of its own: measure one with `still budgets` and pass it, or None"
                )
            split = Split.from_dict(self.config.split)
        elif isinstance(split, str | Path):
            split = Split.load(split)
        other = copy.copy(self)
        other.split = split and split.check(map(int, self.layers), self.kv_heads, self.config.base_fingerprint)
        return other

    def compact_layer(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        slots: int,
        heads: Sequence[int] | None = None,
    ) -> CompactKV:
        """Compact one layer of equally long rows.

        Args:
            layer: index of a full-attention layer.
            keys: `[batch, kv_heads, tokens, head_dim]`, rotated at `positions`.
            values: `[batch, kv_heads, tokens, head_dim]`.
            positions: logical positions `[tokens]` or `[batch, tokens]`.
            slots: how many slots to keep for the average KV head.
            heads: the KV heads that `keys` and `values` hold, `slots` for each; None for all, divided by the split.

        Returns:
            Compact slots in the dtype of `keys`, rotated at positions spread evenly over the span; ragged where the
            compactor has a split.
        """
        if heads is not None:
            return self._mix([layer], [keys], [values], slots, positions, self._shared(), list(heads))[0]
        counts = self.head_counts(keys.shape[2], slots)
        return self._compact(layer, keys, values, counts.get(layer, slots), positions, self._shared())

    def compact_layers(
        self, states: Mapping[int, tuple[torch.Tensor, torch.Tensor]], positions: torch.Tensor, slots: int
    ) -> dict[int, CompactKV]:
        """Compact several layers of equally long rows, some at a time, each as `compact_layer` does without a split.

        Args:
            states: of each full-attention layer keys and values; for these and the others see `compact_layer`.
            positions: logical positions.
            slots: of every KV head.
        """
        keys, values = next(iter(states.values()))
        step = self._together(keys, values, slots, self._fused(keys, values, False))
        return dict(self._mix_all(list(states), states.__getitem__, step, slots, positions, self._shared()))

    def head_counts(self, tokens: int, slots: int) -> dict[int, tuple[int, ...]]:
        """Slots of every KV head by layer, of a chunk of `tokens` tokens; empty where all heads have `slots`."""
        split = self.split
        if split is not None and split.floor > slots and not split.exact:
            split = replace(split, floor=slots)  # a short last chunk: the floor is one of whole contexts
        return self._counts(split, tokens, slots)

    @staticmethod
    def _counts(split: Split | None, tokens: int, slots: int) -> dict[int, tuple[int, ...]]:
        """Slots of every head; empty where all have equally many, which any attention can serve."""
        counts = {} if split is None else split.counts(tokens, slots)
        return {} if {n for heads in counts.values() for n in heads} == {slots} else counts

    def _shared(self) -> Shared:
        """What layers share, of one compaction."""
        return Shared(self.layers, self.rotary)

    def _first_tokens(self, tokens: int, device: torch.device) -> tuple[Turning, torch.Tensor]:
        """Tables of so many first tokens of a context, or of more; kept until longer ones are asked for."""
        if self._first is None or self._first[1].shape[-2] < tokens or self._first[1].device != device:
            with torch.inference_mode(False):  # they may be wanted in training next
                positions = torch.arange(1 << (tokens - 1).bit_length(), device=device)[None]
                shared, layer = self._shared(), int(next(iter(self.layers)))
                turning = shared.turning(layer, positions).first(positions.shape[1])  # with the tables that turn back
                self._first = turning, shared.own(layer, positions)
        return self._first

    def _compact(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: int | tuple[int, ...],
        positions: torch.Tensor,
        shared: Shared,
        worth: Worth | None = None,
    ) -> CompactKV:
        """Compact one layer: `slots` for every head, or a number for each of them."""
        if isinstance(slots, int):
            return self._mix([layer], [keys], [values], slots, positions, shared, worth=worth)[0]
        heads: dict[int, tuple[CompactKV, torch.Tensor]] = {}
        for count in set(slots):
            which = [head for head, n in enumerate(slots) if n == count]
            part = CompactKV(keys[:, which], values[:, which])
            if not count:
                part = CompactKV(part.keys[:, :, :0], part.values[:, :, :0])
            elif count < keys.shape[2]:  # where every token has a slot there is nothing to mix
                (part,) = self._mix([layer], [part.keys], [part.values], count, positions, shared, which, worth)
            if part.beta is None and self.config.beta:
                part = part._replace(beta=part.keys.new_zeros(part.keys.shape[:3]))
            where = shared.tables(layer, positions, count).where
            for place, head in enumerate(which):
                one = CompactKV(*(None if x is None else x[:, place] for x in part[:3]))
                heads[head] = one, where
        parts = [heads[head] for head in range(len(slots))]
        tables = zip(*(part[:3] for part, _ in parts), strict=True)
        packed = [None if xs[0] is None else torch.cat(xs, dim=1) for xs in tables]
        return CompactKV(*packed, counts=slots, positions=torch.cat([where for _, where in parts], dim=1))

    def _mix(
        self, layers: Sequence[int], keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], slots: int,
        positions: torch.Tensor, shared: Shared, heads: list[int] | None = None, worth: Worth | int | None = None,
    ) -> list[CompactKV]:  # fmt: skip
        """Compact some heads of several layers at once, each with its own keys and values."""
        dtype, these, tables = keys[0].dtype, tuple(layers), shared.tables(layers[0], positions, slots)
        if these not in self._whole:
            self._whole[these] = Together([self.layers[str(layer)] for layer in layers])
        # Where no gradient is wanted, hundreds of small operations need no tracking. What leaves is copied, since
        # tensors that were made so are of no use in training.
        inert = not torch.is_grad_enabled()
        with torch.autocast(keys[0].device.type, enabled=False), torch.inference_mode() if inert else nullcontext():
            phase = [shared.phase(layer, heads) for layer in layers] if self.config.placement else None
            turns = tuple(table if table is None else table[None] for table in tables.turns)
            whole = self._whole[these]
            room = shared.room if inert else None
            small, mixed, beta = perceive(whole, keys, values, slots, turns, tables.tokens, heads, phase, worth, room)
            rows = [x if len(x) == 1 else x.repeat(len(layers), 1, 1) for x in tables.slots]
            small = rotate(small.flatten(0, 1), *rows).unflatten(0, small.shape[:2])
            each = [[None] * len(layers) if x is None else x.unbind() for x in (small, mixed, beta)]
        made = ([None if x is None else x.to(dtype, copy=inert) for x in parts] for parts in each)
        return [CompactKV(*one) for one in zip(*made, strict=True)]

    def _mix_all(
        self, layers: Sequence[int], states: Callable[[int], tuple[torch.Tensor, torch.Tensor]], step: int, slots: int,
        positions: torch.Tensor, shared: Shared, worth: Worth | int | None = None,
    ) -> Iterator[tuple[int, CompactKV]]:  # fmt: skip
        """Compact all heads of layers, `step` of them at a time; `states` gives a layer's keys and values."""
        for start in range(0, len(layers), step):
            some = layers[start : start + step]
            keys, values = zip(*map(states, some), strict=True)
            yield from zip(some, self._mix(some, keys, values, slots, positions, shared, worth=worth), strict=True)

    def _fused(self, keys: torch.Tensor, values: torch.Tensor, scouted: bool) -> bool:
        """Whether kernels read `keys` and `values` like these as they are cached, and nothing else reads them."""
        width = next(iter(self.layers.values())).bank.shape[-1]
        return latent_attention.takes(keys, values, width) and (scouted or not self.config.placement)

    def _together(self, keys: torch.Tensor, values: torch.Tensor, slots: int, fused: bool) -> int:
        """How many layers are compacted at once, of `keys` and `values` like these; `fused`: see `_fused`."""
        width, device = next(iter(self.layers.values())).bank.shape[-1], keys.device.type
        most = LATENTS.get(device, ELSEWHERE) // (4 * width * slots * keys.shape[0] * keys.shape[1])
        if not fused:  # the kernels read what is cached
            most = min(most, SOURCES.get(device, ELSEWHERE) // (4 * (keys.numel() + values.numel())))
        return max(1, most)

    def trains(self, on: bool = True) -> StillCompactor:
        """Let the weights be trained, or not; scales that are fixed and scorers of a placement stay as they are."""
        for part in self.layers.values():
            for name, weight in part.named_parameters():
                fixed = name.startswith("placement.") or (name.endswith("log_scale") and not self.config.learned_scale)
                weight.requires_grad_(on and not fixed)
        return self

    def plain(self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Un-rotated keys and values side by side, `[batch, kv_heads, tokens, 2 * head_dim]`; see `compact_layer`."""
        return plain([keys], [values], self._shared().turning(layer, positions))[0]

    @property
    def reach(self) -> int:
        """Farthest from what follows, in tokens, that its slots stood in training."""
        return self.config.chunk

    def moved(self, layer: int, keys: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Keys `[batch, heads, slots, head_dim]` rotated at positions `before`, as they are at positions `after`.

        Positions are `[batch or 1, slots or 1]`. A slot of zeros stays one.
        """
        first, last = (self.rotary.cos_sin(layer, where) for where in (before, after))
        return rotate(unrotate(keys.float(), *first), *last).to(keys.dtype)

    def taken_back(
        self,
        layer: int,
        slots: Sequence[torch.Tensor],
        later: Sequence[torch.Tensor],
        heads: Sequence[int] | None = None,
    ) -> torch.Tensor | None:
        """Which slots of earlier chunks the tokens of a later one repeat or take back; see `Placement.taken_back`.

        Args:
            layer: index of a full-attention layer.
            slots: rotated keys and values `[batch, heads, slots, head_dim]`, and positions `[batch or 1, slots]`.
            later: likewise of the later tokens.
            heads: the KV heads that these are; None for all.

        Returns:
            `[batch, heads, slots]`, or None: a compactor without a placement cannot tell.
        """
        placement = self.layers[str(layer)].placement
        if placement is None:
            return None
        with torch.autocast(slots[0].device.type, enabled=False):
            return placement.taken_back(self.plain(layer, *slots), self.plain(layer, *later), heads)

    def note_mass(self, mass: Mapping[int, torch.Tensor]) -> None:
        """Set what each head is known to contribute, and divide slots by it in the split that the checkpoint carries.

        Args:
            mass: `[kv_heads]` by layer, see `still.placement.contributions`.
        """
        for layer, own in mass.items():
            self.layers[str(layer)].placement.mass.copy_(own)
        shares = contributions([part.placement.mass for part in self.layers.values()])
        weights = {int(name): tuple(own.tolist()) for name, own in zip(self.layers, shares, strict=True)}
        split = Split(weights, fingerprint=self.config.base_fingerprint, source="attention")
        self.config.split = split.to_dict()

    def slot_positions(self, positions: torch.Tensor, slots: int) -> torch.Tensor:
        """Logical positions `[batch or 1, slots]` at which `compact_layer` rotates its slots."""
        positions = positions[None] if positions.ndim == 1 else positions
        return next(iter(self.layers.values())).latent_positions(positions, slots)

    def compact(
        self,
        reading: Reading | Cache,
        slots: int | None = None,
        ratio: float | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> StillCache:
        """Compact a full cache in one pass; the full cache is left as it was.

        Args:
            reading: what `still.reading.read` returned, or a full cache of the context alone.
            slots: slots per KV head, or
            ratio: tokens per slot. Rows of a padded batch each get the slots of their own length.
            input_ids: `[batch, tokens]` of the context, kept in the cache to check later prompts.
            attention_mask: `[batch, tokens]` for left-padded rows.

        Raises:
            ValueError: the budget fits no row, or the cache, the ids and the mask do not belong together.
        """
        if isinstance(reading, Reading):
            cache, input_ids, attention_mask = reading.cache, reading.input_ids, reading.attention_mask
        else:
            cache = reading
        return self._compact_cache(self.model_config, cache, slots, ratio, input_ids, attention_mask)

    def _compact_cache(
        self, config, cache: Cache, slots: int | None, ratio: float | None, input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> StillCache:  # fmt: skip
        """What `compact` returns, for a model of this config."""
        tokens = cache.get_seq_length()
        if input_ids is not None:
            check_unmoved(cache, input_ids)
        rows = cached_lengths(cache, attention_mask)
        resolve_slots(max(rows), slots, ratio)
        layers = self.compact_rows(cache, rows, slots, ratio)
        self.check_trained(max(rows), ratio if ratio is not None else max(rows) / slots)
        return StillCache.from_layers(
            config,
            layers,
            tokens,
            source=cache,
            token_ids=input_ids,
            attention_mask=attention_mask,
            provenance=self.provenance(),
            floor=1 if self.split is None else self.split.floor,
        )

    @torch.no_grad()
    def prefill(
        self,
        model,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        slots: int | None = None,
        ratio: float | None = None,
        *,
        chunk: int | None = None,
        mode: str = "append",
        keep_last: int | None = None,
        reach: float | None = None,
    ) -> StillCache:
        """Read a context with the frozen model and compact it; one longer than a chunk goes chunk by chunk.

        A chunk is read with the slots so far as its past and one raw chunk held back ahead of compaction, so raw
        keys and values never exceed two chunks. Chunks are cut by columns: a row of a padded batch is read as it would
        be alone only where its chunks begin at the same tokens.

        Args:
            model: the frozen model that the compactor is bound to.
            input_ids: `[batch, tokens]`.
            attention_mask: `[batch, tokens]` for left-padded rows.
            slots: slots per KV head in all, of the longest row (beyond a chunk shorter ones get a share); or
            ratio: tokens per slot.
            chunk: tokens compacted in one pass; the trained chunk unless given. Where the last chunk would be shorter
                than half of one, all are equal.
            mode: "append" (each chunk gets slots at the ratio, all chunks together as many as one pass would; slots so
                far that it takes back fall silent, see `taken_back`) or "recompact" (one size for any context, at most
                a chunk).
            keep_last: raw tokens held back while reading; one chunk unless given.
            reach: of a context longer than a chunk, as in `StillCache`.

        Raises:
            ValueError: the context is empty, the mask is no left padding, the budget or the mode makes no sense, or the
                model has another shape than the one that the compactor was made for.
        """
        check_mask(input_ids, attention_mask)
        tokens, chunk = input_ids.shape[1], self.config.chunk if chunk is None else chunk
        if mode not in MODES or chunk < 1:
            raise ValueError(f"mode is {mode!r} and chunk {chunk}; mode must be one of {MODES}, chunk 1 or more tokens")
        budget = resolve_slots(tokens, slots, ratio)
        self._check_base(model)
        if tokens <= chunk:
            # By the config of the model that is to run: it may attend otherwise than the one that was bound.
            cache = read(model, input_ids, attention_mask).cache
            return self._compact_cache(model.config, cache, slots, ratio, input_ids, attention_mask)
        if mode == "append":
            size = {"ratio": ratio if ratio is not None else tokens / budget}
            chunks = -(-tokens // chunk)
            if tokens - (chunks - 1) * chunk < chunk / 2:
                chunk = -(-tokens // chunks)
            if budget < chunks:
                raise ValueError(
                    f"{budget} slots are fewer than the {chunks} chunks of {chunk} of {tokens} tokens, each of which "
                    f"gets one or more: take a chunk of {-(-tokens // budget)} or more, or mode='recompact'"
                )
        elif budget > chunk:
            raise ValueError(
                f"recompact keeps at most a chunk of {chunk} slots, not {budget}: take a ratio of {tokens / chunk:.3g} "
                f"or more for {tokens} tokens, or mode='append'"
            )
        else:
            size = {"slots": budget}
        cache = StillCache(
            self, **size, keep_last=chunk if keep_last is None else keep_last, mode=mode, chunk=chunk,
            reach=reach, attention_mask=attention_mask, config=model.config,
        )  # fmt: skip
        cache.columns.warned = True  # padded rows compact between the chunks, in `continuation`
        decoder = model.get_decoder()
        for start in range(0, tokens, chunk):
            ids = input_ids[:, start : start + chunk]
            mask = None if attention_mask is None else attention_mask[:, start : start + chunk]
            inputs = cache.continuation(ids, mask) if start else _first_inputs(ids, mask)
            decoder(**inputs, **passing(decoder, cache), use_cache=True)
        # Rows of unequal length may have got columns of padding on the left: see `continuation`.
        cache.token_ids = torch.nn.functional.pad(input_ids, (cache.logical_length - tokens, 0))
        cache.provenance = self.provenance()
        return cache.compact(keep_last=0, partial=True)

    def provenance(self) -> dict:
        """What a cache made by this compactor records of it."""
        split = {} if self.split is None else {"split": self.split.to_dict()}
        return {"method": "still", "compactor": json.loads(self.config.to_json()), **split}

    def compact_rows(
        self,
        cache: Cache,
        rows: list[int],
        slots: int | Sequence[int] | None = None,
        ratio: float | None = None,
        *,
        scouted: bool = True,
    ) -> dict[int, CompactKV]:
        """Compact every full-attention layer of left-padded rows, each from its own tokens.

        Args:
            cache: full, of the rows alone.
            rows: real tokens in each row of the batch.
            slots: slots per KV head, of each row if there are several numbers, or
            ratio: tokens per slot.
            scouted: one layer looks for all of them, where the config names one; otherwise each looks for itself.

        Returns:
            For each layer `CompactKV` as wide as the row with most slots; shorter rows stand on the right. Ragged where
            the compactor has a split.
        """
        each = slots if isinstance(slots, Sequence) else [slots] * len(rows)
        budgets = [resolve_slots(n, t and min(t, n), ratio) for n, t in zip(rows, each, strict=True)]
        groups: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(rows, budgets, strict=True)):
            groups.setdefault(key, []).append(row)
        places = {key: slice(None) if len(groups) == 1 else torch.tensor(members) for key, members in groups.items()}
        shared, device = self._shared(), cache.layers[int(next(iter(self.layers)))].keys.device
        for tokens in set(rows):
            if tokens <= KEPT:
                shared.begin(tokens, *self._first_tokens(tokens, device))
        counts = {key: self._counts(self.split, *key) for key in groups}
        ragged = any(counts.values())
        scout = self.config.scout if scouted else None
        parts: dict[int, list[CompactKV]] = {int(name): [] for name in self.layers}
        for key, which in places.items():
            heads = counts[key] if ragged else None
            for layer, part in self._compact_all(cache, *key, which, heads, shared, scout):
                parts[layer].append(part)
        return {layer: join_rows(own, list(groups.values())) for layer, own in parts.items()}

    def _compact_all(
        self, cache: Cache, tokens: int, slots: int, rows, counts: dict[int, tuple[int, ...]] | None, shared: Shared,
        scout: int | None,
    ) -> Iterator[tuple[int, CompactKV]]:  # fmt: skip
        """Compact all layers of equally long rows, some at a time; one by one with `counts`, the slots of heads."""
        layers = [int(name) for name in self.layers]
        keys, values = _states(cache, layers[0], tokens, rows)
        where = torch.arange(tokens, device=keys.device)
        fused = self._fused(keys, values, scout is not None)
        step = self._together(keys, values, slots, fused)
        worth: Worth | int | None = None
        if scout is not None:  # where all layers go at once, it looks at what is made for them
            worth = layers.index(scout)
            if fused or counts is not None or step < len(layers):
                worth = self._common_worth(scout, *_states(cache, scout, tokens, rows), where, shared)
        states = partial(_states, cache, tokens=tokens, rows=rows)
        if counts is None:
            yield from self._mix_all(layers, states, step, slots, where, shared, worth)
            return
        for layer in layers:
            heads = counts.get(layer, (slots,) * self.kv_heads)
            yield layer, self._compact(layer, *states(layer), heads, where, shared, worth)

    def _common_worth(self, layer: int, keys, values, positions, shared: Shared) -> Worth:
        """What tokens are worth to all layers, as this one sees them; see `Placement.common_worth`."""
        with torch.autocast(keys.device.type, enabled=False):
            source = plain([keys], [values], shared.turning(layer, positions))[0]
            return Worth(self.layers[str(layer)].placement.common_worth(source))

    def check_trained(self, tokens: int | None, ratio: float) -> list[str]:
        """Warn where a context or a ratio lies outside what was trained; returns the warnings' texts.

        Args:
            tokens: of the context; None for whole chunks, though the longest that was drawn may fall short of one.
            ratio: tokens per slot.
        """
        notes = []
        config = self.config
        lengths = config.trained_lengths if tokens is not None else ()
        if lengths and not lengths[0] <= tokens <= lengths[-1]:
            low, high = lengths[0], lengths[-1]
            notes.append(f"a context of {tokens} tokens lies outside the trained {low} to {high}")
        if config.trained_ratios and not min(config.trained_ratios) <= ratio <= max(config.trained_ratios) + 1:
            low, high = min(config.trained_ratios), max(config.trained_ratios)
            notes.append(f"a ratio of {ratio:g}x lies outside the trained {low:g}x to {high:g}x")
        for note in notes:
            warnings.warn(f"{note}: expect worse answers", stacklevel=3)
        return notes

    def save_pretrained(self, save_directory, **kwargs):
        """Write `compactor.safetensors` and `compactor.json` into a folder (and push with `push_to_hub=True`)."""
        return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        first = next(iter(self.layers.values()))
        shape = {
            "head_dim": first.key_head.out_features,
            "kv_heads": first.kv_heads,
            "layers": [int(name) for name in self.layers],
        }
        write_compactor(save_directory, self.config, shape, self.state_dict())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, model=None, **download) -> StillCompactor:
        """Load a compactor from a folder or the Hub, and bind it to `model` when one is given.

        Args:
            pretrained_model_name_or_path: a folder of `save_pretrained`, the name of a model that comes with compactors
                (`pocket`), or a Hub id.
            model: the model that the compactor was trained for.
            **download: what `huggingface_hub.snapshot_download` takes, such as `revision`, `token`, `cache_dir`.

        Raises:
            FileNotFoundError: the folder lacks the compactor's files.
            ValueError: the weights do not fit the config, or the model is another one.
        """
        folder = find_compactor(pretrained_model_name_or_path, **download)
        config, shape, state = read_compactor(folder)
        compactor = cls(config, **shape)
        try:
            compactor.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"the weights in {folder} do not fit its config: {error}") from error
        return compactor if model is None else compactor.bind(model)


def _states(cache: Cache, layer: int, tokens: int, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some rows' last tokens."""
    keys, values = cache.layers[layer].keys, cache.layers[layer].values
    return keys[rows, :, -tokens:], values[rows, :, -tokens:]


def _first_inputs(ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    if mask is None:
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
