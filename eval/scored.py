"""Graded runs as they lie on disk: every `scores.json` and `scores_*.json` below a folder, LAB's and ours, as verdicts.

What lies in a run's `output/` or `workspace/` is not read: an agent may have written it there to be believed.

Reports and statistics start here and need nothing but these files. With the tasks at hand they also know the rubric
hash and the exact kind of every criterion; without, what the files say must do.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .dual import AGGREGATE, read_any
from .grade_command import find_runs, run_id
from .kinds import Kind, criterion_kind, kind_of
from .tasks import LabTask, find_tasks, load_task
from .verdicts import CriterionVerdict, Tokens, read_verdicts

_NAME = re.compile(r"scores(?:_.+)?\.json")  # not scores.partial.json, of gradings that were stopped


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
        folder: the run's own folder, with what it delivered; None where that is not known.
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
    folder: Path | None = None

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
        """US dollars that these verdicts cost when they were made; None where the file does not say.

        What was judged without a call (by machine, or because nothing was delivered) cost nothing. Answers that were
        of no use are in it as far as they were given in the grading that wrote the file.
        """
        bills, votes = self._bills()
        costs = [vote.cost for vote in votes]
        if any(cost is not None for cost in costs) or bills:
            costs += [None if bill["cost"] is None else share * bill["cost"] for bill, share in bills]
            return None if None in costs else sum(costs)
        called = not self.judging or any(vote.tokens.calls for vote in votes)
        return None if called else 0.0

    @property
    def judging_tokens(self) -> Tokens:
        """What these verdicts took, counted as `judging_cost` is."""
        bills, votes = self._bills()
        found = [scaled(Tokens(**bill["tokens"]), share) for bill, share in bills] + [vote.tokens for vote in votes]
        return sum(found, Tokens())

    def _bills(self) -> tuple[list[tuple[Mapping[str, Any], float]], list[CriterionVerdict]]:
        """What each judge was paid in this grading, with the share that these verdicts have in it (all, where it gave
        none), and the verdicts that no such bill covers: from the cache, or of files that hold no bills.
        """
        votes = [vote for verdict in self.verdicts for vote in _votes(verdict)]
        names, known = {vote.judge for vote in votes}, self.judging.get("judges") or {}
        bills = {name: bill for name, bill in known.items() if name in names and "fresh_verdicts" in bill}
        here = Counter(vote.judge for vote in votes if vote.state == "judged" and not vote.cached)
        shares = [
            (bill, here[name] / bill["fresh_verdicts"] if bill["fresh_verdicts"] else 1.0)
            for name, bill in bills.items()
        ]
        return shares, [vote for vote in votes if vote.cached or vote.judge not in bills]

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


class RunFolders:
    """Folders of runs by task and run id, for scores that were written elsewhere (`still grade --output`).

    Args:
        roots: folders of runs, or folders that hold them at any depth.
    """

    def __init__(self, roots: Iterable[str | Path] = ()):
        self._found: dict[str, list[Path]] = {}
        for folder in (folder for root in roots for folder in find_runs(Path(root))):
            self._found.setdefault(run_id(folder), []).append(folder)

    def find(self, task: str, run: str) -> Path | None:
        """The folder of a run, or None where none, or more than one, can be meant."""
        found = self._found.get(run, [])
        if len(found) > 1:
            found = [folder for folder in found if _config(folder).get("task") == task]
        return found[0] if len(found) == 1 else None


def load_runs(
    paths: Sequence[str | Path], rubrics: Rubrics | None = None, folders: RunFolders | None = None
) -> list[ScoredRun]:
    """Every graded run in the files and below the folders.

    A run graded again by the same judge counts once, with its latest file; runs in two folders are two. Files of
    stopped gradings (`scores.partial.json`) are left out, and so is what lies in a run's `output/` or `workspace/`.

    Args:
        rubrics: tasks, for hashes and kinds of criteria.
        folders: where runs are found whose scores lie elsewhere.

    Raises:
        FileNotFoundError: a path is not there, or holds no scores.
        ValueError: a file is no scores file.
    """
    rubrics, folders = rubrics or Rubrics(), folders or RunFolders()
    latest: dict[tuple[str | Path, ...], ScoredRun] = {}
    for path in map(Path, paths):
        files = [path] if path.is_file() else _files(path)
        if not files:
            raise FileNotFoundError(
                f"there is no scores.json in or below {path}, what runs have in output/ and workspace/ aside; grade "
                "runs with `still grade` first"
            )
        for file in files:
            for scores in read_any(file):
                _check_names(scores, file)
                run = _run(scores, file, rubrics, folders)
                key = (run.folder.resolve() if run.folder else run.system, run.task, run.run_id, run.judge)
                if key not in latest or _when(run) >= _when(latest[key]):
                    latest[key] = run
    return list(latest.values())


def judges_of(runs: Iterable[ScoredRun]) -> list[str]:
    """The judges' names, each once, in the order of first sight."""
    return list(dict.fromkeys(run.judge for run in runs))


