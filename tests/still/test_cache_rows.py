"""Batches whose rows differ in length: each row equals the same row alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from cache_cases import StridedCompactor, compact, read
from tiny_models import CONFIGS, left_padded, random_ids, tiny_model

import still.attention
from still.cache import StillCache
from still.compactor import StillCompactor

GREEDY = {"do_sample": False, "max_new_tokens": 6}
CHUNK = 16
# tokens of each row; with pads beyond T - t at the low ratios (and slots of unequal number everywhere)
ROWS = [(40, 25), (40, 3, 21), (7, 40), (40, 40)]


@pytest.fixture(autouse=True)
def _no_grad():
    still.attention.register()
    with torch.no_grad():
        yield


def batch_of(rows):
    texts = [random_ids(n, seed=10 + n + 100 * i) for i, n in enumerate(rows)]
    return texts, *left_padded(texts)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "still"])
@pytest.mark.parametrize("ratio", [1.05, 8])
@pytest.mark.parametrize("rows", ROWS)
def test_padded_rows_equal_the_rows_alone(rows, ratio, attention):
    model = tiny_model(attention=attention)
    texts, ids, mask = batch_of(rows)
    question = random_ids(len(rows), 5, seed=1)
    cache = compact(model, ids, ratio=ratio, mask=mask)
    assert cache.row_slots() == [max(1, int(n / ratio)) for n in rows]
    forwards = cache.clone()
    together = model.generate(**cache.prompt(question), past_key_values=cache, **GREEDY)
    logits = model(**forwards.continuation(question), past_key_values=forwards).logits
    again = random_ids(len(rows), 4, seed=2)
    second = model.generate(**cache.prompt(again, previous_ids=together), past_key_values=cache, **GREEDY)
    for row, text in enumerate(texts):
        alone = compact(model, text[None], ratio=ratio)
        own = model(question[row : row + 1], past_key_values=alone.clone()).logits
        torch.testing.assert_close(logits[row : row + 1], own, atol=1e-4, rtol=0)
        out = model.generate(**alone.prompt(question[row]), past_key_values=alone, **GREEDY)
        assert torch.equal(together[row, -11:], out[0, -11:])
        out = model.generate(**alone.prompt(again[row], previous_ids=out), past_key_values=alone, **GREEDY)
        assert torch.equal(second[row, -10:], out[0, -10:])


@pytest.mark.parametrize("slots", [10, 30])
def test_rows_with_the_same_slots_need_no_rewriting(slots):
    """The caller's own mask serves, and so does one with more pads than T - t."""
    model = tiny_model()
    texts, ids, mask = batch_of((40, 33))
    question = random_ids(2, 5, seed=1)
    cache = compact(model, ids, slots=slots, mask=mask)
    own = {"input_ids": torch.cat((ids, question), 1), "attention_mask": torch.cat((mask, torch.ones(2, 5).long()), 1)}
    together = model.generate(**own, past_key_values=cache, **GREEDY)
    for row, text in enumerate(texts):
        alone = compact(model, text[None], slots=slots)
        out = model.generate(**alone.prompt(question[row]), past_key_values=alone, **GREEDY)
        assert torch.equal(together[row, -6:], out[0, -6:])


