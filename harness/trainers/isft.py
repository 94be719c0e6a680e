"""Iterative supervised fine-tuning: collect, filter, gate, train, evaluate, and again. Every stage is restartable.

    OUT/round-1/collect/TASK/attempt-0    run folders of the teacher, graded
    OUT/round-1/rows.jsonl, leaks.json    what is trained on, and what the gate found
    OUT/round-1/placement/                the compactor with its placement fitted to these rows, with --place
    OUT/round-1/train/                    checkpoints and metrics
    OUT/round-1/student/                  the weights that came of it
    OUT/round-1/evaluation/               the hold-out, on text and on slots
    OUT/round-1/round.json                written last

A stage that left its result is not run again; one that was cut off goes on inside, by task and attempt, by turn, by
optimizer step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...provenance import provenance
from ..backends.slots import fingerprint
from ..policies.local import LocalPolicy
from ..row_files import read_rows, write_rows
from ..run_config import RunConfig
from ..runs import RunFolder, read_run, write_atomically
from ..windows import WindowRow, check_rows, rows_of_run
from .checks import check_learns, check_start
from .collect import Attempt, Collector, check_graders
from .config import IsftConfig, TrainSettings
from .evaluate import evaluate
from .grading import Grade
from .leaks import LeakReport, leaks_of, privilege, transcript
from .ledgers import numbers
from .loop import RowTrainer, agreed, barrier, mine, world
from .model import RowModel
from .placing import place
from .setup import begun_with, claim_output, join_processes, make_module
from .sharding import assign, gather
from .steps import RowSource
from .teacher import PrivateChannel, check_run, key_of, marker_of
from .weights import load_weights, trained

TeacherOf = Callable[[int, Any], Any]
"""The round and the student in, the policy that teaches out; None for the student with the rubric."""


def run_isft(
    tasks: Sequence[Any], held_out: Sequence[Any], loaded: Any, run: RunConfig, config: IsftConfig,
    settings: TrainSettings, output: Path, graders: Sequence[Grade], report_grade: Grade, *,
    teacher_of: TeacherOf = lambda round, student: None, method: Any = None, together: int = 1,
    options: dict[str, Any] | None = None, report: Callable[[str], None] = print,
    named: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train for the rounds that are left.

    Args:
        tasks: to train on.
        held_out: to evaluate on; none of `tasks`.
        loaded: the student.
        run: of the harness.
        config: of iSFT.
        settings: of the training.
        output: the run's folder.
        graders: of the rollouts, one for each independent grading.
        report_grade: of the evaluation.
        teacher_of: who teaches a round.
        method: for backends with slots.
        together: attempts, and runs of the hold-out, at a time.
        options: further arguments of the library trainer.
        report: told what goes on.
        named: names of the teacher and the judges; a run goes on with the same ones alone.

    Returns:
        What each round came to: the contents of `round.json`.

    Raises:
        ValueError: see `check_start`; a teacher cannot play the run, nothing was kept, a rollout leaks where that
            stops, or the folder holds another run.
    """
    check_run(run)
    check_start(tasks, held_out, loaded, run, settings, config.evaluate_on, method, together, options or {})
    check_graders(graders, config)
    made_by = {"run": asdict(run), "isft": asdict(config), "train": asdict(settings)}
    made_by |= begun_with(tasks, held_out, loaded, method, options, named)
    join_processes(loaded.model.device.type == "cpu")
    module, loaded = make_module(loaded, method, settings)
    # Last of all: a folder whose first values were refused would else refuse the right ones.
    claim_output(output, "isft.json", made_by, loaded.name, provenance(config, settings.train_seed))
    base = {name: tensor.clone() for name, tensor in trained(module).items()}
    student = Student(module, loaded, base, run, settings, options or {})
    evaluate(module, loaded, held_out, run, config.evaluate_on, report_grade, output / "before", together, report,
             config.ask)  # fmt: skip
    rounds = []
    for number in range(1, config.rounds + 1):
        folder = output / f"round-{number}"
        if (folder / "round.json").is_file():
            load_weights(module, folder / "student")
            rounds.append(json.loads((folder / "round.json").read_text(encoding="utf-8")))
            continue
        teacher = teacher_of(number, loaded) or LocalPolicy(loaded)
        module.eval()
        prepare(teacher, tasks_of(number, tasks, config), loaded.tokenizer, run, config, settings, graders, folder,
                number, report, module, together)  # fmt: skip
        every = range(1, number + 1) if config.union else [number]
        rows = [row for n in every for row in read_rows(output / f"round-{n}" / "rows.jsonl")]
        student.train(rows, folder, config)
        scores = evaluate(module, loaded, held_out, run, config.evaluate_on, report_grade, folder / "evaluation",
                          together, lambda line, n=number: report(f"round {n}  {line}"), config.ask)  # fmt: skip
        if world()[0] == 0:
            made = json.loads((folder / "selection.json").read_text(encoding="utf-8"))
            result = {**made, "trained_rows": len(rows), "trained_tokens": sum(r.trained for r in rows),
                      "evaluation": scores}  # fmt: skip
            write_atomically(folder / "round.json", json.dumps(result, indent=2).encode() + b"\n")
            from .report import write_isft_report

            write_isft_report(output)
        barrier()
        rounds.append(json.loads((folder / "round.json").read_text(encoding="utf-8")))
    return rounds


