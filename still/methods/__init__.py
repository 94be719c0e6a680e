"""Every way to make a small cache, behind one protocol.

>>> from still import methods
>>> methods.get("snapkv", window=16)
SnapKV(window=16, kernel_size=5)
"""

from __future__ import annotations

from dataclasses import fields

from .attention_matching import AttentionMatching
from .base import Eviction, LayerView, Method
from .cartridge import Cartridge
from .expected_attention import ExpectedAttention
from .full import Full
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import Knorm
from .none import NoContext
from .plain import PlainCache
from .quantised import Int4, Int8, QuantisedLayer
from .random import Random
from .record import MethodRecord, cache_nbytes, measure
from .snapkv import SnapKV
from .still import Still
from .streaming_llm import StreamingLLM
from .truncation import Truncation

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Full, NoContext, Truncation, Random, StreamingLLM, Knorm, KeyDiff, SnapKV, H2O, ExpectedAttention,
        AttentionMatching, Cartridge, Still, Int8, Int4,
    )
}  # fmt: skip
NAMES = tuple(METHODS)
SPLIT_NAMES = tuple(name for name, method in METHODS.items() if method.takes_split and not method.fixed_size)
"""Methods whose heads may have unequal numbers of slots."""


def get(name: str, **hyper) -> Method:
    """A method by name, with its hyper-parameters.

    Raises:
        ValueError: there is no such method, it has no such hyper-parameter, or one that is a number has another value.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; choose one of {', '.join(NAMES)}")
    known = [item.name for item in fields(METHODS[name]) if item.name != "split"]
    if hyper.get("split") is not None and name not in SPLIT_NAMES:
        raise ValueError(f"{name} keeps as much of every head; a split serves {', '.join(SPLIT_NAMES)}")
    if unknown := sorted(set(hyper) - set(known) - {"split"}):
        raise ValueError(f"{name} has no hyper-parameter {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    for item in fields(METHODS[name]):
        if item.name in hyper and type(item.default) in (int, float):
            value, whole = hyper[item.name], type(item.default) is int
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value < 0:
                kind = "whole number" if whole else "number"
                raise ValueError(f"{item.name} of {name} is {value!r}; it must be a {kind}, 0 or more")
    return METHODS[name](**hyper)


__all__ = [
    "H2O", "METHODS", "NAMES", "SPLIT_NAMES", "AttentionMatching", "Cartridge", "Eviction", "ExpectedAttention", "Full",
    "Int4", "Int8", "KeyDiff", "Knorm", "LayerView", "Method", "MethodRecord", "NoContext", "PlainCache",
    "QuantisedLayer", "Random", "SnapKV", "Still", "StreamingLLM", "Truncation", "cache_nbytes", "get", "measure",
]  # fmt: skip
