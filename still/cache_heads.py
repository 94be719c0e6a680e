"""What a layer compactor makes of heads that are unequal: its records as packed slots, and packed slots once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from .cache_ragged import RaggedSlots, as_ragged, check_record, even_positions
from .types import CompactKV


def slot_positions(compactor, record: CompactKV, positions: torch.Tensor, slots: int) -> torch.Tensor:
    """Logical positions `[batch or 1, slots]` at which the slots of a head are rotated.

    Args:
        compactor: asked where the record does not say.
        record: what it returned; only the positions of a uniform one are looked at.
        positions: `[tokens]` or `[batch, tokens]` of what was compacted.
        slots: of the head.
    """
    where = None if record.counts is not None else getattr(record, "positions", None)
    if where is None and hasattr(compactor, "slot_positions"):
        where = compactor.slot_positions(positions, slots)
    where = even_positions(positions, slots) if where is None else where
    return where[None] if where.ndim == 1 else where


def ragged_slots(
    compactor, layer: int, record: CompactKV, positions: torch.Tensor, source: torch.Tensor
) -> RaggedSlots:
    """What a compactor returned for one layer, packed.

    Args:
        compactor: that made the record.
        layer: index of the layer, for errors.
        record: ragged, or uniform.
        positions: `[tokens]` or `[batch, tokens]` of what was compacted.
        source: the keys that were compacted, `[batch, kv_heads, tokens, head_dim]`.

    Raises:
        ValueError: the record does not fit the layer, or a head has more slots than there were tokens.
    """
    packed = as_ragged(record)
    check_record(layer, packed, source.shape[1], source.shape[3], source.shape[2], floor=0)
    known: dict[int, torch.Tensor] = {}

    def spread(row: int, count: int) -> torch.Tensor:
        if count not in known:
            known[count] = slot_positions(compactor, packed, positions, count)
        return known[count][row if len(known[count]) > 1 else 0]

    return RaggedSlots.of(packed, spread)


def recompact_heads(
    compactor,
    layer: int,
    old: RaggedSlots,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    tokens: int,
    slots: int,
) -> RaggedSlots:
    """Compact each head's own slots and the next tokens together. The heads differ in length, but the rows do not.

    A head that is to keep more than it has leaves what it lacks to others of the layer; one that is to keep all stays
    as it is.

    Args:
        compactor: a layer compactor with `head_counts`, that compacts some heads alone.
        layer: index of the layer.
        old: the slots so far.
        keys: of the next tokens, `[batch, kv_heads, tokens, head_dim]`.
        values: `[batch, kv_heads, tokens, head_dim]`.
        positions: of these tokens, `[tokens]`.
        tokens: that old slots and these tokens stand for.
        slots: that the average head of all layers is to keep.

    Raises:
        ValueError: the old slots have a beta, which would be lost, or the compactor has no `head_counts`.
    """
    if old.beta is not None:
        raise ValueError("recompact would lose the beta of the slots; use mode='append', or slots without beta")
    if not hasattr(compactor, "head_counts"):
        raise ValueError(
            f"{type(compactor).__name__} does not say how many slots each head keeps (head_counts), so that unequal "
            f"ones cannot be compacted again; use mode='append'"
        )
    batch, heads = old.counts.shape
    columns = []  # keys, values [batch, n, head_dim] and positions [batch, n] of each head
    for head, rows in enumerate(zip(*(old.heads(row) for row in range(batch)), strict=True)):
        own = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        new = keys[:, head], values[:, head], positions.expand(batch, -1).to(own[2].dtype)
        columns.append([torch.cat(parts, dim=1) for parts in zip(own, new, strict=True)])
    wanted = compactor.head_counts(tokens, slots).get(layer, (slots,) * heads)
    counts = _within([parts[0].shape[1] for parts in columns], wanted)
    made: list[Sequence[torch.Tensor]] = [()] * heads
    for group in _alike(columns, counts):
        own_keys, own_values = (torch.stack([columns[head][i] for head in group], dim=1) for i in (0, 1))
        where, count = columns[group[0]][2], counts[group[0]]
        record = CompactKV(own_keys[:, :, :count], own_values[:, :, :count], positions=where[:, :count])
        if 0 < count < where.shape[1]:
            record = compactor.compact_layer(layer, own_keys, own_values, where, count, heads=group)
        at = slot_positions(compactor, record, where, count).expand(batch, -1)
        for place, head in enumerate(group):
            made[head] = record.keys[:, place], record.values[:, place], at
    packed = [torch.cat(parts, dim=1) for parts in zip(*made, strict=True)]
    return RaggedSlots.of(CompactKV(packed[0], packed[1], counts=tuple(counts), positions=packed[2]))


def _within(room: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """What heads keep who want so many slots and have room for so many."""
    counts = [min(both) for both in zip(room, wanted, strict=True)]
    for head, most in enumerate(room):
        counts[head] = min(most, counts[head] + sum(wanted) - sum(counts))
    return counts


def _alike(columns: Sequence[Sequence[torch.Tensor]], counts: Sequence[int]) -> list[list[int]]:
    """Heads that stand at the same positions and keep equally many slots."""
    groups: list[list[int]] = []
    for head, (_, _, where) in enumerate(columns):
        for group in groups:
            if counts[group[0]] == counts[head] and torch.equal(columns[group[0]][2], where):
                group.append(head)
                break
        else:
            groups.append([head])
    return groups


def mute_heads(
    taken_back: Callable[..., torch.Tensor | None], layer: int, old: RaggedSlots, later: Sequence[torch.Tensor]
) -> RaggedSlots:
    """Slots with zeros in the place of those that the next tokens take back. The heads differ, but the rows do not.

    Args:
        taken_back: a layer compactor's, asked for one head after the other.
        layer: index of the layer.
        old: the slots so far.
        later: keys and values `[batch, kv_heads, tokens, head_dim]` of the next tokens, and positions `[1, tokens]`.
    """
    keys, values, where = (x.unflatten(0, (old.batch, -1)) for x in (old.keys, old.values, old.positions))
    gone = []
    for head, (a, b) in enumerate(pairwise(old.offsets[: old.counts.shape[1] + 1])):
        own = keys[:, None, a:b], values[:, None, a:b], where[:, a:b]
        new = (*(x[:, head : head + 1] for x in later[:2]), later[2])
        gone.append(taken_back(layer, own, new, [head]))
    if any(x is None for x in gone):
        return old
    mask = torch.cat(gone, dim=2).flatten()
    beta = None if old.beta is None else old.beta.masked_fill(mask, 0)
    keys, values = (x.masked_fill(mask[:, None], 0) for x in (old.keys, old.values))
    return replace(old, keys=keys, values=values, beta=beta)
