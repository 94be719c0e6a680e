"""Where a step's rows are cut into micro-batches, and which of them each process computes.

Rows in an order in which those that begin alike stand side by side are cut where the tokens that are computed are
fewest: every row's own, and once for each batch what all of its rows begin with. Any batch is a run of neighbours, so
the best cut is found exactly, row by row (dynamic programming). Processes get runs of neighbours too, whose largest
cost is as small as it can be (a linear partition): what is shared on one device stays shared on several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise, takewhile

from .openings import LEAST, in_common


class Cuts:
    """Of rows in a given order.

    Args:
        rows: token ids of each.
        most: tokens that a batch computes; a row of more is a batch of its own.
        sharing: what rows of a batch begin with is computed once.
        packing: rows stand one behind the other; else they are padded to the longest of their batch.
    """

    def __init__(self, rows: Sequence[Sequence[int]], most: int, sharing: bool, packing: bool):
        self.lengths, self.most, self.packing = [len(row) for row in rows], most, packing
        self.common = [in_common(*pair) if sharing else 0 for pair in pairwise(rows)]

    def _best(self, start: int) -> Iterator[tuple[int, int]]:
        """For each stop behind `start`: what the rows up to it cost in their best cut, in tokens with `LEAST` for each
        batch, and where the last batch of that cut begins."""
        best = [0]
        for stop in range(start + 1, len(self.lengths) + 1):
            found: list[tuple[int, int]] = []
            total = longest = common = 0
            for first in reversed(range(start, stop)):
                rows, length = stop - first, self.lengths[first]
                total, longest = total + length, max(longest, length)
                common = min(common, self.common[first]) if rows > 1 else length
                once = common if common >= LEAST else 0
                tokens = total - (rows - 1) * once if self.packing else once + rows * (longest - once)
                if rows > 1 and tokens > self.most:
                    break
                found.append((best[first - start] + tokens + LEAST, first))
            least = min(found)
            best.append(least[0])
            yield least

    def batches(self, start: int, stop: int) -> list[slice]:
        """The best cut of rows `start` to `stop`."""
        firsts = [first for _, first in islice(self._best(start), stop - start)]
        found: list[slice] = []
        while stop > start:
            found.append(slice(firsts[stop - start - 1], stop))
            stop = found[-1].start
        return found[::-1]

    def divided(self, world: int) -> list[tuple[int, int]]:
        """Start and stop of each process's rows; where there are too few, the last ones get none."""
        every = len(self.lengths)
        high = max((cost for cost, _ in self._best(0)), default=0)  # of all rows
        low, parts = -(-high // world), [(0, every)] if every else []
        while low < high:
            middle = (low + high) // 2
            found = self._within(middle, world)
            if found is None:
                low = middle + 1
            else:
                high, parts = middle, found
        return parts + [(every, every)] * (world - len(parts))

    def _within(self, most: int, world: int) -> list[tuple[int, int]] | None:
        """As few processes' rows as cost no more than so much each; None where they are more than `world`."""
        parts, start, every = [], 0, len(self.lengths)
        while start < every:
            costs = (cost for cost, _ in self._best(start))
            rows = sum(1 for _ in takewhile(lambda cost: cost <= most, costs))
            if not rows or len(parts) == world:
                return None
            parts.append((start, start + rows))
            start += rows
        return parts
