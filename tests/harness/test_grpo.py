"""GRPO on tiny random models: groups, versions, resumption, the compactor in the loop, and loud failures."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from agent_cases import Reader, of, tiny_agent
from trainer_cases import RUN, Honest, attentive, exact, log_of, matters, repeatable, written

from still import methods
from still.budgets import Split
from still.cli import main
from still.compactor import StillCompactor
from still.harness.play import Outcome
from still.harness.runs import read_run
from still.harness.sandbox import Sandbox
from still.harness.trainers import grpo as grpo_module
from still.harness.trainers.behaviour import behaviour, was_cut
from still.harness.trainers.commands import _tasks
from still.harness.trainers.config import GrpoConfig, TrainSettings
from still.harness.trainers.grpo import Rollouts, run_grpo
from still.harness.trainers.ledgers import LEDGER, trajectory_of
from still.harness.trainers.model import Share
from still.harness.trainers.report import smoothed
from still.harness.types import Message

SETTINGS = TrainSettings(lr=1e-3, save_every=1, micro_tokens=4000)
SHORT = replace(RUN, max_new_tokens=12)
CONFIG = GrpoConfig(steps=3, tasks_per_step=1, group=2, reward="random", length_cut=1.0)


def grpo(root, tasks, config=CONFIG, run=SHORT, settings=SETTINGS, loaded=None, grade=None, **more):
    """Run it with a model that is the same each time."""
    loaded = loaded or tiny_agent(layers=1)
    graders = [grade or exact()[0], exact()[1]]
    return run_grpo(tasks, (), loaded, run, config, settings, root, *graders, report=lambda _: None, **more)


def test_steps_roll_out_with_the_weights_that_they_train_and_resume_alike(tmp_path):
    tasks, whole, cut = matters(tmp_path / "lab"), tmp_path / "whole", tmp_path / "cut"
    grpo(whole, tasks)
    log = log_of(whole)
    assert [line["step"] for line in log] == [1, 2, 3]
    for line in log:
        assert line["gap"] < 1e-4  # what trains saw what was sampled
        assert line["ratio"] == pytest.approx(1.0, abs=1e-4)
        assert line["rollouts"] == 2
        assert "behaviour_grep_share" in line
        parts = [line[f"seconds_{name}"] for name in ("rollouts", "grading", "model")]
        assert min(parts) > 0
        assert sum(parts) < line["seconds_step"]
    for number in range(3):
        runs = sorted((whole / "rollouts" / f"step-{number:04d}").rglob("events.jsonl"))
        _, second = [read_run(path.parent) for path in runs]
        assert {turn["version"] for turn in of(second, "turn")} == {number}
    digests = {(whole / "rollouts" / f"step-{n:04d}" / "weights.json").read_text() for n in range(3)}
    assert len(digests) == 3
    page = (whole / "report.html").read_text()
    assert "random numbers" in page
    assert re.search(r"3 steps took \S+ minutes: rollouts \S+, grading \S+, forward and backward \S+, all else ", page)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-3")
    shutil.rmtree(cut / "checkpoint-2")
    shutil.rmtree(cut / "trained")
    next(iter((cut / "rollouts" / "step-0001").rglob("metrics.json"))).unlink()
    later = written(cut / "rollouts" / "step-0002")
    grpo(cut, tasks)
    assert written(cut / "rollouts" / "step-0002") == later  # of the same weights: read, not played again
    assert repeatable(log_of(cut)) == repeatable(log)
    file = "trained/policy/model.safetensors"
    assert (cut / file).read_bytes() == (whole / file).read_bytes()


class Wordy(Reader):
    """Reads, and says something of its own before it does."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def __call__(self, seen, limit):
        message = super().__call__(seen, limit)
        return Message("assistant", f"note {self.number * 37 % 91}", message.calls) if message.calls else message


def scripted(loaded, window):
    """Scripts play, each its own, and the model's log-probabilities are recorded."""
    numbers = itertools.count(1)
    return Honest(loaded.tokenizer, lambda: Wordy(next(numbers)), window, loaded)


