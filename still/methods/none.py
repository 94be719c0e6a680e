"""No context: the floor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import DynamicCache

from ..types import Reading
from .base import Method
from .plain import PlainCache


@dataclass
class NoContext(Method):
    """Forgets everything: the model sees the question alone, from position 0. The budget is ignored.

    What it returns is an empty cache that is used like any other: `prompt` gives the question without the context.
    """

    name: ClassVar[str] = "none"
    fixed_size: ClassVar[bool] = True

    def compact(self, model, reading: Reading, slots: int | None = None, ratio: float | None = None) -> PlainCache:
        """A `PlainCache` of no tokens, for as many rows as were read."""
        return PlainCache(DynamicCache(config=model.config).layers, reading.input_ids[:, :0])
