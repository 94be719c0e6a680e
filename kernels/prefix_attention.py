"""Attention over a compact prefix with a bias per slot, merged with attention over a dense tail.

Softmax attention over two disjoint sets of keys is the average of the two outputs, weighted by the exponentials of
their log-sum-exps; so each part may have a kernel of its own. `attend_reference` is the ground truth of both parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from . import dispatch

WIDEST = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
"""The largest head dim that the kernel takes, any from 1 up to it: wider ones would not fit into registers."""


def prefix_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    offsets: torch.Tensor | Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of new queries over compact slots, all of which they may see.

    Args:
        query: `[batch, query_heads, queries, head_dim]`.
        keys: `[batch, kv_heads, slots, head_dim]`; `query_heads` is a multiple of `kv_heads`. With `offsets`,
            `[batch, slots of all heads, head_dim]`, packed head after head.
        values: `[batch, kv_heads, slots, value_dim]`, or packed as the keys are.
        bias: additive pre-softmax bias `[batch or 1, kv_heads or 1, slots]`, or `[batch or 1, slots of all heads]`;
            -inf removes a slot.
        scale: of the scores; `head_dim ** -0.5` unless given.
        offsets: `[kv_heads + 1]` integers from 0 to the number of packed slots: KV head `h` has the slots
            `offsets[h]` up to `offsets[h + 1]`, of which there may be none. None where every head has as many. A
            tensor on a GPU is read back, which waits for the GPU; a tuple is not.

    Returns:
        The output `[batch, query_heads, queries, value_dim]` in the dtype of `values`, and the log-sum-exp of the
        scores `[batch, query_heads, queries]` in fp32: -inf, with an output of zero, where no slot is left.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the message prints them.
    """
    if offsets is not None:
        offsets = tuple(offsets.tolist() if isinstance(offsets, torch.Tensor) else map(int, offsets))
    _check(query, keys, values, bias, None, offsets)
    return _attend(query, keys, values, bias, scale, offsets, False, None)


def tail_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a dense tail, of which the last `queries` keys are the queries' own tokens.

    Args:
        query: `[batch, query_heads, queries, head_dim]`.
        keys: `[batch, kv_heads, tokens, head_dim]`.
        values: `[batch, kv_heads, tokens, value_dim]`.
        mask: `[batch or 1, 1, queries, tokens]`, boolean (True attends) or additive; None is causal.
        scale: of the scores; `head_dim ** -0.5` unless given.

    Returns:
        Output and log-sum-exp, as `prefix_attention` returns them.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the message prints them.
    """
    _check(query, keys, values, None, mask, None)
    return _attend(query, keys, values, None, scale, None, mask is None, mask)


def merge_attention(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the output and log-sum-exp over each."""
    top = torch.maximum(first[1], second[1]).detach()
    dead = top == -torch.inf  # sees nothing in either: zeros, and no NaN in the gradients
    powers = [(part[1] - top.masked_fill(dead, 0.0)).exp() for part in (first, second)]
    total = (powers[0] + powers[1]).masked_fill(dead, 1.0)
    shares = [(power / total).unsqueeze(-1) for power in powers]
    merged = first[0].to(top.dtype) * shares[0] + second[0].to(top.dtype) * shares[1]
    return merged.to(first[0].dtype), total.log() + top


def attend_reference(query, keys, values, bias, scale, offsets, causal, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Both parts in PyTorch, in fp32 (or the fp64 of the inputs); arguments as `prefix_attention` has them.

    `causal` lets query `i` of `n` see all keys but the last `n - 1 - i`; `mask` is that of `tail_attention`.
    """
    queries, tokens = query.shape[2], keys.shape[-2]
    if causal:
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril(tokens - queries)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    if offsets is None:
        added = mask if bias is None else bias[:, :, None]
        return _softmax(query, keys, values, None if added is None else added[:, :, None], scale)
    parts = []
    for head, group in enumerate(query.split(query.shape[1] // (len(offsets) - 1), dim=1)):
        own = slice(offsets[head], offsets[head + 1])
        added = None if bias is None else bias[:, None, None, None, own]
        parts.append(_softmax(group, keys[:, None, own], values[:, None, own], added, scale))
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def _attend(query, keys, values, bias, scale, offsets, causal, mask) -> tuple[torch.Tensor, torch.Tensor]:
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = [x for x in (query, keys, values, bias, mask) if x is not None]
    if not dispatch.runs_triton("prefix_attention", tensors, lambda: _obstacle(query, keys, values, bias, mask)):
        if _flash_takes(query, keys, values, bias, offsets, causal, mask):
            return _flash(query, keys, values, bias, scale, offsets)
        return attend_reference(query, keys, values, bias, scale, offsets, causal, mask)
    from .prefix_attention_triton import Attention

    return Attention.apply(query, keys, values, bias, scale, offsets, causal, mask)


def _flash_takes(query, keys, values, bias, offsets, causal, mask) -> bool:
    """Whether sdpa's operator for CPUs can do this: it keeps no scores, and has no gradient of the log-sum-exp."""
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, keys, values, bias))
    heads = [keys.shape[-2]] if offsets is None else [end - start for start, end in pairwise(offsets)]
    prefix = mask is None and not causal and (bias is None or offsets is None)  # of a short tail it is no faster
    here = query.device.type == "cpu" and dispatch.mode() != "reference"
    return here and prefix and keys.shape[-1] == values.shape[-1] and not learns and min(query.shape[2], *heads) > 0


