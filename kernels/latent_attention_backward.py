"""Triton kernels of the backward pass of `latent_attention`. Names as in `latent_attention_triton`.

Scores are made again from the forward's log-sum-exps. The context is taken `size` tokens at a time, from `start` on,
each time through `project_kernel`, so that its buffers stay small at any length: gradients of latents, W_k and b_k add
up over these chunks, each program in a place of its own, which keeps the result the same from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .latent_attention_triton import load_rows, load_turns, skip_rows, store_rows


@triton.jit
def chunk_span(p_spans, i_b, start, size):
    """First and last token (exclusive) of a row within the chunk, counted from its start."""
    first = tl.maximum(tl.load(p_spans + 2 * i_b) - start, 0)
    return first, tl.minimum(tl.load(p_spans + 2 * i_b + 1) - start, size)


@triton.jit
def query_grad_kernel(
    p_query, p_key, p_stripped, p_values, p_spans, p_tiles, p_lse, p_delta, p_grad_out, p_grad_query,
    start, size, N, H, B, part, query_rows, stripped_b, stripped_h, stripped_t, value_b, value_h, value_t,
    D: tl.constexpr, W: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one chunk to the gradient of the latents `[parts, B, N, W]`. Grid (blocks of latents, batch, parts)."""
    i_q, i_b, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_h, latent = tl.load(p_tiles + 3 * i_q).to(tl.int64), tl.load(p_tiles + 3 * i_q + 1)
    latents = tl.arange(0, BQ)
    m_latents = latent + latents < tl.load(p_tiles + 3 * i_q + 2)
    first, stop = chunk_span(p_spans, i_b, start, size)
    first, stop = tl.maximum(first, i_s * part), tl.minimum(stop, (i_s + 1) * part)
    p_key += (i_b * H + i_h) * size * W
    p_stripped += i_b * stripped_b + i_h * stripped_h
    p_values += i_b * value_b + i_h * value_h

    b_query = load_rows(p_query + i_b % query_rows * N * W, latent, W, m_latents, 0, W, BW)
    b_left = load_rows(p_grad_out + i_b * N * 2 * D, latent, 2 * D, m_latents, 0, D, BD)
    b_right = load_rows(p_grad_out + i_b * N * 2 * D, latent, 2 * D, m_latents, D, D, BD)
    b_lse = tl.load(p_lse + i_b * N + latent + latents, mask=m_latents, other=0.0)[:, None]
    b_delta = tl.load(p_delta + i_b * N + latent + latents, mask=m_latents, other=0.0)[:, None]
    b_grad = tl.zeros([BQ, BW], tl.float32)
    for t in range(first, stop, BT):
        m_tokens = t + tl.arange(0, BT) < stop
        b_key = load_rows(p_key, t, W, m_tokens, 0, W, BW)
        b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
        b_weights = tl.where(m_tokens[None, :], tl.math.exp2(b_scores - b_lse), 0.0)
        b_stripped = load_rows(p_stripped, t, stripped_t, m_tokens, 0, D, BD)
        b_slope = tl.dot(b_left, tl.trans(b_stripped), input_precision=PRECISION)
        b_values = load_rows(p_values, t, value_t, m_tokens, 0, D, BD)
        b_slope = tl.dot(b_right, tl.trans(b_values), b_slope, input_precision=PRECISION)
        b_slope = b_weights * (b_slope - b_delta)
        b_grad = tl.dot(b_slope.to(b_key.dtype), b_key, b_grad, input_precision=PRECISION)

    p_grad_query += (i_s * B + i_b) * N * W
    b_grad += load_rows(p_grad_query, latent, W, m_latents, 0, W, BW)
    store_rows(p_grad_query, latent, W, m_latents, 0, W, b_grad, BW)


