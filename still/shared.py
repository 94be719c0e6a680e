"""What the layers of one compaction share: tables of its tokens and slots, phases of all heads, and memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .perceiver import Room
from .placement import phases
from .rope import Rotary, Tables, Turning


class Shared:
    """Each is worked out when it is first asked for. Full-attention layers of a model rotate alike.

    Args:
        layers: a `LayerPerceiver` for each full-attention layer, by layer index.
        rotary: how the model rotates; None of a compactor that is not bound to one.
    """

    def __init__(self, layers: nn.ModuleDict, rotary: Rotary | None):
        self._layers, self._rotary = layers, rotary
        self._turnings: dict[tuple, Turning] = {}
        self._own: dict[tuple, torch.Tensor] = {}
        self._tables: dict[tuple, Tables] = {}
        self._phases: dict[str, torch.Tensor] = {}
        self.room = Room()

    def begin(self, tokens: int, turning: Turning, own: torch.Tensor) -> None:
        """Take tables that are known of the first `tokens` tokens of a context; see `turning` and `own`."""
        device = own.device
        self._turnings[tokens, device] = turning.first(tokens)
        self._own[1, tokens, device] = own[..., :tokens, :]

    def turning(self, layer: int, positions: torch.Tensor) -> Turning:
        """How the model rotates tokens at positions `[tokens]` or `[rows, tokens]`.

        Raises:
            RuntimeError: the compactor is not bound to a model.
        """
        if self._rotary is None:
            raise RuntimeError("the compactor is not bound to a model: call compactor.bind(model) first")
        span = (positions.shape[-1], positions.device)
        if span not in self._turnings:
            self._turnings[span] = Turning(*self._rotary.cos_sin(layer, positions))
        return self._turnings[span]

    def own(self, layer: int, positions: torch.Tensor) -> torch.Tensor:
        """The compactor's own tables of tokens at positions `[rows, tokens]`, however many slots are made of them."""
        span = (*positions.shape, positions.device)
        if span not in self._own:
            self._own[span] = self._layers[str(layer)].turns(positions, positions[:, :1])
        return self._own[span]

    def tables(self, layer: int, positions: torch.Tensor, slots: int) -> Tables:
        """All tables of tokens at positions `[tokens]` or `[rows, tokens]` and of their slots."""
        positions = positions[None] if positions.ndim == 1 else positions
        span = (*positions.shape, positions.device, slots)
        if span not in self._tables:
            part = self._layers[str(layer)]
            where = part.latent_positions(positions, slots)
            turns = None if part.placement is not None else part.turns(where, positions[:, :1])
            self._tables[span] = Tables(
                tokens=self.turning(layer, positions), slots=self._rotary.cos_sin(layer, where),
                turns=(turns, self.own(layer, positions)), where=where,
            )  # fmt: skip
        return self._tables[span]

    def phase(self, layer: int, heads: Sequence[int] | None = None) -> torch.Tensor | None:
        """Where the numbers of some heads begin by which tokens are shared out; None where latents stand evenly."""
        if self._layers[str(layer)].placement is None:
            return None
        if not self._phases:
            every = phases([part.placement.mass for part in self._layers.values()])
            self._phases = dict(zip(self._layers, every, strict=True))
        own = self._phases[str(layer)]
        return own if heads is None else own[list(heads)]
