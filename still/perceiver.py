"""The compactor of each layer: a small Perceiver from raw keys and values to compact slots.

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
from .kernels.prefix_attention import merge_attention, prefix_attention
from .kernels.rope import restore_rope
from .placement import Placement, Worth, choose, inclusion
from .rope import Turning
from .together import Together, differentiated, linear, stacked

SCALE_GAIN = 10.0  # a scale is learned in its logarithm, at ten times the rate of the weights: it has far to go
POWER_GAIN = 30.0  # likewise the powers of `gain`
OPEN_SCALE = 8.0
PIECE = 2**23
"""Bytes of a layer's keys that are made at once on a CPU, whose caches hold them until they are used."""
TRACE = 1e-3  # of what latents hold, in fresh queries and keys of their self-attention


def own_turns(positions: torch.Tensor, width: int, base: float) -> torch.Tensor:
    """The compactor's own rotary embedding at positions `[rows, n]`, as complex `[rows, 1, n, width / 2]`."""
    half = width // 2
    inverse = base ** -(torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angle = positions.to(torch.float32)[:, None, :, None] * inverse
    return torch.complex(angle.cos(), angle.sin())


def directions(x: torch.Tensor, turns: torch.Tensor | None = None) -> torch.Tensor:
    """Normalise `x` `[..., n, width]`, and turn its pairs of neighbouring dims as complex numbers.

    `x` is overwritten where no gradient needs it. Of all that a compaction does on a CPU, these passes over every
    token's key are the slowest but for the products themselves.
    """
    if x.requires_grad:
        x = F.normalize(x, dim=-1)
    else:
        x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12))
    if turns is None:
        return x
    pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
    if x.requires_grad:
        return torch.view_as_real(pairs * turns).flatten(-2)
    pairs.mul_(turns)
    return x


def in_pairs(rows: torch.Tensor) -> torch.Tensor:
    """Rows `i` and `i + n / 2` of `[layers, n, ...]`, which turn together, side by side.

    Any order of dims gives the same scores, and neighbouring pairs turn fastest.
    """
    return rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def turned(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Dims `i` and `i + width / 2` of `x` `[..., width]`, side by side as `in_pairs` has them, and turned."""
    return torch.view_as_real(torch.complex(*x.chunk(2, dim=-1)) * turns).flatten(-2)


class Raw(NamedTuple):
    """Sources that the kernels read as they are cached, and never as `[RoPE^-1(K) ; V]` in memory.

    Attributes:
        keys: of each layer `[batch, heads, T, head_dim]`.
        values: of each layer `[batch, heads, T, head_dim]`.
        strip: how the model rotates the tokens; None where nothing is rotated.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    strip: Turning | None


class Room:
    """Memory that one use after another overwrites. Where it is fresh, its pages cost as much as what they are for."""

    def __init__(self) -> None:
        self.numbers = torch.empty(0)

    def take(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """A tensor of that shape in fp32, on the device of `like`; what was taken before is lost."""
        count = math.prod(shape)
        if len(self.numbers) < count or self.numbers.device != like.device:
            self.numbers = like.new_empty(count, dtype=torch.float32)
        return self.numbers[:count].view(shape)


def plain(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], strip: Turning | None = None, room: Room | None = None
) -> Sequence[torch.Tensor]:
    """Un-rotated keys and values of several layers side by side, of each `[batch, heads, T, 2 * head_dim]` in fp32.

    Args:
        keys: of each layer `[batch, heads, T, head_dim]`.
        values: of each layer `[batch, heads, T, head_dim]`.
        strip: how the model rotates the tokens; None where keys are un-rotated.
        room: where they are put, unless a gradient is wanted.
    """
    if differentiated((*keys, *values)):
        turned = keys if strip is None else [restore_rope(x.float(), *strip.back) for x in keys]
        return [torch.cat((x.float(), y.float()), dim=-1) for x, y in zip(turned, values, strict=True)]
    width = keys[0].shape[-1]
    whole = (room or Room()).take((len(keys), *keys[0].shape[:-1], 2 * width), keys[0])
    for own, own_keys, own_values in zip(whole, keys, values, strict=True):
        own[..., width:].copy_(own_values)
        if strip is None:
            own[..., :width].copy_(own_keys)
        else:
            restore_rope(own_keys, *strip.back, out=own[..., :width])
    return whole


class Attention(nn.Module):
    """Weights of one head with l2-normalised queries and keys; see `attend`."""

    def __init__(self, width: int, source: int, scale: float, learned_scale: bool):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source, width)
        self.value = nn.Linear(source, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale) / SCALE_GAIN), requires_grad=learned_scale)


