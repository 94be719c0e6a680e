"""When and how a cache that compacts by itself does so: dense rows in, dense rows out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F

from .budgets import slots_for
from .cache_heads import mute_heads, ragged_slots, recompact_heads, slot_positions
from .cache_ragged import RaggedSlots, even_positions
from .types import CompactKV

MODES = ("append", "recompact")


class LayerCompactor(Protocol):
    """Anything that compacts one layer: a `StillCompactor`, or a method that looks at keys and values alone.

    It may also have `slot_positions(positions, slots)`, the logical positions `[batch or 1, slots]` at which the slots
    are rotated, or return them as an attribute `positions` of its result; evenly spread ones are taken otherwise.
    Unequal slots are compacted again if it has `head_counts(tokens, slots)`, the slots of every head by layer (empty
    where they are equal), and `compact_layer` takes some heads alone (`heads=`), with a number for each of them. If it
    has `taken_back(layer, slots, later, heads=None)`, slots so far that it names when a chunk is appended fall silent.
    A `reach` needs its `moved(layer, keys, before, after)`, which rotates keys from some positions to others.
    """

    def compact_layer(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, slots: int
    ) -> CompactKV:
        """Compact keys and values `[batch, kv_heads, tokens, head_dim]` to `slots` slots.

        A ragged record may share the slots of all layers out as it likes; then every layer's record is ragged.
        """
        ...


@dataclass(frozen=True)
class Packed:
    """Dense rows of one layer: compact slots, then raw tokens.

    Attributes:
        keys: `[batch, kv_heads, slots + raw, head_dim]`.
        values: `[batch, kv_heads, slots + raw, head_dim]`.
        slot_positions: logical positions at which the slots are rotated, `[batch or 1, slots]`.
        beta: `[batch, kv_heads, slots]`, or None.
        logical: tokens that these rows stand for.
        ragged: the slots where they are unequal; `keys` and `values` hold raw tokens alone then.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slot_positions: torch.Tensor
    beta: torch.Tensor | None
    logical: int
    ragged: RaggedSlots | None = None

    @property
    def slots(self) -> int:
        """Compact slots among the columns."""
        return self.slot_positions.shape[-1]

    @property
    def raw(self) -> int:
        """Raw tokens after the slots."""
        return self.keys.shape[2] - self.slots

    def raw_positions(self) -> torch.Tensor:
        """Logical positions `[raw]` of the raw tokens."""
        return torch.arange(self.logical - self.raw, self.logical, device=self.keys.device)

    def as_ragged(self) -> Packed:
        """The same rows with their slots packed, apart from the raw tokens."""
        if self.ragged is not None:
            return self
        t = self.slots
        slots = CompactKV(self.keys[:, :, :t], self.values[:, :, :t], self.beta, positions=self.slot_positions)
        keys, values = self.keys[:, :, t:], self.values[:, :, t:]
        return Packed(keys, values, self.slot_positions[:, :0], None, self.logical, RaggedSlots.of(slots))

    def without(self, tokens: int, ragged: RaggedSlots) -> Packed:
        """Ragged slots in the place of those so far and of the oldest raw tokens."""
        return replace(self, keys=self.keys[:, :, tokens:], values=self.values[:, :, tokens:], ragged=ragged)


