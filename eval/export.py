"""Disagreements of two judges as rows to fine-tune the cheaper one on.

A row is a chat as trainers take it: the prompt that the candidate judge saw, rebuilt from the run's own deliverables,
and as its answer the reference's verdict in the form that our prompts ask for, reason first. A share of agreements can
go along, so that a judge does not learn that whatever it thinks is wrong.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .agreement import JudgeComparison, Pair
from .deliverables import Outputs
from .prompting import Prompt, messages
from .questions import write_text
from .scored import Rubrics, ScoredRun
from .tasks import LabTask


@dataclass(frozen=True)
class Export:
    """What came of it.

    Attributes:
        rows: one for each pair that could be rebuilt.
        left_out: pairs that could not, by the reason.
    """

    rows: tuple[dict[str, Any], ...]
    left_out: dict[str, int]


def export_rows(
    comparison: JudgeComparison,
    runs: Iterable[ScoredRun],
    rubrics: Rubrics,
    prompt: Prompt,
    agreements: float = 0.0,
    seed: int = 0,
    tasks: Iterable[str] | None = None,
) -> Export:
    """Rows for the disagreements, and for a random share of the agreements.

    Args:
        runs: graded runs whose folders are known and hold the deliverables.
        rubrics: the tasks; a criterion whose hash is no longer the one that was judged is left out.
        prompt: the one to train for.
        agreements: agreements for each disagreement, for example 1.0; as many as there are at most.
        seed: of their choice and of the order of all rows.
        tasks: only of these, for example the training side of a split; None is all.

    Raises:
        ValueError: there is nothing to export.
    """
    allowed = None if tasks is None else set(tasks)
    pairs = [pair for pair in comparison.rates.pairs if allowed is None or pair.task in allowed]
    wrong = [pair for pair in pairs if not pair.agrees]
    right = [pair for pair in pairs if pair.agrees]
    rng = random.Random(f"export:{seed}")
    chosen = wrong + rng.sample(right, min(len(right), round(agreements * len(wrong))))
    if not chosen:
        raise ValueError(f"{comparison.reference} and {comparison.candidate} disagree on nothing that was asked for")
    rng.shuffle(chosen)
    folders = {(run.system, run.task, run.run_id): run.folder for run in runs if run.folder}
    outputs: dict[Path, Outputs] = {}
    rows: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    for pair in chosen:
        folder, task = folders.get((pair.system, pair.task, pair.run_id)), rubrics.find(pair.task)
        why = "the task is not in the folders named" if task is None else ""
        if folder and folder not in outputs:
            outputs[folder] = Outputs(folder)
        built = "" if why or folder is None else _chat(pair, task, outputs[folder], prompt)
        if isinstance(built, str):
            why = why or built or "its run folder is not known (--runs)"
            left_out[why] = left_out.get(why, 0) + 1
            continue
        answer = _answer(pair, prompt)
        rows.append(
            {
                "messages": [*built, {"role": "assistant", "content": answer}],
                "task": pair.task, "run_id": pair.run_id, "criterion": pair.reference.id, "rubric": pair.rubric,
                "kind": pair.kind, "label": pair.reference.label, "reference": comparison.reference,
                "candidate": comparison.candidate, "candidate_label": pair.candidate.label,
                "prompt": {"name": prompt.name, "sha256": prompt.sha256},
            }
        )  # fmt: skip
    return Export(tuple(rows), left_out)


def save_rows(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _chat(pair: Pair, task: LabTask, outputs: Outputs, prompt: Prompt) -> Any:
    """The messages of the call, or why they cannot be rebuilt."""
    criterion = next((each for each in task.criteria if each.id == pair.reference.id), None)
    if criterion is None or (pair.rubric and criterion.rubric_hash != pair.rubric):
        return "the criterion has changed since it was judged"
    sheet = outputs.sheet(task, criterion)
    if sheet.state != "ok":
        return f"its deliverable is {sheet.state}"
    sections = [each.section for each in sheet.files]
    system, shared = prompt.shared(task.title, task.instructions, sections, sheet.bound)
    return messages(system, shared, prompt.question([criterion]))


def _answer(pair: Pair, prompt: Prompt) -> str:
    said = pair.reference
    if prompt.is_labs:
        return json.dumps({"reasoning": said.reason, "verdict": said.label}, ensure_ascii=False)
    verdict = {"id": said.id, "evidence": list(said.evidence), "reason": said.reason, "verdict": said.label}
    return json.dumps({"verdicts": [verdict]}, ensure_ascii=False)
