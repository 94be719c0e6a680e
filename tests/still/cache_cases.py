"""What the cache's tests share: a compactor that keeps evenly spaced tokens, and what attention over them must give."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from transformers import DynamicCache
from transformers.masking_utils import create_sliding_window_causal_mask

from still.budgets import slots_for
from still.cache import StillCache
from still.rope import full_attention_layers
from still.types import CompactKV


def strided(tokens: int, slots: int) -> torch.Tensor:
    """Indices of `slots` evenly spaced tokens."""
    return torch.linspace(0, tokens - 1, slots, dtype=torch.float64).round().long()


class StridedCompactor:
    """Keeps evenly spaced tokens, which no model needs training for: the oracle is a mask over the full context."""

    def __init__(self, chunk: int = 16, model=None):
        self.config = SimpleNamespace(chunk=chunk)
        self.model_config = None if model is None else model.config
        self.calls: list[tuple[int, int, int]] = []

    def compact_layer(self, layer, keys, values, positions, slots) -> CompactKV:
        self.calls.append((layer, keys.shape[2], slots))
        index = strided(keys.shape[2], slots)
        return CompactKV(keys[:, :, index], values[:, :, index])

    def slot_positions(self, positions, slots):
        return positions[..., strided(positions.shape[-1], slots)]


def read(model, ids, mask=None, cache=None):
    """A forward over a context, with the positions that `generate` would give it."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    positions = None if mask is None else (mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    return cache, logits


def compact(model, ids, slots=None, ratio=None, mask=None, beta=None) -> StillCache:
    """A ready-made cache that keeps evenly spaced tokens of each row."""
    source, _ = read(model, ids, mask)
    rows = [ids.shape[1]] * len(ids) if mask is None else mask.sum(-1).tolist()
    counts = [min(slots, n) if slots else slots_for(n, ratio) for n in rows]
    layers = {}
    for layer in full_attention_layers(model.config):
        keys, values = source.layers[layer].keys, source.layers[layer].values
        shape = (*keys.shape[:2], max(counts), keys.shape[3])
        out = CompactKV(keys.new_zeros(shape), keys.new_zeros(shape), beta)
        for row, (n, count) in enumerate(zip(rows, counts, strict=True)):
            index = ids.shape[1] - n + strided(n, count)
            out.keys[row, :, shape[2] - count :] = keys[row, :, index]
            out.values[row, :, shape[2] - count :] = values[row, :, index]
        layers[layer] = out
    return StillCache.from_layers(
        model.config, layers, ids.shape[1], source=source, token_ids=ids, attention_mask=mask,
        provenance={"method": "strided", "seed": 0},
    )  # fmt: skip


def masked_logits(model, context, new, visible) -> torch.Tensor:
    """Logits of `new` in one uninterrupted forward in which they see only `visible` tokens of the context."""
    ids = torch.cat((context, new), dim=1)
    total, tokens = ids.shape[1], context.shape[1]
    mask = torch.ones(total, total, dtype=torch.bool).tril()
    hidden = torch.ones(tokens, dtype=torch.bool)
    hidden[visible] = False
    mask[tokens:, :tokens] &= ~hidden
    mask = mask[None, None].expand(len(ids), -1, -1, -1)
    if getattr(model.config, "sliding_window", None):
        window = create_sliding_window_causal_mask(
            config=model.config,
            inputs_embeds=model.get_input_embeddings()(ids),
            attention_mask=None,
            past_key_values=None,
            position_ids=None,
        )
        mask = {"full_attention": mask, "sliding_attention": window}
    return model(ids, attention_mask=mask, use_cache=False).logits[:, tokens:]
