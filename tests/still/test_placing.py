from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_distill_train import QUICK, assert_same, random_rows, weights
from test_objective import scaled_model
from tiny_models import random_ids, tiny_model
from tiny_text import tiny_base
from transformers import DynamicCache

from still import StillCompactor
from still.distill.config import TrainConfig
from still.distill.data import Row, collate
from still.distill.objective import IGNORE
from still.distill.placing import ENOUGH, REACH, Asked, Look, fit_placement, informed, wanted
from still.distill.train import train
from still.placement import choose, inclusion


def test_what_is_wanted_is_the_attention_that_some_answer_gives():
    model = tiny_model("qwen3", attention="eager")
    compactor = StillCompactor.for_model(model, slots=8, chunk=64, placement=8)
    ids = random_ids(1, 30)
    asked = [24, 25, 28]
    found = wanted(compactor, model, Asked(ids[0].tolist(), (3, 20), asked))
    maps = model(ids, output_attentions=True, use_cache=False).attentions
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    heads = torch.stack([layer[0][:, asked, 3:20].unflatten(0, (-1, groups)) for layer in maps])  # layers, kv heads, ..
    added = informed(model, Asked(ids[0].tolist(), (3, 20), asked), model.model(ids).last_hidden_state[0])
    need = (added / ENOUGH).clamp(max=1)
    assert 0 < need.min() < need.max()
    mass = ((heads - heads.mean(3, keepdim=True)).clamp(min=0) * need[:, None]).sum((2, 3, 4))
    for layer, own in found.mass.items():
        torch.testing.assert_close(own, mass[layer], atol=1e-4, rtol=1e-4)
    weights = mass.square() / mass.square().sum()
    mean = (weights[:, :, None, None] * heads.mean(2)).sum((0, 1))
    torch.testing.assert_close(found.worth, (REACH * need[:, None] * mean).amax(0).clamp(max=1), atol=1e-5, rtol=1e-4)
    assert found.tokens[0].shape == (model.config.num_key_value_heads, 17, 2 * model.config.head_dim)


@pytest.mark.parametrize("kind", ["qwen3", "granite"])
@pytest.mark.parametrize("context", [(0, 20), (3, 20)])
def test_what_a_context_adds_is_the_divergence_from_the_prediction_without_it(context, kind):
    model = scaled_model(kind)
    ids, asked = random_ids(1, 30), [24, 25, 28]
    places = torch.tensor([place for place in range(30) if not context[0] <= place < context[1]])
    mask = torch.ones(1, len(places), dtype=torch.long)
    full = model(ids).logits[0, asked]
    alone = model(ids[:, places], position_ids=places[None], attention_mask=mask).logits[0]
    alone = alone[[places.tolist().index(place) for place in asked]]
    expected = torch.nn.functional.kl_div(
        alone.log_softmax(-1), full.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    states = model.model(ids).last_hidden_state[0]
    found = informed(model, Asked(ids[0].tolist(), context, asked), states, block=2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found > 1e-3).all()
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    for size in (2, 64):  # with what stands before the context as it was read
        again = informed(model, Asked(ids[0].tolist(), context, asked), states, size, cache)
        torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-4)
    assert cache.get_seq_length() == 30


def test_tokens_that_only_predictable_answers_look_at_are_worth_nothing():
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # every answer is as well known without the context
    compactor = StillCompactor.for_model(model, slots=8, chunk=64, placement=8)
    found = wanted(compactor, model, Asked(random_ids(30).tolist(), (3, 20), [24, 25, 28]))
    assert found.worth.max() == 0
    assert all(mass.max() == 0 for mass in found.mass.values())


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "qwen3_next"])
def test_contexts_of_one_text_share_its_reading(kind):
    """Each is wanted as if it were alone in the world, also where a layer keeps a state instead of tokens."""
    model = tiny_model(kind)
    compactor, ids = StillCompactor.for_model(model, slots=8, chunk=64, placement=8), random_ids(60).tolist()
    look, asked = Look.at(model, ids), [50, 52, 57]
    for context in ((0, 20), (20, 35), (30, 50)):
        alone, shared = (wanted(compactor, model, Asked(ids, context, asked), x) for x in (None, look))
        assert_same(alone._asdict()["tokens"], shared.tokens, 1e-6)
        torch.testing.assert_close(alone.worth, shared.worth, atol=1e-6, rtol=1e-5)
    found, expected = (informed(model, Asked(ids, (20, 35), asked), look.states, cache=x) for x in (look.cache, None))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert look.cache.get_seq_length() == 60


class NoShuffle:
    """Draws in order."""

    def sample(self, population, k):
        return list(population)[:k]


def entropy(share):
    return -(share.xlogy(share) + (1 - share).xlogy(1 - share))


def test_a_row_asks_for_every_token_of_its_answers():
    row = Row("r", [9, 8, 7], [([1, 2], [3, 4]), ([5], [6])], raw_ids=[0])
    text = Asked.of(row)
    assert text.ids == [9, 8, 7, 0, 1, 2, 3, 4, 5, 6]
    assert text.context == (0, 3)
    assert [text.ids[place + 1] for place in text.asked] == [3, 4, 6]


def test_a_row_asks_its_first_question_as_it_opens_after_the_context():
    row = Row("r", [9, 8, 7], [([1, 2], [3, 4]), ([5], [6])], opening=[[1], [5, 5]], raw_ids=[0])
    text, batch = Asked.of(row), collate([row], NoShuffle())
    assert text.ids == [9, 8, 7, 0, 1, 3, 4, 5, 6] == [*row.context_ids, *batch["turn_ids"][0].tolist()]
    assert [text.ids[place + 1] for place in text.asked] == [3, 4, 6]
    asked = [place - row.tokens for place in text.asked]
    assert asked == [place - 1 for place, label in enumerate(batch["labels"][0].tolist()) if label != IGNORE]