def tasks_of(number: int, tasks: Sequence[Any], config: IsftConfig) -> list[Any]:
    """The tasks of a round, counted from 1."""
    size = min(config.tasks_per_round or len(tasks), len(tasks))
    first = (number - 1) * size
    return [tasks[place % len(tasks)] for place in range(first, first + size)]


class Student:
    """What trains, and where a round starts from.

    Args:
        module: policy and compactor.
        loaded: the policy as a `LoadedModel`.
        base: the weights before the first round.
        run: of the harness.
        settings: of the training.
        options: further arguments of the library trainer.
    """

    def __init__(self, module: RowModel, loaded: Any, base: dict, run: RunConfig, settings: TrainSettings, options):
        self.module, self.loaded, self.base = module, loaded, base
        self.run, self.settings, self.options = run, settings, options

    def train(self, rows: Sequence[WindowRow], folder: Path, config: IsftConfig) -> None:
        """Train on a round's rows, from the base or from where the last round ended."""
        if (folder / "student" / "complete.json").is_file():
            load_weights(self.module, folder / "student")
            gather(self.module)
            return
        check_learns(rows, self.settings, folder.name)
        if config.start == "base":
            assign(self.module, self.base)
        if self.settings.place:
            place(self.module, rows, folder / "placement", self.settings)
        frozen = self.settings.compactor_mode == "frozen"
        check_rows(rows, self.loaded.tokenizer, self.settings.max_tokens,
                   compactor=fingerprint(self.module.method) if frozen else "")  # fmt: skip
        source = RowSource(rows, config.batch, self.settings, self.settings.train_seed)
        trainer = RowTrainer(
            self.module, self.settings, folder / "train", source, source.steps(config.epochs), self.loaded.tokenizer,
            self.options,
        )  # fmt: skip
        trainer.fit()
        self.module.eval()
        trainer.save_model(folder / "student")
        gather(self.module)
        if world()[0] == 0:
            write_atomically(folder / "student" / "complete.json", b"{}\n")
        barrier()


def prepare(
    teacher: Any, tasks: Sequence[Any], tokenizer: Any, run: RunConfig, config: IsftConfig, settings: TrainSettings,
    graders: Sequence[Grade], folder: Path, number: int, report: Callable[[str], None] = print,
    module: RowModel | None = None, together: int = 1,
) -> list[WindowRow]:  # fmt: skip
    """Collect, filter, gate and window: `rows.jsonl`, `leaks.json` and `selection.json` of a round.

    Every process of a run calls this: each plays its share of the tasks, and the first one does the rest.

    Args:
        teacher: of the round.
        tasks: to collect on.
        tokenizer: the student's.
        run: of the harness.
        config: of iSFT.
        settings: of the training.
        graders: one for each grading.
        folder: of the round.
        number: of the round.
        report: told what goes on.
        module: the student, for the privilege meter of teachers that give log-probabilities.
        together: attempts at a time.

    Raises:
        ValueError: nothing was kept, or something leaks and `leaks` is stop.
    """
    if not agreed((folder / "selection.json").is_file()):
        collector = Collector(teacher, tokenizer, run, config, graders, folder, number, together,
                              lambda a: report(f"round {number}  {a.task} attempt {a.number}: "
                                               f"{'kept' if a.kept else a.reason} {a.rates}"))  # fmt: skip
        collector.collect(mine(tasks))
        barrier()
        if world()[0] == 0:
            _select(collector.collect(tasks), teacher, tasks, tokenizer, config, settings, folder, number, module)
        barrier()
    return read_rows(folder / "rows.jsonl")


