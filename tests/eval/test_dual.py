from __future__ import annotations

import json
from pathlib import Path

import pytest

from still.eval.dual import build_dual, read_any, read_dual, write_dual
from still.eval.scores import read_scores

AT = "2026-08-30T10:00:00+00:00"


def scored(judge, labels, task="tax/a", run_id="run-1", **more):
    """The contents of a scores.json with one criterion a letter: p, f or u."""
    names = {"p": "pass", "f": "fail", "u": "unscored"}
    results = [
        {"id": f"C-{i:03d}", "title": f"Criterion {i}", "verdict": names[label], "reasoning": f"{judge} says so"}
        for i, label in enumerate(labels, 1)
    ]
    all_pass = False if "f" in labels else None if "u" in labels else True
    return {
        "score": None if all_pass is None else float(all_pass), "max_score": 1.0, "summary": "", "all_pass": all_pass,
        "n_criteria": len(labels), "n_passed": labels.count("p"), "criteria_results": results, "run_id": run_id,
        "task": task, "judge_model": judge, "scored_at": AT, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "rate", "strict", "mean", "split"),
    [
        ("pppp", "pppp", 1.0, True, 1.0, []),
        ("pppp", "pppf", 0.5, False, 0.875, ["C-004"]),
        ("pffp", "pfpf", 0.0, False, 0.5, ["C-003", "C-004"]),
        ("pppu", "pppp", None, None, None, []),
        ("pppu", "pppf", None, False, None, []),
    ],
)
def test_the_aggregate_by_hand(first, second, rate, strict, mean, split):
    dual = build_dual([scored("a", first), scored("b", second)], scored_at=AT)
    assert (dual["dual_all_pass_rate"], dual["all_pass"], dual["dual_criterion_pass"]) == (rate, strict, mean)
    assert dual["still"]["split"] == split
    assert list(dual) == [
        "run_id", "task", "judges", "dual_criterion_pass", "dual_all_pass_rate", "all_pass", "scored_at", "per_judge",
        "still",
    ]  # fmt: skip


def test_files_are_written_for_each_judge_and_read_back_whole(tmp_path):
    runs = [scored("claude-sonnet-4-6", "ppf", unknown={"kept": 1}), scored("gpt-5.5@http://h/v1", "pff")]
    (tmp_path / "scores_dual.json").write_text("{an earlier one")
    target = write_dual(tmp_path, runs, scored_at=AT)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["scores_claude-sonnet-4-6.json", "scores_dual.json", "scores_gpt-5.5-http-h-v1.json"]
    assert [read_scores(tmp_path / names[0]), read_scores(tmp_path / names[2])] == runs
    assert read_any(target) == runs
    assert read_dual(target) == json.loads(target.read_text()) == build_dual(runs, scored_at=AT)


def test_an_earlier_aggregate_does_not_outlive_a_grading_that_failed(tmp_path):
    runs = [scored("a", "pp"), scored("b", "pf")]
    write_dual(tmp_path, runs)
    (tmp_path / "scores_b.json").unlink()
    (tmp_path / "scores_b.json").mkdir()
    with pytest.raises(OSError, match="scores_b"):
        write_dual(tmp_path, runs)
    assert not (tmp_path / "scores_dual.json").exists()


def test_labs_own_aggregate_lends_its_run_and_task_and_keeps_its_keys(tmp_path):
    inner = {key: value for key, value in scored("b", "pf").items() if key not in ("task", "run_id", "judge_model")}
    dual = {"task": "tax/a", "run_id": "r", "profile": "x", "per_judge": {"b": inner, "a": scored("a", "pp")}}
    (tmp_path / "scores_dual.json").write_text(json.dumps(dual | {"judges": ["a", "b"]}))
    found = read_any(tmp_path / "scores_dual.json")
    assert [(each["judge_model"], each["task"]) for each in found] == [("a", "tax/a"), ("b", "tax/a")]
    assert read_dual(tmp_path / "scores_dual.json")["profile"] == "x"


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([scored("a", "p")], "two or more"),
        ([scored("a", "p"), scored("a", "p")], "two or more"),
        ([scored("a", "p"), scored("b", "p", task="tax/b")], "tax/b"),
        ([scored("a", "p"), scored("b", "p", run_id="run-2")], "run-2"),
        ([scored("a", "p"), scored("b", "pp")], "different criteria"),
    ],
)
def test_files_that_are_not_of_one_run_are_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        build_dual(runs)


@pytest.mark.parametrize(
    "content", [[], {"per_judge": {}}, {"per_judge": {"a": {"criteria_results": [{"id": "C", "verdict": "PASS"}]}}}]
)
def test_what_is_no_aggregate_is_refused(tmp_path, content):
    (tmp_path / "scores_dual.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"scores_dual\.json"):
        read_dual(tmp_path / "scores_dual.json")


def test_several_verdicts_on_one_criterion_are_refused(tmp_path):
    twice = scored("a", "pp")
    twice["criteria_results"][1]["id"] = "C-001"
    (tmp_path / "scores.json").write_text(json.dumps(twice))
    with pytest.raises(ValueError, match="C-001"):
        read_any(Path(tmp_path / "scores.json"))
