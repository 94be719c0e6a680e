"""Put ready-made ragged slots into a cache, and what uniform ones share with them: where new slots stand."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .cache_compaction import Packed
from .cache_layer import CompactLayer
from .cache_ragged import RaggedSlots, check_record, even_positions
from .types import CompactKV


def append_ragged(
    own: Mapping[int, CompactLayer],
    records: Mapping[int, CompactKV],
    shape: tuple[int, int],
    tokens: int,
    lengths: torch.Tensor | None,
    floor: int,
) -> None:
    """Append ragged slots to every full-attention layer, in place of raw tokens if there are any.

    Args:
        own: the layers.
        records: a ragged record for each.
        shape: KV heads and head dimension of the model.
        tokens: columns that the slots stand for.
        lengths: real tokens of each row among them `[batch]`, or None where no row is padded.
        floor: fewest slots of a head.

    Raises:
        ValueError: a record does not fit; it names the layer, the head and the number.
    """
    batch = len(next(iter(records.values())).keys)
    for index, record in records.items():
        check_record(index, record, *shape, tokens, floor)
        _check_rows(index, record, own[index], batch, lengths)
    for index, record in records.items():
        _append(own[index], record, tokens, lengths, batch)


def new_spans(layer: CompactLayer, tokens: int, lengths: torch.Tensor | None, batch: int) -> list[tuple[int, int]]:
    """First logical position of each row's new tokens and the one after the last.

    They start behind what the row stands for, less them if they have just been read.
    """
    new = torch.full((batch,), tokens) if lengths is None else lengths
    seen = torch.full((batch,), layer.logical) if layer.lengths is None else layer.lengths
    starts = seen - new if layer.physical > layer.slots else seen
    return [(int(start), int(start + n)) for start, n in zip(starts, new, strict=True)]


def lengths_after(layer: CompactLayer, tokens: int, lengths: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """Real tokens of each row once the new ones are counted, or None where no row is padded."""
    if lengths is None and layer.lengths is None:
        return None
    return torch.tensor([end for _, end in new_spans(layer, tokens, lengths, batch)])


def check_replaced(raw: int, tokens: int) -> None:
    """Refuse slots that would replace other tokens than those that they stand for."""
    if raw != tokens:
        raise ValueError(
            f"slots for {tokens} tokens cannot replace the {raw} raw tokens of the cache: append the slots of just "
            f"those tokens, or before any is read"
        )


def _check_rows(index: int, record: CompactKV, layer: CompactLayer, batch: int, lengths: torch.Tensor | None) -> None:
    if len(record.keys) != batch:
        raise ValueError(f"layer {index} has {len(record.keys)} rows and the first layer {batch}")
    if layer.is_initialized and layer.batch != batch:
        raise ValueError(f"the cache has {layer.batch} rows and the new slots {batch}")
    if lengths is None:
        return
    rows = [record.counts] * batch if record.row_counts is None else record.row_counts
    for row, (counts, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
        for head, count in enumerate(counts):
            if count > length:
                raise ValueError(
                    f"layer {index}, row {row}, KV head {head} has {count} slots for {length} tokens: a compact cache "
                    f"has no more slots than tokens; give CompactKV(row_counts=...) where rows have fewer"
                )


def _append(layer: CompactLayer, record: CompactKV, tokens: int, lengths: torch.Tensor | None, batch: int) -> None:
    spans = new_spans(layer, tokens, lengths, batch)
    known: dict[tuple, torch.Tensor] = {}

    def spread(row: int, count: int) -> torch.Tensor:
        if (spans[row], count) not in known:
            known[spans[row], count] = even_positions(torch.arange(*spans[row]), count)[0]
        return known[spans[row], count]

    slots = RaggedSlots.of(record, spread)
    read = layer.physical > layer.slots
    if read:
        for row, (start, end) in zip(layer.rows(), spans, strict=True):
            check_replaced(row.raw, end - start)
    if layer.ragged is not None:
        slots = layer.ragged.then(slots)
    elif layer.slots:
        slots = RaggedSlots.join([row.as_ragged().ragged for row in layer.rows()]).then(slots)
    logical = layer.logical if read else layer.logical + tokens
    heads = len(record.counts)
    none = [x.new_empty(batch, heads, 0, x.shape[-1]) for x in (record.keys, record.values)]
    where = torch.empty(1, 0, dtype=torch.long, device=record.keys.device)
    lengths = lengths_after(layer, tokens, lengths, batch)
    layer.fill(Packed(*none, where, None, logical, slots), logical, lengths, None)