def _select(
    attempts: Sequence[Attempt], teacher: Any, tasks: Sequence[Any], tokenizer: Any, config: IsftConfig,
    settings: TrainSettings, folder: Path, number: int, module: RowModel | None,
) -> None:  # fmt: skip
    """The attempts of a round filtered, gated and windowed, on disk; see `prepare`."""
    good = [a for a in attempts if a.kept] if config.select == "kept" else [a for a in attempts if a.status == "done"]
    by_id = {task.id: task for task in tasks}
    gate = gate_of([(by_id[a.task], a) for a in good], config)
    if module is not None:
        gate.meter.update({a.folder: found for a in good if (found := meter_of(module, a, by_id[a.task], tokenizer))})
    write_atomically(folder / "leaks.json", json.dumps(gate.to_json(), indent=2).encode() + b"\n")
    if config.leaks == "stop" and len(gate.clean) < len(good):
        leaky = len(good) - len(gate.clean)
        raise ValueError(f"{leaky} of {len(good)} rollouts leak: {folder / 'leaks.json'} says how")
    clean = [attempt for attempt in good if attempt.folder in gate.clean]
    if config.token_budget is not None:
        clean.sort(key=lambda attempt: attempt.number)  # or the budget would leave out tasks rather than attempts
    rows = _within([_rows(attempt, tokenizer, config) for attempt in clean], config.token_budget)
    if not rows:
        raise ValueError(
            f"round {number} has no rows: {sum(a.kept for a in attempts)} of {len(attempts)} attempts passed all, and "
            f"{len(clean)} were kept without a leak; give more attempts, easier tasks or a better teacher"
        )
    check_rows(rows, tokenizer, settings.max_tokens)
    write_rows(folder / "rows.jsonl", rows)
    selection = {
        "round": number, "teacher": teacher.name, "attempts": len(attempts),
        "passed": sum(a.kept for a in attempts), "corrected": sum(a.kept and a.corrections > 0 for a in attempts),
        "leaked": len(good) - len(gate.clean), "leaks": gate.counts(), "rollouts": len(clean), "rows": len(rows),
        "tokens": sum(row.trained for row in rows), "select": config.select,
        "solved": len({a.task for a in attempts if a.kept}), "tasks": len(tasks),
        "ledger": numbers([by_id[a.task] for a in attempts], [Path(a.folder) for a in attempts]),
    }  # fmt: skip
    write_atomically(folder / "selection.json", json.dumps(selection, indent=2).encode() + b"\n")


def gate_of(attempts: Sequence[tuple[Any, Attempt]], config: IsftConfig) -> LeakReport:
    """The leak gate over attempts, each with its task."""
    found = {}
    for task, attempt in attempts:
        channel = PrivateChannel(attempt.folder, task, key_of(attempt.round, attempt.number))
        private = [line["text"] for line in channel.lines if "text" in line]
        said = transcript(read_run(attempt.folder), RunFolder(attempt.folder).text)
        found[attempt.folder] = leaks_of(
            said, task, private, markers_of(attempt, task, channel), corrected_at=attempt.corrected_at,
            longest_copy=config.longest_copy, clairvoyance=config.clairvoyance,
        )  # fmt: skip
    return LeakReport(tuple(found), found, {})


def markers_of(attempt: Attempt, task: Any, channel: PrivateChannel) -> list[str]:
    """Canaries that its public text may hold: its own, and of attempts before it, one of which it may go on from."""
    shown = [line["marker"] for line in channel.lines if "marker" in line]
    every = [marker_of(task, key_of(attempt.round, number)) for number in range(attempt.number + 1)]
    return list(dict.fromkeys([*every, *shown]))


@torch.no_grad()
def meter_of(module: RowModel, attempt: Attempt, task: Any, tokenizer: Any) -> dict[str, float]:
    """The privilege meter of an attempt by turn: how much likelier the private text made it, nats a token.

    Empty where the teacher gave no log-probabilities, or has another tokenizer than the student.
    """
    channel = PrivateChannel(attempt.folder, task, key_of(attempt.round, attempt.number))
    private = {line["turn"]: line["logprobs"] for line in channel.of("turn")}
    if not any(private.values()):
        return {}
    found = {}
    for row in rows_of_run(attempt.folder, tokenizer, train_on="all"):
        if row.prefix_plan and module.method is None:
            continue
        public, place = module.logprobs(row).tolist(), 0
        for span in row.spans:
            size = (span["end"] - span["start"]) if not span["untrained"] else 0
            theirs = private.get(span["turn"]) or []
            if size and len(theirs) == size:
                found[str(span["turn"])] = privilege(theirs, public[place : place + size])
            place += size
    return found


def _rows(attempt: Attempt, tokenizer: Any, config: IsftConfig) -> list[WindowRow]:
    rates = [rate for rate in attempt.rates if rate is not None]
    return rows_of_run(
        attempt.folder, tokenizer, corrected_at=attempt.corrected_at, round=attempt.round, attempt=attempt.number,
        trajectory_id=f"round-{attempt.round}/{attempt.task}/attempt-{attempt.number}",
        score=min(rates) if rates else float("nan"), all_pass=float(attempt.kept),
        teacher=attempt.teacher, corrections=attempt.corrections,
    )  # fmt: skip


def _within(rollouts: Sequence[list[WindowRow]], budget: int | None) -> list[WindowRow]:
    """Whole rollouts up to a number of trained tokens."""
    rows, used = [], 0
    for group in rollouts:
        size = sum(row.trained for row in group)
        if budget is not None and used + size > budget and rows:
            break
        rows, used = rows + group, used + size
    return rows
