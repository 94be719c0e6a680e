"""Contexts as chunks of a longer one: slots of others stand before each context's own.

A context that is read chunk by chunk ends as a row of slots of many chunks, and what a chunk's slots do where they are
not asked adds up. A compactor that only ever saw its own slots has no reason to keep them still. The other contexts
of a batch are compacted in the same step, so a crowd of them costs a rotation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..compactor import StillCompactor
from ..rope import rotate, unrotate
from ..types import CompactKV


def crowded(compactor: StillCompactor, layers: Mapping[int, CompactKV], rows: Sequence[int]) -> dict[int, CompactKV]:
    """The slots of a batch's other contexts before each context's own, as if they had been read one after the other.

    Rows follow one another in the order of the batch, and the first follows the last. Each stays where it is; those
    before it are rotated back to where they end as it begins.

    Args:
        compactor: it knows how the model rotates keys.
        layers: slots of every full-attention layer, see `StillCompactor.compact_rows`.
        rows: real tokens in each row of the batch.

    Returns:
        Wider records of the same rows: as many contexts in each as leave no head more slots than the shortest row has
        tokens. The same records where that is one, or where rows have different numbers of slots.
    """
    widest = max(max(own.counts or (own.keys.shape[2],)) for own in layers.values())
    contexts = min(len(rows), min(rows) // widest)
    if contexts == 1 or any(set(own.row_counts or [own.counts]) != {own.counts} for own in layers.values()):
        return dict(layers)
    device = next(iter(layers.values())).keys.device
    lengths = torch.tensor(rows, device=device)
    back = torch.stack([lengths.roll(place) for place in range(1, contexts)]).cumsum(0)
    wide = {}
    for layer, own in layers.items():
        nearest_first = [_moved(compactor, layer, own, place, shift) for place, shift in enumerate(back, start=1)]
        wide[layer] = _one_behind_the_other([*reversed(nearest_first), own])
    return wide


def _moved(compactor: StillCompactor, layer: int, own: CompactKV, place: int, shift: torch.Tensor) -> CompactKV:
    """The slots of the row `place` rows before each, rotated `shift` `[batch]` positions back."""
    tables = compactor.rotary.cos_sin(layer, shift[:, None])
    begin = compactor.rotary.cos_sin(layer, torch.zeros_like(shift)[:, None])  # an attention factor is put back
    keys = own.keys.roll(place, 0)
    packed = keys.ndim == 3
    turned = rotate(unrotate(keys[:, None] if packed else keys, *tables), *begin)
    where = own.positions
    if where is not None:
        where = where.expand(len(shift), -1).roll(place, 0) - shift[:, None]
    beta = None if own.beta is None else own.beta.roll(place, 0)
    return own._replace(keys=turned[:, 0] if packed else turned, values=own.values.roll(place, 0), beta=beta,
                        positions=where)  # fmt: skip


def _one_behind_the_other(parts: Sequence[CompactKV]) -> CompactKV:
    """One record from several of equal counts: in every head, the slots of each after those of the one before."""
    counts = parts[0].counts

    def joined(name: str) -> torch.Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is None:
            return None
        if counts is None:
            return torch.cat(tensors, dim=1 if name == "positions" else 2)
        tensors = [x.expand(len(parts[0].keys), *x.shape[1:]) for x in tensors]
        return torch.cat([x for head in zip(*(x.split(counts, dim=1) for x in tensors), strict=True) for x in head], 1)

    tables = {name: joined(name) for name in ("keys", "values", "beta", "positions")}
    return CompactKV(**tables, counts=None if counts is None else tuple(len(parts) * count for count in counts))
