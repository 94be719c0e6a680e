from __future__ import annotations

import asyncio
import json

import pytest
from made_scores import scores_of, write_run

from still.eval.agreement import compare_judges
from still.eval.answers import parse_answer
from still.eval.export import export_rows, save_rows
from still.eval.grade import GradeConfig, Grader
from still.eval.judges import ExactJudge, ScriptedJudge
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.prompting import load_prompt
from still.eval.scored import Rubrics, graded_by, load_runs
from still.eval.tasks import load_task


@pytest.fixture
def judged(tmp_path):
    """Three runs under the exact judge and one that passes everything; the chats that the second one saw."""
    tasks = [load_task(folder) for folder in write_lab_tasks(tmp_path / "lab", "contracts", range(3), "tiny")]
    seen = []

    def lenient(chat):
        seen.append(chat)
        name = chat[-1]["content"].rpartition("\n## ")[2].split("\n")[0]
        said = {"id": name, "evidence": [], "reason": "mentioned", "verdict": "pass"}
        return json.dumps({"verdicts": [said]})

    async def whole():
        for judge in (ExactJudge(), ScriptedJudge(lenient, "lenient")):
            async with Grader(judge, GradeConfig(prompt="checklist")) as grader:
                for task in tasks:
                    run = tmp_path / judge.name / task.folder.name
                    (run / "output").mkdir(parents=True)
                    values = [each.expect["value"] for each in task.criteria[:4]]
                    (run / "output" / "list.md").write_text("\n".join(values))
                    (await grader.grade(task, run)).save(run)

    asyncio.run(whole())
    exact, lenient_runs = load_runs([tmp_path / "exact"]), load_runs([tmp_path / "lenient"])
    return compare_judges(exact, lenient_runs), lenient_runs, Rubrics([tmp_path / "lab"]), seen


def test_rows_hold_the_prompt_that_was_seen_and_the_references_answer(judged, tmp_path):
    comparison, runs, rubrics, seen = judged
    found = export_rows(comparison, runs, rubrics, load_prompt("checklist"))
    assert len(found.rows) == len(comparison.disagreements) > 6
    assert found.left_out == {}
    save_rows(tmp_path / "rows.jsonl", found.rows)
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        *chat, answer = row["messages"]
        assert chat in seen
        said = parse_answer(answer["content"], [row["criterion"]]).said[row["criterion"]]
        assert (said.label, row["label"], row["candidate_label"]) == ("fail", "fail", "pass")
        assert answer["content"].index('"reason"') < answer["content"].index('"verdict"')


def test_agreements_go_along_by_share_and_the_seed_decides_which(judged):
    comparison, runs, rubrics, _ = judged
    wrong = len(comparison.disagreements)
    right = len(comparison.rates.pairs) - wrong
    found = export_rows(comparison, runs, rubrics, load_prompt("plain"), agreements=0.5, seed=1)
    assert len(found.rows) == wrong + min(right, round(wrong / 2))
    assert found.rows == export_rows(comparison, runs, rubrics, load_prompt("plain"), 0.5, 1).rows
    assert found.rows != export_rows(comparison, runs, rubrics, load_prompt("plain"), 0.5, 2).rows
    one = runs[0].task
    assert {row["task"] for row in export_rows(comparison, runs, rubrics, load_prompt("plain"), tasks=[one]).rows} == {
        one
    }


def test_labs_prompt_gets_labs_form_of_answer(judged, tmp_path):
    comparison, runs, rubrics, _ = judged
    (tmp_path / "lab.txt").write_text("{task_description}\n{agent_output}\n**{criterion_title}**\n{match_criteria}")
    row = export_rows(comparison, runs, rubrics, load_prompt(tmp_path / "lab.txt")).rows[0]
    assert json.loads(row["messages"][-1]["content"])["verdict"] == "fail"
    assert len(row["messages"]) == 2


def test_what_cannot_be_rebuilt_is_counted_by_its_reason(judged):
    comparison, runs, rubrics, _ = judged
    (runs[0].path.parent / "output" / "list.md").unlink()
    task = rubrics.find(runs[1].task)
    raw = task.to_json()
    for criterion in raw["criteria"]:
        criterion["match_criteria"] += " Or not."
    (task.folder / "task.json").write_text(json.dumps(raw))
    found = export_rows(comparison, runs, Rubrics([task.folder.parents[2]]), load_prompt("plain"))
    assert set(found.left_out) == {"its deliverable is missing", "the criterion has changed since it was judged"}
    assert len(found.rows) + sum(found.left_out.values()) == len(comparison.disagreements)
    bare = export_rows(comparison, runs, Rubrics(), load_prompt("plain"))
    assert (bare.rows, list(bare.left_out)) == ((), ["the task is not in the folders named"])


@pytest.fixture
def two_systems(tmp_path):
    """Runs of two systems with one task and run id, each with its own text and its own failed criterion."""
    (folder,) = write_lab_tasks(tmp_path / "lab", "practice", [0], "tiny")
    task = load_task(folder)
    hashes = {each.id: each.rubric_hash for each in task.criteria}
    for number, system in enumerate("AB"):
        labels = "".join("f" if index == number else "p" for index in range(len(task.criteria)))
        known = {"task": task.id, "run_id": "seed-0", "hashes": hashes}
        run = write_run(tmp_path / "runs" / system, labels, judge="strong", model=system, **known)
        (run / "scores_cheap.json").write_text(json.dumps(scores_of("p" * len(labels), judge="cheap", **known)))
        (run / "output").mkdir()
        for name in ("memo.md", "schedule.md"):
            (run / "output" / name).write_text(f"Written by {system}.")
    return tmp_path, task


def test_each_disagreement_shows_what_its_own_system_delivered(two_systems):
    root, task = two_systems
    runs = load_runs([root / "runs"])
    comparison = compare_judges(graded_by(runs, "strong"), graded_by(runs, "cheap"))
    found = export_rows(comparison, runs, Rubrics([root / "lab"]), load_prompt("checklist"), agreements=1.0)
    assert (len(found.rows), found.left_out) == (4, {})
    wrong = {row["criterion"]: row["messages"][-2]["content"] for row in found.rows if row["label"] == "fail"}
    for criterion, system, other in ((task.criteria[0].id, "A", "B"), (task.criteria[1].id, "B", "A")):
        assert f"Written by {system}." in wrong[criterion]
        assert f"Written by {other}." not in wrong[criterion]


def test_a_reference_whose_files_lie_apart_takes_the_candidates_run(two_systems):
    root, task = two_systems
    (root / "labels").mkdir()
    (root / "labels" / "scores.json").write_text((root / "runs" / "A" / "scores.json").read_text())
    reference, candidate = load_runs([root / "labels"]), load_runs([root / "runs" / "A" / "scores_cheap.json"])
    comparison = compare_judges(reference, candidate)
    found = export_rows(comparison, [*reference, *candidate], Rubrics([root / "lab"]), load_prompt("checklist"))
    assert ([row["criterion"] for row in found.rows], found.left_out) == ([task.criteria[0].id], {})


def test_nothing_to_export_is_said(judged):
    comparison, runs, rubrics, _ = judged
    same = compare_judges(runs, runs)
    with pytest.raises(ValueError, match="disagree on nothing"):
        export_rows(same, runs, rubrics, load_prompt("plain"))
    assert comparison.candidate == "lenient"
