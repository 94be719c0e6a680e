"""An optimizer step as a set of trajectories: who gets which rows, and in which micro-batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from torch.utils.data import IterableDataset

from ..windows import IGNORE, KINDS, WindowRow, by_trajectory
from .cuts import Cuts
from .losses import Counted, row_scales
from .model import Share


class StepSource(Protocol):
    """Gives each step its rows; the same in every process."""

    def step(self, number: int) -> list[Share]:
        """All shares of step `number`, counted from 0."""


def shares_of(
    rows: Sequence[WindowRow], normaliser: str, constant: float, memo_weight: float,
    advantage: Callable[[WindowRow], float | Sequence[float]] | None = None,
) -> list[Share]:  # fmt: skip
    """Rows with their scales, and their advantages where there are any.

    Without them the loss is a likelihood: of the model's own probabilities, whatever the rows were sampled at.
    """
    if advantage is None:
        rows = [replace(row, temperature=1.0) for row in rows]
    counted = [Counted(row.trajectory_id, _weighed(row, memo_weight)) for row in rows]
    scales = row_scales(counted, normaliser, constant)
    return [
        Share(row, scale, None if advantage is None else advantage(row))
        for row, scale in zip(rows, scales, strict=True)
    ]


def _weighed(row: WindowRow, memo_weight: float) -> float:
    kinds = [kind for kind, label in zip(row.token_kind, row.labels, strict=True) if label != IGNORE]
    memo = kinds.count(KINDS["memo"])
    return row.weight * (len(kinds) - memo + memo_weight * memo)


class RowSource:
    """Steps over fixed rows: trajectories in a seeded order, `batch` a step, epoch after epoch.

    Args:
        rows: to train on.
        batch: trajectories in a step.
        settings: normaliser, constant, memo_weight.
        seed: of the order.
    """

    def __init__(self, rows: Sequence[WindowRow], batch: int, settings, seed: int):
        self.groups, self.batch, self.settings, self.seed = by_trajectory(rows), batch, settings, seed

    def steps(self, epochs: int) -> int:
        """Steps of so many epochs; the last step of an epoch may be smaller."""
        return epochs * self._per_epoch

    @property
    def _per_epoch(self) -> int:
        return -(-len(self.groups) // self.batch)

    def step(self, number: int) -> list[Share]:
        """The shares of a step."""
        epoch, place = divmod(number, self._per_epoch)
        order = sorted(self.groups)
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        names = order[place * self.batch : (place + 1) * self.batch]
        settings = self.settings
        rows = [row for name in names for row in self.groups[name]]
        return shares_of(rows, settings.normaliser, settings.constant, settings.memo_weight)


def own_batches(
    shares: Sequence[Share], rank: int, world: int, micro_tokens: int, sharing: bool = False, packing: bool = True
) -> list[list[Share]]:
    """The micro-batches of one process, each process with as much to compute as the others.

    Text rows that begin alike stand together, or (nothing shared) those of one length, cut where least is computed in
    all. Rows behind slots stand beside those behind the same: what a batch's prefixes have in common, as those of a
    group's rollouts do, is made once. A process without rows gets one that counts nothing, so that all take part in the
    step.

    Args:
        shares: of the step.
        rank: of the process.
        world: processes.
        micro_tokens: that a batch computes, prefixes left out; a row of more is a batch of its own.
        sharing: what text rows of a batch begin with is computed once.
        packing: text rows stand one behind the other; else they are padded to the longest of their batch.
    """

    def cut(order: Sequence[Share], *how: bool) -> list[list[Share]]:
        cuts = Cuts([share.row.input_ids for share in order], micro_tokens, *how)
        return [list(order[at]) for at in cuts.batches(*cuts.divided(world)[rank])]

    text = [share for share in shares if not share.row.prefix_plan]
    behind = [share for share in shares if share.row.prefix_plan]
    text.sort(key=(lambda share: share.row.input_ids) if sharing else (lambda share: -len(share.row.input_ids)))
    behind.sort(key=lambda share: (share.row.prefix_ids, str(share.row.prefix_plan)))
    mine = cut(text, sharing, packing) + cut(behind, False, True)
    return mine or [[Share(shares[0].row, 0.0, shares[0].advantage, shares[0].reference)]]


class StepStream(IterableDataset):
    """The micro-batches of one process, step after step; a step is made when it is asked for, not before.

    Args:
        source: of the steps.
        start: first step.
        stop: the step after the last.
        rank: of this process.
        world: processes.
        micro_tokens: see `own_batches`.
        sharing: likewise.
        packing: likewise.
        ready: called before each step is made.
    """

    def __init__(
        self, source: StepSource, start: int, stop: int, rank: int, world: int, micro_tokens: int,
        sharing: bool = False, packing: bool = True, ready: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.source, self.start, self.stop = source, start, stop
        self.share = {
            "rank": rank, "world": world, "micro_tokens": micro_tokens, "sharing": sharing, "packing": packing,
        }  # fmt: skip
        self.ready = ready

    def __iter__(self) -> Iterator[list[list[Share]]]:
        for number in range(self.start, self.stop):
            self.ready()
            yield own_batches(self.source.step(number), **self.share)
