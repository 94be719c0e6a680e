"""The agent's sweep: backends x budgets x matters x seeds through the harness and the exact judge, cell by cell.

Each cell is a run folder and a result file. A sweep that is killed loses nothing: finished cells are skipped, and a run
that was under way goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from .. import methods
from ..attention import attending
from ..eval.judges import find_judge
from ..eval.matters.assignments import Assignment, write_assignments
from ..eval.reward import RubricReward
from ..eval.tasks import LabTask, find_tasks, load_task
from ..provenance import provenance
from . import backends
from .agent import Episode, drive_many
from .agent_cells import SLOTS, AgentCell, AgentStore, AgentSweepConfig, Condition, agent_cells
from .cells import UNEVEN, digest
from .play import open_episode
from .probe import Probe, ledger, read_private
from .runs import RunFolder, metrics, read_run
from .sampling import sampler
from .types import Policy
from .workers import share_out, worker_device


class AgentBench:
    """Who plays: a policy, and the compactors of kv and hybrid by training seed.

    Args:
        policy: the model.
        compactors: ready STILL compactors by seed.
        names: what inputs call them, by seed.
        device: for the record.
    """

    def __init__(
        self, policy: Policy, compactors: dict[int, Any] | None = None, names: dict[int, str] | None = None,
        device: Any = None,
    ):  # fmt: skip
        self.policy, self.compactors, self.names, self.device = policy, compactors or {}, names or {}, device

    @classmethod
    def load(cls, config: AgentSweepConfig, device: str | None = None) -> AgentBench:
        """Load what a config names.

        Raises:
            ValueError: a method needs what is not there.
        """
        from .run_command import PolicyConfig
        from .run_config import RunConfig

        served = PolicyConfig(
            policy=config.model, device=device, dtype=config.dtype, base_url=config.base_url,
            tokenizer=config.tokenizer, served_window=config.served_window, bytes_per_token=config.bytes_per_token,
        )  # fmt: skip
        if config.model.startswith("server:"):
            return cls(served.load(RunConfig(backend="memo"), {})[0])
        from transformers.utils import logging

        from .. import models
        from .policies.local import LocalPolicy
        from .sweep import load_compactors

        logging.disable_progress_bar()
        slots = [name for name in config.methods if set(config.backends) & set(SLOTS)]
        attention = "still" if any(methods.METHODS[n].uses_beta for n in slots if n in methods.METHODS) else None
        loaded = models.load(config.model, device, config.dtype, attention)
        needed = any(name == "still" or name.endswith(UNEVEN) for name in slots)
        found = load_compactors(config.compactor, config.seeds, loaded) if needed else {}
        ready = {seed: compactor for seed, (_, compactor) in found.items()}
        if any(compactor.config.beta for compactor in ready.values()) and attention is None:
            from ..attention import NAME, register

            register()
            loaded.model.set_attn_implementation(NAME)
        names = {seed: name for seed, (name, _) in found.items()}
        return cls(LocalPolicy(loaded), ready, names, loaded.model.device)

    def method(self, condition: Condition, seed: int) -> Any:
        """A method ready to compact; None for backends without one."""
        if condition.backend not in SLOTS:
            return None
        name = condition.method.removesuffix(UNEVEN)
        options = {"seed": seed} if name == "random" else {}
        if name == "still":
            options = {"compactor": self.compactors[seed], "label": self.names.get(seed, "")}
        if name != condition.method:
            options["split"] = self.compactors.get(seed, next(iter(self.compactors.values()))).with_split().split
        return methods.get(name, **options)

    def attending(self, method: Any) -> AbstractContextManager:
        """The attention that a method's slots need, while the block lasts."""
        needed = method is not None and method.needs_still_attention
        return attending(self.policy.model) if needed else nullcontext()

    def seeds(self, condition: Condition, config: AgentSweepConfig) -> tuple[int, ...]:
        """The seeds that make a difference: of compactors and of draws; a greedy run has one."""
        if condition.method.removesuffix(UNEVEN) == "still" and condition.backend in SLOTS:
            return tuple(self.compactors)
        return config.seeds if condition.method.removesuffix(UNEVEN) == "random" else config.seeds[:1]


