"""What several rows begin with, computed once for all of them.

All windows of a matter begin with the same system prompt and assignment, and all rollouts of a group do; often these
read the same document next. A causal model makes the same states of them in every row, so one forward over the opening
serves all rows of a micro-batch, which go on behind it; gradients of all rows meet in it. Shared prompts are known from
serving (Hydragen, arXiv 2402.05099) and from GRPO with one prompt a group (Prefix Grouper, arXiv 2506.05433).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ...calling import passing
from ...rope import layer_kinds

LEAST = 32
"""Tokens that are worth a forward of their own."""


def in_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two rows begin with alike, all but the last of either: something must go on behind them."""
    most = min(len(first), len(second)) - 1
    return next((place for place in range(most) if first[place] != second[place]), most)


def shared(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens are computed once: those that all rows begin with; none of a few, or of one row alone."""
    if len(rows) < 2:
        return 0
    common = in_common(min(rows), max(rows))  # what these two begin with, all between them do
    return common if common >= LEAST else 0


def can_share(model) -> bool:
    """Whether keys and values are all that a layer remembers of an opening."""
    return set(layer_kinds(model.config)) == {"full_attention"}


def read_opening(model, ids: torch.Tensor, rows: int) -> tuple[torch.Tensor, Cache]:
    """Last hidden states of an opening `[tokens, width]`, and a cache for one forward over what follows in each row.

    Args:
        model: the policy.
        ids: of the opening, `[1, tokens]`.
        rows: that go on behind it.
    """
    layers = [_Opening() for _ in layer_kinds(model.config)]
    read = model.get_decoder()(input_ids=ids, **passing(model, Cache(layers=layers)), use_cache=True)
    return read.last_hidden_state[0], Cache(layers=[_Behind(layer, rows) for layer in layers])


class _Opening(DynamicLayer):
    """Notes the first forward's states, and stores nothing: a checkpoint's replay sees the same."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """What the forward attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.noted = key_states, value_states
        return key_states, value_states


class _Behind(DynamicLayer):
    """Shows the opening to the forward of several rows, and stores nothing."""

    def __init__(self, opening: _Opening, rows: int):
        super().__init__()
        keys, values = opening.noted
        self.lazy_initialization(keys, values)
        self.keys, self.values = (x.expand(rows, -1, -1, -1) for x in (keys, values))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """What the forward attends to."""
        return torch.cat((self.keys, key_states), dim=2), torch.cat((self.values, value_states), dim=2)
