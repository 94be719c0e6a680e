"""Slots of a context longer than a chunk stand within reach of what follows, wherever their tokens stood."""

from __future__ import annotations

import math

import pytest
import torch
from cache_cases import StridedCompactor
from test_compactor import answer, stirred
from tiny_models import CONFIGS, left_padded, random_ids, tiny_model

from still import StillCache, StillCompactor, attention
from still.budgets import Split
from still.cache_ragged import even_positions
from still.rope import unrotate

CHUNK = 16


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def compactor_for(model, **options):
    return stirred(StillCompactor.for_model(model, slots=4, chunk=CHUNK, **options))


def nearest(tokens: int, slots: int, reach: int = CHUNK) -> torch.Tensor:
    return even_positions(torch.tensor([tokens - reach, tokens - 1]), slots)


@pytest.mark.parametrize("kind", CONFIGS)
def test_slots_of_many_chunks_are_spread_over_the_trained_chunk(kind):
    """They are the same slots: without their rotation the first layer's are those of a cache that leaves them be."""
    model = tiny_model(kind)
    compactor, context = compactor_for(model), random_ids(2, 5 * CHUNK)
    far, near = (compactor.prefill(model, context, ratio=4, reach=reach) for reach in (math.inf, None))
    assert near.logical_length == far.logical_length == 5 * CHUNK
    assert near.slots == far.slots == 20
    assert far.compact_layers[0].slot_positions.tolist() != near.compact_layers[0].slot_positions.tolist()
    for layer in near.compact_layers:  # more slots than a chunk has tokens: one behind the other
        assert torch.equal(layer.slot_positions, nearest(5 * CHUNK, 20, reach=20))
    plain = [
        unrotate(own.keys, *compactor.rotary.cos_sin(own.index, own.slot_positions))
        for own in (far.compact_layers[0], near.compact_layers[0])
    ]
    torch.testing.assert_close(*plain, rtol=0, atol=1e-4)
    torch.testing.assert_close(far.compact_layers[0].values, near.compact_layers[0].values, rtol=0, atol=0)


def test_the_next_token_stands_where_it_would():
    """One layer's slots, moved by hand to where they should stand, give the same logits at the logical position."""
    model = tiny_model("qwen3", layers=1)
    compactor, context, question = compactor_for(model), random_ids(1, 64), random_ids(1, 5, seed=1)
    near = compactor.prefill(model, context, ratio=8)
    far = compactor.prefill(model, context, ratio=8, reach=math.inf)
    layer, where = far.compact_layers[0], nearest(64, 8)
    layer.keys = compactor.moved(0, layer.keys, layer.slot_positions, where)
    assert near.get_seq_length() == 64
    torch.testing.assert_close(answer(model, near.clone(), question), answer(model, far, question), rtol=0, atol=1e-4)
    out = model.generate(**near.prompt(question), past_key_values=near, do_sample=False, max_new_tokens=3)
    assert out.shape[1] == 64 + 5 + 3


def test_nothing_moves_within_reach():
    model = tiny_model("qwen3")
    compactor, context = compactor_for(model), random_ids(1, 64)
    for tokens, chunk, reach in ((64, 16, 64), (16, 4, None), (64, 16, 1000)):
        ids = context[:, :tokens]
        moved = compactor.prefill(model, ids, ratio=4, chunk=chunk, reach=reach)
        still = compactor.prefill(model, ids, ratio=4, chunk=chunk, reach=math.inf)
        for ours, theirs in zip(moved.compact_layers, still.compact_layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.slot_positions, theirs.slot_positions)


@pytest.mark.parametrize("mode", ["append", "recompact"])
def test_uneven_heads_are_each_spread_over_the_reach(mode):
    attention.register()
    model = tiny_model("qwen3", attention="still")
    split = Split({0: (3.0, 1.0), 1: (1.0, 1.0)}, floor=0)
    compactor = compactor_for(model).with_split(split)
    size = {"slots": 4} if mode == "recompact" else {"ratio": 4}
    cache = compactor.prefill(model, random_ids(2, 48), **size, mode=mode, reach=24)
    for layer in cache.compact_layers:
        for row in range(2):
            for keys, _, where in layer.ragged.heads(row):
                assert where.tolist() == nearest(48, len(keys), 24)[0].tolist()


def test_raw_tokens_stay_and_so_do_padded_rows_lengths():
    model = tiny_model("qwen3")
    compactor = compactor_for(model)
    cache = StillCache(compactor, ratio=4, keep_last=5, reach=8)
    ids = random_ids(1, 52)
    for part in ids.split(CHUNK, dim=1):
        model(part, past_key_values=cache)
    layer = cache.compact_layers[0]
    raw, end = layer.physical - layer.slots, 2 * CHUNK
    assert (layer.slots, raw) == (8, 20)  # a third chunk would leave fewer than five tokens
    assert torch.equal(layer.slot_positions, nearest(end, 8, 8))
    rows = [random_ids(n, seed=n) for n in (64, 32)]
    ids, mask = left_padded(rows)
    batch = compactor.prefill(model, ids, mask, ratio=8)
    alone = [compactor.prefill(model, row[None], ratio=8) for row in rows]
    for row, own in enumerate(alone):
        found = batch.compact_layers[0].slot_positions[row]
        assert found[found >= 0].tolist() == own.compact_layers[0].slot_positions[0].tolist()


def test_a_saved_cache_goes_on_with_its_reach(tmp_path):
    model = tiny_model("qwen3")
    compactor, ids = compactor_for(model), random_ids(1, 80)
    caches = [StillCache(compactor, ratio=4, keep_last=0, reach=reach) for reach in (12, math.inf)]
    for place, cache in enumerate(caches):
        for part in ids[:, :48].split(CHUNK, dim=1):
            model(part, past_key_values=cache)
        loaded = StillCache.load(cache.save(tmp_path / f"{place}.safetensors"), model, compactor=compactor)
        for part in ids[:, 48:].split(CHUNK, dim=1):
            for each in (cache, loaded):
                model(part, past_key_values=each)
        for ours, theirs in zip(cache.compact_layers, loaded.compact_layers, strict=True):
            assert torch.equal(ours.slot_positions, theirs.slot_positions)
            torch.testing.assert_close(ours.keys, theirs.keys)


def test_bad_reaches_are_refused_by_name():
    model = tiny_model("qwen3")
    compactor = compactor_for(model)
    for reach in (0, -3, 2.5):
        with pytest.raises(ValueError, match=f"reach is {reach}"):
            StillCache(compactor, ratio=4, reach=reach)
    with pytest.raises(ValueError, match="StridedCompactor cannot rotate its slots"):
        StillCache(StridedCompactor(CHUNK), ratio=4, config=model.config, reach=8)
    assert StillCache(StridedCompactor(CHUNK), ratio=4, config=model.config).policy.reach is None


def test_uneven_heads_are_compacted_again_with_a_short_last_chunk():
    """A head may have fewer columns than the average head is to keep, or no slot at all."""
    attention.register()
    model = tiny_model("qwen3", attention="still")
    compactor = compactor_for(model).with_split(Split({0: (3.9, 0.01), 1: (1.0, 1.0)}, floor=0))
    for tokens in (48, 49, 57):
        cache = compactor.prefill(model, random_ids(1, tokens), slots=4, mode="recompact")
        assert cache.logical_length == tokens
        assert torch.isfinite(answer(model, cache, random_ids(1, 3))).all()
        assert cache.head_slots() == {0: [10, 0], 1: [3, 3]}
