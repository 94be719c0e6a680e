"""Contexts as chunks of a longer one: slots of others stand before each context's own, and after them.

A context that is read chunk by chunk ends as a row of slots of many chunks, and what a chunk's slots do where they are
not asked adds up; an early chunk is asked from far away, across all later ones. A compactor that only ever saw its own
slots, right before the question, has no reason to keep them still, or to make them heard from there. The other contexts
of a batch are compacted in the same step, so a crowd of them costs a rotation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..compactor import StillCompactor
from ..types import CompactKV


def crowded(compactor: StillCompactor, layers: Mapping[int, CompactKV], rows: Sequence[int]) -> dict[int, CompactKV]:
    """The slots of a batch's contexts one behind the other, as chunks of a context that ends where each row's ends.

    Contexts follow one another in the order of the batch, the first after the last. Row i has i modulo their number
    before its own and the others after it, so that each is asked from another distance. Questions stay where they
    are: slots are rotated back to where their context would have to stand.

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
    lengths, row = torch.tensor(rows, device=device), torch.arange(len(rows), device=device)
    places = torch.arange(contexts, device=device)[:, None]
    order = (row - row % contexts + places) % len(rows)  # [contexts, batch]: whose slots stand at each place
    back = lengths[order].flip(0).cumsum(0).flip(0) - lengths  # from where a context was read to where it stands here
    return {
        layer: _one_behind_the_other([_moved(compactor, layer, own, *at) for at in zip(order, back, strict=True)])
        for layer, own in layers.items()
    }


def _moved(compactor: StillCompactor, layer: int, own: CompactKV, order: torch.Tensor, back: torch.Tensor) -> CompactKV:
    """The slots of the rows `order` `[batch]`, rotated `back` `[batch]` positions."""
    keys = own.keys[order]
    packed = keys.ndim == 3
    begin = torch.zeros_like(back)
    turned = compactor.moved(layer, keys[:, None] if packed else keys, back[:, None], begin[:, None])
    where = own.positions
    if where is not None:
        where = where.expand(len(back), -1)[order] - back[:, None]
    beta = None if own.beta is None else own.beta.expand(len(back), *own.beta.shape[1:])[order]
    return own._replace(keys=turned[:, 0] if packed else turned, values=own.values[order], beta=beta, positions=where)


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
