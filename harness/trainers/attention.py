"""Attention of a row behind slots in memory linear in its tokens.

Stock sdpa takes a mask of queries times keys there, and keeps it as numbers in every layer for the backward pass. All
slots are seen by every token, so the row is the end of a causal square: with as many empty queries before it as there
are slots, sdpa's causal path serves it, and needs no mask.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...attention import attending
from ...rope import layer_kinds

NAME = "still_rows"


def can_pack(model) -> bool:
    """Whether rows may stand one behind the other: flash attention keeps them apart by positions that begin anew.

    Others would take a mask of all tokens by all tokens, and recurrent layers would carry one row into the next.
    """
    flash = "flash" in model.config._attn_implementation
    return flash and set(layer_kinds(model.config)) <= {"full_attention", "sliding_attention"}


def attending_rows(model) -> AbstractContextManager[None]:
    """Train a model that uses sdpa on rows; others are left as they are. Both passes belong into the block."""
    if model.config._attn_implementation != "sdpa":
        return nullcontext()
    AttentionInterface.register(NAME, row_attention)
    AttentionMaskInterface.register(NAME, row_mask)
    return attending(model, NAME)


def row_mask(*args, attention_mask=None, local_size=None, allow_is_causal_skip: bool = True, **kwargs):
    """No mask where nothing but the order of the tokens rules, else sdpa's."""
    if attention_mask is None and local_size is None and allow_is_causal_skip:
        return None
    return sdpa_mask(
        *args, attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **kwargs
    )


def row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it.

    Args:
        module: the attention layer.
        query: `[batch, query_heads, queries, head_dim]`, the last of the causal square.
        key: `[batch, kv_heads, keys, head_dim]`.
        value: `[batch, kv_heads, keys, head_dim]`.
        attention_mask: None: every query sees all keys before the queries, and its own part of them.
        **kwargs: passed on to sdpa.

    Returns:
        The output `[batch, queries, query_heads, head_dim]`, and None for the weights.
    """
    queries, before = query.shape[2], key.shape[2] - query.shape[2]
    if attention_mask is None and before > 0 and queries > 1:
        if before <= queries:
            out, _ = sdpa_attention_forward(module, F.pad(query, (0, 0, before, 0)), key, value, None, **kwargs)
            return out[:, before:], None
        shape = queries, key.shape[2]  # few queries behind much: the mask is the smaller of the two
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(before)[None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
