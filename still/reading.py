"""`read`: one forward of the frozen model over a context, and what every method starts from."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from inspect import getmodule

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache

from .calling import passing
from .rope import full_attention_layers
from .types import Reading

_capture: ContextVar[tuple[set[int], dict[int, torch.Tensor]] | None] = ContextVar("still_capture", default=None)


def read(model, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, queries: bool = False) -> Reading:
    """Read a context once with the frozen model; no logits of the context are computed.

    Args:
        model: a Hugging Face causal language model.
        input_ids: `[batch, tokens]`.
        attention_mask: `[batch, tokens]`, zeros on the left of shorter rows; each row then stands at positions
            `0 .. its length - 1`.
        queries: keep the rotated queries of the full-attention layers as well, as `[batch, query_heads, tokens,
            head_dim]` each.

    Raises:
        ValueError: the context is empty, the mask does not fit or pads on the right, or the model cannot show its
            queries.
    """
    check_mask(input_ids, attention_mask)
    cache = DynamicCache(config=model.config)
    kept, seconds = _forward(model, input_ids, attention_mask, cache, queries)
    return Reading(input_ids, cache, attention_mask, kept, seconds)


def read_after(model, reading: Reading, input_ids: torch.Tensor, queries: bool = False) -> Reading:
    """Read more tokens on a copy of what was read; `reading` is left as it was.

    Args:
        model: the same model.
        reading: of the context.
        input_ids: `[batch or 1, more]`, without padding.
        queries: keep the rotated queries of the new tokens, `[batch, query_heads, more, head_dim]` each.

    Returns:
        A reading of context and new tokens, whose queries are those of the new tokens alone.
    """
    check_mask(input_ids, None)
    ids = input_ids.to(reading.input_ids.device).expand(reading.input_ids.shape[0], -1)
    mask = reading.attention_mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(ids.shape)], dim=-1)
    cache = copy.deepcopy(reading.cache)
    kept, seconds = _forward(model, ids, mask, cache, queries)
    return Reading(torch.cat([reading.input_ids, ids], dim=-1), cache, mask, kept, seconds)


def _forward(model, input_ids, attention_mask, cache, queries: bool) -> tuple[dict[int, torch.Tensor], float]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    positions = None
    if attention_mask is not None:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[-1] :]
    kept: dict[int, torch.Tensor] = {}
    started = time.perf_counter()
    with torch.no_grad(), capture_queries(decoder, kept) if queries else nullcontext():
        decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            **passing(decoder, cache),
            use_cache=True,
        )
    if input_ids.is_cuda:
        torch.cuda.synchronize(input_ids.device)
    seconds = time.perf_counter() - started
    if queries and (missing := set(full_attention_layers(model.config)) - set(kept)):
        raise ValueError(f"no queries came from layers {sorted(missing)}: their attention bypasses AttentionInterface")
    return kept, seconds


def check_unmoved(cache: Cache, input_ids: torch.Tensor) -> None:
    """Refuse a cache that holds more or fewer tokens than `input_ids` `[batch, tokens]`.

    Raises:
        ValueError: a forward has moved it on, as each does that is given the cache itself and no copy.
    """
    tokens = cache.get_seq_length()
    if input_ids.shape[-1] != tokens:
        raise ValueError(
            f"the cache holds {tokens} tokens and input_ids {input_ids.shape[-1]}: a forward has moved the cache on "
            f"since it read the context; read the context again"
        )


def check_mask(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Refuse an empty context, and masks that are not left padding.

    Raises:
        ValueError: names the shape or the row.
    """
    if input_ids.ndim != 2 or input_ids.shape[-1] == 0:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; give [batch, tokens], 1 token or more")
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask {list(attention_mask.shape)} differs from input_ids {list(input_ids.shape)}")
    mask = attention_mask.bool()
    if not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
        bad = (~mask[:, -1] | (mask[:, :-1] & ~mask[:, 1:]).any(-1)).nonzero()[0].item()
        raise ValueError(f"row {bad} of the attention mask is no left padding: zeros, then one 1 or more")


@contextmanager
def capture_queries(decoder, into: dict[int, torch.Tensor]) -> Iterator[None]:
    """Put the rotated queries of `decoder`'s full-attention layers into `into` while the block runs.

    The model's attention is switched to one that records and hands on to the implementation it had; that one is
    restored when the block ends, also on an error.

    Raises:
        ValueError: the model does not take its attention from `AttentionInterface`.
    """
    layers = set(full_attention_layers(decoder.config))
    before = decoder.config._attn_implementation
    name = _register(before)
    token = _capture.set((layers, into))
    try:
        decoder.set_attn_implementation(name)
        if decoder.config._attn_implementation != name:
            raise ValueError(f"{type(decoder).__name__} does not let its attention be set; its queries cannot be read")
        yield
    finally:
        _capture.reset(token)
        if decoder.config._attn_implementation != before:
            decoder.set_attn_implementation(before)


def _register(implementation: str) -> str:
    """Register, once, an attention that records queries around `implementation`, with the same mask function."""
    name = f"still_reading_{implementation.replace('/', '_').replace(':', '_')}"
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    if name not in functions:
        mask = masks.get(implementation)
        if mask is None:
            raise ValueError(f"attention {implementation!r} has no mask function; load the model with 'sdpa'")
        AttentionInterface.register(name, _recorder(implementation))
        AttentionMaskInterface.register(name, mask)
    return name


def _recorder(implementation: str) -> Callable:
    def attend(module, query, key, value, attention_mask, **kwargs):
        layers, into = _capture.get() or ((), {})
        if module.layer_idx in layers:
            into[module.layer_idx] = query
        eager = getattr(getmodule(type(module)), "eager_attention_forward", None)
        inner = AttentionInterface().get_interface(implementation, eager)
        return inner(module, query, key, value, attention_mask, **kwargs)

    return attend
