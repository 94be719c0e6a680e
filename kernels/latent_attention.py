"""The compactor's cross-attention from latents to raw keys and values (STILL, arXiv 2606.07878, one head of a block).

For each KV head, with `X = [RoPE^-1 K ; V]`: keys are `W_k X + b_k`, of unit length and turned by the compactor's own
RoPE at the tokens' positions; the result is `softmax(scale * q k^T) X`. `W_v` is linear, so the caller applies it after
the weighted sum, to few latents instead of many tokens.

This module checks the arguments, holds the PyTorch reference, which is the ground truth, and picks it or the Triton
kernels (`latent_attention_triton`). What the kernels never write to memory: scores and, with few latents, anything
that grows with the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from . import dispatch
from .latent_attention_plan import unsupported

Pair = tuple[torch.Tensor, torch.Tensor]


def latent_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    turns: Pair | None,
    *,
    strip: Pair | None = None,
    scale: float | torch.Tensor = 1.0,
    counts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    padding: str = "left",
) -> torch.Tensor:
    """Attend from latents to the tokens of one layer; differentiable in all tensors but the tables.

    Inside a module whose cross-attention has linear layers `query` and `key`, on raw keys and values of the model:

        mixed = latent_attention(
            F.normalize(self.query(latents), dim=-1), keys, values, self.key.weight, self.key.bias, turns,
            strip=rotary.cos_sin(layer, positions), scale=self.scale,
        )
        out = self.output(self.value(mixed))

    Args:
        query: unit queries before the compactor's RoPE, `[batch or 1, kv_heads, latents, width]`; or, with `counts`,
            those of all heads, head after head: `[batch or 1, sum(counts), width]`.
        keys: `[batch, kv_heads, tokens, head_dim]`, as the model caches them.
        values: `[batch, kv_heads, tokens, head_dim]`, in the dtype of the keys.
        weight: `W_k` `[width, 2 * head_dim]`, first the columns for keys, then those for values.
        bias: `b_k` `[width]`.
        turns: the compactor's own RoPE at the latents and at the tokens, complex
            `[batch or 1, 1, latents or tokens, width / 2]` (`[batch or 1, sum(counts), width / 2]` for packed
            latents): the pair of dims `i` and `i + width / 2` turns by entry `i`. None where there is no such RoPE.
        strip: the model's cos and sin at the tokens, `[batch or 1, tokens, rotary_dim]`, halves alike, as its rotary
            module gives them; None where keys are un-rotated already.
        scale: of the scores, a number or a tensor of one number.
        counts: latents of each KV head, where they differ. A head may have none, but not all.
        lengths: tokens of each row, where rows are padded; what stands in the padding does not matter, NaN included.
        padding: the side on which shorter rows are padded, "left" or "right".

    Returns:
        The weighted sums of `[RoPE^-1 K ; V]`, `[batch, kv_heads, latents, 2 * head_dim]` (packed:
        `[batch, sum(counts), 2 * head_dim]`), in the dtype of the query.

    Raises:
        ValueError: shapes, dtypes, devices, counts or lengths that do not belong together; the text prints them.
    """
    counts = None if counts is None else tuple(int(each) for each in counts)
    _check(query, keys, values, weight, bias, turns, strip, scale, counts, lengths, padding)
    tokens = keys.shape[2]
    spans = None
    if lengths is not None:
        spans = [(tokens - n, tokens) if padding == "left" else (0, n) for n in lengths]
    query = (query if turns is None else turn(query, turns[0])) * scale
    if not takes(keys, values, weight.shape[0]):
        own = None if turns is None else turns[1]
        return reference(query, keys, values, weight, bias, own, strip, counts, spans).to(query.dtype)

    from .latent_attention_launch import LatentAttention

    if turns is None:
        own = torch.ones(1, 1, tokens, query.shape[-1] // 2, dtype=torch.complex64, device=keys.device)
    else:
        own = turns[1]
    packed = query if counts else query.flatten(1, 2)
    out = LatentAttention.apply(
        packed, *(x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values)), weight, bias,
        torch.view_as_real(own).flatten(0, -4).contiguous(),
        strip and tuple(table.contiguous() for table in strip),
        counts or (query.shape[2],) * keys.shape[1],
        torch.tensor(spans or [(0, tokens)] * len(keys), dtype=torch.int32, device=keys.device),
    )  # fmt: skip
    return (out if counts else out.unflatten(1, query.shape[1:3])).to(query.dtype)


def takes(keys: torch.Tensor, values: torch.Tensor, width: int) -> bool:
    """Whether the kernels run on these keys and values `[batch, kv_heads, tokens, head_dim]`; logs why where not.

    A caller that would prepare more than `latent_attention` asks for, to share it between calls, asks this first.

    Args:
        keys: as `latent_attention` takes them.
        values: as `latent_attention` takes them.
        width: of latents and projected keys.

    Raises:
        ValueError: the mode is `"triton"` and the kernels cannot run here.
    """

    def obstacle() -> str:
        if keys.shape[0] * keys.shape[1] > 65535:
            return f"it takes up to 65535 rows and heads together, not {keys.shape[0]} x {keys.shape[1]}"
        arch = 10 * dispatch.capability(keys.device)[0]
        return unsupported(keys.shape[-1], width, 8 * keys.element_size(), arch)

    return dispatch.runs_triton("latent_attention", (keys, values), obstacle)


def reference(query, keys, values, weight, bias, turns, strip=None, counts=None, spans=None) -> torch.Tensor:
    """The same in PyTorch, on any device. `query` is turned and scaled already, `turns` are the tokens' alone, or None.

    `spans` are the first and last token (exclusive) of each row. Runs in fp32, or fp64 where any of query and keys is.
    """
    dtype = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
    keys, values, weight, bias = (x.to(dtype) for x in (keys, values, weight, bias))
    source = torch.cat((keys if strip is None else unturn_model(keys, *strip), values), dim=-1)
    mask = None
    if spans is not None:
        at = torch.arange(keys.shape[2], device=keys.device)
        mask = torch.stack([(first <= at) & (at < stop) for first, stop in spans])[:, None, None]  # [B, 1, 1, T]
        source = source.masked_fill(~mask.transpose(-1, -2), 0.0)
    # Scores do not mind the order of dims, and pairs that turn together turn fastest side by side.
    projected = F.linear(source, _in_pairs(weight, 0), _in_pairs(bias, 0))
    key = F.normalize(projected, dim=-1)
    if turns is not None:
        pairs = torch.view_as_complex(key.unflatten(-1, (-1, 2)))
        key = torch.view_as_real(pairs * turns.reshape(-1, 1, *turns.shape[-2:])).flatten(-2).to(dtype)
    query = _in_pairs(query.to(dtype), -1).expand(len(keys), *query.shape[1:])
    if counts is None:
        return F.scaled_dot_product_attention(query, key, source, attn_mask=mask, scale=1.0)
    mask = None if mask is None else mask[:, 0]
    heads = zip(query.split(counts, dim=1), key.unbind(1), source.unbind(1), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*head, attn_mask=mask, scale=1.0) for head in heads], dim=1)


def turn(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of dims `i` and `i + width / 2` of `x` by complex `turns` `[..., width / 2]`."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = turns.real.to(x.dtype), turns.imag.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def unturn_model(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Undo the model's RoPE; tables scaled by an attention factor `s` are divided by `s^2`."""
    cos, sin = (table.to(keys.dtype).unsqueeze(1) for table in (cos, sin))
    turned, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat((second, -first), dim=-1) * sin) / (cos.square() + sin.square())
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _in_pairs(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Entries `i` and `i + n / 2` of the first (0) or the last dim (-1) of `x` side by side."""
    both = (0, 1) if dim == 0 else (-2, -1)
    return x.unflatten(dim, (2, -1)).transpose(*both).flatten(*both)


def _check(query, keys, values, weight, bias, turns, strip, scale, counts, lengths, padding) -> None:
    """Refuse what the kernels would read wrongly."""
    tensors = {
        "query": query, "keys": keys, "values": values, "weight": weight, "bias": bias,
    }  # fmt: skip
    if turns is not None:
        tensors |= {"turns[0]": turns[0], "turns[1]": turns[1]}
    if strip is not None:
        tensors |= {"strip[0]": strip[0], "strip[1]": strip[1]}
    if isinstance(scale, torch.Tensor):
        tensors["scale"] = scale
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
    devices = {x.device for x in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"the tensors lie on several devices, {sorted(map(str, devices))}; bring them together")
    if keys.dtype != values.dtype or not keys.is_floating_point():
        raise ValueError(f"keys are {keys.dtype} and values {values.dtype}; both must be of one float dtype")

    def require(right: bool, rule: str) -> None:
        if not right:
            raise ValueError(f"{rule}; got {shapes}")

    require(keys.ndim == 4 and keys.shape == values.shape and keys.numel() > 0, "keys and values must be alike and 4-D")
    batch, heads, tokens, head_dim = keys.shape
    width = query.shape[-1]
    require(width % 2 == 0 and weight.shape == (width, 2 * head_dim), "weight must be [even width, 2 x head dim]")
    require(bias.shape == (width,), f"bias must be [{width}]")
    if counts is None:
        require(query.ndim == 4 and query.shape[1] == heads, f"query must be [{batch} or 1, {heads}, latents, width]")
        places = [1, query.shape[2], width // 2]
    else:
        require(query.ndim == 3, f"query must be [{batch} or 1, latents of all heads, width] with counts")
        places = [query.shape[1], width // 2]
        if len(counts) != heads or min(counts) < 0 or sum(counts) != query.shape[1]:
            raise ValueError(
                f"counts are {counts}; they must be {heads} numbers, none negative, that sum to the query's latents; "
                f"got {shapes}"
            )
    require(query.shape[0] in (1, batch) and query.numel() > 0, f"query must hold latents for {batch} rows, or for one")
    for name, x, wanted in zip(
        ("turns[0]", "turns[1]"), turns or (), (places, [1, tokens, width // 2]), strict=False
    ):
        fits = x.is_complex() and x.shape[0] in (1, batch) and list(x.shape[1:]) == wanted
        require(fits, f"{name} must be complex {[f'{batch} or 1', *wanted]}")
    if strip is not None:
        rotary = strip[0].shape[-1]
        fits = strip[0].shape == strip[1].shape and strip[0].shape[0] in (1, batch) and strip[0].shape[1] == tokens
        fits = fits and strip[0].ndim == 3 and rotary % 2 == 0 and 0 < rotary <= head_dim
        require(fits, f"strip must be cos and sin, both [{batch} or 1, {tokens}, even rotary dim up to {head_dim}]")
    require(not isinstance(scale, torch.Tensor) or scale.numel() == 1, "scale must be one number")
    if padding not in ("left", "right"):
        raise ValueError(f"padding is {padding!r}; it must be 'left' or 'right'")
    if lengths is not None and (len(lengths) != batch or not all(1 <= n <= tokens for n in lengths)):
        raise ValueError(f"lengths are {list(lengths)}; they must be {batch} numbers from 1 to {tokens}; got {shapes}")
