"""Put ready-made slots into a cache: checks, positions, and rows with unequal numbers of slots.

`append_slots` serves uniform records; it hands over to `cache_slots_ragged` where a record or the cache is ragged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .cache_compaction import Packed
from .cache_layer import CompactLayer
from .cache_ragged import as_ragged, even_positions
from .cache_rows import left_padded_lengths, pack
from .cache_slots_ragged import append_ragged, check_replaced, lengths_after, new_spans
from .rope import head_dim_of
from .types import CompactKV


def slots_of_rows(layers: Sequence[CompactLayer]) -> list[int]:
    """Live slots of each row per KV head; where heads are unequal the mean over all layers' heads, rounded up."""
    batch = max(layers[0].batch, 1)
    if layers[0].ragged is None:
        return (layers[0].slot_positions >= 0).sum(-1).expand(batch).tolist()
    totals = torch.stack([layer.ragged.counts.sum(-1) for layer in layers]).sum(0)
    heads = len(layers) * layers[0].ragged.counts.shape[1]
    return [-(-total // heads) for total in totals.tolist()]


def append_slots(
    cache,
    layers: Mapping[int, CompactKV],
    tokens: int,
    mask: torch.Tensor | None,
    row_slots: Sequence[int] | None,
    positions: torch.Tensor | None,
    floor: int = 1,
) -> None:
    """Append compact slots to every full-attention layer of a cache, in place of their raw tokens if those are raw.

    Args:
        cache: a `StillCache`.
        layers: `CompactKV` for every full-attention layer.
        tokens: columns that the slots stand for.
        mask: `[batch, tokens]` of these columns where rows are padded.
        row_slots: slots of each row; the rest are dead columns on the left.
        positions: `[slots]` or `[batch, slots]`, or None for those of the records, or even ones.
        floor: fewest slots of a KV head of a ragged record.

    Raises:
        ValueError: the layers do not fit the model, one another, the tokens, or what the cache holds.
    """
    own = {layer.index: layer for layer in cache.compact_layers}
    if set(layers) != set(own):
        raise ValueError(
            f"slots are needed for the full-attention layers {sorted(own)}: {sorted(set(own) - set(layers))} are "
            f"missing and {sorted(set(layers) - set(own))} are too many"
        )
    config, lengths = cache.config, None if mask is None else left_padded_lengths(mask, tokens)
    shape = config.num_key_value_heads, head_dim_of(config)
    given = [index for index, record in layers.items() if record.counts is not None]
    if given and (row_slots is not None or positions is not None):
        raise ValueError(
            f"row_slots and positions are for uniform records, and layer {given[0]} is ragged: "
            f"give CompactKV(row_counts=..., positions=...) instead"
        )
    if given or any(layer.ragged is not None for layer in own.values()):
        records = {i: _as_ragged(i, x, shape, tokens, lengths, row_slots, positions) for i, x in layers.items()}
        append_ragged(own, records, shape, tokens, lengths, floor)
    else:
        _append_uniform(own, layers, shape, tokens, lengths, row_slots, positions)
    batch = len(next(iter(layers.values())).keys)
    if mask is not None:
        before = cache.columns.whole(cache.logical_length - tokens, batch)
        cache.columns.mask = torch.cat((before, mask), dim=1)


def _append_uniform(own, layers, shape, tokens, lengths, row_slots, positions) -> None:
    batch, width = _check_shapes(shape, layers, tokens)
    counts = _counts(next(iter(layers.values())), lengths, row_slots)
    for index, compact in layers.items():
        given = compact.positions if positions is None else positions
        where = _positions(own[index], tokens, lengths, counts, given, width)
        _append(own[index], compact, tokens, lengths, counts, where.to(compact.keys.device), batch)


def _as_ragged(index, record: CompactKV, shape, tokens, lengths, row_slots, positions) -> CompactKV:
    """A record in the form that ragged storage takes."""
    if record.counts is not None:
        return record
    _, width = _check_shapes(shape, {index: record}, tokens)
    counts = _counts(record, lengths, row_slots)
    where = record.positions if positions is None else positions
    where = where[None] if where is not None and where.ndim == 1 else where
    rows = None if min(counts) == width else tuple((count,) * shape[0] for count in counts)
    return as_ragged(record._replace(positions=where))._replace(row_counts=rows)


def _check_shapes(shape: tuple[int, int], layers: Mapping[int, CompactKV], tokens: int) -> tuple[int, int]:
    first = next(iter(layers.values())).keys.shape
    wanted = (first[0], shape[0], first[2], shape[1])
    for index, compact in layers.items():
        if compact.keys.shape != wanted or compact.values.shape[:3] != wanted[:3]:
            raise ValueError(
                f"layer {index} has keys {list(compact.keys.shape)} and values {list(compact.values.shape)}; the model "
                f"and the other layers need {list(wanted)}: all layers share one mask, unless slots are ragged "
                f"(CompactKV(counts=...))"
            )
        if compact.beta is not None and compact.beta.shape != wanted[:3]:
            raise ValueError(f"layer {index} has beta {list(compact.beta.shape)}; it must be {list(wanted[:3])}")
    if first[2] > tokens:
        raise ValueError(f"{first[2]} slots for {tokens} tokens: a compact cache has no more slots than tokens")
    return first[0], first[2]


def _counts(compact: CompactKV, lengths: torch.Tensor | None, row_slots: Sequence[int] | None) -> list[int]:
    """Live slots of each row."""
    batch, _, width, _ = compact.keys.shape
    if row_slots is not None:
        if len(row_slots) != batch or max(row_slots) > width or min(row_slots) < 0:
            raise ValueError(f"row_slots is {list(row_slots)}; it must have {batch} entries between 0 and {width}")
        return list(row_slots)
    if lengths is None or bool((lengths == lengths[0]).all()):
        return [width] * batch
    used = ((compact.keys != 0) | (compact.values != 0)).any(-1).any(1)  # [batch, slots]
    return (width - used.int().argmax(-1)).tolist()


def _positions(layer, tokens, lengths, counts, positions, width) -> torch.Tensor:
    """Slot positions `[batch or 1, width]`, -1 at dead slots."""
    if positions is not None:
        positions = positions[None] if positions.ndim == 1 else positions
        if positions.shape[1] != width:
            raise ValueError(f"positions has {positions.shape[1]} columns for {width} slots")
        if min(counts) == width:
            return positions
        dead = torch.arange(width) < width - torch.tensor(counts)[:, None]
        return positions.cpu().expand(len(counts), -1).masked_fill(dead, -1)
    places = [(span, count) for span, count in zip(new_spans(layer, tokens, lengths, len(counts)), counts, strict=True)]
    rows = {(span, count): even_positions(torch.arange(*span), count)[0] for span, count in set(places)}
    if len(rows) == 1 and counts[0] == width:
        return rows[places[0]][None]
    table = torch.full((len(counts), width), -1)
    for row, place in enumerate(places):
        table[row, width - place[1] :] = rows[place]
    return table


def _append(layer: CompactLayer, compact: CompactKV, tokens, lengths, counts, where, batch) -> None:
    read = layer.physical > layer.slots
    logical = layer.logical if read else layer.logical + tokens
    width = compact.keys.shape[2]
    if layer.physical and layer.batch != batch:
        raise ValueError(f"the cache has {layer.batch} rows and the new slots {batch}")
    padded = lengths is not None or layer.lengths is not None
    if not layer.physical and min(counts) == width:
        layer.fill(Packed(compact.keys, compact.values, where, compact.beta, logical), logical, lengths, None)
        return
    if not padded and min(counts) == width:
        old = Packed(layer.keys, layer.values, layer.slot_positions, layer.beta, layer.logical)
        layer.fill(_behind(old, compact, where, tokens, read), logical, None, None)
        return
    new = torch.full((batch,), tokens) if lengths is None else lengths
    old_rows = layer.rows() if layer.physical else [_nothing(compact) for _ in range(batch)]
    rows = []
    for row, old in enumerate(old_rows):
        live = slice(width - counts[row], width)
        part = CompactKV(
            compact.keys[row : row + 1, :, live],
            compact.values[row : row + 1, :, live],
            None if compact.beta is None else compact.beta[row : row + 1, :, live],
        )
        rows.append(_behind(old, part, where[row if len(where) > 1 else 0][None, live], int(new[row]), read))
    packed, live = pack(rows)
    layer.fill(packed, logical, lengths_after(layer, tokens, lengths, batch), live)


def _nothing(compact: CompactKV) -> Packed:
    keys, values = (x.new_empty(1, x.shape[1], 0, x.shape[3]) for x in (compact.keys, compact.values))
    return Packed(keys, values, torch.empty(1, 0, dtype=torch.long, device=keys.device), None, 0)


def _behind(old: Packed, new: CompactKV, where: torch.Tensor, tokens: int, read: bool) -> Packed:
    """The old slots, then the new ones, which replace raw tokens if there are any."""
    if read:
        check_replaced(old.raw, tokens)
    t = old.slots
    beta = None
    if old.beta is not None or new.beta is not None:
        zeros = [x.new_zeros(x.shape[:3]) for x in (old.keys[:, :, :t], new.keys)]
        beta = torch.cat([z if b is None else b for b, z in zip((old.beta, new.beta), zeros, strict=True)], dim=2)
    rows = max(len(old.slot_positions), len(where))
    table = [part.expand(rows, -1).to(where.dtype) for part in (old.slot_positions, where)]
    return Packed(
        torch.cat((old.keys[:, :, :t], new.keys.to(old.keys)), dim=2),
        torch.cat((old.values[:, :, :t], new.values.to(old.values)), dim=2),
        torch.cat(table, dim=1),
        beta,
        old.logical if read else old.logical + tokens,
    )
