"""`still judges` and `still tasks` as a user runs them."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pytest
from judge_server import Answer, JudgeServer
from made_scores import scores_of, write_run
from test_tune import CAREFUL, World, edit, graded  # noqa: F401

from still.cli import main
from still.eval.dual import write_dual
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.splits import Split


@pytest.fixture
def judged(tmp_path):
    """Two judges on three tasks of two systems, in a folder each."""
    strong = {"tax/a": "ppff", "tax/b": "ppfp", "lease/c": "pppp"}
    cheap = {"tax/a": "pppf", "tax/b": "pffp", "lease/c": "pppp"}
    for judge, labels, cost in (("strong", strong, 0.004), ("cheap", cheap, 0.0001)):
        for task, letters in labels.items():
            for model in ("A", "B"):
                folder = tmp_path / judge / model / task.replace("/", "-")
                write_run(folder, letters, judge=judge, task=task, cost=cost, model=model, run_id=model)
    return tmp_path


def test_compare_prints_the_table_and_writes_page_figure_and_numbers(judged, capsys):
    page, figure, numbers = (judged / name for name in ("j.html", "j.svg", "j.json"))
    assert main(["judges", "compare", str(judged / "strong"), str(judged / "cheap"), "--html", str(page),
                 "--figure", str(figure), "--json", str(numbers)]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "reference: strong, 6 runs, per 1,000 criteria $4.00" in said
    assert "cheap: 24 criteria, per 1,000 $0.10" in said
    assert "2 of 6" in said
    assert "2 of 18" in said
    (found,) = json.loads(numbers.read_text())
    assert found["counts"] == {"both_pass": 16, "false_pass": 2, "false_fail": 2, "both_fail": 4}
    assert len(found["disagreements"]) == 4
    assert page.read_text().startswith("<!doctype html>")
    assert figure.read_text().startswith("<svg")


def test_compare_finds_several_judges_in_one_folder(tmp_path, capsys):
    write_dual(tmp_path, [scores_of("ppf", "a"), scores_of("pff", "b"), scores_of("ppp", "c")])
    assert main(["judges", "compare", str(tmp_path), "--reference", "b"]) == 0
    said = capsys.readouterr().out
    assert "reference: b" in said
    assert "a: 3 criteria" in said
    assert "c: 3 criteria" in said
    assert main(["judges", "compare", str(tmp_path), "--reference", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err
    assert main(["judges", "compare", str(tmp_path / "scores_a.json")]) == 2
    assert "alone" in capsys.readouterr().err
    assert main(["judges", "compare", str(tmp_path), "--figure", str(tmp_path / "f.svg")]) == 2
    assert "do not say" in capsys.readouterr().err


def test_report_writes_a_page_a_run_and_one_across_them(judged, capsys):
    (judged / "q.json").write_text(
        json.dumps(
            [
                {"task": "tax/a", "criterion": "C-003", "rubric": "hash-C-003", "reason": "stale name"},
                {"task": "tax/a", "criterion": "C-004", "rubric": "before", "reason": "stale name"},
            ]
        )
    )
    assert main(["judges", "report", str(judged / "strong"), f"other maker={judged / 'strong' / 'A'}",
                 "--quarantine", str(judged / "q.json"), "--output", str(judged / "out")]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "9 runs" in said
    assert "A by strong: 1 of 3 runs pass whole, criteria  75.0 %" in said
    index = (judged / "out" / "index.html").read_text()
    pages = sorted((judged / "out" / "runs").iterdir())
    assert len(pages) == 9
    assert all(f'href="runs/{page.name}"' in index for page in pages)
    assert "without quarantined criteria" in index
    assert ">other maker<" in index
    assert "tax/a C-004 took no effect: the criterion has changed: its rubric hash is now hash-C-004." in index
    (numbers,) = json.loads((judged / "out" / "numbers.json").read_text())
    assert numbers["systems"]["A"]["official"]["micro"]["estimate"] == pytest.approx(9 / 12)
    assert numbers["systems"]["A"]["without"]["micro"]["estimate"] == pytest.approx(9 / 11)
    assert numbers["systems"]["B"]["areas"]["tax"]["all_passed"] == 0
    assert [(each["first"], each["second"], each["criteria"]) for each in numbers["pairs"]] == [
        ("A", "B", 12), ("A", "other maker", 12), ("B", "other maker", 12),
    ]  # fmt: skip


def test_numbers_that_are_not_defined_are_null_and_never_nan(tmp_path):
    """One system passes all, the other nothing: no spread, so no p-value."""
    for model, labels in (("A", "pp"), ("B", "ff")):
        for task in ("tax/a", "tax/b"):
            write_run(tmp_path / model / task[-1], labels, task=task, model=model)
    assert main(["judges", "report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "numbers.json").read_text()
    (numbers,) = json.loads(text, parse_constant=pytest.fail)
    assert numbers["pairs"][0]["criterion"]["p_value"] is None


def test_items_are_csv_and_candidates_a_list_that_report_takes(judged, capsys):
    listed = judged / "candidates.json"
    assert main(["judges", "items", str(judged), "--least", "2", "--candidates", str(listed)]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 12
    by_key = {(row["task"], row["criterion"]): row for row in rows}
    assert by_key["tax/a", "C-004"]["flags"] == "never passes"
    assert by_key["tax/a", "C-003"]["judges_split"] == "1.000"
    assert main(["judges", "report", str(judged / "strong"), "--quarantine", str(listed),
                 "--output", str(judged / "out")]) == 0  # fmt: skip


def test_candidates_are_written_even_where_nobody_reads_the_table(judged):
    listed = judged / "candidates.json"
    argv = [sys.executable, "-m", "still.cli", "judges", "items", str(judged), "--least", "2"]
    with subprocess.Popen([*argv, "--candidates", str(listed)], stdout=subprocess.PIPE) as process:
        process.stdout.close()
    assert json.loads(listed.read_text())


def test_correct_takes_labels_and_says_what_they_change(judged, capsys):
    arguments = ["judges", "correct", str(judged / "cheap"), "--labels", str(judged / "strong")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "75.0 % of 24 criteria" in said
    assert "24 labels on 3 tasks" in said
    assert main([*arguments, "--method", "rogan-gladen"]) == 0
    assert main(["judges", "correct", str(judged / "cheap")]) == 2
    assert "--labels" in capsys.readouterr().err


def test_cost_extrapolates_from_prices_and_from_graded_runs(judged, capsys):
    arguments = ["judges", "cost", "--tasks", "10", "--rollouts", "8", "--steps", "100"]
    assert main([*arguments, "--judge", "claude-sonnet-4-6", "--criteria-per-call", "1,all"]) == 0
    said = capsys.readouterr().out
    assert "456,000 verdicts" in said
    assert "($11,162.88)" in said  # 456,000 x 24.48 / 1,000, uncached
    assert main([*arguments, "--judge", "nobody-9"]) == 2
    assert "nobody-9" in capsys.readouterr().err
    assert main([*arguments, "--criteria-per-call", "two"]) == 2
    file = judged / "strong" / "A" / "tax-a" / "scores.json"
    scores = json.loads(file.read_text())
    for verdict in scores["still"]["verdicts"]:
        verdict["tokens"] = {"input": 100, "output": 10, "calls": 1}
    file.write_text(json.dumps(scores))
    assert main([*arguments, "--scores", str(file)]) == 0
    assert "strong: 45,600,000 tokens in (0 cached), 4,560,000 out, 456,000 calls, $1,824.00" in capsys.readouterr().out


def test_export_writes_rows_of_one_side(tmp_path, graded, capsys):  # noqa: F811
    _, runs, tuning, held_out = graded
    root = runs[0].path.parents[1]
    cheap = tmp_path / "cheap"
    for run in runs:
        scores = json.loads(run.path.read_text()) | {"judge_model": "cheap"}
        for result in scores["criteria_results"]:
            result["verdict"] = "pass"
        del scores["still"]["verdicts"]
        (cheap / run.path.parent.name).mkdir(parents=True)
        (cheap / run.path.parent.name / "scores.json").write_text(json.dumps(scores))
    split = tmp_path / "split.json"
    shares = {"train": 0.5, "test": 0.5}
    Split({"train": tuple(tuning), "test": tuple(held_out)}, shares, 0, {}, (), {}).save(split)
    lab = str(root.parent / "tasks")
    rows = tmp_path / "rows.jsonl"
    arguments = ["judges", "export", str(root), str(cheap), "--task", lab, "--output", str(rows)]
    assert main([*arguments, "--split", str(split), "--side", "train", "--agreements", "0"]) == 0
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["task"] for row in found} == set(tuning)
    assert {row["label"] for row in found} == {"fail"}
    assert f"{len(found)} rows, {len(found)} of them disagreements" in capsys.readouterr().out
    assert main([*arguments, "--split", str(split)]) == 2
    assert main([*arguments, "--split", str(split), "--side", "nowhere"]) == 2
    assert "train, test" in capsys.readouterr().err


def test_scores_that_lie_apart_find_their_runs(tmp_path, graded, capsys):  # noqa: F811
    _, runs, _, _ = graded
    lab, root = runs[0].path.parents[2] / "tasks", runs[0].path.parents[1]
    for run in runs:
        for judge in ("strong", "cheap"):
            scores = json.loads(run.path.read_text()) | {"judge_model": judge}
            del scores["still"]["verdicts"]
            for result in scores["criteria_results"]:
                result["verdict"] = "pass" if judge == "cheap" else result["verdict"]
            (tmp_path / judge / run.path.parent.name).mkdir(parents=True)
            (tmp_path / judge / run.path.parent.name / "scores.json").write_text(json.dumps(scores))
    apart = ["judges", "export", str(tmp_path / "strong"), str(tmp_path / "cheap"), "--task", str(lab),
             "--output", str(tmp_path / "rows.jsonl")]  # fmt: skip
    assert main(apart) == 0
    assert "its run folder is not known" in capsys.readouterr().out
    assert main([*apart, "--runs", str(root)]) == 0
    assert "left out" not in capsys.readouterr().out
    assert "DELIVERED-" in (tmp_path / "rows.jsonl").read_text()
    # one judge's scores lie in the run folders, which name the system, the other's do not
    (tmp_path / "strong" / "0" / "config.json").write_text(json.dumps({"model": "A"}))
    assert main(["judges", "compare", str(tmp_path / "strong" / "0"), str(tmp_path / "cheap"), "--json",
                 str(tmp_path / "n.json")]) == 0  # fmt: skip
    (found,) = json.loads((tmp_path / "n.json").read_text())
    assert (found["runs"], found["warnings"]) == (1, [])


def test_tune_keeps_a_prompt_that_helps_and_says_so_by_its_exit_code(tmp_path, graded, capsys):  # noqa: F811
    tasks, runs, tuning, _ = graded
    lab, root = runs[0].path.parents[2] / "tasks", runs[0].path.parents[1]
    for words, code in ((CAREFUL, 0), ("Be kind.", 1)):
        with JudgeServer(World(tasks, tuning, [[edit(words)]])) as server:
            out = tmp_path / str(code)
            assert main(["judges", "tune", str(root), "--task", str(lab), "--judge", f"cheap@{server.url}",
                         "--proposer", f"proposer@{server.url}", "--output", str(out), "--rounds", "1",
                         "--criteria-per-call", "0", "--cache", str(tmp_path / f"{code}.db")]) == code  # fmt: skip
        assert (words in (out / "prompt.md").read_text()) == (code == 0)
    said = capsys.readouterr().out
    assert "held-out false passes" in said
    assert "1 edits kept against exact" in said


def test_tune_never_looks_at_a_third_side(tmp_path, graded, capsys):  # noqa: F811
    tasks, runs, tuning, held_out = graded
    lab, root = runs[0].path.parents[2] / "tasks", runs[0].path.parents[1]
    sides = {"train": tuple(tuning), "held_out": tuple(held_out[:6]), "test": tuple(held_out[6:])}
    Split(sides, {side: 1 / 3 for side in sides}, 0, {}, (), {}).save(tmp_path / "split.json")
    with JudgeServer(World(tasks, tuning, [[edit(CAREFUL)]])) as server:
        arguments = ["judges", "tune", str(root), "--task", str(lab), "--judge", f"cheap@{server.url}", "--proposer",
                     f"proposer@{server.url}", "--output", str(tmp_path / "out"), "--rounds", "1",
                     "--criteria-per-call", "0", "--cache", str(tmp_path / "v.db"),
                     "--split", str(tmp_path / "split.json")]  # fmt: skip
        assert main(arguments) == 2
        assert "--tuning-side" in capsys.readouterr().err
        assert main([*arguments, "--tuning-side", "train"]) == 0
        asked = "".join(each.text for each in server.log)
    assert all(tasks[name].title + "\n" in asked for name in sides["held_out"])
    assert not any(tasks[name].title + "\n" in asked for name in sides["test"])


def test_a_judge_that_cannot_be_reached_ends_with_one_line(tmp_path, graded, capsys):  # noqa: F811
    _, runs, _, _ = graded
    lab, root = runs[0].path.parents[2] / "tasks", runs[0].path.parents[1]
    with JudgeServer(lambda asked: Answer("no such model", status=404)) as server:
        assert main(["judges", "tune", str(root), "--task", str(lab), "--judge", f"cheap@{server.url}",
                     "--proposer", f"proposer@{server.url}", "--output", str(tmp_path / "out"), "--rounds", "1",
                     "--cache", str(tmp_path / "v.db")]) == 2  # fmt: skip
    assert "grading stopped" in capsys.readouterr().err


def test_tasks_split_writes_a_file_and_a_table(tmp_path, capsys):
    write_lab_tasks(tmp_path / "lab", "practice", range(8), "tiny")
    write_lab_tasks(tmp_path / "lab", "firm-knowledge", range(8, 12), "tiny")
    out = tmp_path / "split.json"
    assert main(["tasks", "split", str(tmp_path / "lab"), "--shares", "train=0.5,test=0.5", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "firm-knowledge" in said
    assert "4 tasks in 1 groups" in said
    split = Split.load(out)
    assert sum(map(len, split.sides.values())) == 12
    assert main(["tasks", "split", str(tmp_path / "lab")]) == 0
    assert json.loads(capsys.readouterr().out)["shares"] == {"train": 0.8, "test": 0.2}
    for shares in ("train", "train=0.5", "train=x,test=1", "=0.5,test=0.5", "a=0.5,a=0.5"):
        with pytest.raises(SystemExit):
            main(["tasks", "split", str(tmp_path / "lab"), "--shares", shares])
    (tmp_path / "empty").mkdir()
    assert main(["tasks", "split", str(tmp_path / "empty")]) == 2
