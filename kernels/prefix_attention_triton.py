"""Attention with a log-sum-exp over compact slots or a dense tail, in Triton.

One program attends from a block of rows, the queries of all query heads that share a KV head, to one chunk of that
head's keys, so keys are read once however many query heads there are. Where that leaves the chip idle (decoding), the
keys are split into chunks and a second kernel merges the parts. Ragged heads are found on the device, from the offsets.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import dispatch
from .prefix_attention import attend_reference

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MERGED = 32
"""Parts that `merge_parts` reads at once."""


@triton.jit
def find_chunk(i_item, p_offsets, slots, chunk, kv_heads, HEADS: tl.constexpr, RAGGED: tl.constexpr):
    """KV head, first slot in that head, and the head's own start and number of slots, of the `i_item`-th chunk."""
    if RAGGED:
        i_h = tl.arange(0, HEADS)
        own = i_h < kv_heads
        starts = tl.load(p_offsets + i_h, mask=own, other=0)
        counts = tl.load(p_offsets + i_h + 1, mask=own, other=0) - starts
        chunks = (counts + chunk - 1) // chunk
        ends = tl.cumsum(chunks, 0)
        head = tl.sum(tl.where(own & (ends <= i_item), 1, 0), 0)
        here = i_h == head
        first = (i_item - tl.sum(tl.where(here, ends - chunks, 0), 0)) * chunk
        return head, first, tl.sum(tl.where(here, starts, 0), 0), tl.sum(tl.where(here, counts, 0), 0)
    else:
        chunks_each = (slots + chunk - 1) // chunk
        return i_item // chunks_each, (i_item % chunks_each) * chunk, 0, slots


