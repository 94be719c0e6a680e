"""Prompt tuning against a real server that plays both the cheap judge and the model that proposes edits."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace

import pytest
from judge_server import Answer, JudgeServer

from still.eval.edits import Edit, read_edits
from still.eval.grade import Grader
from still.eval.judge import exact_criterion
from still.eval.judges import ExactJudge, find_judge
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.prompting import PromptError, load_prompt
from still.eval.scored import load_runs
from still.eval.stats import for_json
from still.eval.tasks import load_task
from still.eval.tune import TuneConfig, Tuner

ANCHOR = "Work through a checklist:"
CAREFUL = "Compare every figure, digit by digit."
LUCKY = "Look at the first page twice."
HINTING = "Mind the odd ones."
STRICT_ELSEWHERE = "Trust no one else."
SILENT_ELSEWHERE = "Speak at home alone."
HARSH = "When in doubt, fail."
KIND = "Be kind to the author."
BROKEN = "Answer in verse."


def edit(words, find=ANCHOR):
    return {"why": f"adds: {words}", "find": find, "replace": f"{words} {find}"}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Sixteen runs with some wrong values, graded by the exact judge: tasks by id, the runs, both sides."""
    root = tmp_path_factory.mktemp("tune")
    tasks = {task.id: task for task in map(load_task, write_lab_tasks(root, "contracts", range(16), "tiny"))}

    async def whole():
        async with Grader(ExactJudge()) as grader:
            for number, task in enumerate(tasks.values()):
                present = [each.expect for each in task.criteria if not each.is_distractor]
                memo = "\n".join(
                    f"- {each['party']}: {'to be agreed' if (index + number) % 3 == 0 else each['value']}"
                    for index, each in enumerate(present)
                )
                run = root / "runs" / str(number)
                (run / "output").mkdir(parents=True)
                (run / "output" / "term-abstract.md").write_text(memo)
                (await grader.grade(task, run)).save(run)

    asyncio.run(whole())
    names = list(tasks)
    return tasks, load_runs([root / "runs"]), names[:8], names[8:]


class World:
    """The server's rule: a judge that passes everything unless its prompt makes it careful, and a proposer."""

    def __init__(self, tasks, tuning, proposals):
        self.by_title = {task.title: task for task in tasks.values()}
        self.tuning, self.proposals, self.asked = tuning, list(proposals), []

    def __call__(self, asked):
        if asked.body["model"] == "proposer":
            self.asked.append(asked.text)
            turn = self.proposals.pop(0) if self.proposals else []
            return turn if isinstance(turn, Answer) else Answer("Here:\n" + json.dumps({"edits": turn}))
        if BROKEN in asked.text:
            return Answer("No rhyme, no reason")
        task = self.by_title[re.search(r"# Task\n\n(.*?)\n", asked.text)[1]]
        criteria = {each.id: each for each in task.criteria}
        body = re.search(r"begin [^\]]*\]\n(.*?)\n\[DELIVERED", asked.text, re.DOTALL)[1]
        careful = CAREFUL in asked.text or (LUCKY in asked.text and task.id in self.tuning)
        careful |= STRICT_ELSEWHERE in asked.text or SILENT_ELSEWHERE in asked.text
        careful |= HINTING in asked.text and task.id in (*self.tuning, list(self.by_title.values())[-1].id)
        found = []
        for name in asked.ids:
            right = exact_criterion(body, criteria[name]).label
            harsh = HARSH in asked.text or (STRICT_ELSEWHERE in asked.text and task.id not in self.tuning)
            if SILENT_ELSEWHERE in asked.text and task.id not in self.tuning and name == asked.ids[0]:
                continue
            label = "fail" if harsh else right if careful else "pass"
            found.append({"id": name, "evidence": [], "reason": f"{label}ed", "verdict": label})
        return Answer(json.dumps({"verdicts": found}))


def tune(graded, tmp_path, proposals, **more):
    """Run the tuner against a server with these proposals, a list of edits (or an answer) for each round."""
    tasks, runs, tuning, held_out = graded
    world, lines = World(tasks, tuning, proposals), []
    with JudgeServer(world) as server:
        judge, proposer = (find_judge(f"{name}@{server.url}") for name in ("cheap", "proposer"))
        config = TuneConfig(**{"rounds": 2, "criteria_per_call": 0, **more})

        async def whole():
            tuner = Tuner(judge, proposer, runs, tasks, tuning, held_out, tmp_path, config, told=lines.append)
            try:
                return await tuner.tune()
            finally:
                await judge.aclose()
                await proposer.aclose()

        return asyncio.run(whole()), world, lines


