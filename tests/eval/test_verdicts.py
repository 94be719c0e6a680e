from __future__ import annotations

import json

import pytest

from still.eval.matters.lab_format import write_lab_tasks
from still.eval.scores import build_scores, read_scores, write_scores
from still.eval.tasks import load_task
from still.eval.verdicts import CriterionVerdict, Tokens, count_states, read_verdicts, total_cost


def test_a_verdict_survives_the_scores_file_whole(tmp_path):
    (folder,) = write_lab_tasks(tmp_path / "lab", "contracts", [0], "tiny")
    task = load_task(folder)
    first, second, *rest = task.criteria
    vote = CriterionVerdict(first.id, first.title, "fail", "no", judge="a", tokens=Tokens(9, 4, calls=1), seed=3)
    given = [
        CriterionVerdict(
            first.id, first.title, "pass", "said so", ("clause 4",), ("never said",), "b", "judged", True,
            Tokens(input=100, cached=60, output=20, calls=2), 0.25, role="strong", votes=(vote,),
        ),
        CriterionVerdict(second.id, second.title, "unscored", "429", judge="b", state="error"),
        *(CriterionVerdict(each.id, each.title, "fail", "no file", state="missing") for each in rest),
    ]  # fmt: skip
    scores = build_scores(task, {each.id: each for each in given}, run_id="r", judge_model="b")
    write_scores(tmp_path / "scores.json", scores)
    assert read_verdicts(read_scores(tmp_path / "scores.json")) == given
    assert count_states(given) == {"judged": 1, "missing": len(rest), "error": 1}
    assert total_cost(given[:1]) == 0.25
    assert total_cost(given) is None


def test_labs_own_file_reads_as_verdicts_without_details():
    results = [{"id": "C-1", "title": "t", "verdict": "pass", "reasoning": "r"}]
    (verdict,) = read_verdicts({"criteria_results": results, "judge_model": "claude"})
    assert verdict == CriterionVerdict("C-1", "t", "pass", "r", judge="claude")


@pytest.mark.parametrize("state", ["error", "malformed", "refused", "rejected", "stopped"])
def test_an_error_can_be_no_verdict(state):
    assert CriterionVerdict("C-1", "t", "unscored", state=state).passed is None
    for label in ("pass", "fail"):
        with pytest.raises(ValueError, match="never a verdict"):
            CriterionVerdict("C-1", "t", label, state=state)


def test_shares_of_a_call_sum_to_the_call():
    call = Tokens(1000, 700, 11, 53, 7, 1)
    shares = call.share(8)
    assert sum(shares, Tokens()) == call
    assert {each.input for each in shares} == {125}
    assert sorted({each.output for each in shares}) == [6, 7]
    assert call.total == 1053


def test_an_unknown_price_makes_the_sum_unknown():
    priced = CriterionVerdict("C-1", "t", "pass", tokens=Tokens(5, calls=1), cost=0.1)
    assert total_cost([priced, CriterionVerdict("C-2", "t", "fail", state="missing", cost=0.0)]) == 0.1
    assert total_cost([priced, CriterionVerdict("C-2", "t", "fail", tokens=Tokens(5))]) is None
    assert json.loads(json.dumps(priced.to_json()))["tokens"] == {"input": 5, "calls": 1}
