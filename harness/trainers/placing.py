"""Where slots should stand, learnt from rollouts: the placement of a compactor is fitted to what an agent looks at.

No loss of a rollout reaches a placement, since a choice passes no gradient on; and one that was fitted to other wording
misplaces slots, whatever else is trained. So it is fitted by itself (`still.distill.placing`), before the steps, to
the windows of rollouts and the frozen full cache's attention from what the agent did after them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ...distill.placing import Asked, fit_placement
from ..runs import write_atomically
from ..windows import IGNORE, WindowRow, by_trajectory
from .config import TrainSettings
from .loop import barrier, world
from .model import RowModel
from .weights import load_compactor

STEPS, TOKENS = 500, 2048
"""Of the first look, and drawn in each: fewer than for a fresh placement, since this one has only to learn other
wording. On windows of 60 rollouts that it was not fitted to it is as good as with 700 and 4096."""

DONE = "complete.json"


def asked_of(row: WindowRow) -> Iterator[Asked]:
    """Each window before a row that becomes slots, with the row's sampled tokens as what is asked of it."""
    before = len(row.prefix_ids)
    asked = [before + place - 1 for place, label in enumerate(row.labels) if label != IGNORE]
    for step in row.prefix_plan:
        if asked and step["keep"] in ("append", "recompact"):
            yield Asked([*row.prefix_ids, *row.input_ids], (step["start"], step["end"]), asked)


def windows_of(rows: Sequence[WindowRow], rollouts: int, seed: int) -> list[Asked]:
    """Windows of some rollouts, asked by what the agent did at the end of each.

    Args:
        rows: of any rollouts; only the last window of each counts, behind slots, which has all others before it.
        rollouts: at most so many, drawn.
        seed: of the draw.
    """
    rng = random.Random(f"placement {seed}")
    last = [group[-1] for _, group in sorted(by_trajectory(rows).items()) if group[-1].prefix_plan]
    return [text for row in rng.sample(last, min(rollouts, len(last))) for text in asked_of(row)]


@contextmanager
def all_cores() -> Iterator[None]:
    """The threads of all processes for this one, while the others wait for it."""
    own = torch.get_num_threads()
    torch.set_num_threads(max(own, min(own * world()[1], os.cpu_count() or 1)))
    try:
        yield
    finally:
        torch.set_num_threads(own)


def is_placed(folder: Path) -> bool:
    """Whether `place` has ended there."""
    return (folder / DONE).is_file()


def place(module: RowModel, rows: Sequence[WindowRow], folder: Path, settings: TrainSettings) -> None:
    """Fit the placement of a module's compactor to the windows of rollouts, or take up what an earlier start fitted.

    A split that the module's method has stays as it is: rows say how many slots each window had.

    Args:
        module: policy and compactor.
        rows: of the rollouts.
        folder: where the compactor is kept, and `complete.json`, written last.
        settings: with `place`, rollouts at most, and the seed.

    Raises:
        ValueError: the compactor has no placement, or no rollout has a window that became slots.
    """
    if not is_placed(folder) and world()[0] == 0:
        if not module.compactor.config.placement:
            raise ValueError(
                f"place is {settings.place}, but this compactor spreads its latents evenly: leave it 0, or train one "
                f"with a placement"
            )
        texts = windows_of(rows, settings.place, settings.train_seed)
        if not texts:
            raise ValueError(
                f"place is {settings.place}, but none of the {len(rows)} rows goes on behind slots: take --backend kv "
                f"or hybrid, and windows that end"
            )
        with torch.random.fork_rng(devices=[]), all_cores():  # the steps' draws are the same, fitted now or before
            module.eval()
            fit_placement(
                module.compactor, module.policy, texts, settings.train_seed, STEPS, TOKENS, progress=False
            )
        module.compactor.save_pretrained(folder)
        write_atomically(folder / DONE, b"{}\n")
    barrier()
    load_compactor(module, folder)
