"""Linear-attention layers of a `StillCache`: as transformers' own, except that gradients may flow through a forward."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer


class RecurrentLayer(LinearAttentionLayer):
    """A linear-attention layer whose new recurrent state replaces the old one instead of overwriting its memory.

    The forward that made the new state needs the old one for its backward pass.
    """

    @classmethod
    def of(cls, layer: LinearAttentionLayer) -> RecurrentLayer:
        """The state of `layer` as a layer of this kind; tensors are shared."""
        other = cls.__new__(cls)
        other.__dict__.update(vars(layer))
        return other

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        """Keep the new state `[batch, heads, key_dim, value_dim]` and return it."""
        if self.device is None:
            self.dtype, self.device = recurrent_states.dtype, recurrent_states.device
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states