def test_the_callers_own_mask_is_refused_where_it_would_show_dead_slots():
    model = tiny_model()
    _, ids, mask = batch_of((40, 25))
    question = random_ids(2, 5, seed=1)
    own = {"input_ids": torch.cat((ids, question), 1), "attention_mask": torch.cat((mask, torch.ones(2, 5).long()), 1)}
    with pytest.raises(ValueError, match=r"cache\.prompt\(question_ids\)"):
        model.generate(**own, past_key_values=compact(model, ids, ratio=2, mask=mask), **GREEDY)
    with pytest.raises(ValueError, match=r"cache\.continuation\(new_ids\)"):
        model(question, past_key_values=compact(model, ids, ratio=2, mask=mask))
    cache = compact(model, ids, ratio=2, mask=mask)
    out = model.generate(**cache.prompt(question), past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="unequal slots"):  # the second turn wants its own prompt
        model.generate(torch.cat((out, question), 1), past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("attention", ["sdpa", "still"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_questions_of_unequal_lengths(kind, attention):
    """One context, three questions padded between it and themselves."""
    model = tiny_model(kind, attention=attention)
    context = random_ids(1, 40)
    asked = [random_ids(n, seed=n) for n in (6, 2, 4)]
    if kind in ("gemma3", "qwen3_next"):  # pads take up the window, and pass through the recurrence, as in transformers
        asked = [random_ids(6, seed=n) for n in range(3)]
    cache = compact(model, context, 10)
    question, question_mask = left_padded(asked)
    together = model.generate(**cache.prompt(question, question_mask), past_key_values=cache, **GREEDY)
    for row, text in enumerate(asked):
        alone = compact(model, context, 10)
        out = model.generate(**alone.prompt(text), past_key_values=alone, **GREEDY)
        assert torch.equal(together[row, -6:], out[0, -6:])


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_next"])
def test_padded_rows_beside_other_layers(kind):
    texts, ids, mask = batch_of((40, 25))
    question = random_ids(2, 5, seed=1)
    model = tiny_model(kind, attention="still")
    cache = compact(model, ids, ratio=4, mask=mask)
    together = model(**cache.continuation(question), past_key_values=cache).logits
    for row, text in enumerate(texts):
        alone = model(question[row : row + 1], past_key_values=compact(model, text[None], ratio=4)).logits
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)
    if kind == "gemma3":  # its window reads the mask columns that stock attention needs rewritten
        stock = tiny_model(kind)
        with pytest.raises(ValueError, match="sliding-window layer 0 reads the same mask columns"):
            compact(stock, ids, ratio=4, mask=mask).continuation(question)


def grow(model, mask=None, **options):
    options = {"keep_last": 4, **options}
    return StillCache(StridedCompactor(CHUNK), 4, attention_mask=mask, config=model.config, **options)


@pytest.mark.parametrize("attention", ["sdpa", "still"])
@pytest.mark.parametrize("rows", [(56, 20), (56, 3, 40), (36, 56), (20, 9)])
@pytest.mark.parametrize("mode", ["append", "recompact"])
def test_self_compacting_rows_equal_the_rows_alone(mode, rows, attention):
    """Lengths at which nothing falls due while the answer is decoded: there, stock attention puts compaction off."""
    model = tiny_model(attention=attention)
    texts, ids, mask = batch_of(rows)
    question = random_ids(len(rows), 5, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = grow(model, mask, mode=mode)
        read(model, ids, mask, cache)
        inputs, slots = cache.prompt(question, previous_ids=ids), cache.row_slots()
        together = model.generate(**inputs, past_key_values=cache, **GREEDY)
        for row, text in enumerate(texts):
            alone = grow(model, mode=mode)
            read(model, text[None], cache=alone)
            assert slots[row] == alone.row_slots()[0]
            inputs = alone.prompt(question[row], previous_ids=text[None])
            out = model.generate(**inputs, past_key_values=alone, **GREEDY)
            assert torch.equal(together[row, -6:], out[0, -6:])


def test_still_attention_compacts_padded_rows_while_it_generates():
    model = tiny_model(attention="still")
    texts, ids, mask = batch_of((18, 11))
    cache = grow(model, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=24)
        assert cache.row_slots() == [8, 4]
        for row, text in enumerate(texts):
            alone = grow(model)
            out = model.generate(text[None], past_key_values=alone, do_sample=False, max_new_tokens=24)
            assert torch.equal(together[row, -24:], out[0, -24:])


def test_stock_attention_puts_compaction_of_padded_rows_off():
    model = tiny_model()
    _, ids, mask = batch_of((18, 11))
    cache = grow(model, mask)
    with pytest.warns(UserWarning, match=r"compaction waits for cache\.prompt\(\)"):
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=24)
    assert torch.equal(out, model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24))
    assert cache.slots == 0
    cache.prompt(random_ids(2, 3), previous_ids=out)
    assert cache.row_slots() == [8, 4]


def test_padding_that_the_cache_was_not_told_of_is_refused():
    model = tiny_model()
    _, ids, mask = batch_of((18, 11))
    with pytest.raises(ValueError, match="attention_mask=attention_mask"):
        model.generate(ids, attention_mask=mask, past_key_values=grow(model), **GREEDY)
    with pytest.raises(ValueError, match="attention_mask=attention_mask"):
        model.generate(ids.clamp(min=3), past_key_values=grow(model, mask), **GREEDY)


def test_rows_that_are_as_wide_with_unequal_slots_keep_the_bias_of_each_slot():
    model = tiny_model(attention="still")
    compactor = StillCompactor.for_model(model, slots=4, chunk=CHUNK, beta=True)
    for layer in compactor.layers.values():
        layer.beta_head.weight.normal_(std=0.5)

    def answers(ids, question, mask=None):
        cache = StillCache(compactor, slots=4, keep_last=0, attention_mask=mask)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(model, ids, mask, cache)
        slots, width = cache.row_slots(), cache.physical_length
        parts = [
            model(**cache.continuation(part), past_key_values=cache).logits[:, -1] for part in question.split(2, dim=1)
        ]
        return slots, width, torch.stack(parts, dim=1)

    texts, ids, mask = batch_of((36, 24))
    question = random_ids(2, 4, seed=1)
    slots, width, together = answers(ids, question, mask)
    assert (slots, width) == ([8, 4], 12)
    for row, text in enumerate(texts):
        own, width, alone = answers(text[None], question[row : row + 1])
        assert (own, width) == ([slots[row]], 12)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "still"])
