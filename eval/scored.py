"""Graded runs as they lie on disk: every `scores*.json` below a folder, LAB's and ours, read as verdicts.

Reports and statistics start here and need nothing but these files. With the tasks at hand they also know the rubric
hash and the exact kind of every criterion; without, what the files say must do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .dual import AGGREGATE, read_any
from .kinds import Kind, criterion_kind, kind_of
from .tasks import LabTask, find_tasks, load_task
from .verdicts import CriterionVerdict, read_verdicts, total_cost

PARTIAL = "scores.partial.json"


@dataclass(frozen=True)
class ScoredRun:
    """What one judge said of one run.

    Attributes:
        task: the task's id.
        run_id: of the run that was graded.
        judge: who graded it.
        system: who made it: the model in the run's `config.json`, with its effort; empty where that is not known.
        verdicts: in rubric order.
        hashes: criterion id -> rubric hash, as far as the file or the task says.
        kinds: criterion id -> kind, from the task's words where it is at hand, else from the titles.
        scores: the file's contents, for everything else.
        path: the file.
    """

    task: str
    run_id: str
    judge: str
    system: str
    verdicts: tuple[CriterionVerdict, ...]
    hashes: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict, repr=False)
    path: Path | None = None

    @property
    def area(self) -> str:
        """The practice area: the first part of the task's id, for contracts the first two."""
        parts = self.task.split("/")
        return "/".join(parts[: 2 if parts[0] == "contracts" and len(parts) > 2 else 1])

    @property
    def all_pass(self) -> bool | None:
        """Every criterion passed; None where that hangs on unscored ones."""
        labels = {verdict.label for verdict in self.verdicts}
        return False if "fail" in labels else None if "unscored" in labels else True

    @property
    def judging_cost(self) -> float | None:
        """US dollars that these verdicts cost when they were made; None where the file does not say."""
        known = any(verdict.cost is not None for verdict in self.verdicts)
        return total_cost(self.verdicts) if known else None

    @property
    def judging(self) -> Mapping[str, Any]:
        """How it was judged, as our block has it; empty for files of other graders."""
        return (self.scores.get("still") or {}).get("judging") or {}


class Rubrics:
    """Tasks by id, loaded when they are asked for.

    Args:
        roots: folders that hold tasks at any depth.
    """

    def __init__(self, roots: Iterable[str | Path] = ()):
        self._folders: dict[str, list[Path]] = {}
        self._tasks: dict[str, LabTask | None] = {}
        for root in roots:
            for folder in find_tasks(root):
                self._folders.setdefault(folder.name, []).append(folder)

    def find(self, task_id: str) -> LabTask | None:
        """The task, or None where no folder holds it."""
        if task_id not in self._tasks:
            found = (load_task(folder) for folder in self._folders.get(task_id.rsplit("/", 1)[-1], ()))
            self._tasks[task_id] = next((task for task in found if task.id == task_id), None)
        return self._tasks[task_id]


def load_runs(paths: Sequence[str | Path], rubrics: Rubrics | None = None) -> list[ScoredRun]:
    """Every graded run in the files and below the folders.

    A run graded again by the same judge counts once, with its latest file. Files of stopped gradings
    (`scores.partial.json`) are left out.

    Raises:
        FileNotFoundError: a path is not there, or holds no scores.
        ValueError: a file is no scores file.
    """
    rubrics = rubrics or Rubrics()
    latest: dict[tuple[str, str, str, str], ScoredRun] = {}
    for path in map(Path, paths):
        files = [path] if path.is_file() else sorted(path.rglob("scores*.json"))
        files = [file for file in files if file == path or file.name != PARTIAL]
        if not files:
            raise FileNotFoundError(f"there is no scores.json in or below {path}; grade runs with `still grade` first")
        for file in files:
            for scores in read_any(file):
                run = _run(scores, file, rubrics)
                key = (run.system, run.task, run.run_id, run.judge)
                if key not in latest or _when(run) >= _when(latest[key]):
                    latest[key] = run
    return list(latest.values())


def judges_of(runs: Iterable[ScoredRun]) -> list[str]:
    """The judges' names, each once, in the order of first sight."""
    return list(dict.fromkeys(run.judge for run in runs))


def systems_of(runs: Iterable[ScoredRun]) -> list[str]:
    """The systems' names, each once, in the order of first sight."""
    return list(dict.fromkeys(run.system for run in runs))


def graded_by(runs: Iterable[ScoredRun], judge: str) -> list[ScoredRun]:
    """The runs that one judge graded.

    Raises:
        ValueError: there are none.
    """
    runs = list(runs)
    if found := [run for run in runs if run.judge == judge]:
        return found
    raise ValueError(f"no run was graded by {judge!r}; there are {', '.join(judges_of(runs)) or 'none at all'}")


def _run(scores: Mapping[str, Any], file: Path, rubrics: Rubrics) -> ScoredRun:
    block = scores.get("still") or {}
    task_id = str(scores.get("task") or "")
    task = rubrics.find(task_id)
    verdicts = tuple(read_verdicts(scores))
    hashes = dict(block.get("rubric_hashes") or {})
    kinds = {verdict.id: kind_of(verdict.title) for verdict in verdicts}
    if task is not None:
        known = {criterion.id: criterion for criterion in task.criteria}
        kinds |= {name: criterion_kind(known[name]) for name in kinds if name in known}
        hashes = {name: known[name].rubric_hash for name in kinds if name in known} | hashes
    return ScoredRun(
        task=task_id,
        run_id=str(scores.get("run_id") or file.parent.name),
        judge=str(scores.get("judge_model") or ""),
        system=_system(file.parent),
        verdicts=verdicts,
        hashes=hashes,
        kinds=kinds,
        scores=scores,
        path=file,
    )


def _system(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return ""
    parts = (config.get("model"), config.get("reasoning_effort")) if isinstance(config, dict) else ()
    return " ".join(str(part) for part in parts if part)


def _when(run: ScoredRun) -> tuple[str, bool]:
    """Later gradings win; of one grading, the judge's own file wins over its copy in the aggregate."""
    return str(run.scores.get("scored_at") or ""), run.path is not None and run.path.name != AGGREGATE
