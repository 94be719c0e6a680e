"""Rotate and un-rotate keys through the model's own rotary module.

The module knows the model's base, scaling (llama3, yarn, linear), partial rotary and, where layers differ
(Gemma-3), each layer type's own table. Nothing here reads `rope_theta`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .calling import passing
from .config import UNEQUAL, field_of
from .kernels.rope import restore_rope, strip_rope

# These change their frequencies with the length seen so far: a cached key cannot be un-rotated later.
MOVING_ROPES = ("dynamic", "longrope")

_checked: WeakSet[nn.Module] = WeakSet()


def layer_kinds(config) -> list[str]:
    """What each layer attends to, as transformers' `layer_types` have it; configs without them say it by a window."""
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    return list(kinds)


def pads_freely(config) -> bool:
    """Whether padding leaves no trace: every layer attends to all that the mask shows, and keeps no other state."""
    return set(layer_kinds(config)) == {"full_attention"}


def full_attention_layers(config) -> list[int]:
    """Indices of the layers whose KV cache grows with the context: the ones that are compacted."""
    kinds = layer_kinds(config)
    layers = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    if not layers:
        raise ValueError(f"{config.get_text_config(decoder=True).model_type} has no full-attention layer (only "
                         f"{sorted(set(kinds))}): nothing grows")  # fmt: skip
    return layers


def head_dim_of(config) -> int:
    """Dimension of a key."""
    config = config.get_text_config(decoder=True)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` `[batch, heads, tokens, head_dim]` by tables `[batch or 1, tokens, rotary_dim]`, split-half pairs."""
    return restore_rope(x, cos, sin)


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Undo `rotate`. Tables scaled by an attention factor `s` are divided by `s**2`, which makes this exact."""
    return strip_rope(x, cos, sin)


@dataclass(frozen=True)
class Turning:
    """How a model rotates the keys of some tokens, alike in all of its layers that share their tables.

    Attributes:
        cos: `[batch or 1, tokens, rotary_dim]`, fp32.
        sin: like `cos`.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    @cached_property
    def back(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables by which `rotate` does what `unrotate` does by `cos` and `sin`, divided once for all layers."""
        square = self.cos.square().addcmul_(self.sin, self.sin)
        return self.cos / square, self.sin / square.neg_()

    def first(self, tokens: int) -> Turning:
        """That of the first tokens alone, a view."""
        part = Turning(self.cos[:, :tokens], self.sin[:, :tokens])
        part.__dict__["back"] = tuple(table[:, :tokens] for table in self.back)
        return part


class Rotary:
    """The rotary tables of every layer of one model, as the model itself computes them in fp32."""

    def __init__(self, module: nn.Module, layer_types: list[str] | None):
        self.module = module
        self.by_type = "layer_type" in inspect.signature(module.forward).parameters
        self.layer_types = layer_types

    @classmethod
    def for_model(cls, model: nn.Module) -> Rotary:
        """Find the model's rotary module, and check on a few tokens that `rotate` moves its keys as the model does.

        Raises:
            ValueError: the model has no rotary module, one that cannot be undone, or layers that rotate otherwise.
        """
        config = model.config.get_text_config(decoder=True)
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        module = getattr(decoder, "rotary_emb", None)
        if module is None:
            raise ValueError(f"{config.model_type} has no rotary_emb; only models with rotary embeddings are supported")
        ropes = getattr(config, "rope_parameters", None) or {}
        kinds = {rope.get("rope_type") for rope in ropes.values() if isinstance(rope, dict)} | {ropes.get("rope_type")}
        if moving := kinds & set(MOVING_ROPES):
            raise ValueError(f"rope type {moving.pop()!r} changes with the length and cannot be undone")
        for name in ("num_key_value_heads", "head_dim"):
            if field_of(config, name) == UNEQUAL:
                raise ValueError(
                    f"the layers of {config.model_type} differ in {name}; only models whose layers are alike in their "
                    f"KV heads and head dim can be compacted"
                )
        if getattr(config, "num_key_value_heads", None) is None:
            raise ValueError(f"{config.model_type} has no num_key_value_heads; such models are not supported")
        rotary = cls(module, getattr(config, "layer_types", None))
        if model not in _checked:
            rotary._check_keys(decoder, config)
            _checked.add(model)
        return rotary

    def cos_sin(self, layer: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables `[batch or 1, tokens, rotary_dim]` in fp32 for positions `[tokens]` or `[batch, tokens]`.

        Positions may lie between tokens.
        """
        if positions.ndim == 1:
            positions = positions[None]
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        kind = (self.layer_types[layer],) if self.by_type else ()
        with torch.no_grad():
            return self.module(like, positions, *kind)

    @torch.no_grad()
    def _check_keys(self, decoder: nn.Module, config) -> None:
        """Compare keys that the model caches for one token alone at two positions.

        A token that sees itself alone has the same hidden states anywhere, so its keys differ by the rotation.
        """
        layers, positions = full_attention_layers(config), torch.tensor([3, 10])
        ids = torch.tensor([i for i in range(4) if i != config.pad_token_id][:3]) % config.vocab_size
        device = next(decoder.parameters()).device
        cache = DynamicCache(config=config)
        decoder(
            input_ids=ids.repeat_interleave(2)[:, None].to(device),
            position_ids=positions.repeat(len(ids))[:, None].to(device),
            **passing(decoder, cache),
            use_cache=True,
        )
        heads, name = config.num_key_value_heads, config.model_type
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for layer in layers:
            stored = cache.layers[layer] if layer < len(cache.layers) else None
            keys, values = getattr(stored, "keys", None), getattr(stored, "values", None)
            shapes = [None if x is None else list(x.shape[1::2]) for x in (keys, values)]
            if shapes != [[heads, head_dim]] * 2:
                raise ValueError(
                    f"layer {layer} of {name} caches keys and values of [heads, head dim] {shapes[0]} and {shapes[1]}; "
                    f"only layers that keep both as {[heads, head_dim]} can be compacted"
                )
            before, after = keys[0::2].float(), keys[1::2].float()
            (cos, sin), (later_cos, later_sin) = (self.cos_sin(layer, p[None].to(device)) for p in positions)
            if cos.shape[-1] <= head_dim:
                moved = rotate(unrotate(before, cos, sin), later_cos, later_sin)
                slack = 1e-3 if keys.dtype == torch.float32 else 0.05
                if (moved - after).abs().max() <= slack * after.abs().max():
                    continue
            raise ValueError(
                f"layer {layer} of {name} does not rotate its keys by split halves with the tables of rotary_emb "
                f"(interleaved pairs, tables of another width, no rotation here?); such models are not supported"
            )


class Tables(NamedTuple):
    """Rotary tables of one span of tokens, alike for all full-attention layers.

    Attributes:
        tokens: how the model rotates the tokens.
        slots: the model's cos and sin at the slots' positions.
        turns: the compactor's own tables of slots (None where latents are placed, and turn as their tokens) and tokens.
        where: the slots' positions `[rows, slots]`.
    """

    tokens: Turning
    slots: tuple[torch.Tensor, torch.Tensor]
    turns: tuple[torch.Tensor | None, torch.Tensor]
    where: torch.Tensor
