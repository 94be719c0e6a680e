"""Checkpoint folders that are whole: a marker, written last, lists every file with its size."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

from .journal import write_atomically

log = logging.getLogger(__name__)
MARKER = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


def mark_complete(folder: str | Path, step: int) -> None:
    """Say that a checkpoint is whole; call it after every other file is written."""
    folder = Path(folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = path.stat().st_size
    write_atomically(folder / MARKER, json.dumps({"step": step, "files": files}, indent=2) + "\n")


def is_complete(folder: str | Path) -> bool:
    """Whether a checkpoint has its marker and every file at the size that the marker says."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def checkpoints(output: str | Path) -> list[Path]:
    """Checkpoint folders, whole or not, by step."""
    found = [path for path in Path(output).glob("checkpoint-*") if path.is_dir() and _NAME.search(path.name)]
    return sorted(found, key=step_of)


def step_of(folder: str | Path) -> int:
    """The step at which a checkpoint was taken, by its name."""
    return int(_NAME.search(Path(folder).name)[1])


def newest_complete(output: str | Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next((path for path in reversed(checkpoints(output)) if is_complete(path)), None)


def remove_incomplete(output: str | Path) -> list[Path]:
    """Delete checkpoints that a kill left half written, so that they do not count among the kept ones."""
    broken = [path for path in checkpoints(output) if not is_complete(path)]
    for path in broken:
        shutil.rmtree(path)
    return broken


def take_up(trainer) -> Path | None:
    """The checkpoint that a run goes on from; half-written ones, and metrics after it, are gone when this returns.

    Args:
        trainer: a `transformers.Trainer` with a `metrics_file`; every process calls this.
    """
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        for broken in remove_incomplete(folder):
            log.warning("%s is half written; it was removed", broken)
    trainer.accelerator.wait_for_everyone()
    checkpoint = newest_complete(folder)
    if trainer.is_world_process_zero():
        trainer.metrics_file.forget_after(step_of(checkpoint) if checkpoint else 0)
    return checkpoint
