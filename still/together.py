"""Weights of several layers as one tensor `[layers, ...]`, without a copy.

What a compaction does to latents is small: layer after layer, calling the operations takes longer than they do. So
layers go through them together. Modules, names, checkpoints and optimizers stay one per layer; the parameters of one
name merely lie next to each other in memory, as cuDNN has those of an RNN (`nn.RNN.flatten_parameters`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn


@torch.no_grad()
def side_by_side(parts: Sequence[nn.Module]) -> None:
    """Lay the parameters of one name of like modules next to each other, where they do not lie so already.

    Parameters that are no plain tensors of one shape, dtype and device (shards, for one) stay as they are.
    """
    for same in zip(*(part.parameters() for part in parts), strict=True):
        plain = all(type(each.data) is torch.Tensor for each in same)
        if plain and len({(x.shape, x.dtype, x.device) for x in same}) == 1 and _neighbours(same) is None:
            for parameter, place in zip(same, torch.stack(same), strict=True):
                parameter.data = place


def _neighbours(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """A view of tensors that lie next to each other in one storage, or None; no gradient flows through it."""
    first = tensors[0]
    size, start, storage = first.numel(), first.storage_offset(), first.untyped_storage().data_ptr()
    for place, each in enumerate(tensors):
        if each.storage_offset() != start + place * size or each.untyped_storage().data_ptr() != storage:
            return None
        if not each.is_contiguous() or each.shape != first.shape:
            return None
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))


def differentiated(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether a gradient is wanted that flows through what is made of one of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of each layer as one, `[layers, ...]`: a view where no gradient is wanted and they are neighbours."""
    if len(tensors) == 1:
        return tensors[0][None]
    whole = None if differentiated(tensors) else _neighbours(tensors)
    return torch.stack(tuple(tensors)) if whole is None else whole


class Together:
    """Modules of one kind as if they were one: `.name` is their submodules together, or their tensors `stacked`.

    Anything else (a number, None) is the first one's, as they are alike. What was found once is kept; a view of weights
    as long as they lie where they lay.
    """

    def __init__(self, parts: Sequence[nn.Module]):
        self.parts = parts
        self.views: dict[str, tuple[list[int], torch.Tensor]] = {}

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        first = getattr(self.parts[0], name)
        if isinstance(first, torch.Tensor):
            return self._tensor(name)
        if isinstance(first, nn.ModuleList | nn.Sequential):
            first = [Together(part) for part in zip(*(getattr(part, name) for part in self.parts), strict=True)]
        elif isinstance(first, nn.Module):
            first = Together([getattr(part, name) for part in self.parts])
        setattr(self, name, first)
        return first

    def _tensor(self, name: str) -> torch.Tensor:
        tensors = [getattr(part, name) for part in self.parts]
        if differentiated(tensors):
            return stacked(tensors)
        places = [x.data_ptr() for x in tensors]
        if name not in self.views or self.views[name][0] != places:
            whole = _neighbours(tensors)
            if whole is None:
                return stacked(tensors)
            self.views[name] = places, whole  # it keeps their memory: no other tensor can come to lie there
        return self.views[name][1]


def linear(maps: Together, x: torch.Tensor) -> torch.Tensor:
    """Each layer's linear map, `maps` together, of its own `x` `[layers, ..., width]`."""
    weight, bias = maps.weight, maps.bias
    if len(weight) == 1:
        return F.linear(x, weight[0], None if bias is None else bias[0])
    rows, weight = x.flatten(1, -2), weight.mT
    out = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias[:, None], rows, weight)
    return out.unflatten(1, x.shape[1:-1])
