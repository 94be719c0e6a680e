"""The loop on rows: it learns, it resumes to the same weights, half-written checkpoints do not count, NaN stops it."""

from __future__ import annotations

import shutil

import pytest
import torch
from agent_cases import tiny_agent
from trainer_cases import log_of, plain_row, repeatable

from still import methods
from still.compactor import StillCompactor
from still.harness.trainers.config import TrainSettings
from still.harness.trainers.loop import RowTrainer
from still.harness.trainers.model import RowModel, Share
from still.harness.trainers.setup import make_module
from still.harness.trainers.steps import RowSource, own_batches, shares_of
from still.harness.trainers.weights import digest, load_weights


def rows(count: int = 5):
    """Trajectories of one to three windows over random ids."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        for window in range(1 + number % 3):
            ids = torch.randint(7, 260, (18 + 5 * window + number,), generator=draw).tolist()
            found.append(plain_row(ids, range(6, len(ids)), f"t{number}", window))
    return found


def trainer(folder, steps: int = 6, seed: int = 0, module=None, **settings):
    loaded = tiny_agent(layers=1)
    module = module or RowModel(loaded.model.requires_grad_(True))
    settings = TrainSettings(**{"lr": 3e-3, "save_every": 2, "micro_tokens": 60, "train_seed": seed, **settings})
    return RowTrainer(module, settings, folder, RowSource(rows(), 2, settings, seed), steps)


def test_it_learns_and_a_cut_run_ends_with_the_same_weights(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.fit()
    log = log_of(tmp_path / "whole")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["nll"] < log[0]["nll"]
    assert all(line["tokens"] > 0 for line in log)
    cut = trainer(tmp_path / "cut")
    cut.args.max_steps = 4
    cut.fit()
    half = tmp_path / "cut" / "checkpoint-5"
    shutil.copytree(tmp_path / "cut" / "checkpoint-4", half)
    (half / "complete.json").unlink()  # as a kill inside the writing leaves it
    again = trainer(tmp_path / "cut")
    again.fit()
    assert not half.exists()
    assert digest(again.module) == digest(whole.module)
    assert repeatable(log_of(tmp_path / "cut")) == repeatable(log)
    assert all(0 < line["seconds_model"] < line["seconds_step"] for line in log)
    other = RowModel(tiny_agent(layers=1).model.requires_grad_(True))
    load_weights(other, tmp_path / "cut" / "checkpoint-6")
    assert digest(other) == digest(whole.module)


@pytest.mark.parametrize(
    ("kind", "attention", "sharing", "packing"),
    [("qwen3", "sdpa", True, True), ("qwen3", "eager", True, False), ("gemma3", "sdpa", False, False)],
)
def test_micro_batches_are_cut_as_the_model_computes_them(tmp_path, kind, attention, sharing, packing):
    loaded = tiny_agent(kind)
    loaded.model.set_attn_implementation(attention)
    stream = trainer(tmp_path, module=RowModel(loaded.model.requires_grad_(True))).get_train_dataloader().dataset
    assert (stream.share["sharing"], stream.share["packing"]) == (sharing, packing)
    assert loaded.model.config._attn_implementation == attention


def test_every_row_is_in_exactly_one_micro_batch_of_one_process():
    settings = TrainSettings()
    shares = shares_of(rows(), "token", 0, 1.0)
    for world in (1, 2, 3, 7):
        found = [batch for rank in range(world) for batch in own_batches(shares, rank, world, 60)]
        real = [share for batch in found for share in batch if share.scale]
        assert sorted(map(id, real)) == sorted(map(id, shares))
        assert all(len(batch) == 1 or sum(len(s.row.input_ids) for s in batch) <= 60 for batch in found)
        assert all(own_batches(shares, rank, world, 60) for rank in range(world))
    plan = [{"kind": "exact"}]
    behind = [
        plain_row(list(range(20 + n)), [19], name, n, prefix_ids=[ids], prefix_plan=plan)
        for n, name, ids in ((1, "x", 1), (2, "x", 2), (3, "y", 1), (4, "y", 2))
    ]
    shares = shares_of([*behind, *rows()], "token", 0, 1.0)
    order = [share.row for batch in own_batches(shares, 0, 1, 60) for share in batch]
    lengths = [len(row.input_ids) for row in order[:-4]]
    assert lengths == sorted(lengths, reverse=True)  # little padding
    alike = [behind[0], behind[2]], [behind[1], behind[3]]
    assert order[-4:] == [*alike[0], *alike[1]]  # a prefix is made once
    for rank in (0, 1):
        assert [share.row for share in own_batches(shares[:4], rank, 2, 60)[0]] == alike[rank]
    source = RowSource(rows(), 2, settings, 0)
    epoch = [share.row.trajectory_id for step in range(3) for share in source.step(step)]
    assert sorted(epoch) == sorted(row.trajectory_id for row in rows())
    assert [s.row.trajectory_id for s in source.step(3)] != epoch[: len(source.step(3))] or source.steps(2) == 6


class Poisoned:
    """Rows whose second step has no finite loss."""

    def __init__(self, source):
        self.source = source

    def step(self, number):
        shares = self.source.step(number)
        return [Share(share.row, float("nan")) for share in shares] if number else shares


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    one = trainer(tmp_path)
    one.source = Poisoned(one.source)
    with pytest.raises(ValueError, match=r"the loss of step 1 is nan: look at \['t"):
        one.fit()


def test_weights_that_are_no_numbers_are_never_saved(tmp_path):
    one = trainer(tmp_path / "run", save_every=6)
    with torch.no_grad():
        next(one.module.policy.parameters()).view(-1)[0] = float("inf")
    with pytest.raises(ValueError, match=r"policy\..* is no longer finite.*lower --lr"):
        one.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_arguments_of_ours_cannot_be_passed_through(tmp_path):
    settings, source = TrainSettings(), RowSource(rows(), 2, TrainSettings(), 0)
    wrong = {"learning_rate": "use --lr", "save_strategy": "depends on", "nonsense": "no such field"}
    for name, complaint in wrong.items():
        with pytest.raises(ValueError, match=complaint):
            RowTrainer(RowModel(tiny_agent(layers=1).model), settings, tmp_path, source, 1, options={name: 1})
    with pytest.raises(ValueError, match="nothing would train"):
        TrainSettings(train_policy="frozen")


def test_every_epoch_has_all_trajectories_in_an_order_of_its_own():
    rows = [plain_row([9] * 8, range(4, 8), f"t{number}") for number in range(8)]
    source = RowSource(rows, 2, TrainSettings(), seed=0)
    epochs = [[share.row.trajectory_id for step in range(4) for share in source.step(4 * epoch + step)]
              for epoch in range(2)]  # fmt: skip
    assert [sorted(each) for each in epochs] == [sorted(row.trajectory_id for row in rows)] * 2
    assert epochs[0] != epochs[1]
    assert source.step(1) == RowSource(rows, 2, TrainSettings(), seed=0).step(1)


def test_weights_narrower_than_fp32_do_not_train_but_may_be_frozen():
    loaded = tiny_agent(layers=1)
    loaded.model.bfloat16()
    with pytest.raises(ValueError, match=r"would train in bfloat16.* --dtype float32 .*--train-policy lora"):
        make_module(loaded, None, TrainSettings(train_policy="full"))
    method = methods.get("still", compactor=StillCompactor.for_model(loaded.model, ratio=4, chunk=2048))
    module, _ = make_module(loaded, method, TrainSettings(train_policy="frozen", compactor_mode="rl"))
    assert not any(p.requires_grad for p in module.policy.parameters())
    assert make_module(tiny_agent(layers=1), None, TrainSettings(train_policy="full"))
