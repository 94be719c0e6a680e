from __future__ import annotations

import json

import pytest

from still.eval.judge import Verdict, exact_criterion
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.scores import build_scores, read_scores, verdicts_of, write_scores
from still.eval.tasks import load_task


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    (folder,) = write_lab_tasks(tmp_path_factory.mktemp("lab"), "practice", [0], "tiny")
    return load_task(folder)


def build(task, labels, **more):
    verdicts = {each.id: Verdict(label, reason="because") for each, label in zip(task.criteria, labels, strict=False)}
    return build_scores(task, verdicts, run_id="run-1", judge_model="exact", **more)


def test_fields_are_labs_own_in_labs_order(task):
    scores = build(task, ["pass"] * 10, cost={"input_tokens": 7}, doc_coverage={"documents_read": 2})
    assert list(scores) == [
        "score", "max_score", "summary", "all_pass", "n_criteria", "n_passed", "criteria_results", "run_id", "task",
        "judge_model", "scored_at", "cost", "doc_coverage", "still",
    ]  # fmt: skip
    assert list(scores["criteria_results"][0]) == ["id", "title", "verdict", "reasoning"]
    assert (scores["score"], scores["all_pass"], scores["n_passed"], scores["max_score"]) == (1.0, True, 10, 1.0)


def test_one_fail_fails_the_task(task):
    scores = build(task, ["fail"] + ["pass"] * 9)
    assert (scores["score"], scores["all_pass"], scores["n_passed"]) == (0.0, False, 9)
    assert scores["summary"] == "9/10 criteria passed.  Missed 1 — task FAIL."


def test_unscored_makes_all_pass_unknown_and_never_false(task):
    scores = build(task, ["unscored"] + ["pass"] * 9)
    assert (scores["score"], scores["all_pass"], scores["still"]["n_unscored"]) == (None, None, 1)
    assert "UNKNOWN" in scores["summary"]
    missing = build(task, ["pass"] * 9)
    assert missing["criteria_results"][-1]["verdict"] == "unscored"
    assert missing["all_pass"] is None
    assert build(task, ["unscored", "fail"] + ["pass"] * 8)["all_pass"] is False


def test_verdicts_for_unknown_criteria_are_refused(task):
    with pytest.raises(ValueError, match="C-999"):
        build_scores(task, {"C-999": Verdict("pass")}, run_id="r", judge_model="exact")


def test_round_trip_on_disk(task, tmp_path):
    memo = "\n".join(
        f"{each.expect['party']}: {each.expect['value']}" for each in task.criteria if not each.is_distractor
    )
    verdicts = {each.id: exact_criterion(memo, each) for each in task.criteria}
    scores = build_scores(task, verdicts, run_id="run-1", judge_model="exact", extras={"seed": 3})
    write_scores(tmp_path / "scores.json", scores)
    again = read_scores(tmp_path / "scores.json")
    assert again == scores
    assert again["all_pass"] is True
    assert again["still"]["rubric_hashes"][task.criteria[0].id] == task.criteria[0].rubric_hash
    assert {name: each.label for name, each in verdicts_of(again).items()} == dict.fromkeys(verdicts, "pass")


@pytest.mark.parametrize("content", [{}, [], {"criteria_results": [{"id": "C-1", "verdict": "PASS"}]}])
def test_what_is_no_scores_file_is_refused(tmp_path, content):
    (tmp_path / "scores.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"scores\.json"):
        read_scores(tmp_path / "scores.json")


def test_real_scores_are_read_and_rewritten_equal(lab, tmp_path):
    files = sorted((lab / "runs" / "irys").glob("*/scores.json"))
    assert len(files) == 3
    for file in files:
        scores = read_scores(file)
        write_scores(tmp_path / "scores.json", scores)
        assert (tmp_path / "scores.json").read_text() == file.read_text().rstrip("\n")
        verdicts = verdicts_of(scores)
        assert sum(each.passed for each in verdicts.values()) == scores["n_passed"]
        assert all(each.passed for each in verdicts.values()) == scores["all_pass"]
