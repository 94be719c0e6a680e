"""One layer's compactor: a small Perceiver from raw keys and values to compact slots.

Follows STILL (arXiv 2606.07878): latents cross-attend to `[RoPE^-1(K) ; V]`, then to each other, twice; linear
heads give compact keys and values. All shapes are per KV head; heads share projections and differ in their bank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .config import StillConfig
from .kernels import latent_attention
from .kernels.rope import strip_rope
from .placement import Placement, choose, inclusion

SCALE_GAIN = 10.0  # a scale is learned in its logarithm, at ten times the rate of the weights: it has far to go
POWER_GAIN = 30.0  # likewise the powers of `gain`
OPEN_SCALE = 8.0


def own_turns(positions: torch.Tensor, width: int, base: float) -> torch.Tensor:
    """The compactor's own rotary embedding at positions `[rows, n]`, as complex `[rows, 1, n, width / 2]`."""
    half = width // 2
    inverse = base ** -(torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angle = positions.to(torch.float32)[:, None, :, None] * inverse
    return torch.complex(angle.cos(), angle.sin())


def directions(x: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """Normalise `x` `[batch, heads, n, width]`, and turn its pairs of neighbouring dims as complex numbers.

    `x` is overwritten where no gradient needs it. Of all that a compaction does on a CPU, these passes over every
    token's key are the slowest but for the products themselves.
    """
    if x.requires_grad:
        x = F.normalize(x, dim=-1)
    else:
        x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12))
    if turns is None:
        return x
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    if x.requires_grad or len(turns) > len(x):  # one bank of latents stands elsewhere in each row
        return torch.view_as_real(pairs * turns).flatten(-2)
    pairs.mul_(turns)
    return x


def in_pairs(rows: torch.Tensor) -> torch.Tensor:
    """Rows `i` and `i + n / 2` of `[n, ...]`, which turn together, side by side."""
    return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


class Raw(NamedTuple):
    """A source that the kernels read as it is cached, and never as `[RoPE^-1(K) ; V]` in memory.

    Attributes:
        keys: `[batch, heads, T, head_dim]`.
        values: `[batch, heads, T, head_dim]`.
        strip: the model's cos and sin at the tokens, `[batch or 1, T, rotary_dim]`; None where nothing is rotated.
    """

    keys: torch.Tensor
    values: torch.Tensor
    strip: tuple[torch.Tensor, torch.Tensor] | None


class Attention(nn.Module):
    """One head with l2-normalised queries and keys: softmax(scale * q k^T) over the source, values projected last."""

    def __init__(self, width: int, source: int, scale: float, learned_scale: bool):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source, width)
        self.value = nn.Linear(source, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale) / SCALE_GAIN), requires_grad=learned_scale)

    def forward(self, latents, source, turns=None):
        """`latents` `[rows, heads, t, width]` are normalised already; `turns` rotate (queries, keys).

        `source` is `[batch, heads, T, 2 * head_dim]`, or `Raw` for the kernels.
        """
        if isinstance(source, Raw):
            return self.output(self.value(self._fused(F.normalize(self.query(latents), dim=-1), source, turns)))
        query, key = self._direction(self.query, latents, turns, 0), self._direction(self.key, source, turns, 1)
        # The scale goes into the queries: it may be learned, and sdpa takes a float.
        query = (query * (SCALE_GAIN * self.log_scale).exp()).expand(len(source), -1, -1, -1)
        mixed = F.scaled_dot_product_attention(query, key, source, scale=1.0)
        return self.output(self.value(mixed))  # W_v is linear, so it may follow the weighted sum

    def _fused(self, query: torch.Tensor, source: Raw, turns) -> torch.Tensor:
        """The weighted sums of the source's tokens by the kernels."""
        heads, latents, counts = *query.shape[1:3], None
        if turns is not None and turns[0].shape[1] > 1:  # each head's latents stand elsewhere: one head after the other
            query = query.expand(len(turns[0]), -1, -1, -1).flatten(1, 2)
            turns, counts = (turns[0].flatten(1, 2), turns[1]), (latents,) * heads
        mixed = latent_attention.latent_attention(
            query, source.keys, source.values, self.key.weight, self.key.bias, turns, strip=source.strip,
            scale=(SCALE_GAIN * self.log_scale).exp(), counts=counts,
        )  # fmt: skip
        return mixed if counts is None else mixed.unflatten(1, (heads, latents))

    def _direction(self, linear: nn.Linear, x: torch.Tensor, turns, which: int) -> torch.Tensor:
        if turns is None:
            return directions(linear(x))
        # Any order of dims gives the same scores; neighbouring pairs turn fastest.
        return directions(F.linear(x, in_pairs(linear.weight), in_pairs(linear.bias)), turns[which])


