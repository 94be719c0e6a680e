"""Unequal heads: each has as many slots as it needs, and everything that a cache does still holds."""

from __future__ import annotations

import pytest
import torch
from cache_cases import read, strided
from tiny_models import HEAD_DIM, left_padded, random_ids, tiny_model
from transformers import DiffLlamaConfig, JetMoeConfig

import still.attention
from still.budgets import Split
from still.cache import StillCache
from still.cache_ragged import as_ragged
from still.compactor import StillCompactor
from still.rope import full_attention_layers
from still.types import CompactKV

T, QUESTION = 40, 6
GREEDY = {"do_sample": False, "max_new_tokens": 5}
SPLIT = [(1, 20), (7, 12)]  # slots of each head, in each full-attention layer


@pytest.fixture(autouse=True)
def _no_grad():
    still.attention.register()
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    still.attention.register()
    return tiny_model(attention="still")


@pytest.fixture(scope="module")
def context():
    return random_ids(2, T)


@pytest.fixture(scope="module")
def question():
    return random_ids(2, QUESTION, seed=1)


def kept(keys, values, counts) -> CompactKV:
    """Evenly spaced tokens, as many of each head as it has slots."""
    places = [strided(keys.shape[2], n) for n in counts]
    packed = [torch.cat([x[:, h, at] for h, at in enumerate(places)], dim=1) for x in (keys, values)]
    return CompactKV(*packed, counts=tuple(counts))


def ragged(model, ids, split=SPLIT, source=None) -> StillCache:
    source = read(model, ids)[0] if source is None else source
    full = full_attention_layers(model.config)
    layers = {i: kept(source.layers[i].keys, source.layers[i].values, n) for i, n in zip(full, split, strict=True)}
    return StillCache.from_layers(model.config, layers, T, source=source, token_ids=ids)


def biased(model, ids, split=SPLIT) -> StillCache:
    """The same slots in a uniform cache, in which a bias of minus infinity hides what a head does not have."""
    source = read(model, ids)[0]
    layers = {}
    for layer, counts in zip(full_attention_layers(model.config), split, strict=True):
        keys, values = source.layers[layer].keys, source.layers[layer].values
        beta = torch.full(keys.shape[:3], -torch.inf)
        for head, count in enumerate(counts):
            beta[:, head, strided(T, count)] = 0
        layers[layer] = CompactKV(keys, values, beta)
    return StillCache.from_layers(model.config, layers, T, source=source, token_ids=ids)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "qwen3_next"])
def test_heads_attend_to_their_own_slots(kind, context, question):
    model = tiny_model(kind, attention="still")
    cache, wanted = ragged(model, context), biased(model, context)
    assert cache.ragged
    assert (cache.logical_length, cache.slots, cache.physical_length) == (T, 10, 10)
    assert list(cache.head_slots().values()) == [list(n) for n in SPLIT]
    fork = cache.clone()
    logits = model(question, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(question, past_key_values=wanted).logits, atol=1e-4, rtol=0)
    out = model.generate(**fork.prompt(question), past_key_values=fork, **GREEDY)
    oracle = biased(model, context)
    assert torch.equal(out, model.generate(**oracle.prompt(question), past_key_values=oracle, **GREEDY))
    again = [
        model.generate(**x.prompt(question, previous_ids=out), past_key_values=x, **GREEDY) for x in (fork, oracle)
    ]
    assert torch.equal(*again)


def test_equal_counts_equal_the_uniform_path():
    """Logits and gradients of a fresh compactor's slots, given as a split of equal numbers."""
    model = tiny_model(attention="still")
    compactor = StillCompactor.for_model(model, slots=10, chunk=T)
    ids, question = random_ids(2, T), random_ids(2, QUESTION, seed=1)
    source = read(model, ids)[0]
    outcomes = []
    for change in (lambda record: record, as_ragged):
        compactor.zero_grad()
        with torch.enable_grad():
            layers = {i: change(x) for i, x in compactor.compact_rows(source, [T, T], slots=10).items()}
            cache = StillCache.from_layers(model.config, layers, T, token_ids=ids)
            logits = model(question, past_key_values=cache).logits
            logits.square().mean().backward()
        outcomes.append((logits, {name: x.grad for name, x in compactor.named_parameters() if x.grad is not None}))
    assert cache.ragged
    torch.testing.assert_close(*(logits for logits, _ in outcomes), atol=1e-5, rtol=0)
    assert any(x.abs().max() > 1e-4 for x in outcomes[0][1].values())
    torch.testing.assert_close(outcomes[1][1], outcomes[0][1], atol=1e-5, rtol=1e-5)


