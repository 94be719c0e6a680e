"""Which contexts a training step sees: a draw of length and ratio, rows that fit it, and the batch made of them.

Everything is a function of the seed and the step, never of a generator's state: every process draws the same, and a
resumed run goes on with the batches that an uninterrupted one would have had.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..budgets import Split, slots_for
from .data import Row, RowError, collate


@dataclass(frozen=True)
class Draw:
    """What one optimizer step trains.

    Attributes:
        step: counted from 0.
        length: contexts have at most this many tokens.
        ratio: tokens per slot.
    """

    step: int
    length: int
    ratio: float


class Draws:
    """The `(length, ratio)` of every step, the same on every process.

    Args:
        seed: of all draws.
        lengths: context lengths, ascending.
        ratios: compression ratios.
        weights: how often each length is drawn, relative to the others; default: equally often.
    """

    def __init__(
        self, seed: int, lengths: Sequence[int], ratios: Sequence[float], weights: Sequence[float] | None = None
    ):
        self.seed, self.lengths, self.ratios = seed, list(lengths), list(ratios)
        self.weights = None if weights is None else list(weights)

    def at(self, step: int) -> Draw:
        """The draw of a step."""
        rng = random.Random(f"{self.seed}:{step}")
        (length,) = rng.choices(self.lengths, self.weights)
        return Draw(step, length, rng.choice(self.ratios))

    def placing(self, number: int) -> Draw:
        """A draw of contexts for a placement to learn from: the step's own, as a rule."""
        return self.at(number)


class RowSource(Protocol):
    """Gives the rows of a step. Contexts may be made on the fly.

    Attributes:
        draws: the `(length, ratio)` of every step.
    """

    draws: Draws

    def rows(self, draw: Draw, count: int, part: range) -> Sequence[Row]:
        """Rows number `part` of the `count` contexts of this step, none longer than `draw.length`.

        The same arguments give the same rows, whatever was asked before.
        """


def bucket_lengths(tokens: Iterable[int]) -> list[int]:
    """Powers of two that cover contexts of these lengths; the last is the longest context itself."""
    tokens = sorted(tokens)
    powers = [1 << power for power in range(7, 31) if 1 << power < tokens[-1] and (1 << power) >= tokens[0]]
    return [*powers, tokens[-1]]


class DatasetRows:
    """Rows of a dataset, by length, each length in an order of its own that is shuffled anew when it is used up.

    Args:
        rows: all rows to train on.
        lengths: a row goes to the first length that holds it; longer rows are left out.
        ratios: compression ratios.
        seed: of the draws and the orders.

    Attributes:
        draws: the draws of the run; a length is drawn as often as it has rows.
        left_out: rows longer than every length.

    Raises:
        RowError: no row fits any length.
    """

    def __init__(self, rows: Sequence[Row], lengths: Sequence[int], ratios: Sequence[float], seed: int):
        self.seed, lengths = seed, sorted(lengths)
        self._buckets: dict[int, list[Row]] = {}
        for row in rows:
            place = bisect_left(lengths, row.tokens)
            if place < len(lengths):
                self._buckets.setdefault(lengths[place], []).append(row)
        self.left_out = len(rows) - sum(map(len, self._buckets.values()))
        if not self._buckets:
            shortest = min((row.tokens for row in rows), default=0)
            raise RowError(f"none of {len(rows)} rows fits the lengths {lengths}; the shortest has {shortest} tokens")
        used = sorted(self._buckets)
        self.draws = Draws(seed, used, ratios, [len(self._buckets[length]) for length in used])
        self._uses = dict.fromkeys(used, 0)
        self._counted = 0

    def rows(self, draw: Draw, count: int, part: range) -> list[Row]:
        """See `RowSource.rows`; a step's rows are sorted by length, so that little is padded."""
        bucket = self._buckets[draw.length]
        start = self._earlier(draw) * count
        chosen = []
        for place in range(start, start + count):
            turn, index = divmod(place, len(bucket))
            chosen.append(bucket[self._order(draw.length, turn)[index]])
        chosen.sort(key=lambda row: row.tokens)
        return [chosen[index] for index in part]

    def _earlier(self, draw: Draw) -> int:
        """Steps before this one that drew the same length."""
        if draw.step < self._counted:
            self._uses, self._counted = dict.fromkeys(self._uses, 0), 0
        for step in range(self._counted, draw.step):
            self._uses[self.draws.at(step).length] += 1
        self._counted = draw.step
        return self._uses[draw.length]

    def _order(self, length: int, turn: int) -> list[int]:
        key = (length, turn)
        if getattr(self, "_known", (None, None))[0] != key:
            order = list(range(len(self._buckets[length])))
            random.Random(f"{self.seed}:{length}:{turn}").shuffle(order)
            self._known = (key, order)
        return self._known[1]


