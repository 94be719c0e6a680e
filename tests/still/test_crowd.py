from __future__ import annotations

import pytest
import torch
from test_objective import batch_of, distiller_for
from tiny_models import CONFIGS, left_padded, random_ids

from still import read
from still.attention import attending
from still.budgets import Split
from still.distill.batches import BatchStream, Draw
from still.distill.config import TrainConfig
from still.distill.crowd import crowded
from still.rope import rotate, unrotate


def heads(record, row):
    """Keys and values of each head of a row."""
    if record.counts is None:
        return [(record.keys[row, head], record.values[row, head]) for head in range(record.keys.shape[1])]
    return list(zip(record.keys[row].split(record.counts), record.values[row].split(record.counts), strict=True))


def uneven(compactor):
    """Every layer's first head has thrice the slots of the others."""
    weights = (3.0, *[1.0] * (compactor.kv_heads - 1))
    return compactor.with_split(Split({int(layer): weights for layer in compactor.layers}))


def check(kind, split, kept=4, orders=((0, 1, 2),) * 3):
    model, compactor = (distiller := distiller_for(kind)).model, distiller.compactor
    compactor = uneven(compactor) if split else compactor
    contexts = [random_ids(n, seed=n + i) for i, n in enumerate((40, 36, 44))]
    ids, mask = left_padded(contexts)
    rows = [x.shape[-1] for x in contexts]
    full = read(model, ids, mask).cache
    layers = compactor.compact_rows(full, rows, slots=kept)
    wide = crowded(compactor, layers, rows)
    assert len(wide) == len(layers)
    for layer, record in wide.items():
        for row in range(3):
            expected = [[] for _ in range(compactor.kv_heads)]
            for place, other in enumerate(orders[row]):
                shift = sum(rows[x] for x in orders[row][place:]) - rows[row]
                alone = read(model, contexts[other][None] if contexts[other].ndim == 1 else contexts[other]).cache
                here = torch.arange(rows[other])
                keys = unrotate(alone.layers[layer].keys, *compactor.rotary.cos_sin(layer, here))
                keys = rotate(keys, *compactor.rotary.cos_sin(layer, here - shift))
                made = compactor.compact_layer(layer, keys, alone.layers[layer].values, here - shift, kept)
                for head, slots in enumerate(heads(made, 0)):
                    expected[head].append(slots)
            for head, own in enumerate(heads(record, row)):
                for found, pieces in zip(own, zip(*expected[head], strict=True), strict=True):
                    torch.testing.assert_close(found, torch.cat(pieces), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_crowd_stands_as_if_contexts_had_been_read_one_after_the_other(kind):
    check(kind, split=False)


def test_as_many_stand_there_as_leave_no_head_more_slots_than_tokens_and_the_first_follows_the_last():
    check("qwen3", split=False, kept=18, orders=((0, 1), (0, 1), (2, 0)))


def test_heads_of_unequal_numbers_are_crowded_each_by_its_own():
    check("qwen3", split=True)


def test_the_student_answers_in_a_crowd_and_every_row_learns():
    distiller, batch = distiller_for(), batch_of((20, 20, 20))
    plain, crowd = distiller(**batch, slots=6), distiller(**batch, slots=6, crowd=True)
    assert plain.tokens == crowd.tokens
    assert (plain.kl - crowd.kl).abs() > 1e-4
    torch.testing.assert_close(plain.teacher_cross_entropy, crowd.teacher_cross_entropy)
    # Only the first row's answers count: its neighbours' slots get a gradient nevertheless.
    alone = dict(batch, labels=batch["labels"].clone())
    alone["labels"][1:] = -100
    kept = []
    original = type(distiller.compactor).compact_rows

    def keep(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        for record in made.values():
            record.values.retain_grad()
            kept.append(record.values)
        return made

    type(distiller.compactor).compact_rows = keep
    try:
        distiller.train()(**alone, slots=6, crowd=True).loss.backward()
    finally:
        type(distiller.compactor).compact_rows = original
    assert all((values.grad.abs().amax((1, 2, 3)) > 0).all() for values in kept)


def test_uneven_heads_are_crowded_in_training():
    distiller, batch = distiller_for(), batch_of((40, 40, 40))
    split = uneven(distiller.compactor).split
    with attending(distiller.model):
        plain, crowd = (distiller(**batch, slots=6, split=split, crowd=crowd) for crowd in (False, True))
    assert torch.isfinite(crowd.loss)
    assert (plain.kl - crowd.kl).abs() > 1e-4


def test_no_more_slots_than_tokens_and_a_row_alone_has_no_crowd():
    distiller = distiller_for()
    alone = batch_of((20,), (7,))
    torch.testing.assert_close(distiller(**alone, slots=6, crowd=True).kl, distiller(**alone, slots=6).kl)
    for slots, contexts in ((20, 1), (11, 1), (10, 2), (6, 3), (5, 3)):
        ids = torch.cat([random_ids(20, seed=seed).view(1, -1) for seed in range(3)])
        layers = distiller.compactor.compact_rows(read(distiller.model, ids).cache, [20] * 3, slots=slots)
        wide = crowded(distiller.compactor, layers, [20] * 3)
        assert {record.keys.shape[2] for record in wide.values()} == {slots * contexts}


class Rows:
    """Source whose draws are of one length."""

    class draws:
        seed = 3


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 35, 65), (1.0, 100, 100)])
def test_a_share_of_the_steps_is_crowded_the_same_on_every_process(monkeypatch, share, low, high):
    monkeypatch.setattr("still.distill.batches.make_batch", lambda *args: {})
    Rows.rows = lambda self, draw, count, part: list(part)
    streams = [BatchStream(Rows(), start=0, batch=4, micro_batch=2, rank=rank, world=2, crowd=share) for rank in (0, 1)]
    drawn = [[s.batch_of(Draw(step, 8, 2.0), 0).get("crowd", False) for step in range(100)] for s in streams]
    assert drawn[0] == drawn[1]
    assert low <= sum(drawn[0]) <= high


@pytest.mark.parametrize(("options", "named"), [
    ({"crowd": 1.5}, "crowd is 1.5"), ({"crowd": 0.5, "micro_batch": 1}, "micro_batch 2 or more"),
])  # fmt: skip
def test_a_crowd_of_nobody_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        TrainConfig(**{"micro_batch": 2, "batch": 4, **options})
