"""Attention over a compact prefix with a bias per slot, merged with attention over a dense tail: the reference.

Softmax attention over two disjoint sets of keys is the average of the two outputs, weighted by the exponentials of
their log-sum-exps; so each part may have a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
        bias: additive pre-softmax bias `[batch, kv_heads or 1, slots]`, or `[batch, slots of all heads]`; -inf
            removes a slot.
        scale: of the scores; `head_dim ** -0.5` unless given.
        offsets: `[kv_heads + 1]` integers from 0 to the number of packed slots: KV head `h` has the slots
            `offsets[h]` up to `offsets[h + 1]`, of which there may be none. None where every head has as many.

    Returns:
        The output `[batch, query_heads, queries, value_dim]` in the dtype of `values`, and the log-sum-exp of the
        scores `[batch, query_heads, queries]` in fp32: -inf, with an output of zero, where no slot is left.
    """
    if offsets is not None:
        return _attend_ragged(query, keys, values, bias, scale, offsets)
    return _attend(query, keys, values, None if bias is None else bias[:, :, None, None].float(), scale)


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
    """
    queries, tokens = query.shape[2], keys.shape[2]
    if mask is None:
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril(tokens - queries)[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    return _attend(query, keys, values, mask[:, :, None].float(), scale)


def merge_attention(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the output and log-sum-exp over each."""
    total = torch.logaddexp(first[1], second[1])
    shares = [_exp_difference(part[1], total).unsqueeze(-1) for part in (first, second)]
    merged = first[0].float() * shares[0] + second[0].float() * shares[1]
    return merged.to(first[0].dtype), total


def _attend(query, keys, values, bias, scale) -> tuple[torch.Tensor, torch.Tensor]:
    batch, query_heads, queries, head_dim = query.shape
    kv_heads = keys.shape[1]
    if query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads cannot share {kv_heads} KV heads evenly")
    scale = head_dim**-0.5 if scale is None else scale
    grouped = query.reshape(batch, kv_heads, query_heads // kv_heads, queries, head_dim).float()
    scores = torch.matmul(grouped, keys.float().transpose(-1, -2).unsqueeze(2)) * scale  # [B, H, group, Q, K]
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = _exp_difference(scores, lse.unsqueeze(-1))
    out = torch.matmul(weights, values.float().unsqueeze(2))
    return out.reshape(batch, query_heads, queries, -1).to(values.dtype), lse.reshape(batch, query_heads, queries)


def _attend_ragged(query, keys, values, bias, scale, offsets) -> tuple[torch.Tensor, torch.Tensor]:
    """Head after head; an empty head is an attention over no slots."""
    offsets = offsets.tolist() if isinstance(offsets, torch.Tensor) else list(offsets)
    kv_heads, slots = len(offsets) - 1, keys.shape[1]
    if keys.ndim != 3 or kv_heads < 1 or offsets[0] != 0 or offsets[-1] != slots or offsets != sorted(offsets):
        raise ValueError(
            f"offsets {offsets} must climb from 0 to the number of packed slots; keys have the shape {list(keys.shape)}"
        )
    if query.shape[1] % kv_heads:
        raise ValueError(f"{query.shape[1]} query heads cannot share {kv_heads} KV heads evenly")
    parts = []
    for head, group in enumerate(query.split(query.shape[1] // kv_heads, dim=1)):
        own = slice(offsets[head], offsets[head + 1])
        own_bias = None if bias is None else bias[:, None, None, None, own].float()
        parts.append(_attend(group, keys[:, None, own], values[:, None, own], own_bias, scale))
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def _exp_difference(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """`exp(scores - lse)`, zero where both are -inf."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
