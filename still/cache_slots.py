"""Put ready-made slots into a cache: checks, positions, and rows with unequal numbers of slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .cache_compaction import Packed, even_positions
from .cache_layer import CompactLayer
from .cache_rows import left_padded_lengths, pack
from .types import CompactKV


def slots_of_rows(layer: CompactLayer) -> list[int]:
    """Live slots of each row of a layer."""
    counts = (layer.slot_positions >= 0).sum(-1)
    return counts.expand(max(layer.batch, 1)).tolist()


def append_slots(
    cache,
    layers: Mapping[int, CompactKV],
    tokens: int,
    mask: torch.Tensor | None,
    row_slots: Sequence[int] | None,
    positions: torch.Tensor | None,
) -> None:
    """Append compact slots to every full-attention layer of a cache, in place of their raw tokens if those are raw.

    Args:
        cache: a `StillCache`.
        layers: `CompactKV` for every full-attention layer.
        tokens: columns that the slots stand for.
        mask: `[batch, tokens]` of these columns where rows are padded.
        row_slots: slots of each row; the rest are dead columns on the left.
        positions: `[slots]` or `[batch, slots]`, or None for even ones.

    Raises:
        ValueError: the layers do not fit the model, one another, the tokens, or what the cache holds.
    """
    own = {layer.index: layer for layer in cache.compact_layers}
    if set(layers) != set(own):
        raise ValueError(
            f"slots are needed for the full-attention layers {sorted(own)}: {sorted(set(own) - set(layers))} are "
            f"missing and {sorted(set(layers) - set(own))} are too many"
        )
    batch, count = _check_shapes(cache.config, layers, tokens)
    lengths = None if mask is None else left_padded_lengths(mask, tokens)
    counts = _counts(next(iter(layers.values())), lengths, row_slots)
    where = _positions(cache.compact_layers[0], tokens, lengths, counts, positions, count)
    for index, compact in layers.items():
        _append(own[index], compact, tokens, lengths, counts, where.to(compact.keys.device), batch)
    if mask is not None:
        before = cache.columns.whole(cache.logical_length - tokens, batch)
        cache.columns.mask = torch.cat((before, mask), dim=1)


def _check_shapes(config, layers: Mapping[int, CompactKV], tokens: int) -> tuple[int, int]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    first = next(iter(layers.values())).keys.shape
    wanted = (first[0], config.num_key_value_heads, first[2], head_dim)
    for index, compact in layers.items():
        if compact.keys.shape != wanted or compact.values.shape[:3] != wanted[:3]:
            raise ValueError(
                f"layer {index} has keys {list(compact.keys.shape)} and values {list(compact.values.shape)}; the model "
                f"and the other layers need {list(wanted)} (one mask serves all layers, so all need as many slots)"
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
    # where the new tokens start: behind what the row stands for, less them if they have just been read
    read = layer.physical > layer.slots
    new = torch.full((len(counts),), tokens) if lengths is None else lengths
    seen = torch.full((len(counts),), layer.logical) if layer.lengths is None else layer.lengths
    starts = seen - new if read else seen
    spans = sorted({(int(s), int(n), c) for s, n, c in zip(starts, new, counts, strict=True)})
    rows = {
        span: even_positions(torch.arange(span[0], span[0] + span[1]), span[2])[0] if span[2] else torch.empty(0).long()
        for span in spans
    }
    if len(spans) == 1 and spans[0][2] == width:
        return rows[spans[0]][None]
    table = torch.full((len(counts), width), -1)
    for row, (start, n, count) in enumerate(zip(starts, new, counts, strict=True)):
        table[row, width - count :] = rows[int(start), int(n), count]
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
    seen = new if layer.lengths is None else layer.lengths + (0 if read else new)
    if layer.lengths is None and layer.logical:
        seen = torch.full((batch,), layer.logical) + (0 if read else new)
    layer.fill(packed, logical, seen, live)


def _nothing(compact: CompactKV) -> Packed:
    keys, values = (x.new_empty(1, x.shape[1], 0, x.shape[3]) for x in (compact.keys, compact.values))
    return Packed(keys, values, torch.empty(1, 0, dtype=torch.long, device=keys.device), None, 0)


def _behind(old: Packed, new: CompactKV, where: torch.Tensor, tokens: int, read: bool) -> Packed:
    """The old slots, then the new ones, which replace raw tokens if there are any."""
    if read and old.raw != tokens:
        raise ValueError(
            f"slots for {tokens} tokens cannot replace the {old.raw} raw tokens of the cache: append the slots of just "
            f"those tokens, or before any is read"
        )
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
