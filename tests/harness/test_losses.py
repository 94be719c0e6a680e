"""Normalisers, clipped ratios and advantages: by hand, and gradients that no cut of the batch changes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from agent_cases import tiny_agent
from trainer_cases import assert_close, gradients, plain_row, rollout

from still.harness.trainers.advantages import combined_reward, group_advantages
from still.harness.trainers.losses import Counted, policy_loss, row_scales, token_weights
from still.harness.trainers.model import RowModel, Share
from still.harness.trainers.steps import shares_of
from still.harness.windows import IGNORE, WindowRow


def test_the_group_baseline_is_over_trajectories_by_hand():
    rewards = {"a1": 1.0, "a2": 0.0, "a3": 0.5, "a4": None, "b1": 0.3, "b2": 0.3, "c1": 1.0, "c2": None}
    found = group_advantages(rewards, {name: name[0] for name in rewards})
    assert found.of == {"a1": 0.5, "a2": -0.5, "a3": 0.0}
    assert (found.kept, found.dropped, found.lone, found.unscored) == (("a",), ("b",), ("c",), ("a4", "c2"))
    scaled = group_advantages(rewards, {name: name[0] for name in rewards}, scale="group")
    spread = math.sqrt((0.25 + 0.25) / 3)
    assert scaled.of == {"a1": 0.5 / spread, "a2": -0.5 / spread, "a3": 0.0}


def test_four_rows_of_a_long_trajectory_do_not_move_the_baseline():
    # [1, 1, 1, 1, 0] over rows would give a mean of 0.8; over the two trajectories it is 0.5
    assert group_advantages({"long": 1.0, "short": 0.0}, {"long": "g", "short": "g"}).of == {"long": 0.5, "short": -0.5}


def test_ragged_rollouts_have_one_advantage_each_and_a_masked_last_window_hides_none(tmp_path):
    """Real windows, four and two of them: the baseline is the mean of two rewards, whatever the windows are."""
    played = {name: rollout(tmp_path / name, documents=n, backend="memo", budget="400t", reads=1, reads_force=2)
              for name, n in (("long", 4), ("short", 2))}  # fmt: skip
    rows = [replace(row, trajectory_id=name) for name, some in played.items() for row in some]
    windows = {name: len(some) for name, some in played.items()}
    assert windows["long"] > windows["short"] > 1
    made = group_advantages({"long": 1.0, "short": 0.25}, dict.fromkeys(windows, "g"))
    assert made.of == {"long": 0.375, "short": -0.375}
    shares = shares_of(rows, "trajectory", 0, 1.0, lambda row: made.of[row.trajectory_id])
    for name, some in played.items():
        mine = [share for share in shares if share.row.trajectory_id == name]
        assert {share.advantage for share in mine} == {made.of[name]}
        # each trajectory counts a half, however many windows its tokens lie in
        assert sum(share.scale * share.row.trained for share in mine) == pytest.approx(0.5)
        assert [share.scale for share in mine] == pytest.approx([0.5 / sum(row.trained for row in some)] * len(some))
    last = next(row for row in rows if row.trajectory_id == "long" and row.is_last)
    masked = replace(last, labels=[IGNORE] * len(last.labels), token_kind=[0] * len(last.labels))
    others = [row for row in rows if row is not last]
    counted = shares_of([*others, masked], "trajectory", 0, 1.0, lambda row: made.of[row.trajectory_id])
    assert counted[-1].scale * counted[-1].row.trained == 0
    for share in counted[:-1]:
        own = sum(row.trained for row in others if row.trajectory_id == share.row.trajectory_id)
        assert (share.advantage, share.scale) == (made.of[share.row.trajectory_id], pytest.approx(0.5 / own))


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_stops(reward):
    with pytest.raises(ValueError, match="the reward of x is"):
        group_advantages({"x": reward, "y": 1.0}, {"x": "g", "y": "g"})


def test_the_reward_mixes_rate_and_all_pass():
    assert combined_reward(0.5, False) == pytest.approx(0.45)
    assert combined_reward(1.0, True) == 1.0
    assert combined_reward(None, None) is None
    with pytest.raises(ValueError, match="between 0 and 1"):
        combined_reward(0.5, True, share=2)


def test_scales_by_hand():
    rows = [Counted("a", 2), Counted("a", 6), Counted("b", 4), Counted("c", 0)]
    assert row_scales(rows, "token") == [1 / 12] * 4
    assert row_scales(rows, "trajectory") == [1 / 16, 1 / 16, 1 / 8, 0.0]
    assert row_scales(rows, "constant", 10) == [1 / 20] * 4
    # a masked last window does not hide earlier ones: row c of trajectory a counts nothing and changes nothing
    assert row_scales([*rows, Counted("a", 0)], "trajectory")[:3] == [1 / 16, 1 / 16, 1 / 8]


@pytest.mark.parametrize(("arguments", "complaint"), [
    (([Counted("a", 2)], "row"), "mean per row"), (([Counted("a", 2)], "window"), "mean per row"),
    (([Counted("a", 0)], "token"), "every mask is zero"), (([], "token"), "every mask is zero"),
    (([Counted("a", 2)], "constant"), "above 0"), (([Counted("a", 2)], "batch"), "is one of"),
])  # fmt: skip
def test_normalisers_that_cannot_be_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        row_scales(*arguments)


def test_ratios_are_clipped_and_truncated_per_token():
    sampled = torch.zeros(4)
    logprobs = torch.tensor([0.0, math.log(2.0), math.log(0.5), math.log(50.0)], requires_grad=True)
    up = policy_loss(logprobs, sampled, 1.0, low=0.2, high=0.28, cap=4.0)
    assert up.loss.tolist() == pytest.approx([-1.0, -1.28, -0.5, -1.28])
    assert (up.clipped, up.truncated) == (2, 1)
    down = policy_loss(logprobs, sampled, -1.0, low=0.2, high=0.28, cap=4.0)
    assert down.loss.tolist() == pytest.approx([1.0, 2.0, 0.8, 4.0])  # without the cap the last would be 50
    down.loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([1.0, 2.0, 0.0, 0.0])


def test_the_kl_is_zero_at_the_reference_and_needs_one():
    logprobs = torch.tensor([-1.0, -2.0])
    assert policy_loss(logprobs, logprobs, 1.0, kl=0.1, reference=logprobs).kl == 0.0
    off = policy_loss(logprobs, logprobs, 0.0, kl=0.1, reference=logprobs + 1)
    assert off.loss.tolist() == pytest.approx([0.1 * (math.e - 2)] * 2)
    with pytest.raises(ValueError, match="no log-probabilities of a reference"):
        policy_loss(logprobs, logprobs, 1.0, kl=0.1)
    with pytest.raises(ValueError, match="1 of 2 trained tokens have no log-probability"):
        policy_loss(logprobs, torch.tensor([-1.0, math.nan]), 1.0)


def test_memo_tokens_may_weigh_more_but_never_nothing():
    assert token_weights(torch.tensor([1, 2, 5]), 3.0, 2).tolist() == [1.0, 3.0, 1.0]
    with pytest.raises(ValueError, match="masked memos degenerate"):
        token_weights(torch.tensor([1]), 0.0, 2)


LENGTHS = {"a": 40, "b": 23, "c": 31}
TURNS = {"a": [range(5, 9), range(14, 22), range(30, 40)], "b": [range(4, 12), range(17, 23)], "c": [range(20, 31)]}
ADVANTAGES = {"a": 0.7, "b": -0.4, "c": 0.2}


def whole_rows(ids) -> list[WindowRow]:
    """Each trajectory in one row."""
    rows = []
    for name, turns in TURNS.items():
        places = {place for turn in turns for place in turn}
        row = plain_row(ids[name], turns[0], name)
        labels = [t if i in places else IGNORE for i, t in enumerate(ids[name])]
        rows.append(WindowRow(**{**vars(row), "labels": labels, "token_kind": [int(x != IGNORE) for x in labels],
                                 "logprobs": [-5.0 + 0.01 * i for i in range(len(labels))]}))  # fmt: skip
    return rows


def cut_rows(ids) -> list[WindowRow]:
    """Each turn in a row of its own, behind the same tokens."""
    return [
        plain_row(ids[name][: turn[-1] + 1], turn, name, window,
                  logprobs=[-5.0 + 0.01 * i for i in range(turn[-1] + 1)])
        for name, turns in TURNS.items() for window, turn in enumerate(turns)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def setting():
    loaded = tiny_agent(layers=1)
    draw = torch.Generator().manual_seed(3)
    ids = {name: torch.randint(7, 260, (n,), generator=draw).tolist() for name, n in LENGTHS.items()}
    loaded.model.requires_grad_(True)
    return loaded.model, ids


def backward(model, batches: list[list[WindowRow]], normaliser: str, kind: str):
    """Gradients of one step over micro-batches; zero-weight rows fill places."""
    rows = [row for batch in batches for row in batch]
    counted = [Counted(row.trajectory_id, row.trained) for row in rows]
    scales = iter(row_scales(counted, normaliser, 50.0))
    module = RowModel(model, loss=kind)
    module.zero_grad()
    for batch in batches:
        good = ADVANTAGES if kind == "policy" else {}
        shares = [Share(row, next(scales), good.get(row.trajectory_id)) for row in batch]
        module(shares).loss.backward()
    return gradients(module)


@pytest.mark.parametrize("normaliser", ["token", "trajectory", "constant"])
@pytest.mark.parametrize("kind", ["sft", "policy"])
def test_no_cut_of_the_step_changes_its_gradient(setting, normaliser, kind):
    model, ids = setting
    whole, cut = whole_rows(ids), cut_rows(ids)
    reference = backward(model, [[row] for row in whole], normaliser, kind)
    for batches in (
        [whole],  # one padded batch
        [cut],  # windows, padded
        [[row] for row in cut],  # windows, accumulated one by one
        [cut[:1], cut[1:4], cut[4:]],  # uneven batches, a trajectory split between two
        [[cut[5], cut[0], cut[3]], [cut[4], cut[2], cut[1]]],  # in any order
    ):
        assert_close(reference, backward(model, batches, normaliser, kind))


def test_a_mean_per_row_would_turn_the_gradient(setting):
    model, ids = setting

    def per_row(rows):
        module = RowModel(model)
        module.zero_grad()
        for row in rows:
            module([Share(row, 1 / row.trained / len(rows))]).loss.backward()
        return torch.cat([g.flatten() for g in gradients(module).values()])

    one, other = per_row(whole_rows(ids)), per_row(cut_rows(ids))
    assert torch.cosine_similarity(one, other, dim=0) < 0.99


def test_a_row_that_fills_a_place_adds_nothing(setting):
    model, ids = setting
    rows = whole_rows(ids)
    module = RowModel(model)
    module.zero_grad()
    out = module([Share(rows[0], 0.0)])
    out.loss.backward()
    assert all(float(g.abs().max()) == 0.0 for g in gradients(module).values())
    assert "tokens" not in out.sums


def test_rows_sampled_at_any_temperature_are_fitted_by_plain_cross_entropy(setting):
    model, ids = setting
    row = replace(whole_rows(ids)[0], temperature=0.7)
    labels = torch.tensor([row.labels])
    got = RowModel(model)(shares_of([row], "token", 0, 1.0)).loss
    expected = model(input_ids=torch.tensor([row.input_ids]), labels=labels).loss  # transformers' own, at 1
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    assert shares_of([row], "token", 0, 1.0, lambda row: 1.0)[0].row.temperature == 0.7  # ratios: as it was sampled
