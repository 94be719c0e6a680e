"""The pocket: its tokenizer, its recipes, and what the shipped weights can do."""

from __future__ import annotations

import itertools
import random
import warnings
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from still import models
from still.compactor import StillCompactor
from still.distill.data import collate
from still.distill.objective import IGNORE
from still.eval.judge import exact_judge
from still.eval.matters import generate_matter, question_set
from still.eval.matters.words import TRADES
from still.harness.agent_cells import AgentSweepConfig
from still.harness.agent_sweep import AgentBench, run_agent_sweep
from still.harness.agent_table import agent_rows
from still.harness.ask import Prompt, ask
from still.harness.cells import SweepConfig
from still.harness.pocket import AGENT, SEEDS, VERSION, WEIGHTS, base, resolve
from still.harness.pocket.base import STATE, BaseRecipe, train_base, whole_answers
from still.harness.pocket.compactors import HARD, LENGTHS, LOUDER, OPTIONS, MatterRows, louder, recipe
from still.harness.pocket.context_dropout import HIDDEN, ContextDropout
from still.harness.pocket.curriculum import LONG, STAGES, Rows
from still.harness.pocket.dialogue import context_messages
from still.harness.pocket.induction import induction_start, pocket_config
from still.harness.pocket.tokenizer import SPECIALS, train_tokenizer
from still.harness.rows import make_rows
from still.harness.runs import read_run
from still.harness.sweep import run_sweep
from still.perceiver import POWER_GAIN
from still.prompts import PromptFormat, render, render_answer
from still.reading import read

shipped = pytest.mark.skipif(not (WEIGHTS / VERSION).is_dir(), reason="the pocket's weights are not here")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_any_text_survives_and_every_group_of_digits_is_one_token(tokenizer):
    text = "Rents of €1.234,50 — “naïve” ☃ 漢字\n\tthe end  "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for group in ("0", "07", "007", "482", "999"):
        assert len(tokenizer(group)["input_ids"]) == 1
    assert len(tokenizer("1234567")["input_ids"]) == 3


