"""Tasks played to their ends: folders claimed, finished runs skipped, one run's failure kept from the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from itertools import islice, product
from pathlib import Path
from typing import Any

from ..eval.tasks import LabTask
from ..provenance import provenance
from . import backends
from .agent import Episode, drive_many, facts
from .documents import Documents
from .run_config import RunConfig
from .runs import RunFolder, metrics, read_run
from .sampling import sampler
from .tools import Workspace
from .types import Policy


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        task: id of the task.
        folder: of the run.
        status: "done", "stopped" (by a cap, an overflow, mistakes), or "failed": it can be taken up again.
        reason: why it stopped, or the error.
        metrics: as `metrics.json` has them; empty where it failed.
    """

    task: str
    folder: Path
    status: str
    reason: str
    metrics: dict[str, Any]


def open_episode(
    task: LabTask, policy: Policy, config: RunConfig, root: Path, method: Any = None, sandbox: Any = None,
    cache: Path | None = None, watch: Callable[[Episode], None] | None = None,
) -> Episode:  # fmt: skip
    """An episode of a task in its run folder, new or taken up again.

    Args:
        task: with its rubric, of which nothing but `agent_view()` goes any further, but to memo_oracle's backend.
        policy: the model.
        config: of the run.
        root: the run's folder.
        method: for kv and hybrid, a method ready to compact.
        sandbox: what bash runs in; None turns bash off.
        cache: folder of converted documents.
        watch: called behind each boundary, before anything is sampled there; see `Episode.watch`.

    Raises:
        ValueError: the backend and the policy do not go together, or the folder holds another run.
    """
    oracle = task if config.backend == "memo_oracle" else None
    backend, view = backends.make(config, policy, method, oracle), task.agent_view()
    folder = claim(task, policy, config, root, method)
    workspace = Workspace(folder.workspace, Documents.load(view, cache), sandbox)
    episode = Episode(workspace, policy, backend, config, folder, {"run_id": run_id(task, policy, config, method)})
    episode.watch = watch
    return episode


def settings_of(task: LabTask, policy: Policy, config: RunConfig, method: Any = None) -> dict[str, Any]:
    """All that makes a run what it is."""
    options = method.options() if method is not None else {}
    return {**asdict(config), "policy": policy.name, "options": options, "content": task.digest}


def run_id(task: LabTask, policy: Policy, config: RunConfig, method: Any = None) -> str:
    """What a run is called, and no run of other settings: scores that lie elsewhere find it by this."""
    settings = json.dumps(settings_of(task, policy, config, method), sort_keys=True)
    return f"{task.id}/{config.backend}-{sha256(settings.encode()).hexdigest()[:8]}-seed{config.seed}"


def claim(task: LabTask, policy: Policy, config: RunConfig, root: Path, method: Any = None) -> RunFolder:
    """The folder of a run, with LAB's `config.json` in it.

    Raises:
        ValueError: it holds a run with other settings.
    """
    folder = RunFolder(root)
    same = settings_of(task, policy, config, method)
    folder.claim(same, lambda: {
        "model": policy.name, "task": task.id, "run_id": run_id(task, policy, config, method),
        "max_turns": config.max_turns, "temperature": config.temperature, "skills": [],
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "still": {"run": same, "provenance": provenance(config, config.seed)},
    })  # fmt: skip
    return folder


def play_tasks(
    tasks: Iterable[LabTask], policy: Policy, config: RunConfig, output: Path, *, seeds: Iterable[int] = (0,),
    method: Any = None, sandbox: Any = None, together: int = 1, report: Callable[[Outcome], None] = lambda _: None,
    watch: Callable[[LabTask, Path], Callable[[Episode], None]] | None = None, share: tuple[int, int] = (0, 1),
) -> list[Outcome]:  # fmt: skip
    """Play every task with every seed, each in `output/TASK/seed-N`; runs that ended are left as they are.

    A run of other settings or documents than its folder's is left as it is, too, and counts as failed.

    Args:
        tasks: what to play.
        policy: the model.
        config: of all runs, but for the seed.
        output: folder of all runs.
        seeds: of the sampling.
        method: for kv and hybrid.
        sandbox: for bash.
        together: runs at a time: decoded in one batch by a local model, requested in parallel of a server.
        report: called as each run ends.
        watch: makes what looks at each boundary of a run, of its task and folder; see `Episode.watch`.
        share: a process's number and how many there are, each of which plays as many runs. Of a task's seeds each
            gets some: those of one task are about as long as each other.

    Raises:
        ValueError: the backend and the policy do not go together, or two tasks have one id.
    """
    tasks = list(tasks)
    check_ids(tasks)
    for task in tasks[:1]:
        backends.make(config, policy, method, task)  # refuses before anything is written
    outcomes: list[Outcome] = []

    def ended(outcome: Outcome) -> None:
        outcomes.append(outcome)
        report(outcome)

    def opened() -> Iterator[Episode]:
        for task, seed in islice(product(tasks, seeds), share[0], None, share[1]):
            settings, root = replace(config, seed=seed), output / task.id / f"seed-{seed}"
            try:
                folder = claim(task, policy, settings, root, method)
                if (outcome := finished(task.id, root)) is None:
                    eyes = None if watch is None else watch(task, root)
                    yield open_episode(task, policy, settings, root, method, sandbox, watch=eyes)
                else:
                    folder.check_documents(read_run(root)[0]["documents"], facts(Documents.load(task.agent_view())))
                    ended(outcome)
            except Exception as problem:
                ended(_failed(task.id, root, problem))

    for episode, end in drive_many(opened(), together, sampler(policy, together)):
        root, task = episode.folder.root, episode.task.id
        try:
            if isinstance(end, Exception):
                raise end
            episode.folder.write_lab_files(read_run(root))
            ended(finished(task, root))
        except Exception as problem:
            ended(_failed(task, root, problem))
    return outcomes


def check_ids(tasks: Iterable[LabTask]) -> None:
    """Refuse tasks that would be played in one folder.

    Raises:
        ValueError: two have one id.
    """
    known: dict[str, LabTask] = {}
    for task in tasks:
        if (other := known.setdefault(task.id, task)) is not task:
            raise ValueError(f"{other.folder} and {task.folder} are both called {task.id}; play one of them at a time")


def _failed(task: str, root: Path, problem: Exception) -> Outcome:
    return Outcome(task, root, "failed", f"{type(problem).__name__}: {problem}", {})


def finished(task: str, root: Path) -> Outcome | None:
    """The outcome of a run that ended and left all of its files, or None."""
    if not (root / "metrics.json").is_file() or not (events := read_run(root)) or events[-1]["event"] != "end":
        return None
    return Outcome(task, root, events[-1]["status"], events[-1]["stop"], metrics(events))


def table(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """A line for each run."""
    for each in outcomes:
        if each.status == "failed":
            yield f"{each.task}  failed: {each.reason}"
            continue
        ours, theirs = each.metrics["still"], each.metrics
        held = ours["peak_compacted_bytes"]
        read = f"{theirs['documents_read']}/{theirs['total_documents']}"
        yield (
            f"{each.task}  {each.status} ({each.reason}): {read} documents, {theirs['turn_count']} turns,"
            f" {ours['windows']} windows, {'unknown' if held is None else f'{held:,}'} bytes held,"
            f" {100 * ours['forced_or_repaired']:.0f} % of turns forced or repaired"
        )
