"""`still grade`, as a user starts it: against a real server, and killed at random moments."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing

import pytest
from judge_server import Answer, Asked, JudgeServer, honest, truth

from still.cli import main
from still.eval.grade import GradeConfig
from still.eval.grade_command import find_runs
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.scores import read_scores
from still.eval.tasks import load_task
from still.eval.verdicts import read_verdicts

pytest.importorskip("openai")


@pytest.fixture
def lab(tmp_path):
    """Two generated tasks and a run of each, as harnesses leave them; the cache is of this test alone."""
    folders = write_lab_tasks(tmp_path / "lab", "practice", [0, 1], "tiny")
    for number, folder in enumerate(folders):
        task = load_task(folder)
        run = tmp_path / "runs" / str(number)
        (run / "output").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"task": task.id, "run_id": f"run-{number}"}))
        metrics = {"input_tokens": 5, "output_tokens": 6, "wall_clock_seconds": 7.5, "documents_read": 2}
        (run / "metrics.json").write_text(json.dumps(metrics))
        lines = [f"{each.expect['party']}: {each.expect['value']}" for each in task.criteria if not each.is_distractor]
        for name in ("memo.md", "schedule.md"):
            (run / "output" / name).write_text("\n".join(lines))
    return tmp_path


def test_many_runs_find_their_tasks_and_keep_labs_fields(lab, capsys):
    assert main(["grade", str(lab / "runs"), "--task", str(lab / "lab"), "--judge", "exact"]) == 0
    said = capsys.readouterr().out
    assert "2 runs, 2 all-pass" in said
    for number in range(2):
        scores = read_scores(lab / "runs" / str(number) / "scores.json")
        assert (scores["score"], scores["run_id"], scores["judge_model"]) == (1.0, f"run-{number}", "exact")
        assert scores["cost"] == {"input_tokens": 5, "output_tokens": 6, "wall_clock_seconds": 7.5}
        assert scores["doc_coverage"] == {"documents_read": 2}
        assert all(each.state == "judged" for each in read_verdicts(scores))


def test_the_report_of_graded_runs_is_a_verb(lab, capsys):
    assert main(["grade", str(lab / "runs"), "--task", str(lab / "lab"), "--judge", "exact"]) == 0
    assert main(["grade", "report", str(lab / "runs"), "--task", str(lab / "lab"), "--output", str(lab / "html")]) == 0
    assert len(list((lab / "html").rglob("*.html"))) == 3
    assert main(["grade", "report"]) == 2
    assert main(["grade", str(lab / "runs"), "--task", str(lab / "lab")]) == 2
    assert "--judge NAME" in capsys.readouterr().err


def test_a_second_run_asks_nothing(lab, capsys):
    with JudgeServer() as server:
        argv = ["grade", str(lab / "runs"), "--task", str(lab / "lab"), "--judge", f"m@{server.url}"]
        argv += ["--cache", str(lab / "verdicts.sqlite"), "--criteria-per-call", "4"]
        assert main(argv) == 0
        first, asked = capsys.readouterr().out, len(server.log)
        assert "20 from calls, 0 from the cache" in first
        assert main(argv) == 0
        assert len(server.log) == asked
        assert "0 from calls, 20 from the cache" in capsys.readouterr().out
    scores = read_scores(lab / "runs" / "0" / "scores.json")
    assert {each.id: each.label for each in read_verdicts(scores)} == {
        each["id"]: truth(each["id"]) for each in scores["criteria_results"]
    }
    judging = scores["still"]["judging"]
    assert judging["judges"]["m"]["model"] == "m"
    assert judging["config"]["criteria_per_call"] == 4
    assert {each["name"] for each in judging["deliverables"]} == {"memo.md", "schedule.md"}


def test_a_dry_run_asks_nothing_and_tells_what_it_would(lab, capsys):
    prices = lab / "prices.toml"
    prices.write_text("[m]\ninput = 1000.0\ncached = 0\noutput = 0\n")
    with JudgeServer() as server:
        argv = ["grade", str(lab / "runs"), "--task", str(lab / "lab"), "--judge", f"m@{server.url}"]
        argv += ["--cache", str(lab / "verdicts.sqlite"), "--prices", str(prices)]
        assert main([*argv, "--dry-run"]) == 0
        assert server.log == []
        said = capsys.readouterr().out
        assert "m: 20 verdicts, 0 without a call, 0 from the cache, 20 calls" in said
        plain, cached = (float(each) for each in re.findall(r"\$([\d.]+)", said))
        assert main(argv) == 0
        assert len(server.log) == 20
        characters = sum(len(message["content"]) for each in server.log for message in each.body["messages"])
        assert plain == pytest.approx(characters / 4 / 1000, rel=0.01)
        assert cached < 0.7 * plain
        assert not list(lab.rglob("scores.partial.json"))
        capsys.readouterr()
        (lab / "runs" / "0" / "output" / "memo.md").unlink()
        assert main([*argv, "--dry-run"]) == 0
        assert re.search(r"20 verdicts, [1-9]\d* without a call, 1\d from the cache", capsys.readouterr().out)


def test_two_judges_leave_labs_dual_files(lab):
    with JudgeServer(lambda asked: honest(asked) if asked.body["model"] == "a" else Answer(honest(asked).text
                     .replace('"fail"', '"pass"'))) as server:  # fmt: skip
        argv = ["grade", str(lab / "runs" / "0"), "--task", str(lab / "lab"), "--no-cache"]
        assert main([*argv, "--judge", f"a@{server.url}", "--judge", f"b@{server.url}", "--rule", "mean"]) == 0
    run = lab / "runs" / "0"
    dual = json.loads((run / "scores_dual.json").read_text())
    assert (dual["dual_all_pass_rate"], dual["all_pass"], dual["judges"]) == (0.5, False, ["a", "b"])
    assert read_scores(run / "scores_b.json")["score"] == 1.0
    assert read_scores(run / "scores.json")["all_pass"] is False


def test_a_budget_stops_cleanly_and_the_next_run_goes_on(lab, capsys):
    prices = lab / "prices.toml"
    prices.write_text("[m]\ninput = 1000.0\noutput = 1000.0\n")
    with JudgeServer() as server:
        argv = ["grade", str(lab / "runs" / "0"), "--task", str(lab / "lab"), "--judge", f"m@{server.url}"]
        argv += ["--cache", str(lab / "verdicts.sqlite"), "--prices", str(prices), "--max-cost"]
        assert main([*argv, "1.8"]) == 3
        said = capsys.readouterr().out
        assert "the budget ended: $" in said
        spent = 0.11 * len(server.log)
        assert 0 < spent <= 1.8
        run = lab / "runs" / "0"
        assert not (run / "scores.json").exists()
        partial = json.loads((run / "scores.partial.json").read_text())
        assert partial["still"]["judging"]["states"]["stopped"] == 10 - len(server.log)
        assert main([*argv, "100"]) == 0
        assert not (run / "scores.partial.json").exists()
        assert Counter(server.asked) == {each.id: 1 for each in load_task(lab / "lab/tasks" / partial["task"]).criteria}


def test_why_criteria_are_unscored_is_said_at_the_end(lab, capsys):
    def rule(asked: Asked) -> Answer:
        return Answer("ran\nout of ideas", 400) if asked.ids[0] == "C-003" else honest(asked)

    with JudgeServer(rule) as server:
        argv = ["grade", str(lab / "runs"), "--task", str(lab / "lab"), "--judge", f"m@{server.url}"]
        assert main([*argv, "--no-cache", "--no-prime"]) == 1
    said = capsys.readouterr().out
    assert said.endswith("unscored, 2 of 2 times: 400: ran out of ideas\n")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--judge", "nobody"], "no judge is called 'nobody'"),
        (["--judge", "m@http://localhost:1/v1", "--max-cost", "1"], "price table has no 'm'"),
        (["--judge", "exact", "--prompt", "nothing"], "no prompt 'nothing'"),
        (["--judge", "exact", "--strong", "exact"], "name two different"),
        (["--judge", "exact", "--judge", "exact"], "different names"),
        (["--judge", "exact", "--max-cost", "0"], "max cost is 0"),
        (["--judge", "exact", "--criteria-per-call", "4", "--prompt", "labs.txt"], "one criterion a call"),
    ],
)
def test_mistakes_are_said_in_one_line_before_anything_happens(lab, capsys, monkeypatch, extra, message):
    monkeypatch.chdir(lab)
    (lab / "labs.txt").write_text("{task_title} {agent_output} {criterion_title} {match_criteria}")
    assert main(["grade", str(lab / "runs"), "--task", str(lab / "lab"), "--no-cache", *extra]) == 2
    assert message in capsys.readouterr().err
    assert not list(lab.rglob("scores*.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["criteria"].append(raw["criteria"][0]), "two criteria of"),
        (lambda raw: raw["criteria"].clear(), "empty rubric"),
    ],
)
def test_a_rubric_that_cannot_be_graded_is_refused(lab, capsys, change, message):
    file = next((lab / "lab" / "tasks").rglob("task.json"))
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))
    assert main(["grade", str(lab / "runs" / "0"), "--task", str(file.parent), "--judge", "exact"]) == 2
    assert message in capsys.readouterr().err
    assert not list(lab.rglob("scores*.json"))


def test_runs_are_found_wherever_they_lie(lab, capsys):
    nested = lab / "runs" / "0" / "output" / "copy" / "output"
    nested.mkdir(parents=True)
    (lab / "runs" / "0" / "workspace" / "output").mkdir(parents=True)
    assert find_runs(lab / "runs") == [lab / "runs" / "0", lab / "runs" / "1"]
    bare = lab / "bare"
    bare.mkdir()
    assert find_runs(bare) == [bare]
    assert main(["grade", str(bare), "--task", str(lab / "lab"), "--judge", "exact"]) == 2
    assert "does not say which task" in capsys.readouterr().err
    folder = next((lab / "lab" / "tasks").rglob("task.json")).parent
    assert main(["grade", str(bare), "--task", str(folder), "--judge", "exact"]) == 2
    assert "--output" in capsys.readouterr().err
    argv = ["grade", str(bare), "--task", str(folder), "--judge", "exact", "--output", str(lab / "kept")]
    assert main(argv) == 0
    scores = read_scores(lab / "kept" / "scores.json")
    assert (scores["n_passed"], scores["still"]["judging"]["states"]) == (0, {"missing": 10})


def same_name(lab) -> list[str]:
    """Folders of two systems, each with a run that is called seed-0."""
    for system, run in (("a", "0"), ("b", "1")):
        shutil.copytree(lab / "runs" / run, lab / system / "seed-0")
    return [str(lab / "a"), str(lab / "b")]


def test_scores_of_runs_with_one_name_in_two_folders_are_kept_apart(lab):
    argv = ["grade", *same_name(lab), "--task", str(lab / "lab"), "--judge", "exact", "-o", str(lab / "kept")]
    assert main(argv) == 0
    kept = {str(file.parent.relative_to(lab / "kept")): read_scores(file) for file in lab.glob("kept/**/scores.json")}
    assert {where: scores["run_id"] for where, scores in kept.items()} == {"a/seed-0": "run-0", "b/seed-0": "run-1"}
    one = ["grade", str(lab / "a"), "--task", str(lab / "lab"), "--judge", "exact", "-o", str(lab / "one")]
    assert main(one) == 0
    assert read_scores(lab / "one" / "seed-0" / "scores.json")["run_id"] == "run-0"


def test_two_runs_whose_scores_would_go_to_one_place_are_refused_before_any_call(lab, capsys):
    runs = [f"{folder}/seed-0" for folder in same_name(lab)]
    with JudgeServer() as server:
        argv = ["grade", *runs, "--task", str(lab / "lab"), "--judge", f"m@{server.url}", "--no-cache"]
        assert main([*argv, "-o", str(lab / "kept")]) == 2
        assert server.requests == 0
    said = capsys.readouterr().err
    assert f"scores of {runs[0]} and of {runs[1]} would both go to {lab / 'kept' / 'seed-0'}" in said
    assert not (lab / "kept").exists()


def test_every_setting_has_its_flag(capsys):
    with pytest.raises(SystemExit):
        main(["grade", "--help"])
    said = capsys.readouterr().out
    for name in GradeConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in said


KILLS = [pytest.param(2, id="2"), pytest.param(20, marks=pytest.mark.full, id="20")]


@pytest.mark.parametrize("kills", KILLS)
def test_killed_at_random_moments_nothing_is_asked_twice_but_what_was_in_flight(tmp_path, kills):
    rng = random.Random(kills)
    (folder,) = write_lab_tasks(tmp_path / "lab", "contracts", [3], "tiny")
    raw = json.loads((folder / "task.json").read_text())
    one = raw["criteria"][0]
    raw["criteria"] = [{**one, "id": f"C-{number:05d}"} for number in range(100 * kills)]
    (folder / "task.json").write_text(json.dumps(raw))
    run = tmp_path / "run"
    (run / "output").mkdir(parents=True)
    (run / "output" / "memo.md").write_text("A memo.")
    store = tmp_path / "verdicts.sqlite"

    def rule(asked: Asked) -> Answer:
        answer = honest(asked)
        answer.delay = rng.uniform(0, 0.02)
        return answer

    with JudgeServer(rule) as server:
        argv = [sys.executable, "-m", "still.cli", "grade", str(run), "--task", str(folder), "--quiet"]
        argv += ["--judge", f"m@{server.url}", "--cache", str(store)]
        known: set[str] = set()
        open_calls = 0
        for _ in range(kills):
            start, target = len(server.log), rng.randrange(5, 80)
            server.most_connections = 0
            process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
            while len(server.log) - start < target and process.poll() is None:
                time.sleep(rng.uniform(0, 0.004))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.05)
            asked = {each.ids[0] for each in server.log[start:]}
            assert not asked & known, "what was committed was asked again"
            known = committed(store)
            # A connection may take the next call before the verdict of its last one is committed.
            assert len(asked - known) <= 2 * server.most_connections
            open_calls += len(asked - known)
        assert not (run / "scores.json").exists()
        assert subprocess.run(argv, stdout=subprocess.DEVNULL, timeout=300).returncode == 0
        asked = Counter(server.asked)
        assert server.most_connections <= 64
    assert set(asked) == {each["id"] for each in raw["criteria"]}
    assert sum(asked.values()) - len(asked) <= open_calls
    verdicts = read_verdicts(read_scores(run / "scores.json"))
    assert {each.id: each.label for each in verdicts} == {name: truth(name) for name in asked}
    assert len(committed(store)) == len(asked)


def committed(store) -> set[str]:
    """Ids of the criteria whose verdicts the cache holds: the server wrote them into the reasons."""
    if not store.exists():
        return set()
    with closing(sqlite3.connect(store)) as base:
        try:
            rows = base.execute("SELECT reason FROM verdicts").fetchall()
        except sqlite3.OperationalError:
            return set()
    return {re.search(r"looked at (\S+)", reason)[1] for (reason,) in rows}


def test_a_run_that_has_not_ended_is_left_out_and_said(lab, capsys):
    run = lab / "runs" / "1"
    (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | {"still": {"run": {}}}))
    (run / "events.jsonl").write_text('{"event": "run"}\n{"event": "error", "error": "ConnectionError: refused"}\n')
    assert main(["grade", str(lab / "runs"), "--task", str(lab / "lab"), "--judge", "exact"]) == 1
    said = capsys.readouterr()
    assert "1 runs, 1 all-pass" in said.out
    assert "has not ended (ConnectionError: refused)" in said.err
    assert not (run / "scores.json").exists()
