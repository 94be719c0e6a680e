"""Triton kernels of the forward pass of `latent_attention`.

Two plans, chosen in `latent_attention_plan`. Few latents: `one_pass_kernel` reads raw keys and values once and keeps
everything else in registers. Many latents: `project_kernel` strips, projects, normalises and rotates the keys of one
layer into a buffer, and `attend_kernel` runs over it. Either may be split over tokens; `merge_kernel` joins the parts
by their log-sum-exps.

Names: `i_` program ids, `p_` pointers, `b_` blocks in registers, `m_` masks. `D` head dim, `R` rotary dim, `W` latent
width, `T` tokens, `N` latents of all heads (packed, head after head). A block size is the next power of two: `BD` of D,
`BW` of W, `BH` of W / 2. Scores carry a factor log2(e) from the
queries, so that softmax takes exp2; log-sum-exps in memory are base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def skip_rows(p_rows, row, stride):
    """A pointer `row` rows on, in 64 bits; offsets inside a block fit 32."""
    return p_rows + (tl.full((), 0, tl.int64) + row) * stride


@triton.jit
def load_rows(p_rows, row, stride, m_rows, first, width, BLOCK: tl.constexpr):
    """Columns `first` to `first + width` of the rows from `row` on: [rows, BLOCK], zero outside."""
    columns = tl.arange(0, BLOCK)
    offsets = tl.arange(0, m_rows.shape[0])[:, None] * stride + columns[None, :]
    mask = m_rows[:, None] & (columns < width)[None, :]
    return tl.load(skip_rows(p_rows, row, stride) + first + offsets, mask=mask, other=0.0)


@triton.jit
def store_rows(p_rows, row, stride, m_rows, first, width, b_out, BLOCK: tl.constexpr):
    """Write [rows, BLOCK] to columns `first` to `first + width` of the rows from `row` on."""
    columns = tl.arange(0, BLOCK)
    offsets = tl.arange(0, m_rows.shape[0])[:, None] * stride + columns[None, :]
    mask = m_rows[:, None] & (columns < width)[None, :]
    tl.store(skip_rows(p_rows, row, stride) + first + offsets, b_out.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def load_turns(p_turns, row, m_rows, W: tl.constexpr, BH: tl.constexpr):
    """Cos and sin of the compactor's own RoPE, both [rows, BH] in fp32, from `[tokens, W / 2, 2]`."""
    both = load_rows(p_turns, row, W, m_rows, 0, W, 2 * BH).to(tl.float32)
    return tl.split(tl.reshape(both, [m_rows.shape[0], BH, 2]))


@triton.jit
def unturn(b_first, b_second, b_cos, b_sin):
    """Both halves of a block of keys without the model's RoPE. Dividing by s^2 undoes an attention factor s exactly."""
    b_square = b_cos * b_cos + b_sin * b_sin
    b_square = 1.0 / tl.where(b_square > 0, b_square, 1.0)  # masked places hold zeros
    first, second = b_first.to(tl.float32), b_second.to(tl.float32)
    first, second = (first * b_cos + second * b_sin) * b_square, (second * b_cos - first * b_sin) * b_square
    return first.to(b_first.dtype), second.to(b_second.dtype)