@pytest.mark.parametrize(
    ("mode", "name"),
    [("rl", "still"), ("distill", "still-uneven"), pytest.param("distill", "still", marks=pytest.mark.full)],
)
def test_the_compactor_trains_in_the_loop_behind_a_frozen_base(tmp_path, mode, name):
    loaded, tasks = tiny_agent(layers=1), matters(tmp_path / "lab", (1,))
    compactor, split = StillCompactor.for_model(loaded.model, ratio=4, chunk=2048), None
    if name == "still-uneven":
        attentive(loaded)
        split = Split({0: (1.0, 4.0)})
    before = {name: p.clone() for name, p in compactor.named_parameters()}
    base = {name: p.clone() for name, p in loaded.model.named_parameters()}
    run = replace(RUN, backend="kv", method=name, budget=None, ratio=4.0)
    settings = replace(SETTINGS, train_policy="frozen", compactor_mode=mode)
    method = methods.get("still", compactor=compactor, split=split)
    grpo(tmp_path / "run", tasks, replace(CONFIG, steps=1), run, settings, loaded, method=method, policy_of=scripted)
    (line,) = log_of(tmp_path / "run")
    assert line["gap"] < 1e-4
    assert ("distill" in line) == (mode == "distill")
    assert any((p - before[name]).abs().max() > 0 for name, p in compactor.named_parameters())
    assert all((p == base[name]).all() for name, p in loaded.model.named_parameters())
    assert (tmp_path / "run" / "trained" / "compactor" / "compactor.safetensors").is_file()
    assert not (tmp_path / "run" / "trained" / "policy").exists()


def test_distillation_alone_learns_from_rollouts_of_equal_reward(tmp_path):
    loaded, tasks = tiny_agent(layers=1), matters(tmp_path / "lab", (1,))
    method = methods.get("still", compactor=StillCompactor.for_model(loaded.model, ratio=4, chunk=2048))
    run = replace(RUN, backend="kv", budget=None, ratio=4.0)
    settings = replace(SETTINGS, train_policy="frozen", compactor_mode="distill")
    config = replace(CONFIG, steps=1, reward="rubric")
    grpo(tmp_path / "run", tasks, config, run, settings, loaded, method=method, policy_of=scripted)
    (line,) = log_of(tmp_path / "run")
    assert (line["groups_kept"], line["groups_dropped"]) == (0, 1)
    assert line["distill"] > 0
    with pytest.raises(ValueError, match="no group of step 0 has any variance"):
        grpo(tmp_path / "rl", tasks, config, run, replace(settings, compactor_mode="rl"), loaded, method=method,
             policy_of=scripted)  # fmt: skip


def broken(rollouts):
    """A grader whose rate is no number."""
    return [SimpleNamespace(pass_rate=float("nan"), all_pass=False, verdicts=[]) for _ in rollouts]


def test_what_would_silently_learn_nothing_stops(tmp_path):
    tasks = matters(tmp_path / "lab", (1,))
    with pytest.raises(ValueError, match="no group of step 0 has any variance"):
        grpo(tmp_path / "same", tasks, replace(CONFIG, reward="rubric"))
    (tmp_path / "same" / "rollouts" / "step-0000" / "rewards-0.json").unlink()
    with pytest.raises(ValueError, match=r"the reward of step-0/.* is nan"):
        grpo(tmp_path / "same", tasks, replace(CONFIG, reward="rubric"), grade=broken)
    with pytest.raises(ValueError, match="2 of 2 rollouts of step 0 were stopped by a limit on length"):
        grpo(tmp_path / "long", tasks, replace(CONFIG, length_cut=0.5))
    with pytest.raises(ValueError, match="2 rollouts unscored"):
        grpo(tmp_path / "mask", tasks, replace(CONFIG, overlong="mask"))
    with pytest.raises(ValueError, match="is trained on and held out"):
        run_grpo(tasks, tasks, tiny_agent(), RUN, CONFIG, SETTINGS, tmp_path / "x", exact()[0], exact()[1])


