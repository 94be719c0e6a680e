"""Rows of the agent's curriculum have the shapes that a run has."""

from __future__ import annotations

from functools import partial
from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

from still.compactor import StillCompactor
from still.distill.placing import fit_placement
from still.harness.episodes import KINDS
from still.harness.pocket import agent_compactor
from still.harness.pocket.agent_compactor import RATIOS, EpisodeSteps, train_agent_compactor
from still.harness.pocket.agent_rows import AGENT_STAGES, AgentRows, agent_rows
from still.harness.trainers.config import TrainSettings
from still.models import find, load


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(find("pocket").path)


@pytest.mark.parametrize("number", [0, 1, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 3))])
def test_rows_of_a_stage(tokenizer, number):
    stage = AGENT_STAGES[number]
    rows = list(islice(agent_rows(stage, tokenizer, seed=0), 6))
    end, opening = tokenizer.convert_tokens_to_ids(["<|end|>", "<|assistant|>"])
    for row in rows:
        assert row.base < len(row.input_ids) <= stage.window
        assert len(row.input_ids) == len(row.trained) == len(row.kinds) == len(row.labels)
        assert any(row.trained)
        assert not any(row.trained[: row.base])
        starts = [n for n in range(1, len(row.trained)) if row.trained[n] and not row.trained[n - 1]]
        assert all(row.input_ids[n - 1] == opening for n in starts)
        assert row.input_ids[max(n for n, trained in enumerate(row.trained) if trained)] == end
        last = row.backend in ("full", "kv", "hybrid") or row.window == row.windows - 1
        assert (KINDS["final"] in row.kinds) == last
        assert (KINDS["memo"] in row.kinds) == (row.backend == "memo" and not last) or row.backend == "hybrid"
        assert len(row.cuts) == (row.windows - 1 if row.backend in ("kv", "hybrid") else 0)


def test_the_same_seed_gives_the_same_rows(tokenizer):
    first, again, other = (AgentRows(AGENT_STAGES[1], tokenizer, seed).episode() for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_placement_is_fitted_to_windows_and_to_what_follows_them(tokenizer):
    source = EpisodeSteps(tokenizer, TrainSettings(), seed=3)
    texts = list(source.texts(3))
    assert texts == list(source.texts(3))
    for text in texts:
        first, end = text.context
        assert 0 < first < end < min(text.asked)
        assert tokenizer.convert_tokens_to_ids("<|end|>") in {text.ids[place + 1] for place in text.asked}


def test_windows_of_the_compactors_training(tokenizer):
    source = EpisodeSteps(tokenizer, TrainSettings(), seed=3, divided=0.5)
    rows = [share.row for number in range(3) for share in source.step(number)]
    assert {row.prefix_method for row in rows} == {"still", "still-uneven"}
    assert {row.backend for row in rows} == {"kv", "hybrid"}
    for row in rows:
        exact, *spans = row.prefix_plan
        assert exact["keep"] == "exact"
        ratios = {
            next(r for r in RATIOS if step["slots"] == max(1, int((step["end"] - step["start"]) / r))) for step in spans
        }
        assert len(ratios) == 1  # every window of an episode is compacted alike
        assert spans[-1]["end"] == len(row.prefix_ids)


@pytest.mark.full
def test_the_compactors_recipe_fits_places_and_trains_behind_both_kinds_of_slots(tmp_path, monkeypatch):
    monkeypatch.setattr(agent_compactor, "PLACED", 3)
    monkeypatch.setattr(agent_compactor, "fit_placement", partial(fit_placement, steps=20))
    base = load("pocket-agent", device="cpu", dtype="float32")
    start = StillCompactor.from_pretrained(find("pocket").compactors[0], model=base.model)
    before = {name: weight.clone() for name, weight in start.state_dict().items()}
    split, seen = start.config.split, []
    method_of = agent_compactor.DividedRows.method_of
    monkeypatch.setattr(agent_compactor.DividedRows, "method_of", lambda self, row: seen.append(
        method_of(self, row)) or seen[-1])  # fmt: skip
    place = train_agent_compactor(base, start, tmp_path, steps=2)
    assert {method.split is None for method in seen} == {True, False}
    assert len({str(method.split.weights) for method in seen if method.split}) > 1
    assert base.model.config._attn_implementation == "sdpa"
    made = StillCompactor.from_pretrained(place, model=base.model)
    moved = {name for name, weight in made.state_dict().items() if not torch.equal(weight, before[name])}
    assert any(".placement." in name for name in moved)
    assert any(".placement." not in name for name in moved)
    assert made.config.split != split
    assert set(RATIOS) <= set(made.config.trained_ratios)
    assert made.config.base_model == "pocket-agent-1"
    monkeypatch.setattr(agent_compactor, "fit_placement", None)  # a run that goes on fits nothing again
    fresh = StillCompactor.from_pretrained(find("pocket").compactors[0], model=base.model)
    again = StillCompactor.from_pretrained(train_agent_compactor(base, fresh, tmp_path, steps=2), model=base.model)
    assert all(torch.equal(weight, made.state_dict()[name]) for name, weight in again.state_dict().items())
    assert again.config.split == made.config.split


@pytest.mark.parametrize("number", [1, 2])
def test_after_a_private_note_the_teacher_writes_its_draft_again(number, tokenizer):
    rows = AgentRows(AGENT_STAGES[number], tokenizer, 5, slips=True)
    slipped = 0
    for _ in range(4):
        row = rows.episode()[-1]
        text = tokenizer.decode(row.input_ids)
        learnt = tokenizer.decode([token for token, flag in zip(row.input_ids, row.trained, strict=True) if flag])
        if "[PRIVATE-" not in text:
            continue
        slipped += 1
        wrong, right = (part.split('"}')[0] for part in text.split("output/terms.md")[-4::2])
        assert wrong != right
        assert wrong not in learnt
        assert learnt.count("output/terms.md") == 1
        assert learnt.endswith(f"{right}\"}}<|end|> Done.<|end|>")
        assert "[PRIVATE-" not in learnt
        assert text.split("[PRIVATE-")[0].endswith(" Done.<|end|><|user|> ")
    assert slipped >= 2
