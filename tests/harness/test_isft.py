"""Rounds of iSFT with a scripted teacher and a tiny random student: mechanics alone, stage by stage."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from agent_cases import Reader, tiny_agent
from judge_server import JudgeServer, make_task
from test_windows import run
from trainer_cases import RUN, exact, matters, scripted_teacher, written

from still.cli import main
from still.harness.policies.local import LocalPolicy
from still.harness.policies.scripted import ScriptedPolicy
from still.harness.row_files import read_rows
from still.harness.trainers import evaluate as evaluation
from still.harness.trainers import isft as isft_module
from still.harness.trainers.commands import _grade
from still.harness.trainers.config import IsftConfig, TrainSettings
from still.harness.trainers.evaluate import backend_config
from still.harness.trainers.isft import meter_of, prepare, run_isft, tasks_of
from still.harness.trainers.teacher import PRIVATE, OracleTeacher
from still.harness.types import NoRoom
from still.harness.windows import rows_of_run

LEAK = "The rubric wants another term."
SETTINGS = TrainSettings(lr=1e-3, save_every=1, micro_tokens=4000)


def isft(root, tasks, config=None, held_out=(), run=RUN, settings=SETTINGS, **teacher):
    """Run it, with a student that is the same each time; what the rounds came to."""
    config = config or IsftConfig(rounds=2, rollouts=1, keep_per_task=1, batch=1)
    return run_isft(
        tasks, held_out, tiny_agent(layers=1), run, config, settings, root, exact(), exact()[0],
        teacher_of=lambda round, student: scripted_teacher(tasks, **teacher),
        report=lambda line: None,
    )  # fmt: skip


def weights(root, number: int) -> bytes:
    return (root / f"round-{number}" / "student" / "policy" / "model.safetensors").read_bytes()


def test_rounds_are_collected_gated_trained_and_gone_on_with(tmp_path):
    tasks, whole, cut = matters(tmp_path / "lab"), tmp_path / "whole", tmp_path / "cut"
    first, second = isft(whole, tasks)
    assert (first["passed"], first["corrected"], first["leaked"], first["rollouts"]) == (2, 2, 0, 2)
    assert second["trained_rows"] == first["rows"] + second["rows"]
    rows = read_rows(whole / "round-1" / "rows.jsonl")
    assert {row.trajectory_id.split("/")[0] for row in rows} == {"round-1"}
    assert {row.teacher for row in rows} == {"scripted teacher"}
    assert all(row.all_pass == 1.0 and row.corrections for row in rows)
    page = (whole / "report.html").read_text()
    assert "scripted teacher" in page
    assert "vocabulary" in page
    log = [json.loads(line) for line in (whole / "round-1" / "train" / "metrics.jsonl").read_text().splitlines()]
    assert len(log) == 2
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "round-2" / "student")
    shutil.rmtree(cut / "round-2" / "train" / "checkpoint-4")
    for name in ("round.json", "selection.json", "rows.jsonl"):
        (cut / "round-2" / name).unlink()
    assert isft(cut, tasks) == [first, second]
    assert weights(cut, 2) == weights(whole, 2) != weights(whole, 1)


def test_a_finished_run_goes_on_with_more_rounds(tmp_path):
    tasks, config = matters(tmp_path / "lab", (1,)), IsftConfig(rounds=1, rollouts=1, batch=1)
    (first,) = isft(tmp_path / "more", tasks, config)
    assert isft(tmp_path / "more", tasks, replace(config, rounds=2))[0] == first
    isft(tmp_path / "whole", tasks, replace(config, rounds=2))
    for number in (1, 2):
        assert weights(tmp_path / "more", number) == weights(tmp_path / "whole", number)


def test_each_round_plays_the_next_tasks_and_the_first_again_after_the_last(tmp_path):
    tasks = matters(tmp_path / "lab", (1, 2, 3))
    isft(tmp_path / "run", tasks, IsftConfig(rounds=2, tasks_per_round=2, rollouts=1, batch=2, union=False))
    ids = [task.id for task in tasks]
    for number, expected in ((1, ids[:2]), (2, [ids[2], ids[0]])):
        rows = read_rows(tmp_path / "run" / f"round-{number}" / "rows.jsonl")
        assert {row.task_id for row in rows} == set(expected)
    assert tasks_of(3, tasks, IsftConfig()) == tasks  # all of them, unless asked otherwise
    assert tasks_of(2, tasks, IsftConfig(tasks_per_round=9)) == tasks
    with pytest.raises(ValueError, match="tasks_per_round is 0"):
        IsftConfig(tasks_per_round=0)


def test_leaking_rollouts_are_dropped_or_stop_the_run(tmp_path):
    tasks = matters(tmp_path / "lab", (1,))
    config = IsftConfig(rounds=1, rollouts=1, batch=1)
    with pytest.raises(ValueError, match="were kept without a leak"):
        isft(tmp_path / "drop", tasks, config, says=LEAK)
    assert json.loads((tmp_path / "drop" / "round-1" / "leaks.json").read_text())["counts"]["vocabulary"] == 1
    with pytest.raises(ValueError, match="1 of 1 rollouts leak"):
        isft(tmp_path / "stop", tasks, replace(config, leaks="stop"), says=LEAK)


@pytest.mark.full
def test_the_control_trains_on_unfiltered_rollouts_within_a_budget(tmp_path):
    tasks = matters(tmp_path / "lab")
    config = IsftConfig(rounds=1, rollouts=1, batch=1, private="none", select="any", token_budget=1)
    (found,) = isft(tmp_path / "control", tasks, config)
    assert (found["passed"], found["rollouts"], found["select"]) == (0, 2, "any")
    assert len({row.trajectory_id for row in read_rows(tmp_path / "control" / "round-1" / "rows.jsonl")}) == 1


@pytest.mark.parametrize("backend", ["memo", "kv"])
def test_a_script_that_looks_answers_up_teaches_where_no_model_can(tmp_path, backend):
    tasks, student = matters(tmp_path / "lab"), LocalPolicy(tiny_agent(layers=1), RUN.window)
    run = RUN if backend == "memo" else replace(RUN, backend="kv", budget=None, ratio=4.0)
    config = IsftConfig(rollouts=1, keep_per_task=1, batch=1, private="none", rubric=False)
    folder = tmp_path / "round-1"
    rows = prepare(OracleTeacher(student), tasks, student.tokenizer, run, config, SETTINGS, exact(), folder, 1)
    made = json.loads((folder / "selection.json").read_text())
    assert (made["teacher"], made["passed"], made["leaked"], made["solved"]) == ("oracle", 2, 0, 2)
    assert all(bool(row.prefix_plan) == (backend == "kv" and row.window > 0) for row in rows)
    bare = replace(tasks[0], criteria=tuple(replace(each, expect=None) for each in tasks[0].criteria))
    with pytest.raises(ValueError, match="the oracle cannot teach it"):
        OracleTeacher(student).of(bare, run)


def test_attempts_that_would_all_be_alike_are_refused():
    with pytest.raises(ValueError, match=r"temperature is 0.*would be alike"):
        IsftConfig(temperature=0.0, private="none")


def test_a_models_verdicts_are_kept_in_the_runs_folder_and_never_asked_for_again(tmp_path):
    pytest.importorskip("openai")
    rollouts, root = [(make_task(3), "A memo."), (make_task(3), "Another.")], tmp_path / "run"
    with JudgeServer() as server:
        judge = f"m@{server.url}"
        first = _grade(judge, root, "grading-0")
        assert not root.exists()
        told = [[each.label for each in grading.verdicts] for grading in first(rollouts)]
        assert server.requests == 6
        again = _grade(judge, root, "grading-0")
        assert [[each.label for each in grading.verdicts] for grading in again(rollouts)] == told
        assert server.requests == 6
        _grade(judge, root, "report")(rollouts)
        assert server.requests == 12
    assert {file.name for file in (root / "verdicts").glob("*.sqlite")} == {"grading-0.sqlite", "report.sqlite"}


def test_the_exact_judge_keeps_no_file(tmp_path):
    (task,) = matters(tmp_path / "lab", (1,))
    (grading,) = _grade("exact", tmp_path / "run", "report")([(task, "A memo.")])
    assert (grading.n_passed < len(task.criteria), grading.n_unscored) == (True, 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--judge m@http://127.0.0.1:9/v1 --gradings 3", "gradings is 3; of one judge 2 are independent"),
        ("--judge m@http://127.0.0.1:9/v1 --gradings 2", "is trained on and held out"),
        ("--judge exact --gradings 3", "is trained on and held out"),
    ],
)
def test_more_gradings_than_a_model_judge_has_prompts_are_refused_before_anything_is_written(
    tmp_path, capsys, flags, said
):
    pytest.importorskip("openai")
    matters(tmp_path / "lab", (1,))
    common = ["--policy", "pocket-agent", "--backend", "memo", "--budget", "64t", "-o", str(tmp_path / "run")]
    assert main(["isft", str(tmp_path / "lab"), "--held-out", str(tmp_path / "lab"), *common, *flags.split()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_task_is_never_trained_on_and_held_out_and_a_folder_holds_one_run(tmp_path):
    tasks = matters(tmp_path / "lab", (1,))
    with pytest.raises(ValueError, match="is trained on and held out"):
        isft(tmp_path / "a", tasks, held_out=[replace(tasks[0], id="under/another/name")])
    config = IsftConfig(rounds=1, rollouts=1, batch=1)
    isft(tmp_path / "b", tasks, config)
    with pytest.raises(ValueError, match=r"holds a run with another train\.lr"):
        isft(tmp_path / "b", tasks, config, settings=replace(SETTINGS, lr=1e-2))


@pytest.mark.full
def test_the_hold_out_is_played_on_text_and_on_slots(tmp_path):
    tasks, held_out = matters(tmp_path / "lab", (1,)), matters(tmp_path / "held", (7,))
    config = IsftConfig(rounds=1, rollouts=1, batch=1, evaluate_on=("memo", "none"))
    (found,) = isft(tmp_path / "run", tasks, config, held_out)
    assert set(found["evaluation"]) == {"memo", "none"}
    assert found["evaluation"]["memo"]["rollouts"] == 1
    assert "95 % intervals" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_does_not_go_on_with_another_hold_out(tmp_path, monkeypatch):
    def claimed(*args, **more):
        raise LookupError

    monkeypatch.setattr(isft_module, "make_module", claimed)
    tasks, one, other = (matters(tmp_path / str(seed), (seed,)) for seed in (1, 7, 8))
    for _ in range(2):
        with pytest.raises(LookupError):
            isft(tmp_path / "run", tasks, held_out=one)
    with pytest.raises(ValueError, match=r"another tasks\.held_out:"):
        isft(tmp_path / "run", tasks, held_out=other)


def held_out_by(players, monkeypatch, folder, tasks):
    """Evaluate on what these scripts play, one a task that is not finished."""
    made = iter(players)
    monkeypatch.setattr(evaluation, "LocalPolicy", lambda loaded, window: ScriptedPolicy(
        loaded.tokenizer, lambda: next(made), window, loaded))  # fmt: skip
    module = SimpleNamespace(eval=lambda: None, method=None)
    return evaluation.evaluate(module, tiny_agent(layers=1), tasks, RUN, ["memo"], exact()[0], folder, ask=False)


def breaking(problem):
    def play(seen, limit):
        raise problem

    return play


def test_a_hold_out_run_that_breaks_stops_the_evaluation_and_is_taken_up_again(tmp_path, monkeypatch):
    tasks, root = matters(tmp_path / "held"), tmp_path / "evaluation"
    said = rf"1 of 2 runs of the hold-out broke, first {root / 'memo' / tasks[1].id}/seed-0: RuntimeError: no server;"
    with pytest.raises(ValueError, match=said):
        held_out_by([Reader(), breaking(RuntimeError("no server"))], monkeypatch, root, tasks)
    assert not (root / evaluation.DONE).exists()
    first = f"memo/{tasks[0].id}/seed-0/events.jsonl"
    before = written(root)[first]
    found = held_out_by([Reader()], monkeypatch, root, tasks)
    assert (found["memo"]["rollouts"], found["memo"]["failed"]) == (2, 0)
    assert written(root)[first] == before


def test_a_hold_out_run_without_room_counts_as_failed(tmp_path, monkeypatch):
    tasks, root = matters(tmp_path / "held"), tmp_path / "evaluation"
    found = held_out_by([Reader(), breaking(NoRoom("no room for a turn"))], monkeypatch, root, tasks)
    assert (found["memo"]["rollouts"], found["memo"]["failed"]) == (1, 1)
    assert json.loads((root / evaluation.DONE).read_text()) == found


def test_a_hold_out_is_played_greedily():
    assert backend_config(replace(RUN, temperature=0.7), "memo").temperature == 0.0


def test_the_meter_sets_each_turn_beside_what_the_private_text_made_of_it(tmp_path):
    folder, tokenizer = run(tmp_path)
    lines = [{"kind": "turn", "turn": span["turn"], "logprobs": [-1.0] * (span["end"] - span["start"])}
             for row in rows_of_run(folder, tokenizer, train_on="all") for span in row.spans]  # fmt: skip
    (folder / PRIVATE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def public(row):
        """Each token of turn n is n + 1 nats less likely without the private text."""
        return torch.tensor([-2.0 - s["turn"] for s in row.spans for _ in range(s["end"] - s["start"])])

    attempt = SimpleNamespace(folder=str(folder), round=1, number=0)
    found = meter_of(SimpleNamespace(method=None, logprobs=public), attempt, SimpleNamespace(id="t"), tokenizer)
    assert found == {str(line["turn"]): pytest.approx(line["turn"] + 1) for line in lines}
