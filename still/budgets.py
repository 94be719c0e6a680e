"""How many slots a context may keep."""

from __future__ import annotations


def slots_for(tokens: int, ratio: float) -> int:
    """Slots that `tokens` tokens get at a compression ratio of `ratio`: never over the budget, at least one.

    Raises:
        ValueError: the context is empty, or the ratio is below 1.
    """
    if tokens < 1:
        raise ValueError(f"the context has {tokens} tokens; there is nothing to compact")
    if not ratio >= 1:
        raise ValueError(f"ratio is {ratio}; it must be 1 or more (tokens per slot)")
    return max(1, int(tokens / ratio))


def resolve_slots(tokens: int, slots: int | None = None, ratio: float | None = None) -> int:
    """Slots for `tokens` tokens, from exactly one of `slots` and `ratio`.

    Raises:
        ValueError: both or neither are given, or `slots` is not between 1 and `tokens`.
    """
    if (slots is None) == (ratio is None):
        raise ValueError(f"give exactly one of slots (got {slots}) and ratio (got {ratio})")
    if ratio is not None:
        return slots_for(tokens, ratio)
    if not 1 <= slots <= tokens:
        raise ValueError(f"slots is {slots}; it must lie between 1 and the context's {tokens} tokens")
    return slots
