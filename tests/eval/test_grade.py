"""How criteria are put to a judge: groups, calls, repeats, the cache, deliverables that are amiss."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from judge_server import ids_in, make_task, truth, verdicts

from still.eval.deliverables import Outputs, group_by_sheet
from still.eval.ensemble import Ensemble
from still.eval.grade import GradeConfig, Grader, grade
from still.eval.judges import ExactJudge, JudgeError, Reply, ScriptedJudge
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.prices import Price, Prices
from still.eval.tasks import load_task
from still.eval.verdict_store import VerdictStore
from still.eval.verdicts import Tokens

MEMO, TRACKER = "The memo.\nThe fee is $5.", "The tracker."
FILES = (("memo.md",), ("memo.md", "tracker.md"), ())


class Watched(ScriptedJudge):
    """Answers with the truth and keeps what it was sent."""

    def __init__(self, name: str = "scripted", answer=None, tokens: Tokens | None = None):
        self.chats, self.busy, self.most = [], 0, 0
        self.tokens = tokens or Tokens(1000, 800, 0, 50, 0, 1)
        super().__init__(self._say, name)
        self._rule = answer or verdicts

    async def _say(self, chat) -> Reply:
        self.chats.append(chat)
        self.busy += 1
        self.most = max(self.most, self.busy)
        await asyncio.sleep(0.001)
        self.busy -= 1
        return Reply(self._rule(ids_in(chat[-1]["content"])), self.tokens)

    @property
    def asked(self) -> list[list[str]]:
        return [ids_in(chat[-1]["content"]) for chat in self.chats]

    @property
    def prefixes(self) -> list[str]:
        return [chat[-1]["content"].partition("# Criteria")[0] for chat in self.chats]


def run(judge, task=None, outputs=None, config=None, **more):
    outputs = {"memo.md": MEMO, "tracker.md": TRACKER} if outputs is None else outputs
    return asyncio.run(grade(task or make_task(12, files=FILES), outputs, judge, config, **more))


def labels(grading) -> dict[str, str]:
    return {each.id: each.label for each in grading.verdicts}


@pytest.mark.parametrize(("size", "calls"), [(1, 12), (2, 6), (3, 6), (4, 3), (0, 3)])
def test_criteria_on_the_same_files_share_calls_and_prefix(size, calls):
    judge = Watched()
    grading = run(judge, config=GradeConfig(criteria_per_call=size))
    assert labels(grading) == {each.id: truth(each.id) for each in grading.verdicts}
    assert [each.id for each in grading.verdicts] == [each.id for each in grading.task.criteria]
    assert len(judge.chats) == calls
    for ids, prefix in zip(judge.asked, judge.prefixes, strict=True):
        files = {FILES[int(name[2:]) % 3] for name in ids}
        assert len(files) == 1
        assert ("The tracker." in prefix) == (files != {("memo.md",)})
    assert len(set(judge.prefixes)) == 2, "bound to both files, or to every output: the same text"


def test_one_call_of_a_group_goes_first():
    sent = []

    async def slow(chat):
        sent.append(chat)
        if len(sent) == 1:
            await asyncio.sleep(0.05)
            assert len(sent) == 1, "nobody else is sent before the first is back"
        return Reply(verdicts(ids_in(chat[-1]["content"])))

    run(ScriptedJudge(slow), make_task(20))
    assert len(sent) == 20
    primed, unprimed = Watched(), Watched()
    run(primed, make_task(9))
    run(unprimed, make_task(9), config=GradeConfig(prime=False))
    assert primed.most == unprimed.most == 8


def test_verdicts_are_cached_by_content_and_by_nothing_else(tmp_path):
    task = make_task(6)
    changed = replace(task.criteria[2], match_criteria="PASS if something else.")
    edited = replace(task, criteria=(*task.criteria[:2], changed, *task.criteria[3:]))
    with VerdictStore(tmp_path / "verdicts.sqlite") as store:

        def asked(judge=None, task=task, outputs=None, config=None) -> int:
            judge = judge or Watched()
            grading = run(judge, task, outputs or {"memo.md": MEMO}, config, store=store)
            assert labels(grading) == {each.id: truth(each.id) for each in task.criteria}
            assert sum(each.cached for each in grading.verdicts) == len(task.criteria) - len(judge.chats)
            return len(judge.chats)

        assert asked() == 6
        assert asked() == 0
        assert asked(task=replace(task, id="other/place", folder=Path("x"))) == 0
        assert asked(task=edited) == 1
        assert asked(task=replace(task, criteria=task.criteria[::-1])) == 0
        assert asked(task=replace(task, instructions="Do more.")) == 0
        assert asked(task=replace(task, title="Another title")) == 6
        assert asked(outputs={"memo.md": MEMO + " "}) == 6
        assert asked(outputs={"memo2.md": MEMO}) == 6
        assert asked(Watched("other")) == 6
        assert asked(config=GradeConfig(prompt="checklist")) == 6
        assert asked() == 0


def test_a_verdict_from_the_cache_tells_what_it_cost_once(tmp_path):
    prices = Prices({"scripted:scripted": Price(input=1.0, output=10.0, cached=0.1)})
    with VerdictStore(tmp_path / "v.sqlite") as store:
        first = run(Watched(), make_task(4), config=GradeConfig(criteria_per_call=4), store=store, prices=prices)
        again = run(Watched(), make_task(4), config=GradeConfig(criteria_per_call=4), store=store, prices=prices)
    cost = (200 * 1.0 + 800 * 0.1 + 50 * 10.0) / 1e6
    assert (first.cost, again.cost) == (pytest.approx(cost), 0.0)
    assert sum(each.cost for each in again.verdicts) == pytest.approx(cost)
    judging = [each.judging["judges"]["scripted"] for each in (first, again)]
    assert [each["tokens"]["input"] for each in judging] == [1000, 0]
    assert [each["reused_tokens"]["cached"] for each in judging] == [0, 800]


def test_a_panel_of_calls_without_a_price_has_no_cost_and_no_call_costs_nothing():
    judges = tuple(Watched(name) for name in "ab")
    grading = run(Ensemble(judges, "strict"), make_task(4), config=GradeConfig(criteria_per_call=4))
    assert (grading.cost, {each.cost for each in grading.verdicts}) == (None, {None})
    grading = run(Ensemble(judges, "strict"), make_task(4), {})
    assert (grading.cost, {each.cost for each in grading.verdicts}) == (0.0, {0.0})


def test_repeats_draw_the_order_by_a_recorded_seed_and_vote():
    def flip(ids):
        return verdicts(ids, verdict="pass" if ids == sorted(ids) else "fail")

    judge = Watched(answer=flip)
    config = GradeConfig(criteria_per_call=0, repeats=3, seed=40, prime=False)
    grading = run(judge, make_task(9), config=config)
    assert len(judge.asked) == 3
    assert len({tuple(ids) for ids in judge.asked}) == 3
    assert all(sorted(ids) == judge.asked[0] for ids in judge.asked)
    for verdict in grading.verdicts:
        assert verdict.label == "fail"
        assert [(vote.seed, vote.label) for vote in verdict.votes] == [(None, "pass"), (41, "fail"), (42, "fail")]
    again = Watched(answer=flip)
    run(again, make_task(9), config=config)
    assert again.asked == judge.asked
    assert grading.judging["config"]["seed"] == 40


@pytest.mark.parametrize("policy", ["fail", "unscored", "judge"])
@pytest.mark.parametrize(("outputs", "state"), [({}, "missing"), ({"memo.md": " \n"}, "empty")])
def test_a_deliverable_that_is_not_there_is_a_state_of_its_own(policy, outputs, state):
    judge = Watched()
    task = make_task(3, files=(("memo.md",),))
    grading = run(judge, task, outputs, GradeConfig(missing=policy, empty=policy))
    if policy == "judge":
        assert {each.state for each in grading.verdicts} == {"judged"}
        assert "(this file was not delivered)" in judge.prefixes[0] or "(this file is empty)" in judge.prefixes[0]
        return
    assert judge.chats == []
    assert {(each.label, each.state) for each in grading.verdicts} == {(policy, state)}
    assert all("memo.md" in each.reason for each in grading.verdicts)
    assert grading.all_pass is (False if policy == "fail" else None)


def test_nothing_delivered_at_all_fails_without_a_call():
    judge = Watched()
    grading = run(judge, make_task(2), {})
    assert {(each.label, each.state, each.reason) for each in grading.verdicts} == {
        ("fail", "missing", "nothing was delivered")
    }
    assert judge.chats == []


def test_one_file_of_two_is_judged_with_a_mark_for_the_other():
    judge = Watched()
    grading = run(judge, make_task(1, files=(("memo.md", "tracker.md"),)), {"memo.md": MEMO})
    assert grading.verdicts[0].state == "judged"
    assert MEMO in judge.prefixes[0]
    assert '"tracker.md"]\n(this file was not delivered)' in judge.prefixes[0]


def test_quotations_are_checked_against_the_deliverable():
    memo = "The **fee** is $5 and\nthe \u201cterm\u201d ends \u2014 at last \u2014 in May."
    quotes = ['fee is $5 and the "term" ends', "the fee ... in May", "the fee is $6", "..."]
    judge = Watched(answer=lambda ids: verdicts(ids, evidence=quotes))
    verdict = run(judge, make_task(1), {"memo.md": memo}).verdicts[0]
    assert (verdict.evidence, verdict.misquotes) == (tuple(quotes[:2]), tuple(quotes[2:]))


def test_what_is_written_says_how_it_came_about(tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "memo.md").write_text(MEMO)
    grading = run(Watched(), make_task(3, files=(("memo.md",), ("x.docx",))), tmp_path)
    scores = json.loads(grading.save(tmp_path).read_text())
    judging = scores["still"]["judging"]
    assert judging["prompt"] == {"name": "plain", "sha256": Grader(Watched()).prompt.sha256}
    assert judging["states"] == {"judged": 2, "missing": 1}
    assert [(each["name"], each["state"]) for each in judging["deliverables"]] == [
        ("memo.md", "ok"),
        ("x.docx", "missing"),
    ]
    assert judging["deliverables"][0]["characters"] == len(MEMO)
    assert str(tmp_path) not in json.dumps(scores)
    assert scores["run_id"] == tmp_path.name


def test_files_written_by_the_grader_are_no_deliverables(tmp_path):
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "config.json").write_text("{}")
    assert Outputs(run_folder).names == (), "a run without output/ delivered nothing"
    with pytest.raises(FileNotFoundError, match="no folder"):
        Outputs(tmp_path / "nowhere")


def test_the_exact_judge_needs_no_call_on_any_family(tmp_path):
    for family in ("practice", "contracts", "firm-knowledge"):
        (folder,) = write_lab_tasks(tmp_path / family, family, [5], "tiny")
        task = load_task(folder)
        right = [f"{each.expect['party']}: {each.expect['value']}" for each in task.criteria if not each.is_distractor]
        names = list((task.deliverables or {"abstract.md": ""}).keys())
        grading = run(ExactJudge(), task, {name: "\n".join(right) for name in names})
        assert grading.all_pass is True
        assert run(ExactJudge(), task, {name: "\n".join(right[1:]) for name in names}).n_passed < len(task.criteria)
    with pytest.raises(ValueError, match="no 'expect' block"):
        run(ExactJudge(), make_task(1))


def test_groups_keep_the_order_of_a_criterions_files():
    task = make_task(3, files=(("b.md", "a.md"), ("a.md", "b.md"), ()))
    groups = group_by_sheet(task, Outputs({"a.md": "A", "b.md": "B"}), task.criteria)
    assert [[each.name for each in sheet.files] for sheet, _ in groups] == [
        ["b.md", "a.md"], ["a.md", "b.md"], ["a.md", "b.md"],
    ]  # fmt: skip
    assert [sheet.bound for sheet, _ in groups] == [True, True, False]


def test_many_runs_share_judge_and_cache_and_come_back_in_order():
    async def whole():
        async with Grader(Watched()) as grader:
            runs = [(make_task(3, f"C-{number}-"), {"memo.md": MEMO}, f"run-{number}") for number in range(40)]
            return await grader.grade_all(runs)

    gradings = asyncio.run(whole())
    assert [each.run_id for each in gradings] == [f"run-{number}" for number in range(40)]
    assert {each.judging["judges"]["scripted"]["fresh_verdicts"] for each in gradings} == {3}


def test_progress_hears_of_every_verdict_once():
    told, planned = Counter(), []

    def answer(ids):
        if len(ids) > 1:
            raise JudgeError("refused", "no")
        return verdicts(ids)

    grading = run(
        Watched(answer=answer), make_task(10), config=GradeConfig(criteria_per_call=5, reasks=3),
        told=lambda verdict: told.update([verdict.id]), planned=planned.append,
    )  # fmt: skip
    assert sum(planned) == 10
    assert told == {each.id: 1 for each in grading.verdicts}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criteria_per_call": -1}, "criteria_per_call is -1"),
        ({"repeats": 0}, "repeats 0"),
        ({"missing": "pass"}, "policy for missing is 'pass'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GradeConfig(**settings)


def test_labs_prompt_takes_one_criterion_a_call(tmp_path):
    file = tmp_path / "rubric_criterion.txt"
    file.write_text("{task_description} {agent_output} {criterion_title} {match_criteria}")
    with pytest.raises(ValueError, match="one criterion a call"):
        Grader(Watched(), GradeConfig(prompt=str(file), criteria_per_call=8))
    judge = ScriptedJudge(lambda chat: '{"verdict": "pass", "reasoning": "so it is"}')
    grading = run(judge, config=GradeConfig(prompt=str(file)))
    assert grading.all_pass is True
    assert grading.verdicts[0].reason == "so it is"
