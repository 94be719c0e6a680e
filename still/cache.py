"""`StillCache`: a drop-in Hugging Face cache that holds compact slots instead of a context's tokens.

    cache = StillCache.from_layers(model.config, layers, logical_length=T, token_ids=context_ids)   # ready-made
    model.generate(**cache.prompt(question_ids), past_key_values=cache)

    cache = StillCache(compactor, ratio=8, keep_last=256)                                           # compacts by itself
    model.generate(**inputs, past_key_values=cache)
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from . import cache_io
from .cache_compaction import LayerCompactor, SelfCompaction
from .cache_generate import check_generate
from .cache_layer import CompactLayer
from .cache_prompt import make_continuation, make_prompt
from .cache_rows import Columns, left_padded_lengths, widen
from .cache_slots import append_slots, slots_of_rows
from .cache_states import as_ours, copy_state
from .rope import full_attention_layers
from .types import CompactKV

__all__ = ["CompactLayer", "StillCache"]


class StillCache(Cache):
    """A cache whose full-attention layers are compact; sliding-window and linear-attention layers are as they were.

    `get_seq_length()` is the logical length, so that `generate` feeds new tokens alone, at the right positions, while
    masks have the physical size. Not for assisted or prompt-lookup decoding once anything is in it.

    Args:
        compactor: a layer compactor; `StillCompactor` is one.
        ratio: tokens per slot; 8 unless `slots` is given.
        slots: slots of a whole chunk, instead of `ratio`.
        keep_last: newest tokens that stay raw.
        mode: `"append"` (slots grow with the context) or `"recompact"` (to one fixed size again and again).
        attention_mask: `[batch, tokens]` of the first forward where its rows are left-padded.
        config: the model's config, or the model; a bound `StillCompactor` knows it.
        chunk: tokens compacted at a time; `compactor.config.chunk` unless given.
        reach: farthest that slots stand before the raw tokens, in tokens: those of longer contexts are spread evenly
            over so many, whatever they stand for, since a question finds less from farther away than was trained. The
            trained chunk, for a `StillCompactor`, unless given; `math.inf` leaves slots where their tokens stood.
        offloading: keep layers on the CPU while they are not used, as transformers' own caches do.
        offload_only_non_sliding: leave sliding-window layers where they are.

    Attributes:
        token_ids: `[batch, tokens]` of the context, or None where they are not known.
        provenance: what made the slots; saved with them.

    Raises:
        ValueError: an argument makes no sense, or the model's config is not known.
    """

    def __init__(
        self,
        compactor: LayerCompactor,
        ratio: float | None = None,
        *,
        slots: int | None = None,
        keep_last: int = 256,
        mode: str = "append",
        attention_mask: torch.Tensor | None = None,
        config: Any = None,
        chunk: int | None = None,
        reach: float | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
    ):
        if ratio is not None and slots is not None:
            raise ValueError(f"give one of ratio (got {ratio}) and slots (got {slots})")
        config = getattr(compactor, "model_config", None) if config is None else config
        if config is None:
            raise ValueError("which model is this cache for? pass config=model.config, or a compactor bound to a model")
        chunk = getattr(getattr(compactor, "config", None), "chunk", None) if chunk is None else chunk
        if chunk is None:
            raise ValueError(f"{type(compactor).__name__} has no config.chunk; pass chunk=, in tokens")
        if slots is not None and (slots < 1 or slots % 1):
            raise ValueError(f"slots is {slots}; it must be a whole number between 1 and the chunk's {chunk} tokens")
        ratio = (8 if slots is None else chunk / slots) if ratio is None else ratio
        policy = SelfCompaction(compactor, chunk, ratio, slots, keep_last, mode, _reach(compactor, reach))
        if mode == "recompact" and getattr(getattr(compactor, "config", None), "beta", False):
            raise ValueError("mode='recompact' would lose the beta that this compactor learned; use mode='append'")
        if hasattr(compactor, "check_trained"):
            own = chunk == getattr(compactor.config, "chunk", None)
            compactor.check_trained(None if own else chunk, chunk / policy.budget(chunk))
        mask = None
        if attention_mask is not None:
            left_padded_lengths(attention_mask, attention_mask.shape[-1])
            mask = attention_mask.bool().cpu()
        self._build(config, policy, mask, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)

    def _build(self, config, policy: SelfCompaction | None, mask: torch.Tensor | None, **offload) -> None:
        config = getattr(config, "config", config)
        self.model_config, self.config = config, config.get_text_config(decoder=True)
        self.policy = policy
        self.columns = Columns(mask)
        self.token_ids: torch.Tensor | None = None
        self.provenance: dict[str, Any] = {}
        self._warned = False
        compact = set(full_attention_layers(self.config))
        layers = DynamicCache(config=self.config).layers
        layers = [
            CompactLayer(index, self.config, self.columns, policy) if index in compact else as_ours(layer)
            for index, layer in enumerate(layers)
        ]
        super().__init__(layers=layers, **offload)

    @classmethod
    def _empty(cls, config, policy: SelfCompaction | None = None, mask: torch.Tensor | None = None) -> StillCache:
        cache = cls.__new__(cls)
        cache._build(config, policy, mask)
        return cache

    @classmethod
    def from_layers(
        cls,
        config: Any,
        layers: Mapping[int, CompactKV],
        logical_length: int,
        *,
        source: Cache | None = None,
        token_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        row_slots: Sequence[int] | None = None,
        positions: torch.Tensor | None = None,
        provenance: dict[str, Any] | None = None,
        floor: int = 1,
    ) -> StillCache:
        """A ready-made cache from the compact slots of a context.

        Args:
            config: the model's config, or the model. Its `_attn_implementation` is read at every forward.
            layers: `CompactKV` for every full-attention layer, all with as many slots. In a padded batch, rows with
                fewer slots have them on the right, after columns of zeros. Or ragged ones, with as many as each head
                of each layer has; they need `attn_implementation="still"`.
            logical_length: tokens of the context, padding included.
            source: the full cache, from which other layers' states are copied; it is not changed.
            token_ids: `[batch, logical_length]` of the context; `prompt` needs them.
            attention_mask: `[batch, logical_length]` where rows are left-padded.
            row_slots: slots of each row; found by their leading zero columns unless given.
            positions: logical positions at which the slots are rotated, `[slots]` or `[batch, slots]`; spread evenly
                over each row's tokens unless given.
            provenance: what made the slots.
            floor: fewest slots that a KV head of a ragged record may have.

        Raises:
            ValueError: the layers do not fit the model or one another, or there are more slots than tokens.
        """
        mask = None
        if attention_mask is not None:
            left_padded_lengths(attention_mask, logical_length)
            mask = None if attention_mask.bool().all() else attention_mask.bool().cpu()
        if token_ids is not None and token_ids.shape[-1] != logical_length:
            raise ValueError(f"token_ids has {token_ids.shape[-1]} columns for {logical_length} tokens of context")
        cache = cls._empty(config, mask=mask)
        cache.token_ids, cache.provenance = token_ids, dict(provenance or {})
        cache._copy_others(source)
        append_slots(cache, layers, logical_length, mask, row_slots, positions, floor)
        return cache

    @property
    def compact_layers(self) -> list[CompactLayer]:
        """The full-attention layers."""
        return [layer for layer in self.layers if isinstance(layer, CompactLayer)]

    @property
    def slots(self) -> int:
        """Compact slots per KV head, of the row that has most; their mean, rounded up, where heads are unequal."""
        return max(self.row_slots())

    @property
    def ragged(self) -> bool:
        """Whether slots are packed, as many as each head of each layer has."""
        return self.compact_layers[0].ragged is not None

    @property
    def logical_length(self) -> int:
        """Tokens that the cache stands for, padding included."""
        return self.compact_layers[0].logical

    @property
    def physical_length(self) -> int:
        """Columns stored per KV head: slots (their mean, rounded up, where heads are unequal) and raw tokens."""
        return self.compact_layers[0].physical + (self.slots if self.ragged else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind keys, values, beta and other layers' states (not token ids or positions)."""
        tensors = [tensor for layer in self.layers for tensor in cache_io.state_of(layer).values()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def row_slots(self) -> list[int]:
        """Compact slots per KV head of each row; their mean, rounded up, where heads are unequal."""
        return slots_of_rows(self.compact_layers)

    @property
    def padded_nbytes(self) -> int:
        """Bytes that these slots take where every head of every layer is padded to the longest, as masks alone would.

        `nbytes` where slots are uniform.
        """
        ragged = [layer.ragged for layer in self.compact_layers if layer.ragged is not None]
        longest = max((int(slots.counts.max()) for slots in ragged), default=0)
        stored = sum(len(slots.keys) for slots in ragged)
        dead = sum(longest * slots.counts.numel() for slots in ragged) - stored
        return self.nbytes + dead * sum(slots.nbytes for slots in ragged) // max(1, stored)

    def head_slots(self, row: int = 0) -> dict[int, list[int]]:
        """Compact slots of each KV head of a row, by layer index."""
        same = self.row_slots()
        return {
            layer.index: [same[row]] * self.config.num_key_value_heads
            if layer.ragged is None
            else layer.ragged.counts[row].tolist()
            for layer in self.compact_layers
        }

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """Store new keys and values of one layer, and return what this forward attends to."""
        layer = self.layers[layer_idx]
        if isinstance(layer, CompactLayer):
            self._warn_past_chunk(key_states.shape[2])
        elif getattr(layer, "keys", None) is not None and layer.get_seq_length() and len(layer.keys) < len(key_states):
            rows = widen(torch.arange(len(layer.keys)), len(key_states))
            layer.reorder_cache(rows)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def store(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> None:
        """Store keys and values of one layer that were attended to elsewhere: `update`, with no attention to come."""
        self.update(key_states, value_states, layer_idx)
        self.columns.handed = None

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args, **kwargs) -> torch.Tensor:
        """Store a linear-attention layer's convolution state."""
        old = [x for x in self.layers[layer_idx].conv_states.values() if x is not None]
        if old and len(old[0]) != len(conv_states):
            raise ValueError(
                f"layer {layer_idx} holds a recurrent state of {len(old[0])} rows and was given {len(conv_states)}: "
                f"call cache.batch_repeat_interleave({max(1, len(conv_states) // len(old[0]))}) after cache.prompt() "
                f"and before generate()"
            )
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def _warn_past_chunk(self, new: int) -> None:
        if self.policy is not None and new > self.policy.chunk and not self._warned:
            self._warned = True
            warnings.warn(
                f"{new} tokens were read in one forward, past the compactor's trained {self.policy.chunk}: "
                f"later tokens have seen raw tokens where it expects slots. Read in chunks, with "
                f"compactor.prefill() or generate(prefill_chunk_size={self.policy.chunk})",
                stacklevel=4,
            )

    def compact(self, keep_last: int | None = None, partial: bool = False) -> StillCache:
        """Compact now: whole chunks beyond the newest `keep_last` raw tokens, with `partial` the rest of them too.

        A short last chunk gets slots at the ratio too. Returns the cache itself.

        Raises:
            ValueError: the cache has no compactor, or `keep_last` is negative.
        """
        if self.policy is None:
            raise ValueError("a ready-made cache has no compactor; StillCache(compactor, ...) compacts as it grows")
        if keep_last is not None and keep_last < 0:
            raise ValueError(f"keep_last is {keep_last}; it must be 0 tokens or more")
        for layer in self.compact_layers:
            layer.compact(keep_last, partial)
        self.columns.prompted = None
        return self

    def append_compact(
        self,
        layers: Mapping[int, CompactKV],
        tokens: int,
        *,
        token_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        row_slots: Sequence[int] | None = None,
        positions: torch.Tensor | None = None,
        source: Cache | None = None,
        floor: int = 1,
    ) -> None:
        """Append the slots of the next `tokens` tokens of the context.

        If a forward has just read these tokens into this cache, their raw keys and values give way to the slots;
        otherwise nothing may be raw, and the context grows.

        Args:
            layers: `CompactKV` for every full-attention layer.
            tokens: tokens that they stand for, padding included.
            token_ids: `[batch, tokens]`.
            attention_mask: `[batch, tokens]` where rows are padded.
            row_slots: new slots of each row, as in `from_layers`.
            positions: where the new slots are rotated, as in `from_layers`.
            source: a cache that has read these tokens, for other layers' states.
            floor: as in `from_layers`.

        Raises:
            ValueError: other tokens are raw, or the layers do not fit.
        """
        known, start = self.token_ids, self.logical_length
        mask = None if attention_mask is None else attention_mask.bool().cpu()
        read = self.compact_layers[0].physical > self.compact_layers[0].slots
        append_slots(self, layers, tokens, mask, row_slots, positions, floor)
        if not read or source is not None:
            self._copy_others(source)
        start -= tokens if read else 0
        grows = token_ids is not None and known is not None and known.shape[1] == start
        self.token_ids = torch.cat((known, token_ids), dim=1) if grows else known
        self.columns.prompted = None

    def _copy_others(self, source: Cache | None) -> None:
        others = [i for i, layer in enumerate(self.layers) if not isinstance(layer, CompactLayer)]
        if others and source is None:
            raise ValueError(f"layers {others} keep a state of their own; pass source=, the cache that read the tokens")
        for index in others:
            self.layers[index] = copy_state(source.layers[index])

    def prompt(
        self,
        question_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        previous_ids: torch.Tensor | None = None,
        previous_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Inputs for `model.generate(**cache.prompt(question_ids), past_key_values=cache)`.

        Args:
            question_ids: `[tokens]` or `[batch, tokens]`; n questions may follow a context of one row.
            attention_mask: of the questions where they are padded (on the left).
            previous_ids: what `generate` returned last, once generation has moved the cache on.
            previous_mask: `[batch, tokens]` of `previous_ids`, zeros at what `generate` filled up the rows with that
                ended before others; the cache has taken that for tokens.

        Returns:
            `input_ids` and `attention_mask`, `[batch, context + question]`. In a batch of unequal rows the mask is
            rewritten so that dead slots are hidden and its cumulative sum still gives each row's positions.

        Raises:
            ValueError: the ids of what the cache holds are not known, or the mask cannot serve this model.
        """
        return make_prompt(self, question_ids, attention_mask, previous_ids, previous_mask)

    def continuation(
        self, new_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Inputs for a plain forward, `model(**cache.continuation(new_ids), past_key_values=cache)`.

        Args:
            new_ids: `[tokens]` or `[batch, tokens]` after what the cache holds.
            attention_mask: of the new tokens where they are padded.

        Returns:
            `input_ids` and `position_ids` `[batch, tokens]`, and `attention_mask` `[batch, context + tokens]`. Pass on
            all three: positions that lack are noticed under stock attention alone, and only of rows of unequal length
            that no `prompt` or `continuation` was ever made for.
        """
        return make_continuation(self, new_ids, attention_mask)

    @property
    def _is_user_defined(self) -> bool:
        return self.__dict__.get("_taken_by_generate", False)

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        # generate() marks the caches that it is handed: the one moment at which its arguments can be checked
        call = inspect.currentframe().f_back.f_locals
        check_generate(self, call.get("generation_config"), call.get("model_kwargs") or {})
        self.__dict__["_taken_by_generate"] = value

    def activate_past_recording(self) -> None:
        """Put compaction off until `crop`; what assisted and prompt-lookup decoding call at their start.

        Raises:
            ValueError: the cache is not empty. These decoders feed the whole prompt again into any pre-filled cache.
        """
        if self.logical_length:
            raise ValueError(
                f"assisted and prompt-lookup decoding would feed the whole prompt again to a cache that stands for "
                f"{self.logical_length} tokens: start from an empty StillCache(compactor, ...), or decode without them"
            )
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens; they must all be raw."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.columns.mask is not None:
            self.columns.mask = self.columns.mask[:, : self.logical_length]

    def reset(self) -> None:
        """Forget everything, slots and padding too."""
        super().reset()
        self.columns.mask, self.columns.prompted, self.token_ids = None, None, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, next to itself."""
        self.batch_select_indices(torch.arange(self.compact_layers[0].batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows, in this order, in every layer."""
        rows = self.compact_layers[0].batch
        for layer in self.layers:
            layer.reorder_cache(indices)
        for holder, name in ((self.columns, "mask"), (self, "token_ids")):
            table = getattr(holder, name)
            if table is not None and rows:
                setattr(holder, name, widen(table, max(rows, len(table)))[indices.to(table.device)])

    def clone(self) -> StillCache:
        """An independent copy, so that one compact cache answers many questions."""
        other = StillCache._empty(self.model_config, self.policy)
        other.columns.__dict__.update(copy.copy(self.columns).__dict__)
        other.layers = [
            layer.copy(other.columns) if isinstance(layer, CompactLayer) else copy_state(layer) for layer in self.layers
        ]
        other.token_ids, other.provenance = self.token_ids, copy.deepcopy(self.provenance)
        for name in ("offloading", "only_non_sliding", "prefetch_stream"):
            if hasattr(self, name):
                setattr(other, name, getattr(self, name))
        return other

    def __deepcopy__(self, memo: dict) -> StillCache:
        return self.clone()

    def describe(self) -> dict[str, Any]:
        """What the cache is, in plain values: model, lengths, slots, bytes, provenance."""
        return cache_io.describe(self)

    def save(self, path: str | Path) -> Path:
        """Write the cache to one safetensors file, atomically. See `still.cache_io.save`."""
        return cache_io.save(self, path)

    @classmethod
    def load(cls, path: str | Path, model: Any, verify: bool = False, **options) -> StillCache:
        """Open a saved cache, memory-mapped. See `still.cache_io.load`."""
        return cache_io.load(cls, path, model, verify=verify, **options)


def _reach(compactor: LayerCompactor, reach: float | None) -> float | None:
    """Of `SelfCompaction`: what was given, or what a compactor that can move its slots was trained for."""
    if reach is None:
        return getattr(compactor, "reach", None)
    if reach == math.inf:
        return None
    if not hasattr(compactor, "moved"):
        raise ValueError(
            f"reach is {reach:g}, and {type(compactor).__name__} cannot rotate its slots to other positions (it has no "
            f"moved()): leave reach out"
        )
    return reach