@pytest.mark.full
def test_rollouts_of_other_weights_are_not_trained_on(tmp_path):
    tasks, root = matters(tmp_path / "lab", (1,)), tmp_path / "run"
    grpo(root, tasks, replace(CONFIG, steps=1))
    shutil.rmtree(root / "checkpoint-1")
    mark = root / "rollouts" / "step-0000" / "weights.json"
    mark.write_text('{"digest": "of others", "version": 0}')
    stray = root / "rollouts" / "step-0000" / "stray.txt"
    stray.write_text("from other weights")
    shutil.rmtree(root / "trained")
    grpo(root, tasks, replace(CONFIG, steps=1))
    assert not stray.exists()
    assert "of others" not in mark.read_text()


@pytest.mark.full
def test_behaviour_and_smoothing(tmp_path):
    tasks = matters(tmp_path / "lab", (1,))
    run = replace(RUN, max_new_tokens=800)
    grpo(tmp_path / "run", tasks, replace(CONFIG, steps=1), run, policy_of=scripted)
    events = read_run(next((tmp_path / "run").rglob("events.jsonl")).parent)
    found = behaviour(events)
    assert found["documents_read"] == found["characters_read"] == 1.0
    assert found["grep_share"] == found["reread_rate"] == 0.0
    assert found["windows"] > 1
    assert not was_cut(events)
    assert smoothed([1.0, 1.0, 1.0]) == pytest.approx([1.0, 1.0, 1.0])
    assert smoothed([0.0, 1.0])[1] == pytest.approx(0.3 / 0.51)