def test_bytes_are_the_sum_of_what_exists(tmp_path):
    tokens, heads, layers = 2048, 2, 4
    split = [(1, 200), (20, 3), (1, 1), (700, 98)]
    config = tiny_model(layers=layers).config
    wide = torch.randn(2, 1, heads, tokens, HEAD_DIM)
    cache = StillCache.from_layers(
        config, {i: kept(*wide, n) for i, n in enumerate(split)}, tokens, token_ids=random_ids(1, tokens)
    )
    exact = 2 * HEAD_DIM * 4 * sum(map(sum, split))
    assert cache.nbytes == exact
    assert cache.padded_nbytes == 2 * HEAD_DIM * 4 * 700 * heads * layers
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for layer in cache.layers
                for x in (layer.ragged.keys, layer.ragged.values, layer.ragged.positions)}  # fmt: skip
    assert exact <= sum(storages.values()) <= 1.02 * exact
    text = cache.describe()
    assert (text["slots"], text["ratio"], text["nbytes"], text["ragged"]) == (128, 16, exact, True)
    assert text["head_slots"]["3"] == [700, 98]
    assert text["padded_nbytes"] == cache.padded_nbytes
    assert exact < cache.save(tmp_path / "matter").stat().st_size <= 1.02 * exact


def test_a_loaded_cache_answers_as_the_saved_one(model, context, question, tmp_path):
    cache = ragged(model, context)
    loaded = StillCache.load(cache.save(tmp_path / "matter"), model, verify=True)
    for a, b in zip(cache.layers, loaded.layers, strict=True):
        for name in ("keys", "values", "positions", "counts"):
            assert torch.equal(getattr(a.ragged, name), getattr(b.ragged, name))
    assert loaded.describe() == cache.describe()
    wanted = model(question, past_key_values=cache).logits
    assert torch.equal(model(question, past_key_values=loaded).logits, wanted)


def padded_batch(rows=(40, 25, 11), seed=0):
    texts = [random_ids(n, seed=10 + n + seed) for n in rows]
    return texts, *left_padded(texts)


def test_padded_rows_equal_the_rows_alone(model):
    texts, ids, mask = padded_batch()
    splits = [SPLIT, [(2, 5), (4, 9)], [(1, 11), (1, 1)]]
    alone = []
    for text, split in zip(texts, splits, strict=True):
        source = read(model, text[None])[0]
        layers = {i: kept(source.layers[i].keys, source.layers[i].values, n) for i, n in enumerate(split)}
        alone.append((layers, StillCache.from_layers(model.config, layers, len(text), token_ids=text[None])))
    layers = {}
    for i in range(2):
        widths = [max(split[i][head] for split in splits) for head in range(2)]
        both = []
        for name in ("keys", "values"):
            out = torch.zeros(3, sum(widths), HEAD_DIM)
            for row, (own, _) in enumerate(alone):
                for head, part in enumerate(getattr(own[i], name)[0].split(own[i].counts)):
                    end = sum(widths[: head + 1])
                    out[row, end - len(part) : end] = part
            both.append(out)
        layers[i] = CompactKV(*both, counts=tuple(widths), row_counts=tuple(split[i] for split in splits))
    cache = StillCache.from_layers(model.config, layers, 40, token_ids=ids, attention_mask=mask)
    assert cache.row_slots() == [10, 5, 4]
    assert cache.nbytes == sum(one.nbytes for _, one in alone)
    asked = random_ids(3, 5, seed=1)
    fork, rows = cache.clone(), [one.clone() for _, one in alone]
    logits = model(**fork.continuation(asked), past_key_values=fork).logits
    together = model.generate(**cache.prompt(asked), past_key_values=cache, **GREEDY)
    for row, one in enumerate(rows):
        own = model(asked[row : row + 1], past_key_values=one.clone()).logits
        torch.testing.assert_close(logits[row : row + 1], own, atol=1e-4, rtol=0)
        out = model.generate(**one.prompt(asked[row]), past_key_values=one, **GREEDY)
        assert torch.equal(together[row, -5:], out[0, -5:])
    picked = fork.clone()
    picked.batch_select_indices(torch.tensor([2, 0]))
    assert picked.row_slots() == [4, 10]
    assert picked.nbytes < fork.nbytes


