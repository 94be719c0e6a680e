"""What both trainers begin with: the module that trains, and a folder that holds this run and no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from ...methods.base import Method
from ...weights import sample
from ..backends.slots import fingerprint
from ..runs import write_atomically
from .config import TrainSettings
from .loop import world
from .model import RowModel
from .weights import add_adapter


def join_processes(cpu: bool) -> None:
    """Make this process one of its group, where there are several, before any of them waits for another."""
    if world()[1] > 1:
        from accelerate import PartialState

        PartialState(cpu=cpu, timeout=timedelta(days=7))  # the others wait while one collects


def keep_apart(tasks: Sequence[Any], held_out: Sequence[Any]) -> None:
    """Refuse a task that is trained on and held out, under whatever id: two sets of one maker share their ids.

    Raises:
        ValueError: instructions and criteria of a task are in both sets.
    """

    def content(task: Any) -> tuple:
        return task.instructions, *(each.rubric_hash for each in task.criteria)

    trained = {content(task): task.id for task in tasks}
    for task in held_out:
        if content(task) in trained:
            raise ValueError(f"{task.id} is trained on and held out; keep the two apart")


def content_of(tasks: Sequence[Any]) -> str:
    """A digest of what tasks ask and how that is graded, in their order."""
    return hashlib.sha256("\n".join(task.digest for task in tasks).encode()).hexdigest()[:16]


def make_module(loaded: Any, method: Any, settings: TrainSettings, **more: Any) -> tuple[RowModel, Any]:
    """The module that trains, and the policy as it then is.

    Args:
        loaded: a `LoadedModel`.
        method: for backends with slots, or None.
        settings: what trains.
        more: arguments of `RowModel`.

    Raises:
        ValueError: what trains is no fp32.
    """
    model = loaded.model
    if settings.train_policy == "lora":
        model = add_adapter(model, settings.lora_rank, settings.train_seed)
        loaded = replace(loaded, model=model)
    else:
        model.requires_grad_(settings.train_policy == "full")
    narrow = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad} - {"float32"}
    if narrow:
        raise ValueError(
            f"weights of {loaded.name} would train in {', '.join(sorted(narrow))}, where steps of a usual learning "
            f"rate round to nothing: take --dtype float32 (with --trainer.bf16 true it computes in bf16), or "
            f"--train-policy lora"
        )
    module = RowModel(
        model, method, compactor=settings.compactor_mode, memo_weight=settings.memo_weight,
        distill_weight=settings.distill_weight, **more,
    )  # fmt: skip
    if settings.checkpointing:
        module.checkpoint_activations()
    return module.eval(), loaded


def begun_with(
    tasks: Sequence[Any], held_out: Sequence[Any], loaded: Any, method: Method | None, options: dict[str, Any] | None,
    named: Mapping[str, str] | None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """What a run begins with besides its settings, so that it does not go on with others: tasks, weights, options.

    Args:
        tasks: to train on.
        held_out: to evaluate on.
        loaded: the policy as a `LoadedModel`, untrained.
        method: for backends with slots.
        options: further arguments of the library trainer.
        named: the teacher and the judges, which are handed in made, by their names.
    """
    weights = {"policy": sample(loaded.model), "dtype": str(loaded.model.dtype), "compactor": fingerprint(method)}
    content = {"train": content_of(tasks), "held_out": content_of(held_out)}
    return {"tasks": content, "weights": weights, "trainer": {"options": options or {}}, "named": dict(named or {})}


FREE = {"save_every", "keep", "rounds", "micro_tokens", "checkpointing", "max_tokens"}
"""Settings that may change between a run and its continuation: they change no step (how its gradient is computed, or
what is refused before it), or say only how many follow."""


def claim_output(output: Path, name: str, settings: dict[str, dict], model: str, made_by: dict[str, Any]) -> None:
    """Write the run's settings into its folder, or check that they are those of the run in it.

    Parts that an older run did not write down are not compared.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    path = Path(output) / name
    ours = json.loads(json.dumps({"model": model, **settings}))
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))["settings"]
        changed = sorted(
            f"{part}.{key}" for part, values in ours.items() if isinstance(values, dict) and part in there
            for key in values if key not in FREE and there[part].get(key) != values[key]
        )  # fmt: skip
        if changed or there.get("model") != model:
            raise ValueError(f"{output} holds a run with another {', '.join(changed) or 'model'}: give another folder")
        return
    write_atomically(path, json.dumps({"settings": ours, "provenance": made_by}, indent=2).encode() + b"\n")
