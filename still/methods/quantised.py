"""The full cache with fewer bits: keys per channel, values per token, as KIVI (arXiv 2402.02750) found best."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer

from ..rope import full_attention_layers
from ..types import Reading
from .base import Method, row_lengths
from .plain import PlainCache

STORED = torch.float16


class Packed(NamedTuple):
    """Unsigned codes with a scale and a minimum per group: `x = code * scale + minimum`.

    Attributes:
        codes: uint8 `[batch, kv_heads, tokens, head_dim]`, or half as wide with two 4-bit codes a byte.
        scale: float16; `[batch, kv_heads, token_groups, head_dim]` of keys, `[.., tokens, channel_groups]` of values.
        minimum: shaped as `scale`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor


class QuantisedLayer(DynamicLayer):
    """A cache layer that stores packed codes and hands out what they stand for.

    New tokens stay raw in `keys` and `values` until `residual` of them are there; then whole groups are packed.
    Groups of keys count from the last token, so a left-padded row packs as it does alone.

    Args:
        bits: 8 or 4.
        group: tokens that share a scale in each channel of the keys, and channels that share one in a token's values.
        residual: raw tokens that make the layer pack again.
    """

    def __init__(self, bits: int, group: int, residual: int = 128):
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"bits is {bits}; choose 8 or 4")
        if group < 1 or residual < group:
            raise ValueError(f"group is {group} and residual {residual}; they must be 1 <= group <= residual")
        self.bits, self.group, self.residual = bits, group, residual
        self.packed_keys: Packed | None = None
        self.packed_values: Packed | None = None

    @classmethod
    def pack(
        cls, keys: torch.Tensor, values: torch.Tensor, bits: int, group: int, rows: list[int] | None = None
    ) -> QuantisedLayer:
        """A layer that holds `keys` and `values` `[batch, kv_heads, tokens, head_dim]`, all packed.

        Args:
            keys: rotated keys.
            values: values.
            bits: 8 or 4.
            group: see the class.
            rows: real tokens of each left-padded row; pads take the first real key, so that they widen no group.
        """
        layer = cls(bits, group, max(128, group))
        layer.lazy_initialization(keys, values)
        if rows is not None and min(rows) < keys.shape[2]:
            first = torch.tensor([keys.shape[2] - row for row in rows], device=keys.device)
            at = torch.arange(keys.shape[2], device=keys.device).maximum(first[:, None])
            keys = keys.gather(2, at[:, None, :, None].expand_as(keys))
        layer.packed_keys = layer._pack_keys(keys)
        layer.packed_values = layer._pack_values(values)
        layer.keys, layer.values = keys[:, :, :0].clone(), values[:, :, :0].clone()
        return layer

    @property
    def packed_tokens(self) -> int:
        """Tokens that are packed."""
        return 0 if self.packed_keys is None else self.packed_keys.codes.shape[2]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append raw tokens; returns all keys and values, the packed ones dequantised."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.packed_keys is not None and key_states.shape[0] != self.packed_keys.codes.shape[0]:
            self.batch_repeat_interleave(key_states.shape[0] // self.packed_keys.codes.shape[0])
        self.keys = torch.cat([self.keys, key_states], dim=-2) if self.keys.numel() else key_states
        self.values = torch.cat([self.values, value_states], dim=-2) if self.values.numel() else value_states
        if self.packed_keys is None:
            out = self.keys, self.values
        else:
            out = (
                torch.cat([self._unpack(self.packed_keys, keys=True), self.keys], dim=-2),
                torch.cat([self._unpack(self.packed_values, keys=False), self.values], dim=-2),
            )
        if self.keys.shape[-2] >= self.residual:
            self._pack_residual()
        return out

    def get_seq_length(self) -> int:
        """Packed and raw tokens."""
        raw = self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0
        return self.packed_tokens + raw

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as a negative number; packed ones cannot be removed."""
        raw = self.get_seq_length() - self.packed_tokens
        if -tokens_to_remove > raw:
            raise ValueError(f"cannot crop {-tokens_to_remove} tokens: only the last {raw} are not packed yet")
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows for beam search."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self._each(lambda x: x[indices])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back."""
        self._each(lambda x: x.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Drop everything."""
        super().reset()
        self.packed_keys = self.packed_values = None

    def _each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.is_initialized:
            return
        if self.packed_keys is not None:
            self.packed_keys = Packed(*map(move, self.packed_keys))
            self.packed_values = Packed(*map(move, self.packed_values))
        if self.keys.ndim == 4:
            self.keys, self.values = move(self.keys), move(self.values)

    def _pack_residual(self) -> None:
        count = self.keys.shape[-2] // self.group * self.group
        new = self._pack_keys(self.keys[:, :, :count]), self._pack_values(self.values[:, :, :count])
        if self.packed_keys is None:
            self.packed_keys, self.packed_values = new
        else:
            self.packed_keys = Packed(*(torch.cat(x, dim=2) for x in zip(self.packed_keys, new[0], strict=True)))
            self.packed_values = Packed(*(torch.cat(x, dim=2) for x in zip(self.packed_values, new[1], strict=True)))
        self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()

    def _pack_keys(self, keys: torch.Tensor) -> Packed:
        lead = -keys.shape[2] % self.group
        whole = torch.cat([keys[:, :, :1].expand(-1, -1, lead, -1), keys], dim=2).unflatten(2, (-1, self.group))
        codes, scale, minimum = self._quantise(whole, dim=3)
        return Packed(self._squeeze(codes.flatten(2, 3)[:, :, lead:]), scale.squeeze(3), minimum.squeeze(3))

    def _pack_values(self, values: torch.Tensor) -> Packed:
        group = min(self.group, values.shape[-1])
        if values.shape[-1] % group:
            raise ValueError(f"values have {values.shape[-1]} channels, no multiple of the group of {group}")
        codes, scale, minimum = self._quantise(values.unflatten(-1, (-1, group)), dim=-1)
        return Packed(self._squeeze(codes.flatten(-2)), scale.squeeze(-1), minimum.squeeze(-1))

    def _quantise(self, x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, top = x.float(), 2**self.bits - 1
        minimum = x.amin(dim, keepdim=True).to(STORED)
        scale = ((x.amax(dim, keepdim=True) - minimum.float()) / top).clamp_min(0).to(STORED)
        if not (minimum.isfinite().all() and scale.isfinite().all()):
            raise ValueError(f"entries reach {x.abs().max().item():g}, past what float16 scales can hold")
        safe = torch.where(scale > 0, scale.float(), 1.0)
        return ((x - minimum.float()) / safe).round().clamp(0, top).to(torch.uint8), scale, minimum

    def _squeeze(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.contiguous() if self.bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4

    def _unpack(self, packed: Packed, keys: bool) -> torch.Tensor:
        codes, scale, minimum = packed
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        if keys:
            spread = [x.repeat_interleave(self.group, dim=2)[:, :, -codes.shape[2] :] for x in (scale, minimum)]
        else:
            spread = [x.repeat_interleave(codes.shape[-1] // x.shape[-1], dim=-1) for x in (scale, minimum)]
        return (codes.float() * spread[0].float() + spread[1].float()).to((self.keys if keys else self.values).dtype)


@dataclass
class Int8(Method):
    """The full cache in 8 bits. The budget is ignored; the ratio is one of bytes.

    Attributes:
        group: tokens that share a scale in each channel of the keys, and channels that share one in a token's values.
    """

    group: int = 32

    name: ClassVar[str] = "int8"
    fixed_size: ClassVar[bool] = True
    synthesis: ClassVar[bool] = True
    bits: ClassVar[int] = 8

    def compact(self, model, reading: Reading, slots: int | None = None, ratio: float | None = None) -> PlainCache:
        """A `PlainCache`; layers that are not full attention are copied."""
        packed, rows = set(full_attention_layers(model.config)), row_lengths(reading)
        with torch.no_grad():
            layers = [
                QuantisedLayer.pack(layer.keys, layer.values, self.bits, self.group, rows)
                if index in packed
                else copy.deepcopy(layer)
                for index, layer in enumerate(reading.cache.layers)
            ]
        return PlainCache(layers, reading.input_ids, reading.attention_mask)


@dataclass
class Int4(Int8):
    """The full cache in 4 bits, two codes a byte."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
