"""The attention implementation `"still"`: what stock attention cannot do over a compact prefix.

A bias per slot (beta), and unequal numbers of slots, over the rows of a batch or over the heads of a layer. Call
`register()` once, then load the model with `attn_implementation="still"` or call
`model.set_attn_implementation("still")`. The function and its mask are registered together: with the first alone
transformers builds no mask, and tokens see the future.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import reduce

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .cache_ragged import RaggedSlots
from .kernels.prefix_attention import merge_attention, prefix_attention, tail_attention

NAME = "still"
_ATTRIBUTE = "still_prefix"


@dataclass
class Receipt:
    """Whether an attention has taken up what a layer handed it."""

    taken: bool = False


@dataclass(frozen=True)
class Prefix:
    """What the keys and values of one forward say about the slots before them and about their first columns.

    Every query may see both.

    Attributes:
        length: columns of the dense prefix; the rest is dense and causal.
        bias: additive pre-softmax bias `[batch, kv_heads or 1, length]`, -inf at dead columns; None with no columns.
        slots: packed slots of unequal heads, which are not among the columns; None if there are none.
        receipt: that an attention has taken them up.
    """

    length: int
    bias: torch.Tensor | None
    slots: RaggedSlots | None = None
    receipt: Receipt = field(default_factory=Receipt)


def register() -> None:
    """Make `attn_implementation="still"` known to transformers: the attention function and its mask."""
    AttentionInterface.register(NAME, still_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def take_prefix(keys: torch.Tensor, values: torch.Tensor) -> Prefix | None:
    """What the keys and values that a cache layer returned carry to an attention.

    Raises:
        ValueError: the model put others in the place of one of them.
    """
    prefix = getattr(keys, _ATTRIBUTE, None)
    if prefix is not getattr(values, _ATTRIBUTE, None):
        raise ValueError(
            "this model changes keys or values after its cache returned them, so that slots with a bias, or unequal "
            "ones, cannot stand before them; use uniform slots without beta, and rows of equal length"
        )
    if prefix is not None:
        prefix.receipt.taken = True
    return prefix


@contextmanager
def attending(model, name: str = NAME) -> Iterator[None]:
    """Run a model with this attention, or one by another name, while the block lasts, and then with its own again."""
    before = model.config._attn_implementation
    register()
    if before != name:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        if before != name:
            model.set_attn_implementation(before)


def instead_of_sdpa(
    model, name: str, attention: Callable, mask: Callable = sdpa_mask, still: bool = False
) -> AbstractContextManager[None]:
    """Run a model that uses sdpa with another attention, and its mask, by a name of theirs; others stay as they are.

    With `still` a model that uses this module's attention is run so too.
    """
    if model.config._attn_implementation not in ("sdpa", *((NAME,) if still else ())):
        return nullcontext()
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return attending(model, name)


def with_prefix(keys: torch.Tensor, values: torch.Tensor, prefix: Prefix) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values that a cache layer returns, carrying their prefix to `still_attention`."""
    keys, values = keys.view_as(keys), values.view_as(values)
    setattr(keys, _ATTRIBUTE, prefix)
    setattr(values, _ATTRIBUTE, prefix)
    return keys, values


def still_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it: sdpa, unless the keys carry a `Prefix`.

    Args:
        module: the attention layer.
        query: `[batch, query_heads, queries, head_dim]`.
        key: `[batch, kv_heads, physical, head_dim]` as the cache returned them.
        value: `[batch, kv_heads, physical, head_dim]`.
        attention_mask: `[batch, 1, queries, physical]`; its last columns rule the dense tail.
        dropout: must be 0 where there is a prefix.
        scaling: of the scores.
        **kwargs: passed on to sdpa.

    Returns:
        The output `[batch, queries, query_heads, head_dim]`, and None for the weights.

    Raises:
        ValueError: the layer asks for what attention over a biased prefix does not do.
    """
    prefix = take_prefix(key, value)
    if prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name, off in (("dropout", 0.0), ("softcap", None), ("s_aux", None), ("position_bias", None)):
        asked = dropout if name == "dropout" else kwargs.get(name)
        if asked is not None and asked is not off and not (name == "dropout" and asked == 0):
            raise ValueError(
                f"attention over compact slots with a bias, or unequal ones, has no {name} (got {asked}); use uniform "
                f"slots without beta"
            )
    n = prefix.length
    tail_mask = None if attention_mask is None else attention_mask[..., n:]
    parts = [tail_attention(query, key[:, :, n:], value[:, :, n:], tail_mask, scaling)]
    if n:
        parts.append(prefix_attention(query, key[:, :, :n], value[:, :, :n], prefix.bias, scaling))
    if prefix.slots is not None:
        parts.append(prefix.slots.attend(query, scaling))
    out, _ = reduce(merge_attention, parts)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None
