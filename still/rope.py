"""Rotate and un-rotate keys through the model's own rotary module.

The module knows the model's base, scaling (llama3, yarn, linear), partial rotary and, where layers differ
(Gemma-3), each layer type's own table. Nothing here reads `rope_theta`.
"""

from __future__ import annotations

import inspect
import sys

import torch
from torch import nn

# These change their frequencies with the length seen so far: a cached key cannot be un-rotated later.
MOVING_ROPES = ("dynamic", "longrope")


def full_attention_layers(config) -> list[int]:
    """Indices of the layers whose KV cache grows with the context: the ones that are compacted."""
    config = config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    layers = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    if not layers:
        raise ValueError(f"{config.model_type} has no full-attention layer (only {sorted(set(kinds))}): nothing grows")
    return layers


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` `[batch, heads, tokens, head_dim]` by tables `[batch or 1, tokens, rotary_dim]`, split-half pairs."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Undo `rotate`. Tables scaled by an attention factor `s` are divided by `s**2`, which makes this exact."""
    square = cos[..., :1].square() + sin[..., :1].square()
    return rotate(x, cos / square, -sin / square)


class Rotary:
    """The rotary tables of every layer of one model, as the model itself computes them in fp32."""

    def __init__(self, module: nn.Module, layer_types: list[str] | None):
        self.module = module
        self.by_type = "layer_type" in inspect.signature(module.forward).parameters
        self.layer_types = layer_types

    @classmethod
    def for_model(cls, model: nn.Module) -> Rotary:
        """Find the model's rotary module and check that it pairs dimensions as `rotate` does.

        Raises:
            ValueError: the model has no rotary module, or one that cannot be undone.
        """
        config = model.config.get_text_config(decoder=True)
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        module = getattr(decoder, "rotary_emb", None)
        if module is None:
            raise ValueError(f"{config.model_type} has no rotary_emb; only models with rotary embeddings are supported")
        ropes = config.rope_parameters or {}
        kinds = {rope.get("rope_type") for rope in ropes.values() if isinstance(rope, dict)} | {ropes.get("rope_type")}
        if moving := kinds & set(MOVING_ROPES):
            raise ValueError(f"rope type {moving.pop()!r} changes with the length and cannot be undone")
        rotary = cls(module, getattr(config, "layer_types", None))
        rotary._check_pairs(decoder, full_attention_layers(config)[0])
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

    def _check_pairs(self, decoder: nn.Module, layer: int) -> None:
        attention = getattr(decoder.layers[layer], "self_attn", None)
        theirs = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if theirs is None:
            return
        device = next(decoder.parameters()).device
        cos, sin = self.cos_sin(layer, torch.arange(3, 8, device=device))
        head_dim = getattr(attention, "head_dim", cos.shape[-1])
        x = torch.linspace(-1, 1, 5 * head_dim, device=device).reshape(1, 1, 5, head_dim)
        if not torch.allclose(theirs(x, x, cos, sin)[1], rotate(x, cos, sin), atol=1e-5):
            name = type(attention).__name__
            raise ValueError(f"{name} pairs rotary dimensions in another way than split-half; it is not supported yet")
