"""A cache that compacts by itself: append, recompact, and decoders that roll back."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from cache_cases import StridedCompactor, compact, masked_logits, read, strided
from tiny_models import random_ids, tiny_model

from still.cache import CompactLayer, StillCache
from still.types import CompactKV

CHUNK, KEEP = 16, 4
GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


def growing(model, ratio=4, **options) -> StillCache:
    return StillCache(StridedCompactor(CHUNK), ratio, config=model.config, **{"keep_last": KEEP, **options})


def feed(model, cache, ids, chunk=CHUNK):
    for part in ids.split(chunk, dim=1):
        logits = model(part, past_key_values=cache).logits
    return logits


def chunked_visible(tokens, ratio=4, keep=KEEP) -> list[int]:
    """Context tokens that are left after whole chunks beyond the last `keep` gave way to strided slots."""
    chunks = max(0, (tokens - keep) // CHUNK)
    kept = [c * CHUNK + i for c in range(chunks) for i in strided(CHUNK, CHUNK // ratio).tolist()]
    return kept + list(range(chunks * CHUNK, tokens))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "qwen3_next", "llama3", "yarn"])
def test_whole_chunks_beyond_the_last_tokens_are_compacted(kind, attention):
    model = tiny_model(kind, attention=attention)
    for tokens in (19, 20, 35, 36, 37):
        ids, question = random_ids(2, tokens, seed=tokens), random_ids(2, 5, seed=1)
        cache = growing(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(first, model(ids).logits, atol=1e-4, rtol=0)  # this forward saw raw tokens
        chunks = (tokens - KEEP) // CHUNK
        assert (cache.slots, cache.logical_length) == (4 * chunks, tokens)
        assert cache.physical_length == tokens - 12 * chunks
        wanted = masked_logits(tiny_model(kind), ids, question, chunked_visible(tokens))
        torch.testing.assert_close(model(question, past_key_values=cache).logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["append", "recompact"])
def test_the_state_grows_as_it_should(model, mode):
    cache = growing(model, mode=mode)
    for chunks in range(1, 6):
        feed(model, cache, random_ids(1, CHUNK, seed=chunks))
        done = (chunks * CHUNK - KEEP) // CHUNK
        slots = 4 * done if mode == "append" else 4 * min(done, 1)
        assert (cache.slots, cache.physical_length) == (slots, slots + chunks * CHUNK - done * CHUNK)
        assert cache.logical_length == chunks * CHUNK
    cache.compact(keep_last=0, partial=True)
    assert cache.slots == cache.physical_length == (20 if mode == "append" else 4)


def test_a_short_last_chunk_gets_the_slots_of_its_length(model):
    cache = growing(model, keep_last=0)
    feed(model, cache, random_ids(1, 2 * CHUNK + 9))
    assert (cache.slots, cache.physical_length) == (8, 17)
    assert cache.compact(partial=True).row_slots() == [10]
    assert (cache.physical_length, cache.logical_length) == (10, 41)


def test_recompact_hands_on_the_slots_with_their_positions(model):
    seen = []

    class Watching(StridedCompactor):
        def compact_layer(self, layer, keys, values, positions, slots):
            if layer == 0:
                seen.append((positions.tolist(), slots))
            return super().compact_layer(layer, keys, values, positions, slots)

    cache = StillCache(Watching(CHUNK), 4, keep_last=0, mode="recompact", config=model.config)
    feed(model, cache, random_ids(1, 3 * CHUNK))
    first, second, third = (positions for positions, _ in seen)
    assert first == list(range(16))
    kept = [first[i] for i in strided(16, 4)]
    assert second == [*kept, *range(16, 32)]
    assert third == [*[second[i] for i in strided(20, 4)], *range(32, 48)]
    assert {slots for _, slots in seen} == {4}
    assert cache.layers[0].slot_positions.tolist() == [[third[i] for i in strided(20, 4)]]


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "qwen3_next"])
def test_generate_compacts_while_it_decodes(kind):
    """Stock generate() from an empty cache; each token equals the oracle's, whose mask follows the compaction."""
    model, ids = tiny_model(kind), random_ids(1, 18)
    cache = growing(model)
    with pytest.warns(UserWarning, match="18 tokens were read in one forward, past the compactor's trained 16"):
        out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=24)
    assert cache.slots == 8
    by_hand, step = growing(model), ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for position in range(18, 42):
            step = model(step, past_key_values=by_hand).logits[:, -1:].argmax(-1)
            assert step.item() == out[0, position]
    second = model.generate(**cache.prompt(random_ids(1, 5), previous_ids=out), past_key_values=cache, **GREEDY)
    assert second.shape[1] == 42 + 5 + 8


