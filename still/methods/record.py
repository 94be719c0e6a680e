"""What a compaction cost, measured."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..types import Reading
from .base import Method, row_lengths


@dataclass
class MethodRecord:
    """What one compaction was and cost; a row of the sweep holds it.

    Attributes:
        method: name; `options` its hyper-parameters.
        query_aware: whether it had seen the question.
        synthesis: compaction (True) or eviction (False).
        uses_beta: whether its slots carry a bias.
        tokens: real tokens of the longest row.
        slots: slots per KV head of the longest row.
        nbytes: bytes of the small cache, measured.
        full_nbytes: bytes of the full cache.
        seconds: wall time of the compaction alone.
        read_seconds: wall time of the forward over the context.
    """

    method: str
    options: dict[str, Any]
    query_aware: bool
    synthesis: bool
    uses_beta: bool
    tokens: int
    slots: int
    nbytes: int
    full_nbytes: int
    seconds: float
    read_seconds: float

    @property
    def ratio(self) -> float:
        """Tokens per slot; infinite where nothing is kept."""
        return self.tokens / self.slots if self.slots else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """All fields and the ratio, for JSON or a CSV row."""
        return {**asdict(self), "ratio": self.ratio}


def measure(
    method: Method, model, reading: Reading, slots: int | None = None, ratio: float | None = None
) -> tuple[Cache, MethodRecord]:
    """Run a method and say what it cost: the cache and its record."""
    started = time.perf_counter()
    cache = method.compact(model, reading, slots=slots, ratio=ratio)
    if reading.input_ids.is_cuda:
        torch.cuda.synchronize(reading.input_ids.device)
    record = MethodRecord(
        method=method.name,
        options=method.options(),
        query_aware=method.query_aware,
        synthesis=method.synthesis,
        uses_beta=method.uses_beta,
        tokens=max(row_lengths(reading)),
        slots=cache.slots,
        nbytes=cache.nbytes,
        full_nbytes=cache_nbytes(reading.cache),
        seconds=time.perf_counter() - started,
        read_seconds=reading.seconds,
    )
    return cache, record


def cache_nbytes(cache: Cache) -> int:
    """Bytes of every state that a cache stores, sliding and linear-attention layers included."""

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(size(item) for item in value.values())
        return sum(size(item) for item in value) if isinstance(value, list | tuple) else 0

    return sum(size(value) for layer in cache.layers for name, value in vars(layer).items() if not name.startswith("_"))
