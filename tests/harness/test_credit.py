"""Credit from artifacts: by hand, and what an option of GRPO makes of a rollout's ledger."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from agent_cases import Reader, tiny_agent
from trainer_cases import RUN, Honest, exact, matters

from still.harness.episodes import Oracle
from still.harness.probe import read_private
from still.harness.trainers.config import GrpoConfig, TrainSettings
from still.harness.trainers.credit import (
    Trajectory,
    correlation,
    ledger_credit,
    mixed,
    potential_credit,
    returns,
)
from still.harness.trainers.grpo import Rollouts, run_grpo
from still.harness.trainers.ledgers import LEDGER, probed
from still.harness.trainers.lines import spoken_of
from still.harness.trainers.setup import make_module
from still.harness.windows import IGNORE

NOTHING = frozenset()


def trajectory(reward, held=(), potential=None, read=None, **passed) -> Trajectory:
    held = [frozenset(each) for each in held]
    potential = [len(each) / 2 for each in held] if potential is None else potential
    read = [n / (len(held) + 1) for n in range(len(held) + 1)] if read is None else read
    return Trajectory(reward, held, potential, read, passed)


def test_returns_telescope_to_the_reward_minus_where_the_window_began():
    assert returns(0.9, [0.25, 0.75]) == pytest.approx([0.9, 0.65, 0.15])
    # steps 0.25, 0.5, 0.15; with a decay of 0.5 the last window's step reaches the first as a quarter
    assert returns(0.9, [0.25, 0.75], 0.5) == pytest.approx([0.25 + 0.25 + 0.0375, 0.5 + 0.075, 0.15])
    assert returns(0.9, [0.25, 0.75], 0.0) == pytest.approx([0.25, 0.5, 0.15])
    assert returns(0.4, []) == [0.4]


def test_the_baseline_of_a_potential_is_taken_where_as_much_was_read():
    group = {
        "long": trajectory(1.0, ["a", "ab", "ab"], read=[0.0, 0.25, 0.5, 0.75]),  # potentials 0.5, 1, 1
        "short": trajectory(0.0, ["a"], read=[0.0, 0.5]),  # potential 0.5
    }
    # long earns [1, 0.5, 0, 0], short [0, -0.5]; at 0.25 short is still in its first window, at 0.5 in its second
    found = potential_credit(group)
    assert found["long"] == pytest.approx([0.5, 0.25, 0.25, 0.25])
    assert found["short"] == pytest.approx([-0.5, -0.25])


def test_windows_that_begin_with_the_same_share_read_are_held_against_their_like():
    same = trajectory(1.0, ["a", "ab"], read=[0.0, 0.5, 0.5])
    assert potential_credit({"x": same, "y": same}) == {name: pytest.approx([0.0] * 3) for name in "xy"}
    # at 0.5 x has two windows, which still earn 0.5 and 0; y has one, which earns -0.5, and is held against the first
    found = potential_credit({"x": same, "y": trajectory(0.0, ["a"], read=[0.0, 0.5])})
    assert found["x"] == pytest.approx([0.5, 0.5, 0.25])
    assert found["y"] == pytest.approx([-0.5, -0.5])


def test_the_ledger_gives_each_criterion_to_the_windows_that_earned_or_lost_it():
    group = {
        # three windows; a acquired at the first boundary and lost at the second, b acquired at the second, c never
        "one": trajectory(1 / 3, ["a", "b"], a=False, b=True, c=False),
        # a and c pass from the last window alone, b is there to the end and was not written
        "two": trajectory(2 / 3, ["b"], a=True, b=False, c=True),
    }
    found = ledger_credit(group)
    # every criterion's baseline is 1/2 and weighs 1/3: a part is +-1/6, times the windows
    one = [-1 / 18, -1 / 6 + 1 / 12 - 1 / 18, 1 / 12 - 1 / 18]
    assert found["one"] == pytest.approx([3 * part for part in one])
    assert found["two"] == pytest.approx([0.0, 2 * (1 / 6 - 1 / 6 + 1 / 6)])


def test_a_trajectorys_mean_credit_is_its_plain_advantage():
    group = {
        "x": trajectory(0.5, ["a", NOTHING, "ab"], a=True, b=False),
        "y": trajectory(0.0, ["b"], a=False, b=False),
        "z": trajectory(1.0, [], a=True, b=True),
    }
    plain = {name: one.reward - 0.5 for name, one in group.items()}
    for name, credit in ledger_credit(group).items():
        assert sum(credit) / len(credit) == pytest.approx(plain[name])
    assert mixed(0.4, [1.0, -1.0], 0.25) == pytest.approx([0.55, 0.05])
    assert mixed(0.4, [1.0, -1.0], 0.0) == [0.4, 0.4]
    with pytest.raises(ValueError, match="between 0 and 1"):
        mixed(0.4, [1.0], 2)
    with pytest.raises(ValueError, match="1 boundaries have 1 potentials and begin 1 windows"):
        trajectory(0.5, ["a"], read=[0.0])


def test_how_far_a_potential_foretells_the_reward():
    low, high = trajectory(0.0, ["a"]), trajectory(1.0, ["ab"])
    assert correlation([low, high]) == pytest.approx(1.0)
    assert correlation([trajectory(1.0, ["a"]), trajectory(0.0, ["ab"])]) == pytest.approx(-1.0)
    assert correlation([low, low]) is None
    assert correlation([trajectory(1.0)]) is None


CONFIG = GrpoConfig(steps=1, tasks_per_step=1, group=2, credit_share=0.5, potential="written", ask=False)
SETTINGS = TrainSettings(lr=1e-3, micro_tokens=4000)


def knows_and_does_not(task):
    """The first run of each pair knows the rubric, and the second one reads and notes nothing."""

    def policy_of(loaded, window):
        players = itertools.cycle([lambda: Oracle(task, 600, len), Reader])
        return Honest(loaded.tokenizer, lambda: next(players)(), window, loaded)

    return policy_of


def test_credit_moves_a_rollouts_advantage_between_its_windows(tmp_path):
    (task,) = matters(tmp_path / "lab", (1,))
    module, loaded = make_module(tiny_agent(layers=1), None, SETTINGS, loss="policy")

    def step(config):
        source = Rollouts(module, loaded, [task], RUN, config, SETTINGS, tmp_path / "run", exact()[0],
                          policy_of=knows_and_does_not(task))  # fmt: skip
        shares = source.step(0)
        return {(s.row.trajectory_id, s.row.window): s.advantage for s in shares}, source.last

    plain, log = step(CONFIG)
    good, bad = (f"step-0/{task.id}/seed-{number}" for number in range(2))
    root = tmp_path / "run" / "rollouts" / "step-0000" / task.id / "seed-0"
    held = [0, *(len(record["written"]) / 4 for record in read_private(root, LEDGER))]
    last = len(held) - 1
    assert last >= 1
    assert 0 < held[1] < 1
    # of five criteria four ask for a value; the fifth, that nothing is invented, the run that says nothing passes too:
    # rewards are 1 and 0.9 / 5, advantages +-0.41
    assert plain == {(name, w): pytest.approx(sign * 0.41) for name, sign in ((good, 1), (bad, -1))
                     for w in range(last + 1)}  # fmt: skip
    assert log["ledger_written_held"] == held[-1] / 2  # the other run holds nothing
    assert log["ledger_written_lost"] == 0.0

    ledger, log = step(replace(CONFIG, credit="ledger"))
    assert log["credit_correlation"] == pytest.approx(1.0)
    # four criteria have an advantage of +-1/2 and weigh a fifth: half of each goes to the window that acquired it, all
    # that is left to the draft; what the other run never had is taken from all of its windows
    parts = [(after - before) / 2 for before, after in itertools.pairwise(held)]
    for window, part in enumerate([*parts, 1 - sum(parts)]):
        assert ledger[good, window] == pytest.approx(0.5 * 0.41 + 0.5 * 0.4 * part * (last + 1))
        assert ledger[bad, window] == pytest.approx(-0.5 * 0.41 - 0.5 * 0.4)

    shaped, _ = step(replace(CONFIG, credit="potential"))
    for window, there in enumerate(held):  # it still earns 1 - there, and the other run 0.18
        assert shaped[good, window] == pytest.approx(0.5 * 0.41 + 0.5 * (1 - there - 0.18) / 2)
        assert shaped[bad, window] == pytest.approx(-0.5 * 0.41 - 0.5 * (1 - there - 0.18) / 2)


@pytest.mark.full
def test_a_step_with_gains_as_potential_is_taken_and_logged(tmp_path):
    (task,) = matters(tmp_path / "lab", (1,))
    config = replace(CONFIG, credit="potential", potential="gain", ask=True)
    run_grpo([task], (), tiny_agent(layers=1), RUN, config, SETTINGS, tmp_path / "run", *exact(),
             report=lambda _: None, policy_of=knows_and_does_not(task))  # fmt: skip
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["ledger_written_held"] > 0
    assert line["ledger_answered_held"] == 0  # a random model knows nothing
    for path in (tmp_path / "run").rglob(LEDGER):
        for record in read_private(path.parent, LEDGER):
            assert set(record["gain"]) == set(probed(task))
            assert all(map(math.isfinite, record["gain"].values()))
    assert "ledger_written_held" in (tmp_path / "run" / "report.html").read_text()


def pieces(*texts):
    """A decoder of tokens that are these texts."""
    return lambda ids: "".join(texts[each] for each in ids)


def test_a_token_speaks_of_the_criteria_that_its_line_names():
    texts = ('{"content": "', "Ash", " Farm", ": $1", "\\", "n", "Ash", " Farms", ": $2", ". ", "birch  ", "mill",
             " and ash", "\n", "farm", "; $3", "\\n", "Done")  # fmt: skip
    found = spoken_of(range(len(texts)), pieces(*texts), {"a": "Ash Farm", "b": "Birch Mill", "c": "Cedar"})
    about = ["a"] * 4 + [""] * 6 + ["b"] * 3 + [""] * 5  # "Ash Farms" is somebody else, and a line's end cuts a name
    assert ["".join(sorted(each)) for each in found] == about


def test_lines_are_found_in_the_tokens_of_any_tokenizer():
    """A SentencePiece decoder drops the space in front of what it is given."""

    def decode(ids):
        return "".join(("Ash", " Farm", ": one", ".\n", "Birch", " Mill", ": two")[each] for each in ids).lstrip(" ")

    found = spoken_of(range(7), decode, {"a": "ash farm", "b": "birch mill"})
    assert found == [frozenset("a")] * 4 + [frozenset("b")] * 3


def test_lines_earn_their_own_criterions_advantage(tmp_path):
    (task,) = matters(tmp_path / "lab", (1,))
    module, loaded = make_module(tiny_agent(layers=1), None, SETTINGS, loss="policy")
    config = replace(CONFIG, credit="lines", credit_share=1.0)
    source = Rollouts(module, loaded, [task], RUN, config, SETTINGS, tmp_path / "run", exact()[0],
                      policy_of=knows_and_does_not(task))  # fmt: skip
    shares = source.step(0)
    parties = [criterion.expect["party"] for criterion in task.criteria if not criterion.expect.get("absent")]
    lines = 0
    for share in shares:
        assert len(share.advantage) == share.row.trained
        tokens = [token for token in share.row.labels if token != IGNORE]
        good = share.row.trajectory_id.endswith("seed-0")
        inside = [advantage for advantage in share.advantage if advantage != pytest.approx(0.41 if good else -0.41)]
        # four criteria pass in one of two runs; the run that says nothing has no line, so all of it gets the plain one
        assert inside == [pytest.approx(0.5)] * len(inside)
        assert good or not inside
        text = loaded.tokenizer.decode(tokens)
        assert bool(inside) == any(party in text for party in parties)
        lines += bool(inside)
    assert lines
    loss = module([shares[0]]).loss
    flat = module([replace(shares[0], advantage=0.41)]).loss
    assert not torch.isclose(loss, flat)


def test_random_verdicts_are_the_control_of_credit_by_lines(tmp_path):
    (task,) = matters(tmp_path / "lab", (1,))
    module, loaded = make_module(tiny_agent(layers=1), None, SETTINGS, loss="policy")
    config = replace(CONFIG, credit="lines", credit_share=1.0, reward="random", group=6)


    def knows(loaded, window):
        return Honest(loaded.tokenizer, lambda: Oracle(task, 600, len), window, loaded)

    source = Rollouts(module, loaded, [task], RUN, config, SETTINGS, tmp_path / "run", exact()[0], policy_of=knows)
    shares = source.step(0)  # all pass everything, so that only chance tells them apart
    found = {round(advantage, 6) for share in shares for advantage in share.advantage}
    assert len(found) > 6
    assert min(found) < 0 < max(found)


def test_credit_without_a_ledger_is_refused(tmp_path):
    (task,) = matters(tmp_path / "lab", (1,))
    blind = replace(task, criteria=tuple(replace(each, expect=None) for each in task.criteria))
    with pytest.raises(ValueError, match="states a value that can be looked for"):
        run_grpo([blind], (), None, RUN, replace(CONFIG, credit="ledger"), SETTINGS, tmp_path, *exact())
    with pytest.raises(ValueError, match="which party it is about"):
        run_grpo([blind], (), None, RUN, replace(CONFIG, credit="lines"), SETTINGS, tmp_path, *exact())
    with pytest.raises(ValueError, match="slots have no text"):
        run_grpo([task], (), None, replace(RUN, backend="kv"), replace(CONFIG, credit="ledger"), SETTINGS, tmp_path,
                 *exact())  # fmt: skip
    with pytest.raises(ValueError, match="is no control"):
        replace(CONFIG, credit="ledger", reward="random")
    with pytest.raises(ValueError, match="credit_share is 2"):
        replace(CONFIG, credit_share=2)