def test_the_command_trains_a_model_from_a_folder(tmp_path, capsys):
    loaded = tiny_agent(layers=1)
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    matters(tmp_path / "lab", (1,))
    command = [
        "grpo", str(tmp_path / "lab" / "tasks"), "--policy", str(tmp_path / "model"), "--backend", "memo", "--budget",
        "700t", "--window", "6000", "--max-new-tokens", "8", "--tools", "read,write", "--steps", "1", "--group", "2",
        "--tasks-per-step", "1", "--reward", "random", "--length-cut", "1", "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "trained" / "policy" / "model.safetensors").is_file()
    made = json.loads((tmp_path / "out" / "grpo.json").read_text())
    assert made["settings"]["grpo"]["group"] == 2
    assert made["provenance"]["versions"]["torch"]
    assert main([*command, "--held-out", str(tmp_path / "nope")]) == 2
    assert f"there is no task.json below {tmp_path / 'nope'}" in capsys.readouterr().err
    assert main([*command, "--judge", "gpt-5", "--report-judge", "gpt-5"]) == 2
    assert "what trains must not report" in capsys.readouterr().err
    assert main(["grpo", str(tmp_path), "--policy", "server:x", "--tokenizer", str(tmp_path / "model"),
                 "-o", str(tmp_path / "o")]) == 2  # fmt: skip
    assert "needs a local model" in capsys.readouterr().err


def source_for(tasks, config, root=None, grade=None, module=None):
    return Rollouts(module, None, tasks, RUN, config, SETTINGS, root or Path(), grade)


def test_steps_take_every_task_once_before_any_comes_again():
    tasks = [SimpleNamespace(id=number) for number in range(6)]
    source = source_for(tasks, replace(CONFIG, tasks_per_step=2))
    passes = [[task.id for step in range(3) for task in source._order(3 * epoch + step)[:2]] for epoch in range(2)]
    assert [sorted(each) for each in passes] == [list(range(6))] * 2
    assert passes[0] != passes[1]  # each pass has an order of its own
    uneven = source_for([SimpleNamespace(id=number) for number in range(7)], replace(CONFIG, tasks_per_step=3))
    steps = [[task.id for task in uneven._order(step)] for step in range(7)]
    assert all(sorted(each) == list(range(7)) for each in steps)
    taken = [name for each in steps for name in each[:3]]
    assert all(taken.count(number) == 3 for number in range(7))
    assert [sorted(taken[7 * epoch : 7 * epoch + 7]) for epoch in range(3)] == [list(range(7))] * 3


def test_rollouts_count_until_a_step_with_other_weights_comes_to_them(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_module, "digest", lambda module: "ours")
    source, steps = source_for((), CONFIG, tmp_path), [tmp_path / "rollouts" / f"step-{n:04d}" for n in range(4)]
    for step, digest in zip(steps, (None, "ours", "ours", "of others"), strict=True):
        step.mkdir(parents=True)
        (step / "rewards-0.json").write_text("{}")
        if digest:
            (step / "weights.json").write_text(json.dumps({"digest": digest, "version": 0}))

    def there():
        return [(step / "rewards-0.json").exists() for step in steps]

    source._claim(steps[0], 0)
    assert there() == [False, True, True, True]  # what an interrupted removal left is no rollouts of these weights
    source._claim(steps[1], 1)
    source._claim(steps[2], 2)
    assert there() == [False, True, True, True]
    source._claim(steps[3], 3)
    assert there() == [False, True, True, False]
    assert {json.loads((step / "weights.json").read_text())["digest"] for step in steps} == {"ours"}


def test_what_failed_in_a_share_is_tried_again_by_one_process(tmp_path, monkeypatch):
    ended, calls = [Outcome("a", tmp_path / "a" / "seed-0", "done", "finished", {})], []

    def play(tasks, policy, run, folder, share=(0, 1), **more):
        calls.append(share)
        return ended

    monkeypatch.setattr(grpo_module, "play_tasks", play)
    monkeypatch.setattr(grpo_module, "barrier", lambda: None)
    monkeypatch.setattr(grpo_module, "agreed", lambda value: ended if value is None else value, raising=False)
    source = source_for((), CONFIG, module=SimpleNamespace(method=None))
    for rank, shares in enumerate(([(0, 2), (0, 1)], [(1, 2)])):
        calls.clear()
        monkeypatch.setattr(grpo_module, "world", lambda rank=rank: (rank, 2))
        assert list(source._play([SimpleNamespace(id="a")], "step-0", [0], tmp_path, None)) == ["step-0/a/seed-0"]
        assert calls == shares


def test_a_placement_is_fitted_to_as_many_rollouts_as_were_asked_for(tmp_path, monkeypatch):
    def play(tasks, policy, run, folder, *, seeds, **more):
        runs = itertools.product(tasks, seeds)
        return [Outcome(task.id, folder / task.id / f"seed-{seed}", "done", "", {}) for task, seed in runs]

    fitted = []
    monkeypatch.setattr(grpo_module, "play_tasks", play)
    monkeypatch.setattr(grpo_module, "rows_of_run", lambda root, *rest, **more: [str(root.relative_to(tmp_path))])
    monkeypatch.setattr(grpo_module, "place", lambda module, rows, folder, settings: fitted.extend(rows))
    module = SimpleNamespace(method=None, eval=lambda: None)
    tasks, settings = [SimpleNamespace(id=name) for name in "ab"], replace(SETTINGS, place=5, compactor_mode="distill")
    policy, tokenizer = (lambda loaded, window: None), SimpleNamespace(tokenizer=None)
    Rollouts(module, tokenizer, tasks, RUN, CONFIG, settings, tmp_path, None, policy_of=policy).place()
    assert len(fitted) == len(set(fitted)) == 5
    past = CONFIG.steps * CONFIG.group
    played = {tuple(Path(root).parts[-2:]) for root in fitted}
    assert {(name, f"seed-{past + n}") for name in "ab" for n in range(2)} < played
    assert {seed for _, seed in played} == {f"seed-{past + n}" for n in range(3)}


def test_folders_of_tasks_that_share_ids_are_refused_and_one_given_twice_counts_once(tmp_path):
    (one,), (other,) = (matters(tmp_path / name, (1,)) for name in ("one", "other"))
    both = f"{re.escape(str(one.folder))} and {re.escape(str(other.folder))} are both called"
    with pytest.raises(ValueError, match=both):
        _tasks([tmp_path / "one", tmp_path / "other"])
    assert [task.folder for task in _tasks([tmp_path / "one", tmp_path / "one" / "tasks"])] == [one.folder]


def test_the_share_of_all_pass_in_a_reward_is_the_configs(tmp_path):
    graded = SimpleNamespace(pass_rate=0.8, all_pass=False, verdicts=())
    config = replace(CONFIG, reward="rubric", all_pass_share=0.5)
    source = source_for((), config, tmp_path, lambda rollouts: [graded for _ in rollouts])
    assert source._rewards({"a": (None, tmp_path)}, tmp_path, 0) == {"a": pytest.approx(0.4)}


def test_the_kl_is_to_the_reference():
    module = SimpleNamespace(logprobs=lambda row, policy=None: policy)
    source, shares = source_for((), CONFIG, module=module), [Share(None, 1.0)]
    source.reference = "the policy at the start"
    source._refer(shares)
    assert shares[0].reference == "the policy at the start"


def test_the_clip_bounds_of_the_config_reach_the_loss(tmp_path, monkeypatch):
    seen = {}

    def make(*args, options, **more):
        seen.update(options)
        raise LookupError

    monkeypatch.setattr(grpo_module, "make_module", make)
    loaded = tiny_agent(layers=1)
    config, tasks = replace(CONFIG, clip_low=0.1, clip_high=0.3, ratio_cap=5.0, kl=0.01), matters(tmp_path, (1,))
    with pytest.raises(LookupError):
        run_grpo(tasks, (), loaded, RUN, config, SETTINGS, tmp_path / "run", None, None)
    assert seen == {"low": 0.1, "high": 0.3, "cap": 5.0, "kl": 0.01}


def test_a_run_does_not_go_on_with_another_hold_out(tmp_path, monkeypatch):
    def claimed(*args, **more):
        raise LookupError

    monkeypatch.setattr(grpo_module, "Rollouts", claimed)
    loaded = tiny_agent(layers=1)
    tasks, one, other = (matters(tmp_path / str(seed), (seed,)) for seed in (1, 7, 8))
    for _ in range(2):
        with pytest.raises(LookupError):
            run_grpo(tasks, one, loaded, RUN, CONFIG, SETTINGS, tmp_path / "run", None, None)
    with pytest.raises(ValueError, match=r"another tasks\.held_out:"):
        run_grpo(tasks, other, loaded, RUN, CONFIG, SETTINGS, tmp_path / "run", None, None)


def test_a_wrong_value_leaves_the_folder_to_the_right_one(tmp_path):
    tasks, root = matters(tmp_path / "lab", (1,)), tmp_path / "run"
    with pytest.raises(ValueError, match="tasks_per_step is 2; of 1 tasks take 1 or less"):
        grpo(root, tasks, replace(CONFIG, tasks_per_step=2))
    with pytest.raises(ValueError, match="together is 0; it must be 1 or more"):
        grpo(root, tasks, together=0)
    with pytest.raises(ValueError, match=r"--trainer\.bogus: transformers"):
        grpo(root, tasks, options={"bogus": 1})
    with pytest.raises(ValueError, match="evaluate_on has 'bogus'"):
        grpo(root, tasks, evaluate_on=("bogus",))
    frozen = replace(SETTINGS, train_policy="frozen", compactor_mode="distill")
    with pytest.raises(ValueError, match="compactor_mode is distill, but with backend memo no compactor"):
        grpo(root, tasks, settings=frozen)
    assert not root.exists()


def test_a_compactor_that_no_slots_teach_stops_the_run(tmp_path):
    loaded, tasks = tiny_agent(layers=1), matters(tmp_path / "lab", (1,))
    method = methods.get("still", compactor=StillCompactor.for_model(loaded.model, ratio=4, chunk=2048))
    run = replace(RUN, backend="kv", budget=None, ratio=4.0, reads=9, reads_force=9)
    settings = replace(SETTINGS, train_policy="frozen", compactor_mode="distill")
    with pytest.raises(ValueError, match=r"none of the 2 rows of step 0 goes on behind slots.*a lower --reads"):
        grpo(tmp_path / "run", tasks, CONFIG, run, settings, loaded, method=method, policy_of=scripted)


def test_runs_of_other_seeds_draw_other_rollouts():
    def seeds(seed, train_seed):
        run, settings = replace(RUN, seed=seed), replace(SETTINGS, train_seed=train_seed)
        source = Rollouts(None, None, (), run, CONFIG, settings, Path(), None)
        return {source._seed(step) + sample for step in range(100) for sample in range(CONFIG.group)}

    assert seeds(0, 0) == set(range(200))
    every = [seeds(seed, train_seed) for seed in range(2) for train_seed in range(2)]
    assert len(set.union(*every)) == 4 * 200


def test_a_gain_counts_up_to_its_full_size(tmp_path):
    task = SimpleNamespace(criteria=[SimpleNamespace(id=name, expect={"value": "x"}) for name in "abc"])
    record = {"written": [], "answered": ["a"], "gain": {"a": 1.0, "b": -3.0, "c": 9.0}}
    (tmp_path / LEDGER).write_text(f"{json.dumps(record)}\n")
    events = [{"event": "run", "documents": ["1", "2"]}, {"event": "compact", "read": [["1", 0, 5]]}]
    config = replace(CONFIG, credit="potential", potential="gain", full_gain=2.0, ask=True, reward="rubric")
    made = trajectory_of(task, tmp_path, events, 1.0, {}, config)
    assert made.potential == [pytest.approx((0.5 + 0.0 + 1.0) / 3)]
    assert (made.held, made.read) == ([frozenset("a")], [0.0, 0.5])


def test_rollouts_and_the_hold_out_have_bash_where_a_sandbox_works(tmp_path, monkeypatch):
    monkeypatch.setattr("still.harness.sandbox.find_sandbox", lambda: (Sandbox("bwrap"), ""))
    tasks = matters(tmp_path / "lab")
    run_grpo(
        tasks[:1], tasks[1:], tiny_agent(layers=1), replace(SHORT, tools=("read", "bash")), replace(CONFIG, steps=1),
        SETTINGS, tmp_path / "run", *exact(), report=lambda _: None,
    )  # fmt: skip
    logs = sorted((tmp_path / "run").rglob("events.jsonl"))
    assert len(logs) == 4  # two rollouts, and the hold-out before and after
    for log in logs:
        tools = read_run(log.parent)[0]["tools"]
        assert {tool["function"]["name"] for tool in tools} >= {"read", "bash"}


def test_a_run_does_not_go_on_with_other_weights_or_options(tmp_path):
    tasks, config = matters(tmp_path / "lab"), replace(CONFIG, steps=1)
    options = {"adam_beta1": 0.8}
    grpo(tmp_path / "run", tasks, config, options=options)
    with pytest.raises(ValueError, match=r"holds a run with another trainer\.options"):
        grpo(tmp_path / "run", tasks, config)
    other = tiny_agent(layers=1)
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"holds a run with another weights\.policy"):
        grpo(tmp_path / "run", tasks, config, loaded=other, options=options)
    grpo(tmp_path / "run", tasks, config, options=options)
    settings = json.loads((tmp_path / "run" / "grpo.json").read_text())
    del settings["settings"]["weights"], settings["settings"]["trainer"]  # as runs of old have it
    (tmp_path / "run" / "grpo.json").write_text(json.dumps(settings))
    grpo(tmp_path / "run", tasks, config)