def run_agent_sweep(
    config: AgentSweepConfig, output: str | Path, bench: AgentBench, progress: bool = True, workers: int = 1,
    device: str | None = None,
) -> AgentStore:  # fmt: skip
    """Compute every cell that `output` does not hold yet.

    Args:
        config: what to compute.
        output: results folder; one that the same config made is taken up where it stopped.
        bench: who plays.
        progress: show a bar.
        workers: processes that share the conditions, each with a bench of its own as `AgentBench.load` makes it, and
            `together` runs at a time: see `share_out`.
        device: of workers; the GPUs in turn unless given.

    Raises:
        ValueError: a task cannot be judged exactly, or the folder holds another sweep's results.
        RuntimeError: runs broke; every other cell was computed first, and these are tried again next time.
    """
    output = Path(output)
    for condition in config.conditions:
        if condition.backend != "memo_oracle":  # refuses before anything is written
            method = bench.method(condition, bench.seeds(condition, config)[0])
            with bench.attending(method):
                backends.make(config.run_config(condition), bench.policy, method)
    groups = {**_synthetic(config), **_named(config)}
    identity = {
        "model": bench.policy.name,
        "tasks": digest([[group, asked] for group, asked in groups.items() if isinstance(asked, str)])[:16],
        **{f"compactor seed {seed}": name for seed, name in bench.names.items()},
    }
    record = provenance(config, seed=config.first, device=bench.device, model=bench.policy.name)
    store = AgentStore.create(output, config, identity, record)
    tasks = {group: _write(output, asked) if isinstance(asked, tuple) else asked for group, asked in groups.items()}
    tasks = {group: {task.id: task for task in map(load_task, folders)} for group, folders in tasks.items()}
    _check_judgeable(task for group in tasks.values() for task in group.values())
    stamp = {name: record[name] for name in ("versions", "device", "git", "created")}
    plan = [Part(c, [*agent_cells(c, tasks, bench.seeds(c, config))]) for c in config.conditions]
    left = [Part(part.condition, [cell for cell in part.cells if not store.done(cell)]) for part in plan]
    left = [part for part in left if part.cells]
    if workers > 1 and len(left) > 1:
        ended = share_out(left, workers, _playing_elsewhere, config, output, tasks, device, stamp)
    else:
        ended = (end for part in left for end in _playing(config, bench, store, tasks, stamp)(part))
    total, todo = (sum(len(part.cells) for part in some) for some in (plan, left))
    broken: list[str] = []
    bar = tqdm(desc="cells", unit="cell", total=total, initial=total - todo, disable=not progress)
    with bar, closing(ended):
        for cell, problem in ended:
            bar.set_postfix_str(cell.label, refresh=False)
            bar.update()
            if problem:
                broken.append(f"{cell.set_id}, {cell.label}: {problem}")
    if broken:
        raise RuntimeError(f"{len(broken)} runs broke; run again to go on. The first: {broken[0]}")
    return store


class Part(NamedTuple):
    """Some cells of one condition."""

    condition: Condition
    cells: list[AgentCell]


def _playing(
    config: AgentSweepConfig, bench: AgentBench, store: AgentStore, tasks: dict[str, dict[str, LabTask]], stamp: dict
) -> Callable[[Part], Iterator[tuple[AgentCell, str]]]:
    """What plays a part, and yields each cell when it is on disk, or with what broke its run."""

    def play(part: Part) -> Iterator[tuple[AgentCell, str]]:
        method = bench.method(part.condition, bench.seeds(part.condition, config)[0])
        with closing(RubricReward(find_judge("exact"))) as judge, bench.attending(method):
            for cell, end in _played(part.cells, tasks, config, bench, store):
                if isinstance(end, Exception):
                    yield cell, f"{type(end).__name__}: {end}"
                else:
                    result = _result(cell, tasks[cell.task][cell.set_id], run_folder(store, cell), judge, bench)
                    store.write(cell, {**result, "provenance": stamp})
                    yield cell, ""

    return play


def _playing_elsewhere(
    number: int, config: AgentSweepConfig, folder: Path, tasks: dict[str, dict[str, LabTask]], device: str | None,
    stamp: dict,
) -> Callable[[Part], Iterator[tuple[AgentCell, str]]]:  # fmt: skip
    """The same in a worker."""
    bench = AgentBench.load(config, device or worker_device(number))
    return _playing(config, bench, AgentStore.open(folder), tasks, stamp)