@triton.jit
def load_stripped(
    p_keys, stride, p_cos, p_sin, row, m_rows, D: tl.constexpr, R: tl.constexpr, ROTATED: tl.constexpr, BD: tl.constexpr
):
    """Keys without the model's RoPE [rows, BD]. A dim turns with its partner half the rotary dims away."""
    b_keys = load_rows(p_keys, row, stride, m_rows, 0, D, BD)
    if ROTATED:
        columns, rows = tl.arange(0, BD), tl.arange(0, m_rows.shape[0])[:, None]
        partner = tl.where(columns < R // 2, columns + R // 2, columns - R // 2)
        pair = tl.where(columns < R // 2, columns, partner)
        if R % 16 == 0:
            partner = tl.max_contiguous(tl.multiple_of(partner, 8), 8)
            pair = tl.max_contiguous(tl.multiple_of(pair, 8), 8)
        mask = m_rows[:, None] & (columns < R)[None, :]
        b_partner = tl.load(skip_rows(p_keys, row, stride) + rows * stride + partner[None, :], mask=mask, other=0.0)
        b_cos = tl.load(skip_rows(p_cos, row, R) + rows * R + pair[None, :], mask=mask, other=1.0).to(tl.float32)
        b_sin = tl.load(skip_rows(p_sin, row, R) + rows * R + pair[None, :], mask=mask, other=0.0).to(tl.float32)
        # Tables scaled by an attention factor s: dividing by s^2 makes the inverse exact.
        b_inverse = 1.0 / (b_cos * b_cos + b_sin * b_sin)
        b_sin = tl.where((columns < R // 2)[None, :], b_sin, -b_sin)
        b_keys = ((b_keys.to(tl.float32) * b_cos + b_partner.to(tl.float32) * b_sin) * b_inverse).to(b_keys.dtype)
    return b_keys


@triton.jit
def load_weight(p_weight, row, side, ROWS: tl.constexpr, BD: tl.constexpr):
    """ROWS rows of W_k from `row` on, their columns for keys (`side` 0) or values (1): [ROWS, BD].

    W_k and b_k come padded with zeros: two halves of BH rows, two sides of BD columns.
    """
    return tl.load(p_weight + (row + tl.arange(0, ROWS))[:, None] * (2 * BD) + side * BD + tl.arange(0, BD)[None, :])


@triton.jit
def project(b_one, b_two, b_source, p_weight, column, BD: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr):
    """Add to both halves of W_k X, [BT, BH] each, what some columns of X [BT, BK] give; `column` is W_k's, padded."""
    BK: tl.constexpr = b_source.shape[1]
    p_weight += column + tl.arange(0, BH)[None, :] * (2 * BD) + tl.arange(0, BK)[:, None]
    b_one = tl.dot(b_source, tl.load(p_weight), b_one, input_precision=PRECISION)
    b_two = tl.dot(b_source, tl.load(p_weight + BH * 2 * BD), b_two, input_precision=PRECISION)
    return b_one, b_two


@triton.jit
def project_kernel(
    p_keys, p_values, p_cos, p_sin, p_turns, p_weight, p_bias, p_spans, p_key, p_stripped, p_inverse,
    start, size, T, H, key_b, key_h, key_t, value_b, value_h, value_t, table_rows, turn_rows,
    D: tl.constexpr, R: tl.constexpr, W: tl.constexpr, ROTATED: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens `start` to `start + size` of one layer: rotated unit keys, stripped keys, and 1 / |W_k X + b_k|.

    Grid (blocks of tokens, batch x heads). Tokens outside a row's span give zeros.
    """
    i_t, i_bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    here = i_t * BT
    token = start + here
    tokens = tl.arange(0, BT)
    m_here = here + tokens < size
    m_tokens = m_here & (token + tokens >= tl.load(p_spans + 2 * i_b))
    m_tokens = m_tokens & (token + tokens < tl.load(p_spans + 2 * i_b + 1))
    p_cos += i_b % table_rows * T * R
    p_sin += i_b % table_rows * T * R
    p_keys += i_b * key_b + i_h * key_h
    p_values += i_b * value_b + i_h * value_h
    p_stripped += i_bh * size * D

    columns = tl.arange(0, BH)
    b_one = tl.zeros([BT, BH], tl.float32) + tl.load(p_bias + columns)[None, :]
    b_two = tl.zeros([BT, BH], tl.float32) + tl.load(p_bias + BH + columns)[None, :]
    if ROTATED:
        for c in range(0, R // 2, BK):
            b_first = load_rows(p_keys, token, key_t, m_tokens, c, R // 2 - c, BK)
            b_second = load_rows(p_keys, token, key_t, m_tokens, R // 2 + c, R // 2 - c, BK)
            b_cos = load_rows(p_cos, token, R, m_tokens, c, R // 2 - c, BK).to(tl.float32)
            b_sin = load_rows(p_sin, token, R, m_tokens, c, R // 2 - c, BK).to(tl.float32)
            b_first, b_second = unturn(b_first, b_second, b_cos, b_sin)
            store_rows(p_stripped, here, D, m_here, c, R // 2 - c, b_first, BK)
            store_rows(p_stripped, here, D, m_here, R // 2 + c, R // 2 - c, b_second, BK)
            b_one, b_two = project(b_one, b_two, b_first, p_weight, c, BD, BH, PRECISION)
            b_one, b_two = project(b_one, b_two, b_second, p_weight, R // 2 + c, BD, BH, PRECISION)
    for c in range(R if ROTATED else 0, D, BK):
        b_rest = load_rows(p_keys, token, key_t, m_tokens, c, D - c, BK)
        if ROTATED:
            store_rows(p_stripped, here, D, m_here, c, D - c, b_rest, BK)
        b_one, b_two = project(b_one, b_two, b_rest, p_weight, c, BD, BH, PRECISION)
    for c in range(0, D, BK):
        b_values = load_rows(p_values, token, value_t, m_tokens, c, D - c, BK)
        b_one, b_two = project(b_one, b_two, b_values, p_weight, BD + c, BD, BH, PRECISION)

    b_norm = tl.sqrt(tl.sum(b_one * b_one, 1) + tl.sum(b_two * b_two, 1))
    b_inverse = tl.where(m_tokens, 1.0 / tl.maximum(b_norm, 1e-12), 0.0)
    b_one, b_two = b_one * b_inverse[:, None], b_two * b_inverse[:, None]
    b_cos, b_sin = load_turns(p_turns + i_b % turn_rows * T * W, token, m_tokens, W, BH)
    p_key += i_bh * size * W
    store_rows(p_key, here, W, m_here, 0, W // 2, b_one * b_cos - b_two * b_sin, BH)
    store_rows(p_key, here, W, m_here, W // 2, W // 2, b_two * b_cos + b_one * b_sin, BH)
    tl.store(p_inverse + i_bh * size + here + tokens, b_inverse, mask=m_here)


@triton.jit
def soften(b_scores, m_tokens, b_max, b_sum):
    """One step of the online softmax: weights [BQ, BT], the factor of what came before, the new maximum and sum."""
    b_scores = tl.where(m_tokens[None, :], b_scores, -float("inf"))
    b_new = tl.maximum(b_max, tl.max(b_scores, 1))
    b_weights = tl.math.exp2(b_scores - b_new[:, None])
    b_factor = tl.math.exp2(b_max - b_new)
    return b_weights, b_factor, b_new, b_sum * b_factor + tl.sum(b_weights, 1)


@triton.jit
def span_of(p_spans, i_b, i_s, part):
    """First and last token (exclusive) of part `i_s` of a row's tokens."""
    first = tl.maximum(tl.load(p_spans + 2 * i_b), i_s * part)
    return first, tl.minimum(tl.load(p_spans + 2 * i_b + 1), (i_s + 1) * part)


@triton.jit
def attend_kernel(
    p_query, p_key, p_stripped, p_values, p_spans, p_tiles, p_out, p_lse,
    T, N, H, B, part, query_rows, stripped_b, stripped_h, stripped_t, value_b, value_h, value_t,
    D: tl.constexpr, W: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax attention of latents over projected keys; the values are stripped keys and values, side by side.

    Grid (blocks of latents, batch, parts of the tokens). A part writes its own output and log-sum-exp.
    """
    i_q, i_b, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_h, latent = tl.load(p_tiles + 3 * i_q).to(tl.int64), tl.load(p_tiles + 3 * i_q + 1)
    m_latents = latent + tl.arange(0, BQ) < tl.load(p_tiles + 3 * i_q + 2)
    first, stop = span_of(p_spans, i_b, i_s, part)
    p_key += (i_b * H + i_h) * T * W
    p_stripped += i_b * stripped_b + i_h * stripped_h
    p_values += i_b * value_b + i_h * value_h

    b_query = load_rows(p_query + i_b % query_rows * N * W, latent, W, m_latents, 0, W, BW)
    b_max = tl.full([BQ], -float("inf"), tl.float32)
    b_sum = tl.zeros([BQ], tl.float32)
    b_left, b_right = tl.zeros([BQ, BD], tl.float32), tl.zeros([BQ, BD], tl.float32)
    for t in range(first, stop, BT):
        m_tokens = t + tl.arange(0, BT) < stop
        b_key = load_rows(p_key, t, W, m_tokens, 0, W, BW)
        b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
        b_weights, b_factor, b_max, b_sum = soften(b_scores, m_tokens, b_max, b_sum)
        b_weights = b_weights.to(b_key.dtype)
        b_stripped = load_rows(p_stripped, t, stripped_t, m_tokens, 0, D, BD)
        b_left = tl.dot(b_weights, b_stripped, b_left * b_factor[:, None], input_precision=PRECISION)
        b_values = load_rows(p_values, t, value_t, m_tokens, 0, D, BD)
        b_right = tl.dot(b_weights, b_values, b_right * b_factor[:, None], input_precision=PRECISION)

    b_inverse = 1.0 / tl.where(b_sum > 0, b_sum, 1.0)
    row = (i_s * B + i_b) * N
    store_rows(p_out + row * 2 * D, latent, 2 * D, m_latents, 0, D, b_left * b_inverse[:, None], BD)
    store_rows(p_out + row * 2 * D, latent, 2 * D, m_latents, D, D, b_right * b_inverse[:, None], BD)
    tl.store(p_lse + row + latent + tl.arange(0, BQ), b_max + tl.math.log2(b_sum), mask=m_latents)


@triton.jit
def one_pass_kernel(
    p_query, p_keys, p_values, p_cos, p_sin, p_turns, p_weight, p_bias, p_spans, p_tiles, p_out, p_lse,
    T, N, B, part, query_rows, key_b, key_h, key_t, value_b, value_h, value_t, table_rows, turn_rows,
    D: tl.constexpr, R: tl.constexpr, W: tl.constexpr, ROTATED: tl.constexpr, BQ: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Latent attention from raw keys and values to output, all else on the chip. Grid as `attend_kernel`.

    W_k and the latents stay in shared memory. Keys are made transposed, [W / 2, BT] twice: so X is read from where the
    weighted sum needs it too, and the scores take the keys as they come.
    """
    i_q, i_b, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_h, latent = tl.load(p_tiles + 3 * i_q).to(tl.int64), tl.load(p_tiles + 3 * i_q + 1)
    m_latents = latent + tl.arange(0, BQ) < tl.load(p_tiles + 3 * i_q + 2)
    first, stop = span_of(p_spans, i_b, i_s, part)
    p_keys += i_b * key_b + i_h * key_h
    p_values += i_b * value_b + i_h * value_h
    p_cos += i_b % table_rows * T * R
    p_sin += i_b % table_rows * T * R
    p_turns += i_b % turn_rows * T * W
    p_query += i_b % query_rows * N * W

    b_query_1 = load_rows(p_query, latent, W, m_latents, 0, W // 2, BH)
    b_query_2 = load_rows(p_query, latent, W, m_latents, W // 2, W // 2, BH)
    b_weight_1k, b_weight_1v = load_weight(p_weight, 0, 0, BH, BD), load_weight(p_weight, 0, 1, BH, BD)
    b_weight_2k, b_weight_2v = load_weight(p_weight, BH, 0, BH, BD), load_weight(p_weight, BH, 1, BH, BD)
    b_bias_1 = tl.load(p_bias + tl.arange(0, BH))[:, None]
    b_bias_2 = tl.load(p_bias + BH + tl.arange(0, BH))[:, None]
    b_max = tl.full([BQ], -float("inf"), tl.float32)
    b_sum = tl.zeros([BQ], tl.float32)
    b_left, b_right = tl.zeros([BQ, BD], tl.float32), tl.zeros([BQ, BD], tl.float32)
    for t in range(first, stop, BT):
        m_tokens = t + tl.arange(0, BT) < stop
        b_stripped = load_stripped(p_keys, key_t, p_cos, p_sin, t, m_tokens, D, R, ROTATED, BD)
        b_values = load_rows(p_values, t, value_t, m_tokens, 0, D, BD)
        b_one = tl.dot(b_weight_1k, tl.trans(b_stripped), input_precision=PRECISION)
        b_one = tl.dot(b_weight_1v, tl.trans(b_values), b_one, input_precision=PRECISION) + b_bias_1
        b_two = tl.dot(b_weight_2k, tl.trans(b_stripped), input_precision=PRECISION)
        b_two = tl.dot(b_weight_2v, tl.trans(b_values), b_two, input_precision=PRECISION) + b_bias_2
        b_norm = tl.sqrt(tl.sum(b_one * b_one, 0) + tl.sum(b_two * b_two, 0))
        b_inverse = (1.0 / tl.maximum(b_norm, 1e-12))[None, :]
        b_one, b_two = b_one * b_inverse, b_two * b_inverse
        b_cos, b_sin = load_turns(p_turns, t, m_tokens, W, BH)
        b_cos, b_sin = tl.trans(b_cos), tl.trans(b_sin)
        b_key = (b_one * b_cos - b_two * b_sin).to(b_values.dtype)
        b_scores = tl.dot(b_query_1, b_key, input_precision=PRECISION)
        b_key = (b_two * b_cos + b_one * b_sin).to(b_values.dtype)
        b_scores = tl.dot(b_query_2, b_key, b_scores, input_precision=PRECISION)
        b_weights, b_factor, b_max, b_sum = soften(b_scores, m_tokens, b_max, b_sum)
        b_weights = b_weights.to(b_values.dtype)
        b_left = tl.dot(b_weights, b_stripped, b_left * b_factor[:, None], input_precision=PRECISION)
        b_right = tl.dot(b_weights, b_values, b_right * b_factor[:, None], input_precision=PRECISION)

    b_inverse = (1.0 / tl.where(b_sum > 0, b_sum, 1.0))[:, None]
    row = (i_s * B + i_b) * N
    store_rows(p_out + row * 2 * D, latent, 2 * D, m_latents, 0, D, b_left * b_inverse, BD)
    store_rows(p_out + row * 2 * D, latent, 2 * D, m_latents, D, D, b_right * b_inverse, BD)
    tl.store(p_lse + row + latent + tl.arange(0, BQ), b_max + tl.math.log2(b_sum), mask=m_latents)


@triton.jit
def merge_kernel(p_parts, p_part_lse, p_out, p_lse, parts, rows, X: tl.constexpr, BX: tl.constexpr):
    """Join `parts` outputs `[parts, rows, X]` by their log-sum-exps `[parts, rows]`. Grid (rows)."""
    i_r = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BX)
    b_max = tl.load(p_part_lse + i_r)
    at = i_r
    for _ in range(1, parts):
        at += rows
        b_max = tl.maximum(b_max, tl.load(p_part_lse + at))
    b_sum = 0.0
    b_out = tl.zeros([BX], tl.float32)
    at = i_r
    for _ in range(parts):
        b_share = tl.math.exp2(tl.load(p_part_lse + at) - b_max)
        b_sum += b_share
        b_out += b_share * tl.load(p_parts + at * X + columns, mask=columns < X, other=0.0)
        at += rows
    tl.store(p_out + i_r * X + columns, b_out / b_sum, mask=columns < X)
    tl.store(p_lse + i_r, b_max + tl.math.log2(b_sum))
