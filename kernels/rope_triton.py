"""Rotary embeddings stripped and restored in Triton: keys are read and written once, tables once for many heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import dispatch


@triton.jit
def sincos(angle):
    """Sine and cosine of fp32 angles up to 2**24, to an fp32 rounding or two.

    The quarter turn is taken off in fp64, once for many heads; the rest are polynomials on +-pi/4. (libdevice
    keeps a table for large angles in local memory, which is the stack.)
    """
    wide = angle.to(tl.float64)
    quarter = tl.floor(wide * 0.6366197723675814 + 0.5)
    r = (wide - quarter * 1.5707963267948966).to(tl.float32)
    turns = quarter.to(tl.int32) & 3
    s = r * r
    sine = r + r * s * (-1.6666654611e-1 + s * (8.3321608736e-3 - s * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * s + s * s * (4.166664568298827e-2 + s * (-1.388731625493765e-3 + s * 2.443315711809948e-5))
    odd = (turns & 1) == 1
    sin = tl.where(odd, cosine, sine)
    cos = tl.where(odd, sine, cosine)
    return tl.where(turns >= 2, -sin, sin), tl.where((turns == 1) | (turns == 2), -cos, cos)


@triton.jit
def turn(
    p_x, p_out, p_first, p_second, scaling, heads, heads_each, tokens, s_xb, s_xh, s_xt, s_ob, s_oh, s_ot, s_tb, s_tt,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_T: tl.constexpr,
    POSITIONS: tl.constexpr, INVERSE: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """A block of tokens of some heads of one row: `p_first, p_second` are cos and sin, or positions and frequencies."""
    i_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_b = tl.program_id(1).to(tl.int64)
    i_f = tl.arange(0, BLOCK_HALF)
    m_t, m_f = i_t < tokens, i_f < HALF
    mask = m_t[:, None] & m_f[None, :]
    if POSITIONS:
        where = tl.load(p_first + i_b * s_tb + i_t * s_tt, mask=m_t, other=0).to(tl.float32)
        where = tl.where(tl.abs(where) < 16777216.0, where, float("nan"))
        sin, cos = sincos(where[:, None] * tl.load(p_second + i_f, mask=m_f, other=0.0).to(tl.float32)[None, :])
        sin, cos = sin * scaling, cos * scaling  # [BLOCK_T, BLOCK_HALF]
    else:
        place = i_b * s_tb + i_t[:, None] * s_tt + i_f[None, :]
        cos = tl.load(p_first + place, mask=mask, other=1.0).to(tl.float32)  # [BLOCK_T, BLOCK_HALF]
        sin = tl.load(p_second + place, mask=mask, other=0.0).to(tl.float32)
    if DIVIDE:
        square = cos * cos + sin * sin
        cos, sin = cos / square, sin / square
    if INVERSE:
        sin = -sin
    p_x += i_b * s_xb
    p_out += i_b * s_ob
    first_head = tl.program_id(2) * heads_each
    for i_h in range(first_head, tl.minimum(first_head + heads_each, heads)):
        p_in = p_x + i_h * s_xh + i_t[:, None] * s_xt + i_f[None, :]
        p_to = p_out + i_h * s_oh + i_t[:, None] * s_ot + i_f[None, :]
        first = tl.load(p_in, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(p_in + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_to, (first * cos - second * sin).to(p_out.dtype.element_ty), mask=mask)
        tl.store(p_to + HALF, (second * cos + first * sin).to(p_out.dtype.element_ty), mask=mask)


def run(x, first, second, scaling, positions, inverse, divide, out):
    """Turn `x` into `out`, which may be `x` itself."""
    batch, heads, tokens, head_dim = x.shape
    half = second.shape[-1] if positions else first.shape[-1] // 2
    block_half = triton.next_power_of_2(half)
    if head_dim > 2 * half and out is not x:
        out[..., 2 * half :].copy_(x[..., 2 * half :])
    # A program holds up to 2,048 pairs, 16 of each thread, whatever the head dim.
    block_t = max(min(2048 // block_half, triton.next_power_of_2(tokens)), 1)
    blocks = triton.cdiv(tokens, block_t)
    # A program turns several heads by the tables it has loaded, as long as eight programs are left for each processor.
    heads_each = max(min(blocks * batch * heads // (8 * dispatch.processors(x.device)), heads), 1)
    dispatch.launch(
        turn, (blocks, batch, triton.cdiv(heads, heads_each)),
        x, out, first, second, scaling, heads, heads_each, tokens, *x.stride()[:3], *out.stride()[:3],
        *(stride if size > 1 else 0 for stride, size in zip(first.stride()[:2], first.shape, strict=False)),
        HALF=half, BLOCK_HALF=block_half, BLOCK_T=block_t, POSITIONS=positions, INVERSE=inverse, DIVIDE=divide,
        num_warps=4,
    )  # fmt: skip
    return out


class Turn(torch.autograd.Function):
    """A rotation, whose gradient is turned by the transposed one: the other way round, scaled alike."""

    @staticmethod
    def forward(ctx, x, first, second, scaling, positions, inverse, divide, out):
        """Arguments as `run` takes them."""
        ctx.save_for_backward(first, second)
        ctx.rest = scaling, positions, inverse, divide
        if out is x:
            ctx.mark_dirty(x)
        return run(x, first, second, scaling, positions, inverse, divide, torch.empty_like(x) if out is None else out)

    @staticmethod
    def backward(ctx, gradient):
        """The gradient of `x`."""
        scaling, positions, inverse, divide = ctx.rest
        gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        turned = Turn.apply(gradient, *ctx.saved_tensors, scaling, positions, not inverse, divide, None)
        return turned, *[None] * 7
