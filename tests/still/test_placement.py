from __future__ import annotations

import pytest
import torch
from test_compactor import answer, stirred
from tiny_models import left_padded, random_ids, tiny_model

from still import StillCompactor, StillConfig, read, slots_for
from still.attention import attending
from still.placement import LATER, SPREAD, STEEP, USUAL, Placement, choose, inclusion, phases


@pytest.mark.parametrize("slots", [1, 4, 25, 49, 50])
def test_inclusion_sums_up_to_the_slots_and_rises_with_the_logarithm_of_worth(slots):
    torch.manual_seed(0)
    worth = torch.rand(2, 3, 50) ** 4 + 1e-3
    worth[..., 7] = 1000
    share = inclusion(worth, slots)
    torch.testing.assert_close(share.sum(-1), torch.full((2, 3), float(slots), dtype=torch.float64))
    assert share.min() >= 0
    assert share.max() <= 1
    assert (share[..., 7] > 0.99).all()
    for shares, worths in zip(share.flatten(0, 1), worth.flatten(0, 1), strict=True):
        unsure = (shares > 0) & (shares < 1)
        level = worths[unsure].double().log() - SPREAD * shares[unsure]  # one level of water for all
        torch.testing.assert_close(level, level[:1].expand_as(level))
        if len(level):
            assert (worths[shares == 0].double().log() <= level[0] + 1e-9).all()
            assert (worths[shares == 1].double().log() >= level[0] + SPREAD - 1e-9).all()


def test_inclusion_adds_up_where_a_few_tokens_are_worth_all_the_slots():
    """Their sum is whole but for rounding where the others are far below the level."""
    torch.manual_seed(0)
    for _ in range(200):
        worth = torch.rand(30) * 1e-4 + 1e-6
        few = torch.randperm(30)[: int(torch.randint(1, 8, ()))]
        worth[few] = 1 + 1000 * torch.rand(len(few))
        share = inclusion(worth, len(few))
        assert share.sum() == pytest.approx(len(few))
        assert share[few].min() > 0.99


def test_inclusion_makes_the_most_of_heads_that_stand_in_for_one_another():
    """Each further head adds less: moving a little from one token to another never helps."""
    torch.manual_seed(0)
    worth = torch.rand(40) ** 3 + 0.01
    share = inclusion(worth, 6)

    def found(share):
        return (worth.double() * (1 - (-SPREAD * share).exp())).sum()

    best = found(share)
    for source in torch.nonzero(share > 0.01).flatten():
        for target in torch.nonzero(share < 0.99).flatten():
            moved = share.clone()
            moved[source] -= 0.01
            moved[target] += 0.01
            assert source == target or found(moved) <= best


@pytest.mark.parametrize("slots", [1, 3, 10])
def test_tokens_of_equal_worth_are_kept_alike(slots):
    share = inclusion(torch.full((2, 10), 0.3), slots)
    torch.testing.assert_close(share, torch.full((2, 10), slots / 10, dtype=torch.float64))


def test_heads_share_the_tokens_evenly():
    """A token of inclusion p is kept by the whole number of heads next to p times their number, never by chance."""
    heads = 8
    (phase,) = phases([torch.ones(heads)])
    torch.manual_seed(0)
    worth = torch.rand(1, 1, 400).expand(1, heads, -1) + 0.05
    kept = choose(inclusion(worth, 100), 100, phase)
    share = inclusion(worth, 100)[0, 0] * heads
    times = torch.bincount(kept.flatten(), minlength=400)
    assert (times - share).abs().mean() < 0.5
    assert (times - share).abs().max() < 2
    lone = torch.stack([torch.randperm(400)[:100] for _ in range(heads)])  # heads that do not know of each other
    by_chance = torch.bincount(lone.flatten(), minlength=400)
    evenly = torch.bincount(choose(torch.full((1, heads, 400), 0.25), 100, phase).flatten(), minlength=400)
    assert evenly.double().std() < 0.5 < by_chance.double().std()


def test_choices_are_distinct_in_order_and_keep_what_is_certain():
    torch.manual_seed(0)
    worth = torch.rand(2, 3, 60) + 0.01
    worth[:, :, [5, 40]] = 500
    kept = choose(inclusion(worth, 7), 7, torch.tensor([0.1, 0.5, 0.9]))
    assert kept.shape == (2, 3, 7)
    assert (kept.diff(dim=-1) > 0).all()
    assert ((kept == 5).any(-1) & (kept == 40).any(-1)).all()
    assert torch.equal(choose(inclusion(worth, 60), 60, torch.zeros(3)), torch.arange(60).expand(2, 3, -1))


