"""What a cache can check when `generate` takes it over."""

from __future__ import annotations

import torch
import transformers
from packaging.version import Version

from . import attention
from .cache_layer import refuse_ragged

# Until then, `prefill_chunk_size` read the whole prompt again into a cache that held its beginning.
CHUNKS_CONTINUE_FROM = Version("5.21.0")


def check_generate(cache, generation_config, model_kwargs: dict) -> None:
    """Refuse a call of `generate` whose result would be silently wrong.

    Args:
        cache: the `StillCache` that `generate` was given.
        generation_config: of this call, or None where it is not known.
        model_kwargs: of this call, among them the attention mask, unless it was all ones and dropped.

    Raises:
        ValueError: with the mend.
    """
    mask = model_kwargs.get("attention_mask")
    mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    length = cache.get_seq_length()
    if length == 0:
        _check_padding(cache, mask)
        return
    width = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
    if width is not None and width <= length:
        raise ValueError(
            f"generate() was given {width} tokens with a cache that stands for {length}: it takes context and question "
            f"together, as model.generate(**cache.prompt(question_ids), past_key_values=cache) passes them"
        )
    chunk = getattr(generation_config, "prefill_chunk_size", None)
    if chunk is not None and Version(transformers.__version__) < CHUNKS_CONTINUE_FROM:
        raise ValueError(
            f"prefill_chunk_size={chunk} makes transformers {transformers.__version__} read the whole prompt again "
            f"into a cache that holds its beginning: leave it out, or install transformers {CHUNKS_CONTINUE_FROM}"
        )
    layer = cache.compact_layers[0]
    stock = layer.config._attn_implementation != attention.NAME
    if stock and cache.ragged:
        refuse_ragged(layer.config)
    if stock and layer.live is not None and layer.physical < length and cache.columns.prompted != length:
        raise ValueError(
            "the rows of this cache have unequal slots, so the attention mask must be rewritten over them: call "
            "model.generate(**cache.prompt(question_ids), past_key_values=cache)"
        )


def _check_padding(cache, mask: torch.Tensor | None) -> None:
    """An empty cache that will compact by itself has to know which of the columns to come are padding."""
    if cache.policy is None:
        return
    told = cache.columns.mask
    if mask is None:
        batch, width = (1, 0) if told is None else told.shape
        given = torch.ones(batch, width, dtype=torch.bool)
    else:
        batch, given = len(mask), mask.cpu().bool()
    if not torch.equal(cache.columns.whole(given.shape[1], batch), given):
        raise ValueError(
            "the attention mask given to generate() is not the one that the cache was told: build the cache with "
            "StillCache(compactor, attention_mask=attention_mask, ...)"
        )
