"""The full cache: the ceiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..types import CompactKV
from .base import LayerView, Method


@dataclass
class Full(Method):
    """Keeps every key and value. The budget is ignored; the copy leaves the reading as it was."""

    name: ClassVar[str] = "full"
    fixed_size: ClassVar[bool] = True

    def budgets(self, rows: list[int], slots: int | None, ratio: float | None) -> list[int]:
        """All tokens of each row."""
        return list(rows)

    def compact_view(self, view: LayerView) -> CompactKV:
        """The layer's keys and values, copied."""
        return CompactKV(view.keys.clone(), view.values.clone())
