"""What both trainers refuse at the start, before anything is played or written, and what they refuse to train on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...distill.trainer import check_options
from .. import backends
from ..policies.local import LocalPolicy
from ..run_config import RunConfig
from ..windows import SLOTS, WindowRow
from .config import TrainSettings, check_backends
from .evaluate import backend_config
from .loop import OWN
from .prefix import check_replay
from .setup import keep_apart

COMPACTED = ("kv", "hybrid")
"""Backends whose slots a method makes."""


def check_start(
    tasks: Sequence[Any], held_out: Sequence[Any], loaded: Any, run: RunConfig, settings: TrainSettings,
    on: Sequence[str], method: Any, together: int, options: Iterable[str],
) -> None:  # fmt: skip
    """Refuse what would be refused later, with hours of rollouts behind it.

    Args:
        tasks: to train on.
        held_out: to evaluate on.
        loaded: the policy as a `LoadedModel`.
        run: of the harness.
        settings: of the training.
        on: backends of the evaluation.
        method: for backends with slots.
        together: rollouts at a time.
        options: names of further arguments of the library trainer.

    Raises:
        ValueError: a task is in both sets, the run or the hold-out cannot be played on a backend, rows would have no
            slots for a compactor to learn from or are behind slots that checkpointing cannot serve, or a value is out
            of range.
    """
    keep_apart(tasks, held_out)
    if together < 1:
        raise ValueError(f"together is {together}; it must be 1 or more")
    check_options(options, OWN)
    check_slots(run, settings, loaded)
    check_backends(on)
    if run.backend in COMPACTED:  # where a teacher plays, no backend of the run's own would say so before rows train
        backends.make(run, LocalPolicy(loaded, run.window), method)
    for name in on if held_out else ():
        policy = LocalPolicy(loaded, run.window)
        backends.make(backend_config(run, name), policy, method if name in COMPACTED else None, held_out[0])


def check_slots(run: RunConfig, settings: TrainSettings, loaded: Any) -> None:
    """Refuse a compactor that no slots would teach, and slots that checkpointing cannot serve.

    Raises:
        ValueError: says which.
    """
    if settings.compactor_mode != "frozen" and run.backend not in COMPACTED:
        raise ValueError(
            f"compactor_mode is {settings.compactor_mode}, but with backend {run.backend} no compactor makes anything "
            f"that it could learn from: take --backend kv or hybrid, or --compactor-mode frozen"
        )
    if settings.checkpointing and run.backend in SLOTS:
        check_replay(loaded.model)


def check_learns(rows: Sequence[WindowRow], settings: TrainSettings, what: str) -> None:
    """Refuse rows that would move nothing.

    Args:
        rows: to train on.
        settings: what trains.
        what: they are of, for the message.

    Raises:
        ValueError: no token is trained, or the compactor alone trains and no row goes on behind slots.
    """
    if not sum(row.trained for row in rows):
        raise ValueError(f"{what} has no trained token in {len(rows)} rows: look at its rollouts")
    if settings.train_policy == "frozen" and not any(row.prefix_plan for row in rows):
        raise ValueError(
            f"none of the {len(rows)} rows of {what} goes on behind slots, and the policy is frozen: nothing would "
            f"train; let rollouts cross a boundary, with a lower --reads or a smaller --window"
        )
