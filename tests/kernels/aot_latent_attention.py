"""Calls that between them launch every configuration that latent attention has, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from still.kernels.latent_attention import latent_attention
from still.kernels.latent_attention_plan import unsupported


def attend(dtype, dim, latents, rotary, width, source=False, tokens=8192, heads=8):
    """One call and its backward pass; with `source` keys and values want gradients too."""
    empty = partial(torch.empty, device="meta")
    keys, values = (empty(1, heads, tokens, dim, dtype=dtype, requires_grad=source) for _ in range(2))
    query = empty(1, heads, latents, width, requires_grad=True)
    weight, bias = empty(width, 2 * dim, requires_grad=True), empty(width, requires_grad=True)
    turns = tuple(empty(1, 1, n, width // 2, dtype=torch.complex64) for n in (latents, tokens))
    strip = tuple(empty(1, tokens, rotary) for _ in range(2)) if rotary else None
    out = latent_attention(query, keys, values, weight, bias, turns, strip=strip, scale=float(width))
    out.sum().backward()


SCALAR = {"merge_kernel"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = ((64, 64, 128), (64, 16, 128), (80, 80, 160), (96, 96, 192), (128, 128, 256), (128, 32, 256))
CALLS: dict[str, Callable[[], object]] = {}
for (name, dtype), (dim, rotary, width) in product(DTYPES.items(), SHAPES):
    if unsupported(dim, width, 8 * dtype.itemsize):
        continue
    label = f"{name} d{dim} rotary {rotary}"
    CALLS[f"{label} few"] = partial(attend, dtype, dim, 64, rotary, width)
    CALLS[f"{label} many"] = partial(attend, dtype, dim, 1024, rotary, width)
    if rotary == dim:  # unrotated, and gradients for all: how the latents attend to each other
        CALLS[f"{label} among latents"] = partial(attend, dtype, dim, 1024, 0, width, True, 1024)
