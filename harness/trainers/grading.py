"""What trainers need of a grader: gradings of run folders, rewards, and whether unfinished work falls short."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...eval.stats import Interval, clustered_rate
from ...eval.tasks import LabTask

Grade = Callable[[Iterable[tuple[LabTask, Any]]], Sequence[Any]]
"""Rollouts in, gradings out (`eval.grading.Grading`): `RubricReward.grade` is one."""


@dataclass(frozen=True)
class Scored:
    """What a grading says of a rollout.

    Attributes:
        rate: share of the criteria that pass; None where one is unscored.
        all_pass: whether all do; None where that is not known.
        labels: by criterion.
    """

    rate: float | None
    all_pass: bool | None
    labels: dict[str, str]


def scored(grading: Any) -> Scored:
    """A grading's numbers."""
    return Scored(grading.pass_rate, grading.all_pass, {each.id: each.label for each in grading.verdicts})


def grade_runs(grade: Grade, rollouts: Sequence[tuple[LabTask, Path]]) -> list[Scored]:
    """Grade run folders."""
    return [scored(each) for each in grade(rollouts)] if rollouts else []


def falls_short(grade: Grade, task: LabTask, workspace: Path) -> bool | None:
    """Whether the deliverables as they lie in a workspace fall short; None where that could not be scored."""
    with TemporaryDirectory(prefix="still-submit-") as folder:
        shutil.copytree(workspace / "output", Path(folder) / "output")
        (found,) = grade([(task, Path(folder))])
    return None if found.all_pass is None else not found.all_pass


def random_rewards(seed: int) -> Callable[[str], float]:
    """The control: a reward drawn from the trajectory's name alone."""
    return lambda name: random.Random(f"{seed} {name}").random()


def rates(tasks: Sequence[LabTask], found: Sequence[Scored]) -> dict[str, Any]:
    """Criterion pass, all-pass and how many were unscored, with 95 % intervals clustered by task."""
    values = [
        (float(label == "pass"), task.id)
        for task, each in zip(tasks, found, strict=True) for label in each.labels.values() if label != "unscored"
    ]  # fmt: skip
    whole = [(float(each.all_pass), task.id) for task, each in zip(tasks, found, strict=True)
             if each.all_pass is not None]  # fmt: skip
    return {
        "criteria": _interval(values), "all_pass": _interval(whole), "rollouts": len(found),
        "unscored": sum(each.rate is None for each in found),
    }  # fmt: skip


def _interval(values: Sequence[tuple[float, str]]) -> dict[str, float] | None:
    if not values:
        return None
    rate: Interval = clustered_rate(*zip(*values, strict=True))
    return {"estimate": rate.estimate, "low": rate.low, "high": rate.high, "n": len(values)}