def test_beams_questions_crop_and_offload(model, context, question):
    beams = {**GREEDY, "num_beams": 3}
    cache, oracle = ragged(model, context), biased(model, context)
    together = model.generate(**cache.prompt(question), past_key_values=cache, **beams)
    assert torch.equal(together, model.generate(**oracle.prompt(question), past_key_values=oracle, **beams))

    one = ragged(model, context[:1])
    many = one.clone()
    logits = model(**many.continuation(question), past_key_values=many).logits  # two questions after one context
    for row in range(2):
        own = model(question[row : row + 1], past_key_values=one.clone()).logits
        torch.testing.assert_close(logits[row : row + 1], own, atol=1e-5, rtol=0)

    fork = one.clone()
    model(question[:1], past_key_values=fork)
    fork.crop(-QUESTION)
    assert fork.logical_length == T
    torch.testing.assert_close(model(question[:1], past_key_values=fork).logits, own_logits(model, one, question))
    with pytest.raises(ValueError, match="only 6 are still raw"):
        fork.crop(-QUESTION - 1)
    for layer in one.layers:
        layer.offload()
        layer.prefetch()
    assert torch.equal(own_logits(model, one, question), model(question[:1], past_key_values=one.clone()).logits)


def own_logits(model, cache, question):
    return model(question[:1], past_key_values=cache.clone()).logits


