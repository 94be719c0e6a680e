"""Attention over compact slots: decoding, where memory bounds it, and a question of 512 tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.prefix_attention import attend_reference, prefix_attention
from . import arithmetic
from .measure import Case, runs

HEADS, GROUP, DIM, SPREAD = 8, 4, 128, 60
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def cases(device: torch.device, dtype: torch.dtype, tokens: tuple[int, ...]) -> Iterator[Case]:
    """An eighth of each context (and 128 on a GPU), uniform and with a spread of 60 to 1 over the heads."""
    sizes = {max(length // 8, 16) for length in tokens} | ({128} if device.type == "cuda" else set())
    for slots in sorted(sizes):
        for mode, batch, queries in (("decode", 1, 1), ("decode", 32, 1), ("question", 1, 512)):
            if device.type == "cpu" and batch * queries > 512:
                continue
            yield uniform(device, dtype, slots, mode, batch, queries)
            yield ragged(device, dtype, slots, mode, batch, queries)


def uniform(device, dtype, slots, mode, batch, queries) -> Case:
    """Equal slots without bias, which any flash attention computes too."""
    query = torch.randn(batch, HEADS * GROUP, queries, DIM, device=device).to(dtype)
    keys, values = (torch.randn(batch, HEADS, slots, DIM, device=device).to(dtype) for _ in range(2))

    def eager():
        repeated = (x.repeat_interleave(GROUP, dim=1) for x in (keys, values))
        k, v = repeated
        return (query @ k.mT * DIM**-0.5).softmax(-1) @ v

    def sdpa(backend=None):
        if backend is None:
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    providers: dict[str, Any] = {"reference": lambda: attend(query, keys, values), "eager": eager, "sdpa": sdpa}
    if device.type == "cuda":
        providers["triton"] = lambda: prefix_attention(query, keys, values)[0]
        for name, backend in BACKENDS.items():
            if runs(lambda backend=backend: sdpa(backend)):
                providers[name] = lambda backend=backend: sdpa(backend)
        if importlib.util.find_spec("flash_attn"):
            providers["flash-attn"] = flash(query, keys, values)
    return case(query, keys, values, None, None, mode, {"spread": 1}, providers)


def ragged(device, dtype, slots, mode, batch, queries) -> Case:
    """Half of the heads with a share of 1, the longest with 60, a bias on each slot."""
    shares = [1] * (HEADS // 2) + [SPREAD // 8] * (HEADS - HEADS // 2 - 1) + [SPREAD]
    counts = [max(slots * HEADS * share // sum(shares), 1) for share in shares]
    offsets = tuple(accumulate(counts, initial=0))
    query = torch.randn(batch, HEADS * GROUP, queries, DIM, device=device).to(dtype)
    keys, values = (torch.randn(batch, offsets[-1], DIM, device=device).to(dtype) for _ in range(2))
    bias = torch.randn(batch, offsets[-1], device=device).to(dtype)
    longest = max(counts)
    padded_keys, padded_values = (keys.new_zeros(batch, HEADS, longest, DIM) for _ in range(2))
    mask = torch.full((batch, HEADS, 1, longest), -torch.inf, device=device, dtype=dtype)
    for head, count in enumerate(counts):
        own = slice(offsets[head], offsets[head + 1])
        padded_keys[:, head, :count], padded_values[:, head, :count] = keys[:, own], values[:, own]
        mask[:, head, 0, :count] = bias[:, own]
    mask = mask.repeat_interleave(GROUP, dim=1).expand(-1, -1, queries, -1)

    def padded():
        return F.scaled_dot_product_attention(query, padded_keys, padded_values, mask, enable_gqa=True)

    providers: dict[str, Any] = {"reference": lambda: attend(query, keys, values, bias, offsets), "sdpa padded": padded}
    if device.type == "cuda":
        providers["triton"] = lambda: prefix_attention(query, keys, values, bias, None, offsets)[0]
    return case(query, keys, values, bias, offsets, mode, {"spread": SPREAD, "beta": True}, providers)


def case(query, keys, values, bias, offsets, mode, config, providers) -> Case:
    """The bytes that exist are read once, whatever the query heads; each query head does its own arithmetic."""
    batch, query_heads, queries, dim = query.shape
    slots = keys.shape[1] if offsets else keys.shape[1] * keys.shape[2]
    size, biased = query.element_size(), bias is not None
    return Case(
        "prefix_attention", mode, slots // HEADS,
        arithmetic.prefix_attention(batch, query_heads, queries, slots, HEADS, dim, size, biased),
        providers=providers,
        config={"batch": batch, "queries": queries, "query_heads": query_heads, "kv_heads": HEADS, "head_dim": dim,
                **config},
        exact=lambda: attend(query.double(), keys.double(), values.double(),
                             None if bias is None else bias.double(), offsets),
        ours="triton" if query.device.type == "cuda" else "reference",
    )  # fmt: skip


def attend(query, keys, values, bias=None, offsets=None) -> torch.Tensor:
    """The reference's output."""
    return attend_reference(query, keys, values, bias, DIM**-0.5, offsets, False, None)[0]


def flash(query, keys, values):
    """flash-attn's decoding kernel, which splits over keys as ours does."""
    from flash_attn import flash_attn_with_kvcache

    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, keys, values))
    return lambda: flash_attn_with_kvcache(q, k, v).transpose(1, 2)
