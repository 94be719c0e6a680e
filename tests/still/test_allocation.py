"""Calibration: heads that matter are found, slots go to them, and the cost is one forward a head and level."""

from __future__ import annotations

import random

import pytest
import torch
from test_distill_train import QUICK, random_rows
from test_objective import scaled_model
from tiny_models import qwen3_config, random_ids, tiny_model
from tiny_text import tiny_base

from still import methods
from still.allocation import allocate, learn_split, measure_split
from still.attention import attending
from still.budgets import Split
from still.calibration import Trial
from still.compactor import StillCompactor, fingerprint
from still.distill.config import TrainConfig
from still.distill.data import Row, collate
from still.distill.objective import IGNORE
from still.distill.train import train

ONLY = (1, 1)


@pytest.fixture(scope="module")
def one_head():
    """A model in which one KV head alone has a say."""
    model = tiny_model(qwen3_config())
    group = 2 * 64  # two query heads read a KV head
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for head in range(2):
                if (index, head) != ONLY:
                    layer.self_attn.o_proj.weight[:, head * group : (head + 1) * group] = 0
    return model


def rows_of(count=2, tokens=48):
    turns = [(random_ids(3, seed=9).tolist(), random_ids(3).tolist())] * 2
    return [Row(f"r{i}", random_ids(tokens, seed=i).tolist(), turns) for i in range(count)]


@pytest.mark.parametrize("name", ["truncation", "snapkv", "attention_matching"])
def test_the_head_that_matters_gets_the_slots(one_head, name):
    found = measure_split(one_head, rows_of(), methods.get(name), ratio=8, levels=(12, 4), progress=False)
    assert one_head.config._attn_implementation == "sdpa"
    assert set(found.losses) == {"0.0", "0.1", "1.0", "1.1"}
    for head, points in found.losses.items():
        assert [share for share, _ in points] == [1 / 48, 4 / 48, 12 / 48, 1]
        assert max(loss for _, loss in points) > 0.01 if head == "1.1" else max(loss for _, loss in points) < 1e-4
    assert found.forwards == 2 * (4 * 3 + 1) + 2 * (5 + 1)  # and one more a row and reading: the teacher
    assert found.split.counts(48, 6)[1][1] >= 15
    assert found.mixes[1.0] < found.mixes[0.0]
    assert found.split.fingerprint == fingerprint(one_head)


def test_a_learned_split_is_no_worse_than_its_start(one_head):
    compactor = StillCompactor.for_model(one_head, slots=6, chunk=48).requires_grad_(False)
    method, start = methods.get("still", compactor=compactor), Split.uniform([0, 1], 2)
    split, trace = learn_split(one_head, rows_of(), method, start, ratio=8, rounds=2, progress=False)
    assert trace[-1] < trace[0]
    assert trace == sorted(trace, reverse=True)
    assert (split.source, max(split.counts(48, 6)[1])) == ("learned", split.counts(48, 6)[1][1])


def test_slots_go_where_the_next_one_saves_most():
    curves = {
        (0, 0): [(0.01, 1.0), (0.11, 0.0), (1.0, 0.0)],
        (0, 1): [(0.01, 0.2), (0.06, 0.3), (0.11, 0.1), (1.0, 0.0)],  # a bump, which the hull bridges
        (1, 0): [(0.01, 0.0), (1.0, 0.0)],
    }
    heads = [*curves, (1, 1)]
    split = allocate(curves, 0.05, heads)
    assert split.weights[0] == pytest.approx((0.11, 0.03))
    assert split.weights[1] == pytest.approx((0.01, 0.05))  # the last was not measured
    plenty = allocate(curves, 0.9, heads[:3])
    assert sum(map(sum, plenty.weights.values())) == pytest.approx(2.7)


def test_training_with_splits_reaches_every_head(tmp_path):
    base = tiny_base()
    split = Split({0: (1, 3), 1: (2, 2)}, source="given")
    split.save(tmp_path / "split.json")
    config = TrainConfig(**{**QUICK, "held_out": 0.2, "steps": 4}, uneven=1.0, split=str(tmp_path / "split.json"))
    scores = train(base, random_rows(6, tokens=40), tmp_path / "run", config, progress=False)
    assert {"kl_4x", "uneven_kl_4x", "uneven_accuracy_2x"} <= set(scores)
    assert scores["kl_4x"] != scores["uneven_kl_4x"]
    trained = StillCompactor.from_pretrained(tmp_path / "run", model=base.model)
    assert trained.with_split().split.weights == split.weights
    assert base.model.config._attn_implementation != "still"
    assert all(layer.bank.abs().amax((1, 2)).min() > 0 for layer in trained.layers.values())
    plain = train(base, random_rows(6, tokens=40), tmp_path / "plain", TrainConfig(**QUICK), progress=False)
    assert not plain or not any(name.startswith("uneven") for name in plain)


@pytest.mark.parametrize("questions", [0, 2])
def test_calibration_asks_as_training_does(questions):
    """The question's first form right after the context, and what stays raw before it."""
    model, ids = scaled_model("granite"), [random_ids(n, seed=n).tolist() for n in range(1, 10)]
    turns = [(ids[2], ids[3]), (ids[4], ids[1]), (ids[0], ids[5])]
    row = Row("r", random_ids(20).tolist(), turns, opening=[ids[6], ids[7], ids[8]], raw_ids=random_ids(4).tolist())
    batch = collate([row], random.Random("5:0"), questions)
    with attending(model):
        (sitting,) = Trial(model, [row], methods.get("truncation"), questions, seed=5).sittings()
    assert sitting.turn_ids.tolist() == batch["turn_ids"].tolist()
    wanted = batch["labels"][0, 1:] != IGNORE
    assert sitting.wanted.tolist() == wanted.tolist()
    whole = torch.cat((batch["context_ids"], batch["turn_ids"]), dim=1)
    expected = model(whole).logits[0, row.tokens : -1][wanted].log_softmax(-1)
    torch.testing.assert_close(sitting.teacher, expected, atol=1e-4, rtol=1e-4)