@dataclass(frozen=True)
class SelfCompaction:
    """How a cache compacts what it has stored, once a whole chunk beyond `keep_last` tokens is raw.

    Attributes:
        compactor: a layer compactor.
        chunk: tokens compacted at a time: the length that the compactor was trained on.
        ratio: tokens per slot.
        slots: slots of a whole chunk; overrides `ratio` there.
        keep_last: newest tokens that stay raw.
        mode: `"append"` compacts each chunk once, and the slots grow with the context; those that a later chunk takes
            back fall silent. `"recompact"` compacts the slots so far and the next chunk together to one fixed size.
        reach: farthest that slots stand before the raw tokens, in tokens; None for where their own tokens stood. See
            `_pull`.
    """

    compactor: LayerCompactor
    chunk: int
    ratio: float
    slots: int | None = None
    keep_last: int = 256
    mode: str = "append"
    reach: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; it must be one of {MODES}")
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; it must be 1 token or more")
        if self.keep_last < 0:
            raise ValueError(f"keep_last is {self.keep_last}; it must be 0 tokens or more")
        if self.slots is not None and not 1 <= self.slots <= self.chunk:
            raise ValueError(f"slots is {self.slots}; it must lie between 1 and the chunk's {self.chunk} tokens")
        if self.reach is not None and (self.reach < 1 or self.reach % 1):
            raise ValueError(f"reach is {self.reach}; it must be a whole number of tokens, 1 or more, or math.inf")
        slots_for(self.chunk, self.ratio)

    def budget(self, tokens: int, before: int = 0) -> int:
        """Slots that `tokens` tokens are compacted to: with those of the `before` that stand ahead, as many as of all.

        Rounded chunk by chunk instead, a context would get fewer in chunks than in one pass.
        """
        if self.slots is not None and tokens == self.chunk:
            return self.slots
        ahead = slots_for(before, self.ratio) if before else 0
        return max(1, slots_for(before + tokens, self.ratio) - ahead)

    def is_due(self, raw: int) -> bool:
        """Whether a layer with `raw` raw tokens has a whole chunk beyond the newest ones."""
        return raw - self.keep_last >= self.chunk

    def run(self, layer: int, rows: Packed, keep_last: int | None = None, partial: bool = False) -> Packed:
        """Compact every whole chunk beyond the newest `keep_last` raw tokens, and with `partial` the rest too."""
        keep_last = self.keep_last if keep_last is None else keep_last
        while rows.raw - keep_last >= self.chunk:
            rows = self._pull(layer, self._step(layer, rows, self.chunk))
        if partial and rows.raw > keep_last:
            rows = self._pull(layer, self._step(layer, rows, rows.raw - keep_last))
        return rows

    def _pull(self, layer: int, rows: Packed) -> Packed:
        """Spread the slots evenly over the last `reach` tokens before the raw ones, once they stand farther back.

        Slots carry what they know; a position only says where to look. From farther away than it was trained, a base
        finds less, and a compactor's slots were trained no farther from a question than a chunk. The order of the slots
        and all lengths stay as they are, and no two slots of a head come to one position: more than `reach` slots
        stand next to one another, so that at ratio 1 none moves.
        """
        if self.reach is None:
            return rows
        where = rows.slot_positions if rows.ragged is None else rows.ragged.positions
        end, most = rows.logical - rows.raw, rows.slots if rows.ragged is None else int(rows.ragged.counts.max())
        reach = max(self.reach, most)
        if not where.numel() or int(where.min()) >= end - reach:
            return rows
        span = torch.tensor([end - reach, end - 1], device=where.device)
        if rows.ragged is not None:
            ragged = rows.ragged
            nearer = torch.cat([even_positions(span, n)[0] for n in ragged.counts.flatten().tolist()]).to(where)
            keys = self.compactor.moved(layer, ragged.keys[None, None], where[None], nearer[None])[0, 0]
            return replace(rows, ragged=replace(ragged, keys=keys, positions=nearer))
        nearer = even_positions(span, rows.slots)
        keys = self.compactor.moved(layer, rows.keys[:, :, : rows.slots], where, nearer)
        keys = torch.cat((keys, rows.keys[:, :, rows.slots :]), dim=2)
        return replace(rows, keys=keys, slot_positions=nearer)

    def _step(self, layer: int, rows: Packed, tokens: int) -> Packed:
        if rows.ragged is not None and self.mode == "recompact":
            return self._recompact_heads(layer, rows, tokens)
        t, end = rows.slots, rows.slots + tokens
        first, positions = t, rows.raw_positions()[:tokens]
        slots = self.budget(tokens, rows.logical - rows.raw if self.mode == "append" else 0)
        if self.mode == "recompact" and t:
            if rows.beta is not None:
                raise ValueError("recompact would lose the beta of the slots; use mode='append', or slots without beta")
            before = rows.slot_positions
            first, positions = 0, torch.cat((before, positions.expand(len(before), -1).to(before.dtype)), dim=1)
            positions = positions[0] if len(before) == 1 else positions
            slots = max(t, self.budget(min(self.chunk, t + tokens)))
        if self.mode == "append":
            rows = self._mute(layer, rows, tokens)
        old = rows.keys[:, :, first:end], rows.values[:, :, first:end]
        compact = self.compactor.compact_layer(layer, *old, positions, slots)
        if compact.counts is not None or rows.ragged is not None:
            new = ragged_slots(self.compactor, layer, compact, positions, old[0])
            rows = rows.as_ragged()
            return rows.without(tokens, new if first < t else rows.ragged.then(new))
        if compact.keys.shape[2] != slots:
            raise ValueError(
                f"{type(self.compactor).__name__} kept {compact.keys.shape[2]} slots of layer {layer}; "
                f"the budget of {old[0].shape[2]} columns is {slots}"
            )
        where = slot_positions(self.compactor, compact, positions, slots)
        return replace(
            rows,
            keys=torch.cat((rows.keys[:, :, :first], compact.keys.to(rows.keys), rows.keys[:, :, end:]), dim=2),
            values=torch.cat((rows.values[:, :, :first], compact.values.to(rows.keys), rows.values[:, :, end:]), dim=2),
            slot_positions=_join(rows.slot_positions[:, :first], where),
            beta=_join_beta(rows, first, compact),
        )

    def _mute(self, layer: int, rows: Packed, tokens: int) -> Packed:
        """Silence the slots that the next tokens take back: they keep their place, with zeros for key and value.

        A value that was amended chunks later would else stand against the new one, in heads that kept no slot of that.
        """
        t = rows.slots
        taken_back = getattr(self.compactor, "taken_back", None)
        if taken_back is None or (rows.ragged is None and not t):
            return rows
        where = rows.raw_positions()[:tokens][None]
        later = rows.keys[:, :, t : t + tokens], rows.values[:, :, t : t + tokens], where
        if rows.ragged is not None:
            return replace(rows, ragged=mute_heads(taken_back, layer, rows.ragged, later))
        gone = taken_back(layer, (rows.keys[:, :, :t], rows.values[:, :, :t], rows.slot_positions), later)
        if gone is None:
            return rows
        beta = None if rows.beta is None else rows.beta.masked_fill(gone, 0)
        gone = F.pad(gone, (0, rows.raw))[..., None]
        return replace(rows, keys=rows.keys.masked_fill(gone, 0), values=rows.values.masked_fill(gone, 0), beta=beta)

    def _recompact_heads(self, layer: int, rows: Packed, tokens: int) -> Packed:
        read = rows.logical - rows.raw + tokens
        slots = self.budget(min(self.chunk, read))
        fresh = rows.keys[:, :, :tokens], rows.values[:, :, :tokens], rows.raw_positions()[:tokens]
        return rows.without(tokens, recompact_heads(self.compactor, layer, rows.ragged, *fresh, read, slots))


def _join(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Two tables `[batch or 1, n]` side by side."""
    batch = max(len(first), len(second))
    dtype = torch.promote_types(first.dtype, second.dtype)
    return torch.cat([part.expand(batch, -1).to(dtype) for part in (first, second)], dim=1)


def _join_beta(rows: Packed, first: int, compact: CompactKV) -> torch.Tensor | None:
    if rows.beta is None and compact.beta is None:
        return None
    none = rows.keys.new_zeros(rows.keys.shape[:3])
    before = none[:, :, :first] if rows.beta is None else rows.beta[:, :, :first]
    after = none[:, :, : compact.keys.shape[2]] if compact.beta is None else compact.beta
    return torch.cat((before, after.to(before)), dim=2)