def test_an_edit_that_helps_on_held_out_tasks_is_kept_and_the_others_are_not(graded, tmp_path):
    proposals = [[edit("x", find="nowhere to be found"), edit(KIND), edit(CAREFUL)]]
    found, world, lines = tune(graded, tmp_path, proposals)
    start = load_prompt("checklist")
    assert found.prompt.text == start.text.replace(ANCHOR, f"{CAREFUL} {ANCHOR}")
    (first,) = found.rounds
    assert [each["kept"] for each in first["edits"]] == [False, False, True]
    assert "occurs 0 times" in first["edits"][0]["refused"]
    assert first["edits"][1]["tuning"]["false_passes"][0] == first["edits"][1]["tuning"]["false_passes"][1] > 0
    outcome = found.held_out
    assert outcome.false_passes[0] == outcome.failed > 10
    assert outcome.false_passes[1] == 0
    assert outcome.false_fails == (0, 0)
    assert outcome.change.interval.high < 0
    assert "passes nothing on the tuning side" in found.stopped
    assert "kept" in lines[0]
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["rounds"] == json.loads(json.dumps(for_json(found.rounds)))
    assert set(log["tasks"]["tuning"]).isdisjoint(log["tasks"]["held-out"])
    assert (tmp_path / "prompt.md").read_text() == found.prompt.text == (tmp_path / f"{log['prompt']}.md").read_text()
    assert load_prompt(tmp_path / "prompt.md").sha256 == log["prompt"]
    cases = world.asked[0]
    assert cases.count('"mistake": "false pass"') == 12
    held_out = [graded[0][name] for name in graded[3]]
    assert not any(each.title in cases for task in held_out for each in task.criteria if "DISTRACTOR" not in each.title)


def test_luck_on_the_tuning_side_is_not_kept(graded, tmp_path):
    found, _, lines = tune(graded, tmp_path, [[edit(LUCKY)]], rounds=1)
    (entry,) = found.rounds[0]["edits"]
    assert entry["tuning"]["false_passes"][1] == 0
    assert entry["held_out"]["false_passes"][0] == entry["held_out"]["false_passes"][1] > 10
    assert not entry["kept"]
    assert found.prompt.sha256 == load_prompt("checklist").sha256
    assert (found.held_out, "not kept" in lines[0]) == (None, True)


def test_a_fall_that_may_be_chance_on_held_out_tasks_is_not_kept(graded, tmp_path):
    """Fewer false passes on one held-out task of eight: the interval over tasks holds zero."""
    found, _, lines = tune(graded, tmp_path, [[edit(HINTING)]], rounds=1)
    (entry,) = found.rounds[0]["edits"]
    before, after = entry["held_out"]["false_passes"]
    assert 0 < after < before
    interval = entry["held_out"]["change"]["interval"]
    assert interval["estimate"] < 0 <= interval["high"]
    assert not entry["kept"]
    assert "not kept" in lines[0]


@pytest.mark.parametrize(
    ("words", "harm"),
    [
        (STRICT_ELSEWHERE, lambda outcome: outcome["false_fail_rise"] == 1.0),
        (SILENT_ELSEWHERE, lambda outcome: outcome["lost"] == 8),
    ],
)
def test_fewer_false_passes_at_the_cost_of_good_work_or_of_verdicts_are_not_kept(graded, tmp_path, words, harm):
    found, _, _ = tune(graded, tmp_path, [[edit(words)]], rounds=1)
    (entry,) = found.rounds[0]["edits"]
    assert entry["held_out"]["change"]["interval"]["high"] < 0
    assert harm(entry["held_out"])
    assert not entry["kept"]


def test_an_edit_that_fails_good_work_or_breaks_answers_goes_no_further(graded, tmp_path):
    found, _, _ = tune(graded, tmp_path, [[edit(HARSH), edit(BROKEN)]], rounds=1)
    harsh, broken = found.rounds[0]["edits"]
    assert harsh["tuning"]["false_passes"][1] == 0
    assert harsh["tuning"]["false_fail_rise"] == 1.0
    assert broken["tuning"]["lost"] > 0
    assert "held_out" not in harsh | broken
    assert found.held_out is None


