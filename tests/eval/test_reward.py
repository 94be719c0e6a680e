from __future__ import annotations

import asyncio
import json
import random

import pytest
from judge_server import Answer, Asked, JudgeServer, make_task

from still.eval.ensemble import Ensemble
from still.eval.grade import GradeConfig
from still.eval.judges import ExactJudge, find_judge
from still.eval.lanes import Retry
from still.eval.matters.lab_format import write_lab_tasks
from still.eval.reward import RubricReward
from still.eval.tasks import load_task
from still.eval.verdict_store import VerdictStore

pytest.importorskip("openai")


def by_content(asked: Asked) -> Answer:
    """Passes the criteria whose number the deliverable names."""
    said = [
        {
            "id": each,
            "reason": "r",
            "verdict": "pass" if f"<{each}>" in asked.text.partition("# Criteria")[0] else "fail",
        }
        for each in asked.ids
    ]
    return Answer(json.dumps({"verdicts": said}))


def test_rewards_are_batched_cached_and_in_order():
    task = make_task(8)
    texts = [" ".join(f"<{each.id}>" for each in task.criteria[:passes]) + "." for passes in range(9)]
    order = random.Random(3).choices(range(9), k=40)
    with JudgeServer(by_content) as server, VerdictStore() as store:
        with RubricReward(find_judge(f"m@{server.url}"), GradeConfig(criteria_per_call=8), store=store) as reward:
            assert reward([(task, texts[each]) for each in order]) == [each / 8 for each in order]
            calls = len(server.log)
            assert calls == len(set(order)), "equal rollouts of a batch are graded once"
            assert reward([(task, texts[each]) for each in order[::-1]]) == [each / 8 for each in order[::-1]]
            assert len(server.log) == calls, "nothing is asked twice"
        with RubricReward(find_judge(f"m@{server.url}"), metric="all-pass", store=store) as reward:
            assert reward([(task, texts[8]), (task, texts[7])]) == [1.0, 0.0]


def test_run_folders_with_the_same_files_are_judged_once_and_others_each(tmp_path):
    tasks = make_task(2), make_task(2, prefix="C-9")
    delivered = {
        "a": ("memo.md", "<C-00000>"), "b": ("memo.md", "<C-00000>"), "c": ("memo.md", "<C-00000> <C-00001>"),
        "d": ("list.md", "<C-00000>"),
    }  # fmt: skip
    for run, (name, text) in delivered.items():
        (tmp_path / run / "output").mkdir(parents=True)
        (tmp_path / run / "output" / name).write_text(text)
        (tmp_path / run / "config.json").write_text(json.dumps({"run_id": run}))
    with JudgeServer(by_content) as server:
        with RubricReward(find_judge(f"m@{server.url}"), GradeConfig(criteria_per_call=0)) as reward:
            same = reward.grade([(tasks[0], tmp_path / run) for run in "aba"])
            assert len(server.log) == 1
            assert [each.pass_rate for each in same] == [0.5, 0.5, 0.5]
        server.log.clear()
        with RubricReward(find_judge(f"m@{server.url}"), GradeConfig(criteria_per_call=0)) as reward:
            found = reward([(tasks[0], tmp_path / "a"), *((tasks[0], tmp_path / run) for run in "cdb"),
                            (tasks[1], tmp_path / "a")])  # fmt: skip
            assert len(server.log) == 4
            assert found == [0.5, 1.0, 0.5, 0.5, 0.0]


def test_what_cannot_be_scored_is_none_and_never_zero():
    def rule(asked: Asked) -> Answer:
        return Answer("down", 500) if "<broken>" in asked.text else by_content(asked)

    task = make_task(2)
    with JudgeServer(rule) as server:
        quick = {"retry": Retry(2, 0.01, 0.01)}
        with RubricReward(find_judge(f"m@{server.url}"), **quick) as reward:
            assert reward([(task, "<broken>"), (task, "<C-00000>"), (task, " ")]) == [None, 0.5, 0.0]
        with RubricReward(find_judge(f"m@{server.url}"), metric="all-pass", **quick) as reward:
            assert reward([(task, "<broken>")]) == [None]


def test_trainers_and_running_loops_may_call_it(tmp_path):
    folders = write_lab_tasks(tmp_path, "practice", [0, 1], "tiny")
    tasks = {folder.name: load_task(folder) for folder in folders}
    memos = {
        name: "\n".join(f"{c.expect['party']}: {c.expect['value']}" for c in task.criteria if not c.is_distractor)
        for name, task in tasks.items()
    }
    names = list(tasks)
    with RubricReward(ExactJudge()) as reward:
        function = reward.of_completions(tasks)
        assert function.__name__ == "rubric_reward"
        completions = [memos[names[0]], [{"role": "assistant", "content": memos[names[1]]}], memos[names[1]]]
        found = function(prompts=None, completions=completions, task=[*names, names[0]], step=[1, 2, 3])
        assert found[:2] == [1.0, 1.0]
        assert found[2] < 1.0

        async def in_a_notebook():
            return reward([(tasks[names[0]], memos[names[0]])])

        assert asyncio.run(in_a_notebook()) == [1.0]


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="'mean'"):
        RubricReward(ExactJudge(), metric="mean")


def test_a_panel_rewards_too():
    task = make_task(4)
    with JudgeServer(by_content) as server:
        pair = Ensemble((find_judge(f"a@{server.url}"), find_judge(f"b@{server.url}")), "strict")
        with RubricReward(pair) as reward:
            assert reward([(task, "<C-00000> <C-00001>")]) == [0.5]