def test_chunked_reading_sees_slots_as_its_past(model):
    ids, question = random_ids(1, 48, seed=3), random_ids(1, 5, seed=1)
    cache = growing(model, keep_last=0)
    feed(model, cache, ids)
    by_hand = compact(model, ids[:, :16], 4)
    for start in (16, 32):
        part = ids[:, start : start + 16]
        model(part, past_key_values=by_hand)
        layers = {}
        for i, layer in enumerate(by_hand.layers):
            keys, values, _ = layer.raw()
            layers[i] = CompactKV(keys[:, :, strided(16, 4)], values[:, :, strided(16, 4)])
        by_hand.append_compact(layers, 16)
    assert torch.equal(by_hand.layers[1].slot_positions, cache.layers[1].slot_positions)
    wanted = model(question, past_key_values=by_hand).logits
    torch.testing.assert_close(model(question, past_key_values=cache).logits, wanted, atol=1e-5, rtol=0)
    whole, _ = read(model, ids)
    assert not torch.allclose(whole.layers[1].keys[:, :, 16:20], cache.layers[1].keys[:, :, 4:8])


@pytest.mark.parametrize("decoder", ["lookup", "assistant"])
def test_assisted_decoding_from_an_empty_cache(model, decoder):
    """Compaction waits for the crop after each forward."""
    ids = random_ids(1, 9, seed=4).repeat(1, 3)
    options = {"prompt_lookup_num_tokens": 4} if decoder == "lookup" else {"assistant_model": tiny_model(seed=0)}
    options |= {"do_sample": False, "max_new_tokens": 30}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = growing(model, ratio=1, keep_last=0)  # every token kept: rolling back must leave no trace
        assisted = model.generate(ids, past_key_values=whole, **options)
        assert torch.equal(assisted, model.generate(ids, do_sample=False, max_new_tokens=30))
        cache = growing(model)
        out = model.generate(ids, past_key_values=cache, **options)
        assert out.shape == (1, 57)
        assert cache.slots == 12
        # afterwards a plain forward compacts as before
        feed(model, cache, random_ids(1, 1))
        feed(model, cache, random_ids(1, CHUNK))
    assert cache.slots == 16


def test_compaction_waits_for_the_crop(model):
    ids, question = random_ids(1, CHUNK), random_ids(1, 5, seed=1)
    cache = growing(model, keep_last=0)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.crop(-3)
    assert (cache.slots, cache.physical_length, cache.logical_length) == (0, 13, 13)
    model(ids[:, 13:], past_key_values=cache)
    cache.crop(0)
    assert (cache.slots, cache.physical_length) == (4, 4)
    wanted = masked_logits(model, ids, question, strided(CHUNK, 4))
    torch.testing.assert_close(model(question, past_key_values=cache).logits, wanted, atol=1e-4, rtol=0)


def test_crop_reaches_raw_tokens_only(model):
    cache = growing(model)
    feed(model, cache, random_ids(1, 32))
    assert (cache.slots, cache.physical_length) == (4, 20)
    cache.crop(-16)
    assert (cache.logical_length, cache.physical_length) == (16, 4)
    with pytest.raises(ValueError, match="only 0 are still raw"):
        cache.crop(-1)


def test_beams_and_samples_compact_too(model):
    ids = random_ids(2, 12)
    for options in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        cache = growing(model)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=12, **options)
        assert out.shape[1] == 24
        assert cache.slots == 4
    beams = {"num_beams": 3, "max_new_tokens": 12}
    whole = growing(model, ratio=1)
    assert torch.equal(model.generate(ids, past_key_values=whole, **beams), model.generate(ids, **beams))


class TakingBack(StridedCompactor):
    """Takes back the first slot of the last head, and notes what it was shown."""

    def taken_back(self, layer, slots, later, heads=None):
        self.shown = [tuple(x.shape) for x in (*slots, *later)]
        gone = torch.zeros(slots[0].shape[:3], dtype=torch.bool)
        gone[:, -1, 0] = True
        return gone


