"""One layer of the drop-in cache: compact slots, then raw tokens.

Uniform slots are columns like the tokens after them, so that any attention serves them. Slots that are unequal from
head to head or layer to layer are packed (`cache_ragged`) and stand before the columns, which are raw tokens alone
then: all layers keep one mask, over those. Rows of a batch may differ in either.
"""

from __future__ import annotations

import warnings

import torch
from transformers.cache_utils import DynamicLayer

from . import attention
from .cache_compaction import Packed, SelfCompaction
from .cache_rows import Columns, pack, prefix_bias, take_apart, widen


class CompactLayer(DynamicLayer):
    """A full-attention layer that stores `physical` columns and stands for `logical` ones.

    It follows the contract of transformers' own sliding-window layer: lengths are logical, masks are physical.

    Attributes:
        keys: `[batch, kv_heads, slots + raw, head_dim]`, or None while empty. Raw tokens follow the slots.
        values: `[batch, kv_heads, slots + raw, head_dim]`, or None.
        slot_positions: logical positions at which the slots are rotated, `[batch or 1, slots]`; -1 at dead slots.
        beta: additive pre-softmax bias `[batch, kv_heads, slots]`, or None.
        logical: columns of the sequence that this layer has seen, padding included.
        lengths: real tokens of each row `[batch]`, or None where no row is padded.
        live: columns `[batch, slots + raw]` that are no padding, or None where all are.
        ragged: packed slots before the columns, among which there are none then; None where slots are uniform.
    """

    def __init__(self, index: int, config, columns: Columns | None = None, policy: SelfCompaction | None = None):
        super().__init__()
        self.index, self.config, self.policy = index, config, policy
        self.columns = Columns() if columns is None else columns
        self.record_past = False
        self._awaits_crop = False
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = self.beta = self.lengths = self.live = self.ragged = None
        self.slot_positions = torch.empty(1, 0, dtype=torch.long)
        self.logical = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take dtype and device from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (x.new_empty(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states))
        self.slot_positions = self.slot_positions.to(self.device)
        self.is_initialized = True

    def fill(self, rows: Packed, logical: int, lengths: torch.Tensor | None, live: torch.Tensor | None) -> None:
        """Take over stored columns as they are."""
        self.dtype, self.device = rows.keys.dtype, rows.keys.device
        self.keys, self.values = owned(rows.keys), owned(rows.values)
        self.beta = None if rows.beta is None else owned(rows.beta)
        self.slot_positions, self.logical, self.lengths, self.live = rows.slot_positions, logical, lengths, live
        self.ragged = None if rows.ragged is None else rows.ragged.map(owned)
        self.is_initialized = True

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` takes any forward back: only while compaction is put off."""
        return self.record_past

    @property
    def slots(self) -> int:
        """Compact slots among the columns, of the row that has most."""
        return self.slot_positions.shape[-1]

    @property
    def physical(self) -> int:
        """Stored columns."""
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def batch(self) -> int:
        """Rows, 0 while empty."""
        return 0 if self.keys is None else self.keys.shape[0]

    def raw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values `[batch, kv_heads, raw, head_dim]` and positions `[raw]` of the tokens not compacted yet.

        Raises:
            ValueError: rows are padded, so that they have no common positions.
        """
        if self.lengths is not None:
            raise ValueError("rows of a padded batch have positions of their own; compact them with cache.compact()")
        rows = self._packed()
        return rows.keys[:, :, rows.slots :], rows.values[:, :, rows.slots :], rows.raw_positions()

    def get_seq_length(self) -> int:
        """The logical length."""
        return self.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Physical columns after `query_length` new tokens, and the logical column where they start."""
        refuse_nothing_new(query_length, self.logical)
        return self.physical + query_length, self.logical - self.physical

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens, and return what this forward attends to; then compact what is due.

        Args:
            key_states: `[batch, kv_heads, new, head_dim]`; the batch may be n times the stored one (beams).
            value_states: `[batch, kv_heads, new, head_dim]`.
            *args: unused, as in transformers' layers.
            **kwargs: unused.

        Raises:
            ValueError: nothing is new, the batch does not fit, or stock attention cannot do what the slots need.
        """
        new = key_states.shape[2]
        refuse_nothing_new(new, self.logical)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != self.batch:
            widen(torch.arange(self.batch), len(key_states))  # raises where the batch does not fit
            self.batch_repeat_interleave(len(key_states) // self.batch)
        if self._awaits_crop:  # nobody crops after each forward: this is no assisted decoding any more
            self.record_past = self._awaits_crop = False
        self._check_taken()
        prefix = self.prefix
        self._note_padding(new)
        self.keys = torch.cat((self.keys, key_states), dim=2)
        self.values = torch.cat((self.values, value_states), dim=2)
        self.logical += new
        keys, values = self.keys, self.values
        if self.record_past:
            self._awaits_crop = True
        else:
            self.compact_due()
        if prefix is None:
            return keys, values
        if self._is_stock():
            slots = prefix.slots.padded()
            return torch.cat((slots[0], keys), dim=2), torch.cat((slots[1], values), dim=2)
        self.columns.handed = prefix.receipt
        return attention.with_prefix(keys, values, prefix)

    def _check_taken(self) -> None:
        """Raise where the slots that a layer last handed over reached no attention: answers would do without them."""
        handed, self.columns.handed = self.columns.handed, None
        if handed is not None and not handed.taken:
            raise ValueError(
                "a layer's slots reached no attention: the model does not run attn_implementation='still' (give the "
                "cache the config of the model that runs: prefill and load take the model itself), or it changes the "
                "keys that its cache returns and can only be given uniform slots without beta, and rows of equal length"
            )

    def _is_stock(self) -> bool:
        return self.config._attn_implementation != attention.NAME

    def _note_padding(self, new: int) -> None:
        fresh = self.columns.read(self.logical, new, self.batch)
        if fresh is None and self.lengths is None:
            return
        device = self.keys.device
        fresh = torch.ones(self.batch, new, dtype=torch.bool) if fresh is None else fresh
        if self.lengths is None:
            self.lengths = torch.full((self.batch,), self.logical)
        self.lengths = self.lengths + fresh.sum(-1).to(self.lengths.device)
        if self.live is not None or not fresh.all():
            old = torch.ones(self.batch, self.physical, dtype=torch.bool) if self.live is None else self.live
            self.live = torch.cat((old.to(device), fresh.to(device)), dim=1)

    @property
    def prefix(self) -> attention.Prefix | None:
        """What attention must know of the slots beyond the stored columns; None where there is nothing."""
        if self._is_stock():
            self._refuse_stock()
        elif self.live is not None and self.physical:
            bias = prefix_bias(self.physical, self.slot_positions, self.beta, self.live)
            return attention.Prefix(self.physical, bias, self.ragged)
        elif self.beta is not None and self.lengths is not None and (self.slot_positions < 0).any():
            # Padded rows that are as wide as each other, of unequal slots.
            live = torch.ones(self.batch, self.physical, dtype=torch.bool, device=self.keys.device)
            return attention.Prefix(
                self.physical, prefix_bias(self.physical, self.slot_positions, self.beta, live), self.ragged
            )
        elif self.beta is not None:
            return attention.Prefix(self.slots, self.beta)
        return None if self.ragged is None else attention.Prefix(0, None, self.ragged)

    def _refuse_stock(self) -> None:
        """Raise where stock attention would silently attend to the wrong slots."""
        if self.beta is not None or (self.ragged is not None and self.ragged.beta is not None):
            raise ValueError(
                f"the slots of layer {self.index} carry a bias (beta), which attn_implementation="
                f"{self.config._attn_implementation!r} cannot apply: call still.attention.register() and "
                f"model.set_attn_implementation('still'), and give the cache that model's own config"
            )
        if self.ragged is not None:
            if self.columns.padded != self.logical:
                refuse_ragged(self.config)
        elif self.live is not None and self.physical < self.logical and self.columns.prompted is None:
            raise ValueError(
                f"the rows of this batch have unequal slots; attn_implementation={self.config._attn_implementation!r} "
                f"attends to the dead ones unless the attention mask is rewritten over them: make the inputs with "
                f"cache.prompt(question_ids) for generate(), or cache.continuation(new_ids) for a plain forward"
            )

    def compacts_within(self, new: int) -> bool:
        """Whether so many more tokens may let a chunk fall due."""
        return self.policy is not None and self.policy.is_due(self.most_raw() + new)

    def compact_due(self) -> None:
        """Compact the whole chunks that are due. Padded rows under stock attention wait for `cache.prompt`."""
        policy = self.policy
        if policy is None or not policy.is_due(self.most_raw()):
            return
        if self.lengths is None or not self._is_stock():
            self.compact()
        elif not self.columns.warned:
            self.columns.warned = True
            warnings.warn(
                f"rows of a padded batch compact to unequal slots, which attn_implementation="
                f"{self.config._attn_implementation!r} cannot tell apart while it generates: compaction waits for "
                f"cache.prompt() or cache.compact(); with attn_implementation='still' it need not",
                stacklevel=2,
            )

    def most_raw(self) -> int:
        """Raw tokens of the row that has most."""
        if self.lengths is None or not self.physical:
            return self.physical - self.slots
        stored = self.physical if self.live is None else self.live.sum(-1)
        return int((stored - (self.slot_positions >= 0).sum(-1)).max())

    def compact(self, keep_last: int | None = None, partial: bool = False) -> None:
        """Compact whole chunks beyond the newest `keep_last` raw tokens of each row, with `partial` the rest too."""
        if not self.physical:
            return
        away = self.keys.device != self.device
        if away:  # offloaded: what compacts it is where the model is
            self.prefetch()
        if self.lengths is None and (self.ragged is None or self.ragged.even):
            rows, live = self.policy.run(self.index, self._packed(), keep_last, partial), None
        else:
            rows, live = pack([self.policy.run(self.index, row, keep_last, partial) for row in self.rows()])
        self.fill(rows, self.logical, self.lengths, live)
        if away:
            self.offload()

    def rows(self) -> list[Packed]:
        """The dense rows, without padding."""
        lengths = torch.full((self.batch,), self.logical) if self.lengths is None else self.lengths
        return take_apart(self.keys, self.values, self.slot_positions, self.beta, self.live, lengths, self.ragged)

    def _packed(self) -> Packed:
        return Packed(self.keys, self.values, self.slot_positions, self.beta, self.logical, self.ragged)

    def activate_past_recording(self) -> None:
        """Put compaction off until `crop`, as assisted decoding needs."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens, then compact what was put off.

        Raises:
            ValueError: the number is positive, or reaches into the compact slots.
        """
        count = -tokens_to_remove
        if count < 0:
            raise ValueError(f"crop takes minus the tokens to remove, or 0; got {tokens_to_remove}")
        if count:
            raw = min(self._raw_columns()) if self.physical else 0
            if count > raw:
                raise ValueError(
                    f"cannot crop {count} tokens: only {raw} are still raw, the rest of {self.logical} is compact; "
                    f"keep more with keep_last, or go back to a cache.clone()"
                )
            if self.lengths is not None:
                gone = count if self.live is None else self.live[:, -count:].sum(-1).to(self.lengths.device)
                self.lengths = self.lengths - gone
            self.keys, self.values = owned(self.keys[:, :, :-count]), owned(self.values[:, :, :-count])
            self.live = None if self.live is None else self.live[:, :-count]
            self.logical -= count
        self._awaits_crop = False
        if self.is_initialized:
            self.compact_due()

    def hide(self, counts: torch.Tensor) -> None:
        """Take so many of each row's newest tokens, `[batch]`, for padding.

        Raises:
            ValueError: they are compact already.
        """
        if self.lengths is None:
            self.lengths = torch.full((self.batch,), self.logical)
        if self.live is None:
            self.live = torch.ones(self.batch, self.physical, dtype=torch.bool, device=self.keys.device)
        newest = self.live.flip(-1).cumsum(-1).flip(-1)  # 1 at a row's last token, 2 at the one before
        raw = self.live.sum(-1).cpu() - (self.slot_positions >= 0).sum(-1).cpu()
        if (counts > raw).any():
            row = int((counts - raw).argmax())
            raise ValueError(
                f"the last {int(counts[row])} tokens of row {row} are padding, and only its last {int(raw[row])} are "
                f"still raw: what is compact cannot be hidden; keep more with keep_last"
            )
        self.live = self.live & (newest > counts.to(newest.device)[:, None])
        self.lengths = self.lengths - counts.to(self.lengths.device)

    def _raw_columns(self) -> list[int]:
        """For each row the columns right of its last slot."""
        if self.live is None:
            return [self.physical - self.slots]
        slots = (self.slot_positions >= 0).sum(-1).expand(self.batch)
        ends = [row.nonzero()[int(n) - 1] + 1 if n else 0 for row, n in zip(self.live, slots, strict=True)]
        return [self.physical - int(end) for end in ends]

    def reset(self) -> None:
        """Forget everything, slots too."""
        self._clear()

    def offload(self) -> None:
        """Move the stored columns to the CPU."""
        super().offload()
        if self.beta is not None:
            self.beta = self.beta.to("cpu", non_blocking=True)
        if self.ragged is not None:
            self.ragged = self.ragged.map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move them back."""
        super().prefetch()
        if self.beta is not None and self.beta.device != self.device:
            self.beta = self.beta.to(self.device, non_blocking=True)
        if self.ragged is not None and self.ragged.keys.device != self.device:
            self.ragged = self.ragged.map(lambda x: x.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, next to itself."""
        rows = torch.arange(self.batch).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows, in this order."""
        if not self.is_initialized:
            return
        for name in ("keys", "values", "beta", "slot_positions", "lengths", "live"):
            table = getattr(self, name)
            if table is not None and not (name == "slot_positions" and len(table) == 1):
                setattr(self, name, table[indices.to(table.device)])
        self.ragged = None if self.ragged is None else self.ragged.rows(indices)

    def copy(self, columns: Columns) -> CompactLayer:
        """An independent layer with the same contents; it shares no storage."""
        other = CompactLayer(self.index, self.config, columns, self.policy)
        for name in ("keys", "values", "beta", "slot_positions", "lengths", "live"):
            table = getattr(self, name)
            setattr(other, name, None if table is None else table.clone())
        other.ragged = None if self.ragged is None else self.ragged.map(torch.clone)
        other.logical, other.is_initialized = self.logical, self.is_initialized
        if self.is_initialized:
            other.dtype, other.device = self.dtype, self.device
        return other


def refuse_nothing_new(new: int, logical: int) -> None:
    """Raise where a forward brings no new token: its prompt was the question alone."""
    if new < 1:
        raise ValueError(
            f"no new token follows the {logical} that the cache stands for: generate() takes context and question "
            f"together, as model.generate(**cache.prompt(question_ids), past_key_values=cache) passes them"
        )


def refuse_ragged(config) -> None:
    """Raise where ragged slots meet stock attention: it has one number of columns for all heads and layers."""
    raise ValueError(
        f"the slots of this cache are ragged (unequal over heads or layers), which attn_implementation="
        f"{config._attn_implementation!r} cannot serve: call still.attention.register() and "
        f"model.set_attn_implementation('still'), and give the cache that model's own config. Without it, where all "
        f"layers share one split, a plain forward can pad them: model(**cache.continuation(new_ids), "
        f"past_key_values=cache)"
    )


def owned(x: torch.Tensor) -> torch.Tensor:
    """The tensor in a storage of its own size, so that bytes measured are bytes kept."""
    exact = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if exact else x.clone(memory_format=torch.contiguous_format)

