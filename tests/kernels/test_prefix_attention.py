"""Attention over compact slots, uniform and ragged: the reference, and the kernels against it and against fp64."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re

import pytest
import torch

from still.kernels import dispatch
from still.kernels.prefix_attention import attend_reference, merge_attention, prefix_attention, tail_attention

module = importlib.import_module("still.kernels.prefix_attention")  # its name is also a function's


def draw(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def test_equal_counts_packed_are_the_uniform_case():
    query, keys, values, bias = draw((2, 6, 5, 16), (2, 3, 7, 16), (2, 3, 7, 8), (2, 3, 7))
    wanted = prefix_attention(query, keys, values, bias, 0.3)
    for offsets in ((0, 7, 14, 21), torch.tensor([0, 7, 14, 21])):
        got = prefix_attention(query, keys.flatten(1, 2), values.flatten(1, 2), bias.flatten(1), 0.3, offsets)
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


def test_ragged_heads_are_padded_heads_with_dead_slots():
    counts, offsets = (3, 0, 9), (0, 3, 3, 12)
    query, keys, values, bias = draw((2, 6, 5, 16), (2, 12, 16), (2, 12, 8), (2, 12))
    padded = [torch.zeros(2, 3, 9, n) for n in (16, 8)]
    padded_bias = torch.full((2, 3, 9), -torch.inf)
    for head, count in enumerate(counts):
        own = slice(offsets[head], offsets[head + 1])
        padded[0][:, head, :count], padded[1][:, head, :count] = keys[:, own], values[:, own]
        padded_bias[:, head, :count] = bias[:, own]
    out, lse = prefix_attention(query, keys, values, bias, offsets=offsets)
    torch.testing.assert_close((out, lse), prefix_attention(query, *padded, padded_bias), atol=1e-6, rtol=0)
    assert not out[:, 2:4].any()
    assert (lse[:, 2:4] == -torch.inf).all()


@pytest.mark.parametrize("offsets", [None, (0, 7, 8, 21)])
def test_what_cpus_compute_without_gradients_is_the_reference(offsets):
    """Sdpa's own operator serves where there is no mask, no gradient and no empty head."""
    shapes = [(2, 6, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)] if offsets is None else [(2, 6, 5, 16), *[(2, 21, 16)] * 2]
    for dtype, close in ((torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        inputs = draw(*shapes, dtype=dtype)
        assert module._flash_takes(*inputs, None, offsets, False, None)
        with dispatch.use("reference"):
            assert not module._flash_takes(*inputs, None, offsets, False, None)
        wanted = attend_reference(*inputs, None, 0.3, offsets, False, None)
        got = prefix_attention(*inputs, None, 0.3, offsets)
        assert [x.dtype for x in got] == [x.dtype for x in wanted]
        torch.testing.assert_close(got, wanted, atol=close, rtol=close)
        inputs[0].requires_grad_()
        prefix_attention(*inputs, None, 0.3, offsets)[1].sum().backward()
        assert inputs[0].grad.any(), "the log-sum-exp has a gradient"
    query, keys, values = draw((1, 4, 3, 8), (1, 5, 8), (1, 5, 8))
    assert not module._flash_takes(query, keys, values, None, (0, 5, 5), False, None)


@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_what_cpus_compute_with_a_bias_is_the_reference(rows, heads):
    """A slot of -inf is none, and a row whose slots are all gone gives zeros."""
    for dtype, close in ((torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        query, keys, values, bias = draw((2, 6, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16), (rows, heads, 7), dtype=dtype)
        bias = bias.float()
        bias[-1, 0, 2:5] = -torch.inf
        for gone in (False, True):
            if gone:
                bias[0, -1] = -torch.inf
            assert module._flash_takes(query, keys, values, bias, None, False, None)
            wanted = attend_reference(query, keys, values, bias, 0.3, None, False, None)
            got = prefix_attention(query, keys, values, bias, 0.3)
            assert [x.dtype for x in got] == [x.dtype for x in wanted]
            assert (wanted[1] == -torch.inf).any() == gone
            torch.testing.assert_close(got, wanted, atol=close, rtol=close)
        bias.requires_grad_()
        assert not module._flash_takes(query, keys, values, bias, None, False, None)


def test_gradients_pass_an_empty_head():
    query, keys, values = (x.requires_grad_() for x in draw((1, 4, 3, 8), (1, 5, 8), (1, 5, 8)))
    prefix_attention(query, keys, values, offsets=(0, 5, 5))[0].sum().backward()
    assert all(x.grad.isfinite().all() for x in (query, keys, values))
    assert query.grad[:, :2].any()
    assert not query.grad[:, 2:].any()


def test_gradients_pass_a_row_that_sees_nothing():
    """A padded query: both parts are empty for it, and so is their union."""
    query, keys, values = (x.requires_grad_() for x in draw((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)))
    mask = torch.ones(1, 1, 3, 3).tril().bool()
    mask[0, 0, 0] = False
    dead = torch.full((1, 1, 3), -torch.inf)
    out, lse = merge_attention(prefix_attention(query, keys, values, dead), tail_attention(query, keys, values, mask))
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    assert all(x.grad.isfinite().all() for x in (query, keys, values))
    assert not out[:, :, 0].any()
    assert not query.grad[:, :, 0].any()


@pytest.mark.parametrize("offsets", [(0, 5), (1, 4, 12), (0, 9, 4, 12), (0, 4, 13), (0,)])
def test_wrong_offsets_are_refused(offsets):
    query, keys, values = draw((1, 4, 3, 8), (1, 12, 8), (1, 12, 8))
    with pytest.raises(ValueError, match=r"keys \[1, 12, 8\].* offsets \["):
        prefix_attention(query, keys, values, offsets=offsets)


def largest(x):
    return x.abs().amax().item() if x.numel() else 0.0


def errors(got, wanted, plain):
    """Largest error against fp64, and what the same dtype makes in PyTorch, with a floor of a few roundings."""
    alive = wanted[1].isfinite()
    assert torch.equal(got[1].isfinite(), alive)
    for mine, exact, theirs in zip(got, wanted, plain, strict=True):
        mask = alive if mine.ndim == alive.ndim else alive.unsqueeze(-1).expand_as(mine)
        assert not mine.isnan().any()
        assert not mine[~mask].nan_to_num(neginf=0).any()  # no slot left: an output of zero
        error, allowed = (largest((x.double() - exact)[mask]) for x in (mine, theirs))
        floor = 4 * torch.finfo(mine.dtype).eps * largest(exact[mask])
        assert error <= 2 * allowed + floor, f"error {error}, PyTorch's own {allowed}"


def eager(query, keys, values, bias, scale, offsets, causal, mask):
    """Attention as PyTorch computes it in the dtype of its inputs."""
    kv_heads = keys.shape[1] if offsets is None else len(offsets) - 1
    parts = []
    for head, group in enumerate(query.split(query.shape[1] // kv_heads, dim=1)):
        own = (slice(None), head) if offsets is None else (slice(None), slice(offsets[head], offsets[head + 1]))
        k, v = keys[own].unsqueeze(1), values[own].unsqueeze(1)
        scores = group @ k.transpose(-1, -2) * scale
        if bias is not None:
            scores = scores + (bias[own] if bias.ndim == 2 or bias.shape[1] > 1 else bias[:, 0])[:, None, None]
        if causal:
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(k.shape[2] - query.shape[2] + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        if mask is not None:
            hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
            scores = scores.masked_fill(hidden, -torch.inf)
        parts.append((scores.softmax(-1).nan_to_num().to(v.dtype) @ v, scores.float().logsumexp(-1)))
    return tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))


def compare(poisoned, query, keys, values, bias=None, offsets=None, mask=None, causal=False, gradients=True):
    """Kernel against fp64 and against PyTorch in the same dtype: output, log-sum-exp and gradients through both."""
    pytest.importorskip("triton")
    device = poisoned.device
    tensors = [x if x is None else x.to(device) for x in (query, keys, values, bias)]
    mask = None if mask is None else mask.to(device)
    weights = draw(query.shape[:3] + values.shape[-1:], query.shape[:3], seed=5)

    def results(run, dtype):
        inputs = [x if x is None else x.to(dtype).detach().requires_grad_(gradients) for x in tensors]
        outs = run(*inputs)
        if gradients:
            out, lse = outs
            alive = lse.isfinite()
            loss = (out * weights[0].to(out)).sum() + (lse * weights[1].to(lse))[alive].sum()
            loss.backward()
        return [x.detach() for x in outs], [x.grad for x in inputs if gradients and x is not None]

    def kernel(*inputs):
        with dispatch.use("triton"):
            if causal or mask is not None:
                return tail_attention(*inputs[:3], mask)
            return prefix_attention(*inputs, offsets=offsets)

    def reference(*inputs):
        return attend_reference(*inputs, query.shape[-1] ** -0.5, offsets, causal, mask)

    def plain(*inputs):
        return eager(*inputs, query.shape[-1] ** -0.5, offsets, causal, mask)

    with poisoned:
        got = results(kernel, query.dtype)
    wanted, same = results(reference, torch.float64), results(plain, query.dtype)
    errors(got[0], wanted[0], same[0])
    for mine, exact, theirs in zip(got[1], wanted[1], same[1], strict=True):
        assert not mine.isnan().any()
        error, allowed = (largest(x.double() - exact) for x in (mine, theirs.nan_to_num()))
        floor = 8 * torch.finfo(query.dtype).eps * largest(exact)
        assert error <= 2 * allowed + floor, f"gradient's error {error}, PyTorch's own {allowed}"


DTYPES = [torch.float32, torch.float16]
full = pytest.mark.full


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("slots", "queries", "group", "dim"),
    [
        (111, 3, 2, 64), (63, 1, 8, 80), (1, 5, 1, 96),
        *(pytest.param(*case, marks=full) for case in itertools.product(
            (1, 63, 111, 1000), (1, 9, 17), (1, 2, 8), (64, 80, 96, 128, 256))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_uniform_slots(poisoned, dtype, slots, queries, group, dim, bias):
    if dtype == torch.float32 and dim > 128:
        pytest.skip("fp32 heads over 128 take the reference")
    query, keys, values, beta = draw(
        (2, 2 * group, queries, dim), (2, 2, slots, dim), (2, 2, slots, dim), (2, 2, slots), dtype=dtype
    )
    compare(poisoned, query, keys, values, beta if bias else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("counts", "queries", "dim"),
    [
        ((63, 0, 200, 1), 1, 64), ((0, 7, 0), 5, 80),
        *(pytest.param(*case, marks=full) for case in itertools.product(
            ((0,), (1,), (600, 10, 10), (0, 0, 111), (63, 0, 1000, 1)), (1, 9, 70), (64, 80, 96, 128, 256))),
    ],
)  # fmt: skip
def test_ragged_slots(poisoned, dtype, counts, queries, dim):
    if dtype == torch.float32 and dim > 128:
        pytest.skip("fp32 heads over 128 take the reference")
    offsets = tuple(itertools.accumulate(counts, initial=0))
    query, keys, values, beta = draw(
        (2, 2 * len(counts), queries, dim), (2, offsets[-1], dim), (2, offsets[-1], dim), (2, offsets[-1]), dtype=dtype
    )
    compare(poisoned, query, keys, values, beta, offsets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["causal", "boolean", "additive"])
@pytest.mark.parametrize(
    ("queries", "tokens"), [(5, 5), (1, 70), (20, 33), *(pytest.param(*x, marks=full) for x in ((1, 1), (130, 300)))]
)
def test_dense_tail(poisoned, dtype, kind, queries, tokens):
    query, keys, values = draw((2, 4, queries, 64), (2, 2, tokens, 64), (2, 2, tokens, 32), dtype=dtype)
    mask = None
    if kind != "causal":
        mask = draw((2, 1, queries, tokens), seed=2)[0] > -0.5
        mask[0, 0, 0] = False
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    compare(poisoned, query, keys, values, mask=mask, causal=kind == "causal")


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views_and_one_bias_for_all(poisoned, dtype):
    """The keys of a cache are slices, queries are transposed, and a padded batch has one bias for all heads."""
    query, keys, values, bias = draw((2, 5, 4, 64), (2, 2, 90, 64), (2, 90, 2, 64), (1, 1, 70), dtype=dtype)
    bias[..., :7] = -torch.inf
    compare(poisoned, query.transpose(1, 2), keys[:, :, :70], values.transpose(1, 2)[:, :, 20:], bias, gradients=False)


def test_all_slots_removed(poisoned):
    query, keys, values = draw((1, 2, 3, 64), (1, 2, 40, 64), (1, 2, 40, 64))
    compare(poisoned, query, keys, values, torch.full((1, 2, 40), -torch.inf), gradients=False)


@pytest.mark.parametrize("slots", [0, 5])
def test_nothing_to_do(device, poisoned, slots):
    pytest.importorskip("triton")
    with dispatch.use("triton"), poisoned:
        query, keys, values = (x.to(device) for x in draw((2, 2, 4, 64), (2, 2, slots, 64), (2, 2, slots, 64)))
        out, lse = prefix_attention(query[:, :, :0], keys, values)
        assert out.shape == (2, 2, 0, 64)
        assert lse.shape == (2, 2, 0)
        out, lse = prefix_attention(query, keys[:, :, :0], values[:, :, :0])
        assert not out.any()
        assert (lse == -torch.inf).all()


def test_slots_are_split_where_the_chip_would_idle():
    pytest.importorskip("triton")
    from still.kernels import prefix_attention_triton as kernels

    assert kernels.chunk_length(1, 1, 8, 8 * 16384, 64, 132) % 64 == 0
    assert 0 < kernels.chunk_length(1, 1, 8, 8 * 16384, 64, 132) < 16384
    assert kernels.chunk_length(1, 64, 8, 8 * 16384, 64, 132) == 0
    assert kernels.chunk_length(1, 1, 8, 8 * 64, 64, 132) == 0


MIXED = {
    "agree in batch and head dim": ((1, 4, 3, 8), (1, 2, 5, 16), (1, 2, 5, 16)),
    "keys and values in heads and slots": ((1, 4, 3, 8), (1, 2, 5, 8), (1, 2, 6, 8)),
    "query needs 4 dims": ((4, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8)),
    "3 query heads cannot share 2 KV heads": ((1, 3, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8)),
}


@pytest.mark.parametrize("reason", MIXED)
def test_shapes_that_do_not_fit_are_printed(reason):
    query, keys, values = draw(*MIXED[reason])
    shapes = f"query {list(query.shape)}, keys {list(keys.shape)}, values {list(values.shape)}"
    with pytest.raises(ValueError, match=f"{reason}.*{re.escape(shapes)}"):
        prefix_attention(query, keys, values)


def test_other_mistakes_are_refused():
    query, keys, values, bias = draw((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8), (2, 2, 5))
    with pytest.raises(ValueError, match=r"must share a dtype .*float16.*query \[2, 4, 3, 8\]"):
        prefix_attention(query, keys.half(), values)
    with pytest.raises(ValueError, match=r"bias must have the shape \[2, 2, 5\]"):
        prefix_attention(query, keys, values, bias[:, :, :4])
    with pytest.raises(ValueError, match=r"bias must be a float"):
        prefix_attention(query, keys, values, bias > 0)
    with pytest.raises(ValueError, match=r"mask must have the shape \[2, 1, 3, 5\]"):
        tail_attention(query, keys, values, torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match=r"one device, not cpu, meta"):
        prefix_attention(query, keys, values.to("meta"))


@pytest.mark.parametrize(("wide", "dtype"), [(257, torch.float16), (144, torch.float32)])
def test_wide_heads_and_odd_strides_take_the_reference(wide, dtype, device):
    shapes = (1, 2, 3, wide), (1, 2, 5, wide), (1, 2, 5, wide)
    query, keys, values = (x.to(device) for x in draw(*shapes, dtype=dtype))
    assert prefix_attention(query, keys, values)[0].shape == (1, 2, 3, wide)
    if importlib.util.find_spec("triton"):
        with dispatch.use("triton"), pytest.raises(ValueError, match=f"takes head dims up to .*, not {wide}"):
            prefix_attention(query, keys, values)
        query, keys, values = (x[..., :64] for x in (query, keys.mT.contiguous().mT, values))
        with dispatch.use("triton"), pytest.raises(ValueError, match="last dim of keys must be contiguous"):
            prefix_attention(query, keys, values)
