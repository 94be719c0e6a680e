"""Layers of a cache that are not compacted: sliding windows and recurrent states, copied whole."""

from __future__ import annotations

import copy

import torch
from transformers import cache_utils
from transformers.cache_utils import LinearAttentionLayer

from .cache_layer import owned
from .recurrent_layer import RecurrentLayer


def copy_state(layer):
    """An independent copy of a layer; it shares no storage."""

    def clone(value):
        if isinstance(value, dict):
            return {key: clone(item) for key, item in value.items()}
        return value.clone() if isinstance(value, torch.Tensor) else value

    other = as_ours(copy.copy(layer))
    other.__dict__.update({name: clone(value) for name, value in vars(layer).items()})
    return other


def as_ours(layer):
    """The layer, as a kind that gradients may flow through (linear attention) or that hoards nothing (windows)."""
    if type(layer) is cache_utils.DynamicSlidingWindowLayer:
        other = DynamicSlidingWindowLayer.__new__(DynamicSlidingWindowLayer)
        other.__dict__.update(vars(layer))
        return other
    return RecurrentLayer.of(layer) if type(layer) is LinearAttentionLayer else layer


class DynamicSlidingWindowLayer(cache_utils.DynamicSlidingWindowLayer):
    """A sliding-window layer that lets go of what has left the window; files know it by the name of transformers' own.

    That one keeps a view of all that its last forward saw: of a long context until the next token, in bytes all of it.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens, and return what this forward attends to."""
        seen = super().update(key_states, value_states, *args, **kwargs)
        if key_states.shape[2] > 1:  # one token leaves one column behind, not worth a copy of the window
            self.keys, self.values = owned(self.keys), owned(self.values)
        return seen
