"""Scores files made by hand: one letter a criterion, p, f or u."""

from __future__ import annotations

import json
from pathlib import Path

NAMES = {"p": "pass", "f": "fail", "u": "unscored"}


def scores_of(labels, judge="a", task="tax/a", run_id="run-1", cost=None, titles=(), hashes=None, **more):
    """The contents of a scores.json; `cost` is US dollars for each verdict."""
    results, verdicts = [], []
    for index, letter in enumerate(labels):
        name = f"C-{index + 1:03d}"
        title = titles[index] if index < len(titles) else f"Criterion {index + 1}"
        results.append({"id": name, "title": title, "verdict": NAMES[letter], "reasoning": f"{judge} says so"})
        verdicts.append(
            {"id": name, "title": title, "label": NAMES[letter], "cost": cost}
            | {"state": "error" if letter == "u" else "judged", "judge": judge}
        )
    all_pass = False if "f" in labels else None if "u" in labels else True
    block = {"rubric_hashes": hashes or {each["id"]: f"hash-{each['id']}" for each in results}, "verdicts": verdicts}
    return {
        "score": None if all_pass is None else float(all_pass), "max_score": 1.0, "summary": "", "all_pass": all_pass,
        "n_criteria": len(labels), "n_passed": labels.count("p"), "criteria_results": results, "run_id": run_id,
        "task": task, "judge_model": judge, "scored_at": "2026-08-30T10:00:00+00:00", "still": block, **more,
    }  # fmt: skip


def write_run(folder, labels, model="", **more):
    """A run folder with its scores and, if `model` is named, its config."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scores = scores_of(labels, **more)
    (folder / "scores.json").write_text(json.dumps(scores))
    if model:
        (folder / "config.json").write_text(json.dumps({"model": model}))
    return folder
