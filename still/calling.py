"""How a model's forward is given a cache: transformers 5.24 renamed the argument, and will drop the old name."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any


def passing(model, cache: Any) -> dict[str, Any]:
    """A cache as the keyword argument that a forward of `model` takes it by: `cache`, or `past_key_values`.

    Args:
        model: a causal language model, or its decoder.
        cache: any cache, or None.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return {_name(type(decoder)): cache}


@lru_cache(maxsize=64)
def _name(kind: type) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"
