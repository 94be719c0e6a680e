"""Layers of a cache that are not compacted: sliding windows and recurrent states, copied whole."""

from __future__ import annotations

import copy

import torch
from transformers.cache_utils import LinearAttentionLayer

from .recurrent_layer import RecurrentLayer


def copy_state(layer):
    """An independent copy of a layer; it shares no storage."""

    def clone(value):
        if isinstance(value, dict):
            return {key: clone(item) for key, item in value.items()}
        return value.clone() if isinstance(value, torch.Tensor) else value

    other = differentiable(copy.copy(layer))
    other.__dict__.update({name: clone(value) for name, value in vars(layer).items()})
    return other


def differentiable(layer):
    """The layer, a linear-attention one as a kind that gradients may flow through."""
    return RecurrentLayer.of(layer) if type(layer) is LinearAttentionLayer else layer