def run_folder(store: AgentStore, cell: AgentCell) -> Path:
    """Where the run of a cell lies."""
    path = store.path(cell)
    return store.folder / "runs" / path.relative_to(store.folder / "cells").with_suffix("")


def _synthetic(config: AgentSweepConfig) -> dict[str, Any]:
    """Groups of generated matters: `(assignment, seeds, unseen templates)` by label."""
    found = {}
    for name in config.tasks:
        if name in ("matters", "matters-unseen"):
            for share in config.relevance:
                asked = Assignment(share, config.criteria, config.documents)
                seeds = range(config.first, config.first + config.count)
                found[f"{name}, {asked.label} relevant"] = (asked, seeds, name == "matters-unseen")
    return found


def _named(config: AgentSweepConfig) -> dict[str, list[Path]]:
    found = {}
    for name in config.tasks:
        if name not in ("matters", "matters-unseen"):
            found[name] = find_tasks(name)
            if not found[name]:
                raise ValueError(f"there is no task.json below {name!r}; name LAB tasks, matters or matters-unseen")
    return found


def _write(output: Path, made: tuple[Assignment, range, bool]) -> list[Path]:
    asked, seeds, unseen = made
    folder = output / "lab" / f"{100 * asked.relevance:g}{'-unseen' if unseen else ''}"
    return write_assignments(folder, asked, seeds, unseen_templates=unseen)


def _check_judgeable(tasks: Iterator[LabTask]) -> None:
    for task in tasks:
        if any(criterion.expect is None for criterion in task.criteria):
            raise ValueError(
                f"{task.id} has criteria that no machine can check; play it with `still run` and judge the runs with "
                f"`still grade`"
            )


def _played(
    cells: list[AgentCell], tasks: dict, config: AgentSweepConfig, bench: AgentBench, store: AgentStore
) -> Iterator[tuple[AgentCell, dict[str, Any] | Exception]]:
    """Each cell with its run's last event, or with what broke it."""
    of: dict[Episode, AgentCell] = {}
    broken: list[tuple[AgentCell, Exception]] = []

    def opened() -> Iterator[Episode]:
        for cell in cells:
            task, root = tasks[cell.task][cell.set_id], run_folder(store, cell)
            try:
                settings = config.run_config(cell.condition, cell.seed)
                method = bench.method(cell.condition, cell.seed)
                cache = store.folder / "converted"
                watch = Probe(task, root, config.probe)
                episode = open_episode(task, bench.policy, settings, root, method, cache=cache, watch=watch)
            except Exception as problem:
                broken.append((cell, problem))
                continue
            of[episode] = cell
            yield episode

    for episode, end in drive_many(opened(), config.together, sampler(bench.policy, config.together)):
        yield of.pop(episode), end
    yield from broken


def _result(cell: AgentCell, task: LabTask, root: Path, judge: RubricReward, bench: AgentBench) -> dict[str, Any]:
    """What a finished run did, cost and passed."""
    events = read_run(root)
    RunFolder(root).write_lab_files(events)
    (grading,) = judge.grade([(task, root)])
    grading.save(root)
    compacts, private = [event for event in events if event["event"] == "compact"], read_private(root)
    return {
        "metrics": metrics(events),
        "bytes_per_token": bench.policy.bytes_per_token,
        "criteria": [
            {"id": verdict.id, "label": verdict.label, "absent": bool((c.expect or {}).get("absent"))}
            for verdict, c in zip(grading.verdicts, task.criteria, strict=True)
        ],
        "boundaries": [
            {
                **{name: event[name] for name in (
                    "window", "trigger", "forced", "degraded", "attempts", "seconds", "decoded_tokens",
                    "prefill_tokens", "before", "after",
                )},
                "memo_seconds": _memo_seconds(events, event["window"]),
                "artifact": {name: event["artifact"][name] for name in ("kind", "tokens", "nbytes")},
            }
            for event in compacts
        ],
        "written": ledger(private, "written"),
        "answered": ledger(private, "answered"),
    }  # fmt: skip


def _memo_seconds(events: list[dict[str, Any]], window: int) -> float:
    """Seconds that a window's memos took to be sampled, rejected ones too."""
    memos = (e for e in events if e["event"] == "reject" or (e["event"] == "turn" and e["kind"] == "memo"))
    return sum(event["seconds"] for event in memos if event["window"] == window)