def test_edits_build_on_one_another_over_rounds(graded, tmp_path):
    tidy = {"why": "no effect", "find": "briefly. Then", "replace": "in brief. Then"}
    found, world, _ = tune(graded, tmp_path, [[tidy], [edit(CAREFUL)]], rounds=3)
    assert [[each["kept"] for each in one["edits"]] for one in found.rounds] == [[False], [True]]
    assert len(world.asked) == 2
    interval = found.rounds[1]["edits"][0]["held_out"]["change"]["interval"]
    assert interval["confidence"] == pytest.approx(1 - 0.05 / 3)


def test_a_proposer_that_fails_or_says_nothing_ends_cleanly(graded, tmp_path):
    found, _, _ = tune(graded, tmp_path / "a", [Answer("down", status=404)])
    assert "gave no answer" in found.stopped
    found, _, _ = tune(graded, tmp_path / "b", [Answer("I would rather not.")], rounds=1)
    assert found.rounds[0]["edits"] == []
    assert found.stopped == "all 1 rounds are done"


def test_the_budget_holds_over_all_rounds_together(graded, tmp_path):
    tasks, runs, tuning, held_out = graded
    with JudgeServer(World(tasks, tuning, [[edit(KIND)], [edit(CAREFUL)]])) as server:

        async def whole(limit):
            judge, proposer = (find_judge(f"{name}@{server.url}") for name in ("cheap", "proposer"))
            config = TuneConfig(rounds=3, criteria_per_call=0, max_tokens=limit)
            try:
                await Tuner(judge, proposer, runs, tasks, tuning, held_out, tmp_path, config).tune()
            finally:
                await judge.aclose()
                await proposer.aclose()

        with pytest.raises(ValueError, match="grading stopped"):
            asyncio.run(whole(6_500))  # a call is taken to need 5,000 or so, and takes 110: one side at a time fits
        calls = sum(each.body["model"] == "cheap" for each in server.log)
    assert 8 < calls < 40


def test_sides_that_overlap_or_hold_nothing_are_refused(graded, tmp_path):
    tasks, runs, tuning, _ = graded
    for held_out, message in ((tuning[:1], "both sides"), (["tax/none"], "held-out side")):
        with pytest.raises(ValueError, match=message):
            Tuner(ExactJudge(), ExactJudge(), runs, tasks, tuning, held_out, tmp_path)
    with pytest.raises(ValueError, match="rounds 0"):
        TuneConfig(rounds=0)


@pytest.mark.parametrize("side", [0, 8])
def test_two_runs_of_one_name_are_refused_on_either_side(graded, tmp_path, side):
    tasks, runs, tuning, held_out = graded
    first = next(run for run in runs if run.task == list(tasks)[side])
    other = replace(first, system="another", folder=tmp_path)
    with pytest.raises(ValueError, match=f"two runs of {first.task} are called '{first.run_id}'"):
        Tuner(ExactJudge(), ExactJudge(), [*runs, other], tasks, tuning, held_out, tmp_path)
    Tuner(ExactJudge(), ExactJudge(), [*runs, replace(other, run_id="another")], tasks, tuning, held_out, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Edit("", "x"), "occurs 0 times"),
        (Edit("the", "x"), "it must occur once"),
        (Edit(ANCHOR, ANCHOR), "changes nothing"),
        (Edit("{criteria}", "the criteria"), "lacks the slots"),
        (Edit(ANCHOR, "Mind {instructions}"), "changes the slots"),
        (Edit("{deliverables}", "{criteria} {deliverables}"), "turn them round"),
        (Edit("--- user ---", "--- nobody ---"), "needs .--- user ---. once"),
        (Edit(ANCHOR, "Work { through"), "stray brace"),
    ],
)
def test_edits_that_would_break_the_prompt_are_refused(change, message):
    with pytest.raises(PromptError, match=message):
        change.apply(load_prompt("checklist"), "x")


@pytest.mark.parametrize(
    ("text", "finds"),
    [
        ('draft {"edits": [{"find": "a", "replace": "b"}]} final {"edits": [{"find": "c", "replace": "d"}]}', ["c"]),
        ('{"edits": [{"find": "a"}, {"find": "b", "replace": ""}, 3]}', ["b"]),
        ('{"edits": "none"}', []),
        ('{"edits": [{"find": "a", "repl', []),
        ("", []),
    ],
)
def test_the_last_whole_answer_counts(text, finds):
    assert [each.find for each in read_edits(text)] == finds
