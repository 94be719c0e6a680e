"""Inputs for a model that continues from a compact cache: ids, positions, and masks over slots instead of tokens."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from . import attention
from .cache_layer import CompactLayer, refuse_ragged
from .cache_rows import right_padded, widen


def make_prompt(
    cache, question_ids, attention_mask=None, previous_ids=None, previous_mask=None
) -> dict[str, torch.Tensor]:
    """What `StillCache.prompt` returns."""
    if cache.ragged and _is_stock(cache):
        refuse_ragged(cache.config)
    question, mask = _new_tokens(cache, question_ids, attention_mask)
    length, known = cache.logical_length, cache.token_ids if previous_ids is None else torch.atleast_2d(previous_ids)
    if previous_ids is not None and len(known) < cache.compact_layers[0].batch:
        raise ValueError(
            f"previous_ids has {len(known)} rows and the cache {cache.compact_layers[0].batch}, those of a beam search "
            f"among them: give ids of every row, or go on from a clone of the cache that was taken before the search"
        )
    real = _mask_of(previous_mask, previous_ids)
    if known is not None and known.shape[-1] < length <= known.shape[-1] + _shifted(cache):
        real = pad(real, (length - known.shape[-1], 0), value=True) if real is not None else None
        known = pad(known, (length - known.shape[-1], 0))
    if known is None or known.shape[-1] < length:
        count = 0 if known is None else known.shape[-1]
        raise ValueError(
            f"the cache stands for {length} tokens and knows the ids of {count}: pass previous_ids=, the ids that "
            f"generate() returned, or use cache.continuation(new_ids) with a plain forward"
        )
    known = widen(known.to(question.device), len(question))
    question = torch.cat((known[:, length:], question), dim=1)
    fed = torch.ones(len(known), known.shape[1] - length, dtype=torch.bool)
    if real is not None:
        real = widen(real, len(question))
        _hide(cache, real[:, :length])
        fed = real[:, length:]
    mask = _mask_over(cache, torch.cat((fed, mask), dim=1))
    ids = pad(known[:, :length], (cache.logical_length - length, 0))
    return {"input_ids": torch.cat((ids, question), dim=1), "attention_mask": mask.long().to(question.device)}


def make_continuation(cache, new_ids, attention_mask=None) -> dict[str, torch.Tensor]:
    """What `StillCache.continuation` returns."""
    new, mask = _new_tokens(cache, new_ids, attention_mask)
    mask = _mask_over(cache, mask).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
    if cache.ragged and _is_stock(cache):
        mask = _mask_over_padded_heads(cache, mask.bool(), new.shape[1])
    return {"input_ids": new, "attention_mask": mask.to(new.device), "position_ids": positions.to(new.device)}


def _mask_of(mask: torch.Tensor | None, ids: torch.Tensor | None) -> torch.Tensor | None:
    """The mask `[batch, tokens]` of the ids that `generate` returned, True at real tokens."""
    if mask is None:
        return None
    mask = torch.atleast_2d(mask).bool().cpu()
    shape = None if ids is None else list(torch.atleast_2d(ids).shape)
    if list(mask.shape) != shape:
        raise ValueError(f"previous_mask has shape {list(mask.shape)} and previous_ids {shape}; they must be the same")
    return mask


def _hide(cache, real: torch.Tensor) -> None:
    """Take raw tokens for padding that `generate` filled up rows with once they had ended.

    Args:
        cache: all of whose layers hide them.
        real: `[batch, logical]`, False at padding, which the cache has taken for tokens.
    """
    known = cache.columns.whole(cache.logical_length, len(real))
    gone = known & ~real
    if not gone.any():
        return
    right = (known & real).flip(-1).int().cummax(-1).values.flip(-1).bool()  # columns with a real token right of them
    if (gone & right).any():
        row = int((gone & right).any(-1).int().argmax())
        raise ValueError(
            f"row {row} of previous_mask hides tokens that others follow: only what generate() fills up a row with, "
            f"once it has ended, can be hidden"
        )
    if kept := [i for i, layer in enumerate(cache.layers) if hasattr(layer, "recurrent_states")]:
        raise ValueError(f"layers {kept} are recurrent and have read the padding already: ask row by row")
    for layer in cache.compact_layers:
        layer.hide(gone.sum(-1))
    cache.columns.mask = known & real


def _is_stock(cache) -> bool:
    return cache.config._attn_implementation != attention.NAME


def _mask_over_padded_heads(cache, mask: torch.Tensor, new: int) -> torch.Tensor:
    """An additive mask `[batch, query_heads, new, longest + raw + new]` over heads that are padded to the longest.

    All layers are given one mask, so it can only be made where they share one split and no layer is of another kind.
    """
    layers, config = cache.compact_layers, cache.config
    first = layers[0]
    if len(layers) < len(cache.layers) or any(not torch.equal(x.ragged.counts, first.ragged.counts) for x in layers):
        refuse_ragged(config)
    live = first.ragged.live().repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=1)
    raw = mask[:, mask.shape[1] - new - first.physical :] if first.live is None else torch.cat(
        (first.live.cpu(), mask[:, -new:]), dim=1
    )
    seen = torch.cat((live, raw[:, None].expand(-1, live.shape[1], -1)), dim=2)[:, :, None]
    causal = torch.ones(new, seen.shape[-1], dtype=torch.bool).tril(seen.shape[-1] - new)
    cache.columns.padded = first.logical
    return torch.zeros((), dtype=first.keys.dtype).masked_fill(~(seen & causal), torch.finfo(first.keys.dtype).min)


def _new_tokens(cache, ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `[batch, tokens]`; a cache of fewer rows is repeated to the batch."""
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.shape[1] < 1 or not cache.compact_layers[0].is_initialized:
        raise ValueError(f"{ids.shape[1]} new tokens after a context of {cache.logical_length}: neither may be empty")
    rows = cache.compact_layers[0].batch
    ids = widen(ids, rows) if len(ids) < rows else ids
    if len(ids) > rows:
        widen(torch.arange(rows), len(ids))
        cache.batch_repeat_interleave(len(ids) // rows)
    mask = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape[1] != ids.shape[1]:
        raise ValueError(f"attention_mask covers {mask.shape[1]} of {ids.shape[1]} new tokens")
    if (row := right_padded(mask)) is not None:
        raise ValueError(f"row {row} of attention_mask is padded right of a token; pad on the left")
    return ids, widen(mask, len(ids))


def _mask_over(cache, new: torch.Tensor) -> torch.Tensor:
    """The mask over the logical columns and the new ones, as the attention in use must see it.

    Stock attention reads the columns right before the new ones as the stored slots: there it gets the live ones, and
    further left, where it never looks, as many ones as make the cumulative sum give each row's positions.
    """
    layer, batch = cache.compact_layers[0], len(new)
    stock = _is_stock(cache)
    if cache.policy is not None and stock and layer.lengths is not None:
        cache.compact()
    old = cache.columns.whole(layer.logical, batch)
    if stock and not cache.ragged and layer.physical < layer.logical:
        live = torch.ones(batch, layer.physical, dtype=torch.bool) if layer.live is None else layer.live.cpu()
        seen = torch.full((batch,), layer.logical) if layer.lengths is None else layer.lengths
        rest = seen - live.sum(-1)
        old = _shift(cache, max(0, layer.physical + int(rest.max()) - layer.logical), old)
        room = layer.logical - layer.physical
        seen_by_stock = torch.cat((torch.arange(room) >= room - rest[:, None], live), dim=1)
        _check_windows(cache, seen_by_stock, old)
    else:
        seen_by_stock = old
    whole = torch.cat((old, new), dim=1)
    if cache.columns.mask is not None or not whole.all():
        cache.columns.mask = whole
    cache.columns.prompted = layer.logical
    return torch.cat((seen_by_stock, new), dim=1)


def _shift(cache, columns: int, mask: torch.Tensor) -> torch.Tensor:
    """Make room for `columns` more logical columns of padding on the left; returns the mask with them."""
    if columns:
        for layer in cache.layers:
            if isinstance(layer, CompactLayer):
                layer.logical += columns
            elif hasattr(layer, "cumulative_length"):
                layer.cumulative_length += columns
        if cache.token_ids is not None:
            cache.token_ids = pad(cache.token_ids, (columns, 0))
    return pad(mask, (columns, 0), value=False)


def _shifted(cache) -> int:
    """Columns on the left that are padding in every row: those that `_shift` made, and maybe more."""
    mask = cache.columns.mask
    return 0 if mask is None else int((mask.any(0).cumsum(0) == 0).sum())


def _check_windows(cache, rewritten: torch.Tensor, natural: torch.Tensor) -> None:
    """Raise where a sliding-window layer would read the columns that were rewritten for the compact ones."""
    for index, layer in enumerate(cache.layers):
        window = layer.keys.shape[2] if getattr(layer, "is_sliding", False) and layer.keys is not None else 0
        if window and not torch.equal(rewritten[:, -window:], natural[:, -window:]):
            capped = getattr(cache.config, "attn_logit_softcapping", None)  # which attention "still" does not do
            other = "" if capped else "attn_implementation='still' (still.attention.register()), or "
            raise ValueError(
                f"sliding-window layer {index} reads the same mask columns as the unequal slots of this batch: use "
                f"{other}rows of equal length"
            )
