"""Attention "still": beta over a compact prefix, merged with a causal tail; and what flash attention would be given."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from cache_cases import compact, read
from tiny_models import CONFIGS, left_padded, random_ids, tiny_model
from transformers.masking_utils import flash_attention_mask

import still.attention
from still.cache import StillCache
from still.kernels.prefix_attention import merge_attention, prefix_attention, tail_attention
from still.types import CompactKV

T, QUESTION = 40, 6


@pytest.fixture(autouse=True)
def _no_grad():
    still.attention.register()
    with torch.no_grad():
        yield


def random_tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(("slots", "tail", "queries"), [(7, 5, 5), (1, 1, 1), (63, 9, 3), (0, 4, 4)])
def test_merged_parts_equal_one_softmax(slots, tail, queries):
    q, k, v = random_tensors((2, 4, queries, 16), (2, 2, slots + tail, 16), (2, 2, slots + tail, 8))
    beta = random_tensors((2, 2, slots), seed=1)[0]
    out, lse = merge_attention(
        prefix_attention(q, k[:, :, :slots], v[:, :, :slots], beta, 0.3),
        tail_attention(q, k[:, :, slots:], v[:, :, slots:], None, 0.3),
    )
    bias = torch.cat((beta, torch.zeros(2, 2, tail)), dim=2)[:, :, None].repeat(1, 1, queries, 1)
    future = torch.ones(queries, tail).triu(tail - queries + 1).bool()
    bias[..., slots:].masked_fill_(future, -torch.inf)
    bias = bias.repeat_interleave(2, dim=1)
    keys, values = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=0.3)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)
    scores = q @ keys.transpose(-1, -2) * 0.3 + bias
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-5, rtol=0)


def test_removed_slots_leave_no_trace():
    q, k, v = random_tensors((1, 2, 3, 16), (1, 2, 6, 16), (1, 2, 6, 16))
    bias = torch.zeros(1, 1, 6)
    bias[..., :4] = -torch.inf
    torch.testing.assert_close(
        prefix_attention(q, k, v, bias), prefix_attention(q, k[:, :, 4:], v[:, :, 4:]), atol=1e-6, rtol=0
    )
    out, lse = prefix_attention(q, k, v, torch.full((1, 2, 6), -torch.inf))
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_zero_beta_equals_stock_attention(kind):
    context, question = random_ids(2, T), random_ids(2, QUESTION, seed=1)
    stock, ours = tiny_model(kind), tiny_model(kind, attention="still")
    wanted = compact(stock, context, 10)
    cache = compact(ours, context, 10, beta=torch.zeros(2, 2, 10))
    logits = stock(question, past_key_values=wanted).logits
    torch.testing.assert_close(ours(question, past_key_values=cache).logits, logits, atol=1e-5, rtol=0)
    step = random_ids(2, 1, seed=3)
    torch.testing.assert_close(
        ours(step, past_key_values=cache).logits, stock(step, past_key_values=wanted).logits, atol=1e-5, rtol=0
    )
    plain = compact(ours, context, 10)
    torch.testing.assert_close(ours(question, past_key_values=plain).logits, logits, atol=1e-5, rtol=0)


def test_beta_weighs_slots():
    """A slot with beta log 2 counts twice: as if it were there two times."""
    context, question = random_ids(1, T), random_ids(1, QUESTION, seed=1)
    ours, stock = tiny_model(attention="still"), tiny_model()
    beta = torch.zeros(1, 2, 10)
    beta[..., 3] = torch.log(torch.tensor(2.0))
    cache = compact(ours, context, 10, beta=beta)
    twice = compact(stock, context, 10)
    order = [0, 1, 2, 3, 3, *range(4, 10)]
    layers = {i: CompactKV(x.keys[:, :, order], x.values[:, :, order]) for i, x in enumerate(twice.layers)}
    twice = StillCache.from_layers(stock.config, layers, T)
    wanted = stock(question, past_key_values=twice).logits
    torch.testing.assert_close(ours(question, past_key_values=cache).logits, wanted, atol=1e-5, rtol=0)
    plain = compact(ours, context, 10)
    assert (ours(question, past_key_values=plain).logits - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_beta_with_stock_attention_is_refused(attention):
    model = tiny_model(attention=attention)
    cache = compact(model, random_ids(1, T), 10, beta=torch.zeros(1, 2, 10))
    with pytest.raises(ValueError, match=rf"beta\), which attn_implementation='{attention}' cannot apply"):
        model(random_ids(1, 3), past_key_values=cache)
    model.set_attn_implementation("still")
    model(random_ids(1, 3), past_key_values=cache)


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_token_sees_the_future(kind):
    model = tiny_model(kind, attention="still")
    ids = random_ids(2, 20)
    before = model(ids).logits
    cache = compact(model, random_ids(2, T, seed=4), 10, beta=torch.randn(2, 2, 10))
    continued = model(ids, past_key_values=cache.clone()).logits
    for j in (0, 7, 19):
        changed = ids.clone()
        changed[:, j] = (changed[:, j] + 1) % 90 + 3
        assert torch.equal(model(changed).logits[:, :j], before[:, :j])
        after = model(changed, past_key_values=cache.clone()).logits
        assert torch.equal(after[:, :j], continued[:, :j])
        assert not torch.equal(after[:, j], continued[:, j])


def test_padded_prefill_equals_sdpa():
    ids, mask = left_padded([random_ids(20), random_ids(13, seed=1)])
    stock, ours = tiny_model(), tiny_model(attention="still")
    wanted, got = read(stock, ids, mask)[1], read(ours, ids, mask)[1]
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=1e-5, rtol=0)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), stock.generate(ids, **options))


def test_questions_padded_behind_slots_with_beta():
    model, context = tiny_model(attention="still"), random_ids(1, T)
    beta = torch.randn(1, 2, 10, generator=torch.Generator().manual_seed(0))
    asked = [random_ids(n, seed=n) for n in (6, 2)]
    cache = compact(model, context, 10, beta=beta)
    options = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(**cache.prompt(*left_padded(asked)), past_key_values=cache, **options)
    for row, text in enumerate(asked):
        alone = compact(model, context, 10, beta=beta)
        out = model.generate(**alone.prompt(text), past_key_values=alone, **options)
        assert torch.equal(together[row, -6:], out[0, -6:])


def test_beams_repeat_beta():
    model = tiny_model(attention="still")
    context, question = random_ids(2, T), random_ids(2, QUESTION, seed=1)
    beta = torch.randn(2, 2, 10, generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    cache = compact(model, context, 10, beta=beta)
    together = model.generate(**cache.prompt(question), past_key_values=cache, **options)
    for row in range(2):
        cache = compact(model, context[row : row + 1], 10, beta=beta[row : row + 1])
        alone = model.generate(**cache.prompt(question[row]), past_key_values=cache, **options)
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("rows", [(T, T), (T, 25), (T, 12, 33)])
def test_flash_attention_is_given_the_live_columns(rows):
    """transformers' own mask function for flash attention, on our sizes and our mask."""
    model = tiny_model()
    ids, mask = left_padded([random_ids(n, seed=i) for i, n in enumerate(rows)])
    cache = compact(model, ids, ratio=2.5, mask=mask)
    inputs = cache.continuation(random_ids(len(rows), QUESTION, seed=8))
    kv_length, kv_offset = cache.get_mask_sizes(QUESTION, 0)
    seen = flash_attention_mask(
        batch_size=len(rows), q_length=QUESTION, kv_length=kv_length, q_offset=cache.get_query_offset(0),
        kv_offset=kv_offset, attention_mask=inputs["attention_mask"].bool(),
    )  # fmt: skip
    live = torch.tensor([[i >= 16 - int(n / 2.5) for i in range(16)] + [True] * QUESTION for n in rows])
    assert kv_length == 16 + QUESTION
    assert seen is None if len(set(rows)) == 1 else torch.equal(seen, live)


@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None or not torch.cuda.is_available(), reason="needs flash-attn and a GPU"
)
@pytest.mark.parametrize("rows", [(T, T), (T, 25)])
def test_flash_attention_equals_sdpa(rows):
    ids, mask = (x.cuda() for x in left_padded([random_ids(n, seed=i) for i, n in enumerate(rows)]))
    question = random_ids(len(rows), QUESTION, seed=8).cuda()
    logits = []
    for attention in ("sdpa", "flash_attention_2"):
        model = tiny_model().cuda().bfloat16()
        cache = compact(model, ids, ratio=2.5, mask=mask)
        model.set_attn_implementation(attention)
        logits.append(model(**cache.continuation(question), past_key_values=cache).logits)
    torch.testing.assert_close(*logits, atol=0.05, rtol=0)


