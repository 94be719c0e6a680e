"""Attention of rows in training: behind slots in memory linear in the tokens, and packed behind a common opening.

Behind slots stock sdpa takes a mask of queries times keys, and keeps it as numbers in every layer for the backward
pass. All slots are seen by every token, so the row is the end of a causal square: with as many empty queries before it
as there are slots, sdpa's causal path serves it, and needs no mask.

Packed rows stand one behind the other, and a query sees what all of them begin with and the part of its own row before
it. Both are attended to by themselves and merged by their log-sum-exps, so that nothing is computed of what a row does
not see, and the opening's keys serve all rows at once (Hydragen, arXiv 2402.05099). Backward, each part's gradients
come from the merged output and log-sum-exp (as in ring attention: Liu et al., arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...attention import instead_of_sdpa
from ...kernels.prefix_attention import merge_attention
from ...rope import layer_kinds

NAME = "still_rows"
_ATTRIBUTE = "still_packed"


@dataclass(frozen=True)
class Packed:
    """Rows one behind the other.

    Attributes:
        opening: tokens that all of them go on behind; they stand first.
        lengths: tokens of each row behind them.
    """

    opening: int
    lengths: Sequence[int]

    def parts(self) -> Iterator[slice]:
        """Where the opening stands, if there is one, and each row."""
        start = 0
        for length in (*[self.opening] * bool(self.opening), *self.lengths):
            yield slice(start, start + length)
            start += length

    def mask(self, device: torch.device) -> torch.Tensor:
        """What a model hands through to `row_attention` as a mask that was made already."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        setattr(mask, _ATTRIBUTE, self)
        return mask


def can_pack(model, opening: int = 0) -> bool:
    """Whether rows may stand one behind the other, behind so many tokens that all of them begin with.

    Flash attention keeps rows apart by positions that begin anew, where they share nothing; `attending_rows` keeps them
    apart on a CPU. Others would take a mask of all tokens by all tokens, and recurrent layers would carry one row into
    the next.
    """
    config, kinds = model.config.get_text_config(decoder=True), set(layer_kinds(model.config))
    if "flash" in model.config._attn_implementation:
        return not opening and kinds <= {"full_attention", "sliding_attention"}
    plain = not getattr(config, "attention_dropout", 0) and not hasattr(config, "v_head_dim")  # of another size
    return packs_itself(model) and model.device.type == "cpu" and plain and kinds == {"full_attention"}


def packs_itself(model) -> bool:
    """Whether packed rows need `Packed.mask`."""
    return model.config._attn_implementation == NAME


def attending_rows(model) -> AbstractContextManager[None]:
    """Train a model that uses sdpa on rows; others are left as they are. Both passes belong into the block."""
    return instead_of_sdpa(model, NAME, row_attention, row_mask)


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
        attention_mask: None: every query sees all keys before the queries, and its own part of them. Or `Packed.mask`.
        **kwargs: passed on to sdpa.

    Returns:
        The output `[batch, queries, query_heads, head_dim]`, and None for the weights.
    """
    packed: Packed | None = getattr(attention_mask, _ATTRIBUTE, None)
    if packed is not None:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        return _Apart.apply(query, key, value, packed, scale).transpose(1, 2), None
    queries, before = query.shape[2], key.shape[2] - query.shape[2]
    if attention_mask is None and before > 0 and queries > 1:
        if before <= queries:
            out, _ = sdpa_attention_forward(module, F.pad(query, (0, 0, before, 0)), key, value, None, **kwargs)
            return out[:, before:], None
        shape = queries, key.shape[2]  # few queries behind much: the mask is the smaller of the two
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(before)[None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


class _Apart(torch.autograd.Function):
    """Attention of packed rows `[1, heads, tokens, head_dim]` on a CPU, by the operator that sdpa has for it there."""

    @staticmethod
    def forward(ctx, query, key, value, packed: Packed, scale: float) -> torch.Tensor:
        """The output, like `query`."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        own = [flash(query[:, :, at], key[:, :, at], value[:, :, at], 0.0, True, scale=scale) for at in packed.parts()]
        out, total = (torch.cat(each, dim=2) for each in zip(*own, strict=True))
        first, rest = slice(0, packed.opening), slice(packed.opening, None)
        if packed.opening:
            before = flash(query[:, :, rest], key[:, :, first], value[:, :, first], 0.0, False, scale=scale)
            out[:, :, rest], total[:, :, rest] = merge_attention((out[:, :, rest], total[:, :, rest]), before)
        ctx.save_for_backward(query, key, value, out, total)
        ctx.packed, ctx.scale = packed, scale
        return out

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        """Gradients of query, key and value."""
        query, key, value, out, total = ctx.saved_tensors
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

        def of(at: slice, seen: slice, causal: bool):
            asked, given = (x[:, :, at] for x in (gradient, query)), (x[:, :, seen] for x in (key, value))
            made = (x[:, :, at] for x in (out, total))
            return flash(*asked, *given, *made, 0.0, causal, scale=ctx.scale)

        own = [of(at, at, True) for at in ctx.packed.parts()]
        every = [torch.cat(each, dim=2) for each in zip(*own, strict=True)]
        if ctx.packed.opening:
            first, rest = slice(0, ctx.packed.opening), slice(ctx.packed.opening, None)
            for whole, at, more in zip(every, (rest, first, first), of(rest, first, False), strict=True):
                whole[:, :, at] += more
        return *every, None, None