class IterableRows:
    """Rows from any iterable, taken in its order: each step takes the next ones that fit its length.

    Args:
        rows: iterable that gives the same rows each time it is started, say a generator function's `IterableDataset`.
        draws: the draws of the run; its lengths sort the rows.
        patience: rows that may be read in vain while a step waits for its length.
    """

    def __init__(self, rows: Iterable[Row], draws: Draws, patience: int = 10_000):
        self.draws, self.patience = draws, patience
        self._rows = rows
        self._restart()

    def rows(self, draw: Draw, count: int, part: range) -> list[Row]:
        """See `RowSource.rows`. Steps that were skipped are read and thrown away."""
        if draw.step < self._next - 1:
            self._restart()
        while self._next <= draw.step:
            self._current = self._take(self.draws.at(self._next), count)
            self._next += 1
        return [self._current[index] for index in part]

    def _restart(self) -> None:
        self._stream, self._next = iter(self._rows), 0
        self._waiting: dict[int, list[Row]] = {length: [] for length in self.draws.lengths}
        self._current: list[Row] = []

    def _take(self, draw: Draw, count: int) -> list[Row]:
        queue, vain = self._waiting[draw.length], 0
        while len(queue) < count:
            row = next(self._stream, None)
            if row is None:
                raise RowError(f"the rows ended at step {draw.step}; give an endless iterable, or fewer steps")
            place = bisect_left(self.draws.lengths, row.tokens)
            if place < len(self.draws.lengths):
                self._waiting[self.draws.lengths[place]].append(row)
            vain = 0 if place < len(self.draws.lengths) and self.draws.lengths[place] == draw.length else vain + 1
            if vain > self.patience:
                raise RowError(f"none of {vain} rows in a row fits length {draw.length}; change the lengths")
        taken, self._waiting[draw.length] = queue[:count], queue[count:]
        return sorted(taken, key=lambda row: row.tokens)


class BatchStream(IterableDataset):
    """Batches for `Distiller.forward` from a step onwards, those of one process.

    Args:
        source: gives the draws and the rows.
        start: first optimizer step.
        batch: contexts in an optimizer step, over all processes.
        micro_batch: contexts in one batch here.
        rank: this process.
        world: processes.
        questions: questions asked of each context; 0 for all.
        pad_id: fills shorter rows.
        split: around which uneven steps draw theirs.
        uneven: share of the steps that draw one.
        crowd: share of the steps whose contexts crowd one another.
    """

    def __init__(
        self, source: RowSource, *, start: int, batch: int, micro_batch: int, rank: int = 0,
        world: int = 1, questions: int = 0, pad_id: int = 0, split: Split | None = None, uneven: float = 0.0,
        crowd: float = 0.0,
    ):  # fmt: skip
        if batch % (micro_batch * world):
            raise ValueError(
                f"batch is {batch}; it must be a multiple of micro_batch {micro_batch} times {world} process"
            )
        self.source, self.start = source, start
        self.batch, self.micro_batch, self.rank, self.world = batch, micro_batch, rank, world
        self.questions, self.pad_id = questions, pad_id
        self.split, self.uneven, self.crowd = split, uneven, crowd
        self.parts = batch // (micro_batch * world)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor | int | float]]:
        worker = get_worker_info()
        index, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        index += self.start * self.parts
        while True:
            step, part = divmod(index, self.parts)
            yield self.batch_of(self.source.draws.at(step), part)
            index += stride

    def batch_of(self, draw: Draw, part: int) -> dict[str, torch.Tensor | int | float]:
        """The batch number `part` of a step on this process."""
        first = (part * self.world + self.rank) * self.micro_batch
        rows = self.source.rows(draw, self.batch, range(first, first + self.micro_batch))
        batch = make_batch(rows, draw, self.source.draws.seed, self.questions, self.pad_id)
        if (split := self.split_of(draw)) is not None:
            batch["split"] = split
        if self._drawn("crowd", draw, self.crowd):
            batch["crowd"] = True
        return batch

    def split_of(self, draw: Draw) -> Split | None:
        """The split of a step, the same on every process; None for equal numbers."""
        if self.split is None or not self._drawn("uneven", draw, self.uneven):
            return None
        return self.split.drawn(f"{self.source.draws.seed}:{draw.step}")

    def _drawn(self, what: str, draw: Draw, share: float) -> bool:
        """Whether a step is one of this share of them, the same on every process."""
        return random.Random(f"{what} {self.source.draws.seed}:{draw.step}").random() < share


def make_batch(rows: Sequence[Row], draw: Draw, seed: int, questions: int = 0, pad_id: int = 0) -> dict:
    """Rows as tensors, with `slots`, and `ratio` and `length` of the draw for the log.

    The slots are those of the shortest row, so that no row gets more than its budget.
    """
    rng = random.Random(f"{seed}:{draw.step}:{rows[0].id}")
    batch = collate(rows, rng, questions, pad_id)
    batch["slots"] = slots_for(min(row.tokens for row in rows), draw.ratio)
    return {**batch, "ratio": draw.ratio, "length": draw.length}
