"""STILL: a trained compactor makes the slots in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache

from ..compactor import StillCompactor
from ..types import CompactKV, Reading
from .base import LayerView, Method, row_lengths


@dataclass
class Still(Method):
    """The compactor of arXiv 2606.07878 as one method among the others.

    Attributes:
        compactor: trained, or fresh (then it keeps a strided subset of the tokens), bound to the model.
        label: what rows call the compactor, for instance its folder or training seed.
        chunks: read a context that is longer than the trained chunk again, chunk by chunk behind the slots so far (see
            `StillCompactor.prefill`); the seconds of such a compaction hold that reading.
    """

    compactor: StillCompactor | None = field(default=None, repr=False)
    label: str = ""
    chunks: bool = False

    name: ClassVar[str] = "still"
    synthesis: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.compactor is None:
            raise ValueError("the method 'still' needs compactor=StillCompactor.from_pretrained(..., model=model)")
        if self.split is None:
            self.split = self.compactor.split

    @property
    def uses_beta(self) -> bool:
        """Whether the compactor learned a bias."""
        return self.compactor.config.beta

    def compact(self, model, reading: Reading, slots: int | None = None, ratio: float | None = None) -> Cache:
        """In one pass, however long the context, or with `chunks` in several; always at the slots of other methods.

        But for shorter rows of a padded batch that is longer than a chunk: see `StillCompactor.prefill`.

        Warns where it goes outside the lengths and ratios that the compactor was trained on.
        """
        rows = row_lengths(reading)
        if self.chunks and max(rows) > self.compactor.config.chunk:
            compactor = self.compactor.with_split(self.split)
            return compactor.prefill(model, reading.input_ids, reading.attention_mask, slots, ratio)
        kept = self.budgets(rows, slots, ratio)
        self.compactor.check_trained(max(rows), max(rows) / max(kept) if ratio is None else ratio)
        return super().compact(model, reading, slots, ratio)

    @torch.no_grad()
    def compact_rows(self, model, reading, rows, budgets, most=None) -> dict[int, CompactKV]:
        """All layers at once, since one of them may look for all."""
        return self.compactor.with_split(self.split).compact_rows(reading.cache, rows, budgets)

    def even(self) -> Still:
        """This method, and its compactor, without a split."""
        return replace(self, split=None, compactor=self.compactor.with_split(None))

    def compact_view(self, view: LayerView) -> CompactKV:
        """What the compactor makes of the layer."""
        heads = range(view.keys.shape[1]) if view.heads is None else view.heads
        return self.compactor.compact_layer(
            view.layer, view.keys, view.values, view.positions, view.slots, heads=heads
        )

    def compact_layers(self, states, positions, slots, queries=None, rotary=None) -> dict[int, CompactKV]:
        """What the compactor makes of all layers, some at a time."""
        return self.compactor.compact_layers(states, positions, slots)

    def options(self) -> dict[str, Any]:
        """The label, and the steps and seed of the training."""
        config = self.compactor.config
        more = {} if self.split is None else {"split": self.split.source}
        more |= {"chunks": config.chunk} if self.chunks else {}
        return {"label": self.label, "steps": config.steps, "seed": config.seed, **more}
