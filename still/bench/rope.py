"""Stripping RoPE against a copy of the same bytes: memory bounds it, so a copy is as good as it can get."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..kernels.rope import angles, strip_rope, turn_reference
from . import arithmetic
from .measure import Case

HEADS, DIM = 8, 128


def cases(device: torch.device, dtype: torch.dtype, tokens: tuple[int, ...]) -> Iterator[Case]:
    """One case for each length: Qwen3's eight KV heads of 128 dims, a batch of one."""
    for length in tokens:
        keys = torch.randn(1, HEADS, length, DIM, device=device).to(dtype)
        frequencies = 1e6 ** -(torch.arange(0, DIM, 2, device=device) / DIM)
        positions = torch.arange(length, device=device)[None]
        half = angles(positions, frequencies, 1.0)
        cos, sin = (torch.cat((x, x), dim=-1) for x in half)
        target = torch.empty_like(keys)

        def reference(keys=keys, half=half):
            return turn_reference(keys, *half, inverse=True, divide=True)

        def strip(keys=keys, **tables):
            return strip_rope(keys, **tables)

        def by_positions(keys=keys, positions=positions, frequencies=frequencies):
            return strip_rope(keys, positions=positions, frequencies=frequencies)

        providers = {
            "copy": lambda keys=keys, target=target: target.copy_(keys),
            "reference": reference,
        }
        if device.type == "cuda":
            providers["compiled"] = torch.compile(reference, dynamic=False)
            providers["triton tables"] = lambda strip=strip, cos=cos, sin=sin: strip(cos=cos, sin=sin)
            providers["triton"] = by_positions
        yield Case(
            "strip_rope", "forward", length,
            arithmetic.strip_rope(1, HEADS, length, DIM, keys.element_size()), providers=providers,
            config={"batch": 1, "kv_heads": HEADS, "head_dim": DIM},
            exact=lambda reference=reference, keys=keys, half=half: turn_reference(
                keys.double(), *(x.double() for x in half), inverse=True, divide=True
            ),
            ours="triton" if device.type == "cuda" else "reference",
        )  # fmt: skip
