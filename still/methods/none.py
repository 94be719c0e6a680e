"""No context: the floor."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import DynamicCache

from ..types import Reading
from .base import Method
from .record import cache_nbytes


class EmptyCache(DynamicCache):
    """A cache that holds nothing, used as a `StillCache` is: `prompt` gives the question alone, at position 0.

    Attributes:
        rows: rows of the batch that was forgotten.
    """

    slots = logical_length = physical_length = 0

    def __init__(self, config, rows: int = 1):
        super().__init__(config=config)
        self.rows = rows

    def prompt(self, question_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Input ids and attention mask of the question, for `generate(**..., past_key_values=cache)`."""
        ids = question_ids.reshape(-1, question_ids.shape[-1]).expand(self.rows, -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def clone(self) -> EmptyCache:
        """An independent copy, so that one cache answers many questions."""
        return copy.deepcopy(self)

    @property
    def nbytes(self) -> int:
        """Bytes stored: none, until something is read into it."""
        return cache_nbytes(self)


@dataclass
class NoContext(Method):
    """Forgets everything: the model sees the question alone. The budget is ignored."""

    name: ClassVar[str] = "none"
    fixed_size: ClassVar[bool] = True

    def compact(self, model, reading: Reading, slots: int | None = None, ratio: float | None = None) -> EmptyCache:
        """An `EmptyCache` for as many rows as were read."""
        return EmptyCache(model.config, reading.input_ids.shape[0])