def graded_by(runs: Iterable[ScoredRun], judge: str) -> list[ScoredRun]:
    """The runs that one judge graded.

    Raises:
        ValueError: there are none.
    """
    runs = list(runs)
    if found := [run for run in runs if run.judge == judge]:
        return found
    raise ValueError(f"no run was graded by {judge!r}; there are {', '.join(judges_of(runs)) or 'none at all'}")


def _files(root: Path) -> list[Path]:
    """The scores files at or below a folder, but for those that an agent may have written to be believed."""
    named = (file for file in root.rglob("scores*.json") if _NAME.fullmatch(file.name))
    return sorted(file for file in named if not any(map(_is_agents, _folders(file, root))))


def _folders(file: Path, root: Path) -> list[Path]:
    """The folders that it lies in below the root."""
    return list(file.parents)[: len(file.relative_to(root).parts) - 1]


def _is_agents(folder: Path) -> bool:
    run = ("config.json", "metrics.json", "events.jsonl", "output")
    return folder.name == "output" or (
        folder.name == "workspace" and any((folder.parent / name).exists() for name in run)
    )


def _check_names(scores: Mapping[str, Any], file: Path) -> None:
    for number, result in enumerate(scores["criteria_results"], 1):
        if missing := [key for key in ("id", "title") if not isinstance(result.get(key), str)]:
            raise ValueError(f"{file}: criterion {number} has no {' and no '.join(missing)}; it is no scores.json")


def scaled(tokens: Tokens, factor: float) -> Tokens:
    """So many times the tokens, rounded."""
    return Tokens(*(round(count * factor) for count in tokens.counts))


def _votes(verdict: CriterionVerdict) -> list[CriterionVerdict]:
    """What single judges said: the verdict itself, or the votes that it was made from."""
    return [vote for each in verdict.votes for vote in _votes(each)] if verdict.votes else [verdict]


def _run(scores: Mapping[str, Any], file: Path, rubrics: Rubrics, folders: RunFolders) -> ScoredRun:
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
    run = str(scores.get("run_id") or file.parent.name)
    beside = any((file.parent / name).exists() for name in ("output", "config.json", "metrics.json"))
    folder = file.parent if beside else folders.find(task_id, run)
    return ScoredRun(
        task=task_id,
        run_id=run,
        judge=str(scores.get("judge_model") or ""),
        system=_system(folder),
        verdicts=verdicts,
        hashes=hashes,
        kinds=kinds,
        scores=scores,
        path=file,
        folder=folder,
    )


def _system(folder: Path | None) -> str:
    config = _config(folder) if folder else {}
    return " ".join(str(config[key]) for key in ("model", "reasoning_effort") if config.get(key))


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _when(run: ScoredRun) -> tuple[str, bool]:
    """Later gradings win; of one grading, the judge's own file wins over its copy in the aggregate."""
    return str(run.scores.get("scored_at") or ""), run.path is not None and run.path.name != AGGREGATE
