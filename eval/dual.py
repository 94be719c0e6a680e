"""LAB's `scores_dual.json`: one run graded by several judges, each with its own file, and their aggregate.

LAB writes `scores_<judge>.json` for each judge and, when all are done, `scores_dual.json` with the keys `run_id`,
`task`, `judges`, `per_judge` (judge -> its scores), `dual_criterion_pass` (the mean of the judges' criterion rates),
`dual_all_pass_rate` (the mean of their all-pass values: 0, 0.5 or 1), `all_pass` (strict: every judge), `scored_at`.
What is ours lies in the block `still`. A judge that left criteria unscored makes the aggregate None, which is
"unknown": LAB writes no aggregate then, and a guess would be worse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .questions import write_text
from .scores import EXTRAS, check_scores, read_scores, write_scores

AGGREGATE = "scores_dual.json"


def build_dual(
    runs: Sequence[Mapping[str, Any]], *, scored_at: str | None = None, extras: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The contents of `scores_dual.json` from the `scores.json` contents of two or more judges of one run.

    Args:
        runs: one for each judge, in the order that reports show them.
        scored_at: ISO time; now when left out.
        extras: goes into the block of our own.

    Raises:
        ValueError: fewer than two, a judge twice, or files of different tasks, runs or criteria.
    """
    judges = [scores.get("judge_model") for scores in runs]
    if len(set(judges)) < 2 or len(set(judges)) < len(judges):
        raise ValueError(f"the judges are {judges}; a dual score needs two or more different ones")
    for key in ("task", "run_id"):
        if len(found := {scores.get(key) for scores in runs}) > 1:
            raise ValueError(f"the files are of different {key}s: {sorted(map(str, found))}; they must be of one run")
    if len({tuple(result["id"] for result in scores["criteria_results"]) for scores in runs}) > 1:
        raise ValueError(f"the judges {judges} judged different criteria; grade the run with the same task.json")
    known = all(scores.get("all_pass") is not None for scores in runs)
    complete = all(unscored(scores) == 0 for scores in runs)
    rate = sum(bool(scores["all_pass"]) for scores in runs) / len(runs) if known else None
    return {
        "run_id": runs[0].get("run_id"),
        "task": runs[0].get("task"),
        "judges": judges,
        "dual_criterion_pass": (
            sum(scores["n_passed"] / scores["n_criteria"] for scores in runs) / len(runs) if complete else None
        ),
        "dual_all_pass_rate": rate,
        "all_pass": strict_all_pass(runs),
        "scored_at": scored_at or datetime.now(UTC).isoformat(timespec="seconds"),
        "per_judge": {scores["judge_model"]: dict(scores) for scores in runs},
        EXTRAS: {
            "n_unscored": {scores["judge_model"]: unscored(scores) for scores in runs},
            "split": [name for name, labels in labels_by_criterion(runs).items() if {"pass", "fail"} <= set(labels)],
            **(extras or {}),
        },
    }


def strict_all_pass(runs: Sequence[Mapping[str, Any]]) -> bool | None:
    """Every judge passed every criterion: False as soon as one says fail, None where that hangs on unscored ones."""
    values = [scores.get("all_pass") for scores in runs]
    return False if False in values else None if None in values else True


def labels_by_criterion(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Criterion id -> the judges' labels, in the judges' order."""
    found: dict[str, list[str]] = {}
    for scores in runs:
        for result in scores["criteria_results"]:
            found.setdefault(result["id"], []).append(result["verdict"])
    return found


def unscored(scores: Mapping[str, Any]) -> int:
    """Criteria without a verdict."""
    return sum(result["verdict"] == "unscored" for result in scores["criteria_results"])


def write_dual(folder: str | Path, runs: Sequence[Mapping[str, Any]], **more: Any) -> Path:
    """Write `scores_<judge>.json` for each judge, then `scores_dual.json`; one of an earlier grading goes first.

    Args:
        more: `scored_at` and `extras` of `build_dual`.
    """
    aggregate = build_dual(runs, **more)
    folder = Path(folder)
    target = folder / AGGREGATE
    target.unlink(missing_ok=True)
    for scores in runs:
        write_scores(folder / f"scores_{file_name(scores['judge_model'])}.json", scores)
    write_text(target, json.dumps(aggregate, indent=2))
    return target


def read_dual(path: str | Path) -> dict[str, Any]:
    """Read a `scores_dual.json` of LAB's or of ours; unknown keys are kept.

    Raises:
        ValueError: it holds no judges' scores, or those of one judge are no scores.
    """
    dual = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(dual, dict) or not isinstance(dual.get("per_judge"), dict) or not dual["per_judge"]:
        raise ValueError(f"{path} has no per_judge block; it is no {AGGREGATE}")
    for judge, scores in dual["per_judge"].items():
        check_scores(scores, f"{path}, judge {judge}")
    return dual


def read_any(path: str | Path) -> list[dict[str, Any]]:
    """The scores in one file, one for each judge: a `scores.json` holds one, a `scores_dual.json` several.

    Raises:
        ValueError: it is neither.
    """
    path = Path(path)
    if path.name != AGGREGATE:
        return [read_scores(path)]
    dual = read_dual(path)
    order = [judge for judge in dual.get("judges") or () if judge in dual["per_judge"]] or list(dual["per_judge"])
    shared = {key: dual[key] for key in ("run_id", "task") if key in dual}
    return [{**shared, "judge_model": judge, **dual["per_judge"][judge]} for judge in order]


def file_name(judge: str) -> str:
    """A judge's name as part of a file name."""
    return re.sub(r"[^\w.+-]+", "-", judge).strip("-")