@triton.jit
def load_tile(p, rows, cols, s_row, row_mask, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix with `COLS` columns, zero outside: `[rows, BLOCK]`."""
    mask = row_mask[:, None]
    if COLS != BLOCK:
        mask = mask & (cols < COLS)[None, :]
    return tl.load(p + rows[:, None] * s_row + cols[None, :], mask=mask, other=0.0)


@triton.jit
def attend(
    p_q, p_k, p_v, p_bias, p_mask, p_offsets, p_out, p_lse,
    scale, queries, slots, chunk, items, kv_heads,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_bb, s_bh, s_mb, s_mq,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr, SPLIT: tl.constexpr,
    BIAS: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a block of rows over one chunk of one KV head (the whole head unless `SPLIT`)."""
    rows = GROUP * queries
    row_blocks = (rows + BLOCK_M - 1) // BLOCK_M
    i_m, i_item, i_b = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks, tl.program_id(1).to(tl.int64)
    if SPLIT:
        i_h, first, start, count = find_chunk(i_item, p_offsets, slots, chunk, kv_heads, HEADS, RAGGED)
    else:
        i_h, first, start, count = i_item, 0, 0, slots
        if RAGGED:
            start = tl.load(p_offsets + i_h)
            count = tl.load(p_offsets + i_h + 1) - start
    end = tl.minimum(first + chunk, count) if SPLIT else count

    i_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_r = i_r < rows
    i_g, i_q = i_r // queries, i_r % queries
    i_d, i_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    last = count - queries + i_q  # the last slot that a row may see, where causal
    if CAUSAL:
        end = tl.minimum(end, tl.max(tl.where(m_r, last, -1), 0) + 1)

    q_rows = (i_h * GROUP + i_g) * s_qh + i_q * s_qt
    b_q = load_tile(p_q + i_b * s_qb, q_rows, i_d, 1, m_r, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    p_k += i_b * s_kb + i_h * s_kh + start * s_kt
    p_v += i_b * s_vb + i_h * s_vh + start * s_vt
    if BIAS:
        p_bias += i_b * s_bb + i_h * s_bh + start
    if MASK != "none":
        p_mask += i_b * s_mb

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for begin in range(first, end, BLOCK_N):
        i_n = begin + tl.arange(0, BLOCK_N)
        m_n = i_n < end
        b_k = load_tile(p_k, i_n, i_d, s_kt, m_n, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)
        if BIAS:
            scores += tl.load(p_bias + i_n, mask=m_n, other=0.0).to(tl.float32)[None, :] * LOG2E
        seen = m_n[None, :]
        if CAUSAL:
            seen = seen & (i_n[None, :] <= last[:, None])
        if MASK != "none":
            b_m = tl.load(p_mask + i_q[:, None] * s_mq + i_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0)
            if MASK == "boolean":
                seen = seen & (b_m != 0)
            else:
                scores += b_m.to(tl.float32) * LOG2E
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(weights, 1)
        b_v = load_tile(p_v, i_n, i_dv, s_vt, m_n, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        acc = acc * keep[:, None] + tl.dot(weights.to(b_v.dtype), b_v, input_precision=PRECISION)
        top = higher

    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    # Parts lie as [batch, item, row], the output as [batch, KV head, row]: one formula for both.
    place = (i_b * items + i_item) * rows + i_r
    tl.store(p_lse + place, lse, mask=m_r)
    m_out = m_r[:, None] & (i_dv < DV)[None, :]
    tl.store(p_out + place[:, None] * DV + i_dv[None, :], acc.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def merge_parts(
    p_parts, p_lses, p_offsets, p_out, p_lse, rows, slots, chunk, items, kv_heads,
    HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_C: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One row's output over all chunks of its KV head."""
    i_r, i_h, i_b = tl.program_id(0) % rows, tl.program_id(0) // rows, tl.program_id(1).to(tl.int64)
    if RAGGED:
        heads = tl.arange(0, HEADS)
        own = heads <= i_h
        starts = tl.load(p_offsets + heads, mask=own, other=0)
        counts = tl.load(p_offsets + heads + 1, mask=own, other=0) - starts
        chunks = (counts + chunk - 1) // chunk
        end = tl.sum(chunks, 0)
        first = end - tl.sum(tl.where(heads == i_h, chunks, 0), 0)
    else:
        each = (slots + chunk - 1) // chunk
        first = i_h * each
        end = first + each
    i_dv = tl.arange(0, BLOCK_DV)
    top, total = float("-inf"), 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for begin in range(first, end, BLOCK_C):
        i_c = begin + tl.arange(0, BLOCK_C)
        m_c = i_c < end
        place = (i_b * items + i_c) * rows + i_r
        b_lse = tl.load(p_lses + place, mask=m_c, other=float("-inf"))
        b_part = load_tile(p_parts, place, i_dv, DV, m_c, DV, BLOCK_DV)  # [BLOCK_C, BLOCK_DV]
        higher = tl.maximum(top, tl.max(b_lse, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2((b_lse - base) * LOG2E)
        keep = tl.exp2((top - base) * LOG2E)
        total = total * keep + tl.sum(weights, 0)
        acc = acc * keep + tl.sum(b_part * weights[:, None], 0)
        top = higher
    some = total > 0
    place = (i_b * kv_heads + i_h) * rows + i_r
    tl.store(p_lse + place, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)) * LN2, float("-inf")))
    out = acc / tl.where(some, total, 1.0)
    tl.store(p_out + place * DV + i_dv, out.to(p_out.dtype.element_ty), mask=i_dv < DV)


class Tiles(NamedTuple):
    """Blocks of one launch: rows, keys; and the warps and pipeline stages that carry them."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles(rows: int, width: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Blocks for `rows` rows of each KV head and the wider of the two head dims, padded to a power of two."""
    roomy = capability[0] in (9, 10)  # 227 KiB of shared memory; other GPUs may have 99
    # More keys or fewer warps than here spill, by what ptxas says (tests/kernels/test_aot.py).
    few = capability[0] == 10 and width <= 128
    if dtype == torch.float32:
        if rows <= 16 or width > 64:
            return Tiles(16, 32, 4 if width <= 64 else 8, 2)
        return Tiles(32, 32, 4 if width == 64 else 8, 2)
    if rows <= 16:
        return Tiles(16, 64 if width <= 128 else 32, 4, 3 if roomy else 2)
    if width > 128:
        return Tiles(64, 32, 4 if roomy else 8, 2)
    if rows <= 64:
        return Tiles(64, 32 if few else 64, 4, 3 if roomy else 2)
    return Tiles(128, 32, 4, 3) if few and width <= 64 else Tiles(128, 64, 8, 3 if roomy else 2)


def chunk_length(rows_blocks: int, batch: int, kv_heads: int, slots: int, block: int, processors: int) -> int:
    """Slots of one chunk, or 0 to give each head to one program.

    Args:
        rows_blocks: programs that the rows of one KV head fill.
        batch: rows of the batch.
        kv_heads: KV heads.
        slots: of all KV heads together.
        block: slots that a program reads at once; chunks are multiples of it.
        processors: of the GPU.
    """
    if rows_blocks * batch * kv_heads >= 2 * processors or slots <= kv_heads * block:
        return 0
    even = triton.cdiv(slots * batch * rows_blocks, 4 * processors)
    return max(triton.cdiv(even, block), 2) * block


def forward(query, keys, values, bias, scale, offsets, causal, mask):
    """Output and log-sum-exp, as `prefix_attention` and `tail_attention` give them; inputs were checked there."""
    batch, query_heads, queries, head_dim = query.shape
    ragged = offsets is not None
    kv_heads = len(offsets) - 1 if ragged else keys.shape[1]
    slots, value_dim = keys.shape[-2], values.shape[-1]
    group = query_heads // kv_heads
    rows = group * queries
    block_d, block_dv = (max(triton.next_power_of_2(n), 16) for n in (head_dim, value_dim))
    tile = tiles(rows, max(block_d, block_dv), query.dtype, dispatch.capability(query.device))
    row_blocks = triton.cdiv(rows, tile.rows)
    every = slots if ragged else slots * kv_heads
    chunk = chunk_length(row_blocks, batch, kv_heads, every, tile.keys, dispatch.processors(query.device))
    items = kv_heads
    if chunk:
        counts = [b - a for a, b in pairwise(offsets)] if ragged else [slots] * kv_heads
        items = sum(triton.cdiv(count, chunk) for count in counts)
    out = query.new_empty(batch, query_heads, queries, value_dim)
    lse = query.new_empty(batch, query_heads, queries, dtype=torch.float32)
    parts, lses = out, lse
    if chunk:
        parts = query.new_empty(batch, items, rows, value_dim, dtype=torch.float32)
        lses = query.new_empty(batch, items, rows, dtype=torch.float32)
    where = on_device(offsets, query.device) if ragged else None
    shared = {"HEADS": triton.next_power_of_2(kv_heads), "DV": value_dim, "BLOCK_DV": block_dv, "RAGGED": ragged}
    dispatch.launch(
        attend, (row_blocks * items, batch),
        query, keys, values, bias, mask, where, parts, lses,
        scale, queries, slots, chunk, items, kv_heads,
        *query.stride()[:3], *strides(keys), *strides(values), *bias_strides(bias), *mask_strides(mask),
        GROUP=group, D=head_dim, BLOCK_D=block_d, BLOCK_M=tile.rows, BLOCK_N=tile.keys, SPLIT=chunk > 0,
        BIAS=bias is not None, CAUSAL=causal, MASK=mask_kind(mask), PRECISION=precision(query.dtype), **shared,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if chunk:
        dispatch.launch(
            merge_parts, (rows * kv_heads, batch), parts, lses, where, out, lse, rows, slots, chunk, items, kv_heads,
            BLOCK_C=MERGED, **shared, num_warps=4,
        )  # fmt: skip
    return out, lse


@lru_cache(maxsize=4096)
def on_device(offsets: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The offsets as a tensor, copied to the device once: a model asks for the same ones in every step."""
    return torch.tensor(offsets, dtype=torch.int32, device=device)


def precision(dtype: torch.dtype) -> str:
    """fp32 products as three of TF32, which keep fp32's accuracy; half precision has one way only."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides over batch, KV head and slot; packed heads have no stride of their own."""
    return x.stride()[:3] if x.ndim == 4 else (x.stride(0), 0, x.stride(1))


def bias_strides(bias: torch.Tensor | None) -> tuple[int, int]:
    """Strides over batch and KV head, 0 where one bias serves all."""
    if bias is None:
        return 0, 0
    batch = bias.stride(0) if bias.shape[0] > 1 else 0
    return batch, bias.stride(1) if bias.ndim == 3 and bias.shape[1] > 1 else 0


def mask_strides(mask: torch.Tensor | None) -> tuple[int, int]:
    """Strides over batch and query."""
    return (0, 0) if mask is None else (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2))


def mask_kind(mask: torch.Tensor | None) -> str:
    """How the kernel reads the mask."""
    return "none" if mask is None else "boolean" if mask.dtype == torch.bool else "additive"


class Attention(torch.autograd.Function):
    """`forward` with a backward pass through the reference, which computes the scores again."""

    @staticmethod
    def forward(ctx, query, keys, values, bias, scale, offsets, causal, mask):
        """The kernels' result; inputs as `forward` takes them."""
        ctx.save_for_backward(query, keys, values, bias, mask)
        ctx.rest = scale, offsets, causal
        return forward(query, keys, values, bias, scale, offsets, causal, mask)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_lse):
        """Gradients of query, keys, values and bias."""
        *inputs, mask = ctx.saved_tensors
        scale, offsets, causal = ctx.rest
        inputs = [x if x is None else x.detach().requires_grad_(need)
                  for x, need in zip(inputs, ctx.needs_input_grad, strict=False)]  # fmt: skip
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        with torch.enable_grad():
            outs = attend_reference(*inputs, scale, offsets, causal, mask)
            found = iter(torch.autograd.grad(outs, wanted, (d_out, d_lse)))
        return *(next(found) if x is not None and x.requires_grad else None for x in inputs), *[None] * 4
