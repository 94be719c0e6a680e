"""STILL: compact the KV cache of a language model in one forward pass.

Names are loaded at first use (PEP 562), so that `import still.eval` and `still --help` load no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "CompactKV": "types",
    "Reading": "types",
    "Split": "budgets",
    "StillCache": "cache",
    "StillCompactor": "compactor",
    "StillConfig": "config",
    "read": "reading",
    "resolve_slots": "budgets",
    "slots_for": "budgets",
}

__all__ = [
    "CompactKV",
    "Reading",
    "Split",
    "StillCache",
    "StillCompactor",
    "StillConfig",
    "__version__",
    "read",
    "resolve_slots",
    "slots_for",
]

if TYPE_CHECKING:
    from .budgets import Split, resolve_slots, slots_for
    from .cache import StillCache
    from .compactor import StillCompactor
    from .config import StillConfig
    from .reading import read
    from .types import CompactKV, Reading

    __version__: str


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("still-kv")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