class Block(nn.Module):
    """Cross-attention to the tokens, self-attention among the latents, optionally a feed-forward part."""

    def __init__(self, width: int, source: int, config: StillConfig):
        super().__init__()
        self.eps = config.rms_eps
        self.cross = Attention(width, source, float(width), config.learned_scale)
        self.self_attention = Attention(width, width, float(width), config.learned_scale)
        hidden = config.feed_forward
        self.feed_forward = None
        if hidden:
            self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def rms(self, z: torch.Tensor) -> torch.Tensor:
        """RMS norm without parameters; its slope at zero is `eps ** -0.5`."""
        return z * (z.square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def forward(self, z, source, turns):
        """`z` `[batch or 1, heads, t, width]`, `source` and `turns` as `Attention` takes them."""
        z = z + self.cross(self.rms(z), source, turns)
        normed = self.rms(z)
        if isinstance(source, Raw):  # the latents are a source like another, in halves, and nothing turns them
            among = Raw(*normed.to(source.keys.dtype).chunk(2, dim=-1), None)
            z = z + self.self_attention(normed, among, None)
        else:
            z = z + self.self_attention(normed, normed)
        return z if self.feed_forward is None else z + self.feed_forward(self.rms(z))


class LayerPerceiver(nn.Module):
    """Latents of one layer. Fresh ones copy the token nearest to each latent's position.

    Args:
        head_dim: the model's head dim `d`; the latent is `2 d` wide unless the config says otherwise.
        kv_heads: banks, one per KV head (one for all with `shared_bank`).

    Raises:
        ValueError: the latent is narrower than `2 d`, where the identity start is not defined.
    """

    def __init__(self, head_dim: int, kv_heads: int, config: StillConfig):
        super().__init__()
        source = 2 * head_dim
        width = config.latent_width or source
        if width < source or width % 2:
            raise ValueError(
                f"latent_width is {width}; the identity start needs an even width of {source} (2 x head dim) or more"
            )
        self.bank = nn.Parameter(torch.zeros(1 if config.shared_bank else kv_heads, config.bank, width))
        self.blocks = nn.ModuleList(Block(width, source, config) for _ in range(config.blocks))
        self.key_head = nn.Linear(width, head_dim, bias=False)
        self.value_head = nn.Linear(width, head_dim, bias=False)
        self.beta_head = nn.Linear(width, 1, bias=False) if config.beta else None
        self.gain = nn.Parameter(torch.zeros(2, kv_heads, 1, 1)) if config.gain else None  # powers: of keys, of values
        self.fractional = config.fractional_positions
        self.rope_base = config.rope_base
        self.kv_heads = kv_heads
        self.placement = Placement(source, kv_heads, config.placement) if config.placement else None
        self.open_start, self.first_scale = config.open_start, config.first_scale
        self.identity_start()

    @torch.no_grad()
    def identity_start(self) -> None:
        """Set every weight so that a latent copies its nearest token (still-method, "Identity start")."""
        width, head_dim = self.key_head.in_features, self.key_head.out_features
        self.bank.zero_()
        for index, block in enumerate(self.blocks):
            for attention in (block.cross, block.self_attention):
                nn.init.zeros_(attention.query.weight)
                nn.init.zeros_(attention.key.weight)
                # The same direction with equal energy in every dim: one that sits on a single frequency aliases.
                nn.init.constant_(attention.query.bias, width**-0.5)
                nn.init.constant_(attention.key.bias, width**-0.5)
                nn.init.eye_(attention.value.weight)
                nn.init.zeros_(attention.output.weight)
            if index == 0:
                nn.init.eye_(block.cross.output.weight)
            if block.feed_forward is not None:
                nn.init.zeros_(block.feed_forward[-1].weight)
                nn.init.zeros_(block.feed_forward[-1].bias)
        nn.init.eye_(self.key_head.weight)
        nn.init.zeros_(self.value_head.weight)
        self.value_head.weight[:, head_dim : 2 * head_dim] = torch.eye(head_dim)
        if self.beta_head is not None:
            nn.init.zeros_(self.beta_head.weight)
        if self.gain is not None:
            nn.init.zeros_(self.gain)
        if self.first_scale is not None:
            nn.init.constant_(self.blocks[0].cross.log_scale, math.log(self.first_scale) / SCALE_GAIN)
        if self.open_start:
            silent = [block.self_attention for block in self.blocks] + [block.cross for block in self.blocks[1:]]
            for attention in silent:
                nn.init.normal_(attention.query.weight, std=1 / width)
                nn.init.normal_(attention.key.weight, std=1 / width)
                nn.init.constant_(attention.log_scale, math.log(OPEN_SCALE) / SCALE_GAIN)

    def latents(self, slots: int, heads: Sequence[int] | None = None) -> torch.Tensor:
        """The bank of some heads (all by default) for `slots` slots `[heads, slots, width]`.

        It is the bank itself at its trained size, resampled linearly at others.
        """
        bank = self.bank.expand(self.kv_heads, -1, -1)
        bank = bank if heads is None else bank[list(heads)]
        if slots != bank.shape[1]:
            bank = F.interpolate(bank.transpose(1, 2), size=slots, mode="linear", align_corners=True).transpose(1, 2)
        return bank

    def latent_positions(self, positions: torch.Tensor, slots: int) -> torch.Tensor:
        """`slots` positions from the first to the last of `positions` `[rows, T]`, rounded unless fractional."""
        first, last = positions[:, :1].double(), positions[:, -1:].double()
        steps = torch.linspace(0, 1, slots, dtype=torch.float64, device=positions.device)
        if slots == 1:
            steps = steps + 0.5  # a single slot sits in the middle
        spread = first + (last - first) * steps
        return spread.float() if self.fractional else spread.round().long()

    def turns(self, positions: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Own rotary table of tokens or latents at `positions` in a span from `start` `[rows, 1]`, for every layer."""
        # Small angles keep fp32 exact far into a context.
        return own_turns(positions - start, self.bank.shape[-1], self.rope_base)

    @staticmethod
    def plain(keys, values, strip=None) -> torch.Tensor:
        """Un-rotated keys and values side by side, `[batch, heads, T, 2 * head_dim]` in fp32; see `forward`."""
        keys, values = keys.float(), values.float()
        if strip is not None and keys.requires_grad:
            keys, strip = strip_rope(keys, *strip), None
        source = torch.cat((keys, values), dim=-1)
        if strip is not None:
            strip_rope(source[..., : keys.shape[-1]], *strip, inplace=True)
        return source

    def forward(self, keys, values, slots, turns, strip=None, heads=None, phase=None, worth=None):
        """Compact some heads of one layer.

        The Triton kernels read keys and values as they are cached, in their dtype; where those do not run, PyTorch
        un-rotates them once for all blocks, in fp32.

        Args:
            keys: `[batch, heads, T, head_dim]`.
            values: `[batch, heads, T, head_dim]`.
            slots: how many slots to make of each head.
            turns: what `turns` gives for the latents' positions, and for the tokens'.
            strip: the model's cos and sin at the tokens `[batch or 1, T, rotary_dim]`; None where keys are un-rotated.
            heads: indices of these KV heads; None for all of them.
            phase: of these heads, as `still.placement.phases` gives it; needed where latents are placed by worth.
            worth: of the tokens to all layers, where one of them has looked for all; None to look here.

        Returns:
            Un-rotated compact keys and values `[batch, heads, slots, head_dim]`, and beta `[batch, heads, slots]` or
            None.
        """
        fused = latent_attention.takes(keys, values, self.bank.shape[-1])
        looks = self.placement is not None and worth is None
        source = None if fused and not looks else self.plain(keys, values, strip)
        if self.placement is not None:
            share = inclusion(self.placement.worth(source, heads), slots) if looks else worth.share(slots)
            at = choose(share, slots, phase)[..., None]
            own = turns[1].expand(len(keys), keys.shape[1], -1, -1)
            turns = own.gather(2, at.expand(-1, -1, -1, own.shape[-1])), turns[1]  # a latent turns as its token does
        if fused:
            source = Raw(keys, values, strip)
        z = self.latents(slots, heads)[None]
        for block in self.blocks:
            z = block(z, source, turns)
        beta = None if self.beta_head is None else self.beta_head(z).squeeze(-1)
        small, mixed = self.key_head(z), self.value_head(z)
        if self.gain is not None:
            powers = self.gain if heads is None else self.gain[:, list(heads)]
            louder = (POWER_GAIN * powers * math.log(keys.shape[2] / slots)).exp()
            small, mixed = small * louder[0], mixed * louder[1]
        return small, mixed, beta
