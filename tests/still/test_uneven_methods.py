"""Every method with a split: each head gets what the method would keep of it at that many slots."""

from __future__ import annotations

import pytest
import torch
from tiny_models import left_padded, random_ids, tiny_model

import still.attention
from still import methods
from still.budgets import Split
from still.compactor import StillCompactor, fingerprint
from still.reading import read

T = 40
SPLIT = Split({0: (1, 19), 1: (8, 12)})


@pytest.fixture(autouse=True)
def _no_grad():
    still.attention.register()
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    still.attention.register()
    return tiny_model(attention="still")


def method_of(name, model, **options):
    if name == "still":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            options["compactor"] = StillCompactor.for_model(model, slots=8, chunk=64).requires_grad_(False)
            for weight in options["compactor"].parameters():
                weight.add_(torch.randn_like(weight), alpha=0.01)
    return methods.get(name, **options)


@pytest.mark.parametrize("name", methods.SPLIT_NAMES)
def test_a_head_gets_what_the_method_keeps_at_its_count(name, model):
    rows = [random_ids(T), random_ids(30, seed=1)]
    ids, mask = left_padded(rows)
    method = method_of(name, model, split=SPLIT)
    reading = read(model, ids, mask, queries=True)
    cache = method.compact(model, reading, ratio=4)
    assert cache.row_slots() == [10, 7]
    assert cache.provenance["options"].get("split", "given") == "given"
    for row, text in enumerate(rows):
        counts = SPLIT.counts(len(text), len(text) // 4)
        assert cache.head_slots(row) == {layer: list(own) for layer, own in counts.items()}
        for layer, own in counts.items():
            heads = cache.layers[layer].ragged.heads(row)
            for head, count in enumerate(own):
                wanted = method_of(name, model).compact(model, reading, slots=count).layers[layer]
                torch.testing.assert_close(heads[head][0], wanted.keys[row, head], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(heads[head][1], wanted.values[row, head], atol=1e-3, rtol=1e-3)
    answer = model.generate(
        **cache.prompt(random_ids(2, 5, seed=1)), past_key_values=cache, do_sample=False, max_new_tokens=3
    )
    assert answer.shape == (2, T + 5 + 3)


def test_a_compactor_carries_its_split(model, tmp_path):
    compactor = method_of("still", model).compactor
    with pytest.raises(ValueError, match="carries no split of its own"):
        compactor.with_split()
    compactor.config.split = Split(SPLIT.weights, fingerprint=fingerprint(model)).to_dict()
    compactor.save_pretrained(tmp_path)
    loaded = StillCompactor.from_pretrained(tmp_path, model=model)
    uneven = loaded.with_split()
    assert (loaded.split, uneven.split.weights) == (None, SPLIT.weights)
    ids = random_ids(1, T)
    cache = uneven.prefill(model, ids, ratio=11.3)
    assert cache.head_slots() == {0: [1, 5], 1: [2, 4]}
    assert cache.provenance["split"]["source"] == "given"
    assert loaded.prefill(model, ids, ratio=11.3).head_slots() == {0: [3, 3], 1: [3, 3]}
    long = uneven.prefill(model, random_ids(1, 150), ratio=10)  # three chunks, each with the split
    assert sum(map(sum, long.head_slots().values())) == 4 * 15
    floored = loaded.with_split(Split(SPLIT.weights, floor=4))
    short = floored.prefill(model, random_ids(1, 140), ratio=20)  # each chunk has fewer slots a head than the floor
    assert sum(map(sum, short.head_slots().values())) == 4 * 7
    assert min(min(own) for own in short.head_slots().values()) >= 7
    with pytest.raises(ValueError, match=r"fewer than a floor of 4 for each: they are used up at layer 1, KV head 0"):
        floored.prefill(model, ids, ratio=20)
    again = uneven.prefill(model, random_ids(1, 150), ratio=10, mode="recompact")
    assert sum(map(sum, again.head_slots().values())) == 4 * 15
    out = model.generate(**long.prompt(ids[:, :5]), past_key_values=long, do_sample=False, max_new_tokens=3)
    assert out.shape == (1, 158)
    with pytest.raises(ValueError, match="made for a model with fingerprint 77"):
        loaded.with_split(Split(SPLIT.weights, fingerprint="77"))


def test_methods_that_keep_all_heads_alike_refuse_a_split():
    for name in set(methods.NAMES) - set(methods.SPLIT_NAMES):
        with pytest.raises(ValueError, match=f"{name} keeps as much of every head; a split serves truncation, random"):
            methods.get(name, split=SPLIT)


def test_a_split_for_another_model_is_refused(model):
    method = methods.get("knorm", split=Split({0: (1, 1), 1: (1, 1)}, fingerprint="77"))
    with pytest.raises(ValueError, match="made for a model with fingerprint 77"):
        method.compact(model, read(model, random_ids(1, T)), ratio=4)
