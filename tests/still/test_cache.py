"""The drop-in contract: logical positions, physical masks, and what generate() makes of a compact cache."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from cache_cases import StridedCompactor, compact, masked_logits, read, strided
from packaging.version import Version
from tiny_models import CONFIGS, HEAD_DIM, qwen3_config, random_ids, tiny_model
from transformers import DynamicCache

from still.budgets import slots_for
from still.cache import StillCache
from still.types import CompactKV

T, QUESTION, NEW = 40, 6, 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def context():
    return random_ids(2, T)


@pytest.fixture(scope="module")
def question():
    return random_ids(2, QUESTION, seed=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("slots", [1, 13, T])
def test_slots_stand_at_logical_positions(kind, attention, slots, context, question):
    model = tiny_model(kind, attention=attention)
    wanted = masked_logits(tiny_model(kind), context, question, strided(T, slots))
    cache = compact(model, context, slots)
    assert (cache.logical_length, cache.physical_length, cache.slots) == (T, slots, slots)
    torch.testing.assert_close(model(question, past_key_values=cache).logits, wanted, atol=1e-4, rtol=0)
    assert (cache.logical_length, cache.physical_length) == (T + QUESTION, slots + QUESTION)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_generate_forward_and_second_turn_agree(kind, attention, context, question):
    model = tiny_model(kind, attention=attention)
    cache = compact(model, context, 10)
    other = cache.clone()
    out = model.generate(**cache.prompt(question), past_key_values=cache, **GREEDY)
    answer = out[:, T + QUESTION :]

    step, stepped = question, []
    for _ in range(NEW):
        step = model(step, past_key_values=other).logits[:, -1:].argmax(-1)
        stepped.append(step)
    assert torch.equal(torch.cat(stepped, dim=1), answer)

    again = random_ids(2, 5, seed=2)
    second = model.generate(**cache.prompt(again, previous_ids=out), past_key_values=cache, **GREEDY)
    turns = torch.cat((question, answer, again), dim=1)
    for length in range(NEW):
        said = torch.cat((turns, second[:, out.shape[1] + 5 :][:, :length]), dim=1)
        logits = masked_logits(tiny_model(kind), context, said, strided(T, 10))
        assert torch.equal(logits[:, -1].argmax(-1), second[:, out.shape[1] + 5 + length])


def test_full_size_equals_the_uncompressed_model(model, context, question):
    cache = compact(model, context, T)
    inputs = torch.cat((context, question), dim=1)
    wanted = model.generate(inputs, past_key_values=DynamicCache(config=model.config), **GREEDY)
    assert torch.equal(model.generate(inputs, past_key_values=cache, **GREEDY), wanted)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_token_changes_no_logits_before_it(kind, attention, context, question):
    model = tiny_model(kind, attention=attention)
    cache = compact(model, context, 10)
    before = model(question, past_key_values=cache.clone()).logits
    for j in range(QUESTION):
        changed = question.clone()
        changed[:, j] = (changed[:, j] + 1) % 90 + 3
        after = model(changed, past_key_values=cache.clone()).logits
        assert torch.equal(after[:, :j], before[:, :j])
        assert not torch.equal(after[:, j], before[:, j])


def test_source_and_clones_are_left_alone(context, question):
    for kind in ("qwen3", "gemma3", "qwen3_next"):
        model = tiny_model(kind)
        source, _ = read(model, context)
        kept = [tensor.clone() for layer in source.layers for tensor in tensors_of(layer)]
        full = {
            i: CompactKV(layer.keys[:, :, ::4], layer.values[:, :, ::4])
            for i, layer in enumerate(source.layers)
            if type(layer).__name__ == "DynamicLayer"
        }
        cache = StillCache.from_layers(model.config, full, T, source=source, token_ids=context)
        clone = copy.deepcopy(cache.clone())
        first = model(question, past_key_values=cache).logits
        assert torch.equal(model(question, past_key_values=clone).logits, first)
        after = [tensor for layer in source.layers for tensor in tensors_of(layer)]
        assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))


def tensors_of(layer):
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None), *states) if x is not None]


def check_budget(tokens, ratio):
    slots, batch, heads, layers = slots_for(tokens, ratio), 2, 2, 2
    wide = torch.zeros(2 * layers, batch, heads, tokens, HEAD_DIM)
    kept = {i: CompactKV(wide[2 * i, :, :, :slots].clone(), wide[2 * i + 1, :, :, :slots]) for i in range(layers)}
    cache = StillCache.from_layers(qwen3_config(), kept, tokens)
    assert cache.slots == cache.physical_length == slots
    assert all(layer.keys.shape == (batch, heads, slots, HEAD_DIM) for layer in cache.layers)
    assert cache.nbytes == 2 * layers * batch * heads * slots * HEAD_DIM * 4
    assert cache.get_mask_sizes(3, 0) == (slots + 3, tokens - slots)


def test_slots_and_bytes_equal_the_budget():
    for tokens in range(1, 1500, 71):
        for ratio in (1, 1.5, 2, 3, 8, 10.7, 64):
            check_budget(tokens, ratio)


@pytest.mark.full
def test_slots_and_bytes_equal_the_budget_in_full():
    for tokens in [*range(1, 600, 7), 1023, 1024, 1025, 4096]:
        for ratio in (1, 1.5, 2, 3, 4, 8, 10.7, 16, 32, 64, 200):
            check_budget(tokens, ratio)


def test_beams_and_several_return_sequences_repeat_the_slots(context, question):
    for kind in ("qwen3", "gemma3"):
        model = tiny_model(kind)
        wide = torch.cat((context, question), dim=1)
        for options in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
            options = {**GREEDY, **options}
            wanted = model.generate(wide, **options)
            cache = compact(model, context, T)
            assert torch.equal(model.generate(wide, past_key_values=cache, **options), wanted)
        sampled = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": NEW}
        torch.manual_seed(0)
        wanted = model.generate(wide, **sampled)
        torch.manual_seed(0)
        assert torch.equal(model.generate(wide, past_key_values=compact(model, context, T), **sampled), wanted)


def test_beams_over_recurrent_states_ask_for_a_wide_cache(context, question):
    model = tiny_model("qwen3_next")
    wide = torch.cat((context, question), dim=1)
    cache = compact(model, context, T)
    with pytest.raises(ValueError, match=r"batch_repeat_interleave\(2\)"):
        model.generate(wide, past_key_values=cache, num_beams=2, **GREEDY)
    cache = compact(model, context, T)
    cache.batch_repeat_interleave(2)
    wanted = model.generate(wide, num_beams=2, **GREEDY)
    assert torch.equal(model.generate(wide, past_key_values=cache, num_beams=2, **GREEDY), wanted)


def test_rows_can_be_selected_and_reordered(context, question):
    for kind in ("qwen3", "gemma3", "qwen3_next"):
        model = tiny_model(kind)
        cache = compact(model, context, 10)
        wanted = model(question, past_key_values=cache.clone()).logits
        swapped = cache.clone()
        swapped.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(model(question.flip(0), past_key_values=swapped).logits, wanted.flip(0))
        one = cache.clone()
        one.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(model(question[1:], past_key_values=one).logits, wanted[1:], atol=1e-5, rtol=0)
        assert torch.equal(one.token_ids, context[1:])


def test_one_context_serves_many_questions(model, context):
    questions = random_ids(3, QUESTION, seed=5)
    cache = compact(model, context[:1], 10)
    together = model.generate(**cache.prompt(questions), past_key_values=cache, **GREEDY)
    for row, asked in enumerate(questions):
        own = compact(model, context[:1], 10)
        alone = model.generate(**own.prompt(asked), past_key_values=own, **GREEDY)
        assert torch.equal(together[row : row + 1], alone)


def test_crop_takes_back_raw_tokens_only(model, context, question):
    cache = compact(model, context, 10)
    wanted = model(question, past_key_values=cache.clone()).logits
    model(random_ids(2, 4, seed=9), past_key_values=cache)
    cache.crop(-4)
    assert (cache.logical_length, cache.physical_length) == (T, 10)
    torch.testing.assert_close(model(question, past_key_values=cache).logits, wanted)
    with pytest.raises(ValueError, match="cannot crop 7 tokens: only 6 are still raw"):
        cache.crop(-7)
    with pytest.raises(ValueError, match="minus the tokens"):
        cache.crop(3)


def test_question_alone_is_refused_with_the_mend(model, context):
    for length in (1, T // 2, T // 2 + 5, T):  # generate() would feed nothing, or drop some of the longer ones
        with pytest.raises(ValueError, match=r"cache\.prompt\(question_ids\)"):
            model.generate(random_ids(2, length), past_key_values=compact(model, context, 10), **GREEDY)
    with pytest.raises(ValueError, match=r"cache\.prompt\(question_ids\)"):
        model(torch.empty(2, 0, dtype=torch.long), past_key_values=compact(model, context, 10))


def test_prompt_wants_the_ids_that_the_cache_stands_for(model, context, question):
    cache = compact(model, context, 10)
    model.generate(**cache.prompt(question), past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="knows the ids of 40: pass previous_ids="):
        cache.prompt(question)
    with pytest.raises(ValueError, match="cannot serve a batch of 3"):
        compact(model, context, 10).prompt(random_ids(3, 4))


def test_assisted_decoding_is_refused_with_a_prefilled_cache(model, context, question):
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model(seed=3)}):
        cache = compact(model, context[:1], 10)
        inputs = cache.prompt(question[:1])
        with pytest.raises(ValueError, match="assisted and prompt-lookup decoding would feed the whole prompt again"):
            model.generate(**inputs, past_key_values=cache, **options, **GREEDY)


def test_chunked_prefill_of_a_prefilled_cache(model, context, question):
    cache = compact(model, context, 10)
    wanted = model.generate(**cache.prompt(question), past_key_values=cache.clone(), **GREEDY)
    inputs = cache.prompt(question)
    if Version(transformers.__version__) < Version("5.21"):  # reads the whole prompt again
        with pytest.raises(ValueError, match="prefill_chunk_size=4"):
            model.generate(**inputs, past_key_values=cache, prefill_chunk_size=4, **GREEDY)
    else:
        assert torch.equal(model.generate(**inputs, past_key_values=cache, prefill_chunk_size=4, **GREEDY), wanted)


def test_sampling_and_offloading_hooks(model, context, question):
    cache = compact(model, context, 10)
    wanted = model(question, past_key_values=cache.clone()).logits
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert torch.equal(model(question, past_key_values=cache).logits, wanted)
    sampled = compact(model, context, 10)
    out = model.generate(**sampled.prompt(question), past_key_values=sampled, do_sample=True, max_new_tokens=NEW)
    assert out.shape == (2, T + QUESTION + NEW)


def test_reset_empties(model, context):
    cache = compact(model, context, 10)
    cache.reset()
    assert (cache.get_seq_length(), cache.physical_length, cache.nbytes) == (0, 0, 0)
    torch.testing.assert_close(model(context, past_key_values=cache).logits, model(context).logits)


def test_bad_layers_are_refused_by_name(model):
    def slots(t, heads=2, d=HEAD_DIM, batch=1):
        return CompactKV(torch.zeros(batch, heads, t, d), torch.zeros(batch, heads, t, d))

    def build(layers, tokens=20, **options):
        return StillCache.from_layers(model.config, layers, tokens, **options)

    with pytest.raises(ValueError, match=r"full-attention layers \[0, 1\]: \[1\] are missing"):
        build({0: slots(4)})
    with pytest.raises(ValueError, match="21 slots for 20 tokens"):
        build({0: slots(21), 1: slots(21)})
    with pytest.raises(ValueError, match="layer 1 has keys"):
        build({0: slots(4), 1: slots(5)})
    with pytest.raises(ValueError, match=r"the model and the other layers need \[1, 2, 4, 64\]"):
        build({0: slots(4, heads=4), 1: slots(4, heads=4)})
    with pytest.raises(ValueError, match="token_ids has 19"):
        build({0: slots(4), 1: slots(4)}, token_ids=random_ids(1, 19))
    with pytest.raises(ValueError, match="padded right"):
        build({0: slots(4), 1: slots(4)}, attention_mask=torch.tensor([[1] * 15 + [0] * 5]))
    with pytest.raises(ValueError, match="keep a state of their own"):
        StillCache.from_layers(tiny_model("gemma3").config, {1: slots(4), 3: slots(4)}, 20)


def test_slots_of_a_chunk_are_appended(model, context, question):
    """Two chunks, the second read with the slots of the first as its past, equal one mask over both."""
    cache = compact(model, context, 10)
    chunk, index = random_ids(2, 20, seed=7), strided(20, 5)
    model(chunk, past_key_values=cache)
    layers = {}
    for i, layer in enumerate(cache.layers):
        keys, values, positions = layer.raw()
        assert positions.tolist() == list(range(T, T + 20))
        layers[i] = CompactKV(keys[:, :, index], values[:, :, index])
    cache.append_compact(layers, 20, token_ids=chunk)
    assert (cache.slots, cache.physical_length, cache.logical_length) == (15, 15, T + 20)
    assert torch.equal(cache.token_ids, torch.cat((context, chunk), dim=1))
    by_itself = StillCache(StridedCompactor(T), slots=10, keep_last=0, config=model.config)
    model(context, past_key_values=by_itself)
    model(chunk, past_key_values=by_itself)
    by_itself.compact(partial=True)
    assert by_itself.slots == 15
    wanted = model(question, past_key_values=by_itself).logits
    torch.testing.assert_close(model(**cache.continuation(question), past_key_values=cache).logits, wanted)
    with pytest.raises(ValueError, match="slots for 20 tokens cannot replace the 6 raw"):
        cache.append_compact(layers, 20)
