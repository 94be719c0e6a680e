"""Runs the Triton kernels of `latent_attention`, forward and backward, as one autograd function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from . import dispatch
from . import latent_attention_backward as backward_kernels
from . import latent_attention_plan as plan
from . import latent_attention_triton as forward_kernels


@dataclass
class Inputs:
    """What all kernels read. `B` batch, `H` KV heads, `T` tokens, `D` head dim, `N` latents of all heads, `W` width.

    Attributes:
        query: `[1 or B, N, W]`, rotated and scaled, times log2(e), in the dtype of the keys.
        keys: `[B, H, T, D]`, last dim contiguous, as `values`.
        values: `[B, H, T, D]`.
        weight: `[W, 2 D]` in the dtype of the keys.
        bias: `[W]` in fp32.
        turns: the compactor's own RoPE at the tokens `[1 or B, T, W / 2, 2]`, cos and sin side by side.
        strip: the model's cos and sin at the tokens, both `[1 or B, T, R]`, or None.
        counts: latents of each head.
        spans: first and last token (exclusive) of each row, `[B, 2]` on the device.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    turns: torch.Tensor
    strip: tuple[torch.Tensor, torch.Tensor] | None
    counts: tuple[int, ...]
    spans: torch.Tensor

    def __post_init__(self):
        major, minor = dispatch.capability(self.keys.device)
        head_dim, width = self.keys.shape[-1], self.weight.shape[0]
        self.shape = plan.Shape(
            head_dim, self.strip[0].shape[-1] if self.strip else head_dim // 2 * 2, width, self.strip is not None,
            self.keys.element_size() * 8, 10 * major + minor,
        )  # fmt: skip
        self.processors = dispatch.processors(self.keys.device)
        # W_k and b_k as the kernels read them: halves and sides padded to whole blocks.
        rest = (plan.block(width // 2) - width // 2, plan.block(head_dim) - head_dim)
        weight = F.pad(self.weight.unflatten(0, (2, -1)).unflatten(2, (2, -1)), (0, rest[1], 0, 0, 0, rest[0]))
        self.padded = weight.contiguous(), F.pad(self.bias.unflatten(0, (2, -1)), (0, rest[0])).contiguous()

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Cos, sin and how many rows they have; any tensor will do where nothing is to strip."""
        return (*self.strip, self.strip[0].shape[0]) if self.strip else (self.bias, self.bias, 1)

    def block(self, kernel: str, name: str, **constants) -> int:
        """One block size of a kernel, where the grid depends on it."""
        return plan.config(kernel, self.shape, **constants).blocks[name]

    def run(self, kernel, grid, *args, **constants) -> None:
        """Launch one kernel with the blocks that the plan gives it."""
        chosen = plan.config(kernel.__name__, self.shape, **constants)
        constants = {**self.shape.constants(), **constants, **chosen.blocks}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        dispatch.launch(kernel, grid, *args, **constants, num_warps=chosen.warps, num_stages=chosen.stages)


def ceil_div(size: int, by: int) -> int:
    """Blocks of `by` that cover `size`."""
    return -(-size // by)


@lru_cache(maxsize=64)
def _tiles(counts: tuple[int, ...], size: int, device: torch.device) -> torch.Tensor:
    """Blocks of at most `size` latents that share a head: head, first latent, end of the head's latents."""
    rows, start = [], 0
    for head, count in enumerate(counts):
        rows += [(head, start + first, start + count) for first in range(0, count, size)]
        start += count
    return torch.tensor(rows, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _offsets(counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor((0, *counts), dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def project(x: Inputs, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys of `size` tokens from `start` on: unit and rotated `[B, H, size, W]`, stripped, and one over their norms."""
    batch, heads, tokens, head_dim = x.keys.shape
    key = x.keys.new_empty(batch, heads, size, x.shape.width)
    stripped = x.keys.new_empty(batch, heads, size, head_dim) if x.strip else x.keys[:, :, start : start + size]
    inverse = x.bias.new_empty(batch, heads, size)
    cos, sin, table_rows = x.tables
    x.run(
        forward_kernels.project_kernel,
        (ceil_div(size, x.block("project_kernel", "BT")), batch * heads),
        x.keys, x.values, cos, sin, x.turns, *x.padded, x.spans, key, stripped, inverse,
        start, size, tokens, heads, *x.keys.stride()[:3], *x.values.stride()[:3], table_rows, x.turns.shape[0],
    )  # fmt: skip
    return key, stripped, inverse


def forward_pass(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sums `[B, N, 2 D]` and log-sum-exps of the scores, base 2, `[B, N]`, both in fp32."""
    batch, heads, tokens, head_dim = x.keys.shape
    latents = sum(x.counts)
    few = plan.one_pass(max(x.counts), x.shape)
    kernel = forward_kernels.one_pass_kernel if few else forward_kernels.attend_kernel
    block = x.block(kernel.__name__, "BT")
    tiles = _tiles(x.counts, x.block(kernel.__name__, "BQ"), x.keys.device)
    parts = plan.parts(tokens, len(tiles) * batch, x.processors, 4 * block)
    part = ceil_div(ceil_div(tokens, parts), block) * block
    out = x.bias.new_empty(parts, batch, latents, 2 * head_dim)
    lse = x.bias.new_empty(parts, batch, latents)
    grid, rows = (len(tiles), batch, parts), x.query.shape[0]
    if few:
        cos, sin, table_rows = x.tables
        x.run(
            kernel, grid,
            x.query, x.keys, x.values, cos, sin, x.turns, *x.padded, x.spans, tiles, out, lse,
            tokens, latents, batch, part, rows, *x.keys.stride()[:3], *x.values.stride()[:3],
            table_rows, x.turns.shape[0],
        )  # fmt: skip
    else:
        key, stripped, _ = project(x, 0, tokens)
        x.run(
            kernel, grid,
            x.query, key, stripped, x.values, x.spans, tiles, out, lse,
            tokens, latents, heads, batch, part, rows, *stripped.stride()[:3], *x.values.stride()[:3],
        )  # fmt: skip
    if parts == 1:
        return out[0], lse[0]
    merged, merged_lse = torch.empty_like(out[0]), torch.empty_like(lse[0])
    dispatch.launch(
        forward_kernels.merge_kernel, (batch * latents,),
        out, lse, merged, merged_lse, parts, batch * latents, X=2 * head_dim, BX=plan.block(2 * head_dim), num_warps=4,
    )  # fmt: skip
    return merged, merged_lse


def backward_pass(
    x: Inputs, out: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor, source: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of the latents `[B, N, W]`, W_k, b_k and, with `source`, of X `[B, H, T, 2 D]`, all in fp32 but X's.

    The latents' gradient is that of the scaled queries, without log2(e).
    """
    batch, heads, tokens, head_dim = x.keys.shape
    latents, width, device = sum(x.counts), x.shape.width, x.keys.device
    grad = grad.to(x.keys.dtype).contiguous()
    delta = (grad.float() * out).sum(-1)  # of the rounded gradient, as the kernels read it: the difference is small
    size = plan.chunk(tokens)
    tiles = _tiles(x.counts, x.block("query_grad_kernel", "BQ"), device)
    parts = plan.parts(size, len(tiles) * batch, x.processors, 512)
    part = ceil_div(size, parts)
    sides = ceil_div(width, x.block("weight_grad_kernel", "BM")), 2
    block = x.block("weight_grad_kernel", "BT")
    shares = (*sides, plan.parts(size * batch * heads, sides[0] * sides[1], x.processors, 8 * block))
    grad_query = x.bias.new_zeros(parts, batch, latents, width)
    grad_weight, grad_bias = x.bias.new_zeros(shares[2], width, 2 * head_dim), x.bias.new_zeros(shares[2], width)
    grad_source = x.keys.new_empty(batch, heads, tokens, 2 * head_dim) if source else None
    for start in range(0, tokens, size):
        here = min(size, tokens - start)
        key, stripped, inverse = project(x, start, here)
        values = x.values[:, :, start : start + here]
        strides = (*stripped.stride()[:3], *values.stride()[:3])
        x.run(
            backward_kernels.query_grad_kernel, (len(tiles), batch, parts),
            x.query, key, stripped, values, x.spans, tiles, lse, delta, grad, grad_query,
            start, here, latents, heads, batch, part, x.query.shape[0], *strides,
        )  # fmt: skip
        grad_key = torch.empty_like(key)
        chunk_source = key.new_empty(batch, heads, here, 2 * head_dim) if source else grad_key
        x.run(
            backward_kernels.key_grad_kernel,
            (ceil_div(here, x.block("key_grad_kernel", "BT", SOURCE=source)), batch * heads),
            x.query, key, stripped, values, inverse, x.turns, x.spans, _offsets(x.counts, device), lse, delta, grad,
            grad_key, chunk_source,
            start, here, tokens, latents, heads, x.query.shape[0], x.turns.shape[0], *strides, SOURCE=source,
        )  # fmt: skip
        x.run(
            backward_kernels.weight_grad_kernel, shares,
            grad_key, stripped, values, x.spans, grad_weight, grad_bias,
            start, here, heads, ceil_div(here, block) * batch * heads, *strides,
        )  # fmt: skip
        if source:
            grad_source[:, :, start : start + here] = chunk_source + grad_key @ x.weight
    return grad_query.sum(0), grad_weight.sum(0), grad_bias.sum(0), grad_source


def _restore(grad: torch.Tensor, strip: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """The transpose of stripping: from the gradient of stripped keys to that of rotated ones."""
    if strip is None:
        return grad
    cos, sin = (table.float().unsqueeze(1) for table in strip)
    rotary = cos.shape[-1]
    square = cos.square() + sin.square()
    turned = grad[..., :rotary].float()
    first, second = turned.chunk(2, -1)
    turned = (turned * cos + torch.cat((-second, first), -1) * sin) / square
    return torch.cat((turned.to(grad.dtype), grad[..., rotary:]), -1)


class LatentAttention(torch.autograd.Function):
    """Packed queries `[1 or B, N, W]` in any float dtype to weighted sums `[B, N, 2 D]` in fp32."""

    @staticmethod
    def forward(ctx, query, keys, values, weight, bias, turns, strip, counts, spans):
        """Arguments as `Inputs`, but the query without log2(e) and the parameters in their own dtypes."""
        dtype = keys.dtype
        x = Inputs(
            (query * math.log2(math.e)).to(dtype).contiguous(), keys, values, weight.to(dtype).contiguous(),
            bias.float().contiguous(), turns, strip, counts, spans,
        )  # fmt: skip
        out, lse = forward_pass(x)
        ctx.save_for_backward(x.query, keys, values, x.weight, x.bias, turns, *(strip or (None, None)), spans, out, lse)
        ctx.counts, ctx.dtypes = counts, (query.dtype, weight.dtype, bias.dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Gradients of latents, W_k and b_k; of keys and values where they are asked for."""
        query, keys, values, weight, bias, turns, cos, sin, spans, out, lse = ctx.saved_tensors
        strip = None if cos is None else (cos, sin)
        x = Inputs(query, keys, values, weight, bias, turns, strip, ctx.counts, spans)
        source = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        # Small gradients vanish in fp16: take them near one, and back afterwards, in fp32.
        gain = grad.abs().amax().clamp_min(1e-30) if keys.dtype == torch.float16 else None
        grads = list(backward_pass(x, out, lse, grad if gain is None else grad / gain, source))
        if gain is not None:
            grads = [each if each is None else (each.float() * gain).to(each.dtype) for each in grads]
        grad_query, grad_weight, grad_bias, grad_source = grads
        if query.shape[0] == 1:
            grad_query = grad_query.sum(0, keepdim=True)
        grad_keys = grad_values = None
        if source:
            grad_keys, grad_values = grad_source.chunk(2, -1)
            grad_keys = _restore(grad_keys, strip)
        first, second, third = ctx.dtypes
        return (
            grad_query.to(first), grad_keys, grad_values, grad_weight.to(second), grad_bias.to(third),
            None, None, None, None,
        )  # fmt: skip