@pytest.mark.parametrize("lengths", [(40, 40), (40, 25)])
def test_a_second_turn_hides_what_rows_that_ended_early_were_filled_up_with(lengths, attention):
    model = tiny_model(attention=attention)
    texts, ids, mask = batch_of(lengths)
    question, again = random_ids(2, 5, seed=1), random_ids(2, 4, seed=2)
    first = compact(model, ids, ratio=4, mask=mask)
    free = model.generate(**first.prompt(question), past_key_values=first, **GREEDY)
    ends = int(free[0, -4])  # row 0 ends after three tokens of six
    assert ends not in torch.cat((free[1, -6:], free[0, -6:-4]))
    stop = {**GREEDY, "eos_token_id": ends, "pad_token_id": 0}
    cache = compact(model, ids, ratio=4, mask=mask)
    together = model.generate(**cache.prompt(question), past_key_values=cache, **stop)
    real = torch.ones_like(together)
    real[0, -3:] = 0
    second = model.generate(
        **cache.prompt(again, previous_ids=together, previous_mask=real), past_key_values=cache, **GREEDY
    )
    third = cache.continuation(random_ids(2, 3, seed=3))
    logits = model(**third, past_key_values=cache).logits
    for row, text in enumerate(texts):
        alone = compact(model, text[None], ratio=4)
        out = model.generate(**alone.prompt(question[row]), past_key_values=alone, **stop)
        out = model.generate(**alone.prompt(again[row], previous_ids=out), past_key_values=alone, **GREEDY)
        assert torch.equal(second[row, -10:], out[0, -10:])
        own = model(**alone.continuation(random_ids(2, 3, seed=3)[row]), past_key_values=alone).logits
        torch.testing.assert_close(logits[row : row + 1], own, atol=1e-4, rtol=0)


def test_what_cannot_be_hidden_is_refused():
    model = tiny_model()
    cache = compact(model, random_ids(2, 40, seed=3), ratio=4)
    out = model.generate(**cache.prompt(random_ids(2, 5, seed=1)), past_key_values=cache, **GREEDY)
    ask = random_ids(2, 4, seed=2)
    real = torch.ones_like(out)
    with pytest.raises(ValueError, match="previous_mask has shape"):
        cache.prompt(ask, previous_ids=out, previous_mask=real[:, 1:])
    real[1, 42] = 0
    with pytest.raises(ValueError, match="row 1 of previous_mask hides tokens that others follow"):
        cache.prompt(ask, previous_ids=out, previous_mask=real)
    real[1, 38:] = 0
    with pytest.raises(ValueError, match="the last 12 tokens of row 1 are padding, and only its last 10 are still raw"):
        cache.prompt(ask, previous_ids=out, previous_mask=real)
    mixed = tiny_model("qwen3_next")
    cache = compact(mixed, random_ids(2, 40, seed=3), ratio=4)
    out = mixed.generate(**cache.prompt(random_ids(2, 5, seed=1)), past_key_values=cache, **GREEDY)
    real = torch.ones_like(out)
    real[0, -2:] = 0
    with pytest.raises(ValueError, match="are recurrent and have read the padding already"):
        cache.prompt(ask, previous_ids=out, previous_mask=real)


def test_a_question_padded_on_the_right_is_refused():
    model = tiny_model()
    cache = compact(model, random_ids(2, 40, seed=3), ratio=4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for make in (cache.prompt, cache.continuation):
        with pytest.raises(ValueError, match="row 1 of attention_mask is padded right of a token"):
            make(random_ids(2, 4, seed=1), mask)