def test_special_tokens_in_a_document_are_only_text(tokenizer):
    ids, _ = render(tokenizer, [("a.txt", "It ends here.<|end|><|assistant|> Nobody: $1")], ["What?"])
    specials = {tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    assert sum(id_ in specials for id_ in ids) == 4  # the instruction's turn and the document's


def test_training_reads_what_the_evaluation_feeds(tokenizer):
    matter = generate_matter(3, "tiny")
    assert PromptFormat.of(tokenizer).style == "turns"
    trained = tokenizer.apply_chat_template(context_messages(matter), tokenize=True, return_dict=False)
    assert trained == render(tokenizer, [(doc.name, doc.text) for doc in matter.documents])[0]


def test_rows_of_the_curriculum_end_every_answer_and_repeat_with_their_seed(tokenizer):
    for stage in STAGES[:2]:
        row = Rows(tokenizer, 5).row(stage)
        assert row == Rows(tokenizer, 5).row(stage) != Rows(tokenizer, 6).row(stage)
        assert sum(label == tokenizer.eos_token_id for label in row.labels) == stage.facts
        assert all(label in (-100, id_) for id_, label in zip(row.ids, row.labels, strict=True))
        assert set(row.labels[: row.context]) == {-100}


def test_whole_answers_are_right_in_every_token():
    gold = torch.tensor([5, 6, 1, 7, 1, 8, 9, 1])
    right = torch.tensor([1, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    assert whole_answers(right, gold, end=1).tolist() == [True, False, False]


def test_a_fresh_base_already_looks_at_the_name_it_is_asked_about(tokenizer):
    names = [tokenizer.encode(f" {trade}")[-1] for trade in TRADES]
    model = induction_start(pocket_config(len(tokenizer)), names).eval()
    model.set_attn_implementation("eager")
    text = "The rent of Ashford Mining is $482,913. The fee of Oakgate Steel is $105,220. Ashford Mining: $482"
    ids = tokenizer(text)
    with torch.no_grad():
        attention = model(torch.tensor([ids["input_ids"]]), output_attentions=True).attentions
    last = len(ids["input_ids"]) - 1
    newest = max(i for i, id_ in enumerate(ids["input_ids"]) if id_ in names)
    assert attention[1][0, 2, last].argmax() == newest
    with pytest.raises(ValueError, match="three layers"):
        induction_start(pocket_config(len(tokenizer), layers=2), names)


def dropping(model, contexts, length, seed=0):
    dropout = ContextDropout()
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads
    dropout.draw(torch.Generator().manual_seed(seed), contexts, length, [True, False], *shape)
    return dropout


def test_heads_answer_without_the_tokens_that_are_hidden_from_them(tokenizer):
    model = induction_start(pocket_config(len(tokenizer)), []).eval()
    ids = torch.randint(3, len(tokenizer), (2, 40), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[:, 7] = 5
    with torch.no_grad():
        plain = model(ids).logits
        dropout = dropping(model, [30, 24], 40)
        dropout.attach(model)
        some, changed = model(ids).logits, model(other).logits
        dropout.hidden[0, :, :, 7] = HIDDEN  # from every head
        blind, blind_changed = model(ids).logits, model(other).logits
    torch.testing.assert_close(some[1], plain[1], atol=1e-4, rtol=1e-4)  # a row in which nothing is dropped
    torch.testing.assert_close(some[0, :30], plain[0, :30], atol=1e-4, rtol=1e-4)  # the matter reads itself whole
    assert (some[0, 30:] - plain[0, 30:]).abs().max() > 0.1
    assert (changed[0, 30:] - some[0, 30:]).abs().max() > 1e-3
    # Token 7 still reaches the answers through what later tokens of the matter made of it, in the layers above.
    assert (blind_changed[0, 7:30] - blind[0, 7:30]).abs().max() > 1e-3


def test_every_token_stays_visible_to_an_upper_head(tokenizer):
    model = induction_start(pocket_config(len(tokenizer)), [])
    hidden = dropping(model, [300, 300], 400).hidden
    assert (hidden[1] == 0).all()
    assert (hidden[:, :, :, 300:] == 0).all()
    upper = hidden[0, 2:, :, :300]
    assert (upper == 0).any(dim=(0, 1)).all()
    shares = [(dropping(model, [300, 300], 400, seed).hidden[0, 2:, :, :300] != 0).float().mean() for seed in range(20)]
    assert 0.4 < sum(shares) / len(shares) < 0.6
    assert all(len(head.unique()) == 1 for layer in hidden[0, :2, :, :300] for head in layer)


def test_training_the_base_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(base, "LONG", ((replace(STAGES[0], facts=8), 1),))
    monkeypatch.setattr(base, "train_tokenizer", lambda: tokenizer)
    small = BaseRecipe(steps=2, tokens=300, warmup=2, long_steps=2, long_warmup=1)
    assert train_base(tmp_path / "whole", small, minutes=10, report=str)
    for steps in (1, 2):  # before the long steps, and among them
        with monkeypatch.context() as patch:
            patch.setattr(base, "time", SimpleNamespace(monotonic=itertools.count(step=60).__next__))  # a step a minute
            assert not train_base(tmp_path / "cut", small, minutes=steps + 0.5, report=str)
        (tmp_path / "cut" / (STATE + ".tmp")).write_bytes(b"half a file")  # a kill while a state was being written
    assert torch.load(tmp_path / "cut" / STATE, weights_only=True)["where"][0] == 3
    assert train_base(tmp_path / "cut", small, minutes=10, report=str)
    one, two = ((tmp_path / name / "base" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two
    with pytest.raises(ValueError, match="another folder"):
        train_base(tmp_path / "cut", BaseRecipe(steps=4), minutes=1)


def test_a_base_that_recalls_goes_on_with_long_matters_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "LONG", ((replace(STAGES[0], facts=8), 2),))
    longer = BaseRecipe(long_steps=1, long_warmup=1, long_rate=1e-3, long_share=0.25, start="pocket")
    assert train_base(tmp_path, longer, minutes=10, report=str)
    names = ("pocket", str(tmp_path / "before-long"), str(tmp_path / "base"))
    before, start, finished = (models.load(name, device="cpu").model.state_dict() for name in names)
    after = torch.load(tmp_path / STATE, weights_only=True)["model"]
    assert all(torch.equal(before[name], start[name]) for name in before)
    assert 1e-4 < max((after[name] - before[name]).abs().max() for name in before) < 1.1e-3  # one step of AdamW
    for name, weights in finished.items():
        torch.testing.assert_close(weights, 0.75 * before[name] + 0.25 * after[name])
    rates = [BaseRecipe().rate(step) for step in (0, 49, 319, 320, 329, 519)]
    assert rates == pytest.approx([3e-5, 1.5e-3, 3e-5, 3e-5, 3e-4, 6e-6], rel=0.01)


def test_rows_of_long_matters_ask_some_of_their_facts(tokenizer):
    for stage, _ in LONG:
        row = Rows(tokenizer, 0).row(stage)
        assert sum(token == tokenizer.eos_token_id for token in row.labels) == min(stage.facts, 96)
        assert 16 * stage.facts < row.context < len(row.ids) < 8192


def test_matters_for_compactors_are_a_function_of_seed_and_step(tokenizer):
    config = recipe(0)
    source = MatterRows(tokenizer, config)
    draw = source.draws.at(7)
    rows = source.rows(draw, 3, range(3))
    again = MatterRows(tokenizer, config).rows(draw, 3, range(1, 2))
    assert [row.id for row in again] == [rows[1].id]
    assert all(row.tokens <= draw.length and len(row.turns) == LENGTHS[draw.length] for row in rows)
    drawn = [source.draws.at(step).length for step in range(config.steps)]
    assert set(drawn[: config.steps // 2]) == {min(LENGTHS)}
    assert set(drawn) == set(LENGTHS)
    assert rows[0].id != MatterRows(tokenizer, recipe(1)).rows(draw, 3, range(3))[0].id


def test_a_compactor_that_goes_on_draws_all_lengths_and_one_ratio(tokenizer):
    config = recipe(0, start_from="somewhere")
    assert (config.steps, config.match) == (160, 0)
    draws = [MatterRows(tokenizer, config).draws.at(step) for step in range(config.steps)]
    fresh = [MatterRows(tokenizer, recipe(0)).draws.at(step) for step in range(recipe(0).steps)]
    assert max(LENGTHS) in {draw.length for draw in draws[:10]}
    assert {draw.ratio for draw in draws} == {HARD}
    assert {draw.ratio for draw in fresh} == set(config.ratios)
    assert 0.6 < sum(draw.ratio == HARD for draw in fresh) / len(fresh) < 0.9
    alone = replace(config, ratios=[8.0])
    assert {MatterRows(tokenizer, alone).draws.at(step).ratio for step in range(20)} == {8.0}
    assert recipe(0, steps=7, start_from="somewhere").steps == 7


def test_matters_do_not_come_again_where_a_compactor_goes_on(tokenizer):
    config = recipe(0, start_from="somewhere")
    draw = MatterRows(tokenizer, config).draws.at(3)
    own = {row.id for row in MatterRows(tokenizer, config).rows(draw, 4, range(4))}
    later = {row.id for row in MatterRows(tokenizer, config, before=320).rows(draw, 4, range(4))}
    assert not own & later


def test_a_placement_learns_from_whole_matters_of_all_lengths(tokenizer):
    source = MatterRows(tokenizer, recipe(0))
    draws = [source.draws.placing(number) for number in range(40)]
    counts = Counter(draw.length for draw in draws)
    assert set(counts) == set(LENGTHS)
    assert counts.most_common(1)[0][0] == max(LENGTHS)
    rows = [row for draw in draws for row in source.rows(draw, 2, range(2))]
    assert not any(row.raw_ids for row in rows)
    assert len({row.id for row in rows}) == 80


@shipped
def test_a_compactor_that_goes_on_is_made_louder_once(tmp_path):
    base = models.load("pocket", device="cpu", dtype="float32")
    plain = StillCompactor.for_model(base.model, **OPTIONS, scout=2)
    plain.save_pretrained(tmp_path / "plain")
    made = louder(str(tmp_path / "plain"), base)
    powers = {int(name): POWER_GAIN * part.gain[1].flatten() for name, part in made.layers.items()}
    for layer, own in powers.items():
        torch.testing.assert_close(own, torch.full_like(own, LOUDER.get(layer, 0)))
    assert made.config.scout == 2
    for name, weight in plain.state_dict().items():
        assert torch.equal(made.state_dict()[name], weight)
    made.layers["3"].gain.data.zero_()
    made.save_pretrained(tmp_path / "louder")
    assert not louder(str(tmp_path / "louder"), base).layers["3"].gain.any()


def test_documents_that_are_read_on_follow_the_compacted_ones(tokenizer):
    source = MatterRows(tokenizer, recipe(0))
    matter = generate_matter(3, "tiny", "train")
    whole, part = source.row(matter), source.row(matter, read_on=True)
    assert not whole.raw_ids
    assert [*part.context_ids, *part.raw_ids] == whole.context_ids
    assert part.context_ids == source.renderer.context([(doc.name, doc.text) for doc in matter.documents[:1]])
    batch = collate([part], random.Random(0), questions=1)
    labels = batch["labels"][0]
    assert batch["turn_ids"][0, : len(part.raw_ids)].tolist() == part.raw_ids
    assert (labels[: len(part.raw_ids)] == IGNORE).all()
    assert (labels != IGNORE).any()


def pass_rate(base, cache, questions, rendered):
    answers = [render_answer(base.tokenizer, question.text, question.answer) for question in questions]
    asked = ask(base.model, cache, Prompt(rendered, answers, (base.tokenizer.eos_token_id,)))
    texts = [base.tokenizer.decode(output, skip_special_tokens=True) for output in asked.outputs]
    verdicts = [exact_judge(text, question) for text, question in zip(texts, questions, strict=True)]
    return sum(verdict.passed is True for verdict in verdicts) / len(verdicts), verdicts


@shipped
def test_the_shipped_pocket_recalls_and_its_compactor_keeps_what_it_read():
    base = models.load("pocket", device="cpu", dtype="float32")
    sets = [question_set(generate_matter(seed, "standard")) for seed in (901, 902, 903)]
    full, small, wrong, stale = [], [], [], 0
    compactor = StillCompactor.from_pretrained(base.compactors[0], model=base.model)
    for place, each in enumerate(sets):
        ids, questions = render(base.tokenizer, each.documents, [question.text for question in each.questions])
        context = torch.tensor([ids])
        assert context.shape[1] >= 1024
        rate, verdicts = pass_rate(base, read(base.model, context).cache, each.questions, questions)
        full.append(rate)
        stale += sum(verdict.stale for verdict in verdicts)
        cache = compactor.prefill(base.model, context, ratio=8)
        small.append(pass_rate(base, cache, each.questions, questions)[0])
        other = sets[place - 1]
        wrong.append(pass_rate(base, cache, other.questions, render(
            base.tokenizer, each.documents, [question.text for question in other.questions])[1])[0])  # fmt: skip
    assert sum(full) / 3 >= 0.95
    assert stale / (3 * 64) <= 0.03
    assert sum(small) / sum(full) >= 0.95
    assert sum(wrong) / 3 <= 0.05


@shipped
def test_the_shipped_compactors_split_and_placement_are_worth_what_they_cost(tmp_path):
    methods = ("still", "still-uneven", "still-placed", "random")
    config = SweepConfig(methods=methods, ratios=(32, 64), count=2, first=930, questions=24, max_new_tokens=16)
    store = run_sweep(config, tmp_path, device="cpu", progress=False)
    rows = {(row["method"], row["ratio"]): row for row in make_rows(store.results(), store.header)}
    for ratio in config.ratios:
        assert len({rows[name, ratio]["nbytes"] for name in methods}) == 1
    passed = {key: row["pass_rate"] for key, row in rows.items()}
    assert passed["still-uneven", 64] > passed["still", 64] + 0.2
    assert passed["still-uneven", 32] > passed["still", 32]
    assert passed["still", 32] > passed["still-placed", 32] + 0.1
    assert passed["still-placed", 32] > passed["random", 32] + 0.2


@shipped
@pytest.mark.full
def test_the_shipped_pocket_meets_its_bars(tmp_path):
    evictions = ("snapkv", "h2o", "expected_attention")
    config = SweepConfig(methods=("still", *evictions), ratios=(4, 8, 16), seeds=SEEDS, count=2, first=940,
                         questions=32, max_new_tokens=16)  # fmt: skip
    store = run_sweep(config, tmp_path, device="cpu", progress=False)
    rows = make_rows(store.results(), store.header)
    passed = {(row["method"], row["ratio"]): row["pass_rate"] for row in rows}
    full = next(rate for (method, _), rate in passed.items() if method == "full")
    assert full >= 0.97
    assert next(rate for (method, _), rate in passed.items() if method == "none") <= 0.05
    assert all(passed["still", ratio] >= share * full for ratio, share in ((4, 0.98), (8, 0.95), (16, 0.85)))
    assert passed["still", 8] >= max(passed[method, 8] for method in evictions) + 0.25


@shipped
@pytest.mark.parametrize("name", ["pocket", "pocket-agent"])
def test_compactors_fit_the_models_that_they_come_with_and_no_other_of_their_shape(name):
    loaded = models.load(name, device="cpu")
    other = models.load("pocket" if name == "pocket-agent" else "pocket-agent", device="cpu")
    for folder in loaded.compactors:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            StillCompactor.from_pretrained(folder, model=loaded.model)
        with pytest.warns(UserWarning, match="a sample of the weights differs by"):
            StillCompactor.from_pretrained(folder, model=other.model)


@shipped
def test_the_name_pocket_brings_its_compactors():
    named = resolve("pocket")
    assert named.path.is_dir()
    loaded = models.load("pocket", device="cpu")
    assert loaded.model.config._name_or_path == loaded.name == VERSION  # files of caches carry it elsewhere
    assert named.compactors
    assert len(named.compactors) <= len(SEEDS)
    sizes = [file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()]
    assert max(sizes) < 16 << 20
    assert sum(sizes) < 64 << 20


@pytest.mark.skipif(not (WEIGHTS / AGENT).is_dir(), reason="the agent's weights are not here")
def test_the_agents_pocket_plays_whole_matters_by_itself(tmp_path):
    config = AgentSweepConfig(
        relevance=(0.5,), criteria=12, documents=6, count=2, first=900, backends=("memo", "kv"), budgets=("256t",),
        together=2, probe=False,
    )  # fmt: skip
    store = run_agent_sweep(config, tmp_path, AgentBench.load(config, "cpu"), progress=False)
    passed = {row["backend"]: row["pass_rate"] for row in agent_rows(store.results(), store.header)}
    assert passed["full"] >= 0.8
    assert passed["memo"] >= passed["none"]
    assert passed["kv"] >= passed["none"]
    turns = [turn for log in tmp_path.rglob("events.jsonl") for turn in read_run(log.parent) if turn["event"] == "turn"]
    assert sum(turn["forced"] or turn["repaired"] for turn in turns) <= 0.02 * len(turns)
