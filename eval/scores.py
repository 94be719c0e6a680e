"""LAB's own `scores.json`: written so that LAB's tools read it, with what is ours in a block of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .judge import Verdict
from .questions import write_text
from .tasks import LabTask
from .verdicts import CriterionVerdict

EXTRAS = "still"
"""The key that holds everything which LAB's format does not have."""


def build_scores(
    task: LabTask,
    verdicts: Mapping[str, Verdict | CriterionVerdict],
    *,
    run_id: str,
    judge_model: str,
    cost: Mapping[str, float] | None = None,
    doc_coverage: Mapping[str, Any] | None = None,
    scored_at: str | None = None,
    extras: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The contents of `scores.json` for one run.

    A criterion without a verdict is unscored. One fail makes `all_pass` false; otherwise a single unscored criterion
    makes `score` and `all_pass` None, which is "unknown" and never a fail.

    Args:
        verdicts: by criterion id; a `CriterionVerdict` leaves its details in our block's `verdicts`.
        cost: what the agent used, not the judge: input_tokens, output_tokens, wall_clock_seconds.
        doc_coverage: documents_read, total_documents and the lists, as in the run's metrics.
        scored_at: ISO time; now when left out.
        extras: goes into the block of our own, beside the counts and the rubric hashes.

    Raises:
        ValueError: a verdict is for a criterion that the task does not have.
    """
    if unknown := sorted(set(verdicts) - {criterion.id for criterion in task.criteria}):
        raise ValueError(f"there are verdicts for {unknown}, which are no criteria of {task.id}")
    given = [(each, verdicts.get(each.id) or Verdict("unscored", reason="no verdict")) for each in task.criteria]
    labels = [verdict.label for _, verdict in given]
    passed, total = labels.count("pass"), len(labels)
    all_pass = False if "fail" in labels else None if "unscored" in labels else True
    scores: dict[str, Any] = {
        "score": None if all_pass is None else float(all_pass),
        "max_score": 1.0,
        "summary": _summary(labels, all_pass),
        "all_pass": all_pass,
        "n_criteria": total,
        "n_passed": passed,
        "criteria_results": [
            {"id": each.id, "title": each.title, "verdict": verdict.label, "reasoning": verdict.reason}
            for each, verdict in given
        ],
        "run_id": run_id,
        "task": task.id,
        "judge_model": judge_model,
        "scored_at": scored_at or datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if cost is not None:
        scores["cost"] = dict(cost)
    if doc_coverage is not None:
        scores["doc_coverage"] = dict(doc_coverage)
    scores[EXTRAS] = {
        "n_unscored": labels.count("unscored"),
        "n_stale": sum(verdict.stale for _, verdict in given),
        "rubric": task.rubric_hash,
        "rubric_hashes": {each.id: each.rubric_hash for each in task.criteria},
        **(extras or {}),
    }
    if detailed := [verdict.to_json() for _, verdict in given if isinstance(verdict, CriterionVerdict)]:
        scores[EXTRAS]["verdicts"] = detailed
    return scores


def write_scores(path: str | Path, scores: Mapping[str, Any]) -> None:
    """Write `scores.json`, whole or not at all, as LAB formats it."""
    write_text(Path(path), json.dumps(scores, indent=2))


def read_scores(path: str | Path) -> dict[str, Any]:
    """Read a `scores.json` of LAB's or of ours; keys that are missing in older files stay missing.

    Raises:
        ValueError: it lacks its verdicts, or one of them is neither pass, fail nor unscored.
    """
    scores = json.loads(Path(path).read_text(encoding="utf-8"))
    check_scores(scores, str(path))
    return scores


def check_scores(scores: Any, where: str) -> None:
    """Refuse what is no contents of a `scores.json`, naming `where` it stands.

    Raises:
        ValueError: it lacks its verdicts, one of them is neither pass, fail nor unscored, or two share an id.
    """
    results = scores.get("criteria_results") if isinstance(scores, dict) else None
    if not isinstance(results, list):
        raise ValueError(f"{where} has no criteria_results; it is no scores.json")
    for result in results:
        if not isinstance(result, dict):
            raise ValueError(f"{where}: {result!r} stands where a criterion's verdict should")
        if result.get("verdict") not in ("pass", "fail", "unscored"):
            raise ValueError(f"{where}: criterion {result.get('id')!r} has verdict {result.get('verdict')!r}")
    ids = [result.get("id") for result in results]
    if twice := sorted({str(each) for each in ids if ids.count(each) > 1}):
        raise ValueError(f"{where} has several verdicts for {', '.join(twice)}; a criterion has one")


def verdicts_of(scores: Mapping[str, Any]) -> dict[str, Verdict]:
    """The verdicts in a `scores.json`, by criterion id."""
    return {
        result["id"]: Verdict(result["verdict"], recall=float(result["verdict"] == "pass"), reason=result["reasoning"])
        for result in scores["criteria_results"]
    }


def _summary(labels: Sequence[str], all_pass: bool | None) -> str:
    passed, missed, unscored = (labels.count(each) for each in ("pass", "fail", "unscored"))
    state = {True: "PASS", False: "FAIL", None: "UNKNOWN"}[all_pass]
    missing = f"  Missed {missed} — task {state}." if missed else f"  Task {state}."
    return f"{passed}/{len(labels)} criteria passed.{missing}" + (f"  {unscored} unscored." if unscored else "")
