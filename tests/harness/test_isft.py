"""Rounds of iSFT with a scripted teacher and a tiny random student: mechanics alone, stage by stage."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from agent_cases import Reader, tiny_agent
from judge_server import JudgeServer, make_task
from test_windows import run
from trainer_cases import RUN, exact, matters, scripted_teacher, written

from still import methods
from still.cli import main
from still.compactor import StillCompactor
from still.harness.episodes import Oracle
from still.harness.play import play_tasks
from still.harness.policies.local import LocalPolicy
from still.harness.policies.scripted import ScriptedPolicy
from still.harness.row_files import read_rows
from still.harness.runs import read_run
from still.harness.sandbox import Sandbox
from still.harness.trainers import evaluate as evaluation
from still.harness.trainers import isft as isft_module
from still.harness.trainers.collect import DONE, Attempt, Collector
from still.harness.trainers.commands import _grade
from still.harness.trainers.config import GrpoConfig, IsftConfig, TrainSettings
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


def test_a_teachers_rows_are_compacted_again_as_a_run_of_its_own_is(tmp_path):
    tasks, loaded = matters(tmp_path / "lab", (1,)), tiny_agent(layers=1)
    student = LocalPolicy(loaded, RUN.window)
    run = replace(RUN, backend="kv", budget=None, ratio=4.0, mode="recompact", reads=1, reads_force=2)
    config = IsftConfig(private="none", rubric=False)
    folder = tmp_path / "round-1"
    rows = prepare(OracleTeacher(student), tasks, student.tokenizer, run, config, SETTINGS, exact(), folder, 1)
    assert [step["keep"] for step in rows[-1].prefix_plan][:3] == ["exact", "append", "recompact"]

    def player():
        return Oracle(tasks[0], 0, len)

    method = methods.get("still", compactor=StillCompactor.for_model(loaded.model, ratio=4, chunk=2048))
    played = ScriptedPolicy(loaded.tokenizer, player, RUN.window, loaded)
    (outcome,) = play_tasks(tasks, played, run, tmp_path / "run", method=method)
    own = rows_of_run(outcome.folder, loaded.tokenizer)
    assert [(row.prefix_ids, row.prefix_plan) for row in rows] == [(row.prefix_ids, row.prefix_plan) for row in own]


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

    monkeypatch.setattr(isft_module, "evaluate", claimed)
    tasks, one, other = (matters(tmp_path / str(seed), (seed,)) for seed in (1, 7, 8))
    config = IsftConfig(evaluate_on=("memo",))
    for _ in range(2):
        with pytest.raises(LookupError):
            isft(tmp_path / "run", tasks, config, held_out=one)
    with pytest.raises(ValueError, match=r"another tasks\.held_out:"):
        isft(tmp_path / "run", tasks, config, held_out=other)


def test_what_would_be_refused_after_the_hold_out_is_refused_before_anything_is_written(tmp_path):
    tasks, held_out, folder = matters(tmp_path / "lab", (1,)), matters(tmp_path / "held", (7,)), tmp_path / "run"
    on_memo = IsftConfig(evaluate_on=("memo",))
    for asked, said in (
        (replace(RUN, backend="kv", budget="64t"), "need a ratio, not a budget of 64t"),
        (replace(RUN, backend="memo_kv", budget="64t"), "a teacher cannot play memo_kv"),
    ):
        with pytest.raises(ValueError, match=said):
            isft(folder, tasks, on_memo, held_out, asked)
    with pytest.raises(ValueError, match="5 independent gradings need as many graders"):
        isft(folder, tasks, replace(on_memo, gradings=5), held_out)
    with pytest.raises(ValueError, match="compactor_mode is joint, but with backend memo no compactor"):
        isft(folder, tasks, on_memo, held_out, settings=replace(SETTINGS, compactor_mode="joint"))
    with pytest.raises(ValueError, match="the method 'still' needs compactor="):
        isft(folder, tasks, IsftConfig(evaluate_on=("memo", "kv")), held_out)
    with pytest.raises(ValueError, match="evaluate_on has 'bogus'; backends are full, plain"):
        IsftConfig(evaluate_on=("memo", "bogus"))
    assert not folder.exists()


def test_settings_that_change_no_gradient_may_change_when_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(isft_module, "evaluate", breaking(LookupError()))
    tasks, more = matters(tmp_path / "lab", (1,)), {"micro_tokens": 99, "max_tokens": 9000, "checkpointing": True}
    for settings in (SETTINGS, replace(SETTINGS, **more)):
        with pytest.raises(LookupError):
            isft(tmp_path / "run", tasks, settings=settings)
    with pytest.raises(ValueError, match=r"holds a run with another train\.memo_weight:"):
        isft(tmp_path / "run", tasks, settings=replace(SETTINGS, memo_weight=2.0))


def test_a_command_does_not_go_on_with_another_teacher_or_judge(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(isft_module, "evaluate", breaking(LookupError()))
    for seed in (1, 7):
        matters(tmp_path / str(seed), (seed,))
    command = ["isft", str(tmp_path / "1"), "--held-out", str(tmp_path / "7"), "--policy", "pocket-agent", "--backend",
               "memo", "--budget", "64t", "-o", str(tmp_path / "run")]  # fmt: skip
    for _ in range(2):
        assert main([*command, "--teacher", "oracle"]) not in (0, 2)  # it goes on, and breaks at the hold-out
    assert main(command) == 2
    assert "holds a run with another named.teacher: give another folder" in capsys.readouterr().err
    judged = ["--teacher", "oracle", "--report-judge", "m@http://127.0.0.1:9/v1"]
    pytest.importorskip("openai")
    assert main([*command, *judged]) == 2
    assert "holds a run with another named.report_judge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "values", "said"),
    [
        (TrainSettings, {"lr": float("inf")}, "lr is inf; it must be above 0, and finite"),
        (TrainSettings, {"lr": float("nan")}, "lr is nan; it must be above 0"),
        (TrainSettings, {"weight_decay": -1.0}, "weight_decay is -1.0; it must be 0 or more"),
        (TrainSettings, {"warmup": -1}, "warmup is -1; it must be 0 or more"),
        (TrainSettings, {"max_tokens": 0}, "max_tokens is 0; it must be above 0"),
        (GrpoConfig, {"kl": -1.0}, "kl is -1.0; it must be 0 or more"),
        (GrpoConfig, {"clip_high": -0.9}, "clip_high is -0.9; it must be 0 or more"),
        (GrpoConfig, {"clip_low": 1.5}, "clip_low is 1.5; it must lie between 0 and 1"),
        (GrpoConfig, {"refill": -2}, "refill is -2; it must be 0 or more"),
        (GrpoConfig, {"length_cut": -1.0}, "length_cut is -1.0; it must lie between 0 and 1"),
        (IsftConfig, {"token_budget": -5}, "token_budget is -5; it must be above 0"),
        (IsftConfig, {"clairvoyance": -1.0}, "clairvoyance is -1.0; it must lie between 0 and 1"),
        (IsftConfig, {"private_rounds": -3}, "private_rounds is -3; it must be 0 or more"),
        (IsftConfig, {"temperature": float("inf")}, "temperature is inf; it must be 0 or more, and finite"),
    ],
)
def test_values_out_of_range_are_refused(make, values, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make(**values)


@pytest.mark.parametrize(("solved", "select", "attempts"), [(1, "kept", [2, 4]), (1, "any", [2, 2])])
def test_the_control_has_as_many_rollouts_of_what_fails_as_of_what_is_solved(tmp_path, solved, select, attempts):
    tasks = matters(tmp_path / "lab")
    for place, task in enumerate(tasks):
        for number in range(4):
            folder, ok = tmp_path / "collect" / task.id / f"attempt-{number}", place < solved
            folder.mkdir(parents=True)
            made = Attempt(1, task.id, number, str(folder), "t", "done", "", [float(ok)], [ok], ok, [], None, 1)
            (folder / DONE).write_text(json.dumps(asdict(made)))
    config = IsftConfig(select=select)
    made = Collector(scripted_teacher(tasks), None, RUN, config, exact(), tmp_path, 1).collect(tasks)
    assert [sum(a.task == task.id for a in made) for task in tasks] == attempts


def test_a_budget_of_tokens_leaves_out_second_attempts_before_any_task(tmp_path):
    tasks, folder = matters(tmp_path / "lab"), tmp_path / "round-1"
    config = IsftConfig(rollouts=2, private="none", select="any")

    def trained(config):
        (folder / "selection.json").unlink(missing_ok=True)
        teacher = scripted_teacher(tasks)
        found = prepare(teacher, tasks, teacher.tokenizer, RUN, config, SETTINGS, exact(), folder, 1, lambda line: None)
        tokens = {row.trajectory_id: 0 for row in found}
        for row in found:
            tokens[row.trajectory_id] += row.trained
        return tokens

    every = trained(config)
    first = {name: tokens for name, tokens in every.items() if name.endswith("attempt-0")}
    assert (len(every), len(first)) == (4, 2)
    assert trained(replace(config, token_budget=sum(first.values()))) == first


def test_a_teacher_that_draws_nothing_plays_each_task_once(tmp_path):
    tasks, student = matters(tmp_path / "lab", (1,)), LocalPolicy(tiny_agent(layers=1), RUN.window)
    config = IsftConfig(private="none", rubric=False)
    made = Collector(OracleTeacher(student), student.tokenizer, RUN, config, exact(), tmp_path, 1).collect(tasks)
    assert [a.number for a in made] == [0]
    player = scripted_teacher(tasks)
    greedy = Collector(player, None, RUN, IsftConfig(temperature=0.0), exact(), tmp_path, 1)
    assert (greedy._most, Collector(player, None, RUN, config, exact(), tmp_path, 1)._most) == (1, 4)


def held_out_by(players, monkeypatch, folder, tasks):
    """Evaluate on what these scripts play, one a task that is not finished."""
    made = iter(players)
    monkeypatch.setattr(evaluation, "LocalPolicy", lambda loaded, window: ScriptedPolicy(
        loaded.tokenizer, lambda: next(made), window, loaded))  # fmt: skip
    module = SimpleNamespace(eval=lambda: None, method=None)
    return evaluation.evaluate(module, tiny_agent(layers=1), tasks, RUN, ["memo"], exact()[0], folder, ask=False)


def breaking(problem):
    def play(*args, **more):
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


def test_teachers_have_bash_where_a_sandbox_works(tmp_path, monkeypatch):
    monkeypatch.setattr("still.harness.sandbox.find_sandbox", lambda: (Sandbox("bwrap"), ""))
    tasks = matters(tmp_path / "lab")
    run = replace(RUN, tools=("read", "write", "bash"))
    isft(tmp_path / "run", tasks, IsftConfig(rounds=1, rollouts=1, keep_per_task=1, batch=1), run=run)
    for log in (tmp_path / "run").rglob("events.jsonl"):
        assert "bash" in {tool["function"]["name"] for tool in read_run(log.parent)[0]["tools"]}