def attend(of: Together, latents: torch.Tensor, source, turns=None) -> torch.Tensor:
    """softmax(scale * q k^T) over the source, values projected last, in several layers at once.

    Args:
        of: `Attention` of each layer.
        latents: `[layers, rows, heads, t, width]`, normalised already.
        source: of each layer `[batch, heads, T, 2 * head_dim]`; one tensor of all layers where it is the latents; or
            `Raw` for the kernels.
        turns: rotate queries and keys, complex `[layers or 1, batch or 1, heads or 1, n, width / 2]`.
    """
    # The scale goes into the queries: it may be learned, and sdpa takes a float.
    query = directions(linear(of.query, latents)) * (SCALE_GAIN * of.log_scale).exp()[:, None, None, None, None]
    if isinstance(source, Raw):
        mixed = _fused(of.key, query, source, turns)
    elif turns is None:  # latents among themselves
        key = directions(linear(of.key, source))
        mixed = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (query, key, source)), scale=1.0)
        mixed = mixed.unflatten(0, source.shape[:2])
    else:
        mixed = _over_tokens(of.key, turned(query, turns[0]), source, turns[1][0])
    return linear(of.output, linear(of.value, mixed))  # W_v is linear, so it may follow the weighted sum


def _over_tokens(key: Together, queries: torch.Tensor, sources: Sequence[torch.Tensor], turns) -> torch.Tensor:
    """The weighted sums of each layer's tokens; its keys are made and used up before another layer's are."""
    mixed, room = [], Room()
    weights, biases = in_pairs(key.weight), in_pairs(key.bias)
    kept = differentiated((weights, biases, queries, *sources))
    every = zip(weights.unbind(), biases.unbind(), queries.unbind(), sources, strict=True)
    for weight, bias, query, source in every:
        query = query.expand(len(source), -1, -1, -1)
        step = max(1, PIECE // (4 * source[:, :, 0, 0].numel() * len(bias)))
        if not kept and source.is_cpu and step < source.shape[2] and query.shape[2] <= len(bias):
            mixed.append(_over_pieces(query, weight, bias, source, turns, step, room))
            continue
        if kept:  # for the way back
            keys = F.linear(source, weight, bias)
        else:
            keys = room.take((*source.shape[:-1], len(bias)), source)
            torch.addmm(bias, source.flatten(0, -2), weight.mT, out=keys.view(-1, len(bias)))
        mixed.append(F.scaled_dot_product_attention(query, directions(keys, turns), source, scale=1.0))
    return stacked(mixed)


def _over_pieces(query, weight, bias, source, turns, step: int, room: Room) -> torch.Tensor:
    """The weighted sums of one layer's tokens, `step` at a time: its keys stay in a CPU's caches until they are used.

    With many latents it would gain nothing: their sums are as large as the keys, and are merged piece by piece.
    """
    rows, heads, whole = len(source), source.shape[1], None
    weight, bias = weight.mT.expand(rows * heads, -1, -1), bias.expand(rows * heads, 1, -1)
    for piece, own in zip(source.split(step, dim=2), turns.split(step, dim=-2), strict=True):
        keys = room.take((rows * heads, piece.shape[2], bias.shape[-1]), source)
        torch.baddbmm(bias, piece.flatten(0, 1), weight, out=keys)
        part = prefix_attention(query, directions(keys.unflatten(0, (rows, heads)), own), piece, scale=1.0)
        whole = part if whole is None else merge_attention(whole, part)
    return whole[0]


def _fused(key: Together, queries: torch.Tensor, source: Raw, turns) -> torch.Tensor:
    """The weighted sums of each layer's tokens by the kernels, `[layers, batch, heads, t, 2 * head_dim]`."""
    heads, latents = queries.shape[2:4]
    mixed = []
    strip = source.strip and (source.strip.cos, source.strip.sin)
    every = zip(key.weight.unbind(), key.bias.unbind(), queries.unbind(), strict=True)
    for index, (weight, bias, query) in enumerate(every):
        own, counts = None, None
        if turns is not None:
            at, tokens = turns[0][min(index, len(turns[0]) - 1)], turns[1][0]
            if at.shape[1] > 1:  # each head's latents stand elsewhere: one head after the other
                query = query.expand(len(at), -1, -1, -1).flatten(1, 2)
                at, counts = at.flatten(1, 2), (latents,) * heads
            own = at, tokens
        out = latent_attention.latent_attention(
            query, source.keys[index], source.values[index], weight, bias, own, strip=strip, counts=counts
        )
        mixed.append(out if counts is None else out.unflatten(1, (heads, latents)))
    return stacked(mixed)


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


def rms(z: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm without parameters; its slope at zero is `eps ** -0.5`."""
    return F.rms_norm(z, z.shape[-1:], eps=eps)


def pass_block(of: Together, z: torch.Tensor, source, turns) -> torch.Tensor:
    """Latents `z` `[layers, rows, heads, t, width]` after a `Block`; `source` and `turns` as `attend` takes them."""
    z = z + attend(of.cross, rms(z, of.eps), source, turns)
    normed = among = rms(z, of.eps)
    if isinstance(source, Raw):  # the latents are a source like another, in halves, and nothing turns them
        keys, values = normed.to(source.keys[0].dtype).chunk(2, dim=-1)
        among = Raw(keys.unbind(), values.unbind(), None)
    z = z + attend(of.self_attention, normed, among)
    if of.feed_forward is None:
        return z
    into, _, out = of.feed_forward
    return z + linear(out, F.silu(linear(into, rms(z, of.eps))))


def resampled(bank: torch.Tensor, slots: int) -> torch.Tensor:
    """Latents `[heads, slots, width]` of banks `[heads, trained slots, width]`: the banks themselves at their size."""
    if slots == bank.shape[1]:
        return bank
    return F.interpolate(bank.transpose(1, 2), size=slots, mode="linear", align_corners=True).mT.contiguous()


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
        """Set every weight so that a latent copies its nearest token.

        What adds nothing at first (self-attention, later blocks) has outputs of zero.
        """
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
            # Where all queries and keys are alike, their gradients are rounding noise, and training waits for luck.
            for linear_map in (block.self_attention.query, block.self_attention.key):
                nn.init.eye_(linear_map.weight).mul_(TRACE)
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

    def forward(self, keys, values, slots, turns, strip=None, heads=None, phase=None, worth=None):
        """Compact some heads of this layer alone: `perceive`, without the dim of layers."""
        turns = tuple(table[None] for table in turns)
        phases = None if phase is None else [phase]
        out = perceive(Together([self]), [keys], [values], slots, turns, strip, heads, phases, worth)
        return tuple(None if x is None else x[0] for x in out)


def perceive(
    of: Together,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    slots: int,
    turns,
    strip: Turning | None = None,
    heads: Sequence[int] | None = None,
    phases: Sequence[torch.Tensor] | None = None,
    worth: Worth | int | None = None,
    room: Room | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compact some heads of several layers at once.

    What is done to latents is small: in many layers one after the other, calling the operations takes longer than they
    do. The Triton kernels read keys and values as they are cached, in their dtype; where those do not run, PyTorch
    un-rotates them once for all blocks, in fp32.

    Args:
        of: `LayerPerceiver` of each layer.
        keys: of each layer `[batch, heads, T, head_dim]`.
        values: of each layer `[batch, heads, T, head_dim]`.
        slots: how many slots to make of each head.
        turns: what `LayerPerceiver.turns` gives for the latents' positions, and for the tokens', with a dim of layers
            before it: `[1, batch or 1, 1, n, width / 2]`. Those of latents that are placed are their tokens'.
        strip: how the model rotates the tokens; None where keys are un-rotated.
        heads: indices of these KV heads; None for all of them.
        phases: of these heads of each layer, as `still.placement.phases` gives them; needed where latents are placed by
            worth.
        worth: of the tokens to all layers, where one has looked for all; which of these layers is to look for all,
            counted from 0; or None, where each looks for itself.
        room: for un-rotated keys and values; only where nothing is kept for a gradient.

    Returns:
        Un-rotated compact keys and values `[layers, batch, heads, slots, head_dim]`, and beta
        `[layers, batch, heads, slots]` or None.
    """
    tokens, bank = keys[0].shape[2], of.bank.expand(-1, of.kv_heads, -1, -1)
    fused = latent_attention.takes(keys[0], values[0], bank.shape[-1])
    looks = of.placement is not None and not isinstance(worth, Worth)
    source = None
    if looks or not fused:
        source = plain(keys, values, strip, room)
    if of.placement is not None:
        if isinstance(worth, int):
            worth = Worth(of.parts[worth].placement.common_worth(source[worth]))
        if worth is None:
            seen = [part.placement.worth(own, heads) for part, own in zip(of.parts, source, strict=True)]
            at = stacked([choose(inclusion(x, slots), slots, p) for x, p in zip(seen, phases, strict=True)])
        else:
            at = choose(worth.share(slots), slots, torch.cat(tuple(phases)))
            at = at.unflatten(1, (len(keys), -1)).transpose(0, 1)
        own = turns[1].expand(*at.shape[:3], -1, -1)
        at = at[..., None].expand(-1, -1, -1, -1, own.shape[-1])
        turns = own.gather(3, at), turns[1]  # a latent turns as its token does
    if fused:
        source = Raw(keys, values, strip)
    bank = bank if heads is None else bank[:, list(heads)]
    z = resampled(bank.flatten(0, 1), slots).unflatten(0, bank.shape[:2])[:, None]
    for block in of.blocks:
        z = pass_block(block, z, source, turns)
    small, mixed = linear(of.key_head, z), linear(of.value_head, z)
    beta = None if of.beta_head is None else linear(of.beta_head, z).squeeze(-1)
    if of.gain is not None:
        powers = of.gain if heads is None else of.gain[:, :, list(heads)]
        louder = (POWER_GAIN * powers * math.log(tokens / slots)).exp()[:, :, None]
        small, mixed = small * louder[:, 0], mixed * louder[:, 1]
    return small, mixed, beta
