"""`still run` from the command line, with the pocket and with what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from agent_cases import Reader, make_task, texts
from transformers import AutoTokenizer

from still.cli import main
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.tasks import load_task
from still.harness.play import claim, play_tasks, run_id
from still.harness.policies.scripted import ScriptedPolicy
from still.harness.run_config import RunConfig
from still.harness.runs import RunError, RunFolder, read_run
from still.harness.tools import TOOLS
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


def graded_otherwise(task):
    first, *others = task.criteria
    return replace(task, criteria=(replace(first, match_criteria="PASS if it says so."), *others))


def test_two_tasks_of_one_id_are_refused_before_anything_is_played(tmp_path, lab):
    other = write_lab_tasks(tmp_path / "other", "practice", [0], "tiny")
    tasks = [load_task(folder) for folder in (*lab, *other)]
    policy = ScriptedPolicy(AutoTokenizer.from_pretrained(find("pocket").path), Reader, 3000)
    both = f"{re.escape(str(lab[0]))} and {re.escape(str(other[0]))} are both called"
    with pytest.raises(ValueError, match=both):
        play_tasks(tasks, policy, RunConfig(backend="full", tools=("read", "write")), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_runs_of_other_settings_have_other_names(lab):
    task, one = load_task(lab[0]), SimpleNamespace(name="one")
    config = RunConfig(backend="kv", ratio=8.0)
    method = SimpleNamespace(options=lambda: {"chunk": 64})
    runs = [
        (task, one, config), (task, one, replace(config, ratio=4.0)), (task, one, replace(config, seed=1)),
        (task, one, replace(config, ratio=None, budget="100t")), (task, one, replace(config, ratio=None, budget="9t")),
        (task, SimpleNamespace(name="another"), config), (graded_otherwise(task), one, config),
        (task, one, config, method),
    ]  # fmt: skip
    names = [run_id(*run) for run in runs]
    assert len(set(names)) == len(runs)
    assert names[0] == run_id(load_task(lab[0]), SimpleNamespace(name="one"), RunConfig(backend="kv", ratio=8.0))


def test_a_folder_of_a_task_that_was_graded_otherwise_is_refused(tmp_path, lab):
    task, policy, config = load_task(lab[0]), SimpleNamespace(name="one"), RunConfig(backend="full")
    claim(task, policy, config, tmp_path / "run")
    claim(load_task(lab[0]), policy, config, tmp_path / "run")
    with pytest.raises(RunError, match="holds a run with content"):
        claim(graded_otherwise(task), policy, config, tmp_path / "run")


def test_a_run_over_other_documents_is_kept_and_said(tmp_path):
    task = make_task(tmp_path, texts(4), deliverables=("memo.md",))
    documents = task.folder / "documents"

    class Breaks(Reader):
        def __call__(self, seen, limit):
            assert len(seen) < 6, "enough for now"
            return super().__call__(seen, limit)

    def play(player):
        policy = ScriptedPolicy(AutoTokenizer.from_pretrained(find("pocket").path), lambda: player, 3000)
        config = RunConfig(backend="full", tools=("read", "write"))
        (outcome,) = play_tasks([load_task(task.folder)], policy, config, tmp_path / "runs")
        return outcome

    first = play(Breaks())
    assert first.status == "failed"
    log = first.folder / "events.jsonl"
    for _ in range(2):  # the run is not finished, then it is
        before, text = log.read_bytes(), (documents / "02.txt").read_text()
        (documents / "02.txt").write_text("another text")
        (documents / "09-extra.txt").write_text("more")
        (documents / "04.txt").rename(tmp_path / "04.txt")
        outcome = play(Reader())
        assert outcome.status == "failed"
        assert "(added: 09-extra.txt; gone: 04.txt; other text: 02.txt): give another output folder" in outcome.reason
        assert log.read_bytes() == before
        (documents / "02.txt").write_text(text)
        (documents / "09-extra.txt").unlink()
        (tmp_path / "04.txt").rename(documents / "04.txt")
        outcome = play(Reader())
        assert outcome.status == "done"
    assert outcome.metrics["documents_read"] == 4


def test_a_log_without_hashes_goes_on(tmp_path):
    folder = RunFolder(tmp_path / "run")
    now = [{"name": "a.txt", "sha256": "12", "characters": 3}]
    folder.check_documents([{"name": "a.txt", "characters": 3, "tokens": 1}], now)
    with pytest.raises(RunError, match=r"other text: a\.txt"):
        folder.check_documents([{"name": "a.txt", "sha256": "34", "characters": 3}], now)


def test_a_tool_that_does_not_exist_is_refused(tmp_path, lab, capsys):
    assert run(tmp_path, "--tools", "reed,write") == 2
    assert "'reed'; the tools are read, write, edit, glob, grep, bash" in capsys.readouterr().err
    assert RunConfig.tools == tuple(tool["function"]["name"] for tool in TOOLS)
