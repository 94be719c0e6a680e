"""Hold-out evaluation inside the harness: the same tasks on several backends, graded by another grader than trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..play import play_tasks
from ..policies.local import LocalPolicy
from ..run_config import RunConfig
from ..runs import read_run, write_atomically
from ..sandbox import sandbox_of
from ..types import NoRoom
from .behaviour import mean_behaviour
from .grading import Grade, grade_runs, rates
from .ledgers import numbers, watcher
from .loop import agreed, barrier, world
from .model import RowModel

DONE = "evaluation.json"


def backend_config(run: RunConfig, backend: str) -> RunConfig:
    """The run's settings on another backend, greedy."""
    slots = backend in ("kv", "hybrid")
    return replace(run, backend=backend, ratio=run.ratio if slots else None, temperature=0.0,
                   budget=run.budget if run.ratio is None or not slots else None)  # fmt: skip


def evaluate(
    module: RowModel, loaded: Any, tasks: Sequence[Any], run: RunConfig, on: Sequence[str], grade: Grade, output: Path,
    together: int = 1, report: Callable[[str], None] = lambda _: None, ask: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Play and grade every held-out task on every backend, or read what an earlier start found.

    Every process of a run calls this: each plays its share of the tasks, and the first one grades them.

    Args:
        module: policy and method.
        loaded: the policy as a `LoadedModel`.
        tasks: held out.
        run: of the harness.
        on: backends.
        grade: of the evaluation.
        output: folder; `evaluation.json` is written last.
        together: runs at a time.
        report: told a line for each backend.
        ask: put the criteria's questions to the policy behind each boundary, for the ledger.

    Returns:
        For each backend `criteria` and `all_pass` with intervals, rollouts, unscored, failed (the window had no room
        for a turn), behaviour, ledger.

    Raises:
        ValueError: a run broke; it can be taken up again.
    """
    if agreed((output / DONE).is_file()):
        return json.loads((output / DONE).read_text(encoding="utf-8"))
    module.eval()
    found = {}
    rank, processes = world()
    sandbox, _ = sandbox_of(run)
    for backend in on if tasks else ():
        config = backend_config(run, backend)
        policy = LocalPolicy(loaded, run.window)
        method = module.method if backend in ("kv", "hybrid") else None
        play = {"method": method, "together": together, "watch": watcher(ask), "sandbox": sandbox}
        if processes > 1:
            play_tasks(tasks, policy, config, output / backend, **play, share=world())
            barrier()
        if rank:
            continue
        outcomes = play_tasks(tasks, policy, config, output / backend, **play)
        broken = [o for o in outcomes if o.status == "failed" and not o.reason.startswith(NoRoom.__name__)]
        if broken:
            raise ValueError(
                f"{len(broken)} of {len(outcomes)} runs of the hold-out broke, first {broken[0].folder}: "
                f"{broken[0].reason}; run the same command to take them up again"
            )
        ended = {outcome.task: outcome.folder for outcome in outcomes if outcome.status != "failed"}
        graded = [(task, ended[task.id]) for task in tasks if task.id in ended]
        scored = grade_runs(grade, graded)
        found[backend] = {
            **rates([task for task, _ in graded], scored), "failed": len(tasks) - len(graded),
            "behaviour": mean_behaviour([read_run(folder) for _, folder in graded]), "config": asdict(config),
            "ledger": numbers([task for task, _ in graded], [folder for _, folder in graded]),
        }  # fmt: skip
        rate = found[backend]["criteria"]
        report(f"{backend}: criterion pass {100 * rate['estimate']:.1f} %" if rate else f"{backend}: nothing scored")
    if not rank:
        write_atomically(output / DONE, json.dumps(found, indent=2).encode() + b"\n")
    barrier()
    return json.loads((output / DONE).read_text(encoding="utf-8"))
