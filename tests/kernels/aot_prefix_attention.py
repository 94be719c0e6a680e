"""Calls that between them launch every configuration that prefix and tail attention have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from still.kernels.prefix_attention import WIDEST, prefix_attention, tail_attention


def attend(dtype, dim, queries, batch=1, ragged=False, bias=False, tail=None, group=4, heads=8, slots=16384):
    make = partial(torch.empty, dtype=dtype, device="meta")
    query = make(batch, heads * group, queries, dim)
    packed = (batch, heads * slots, dim) if ragged else (batch, heads, slots, dim)
    keys, values = make(*packed), make(*packed)
    if tail is not None:
        mask = None if tail == "causal" else torch.empty(batch, 1, queries, slots, device="meta", dtype=tail)
        return tail_attention(query, keys, values, mask)
    offsets = tuple(range(0, heads * slots + 1, slots)) if ragged else None
    return prefix_attention(query, keys, values, make(*packed[:-1]) if bias else None, None, offsets)


SCALAR = {"merge_parts"}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
CALLS: dict[str, Callable[[], object]] = {}
for (name, dtype), dim in product({**HALF, "fp32": torch.float32}.items(), (32, 64, 80, 128, 256)):
    if name == "fp32" and dim > WIDEST[dtype]:
        continue
    for kind, queries, batch in (("decode", 1, 1), ("decode whole heads", 1, 64), ("question", 8, 1), ("read", 512, 1)):
        for ragged, bias in ((False, False), (True, True)):
            label = f"{kind} {name} d{dim}{' ragged with beta' if ragged else ''}"
            CALLS[label] = partial(attend, dtype, dim, queries, batch, ragged, bias)
for dim, queries, tail in product((64, 128, 256), (1, 8, 512), ("causal", torch.bool, torch.float32)):
    CALLS[f"tail bf16 d{dim}, {queries} queries, {tail}"] = partial(attend, torch.bfloat16, dim, queries, tail=tail)
