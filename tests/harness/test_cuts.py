"""Micro-batches are the best cut of a step's rows, and processes have as little to do as the busiest one must."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from still.harness.trainers.cuts import Cuts
from still.harness.trainers.openings import LEAST, shared


def rows(seed: int) -> list[list[int]]:
    """Nine rows of three groups, which begin alike for a while; in order."""
    draw = random.Random(seed)
    system = [draw.randrange(9) for _ in range(50)]
    found = []
    for _ in range(3):
        task = system + [draw.randrange(9) for _ in range(draw.randrange(1, 150))]
        found += [task + [draw.randrange(9) for _ in range(draw.randrange(1, 120))] for _ in range(3)]
    return sorted(found)


def computed(batch: list[list[int]], sharing: bool, packing: bool) -> int:
    once = shared(batch) if sharing else 0
    own = [len(row) - once for row in batch]
    return once + (sum(own) if packing else len(own) * max(own))


def cuts_of(start: int, stop: int):
    """Every way to cut a run of rows."""
    for parts in range(stop - start):
        for inner in combinations(range(start + 1, stop), parts):
            ends = [start, *inner, stop]
            yield [slice(*pair) for pair in pairwise(ends)]


def cost(every, cut, most: int, **how) -> float:
    """Tokens of a cut, and what its forwards are worth; without end where a batch is too large."""
    sizes = [computed(every[at], **how) for at in cut]
    fits = all(size <= most or at.stop - at.start == 1 for size, at in zip(sizes, cut, strict=True))
    return sum(sizes) + LEAST * len(cut) if fits else float("inf")


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_cut_computes_less(seed, sharing, packing):
    every, how = rows(seed), {"sharing": sharing, "packing": packing}
    for most in (1, 300, 500, 10_000):
        cuts = Cuts(every, most, **how)
        best = cuts.batches(0, len(every))
        assert [place for at in best for place in range(at.start, at.stop)] == list(range(len(every)))
        assert cost(every, best, most, **how) == min(cost(every, cut, most, **how) for cut in cuts_of(0, len(every)))


@pytest.mark.parametrize("seed", range(3))
def test_no_other_division_spares_the_busiest_process(seed):
    every, how = rows(seed), {"sharing": True, "packing": True}
    cuts = Cuts(every, 500, **how)

    def busiest(parts) -> float:
        return max(cost(every, cuts.batches(at.start, at.stop), 500, **how) for at in parts)

    for world in (1, 2, 3, 5):
        parts = cuts.divided(world)
        assert len(parts) == world
        assert parts[0][0] == 0
        assert parts[-1][1] == len(every)
        assert all(one[1] == after[0] for one, after in pairwise(parts))
        least = min(busiest(cut) for cut in cuts_of(0, len(every)) if len(cut) <= world)
        assert busiest(slice(*part) for part in parts if part[0] < part[1]) == least


def test_processes_without_rows_get_none():
    assert Cuts(rows(0)[:2], 500, True, True).divided(4)[2:] == [(2, 2), (2, 2)]
    assert Cuts([], 500, True, True).divided(2) == [(0, 0), (0, 0)]
    assert Cuts([], 500, True, True).batches(0, 0) == []
