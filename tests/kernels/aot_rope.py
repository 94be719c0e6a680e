"""Calls that between them launch every configuration that stripping and restoring have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from still.kernels.rope import restore_rope, strip_rope


def turn(function, dtype, dim, rotary, positions, inplace):
    empty = partial(torch.empty, device="meta")
    keys = empty(1, 8, 8192, dim, dtype=dtype)
    if positions:
        tables = {"positions": empty(1, 8192, dtype=torch.int64), "frequencies": empty(rotary // 2)}
    else:
        tables = {"cos": empty(1, 8192, rotary), "sin": empty(1, 8192, rotary)}
    function(keys, **tables, out=keys if inplace else None)


SCALAR = {"turn"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = ((64, 64), (80, 80), (96, 96), (128, 128), (128, 32), (256, 256), (256, 64))
CALLS: dict[str, Callable[[], object]] = {}
for (name, dtype), (dim, rotary), positions in product(DTYPES.items(), SHAPES, (False, True)):
    for function, inplace in ((strip_rope, False), (strip_rope, True), (restore_rope, False)):
        label = f"{function.__name__} {name} d{dim} rotary {rotary} {'positions' if positions else 'tables'}"
        CALLS[label + " in place" * inplace] = partial(turn, function, dtype, dim, rotary, positions, inplace)