def test_a_second_look_sees_what_later_tokens_of_the_list_repeat():
    torch.manual_seed(0)
    part = Placement(16, 2, 4)
    features = torch.randn(1, 2, 10, 16)
    features[:, :, 7, :8] = features[:, :, 3, :8]
    with torch.no_grad():
        part.second.compared.zero_()
        part.second.compared[0, :8, :8] = torch.eye(8)  # this head compares keys, the other one values
        part.second.compared[1, 8:, :8] = torch.eye(8)
    seen = []
    part.second.scorer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    part.second(features)
    for head, half in enumerate((features[0, 0, :, :8], features[0, 1, :, 8:])):
        keys = torch.nn.functional.normalize(half, dim=-1)
        for row in range(10):
            later = sorted([max(0.0, (keys[row] @ key).item()) for key in keys[row + 1 :]] + [0, 0], reverse=True)
            expected = [STEEP * (value - USUAL) for value in later[:LATER]]
            assert seen[0][0, head, row, 16:].tolist() == pytest.approx(expected, abs=1e-4)
    assert seen[0][0, 0, 3, 16].item() == pytest.approx(STEEP * (1 - USUAL), abs=1e-4)  # said again later on
    torch.testing.assert_close(seen[0][..., :16], features)


def test_only_the_tokens_that_scored_highest_are_looked_at_again():
    torch.manual_seed(0)
    part, source = Placement(16, 2, 4), torch.randn(1, 2, 40, 16)
    torch.nn.init.normal_(part.first.outer)
    torch.nn.init.constant_(part.second.scorer.outer_bias, 100.0)
    first = part.first(part.features(source))
    logits = part.logits(source)
    again = logits == 1000
    assert again.sum(-1).tolist() == [[10, 10]]
    assert torch.equal(again, first >= first.topk(10).values[..., -1:])
    assert torch.equal(logits[~again], first[~again])
    for tokens in (1, 2, 5):  # lists of one or two tokens have no two later ones
        assert part.logits(source[:, :, :tokens]).isfinite().all()


def test_a_slot_whose_worth_a_later_chunk_lowers_is_taken_back():
    torch.manual_seed(0)
    part = Placement(16, 2, 4)
    with torch.no_grad():
        part.second.compared.zero_()
        part.second.compared[:, :8, :8] = torch.eye(8)  # both heads compare keys
        part.second.scorer.inner.zero_()
        part.second.scorer.inner[:, 16, 0] = 1.0  # the likest later token, and nothing else, lowers a worth
        part.second.scorer.outer[:, 0] = -1.0
    slots, later = torch.randn(1, 2, 6, 16), torch.randn(1, 2, 12, 16)
    later[0, 0, :, :8] = slots[0, 0, 2, :8]  # to the first head all later tokens say again what slot 2 does
    assert part.taken_back(slots, later)[0].tolist() == [[False, False, True, False, False, False], [False] * 6]
    assert not part.taken_back(slots[:, :1], later[:, 1:], heads=[0]).any()
    silent = slots.index_fill(2, torch.tensor(2), 0)  # one that was silenced before is not looked at again
    assert not part.taken_back(silent, later).any()


def test_heads_that_contribute_little_stand_close_together_on_the_circle():
    first, second = phases([torch.tensor([0.0, 0.0]), torch.tensor([1.0, 3.0])])
    assert first.tolist() == pytest.approx([0, 0])
    assert second.tolist() == pytest.approx([0.05, 0.55])
    assert phases([torch.zeros(2)])[0].tolist() == [0.25, 0.75]


def placed(model, **options) -> StillCompactor:
    """A compactor whose scorers have opinions."""
    torch.manual_seed(0)
    compactor = StillCompactor.for_model(model, slots=8, chunk=64, placement=8, **options)
    for layer in compactor.layers.values():
        for scorer in (layer.placement.first, layer.placement.second.scorer):
            torch.nn.init.normal_(scorer.outer, std=0.2)
    return compactor


