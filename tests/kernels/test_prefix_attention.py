"""Attention over compact slots, uniform and ragged: the reference, and the kernels against it and against fp64."""

from __future__ import annotations

import pytest
import torch

from still.kernels.prefix_attention import prefix_attention


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


def test_gradients_pass_an_empty_head():
    query, keys, values = (x.requires_grad_() for x in draw((1, 4, 3, 8), (1, 5, 8), (1, 5, 8)))
    prefix_attention(query, keys, values, offsets=(0, 5, 5))[0].sum().backward()
    assert all(x.grad.isfinite().all() for x in (query, keys, values))
    assert query.grad[:, :2].any()
    assert not query.grad[:, 2:].any()


@pytest.mark.parametrize("offsets", [(0, 5), (1, 4, 12), (0, 9, 4, 12), (0, 4, 13), (0,)])
def test_wrong_offsets_are_refused(offsets):
    query, keys, values = draw((1, 4, 3, 8), (1, 12, 8), (1, 12, 8))
    with pytest.raises(ValueError, match=r"offsets .* keys have the shape \[1, 12, 8\]"):
        prefix_attention(query, keys, values, offsets=offsets)