def _flash(query, keys, values, bias, scale, offsets) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_flash_takes`; query heads that share keys are queries of one head."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    batch, heads, queries, _ = query.shape
    if offsets is None:
        parts = [(query, keys, values)]
    else:
        groups = query.split(heads // (len(offsets) - 1), dim=1)
        own = [slice(*ends) for ends in pairwise(offsets)]
        parts = [(group, keys[:, None, at], values[:, None, at]) for group, at in zip(groups, own, strict=True)]
    added = None
    if bias is not None:
        rows = heads // keys.shape[1] * queries
        added = bias[:, :, None].to(query.dtype).expand(batch, keys.shape[1], rows, keys.shape[2])
    made = [
        flash(q.reshape(batch, k.shape[1], -1, q.shape[3]), k, v, 0.0, False, attn_mask=added, scale=scale)
        for q, k, v in parts
    ]
    out, lse = (torch.cat(each, dim=1) for each in zip(*made, strict=True))
    if bias is not None:  # the operator says 0 where no slot is left
        lse = lse.masked_fill((bias == -torch.inf).all(-1)[:, :, None], -torch.inf)
    return out.reshape(batch, heads, queries, -1), lse.reshape(batch, heads, queries)


def _obstacle(query, keys, values, bias, mask) -> str:
    """What the kernel does not take, in words; empty where it takes everything."""
    wide, widest = max(query.shape[-1], values.shape[-1]), WIDEST.get(query.dtype, 0)
    if wide > widest > 0:
        return f"it takes head dims up to {widest} in {query.dtype}, not {wide}"
    for name, x in (("query", query), ("keys", keys), ("values", values), ("bias", bias), ("mask", mask)):
        if x is None:
            continue
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"the last dim of {name} must be contiguous (its strides are {list(x.stride())})"
        if sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31:
            return f"a row of {name} spans 2**31 elements or more"
    return f"it takes batches up to 65535, not {query.shape[0]}" if query.shape[0] > 65535 else ""


def _softmax(query, keys, values, added, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """`added` broadcasts to the scores `[batch, kv_heads, group, queries, keys]`."""
    batch, query_heads, queries, head_dim = query.shape
    kv_heads, wide = keys.shape[1], torch.promote_types(query.dtype, torch.float32)
    rows = query.reshape(batch, kv_heads, -1, head_dim).to(wide)  # a KV head's query heads, one after the other
    scores = torch.matmul(rows, keys.to(wide).transpose(-1, -2)) * scale
    if added is not None:
        scores = (scores.unflatten(2, (-1, queries)) + added.to(wide)).flatten(2, 3)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)  # a softmax over nothing has no gradient, and its output is zero
    lse = scores.logsumexp(-1, keepdim=True).masked_fill(dead, -torch.inf)
    weights = scores.softmax(-1).masked_fill(dead, 0.0)
    out = torch.matmul(weights, values.to(wide))
    return out.reshape(batch, query_heads, queries, -1).to(values.dtype), lse.reshape(batch, query_heads, queries)


def _check(query, keys, values, bias, mask, offsets) -> None:
    """Refuse whatever does not fit together, with the shapes."""

    def refuse(reason: str) -> None:
        given = {"query": query, "keys": keys, "values": values, "bias": bias, "mask": mask}
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in given.items() if x is not None)
        raise ValueError(f"{reason}; {shapes}" + ("" if offsets is None else f", offsets {list(offsets)}"))

    ndim = 4 if offsets is None else 3
    if query.ndim != 4 or keys.ndim != ndim or values.ndim != ndim:
        refuse(f"query needs 4 dims, keys and values {ndim}{'' if offsets is None else ' where there are offsets'}")
    if keys.shape[:-1] != values.shape[:-1] or query.shape[0] != keys.shape[0] or query.shape[3] != keys.shape[-1]:
        refuse("query, keys and values must agree in batch and head dim, keys and values in heads and slots")
    heads, slots = (len(offsets) - 1 if offsets is not None else keys.shape[1]), keys.shape[-2]
    if offsets is not None and (heads < 1 or offsets[0] or offsets[-1] != slots or list(offsets) != sorted(offsets)):
        refuse("offsets must climb from 0 to the number of packed slots")
    if heads == 0 or query.shape[1] % heads:
        refuse(f"{query.shape[1]} query heads cannot share {heads} KV heads evenly")
    if len({x.dtype for x in (query, keys, values)}) > 1:
        refuse(f"query, keys and values must share a dtype (got {query.dtype}, {keys.dtype} and {values.dtype})")
    full = (query.shape[0], slots) if offsets is not None else (query.shape[0], heads, slots)
    for name, x, wanted in (("bias", bias, full), ("mask", mask, (query.shape[0], 1, query.shape[2], slots))):
        if x is None:
            continue
        ones = (0, 1) if name == "bias" and offsets is None else (0,)
        if x.ndim != len(wanted) or any(n != w and not (n == 1 and i in ones)
                                        for i, (n, w) in enumerate(zip(x.shape, wanted, strict=True))):  # fmt: skip
            refuse(f"{name} must have the shape {list(wanted)}, or 1 at {' and '.join(map(str, ones))}")
        if name == "bias" and not x.is_floating_point():
            refuse(f"bias must be a float, not {x.dtype}")
    devices = {str(x.device) for x in (query, keys, values, bias, mask) if x is not None}
    if len(devices) > 1:
        refuse(f"all must be on one device, not {', '.join(sorted(devices))}")