class RaggedStrided:
    """Keeps evenly spaced tokens, a quarter of the budget in the first head and the rest in the second."""

    def __init__(self, chunk=16, whole=False):
        self.config = type("Config", (), {"chunk": chunk})
        self.whole = whole

    def head_counts(self, tokens, slots) -> dict[int, tuple[int, ...]]:
        few = max(1, slots // 2)
        return {layer: (slots, slots) if self.whole else (few, 2 * slots - few) for layer in range(2)}

    def compact_layer(self, layer, keys, values, positions, slots, heads=None) -> CompactKV:
        if heads is not None:
            at = strided(keys.shape[2], slots)
            where = positions[None] if positions.ndim == 1 else positions
            return CompactKV(keys[:, :, at], values[:, :, at], positions=where[:, at])
        counts = self.head_counts(keys.shape[2], slots)[layer]
        places = [strided(keys.shape[2], n) for n in counts]
        where = positions[None] if positions.ndim == 1 else positions
        record = kept(keys, values, counts)
        return record._replace(positions=torch.cat([where[:, at] for at in places], dim=1))


@pytest.mark.parametrize("mode", ["append", "recompact"])
def test_a_growing_cache_keeps_its_split(model, mode):
    ids, mask = padded_batch((56, 37))[1:]
    options = {"keep_last": 4, "mode": mode, "config": model.config}
    cache = StillCache(RaggedStrided(), 4, attention_mask=mask, **options)
    read(model, ids, mask, cache)
    inputs, slots = cache.prompt(random_ids(2, 3, seed=5), previous_ids=ids), cache.row_slots()
    together = model.generate(**inputs, past_key_values=cache, **GREEDY)
    for row, text in enumerate(padded_batch((56, 37))[0]):
        alone = StillCache(RaggedStrided(), 4, **options)
        read(model, text[None], cache=alone)
        assert alone.row_slots()[0] == slots[row] == ((len(text) - 4) // 16 * 4 if mode == "append" else 4)
        few = slots[row] // 2
        assert alone.head_slots() == {layer: [few, 2 * slots[row] - few] for layer in range(2)}
        assert alone.layers[0].ragged.positions.max() < (len(text) - 4) // 16 * 16
        inputs = alone.prompt(random_ids(2, 3, seed=5)[row], previous_ids=text[None])
        out = model.generate(**inputs, past_key_values=alone, **GREEDY)
        assert torch.equal(together[row, -5:], out[0, -5:])


@pytest.mark.parametrize("mode", ["append", "recompact"])
def test_a_growing_cache_of_equal_counts_equals_the_uniform_one(model, mode):
    from cache_cases import StridedCompactor

    ids, question = random_ids(1, 56), random_ids(1, 3, seed=5)
    logits = []
    for compactor in (StridedCompactor(16), RaggedStrided(whole=True)):
        cache = StillCache(compactor, 4, keep_last=4, mode=mode, config=model.config)
        for part in ids.split(16, dim=1):
            model(part, past_key_values=cache)
        logits.append(model(question, past_key_values=cache).logits)
    assert cache.ragged
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_unequal_slots_that_a_later_chunk_takes_back_fall_silent(model):
    class TakingBack(RaggedStrided):
        def taken_back(self, layer, slots, later, heads=None):
            gone = torch.zeros(slots[0].shape[:3], dtype=torch.bool)
            gone[1, :, 1] = heads == [1]  # the second slot of the second row's second head
            return gone

    ids = random_ids(2, 40)
    caches = [StillCache(each, 4, keep_last=4, config=model.config) for each in (RaggedStrided(), TakingBack())]
    for cache in caches:
        read(model, ids[:, :20], cache=cache)
        read(model, ids[:, 20:], cache=cache)
    before, after = (cache.layers[0].ragged.heads(1) for cache in caches)
    for part in (0, 1):
        assert not after[1][part][1].any()
        kept = [place for place in range(len(before[1][part])) if place != 1]
        assert torch.equal(after[1][part][kept], before[1][part][kept])
        assert torch.equal(after[0][part], before[0][part])
    for one, other in zip(*(cache.layers[0].ragged.heads(0) for cache in caches), strict=True):
        assert torch.equal(one[0], other[0])


def test_slots_appended_to_what_was_read(model, context, question):
    """A second stretch of the context: its raw tokens give way to ragged slots."""
    cache = ragged(model, context[:1])
    more = random_ids(1, 20, seed=7)
    model(more, past_key_values=cache)
    layers = {layer.index: kept(*layer.raw()[:2], (3, 9)) for layer in cache.compact_layers}
    cache.append_compact(layers, 20, token_ids=more)
    assert (cache.logical_length, cache.slots) == (T + 20, 16)
    assert cache.head_slots() == {0: [4, 29], 1: [10, 21]}
    assert cache.layers[0].ragged.heads()[0][2].tolist() == [0, 40, 50, 59]
    out = model.generate(**cache.prompt(question[0]), past_key_values=cache, **GREEDY)
    assert torch.equal(out[:, :T + 20], torch.cat((context[:1], more), dim=1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_stock_attention_pads_one_split_or_refuses(attention, context, question):
    ours, stock = tiny_model(attention="still"), tiny_model(attention=attention)
    same = [(3, 17), (3, 17)]
    wanted = model_logits(ours, ragged(ours, context, same), question)
    torch.testing.assert_close(model_logits(stock, ragged(stock, context, same), question), wanted, atol=1e-4, rtol=0)
    for call in (
        lambda: stock(question, past_key_values=ragged(stock, context, same)),  # no mask over the padding
        lambda: model_logits(stock, ragged(stock, context), question),  # the layers differ
        lambda: ragged(stock, context, same).prompt(question),
        lambda: stock.generate(
            torch.cat((context, question), 1), past_key_values=ragged(stock, context, same), **GREEDY
        ),
    ):
        with pytest.raises(ValueError, match=rf"attn_implementation='{attention}' cannot serve.*still\.attention"):
            call()


def model_logits(model, cache, question):
    return model(**cache.continuation(question), past_key_values=cache).logits


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ([(0, 20), (7, 12)], "layer 0, KV head 0 has 0 slots; every head needs 1 or more"),
        ([(1, 20), (7, 41)], "layer 1, KV head 1 has 41 slots for 40 tokens"),
        ([(1, 20), (7, 12, 3)], "layer 1 has counts for 3 KV heads and the model has 2"),
    ],
)
def test_bad_records_name_the_head_and_the_number(split, message):
    wide = torch.randn(2, 1, 3, 50, HEAD_DIM)
    layers = {i: kept(*wide[:, :, : len(n)], n) for i, n in enumerate(split)}
    with pytest.raises(ValueError, match=message):
        StillCache.from_layers(tiny_model().config, layers, T)


def test_slots_that_reach_no_attention_are_refused():
    """A cache for one attention in a model that runs another would answer as without the context."""
    ids, question = random_ids(1, 40), random_ids(1, 5, seed=1)
    apart, stock = tiny_model(attention="still"), tiny_model(attention="sdpa")
    compactor = StillCompactor.for_model(apart, ratio=4, chunk=64).with_split(Split({0: (1, 3), 1: (3, 1)}))
    cache = compactor.prefill(stock, ids, ratio=4)
    with pytest.raises(ValueError, match="ragged"):
        cache.prompt(question)
    cache = compactor.prefill(apart, ids, ratio=4)
    with pytest.raises(ValueError, match="a layer's slots reached no attention"):
        stock(**cache.continuation(question), past_key_values=cache)
    with pytest.raises(ValueError, match="fingerprint"):
        compactor.prefill(tiny_model("llama3", attention="still"), ids, ratio=4)


def test_models_that_change_the_keys_of_their_cache_are_refused():
    """JetMoE repeats them, Differential Llama pairs keys of one head with values of another."""
    shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    jet = JetMoeConfig(
        **shape, num_key_value_heads=2, kv_channels=16, num_local_experts=2, num_experts_per_tok=1, head_dim=16
    )
    pairs = DiffLlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    for config, message in ((jet, "reached no attention"), (pairs, "changes keys or values")):
        model = tiny_model(config, attention="still")
        compactor = StillCompactor.for_model(model, ratio=4, chunk=64).with_split(Split({0: (1, 3), 1: (3, 1)}))
        cache = compactor.prefill(model, random_ids(1, 40), ratio=4)
        with pytest.raises(ValueError, match=message):
            model(**cache.continuation(random_ids(1, 5, seed=1)), past_key_values=cache)
