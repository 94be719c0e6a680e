"""`still run` from the command line, with the pocket and with what it refuses."""

from __future__ import annotations

import json

import pytest
from agent_cases import Reader
from transformers import AutoTokenizer

from still.cli import main
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.tasks import load_task
from still.harness.play import play_tasks
from still.harness.policies.scripted import ScriptedPolicy
from still.harness.run_config import RunConfig
from still.harness.runs import read_run
from still.models import find


@pytest.fixture
def lab(tmp_path):
    return write_lab_tasks(tmp_path / "lab", "practice", [0, 1], "tiny")


def run(tmp_path, *more: str) -> int:
    flags = ["--tools", "read,write", "--max-new-tokens", "12", "--window", "3000"]
    return main(["run", str(tmp_path / "lab" / "tasks"), "-o", str(tmp_path / "runs"), *flags, *more])


@pytest.mark.parametrize("backend", [["kv", "--ratio", "8"], ["memo", "--budget", "1MiB"]])
def test_the_pocket_is_played_and_a_second_call_changes_nothing(tmp_path, lab, capsys, backend):
    assert run(tmp_path, "--backend", *backend) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "schedule-current-terms-0  stopped (no_deliverable)" in lines[0]
    folder = tmp_path / "runs" / load_task(lab[0]).id / "seed-0"
    config = json.loads((folder / "config.json").read_text())
    assert {"model", "task", "run_id", "max_turns", "temperature", "skills", "started_at"} < set(config)
    assert (config["model"], config["still"]["run"]["backend"]) == ("pocket-3", backend[0])
    before = (folder / "events.jsonl").read_bytes()
    assert run(tmp_path, "--backend", *backend) == 0
    assert (folder / "events.jsonl").read_bytes() == before
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["rows", "list", str(tmp_path / "runs")]) == 0  # by the tokenizer of who played
    assert "schedule-current-terms-0" in capsys.readouterr().out


def test_a_folder_of_other_settings_is_kept_and_said(tmp_path, lab, capsys):
    assert run(tmp_path, "--backend", "memo", "--budget", "100t") == 0
    assert run(tmp_path, "--backend", "memo", "--budget", "200t") == 1
    assert "holds a run with budget '100t', not '200t'" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "complaint"), [
    (["--backend", "kv", "--method", "int4"], "whole contexts"),
    (["--backend", "kv", "--budget", "many"], "budget is 'many'"),
    (["--policy", "server:x", "--base-url", "http://localhost:1/v1", "--backend", "kv"], "take a local model"),
    (["--window", "999999"], "was made for"),
    (["--together", "0"], "--together is 0"),
])  # fmt: skip
def test_refusals_are_one_line(tmp_path, lab, capsys, flags, complaint):
    assert run(tmp_path, *flags) == 2
    error = capsys.readouterr().err.strip()
    assert complaint in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_no_task_no_run(tmp_path, capsys):
    (tmp_path / "lab").mkdir()
    assert run(tmp_path) == 2
    assert "no task.json" in capsys.readouterr().err


def test_of_each_task_every_process_plays_some_seeds(tmp_path, lab):
    tokenizer = AutoTokenizer.from_pretrained(find("pocket").path)
    policy = ScriptedPolicy(tokenizer, Reader, 3000)
    config, tasks = RunConfig(backend="full", tools=("read", "write")), [load_task(folder) for folder in lab]
    shares = [
        {(outcome.task, outcome.folder.name) for outcome in outcomes}
        for rank in range(2)
        for outcomes in [play_tasks(tasks, policy, config, tmp_path / "runs", seeds=iter(range(4)), share=(rank, 2))]
    ]
    assert shares == [{(task.id, f"seed-{seed}") for task in tasks for seed in seeds} for seeds in ((0, 2), (1, 3))]


def test_one_task_that_breaks_leaves_the_others_alone(tmp_path, lab):
    def broken(seen, limit):
        raise RuntimeError("no script")

    players = iter([broken, Reader()])
    tokenizer = AutoTokenizer.from_pretrained(find("pocket").path)
    policy = ScriptedPolicy(tokenizer, lambda: next(players), 3000)
    config = RunConfig(backend="full", tools=("read", "write"))
    outcomes = play_tasks([load_task(folder) for folder in lab], policy, config, tmp_path / "runs")
    assert [outcome.status for outcome in outcomes] == ["failed", "done"]
    assert outcomes[0].reason == "RuntimeError: no script"
    events = read_run(outcomes[0].folder)
    assert [event["event"] for event in events] == ["run", "error"]