def test_slots_that_a_later_chunk_takes_back_fall_silent(model):
    ids = random_ids(2, 2 * CHUNK + KEEP)
    plain, silent = growing(model), growing(model)
    silent.layers[0].policy = dataclasses.replace(silent.layers[0].policy, compactor=TakingBack(CHUNK))
    for cache in (plain, silent):
        feed(model, cache, ids)
    for name in ("keys", "values"):
        before, after = getattr(plain.layers[0], name), getattr(silent.layers[0], name)
        assert not after[:, -1, 0].any()
        assert before[:, -1, 0].all()
        assert torch.equal(after[:, :-1], before[:, :-1])
        assert torch.equal(after[:, -1, 1:], before[:, -1, 1:])
    heads, width = model.config.num_key_value_heads, before.shape[-1]
    columns = [(2, heads, 4, width), (2, heads, 4, width), (1, 4)]
    assert silent.layers[0].policy.compactor.shown[:3] == columns
    assert silent.layers[0].policy.compactor.shown[3:] == [*((2, heads, CHUNK, width),) * 2, (1, CHUNK)]
    assert silent.nbytes == plain.nbytes
    again = growing(model, mode="recompact")
    again.layers[0].policy = dataclasses.replace(again.layers[0].policy, compactor=TakingBack(CHUNK))
    feed(model, again, ids)
    assert not hasattr(again.layers[0].policy.compactor, "shown")  # there every slot is chosen anew


def test_a_compactor_with_a_bias():
    import still.attention

    still.attention.register()
    model = tiny_model(attention="still")

    class Biased(StridedCompactor):
        def compact_layer(self, *args):
            compact = super().compact_layer(*args)
            return compact._replace(beta=torch.zeros(compact.keys.shape[:3]))

    ids, question = random_ids(2, 40), random_ids(2, 5)
    logits = []
    for compactor in (Biased(CHUNK), StridedCompactor(CHUNK)):
        cache = StillCache(compactor, 4, keep_last=KEEP, config=model.config)
        feed(model, cache, ids)
        logits.append(feed(model, cache, question))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    cache = StillCache(Biased(CHUNK), 4, keep_last=0, mode="recompact", config=model.config)
    with pytest.raises(ValueError, match="recompact would lose the beta"):
        feed(model, cache, ids)


def test_bad_settings_are_refused_by_name(model):
    strided_16 = StridedCompactor(CHUNK, model)
    assert StillCache(strided_16).policy.ratio == 8
    for options, message in (
        ({"ratio": 0.5}, "ratio is 0.5; it must be 1 or more"),
        ({"slots": 17}, "slots is 17; it must lie between 1 and the chunk's 16"),
        ({"ratio": 2, "slots": 2}, "give one of ratio"),
        ({"keep_last": -1}, "keep_last is -1"),
        ({"mode": "forget"}, "mode is 'forget'"),
        ({"chunk": 0}, "chunk is 0"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "padded right of a token"),
    ):
        with pytest.raises(ValueError, match=message):
            StillCache(strided_16, **options)
    with pytest.raises(ValueError, match=r"config=model\.config"):
        StillCache(StridedCompactor(CHUNK))
    with pytest.raises(ValueError, match="has no compactor"):
        compact(model, random_ids(1, 20), 4).compact()
    with pytest.raises(ValueError, match="keep_last is -4"):
        StillCache(strided_16).compact(keep_last=-4, partial=True)

    class Generous(StridedCompactor):
        def compact_layer(self, layer, keys, values, positions, slots):
            return super().compact_layer(layer, keys, values, positions, slots + 1)

    with pytest.raises(ValueError, match="Generous kept 5 slots of layer 0; the budget of 16 columns is 4"):
        feed(model, StillCache(Generous(CHUNK), 4, keep_last=0, config=model.config), random_ids(1, CHUNK))


def test_columns_that_are_away_come_back_to_be_compacted_and_leave_again(model, monkeypatch):
    """Layer 1 is away: where its columns are is not where it computes."""
    events = []

    class Watching(StridedCompactor):
        def compact_layer(self, layer, *args):
            events.append(("compact", layer))
            return super().compact_layer(layer, *args)

    def prefetch(layer):
        events.append(("prefetch", layer.index))
        layer.device = layer.keys.device

    monkeypatch.setattr(CompactLayer, "prefetch", prefetch)
    monkeypatch.setattr(CompactLayer, "offload", lambda layer: events.append(("offload", layer.index)))
    cache = StillCache(Watching(CHUNK), 4, keep_last=CHUNK, config=model.config)
    model(random_ids(1, CHUNK), past_key_values=cache)
    cache.layers[1].device = torch.device("meta")
    cache.compact(keep_last=0)
    assert events == [("compact", 0), ("prefetch", 1), ("compact", 1), ("offload", 1)]
    assert (cache.slots, cache.physical_length) == (4, 4)