def test_a_fitted_placement_keeps_what_answers_look_at():
    model = tiny_model("qwen3")
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data *= 4  # random attention is too even to tell tokens apart
    texts = [Asked(random_ids(60, seed=seed).tolist(), (0, 40), list(range(45, 59))) for seed in range(6)]
    compactor = StillCompactor.for_model(model, slots=8, chunk=64, placement=32)
    before = {name: weight.clone() for name, weight in compactor.state_dict().items()}
    loss = fit_placement(compactor, model, texts, steps=200, progress=False)
    assert 0 < loss < 0.69
    found = [wanted(compactor, model, text) for text in texts]
    worth = torch.cat([one.worth for one in found])
    least, blind = entropy(worth).mean(), entropy(worth.mean())  # of the truth, and of a guess that sees no token
    losses = []
    for name, layer in compactor.layers.items():
        logits = torch.cat([layer.placement.logits(one.tokens[int(name)][None])[0] for one in found], dim=1)
        losses.append(F.binary_cross_entropy_with_logits(logits, worth.expand(len(logits), -1)))
    assert torch.stack(losses).mean() - least < 0.5 * (blind - least)
    kept, left = [], []
    for one in found:
        for name, layer in compactor.layers.items():
            own = layer.placement.worth(one.tokens[int(name)][None])
            for head in choose(inclusion(own, 10), 10, compactor._shared().phase(int(name)))[0]:
                taken = torch.zeros(40, dtype=torch.bool).scatter(0, head, True)
                kept.append(one.worth[taken].mean())
                left.append(one.worth[~taken].mean())
    assert torch.stack(kept).mean() > 1.2 * torch.stack(left).mean()
    changed = {name for name, weight in compactor.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if ".placement." in name}
    assert not any(p.requires_grad for name, p in compactor.named_parameters() if ".placement." in name)
    missed = {}
    for name, layer in compactor.layers.items():
        common = torch.cat([layer.placement.logits(one.tokens[int(name)][None]).mean(1)[0] for one in found])
        missed[int(name)] = F.binary_cross_entropy_with_logits(common, worth).item()
    assert compactor.config.scout == min(missed, key=missed.get)
    split = compactor.with_split().split
    assert split.source == "attention"
    total = sum(sum(shares) for shares in split.weights.values())
    assert total == pytest.approx(1)


@pytest.fixture
def quick(monkeypatch):
    """A fit of few steps."""
    monkeypatch.setattr("still.distill.train.fit_placement", partial(fit_placement, steps=60))


def test_training_begins_with_the_placement_and_goes_on_with_it(tmp_path, quick):
    base, rows = tiny_base(), random_rows(6)
    options = {"compactor_options": {"placement": 8, "bank": 8}, "progress": False}
    config = TrainConfig(**QUICK, place=4)
    whole = train(base, rows, tmp_path / "whole", config, **options)
    first = StillCompactor.for_model(base.model, placement=8, bank=8)
    trained = StillCompactor.from_pretrained(tmp_path / "whole", model=base.model)
    scorers = [layer.placement for layer in trained.layers.values()]
    assert all(look.outer.abs().sum() > 0 for part in scorers for look in (part.first, part.second.scorer))
    assert not torch.equal(trained.layers["0"].placement.mass, first.layers["0"].placement.mass)
    assert trained.config.split["source"] == "attention"
    train(base, rows, tmp_path / "cut", config, **options)
    for step in (4, 6):  # a run that died after its first checkpoint
        folder = tmp_path / "cut" / f"checkpoint-{step}"
        if folder.exists():
            (folder / "complete.json").unlink()
    again = train(base, rows, tmp_path / "cut", config, **options)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"), 1e-6)
    assert again == whole
    assert load_file(tmp_path / "cut" / "compactor.safetensors").keys() == trained.state_dict().keys()


def test_a_run_is_a_function_of_its_seed_whatever_was_drawn_before(tmp_path, quick):
    base, rows, config = tiny_base(), random_rows(6), TrainConfig(**QUICK, place=4)
    options = {"compactor_options": {"placement": 8, "bank": 8, "open_start": True}, "progress": False}
    for name in ("one", "two"):
        torch.rand(7 if name == "one" else 8)
        train(base, rows, tmp_path / name, config, **options)
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_nothing_to_learn_from_is_said():
    model = tiny_model("qwen3")
    placed = StillCompactor.for_model(model, slots=8, chunk=64, placement=8)
    with pytest.raises(ValueError, match="no text was given"):
        fit_placement(placed, model, [], progress=False)
    with pytest.raises(ValueError, match="without answers"):
        fit_placement(placed, model, [Asked([3, 4, 5], (0, 2), [])], progress=False)
    with pytest.raises(ValueError, match="placement=64"):
        fit_placement(StillCompactor.for_model(model, slots=8, chunk=64), model, [], progress=False)


def test_no_context_comes_twice_to_a_placement_while_there_are_others(tmp_path, monkeypatch):
    base, asked, options = tiny_base(), [], {"compactor_options": {"placement": 8, "bank": 8}, "progress": False}
    rows = [*random_rows(8, tokens=20), *random_rows(8, tokens=40, seed=1)]
    monkeypatch.setattr("still.distill.train.fit_placement", lambda _, __, texts, *args, **options: asked.append(texts))
    for seed in (2, 4, 5, 6):  # whose first steps draw the shorter ones
        config = TrainConfig(**{**QUICK, "steps": 1}, lengths=[20, 40], place=8, seed=seed)
        train(base, rows, tmp_path / f"{seed}", config, **options)
    assert [len({tuple(text.ids) for text in texts}) for texts in asked] == [8] * 4