@torch.no_grad()
def test_a_fresh_compactor_copies_the_tokens_it_stands_at():
    model = tiny_model("qwen3")
    compactor, reading = placed(model), read(model, random_ids(2, 40))
    layer, positions = reading.cache.layers[1], torch.arange(40)
    small = compactor.compact_layer(1, layer.keys, layer.values, positions, 10)
    part = compactor.layers["1"]
    source = compactor.plain(1, layer.keys, layer.values, positions)
    kept = choose(inclusion(part.placement.worth(source), 10), 10, compactor._shared().phase(1))
    wanted = layer.values.gather(2, kept[..., None].expand(-1, -1, -1, layer.values.shape[-1]))
    torch.testing.assert_close(small.values, wanted, rtol=0, atol=1e-4)
    assert not torch.equal(kept[0, 0], kept[0, 1])  # heads keep different tokens
    assert not torch.equal(kept[0], kept[1])  # and so do rows
    whole = compactor.compact(reading, ratio=1)
    torch.testing.assert_close(whole.layers[1].keys, layer.keys, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("split", [None, "own"])
@pytest.mark.parametrize("layers", [2, 1])
def test_a_scout_places_the_latents_of_all_layers(layers, split):
    model, scout = tiny_model("qwen3", num_hidden_layers=layers), layers - 1
    compactor = placed(model, scout=scout)
    compactor.note_mass({layer: torch.tensor([1.0, 2.0]) for layer in map(int, compactor.layers)})
    compactor = compactor.with_split(split)
    ids, mask = left_padded([random_ids(23), random_ids(40, seed=1)])
    reading = read(model, ids, mask)
    seen = reading.cache.layers[scout]
    worths = [compactor.layers[str(scout)].placement.common_worth(compactor.plain(
        scout, *(x[row : row + 1, :, -count:] for x in (seen.keys, seen.values)), torch.arange(count),
    )) for row, count in enumerate((23, 40))]  # fmt: skip
    made = compactor.compact_rows(reading.cache, [23, 40], ratio=4)
    for layer, record in made.items():  # a fresh compactor copies what it stands at
        values = reading.cache.layers[layer].values
        for row, (count, worth) in enumerate(zip((23, 40), worths, strict=True)):
            slots = slots_for(count, 4)
            counts = (slots, slots) if split is None else compactor.split.counts(count, slots)[layer]
            for head in range(2):
                phase = compactor._shared().phase(layer, [head])
                at = choose(inclusion(worth, counts[head]), counts[head], phase)[0, 0]
                if record.counts is None:
                    own = record.values[row, head, -slots:]
                else:
                    start = sum(record.counts[:head]) + record.counts[head] - counts[head]
                    own = record.values[row, start : start + counts[head]]
                torch.testing.assert_close(own, values[row, head, -count:][at], rtol=0, atol=1e-4)
    own = compactor.compact_layer(0, *(getattr(reading.cache.layers[0], n)[1:] for n in ("keys", "values")),
                                  torch.arange(40), 10)  # fmt: skip
    assert not torch.equal(own.values[0, -10:], made[0].values[1, -10:])  # alone it looks for itself


def test_a_scout_is_a_layer_with_a_placement():
    model = tiny_model("qwen3")
    for options in ({"placement": 8, "scout": 7}, {"scout": 1}):
        with pytest.raises(ValueError, match=f"scout is {options['scout']}"):
            StillCompactor.for_model(model, **options)


@pytest.fixture
def one_thread():
    """Several threads block one head's matmuls otherwise than two heads'; attention at scale 128 makes 2e-4 of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.usefixtures("one_thread")
def test_rows_and_heads_alone_give_what_they_give_together():
    model = tiny_model("qwen3")
    compactor = stirred(placed(model))
    ids, mask = left_padded([random_ids(23), random_ids(40, seed=1)])
    together = compactor.compact(read(model, ids, mask), ratio=4)
    alone = compactor.compact(read(model, ids[:1, -23:]), ratio=4)
    torch.testing.assert_close(together.layers[0].keys[:1, :, -alone.slots :], alone.layers[0].keys, atol=1e-4, rtol=0)
    layer, positions = read(model, ids[1:]).cache.layers[1], torch.arange(40)
    every = compactor.compact_layer(1, layer.keys, layer.values, positions, 10)
    one = compactor.compact_layer(1, layer.keys[:, 1:2], layer.values[:, 1:2], positions, 10, heads=[1])
    torch.testing.assert_close(one.values[:, 0], every.values[:, 1], atol=1e-5, rtol=0)
    assert (one.values[:, 0] - every.values[:, 0]).abs().max() > 0.1


@torch.no_grad()
def test_it_is_saved_loaded_iterated_and_divided_like_any_other(tmp_path):
    model = tiny_model("qwen3")
    compactor = stirred(placed(model))
    compactor.note_mass({layer: torch.tensor([0.0, 3.0]) for layer in map(int, compactor.layers)})
    compactor.save_pretrained(tmp_path)
    again = StillCompactor.from_pretrained(tmp_path, model=model)
    context, question = random_ids(1, 150), random_ids(1, 5, seed=1)
    caches = [each.prefill(model, context, ratio=4) for each in (compactor, again)]
    logits = [answer(model, cache, question) for cache in caches]
    assert torch.equal(*logits)
    small = again.prefill(model, context, slots=16, mode="recompact")
    assert small.slots == 16
    layer = again.prefill(model, context, ratio=4).layers[0]
    gone = again.taken_back(0, (layer.keys[:, :, :16], layer.values[:, :, :16], layer.slot_positions[:, :16]),
                            (layer.keys[:, :, 16:], layer.values[:, :, 16:], layer.slot_positions[:, 16:]))  # fmt: skip
    assert gone.shape == (1, again.kv_heads, 16)
    with attending(model):
        again.split = None
        from still import Split

        uneven = again.with_split(Split.uniform(map(int, again.layers), again.kv_heads))
        torch.testing.assert_close(answer(model, uneven.prefill(model, context, ratio=4), question), logits[0])


def test_a_placement_has_a_width():
    with pytest.raises(ValueError, match="placement is -1"):
        StillConfig(placement=-1)
    assert not any(p.requires_grad for p in Placement(8, 2, 4).parameters())