@triton.jit
def key_grad_kernel(
    p_query, p_key, p_stripped, p_values, p_inverse, p_turns, p_spans, p_offsets, p_lse, p_delta, p_grad_out,
    p_grad_key, p_grad_source,
    start, size, T, N, H, query_rows, turn_rows,
    stripped_b, stripped_h, stripped_t, value_b, value_h, value_t,
    D: tl.constexpr, W: tl.constexpr, SOURCE: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of W_k X + b_k `[B, H, size, W]` and, with SOURCE, of X through the weighted sum `[B, H, size, 2 D]`.

    Grid (blocks of tokens, batch x heads); each program goes over all latents of its head.
    """
    i_t, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    here, tokens = i_t * BT, i_t * BT + tl.arange(0, BT)
    first, stop = chunk_span(p_spans, i_b, start, size)
    m_here, m_tokens = tokens < size, (tokens >= first) & (tokens < stop)
    p_key += i_bh * size * W
    p_stripped += i_b * stripped_b + i_h * stripped_h
    p_values += i_b * value_b + i_h * value_h
    b_key_1 = load_rows(p_key, here, W, m_tokens, 0, W // 2, BH)
    b_key_2 = load_rows(p_key, here, W, m_tokens, W // 2, W // 2, BH)
    b_stripped = load_rows(p_stripped, here, stripped_t, m_tokens, 0, D, BD)
    b_values = load_rows(p_values, here, value_t, m_tokens, 0, D, BD)
    p_query += i_b % query_rows * N * W
    p_grad_out += i_b * N * 2 * D

    b_grad_1, b_grad_2 = tl.zeros([BT, BH], tl.float32), tl.zeros([BT, BH], tl.float32)
    b_source_1, b_source_2 = tl.zeros([BT, BD], tl.float32), tl.zeros([BT, BD], tl.float32)
    last = tl.load(p_offsets + i_h + 1)
    for n in range(tl.load(p_offsets + i_h), last, BQ):
        latents = n + tl.arange(0, BQ)
        m_latents = latents < last
        b_query_1 = load_rows(p_query, n, W, m_latents, 0, W // 2, BH)
        b_query_2 = load_rows(p_query, n, W, m_latents, W // 2, W // 2, BH)
        b_lse = tl.load(p_lse + i_b * N + latents, mask=m_latents, other=0.0)[None, :]
        b_delta = tl.load(p_delta + i_b * N + latents, mask=m_latents, other=0.0)[None, :]
        b_scores = tl.dot(b_key_1, tl.trans(b_query_1), input_precision=PRECISION)
        b_scores = tl.dot(b_key_2, tl.trans(b_query_2), b_scores, input_precision=PRECISION)
        mask = m_tokens[:, None] & m_latents[None, :]
        b_weights = tl.where(mask, tl.math.exp2(b_scores - b_lse), 0.0)
        b_left = load_rows(p_grad_out, n, 2 * D, m_latents, 0, D, BD)
        b_right = load_rows(p_grad_out, n, 2 * D, m_latents, D, D, BD)
        b_slope = tl.dot(b_stripped, tl.trans(b_left), input_precision=PRECISION)
        b_slope = tl.dot(b_values, tl.trans(b_right), b_slope, input_precision=PRECISION)
        b_slope = (b_weights * (b_slope - b_delta)).to(b_query_1.dtype)
        b_grad_1 = tl.dot(b_slope, b_query_1, b_grad_1, input_precision=PRECISION)
        b_grad_2 = tl.dot(b_slope, b_query_2, b_grad_2, input_precision=PRECISION)
        if SOURCE:
            b_weights = b_weights.to(b_left.dtype)
            b_source_1 = tl.dot(b_weights, b_left, b_source_1, input_precision=PRECISION)
            b_source_2 = tl.dot(b_weights, b_right, b_source_2, input_precision=PRECISION)

    # Through the normalisation, k = u / |u|, then back through the compactor's own RoPE.
    b_inverse = tl.load(p_inverse + i_bh * size + tokens, mask=m_tokens, other=0.0)
    b_inverse *= 0.6931471805599453  # the queries carry log2(e)
    b_one, b_two = b_key_1.to(tl.float32), b_key_2.to(tl.float32)
    b_along = tl.sum(b_one * b_grad_1, 1) + tl.sum(b_two * b_grad_2, 1)
    b_one = (b_grad_1 - b_one * b_along[:, None]) * b_inverse[:, None]
    b_two = (b_grad_2 - b_two * b_along[:, None]) * b_inverse[:, None]
    b_cos, b_sin = load_turns(p_turns + i_b % turn_rows * T * W, start + here, m_tokens, W, BH)
    p_grad_key += i_bh * size * W
    store_rows(p_grad_key, here, W, m_here, 0, W // 2, b_one * b_cos + b_two * b_sin, BH)
    store_rows(p_grad_key, here, W, m_here, W // 2, W // 2, b_two * b_cos - b_one * b_sin, BH)
    if SOURCE:
        p_grad_source += i_bh * size * 2 * D
        store_rows(p_grad_source, here, 2 * D, m_here, 0, D, b_source_1, BD)
        store_rows(p_grad_source, here, 2 * D, m_here, D, D, b_source_2, BD)


@triton.jit
def weight_grad_kernel(
    p_grad_key, p_stripped, p_values, p_spans, p_grad_weight, p_grad_bias,
    start, size, H, pieces, stripped_b, stripped_h, stripped_t, value_b, value_h, value_t,
    D: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one chunk to the gradients of W_k `[parts, W, 2 D]` and b_k `[parts, W]`.

    Grid (blocks of rows of W_k, its two sides, parts). The work is `pieces` blocks of tokens, over batch and heads;
    each part takes every `parts`-th.
    """
    i_m, i_side, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = i_m * BM
    m_rows = row + tl.arange(0, BM) < W
    blocks = tl.cdiv(size, BT)
    b_weight = tl.zeros([BM, BD], tl.float32)
    b_bias = tl.zeros([BM], tl.float32)
    for piece in range(i_s, pieces, tl.num_programs(2)):
        i_bh, here = piece // blocks, piece % blocks * BT
        i_b, i_h = i_bh // H, i_bh % H
        first, stop = chunk_span(p_spans, i_b, start, size)
        tokens = here + tl.arange(0, BT)
        m_tokens = (tokens >= first) & (tokens < stop)
        p_grad = skip_rows(p_grad_key, i_bh, size * W)
        b_grad = load_rows(p_grad, here, W, m_tokens, row, W - row, BM)
        p_left = skip_rows(skip_rows(p_stripped, i_b, stripped_b), i_h, stripped_h)
        p_right = skip_rows(skip_rows(p_values, i_b, value_b), i_h, value_h)
        p_source = p_left if i_side == 0 else p_right
        stride = stripped_t if i_side == 0 else value_t
        b_source = load_rows(p_source, here, stride, m_tokens, 0, D, BD)
        b_weight = tl.dot(tl.trans(b_grad), b_source, b_weight, input_precision=PRECISION)
        b_bias += tl.sum(b_grad.to(tl.float32), 0)

    p_grad_weight = skip_rows(p_grad_weight, i_s, W * 2 * D)
    b_weight += load_rows(p_grad_weight, row, 2 * D, m_rows, i_side * D, D, BD)
    store_rows(p_grad_weight, row, 2 * D, m_rows, i_side * D, D, b_weight, BD)
    if i_side == 0:
        p_bias = skip_rows(p_grad_bias, i_s, W) + row + tl.arange(0, BM)
        tl.store(p_bias, b_bias + tl.load(p_bias, mask=m_rows, other=0.0), mask=m_rows)
