"""Which heads need slots: what answers lose as one head's context shrinks, and the split that follows from it.

For each full-attention layer and KV head, and at a few numbers of slots each, one forward over a calibration row's
questions and answers with that head alone compacted, by the method's own compaction. So the cost is linear in heads,
in levels and in tokens. The losses give a curve a head, and the curves an allocation: slots go where the next one
saves most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from tqdm.auto import tqdm

from .attention import attending
from .budgets import Split
from .calibration import CalibrationRow, Trial
from .compactor import fingerprint
from .methods.base import Method

MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Measurement:
    """What a calibration found.

    Attributes:
        split: the best mixture of the allocation with equal numbers.
        ratio: tokens per slot at which slots were allocated.
        losses: for each layer and KV head, by `"layer.head"`, points `(share of the tokens kept, KL in nats per answer
            token)`, from one averaged slot up to the whole context.
        mixes: KL at `ratio` with this share of the slots allocated by the losses and the rest equal.
        rows: calibration rows; `answer_tokens` in them.
        forwards: forwards over questions and answers.
    """

    split: Split
    ratio: float
    losses: dict[str, list[tuple[float, float]]]
    mixes: dict[float, float]
    rows: int
    answer_tokens: int
    forwards: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "split": self.split.to_dict()}


@torch.no_grad()
def measure_split(
    model,
    rows: Sequence[CalibrationRow],
    method: Method,
    *,
    ratio: float = 16.0,
    levels: Sequence[float] = (64.0, 16.0, 4.0),
    questions: int = 8,
    floor: int = 1,
    seed: int = 0,
    heads: Sequence[tuple[int, int]] | None = None,
    progress: bool = True,
) -> Measurement:
    """Measure what each head is worth, and divide the slots accordingly.

    Args:
        model: the frozen model.
        rows: calibration contexts with questions and answers; a few are enough.
        method: compacts a head at each level; `still` with a trained compactor, or one that needs no training.
        ratio: tokens per slot at which slots are allocated.
        levels: compression ratios of the measured head, the highest first, beside one averaged slot and the whole
            context.
        questions: questions asked of each row, drawn by the seed; 0 asks all.
        floor: slots that every head gets at least.
        seed: of the questions.
        heads: measure only these (layer, head) and give the others equal shares.
        progress: show a bar.

    Raises:
        ValueError: there is no row, or a ratio leaves less than the floor.
    """
    levels = sorted(levels, reverse=True)
    trial = Trial(model, rows, method, questions, seed)
    every = Split.uniform(trial.layers, trial.kv_heads).heads
    chosen = every if heads is None else list(heads)
    places = len(levels) + 1
    shares, losses = ({head: [0.0] * places for head in chosen} for _ in range(2))
    total = len(trial.rows) * (len(chosen) * (len(levels) + 1) + len(MIXES))
    with attending(model), tqdm(total=total, desc="heads", unit="forward", disable=not progress) as bar:
        for sitting in trial.sittings():
            for head, place, share, kl in sitting.reduced(chosen, levels, bar):
                shares[head][place] += share / len(trial.rows)
                losses[head][place] += kl / trial.answer_tokens
        curves = {head: [*zip(shares[head], losses[head], strict=True), (1.0, 0.0)] for head in chosen}
        split = replace(allocate(curves, 1 / ratio, every), floor=floor, fingerprint=fingerprint(model))
        uniform = Split.uniform(trial.layers, trial.kv_heads)
        candidates = {mix: replace(split.mixed(uniform, 1 - mix), source="measured", floor=floor) for mix in MIXES}
        mixes = dict(zip(candidates, trial.losses(list(candidates.values()), ratio, bar), strict=True))
    best = candidates[min(mixes, key=mixes.get)]
    named = {f"{layer}.{head}": points for (layer, head), points in curves.items()}
    return Measurement(best, ratio, named, mixes, len(trial.rows), trial.answer_tokens, trial.forwards)


@torch.no_grad()
def learn_split(
    model,
    rows: Sequence[CalibrationRow],
    method: Method,
    start: Split,
    *,
    ratio: float = 16.0,
    rounds: int = 3,
    step: float = 2.0,
    questions: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Split, list[float]]:
    """Descend on the KL of the whole split at `ratio`: head by head, more slots or fewer at the others' expense.

    Unlike `measure_split` this sees how heads stand in for one another, at two forwards a head, row and round.

    Args:
        start: where to begin.
        rounds: passes over all heads.
        step: factor by which a head's share is changed; its root after each pass.

    Returns:
        The split, and the KL in nats per answer token at the start and after each pass.
    """
    trial = Trial(model, rows, method, questions, seed)
    total = len(trial.rows) * (1 + rounds * 2 * len(start.heads))
    with attending(model), tqdm(total=total, desc="rounds", unit="forward", disable=not progress) as bar:
        best, trace = start, trial.losses([start], ratio, bar)
        for _ in range(rounds):
            tried = [_scaled(best, place, factor) for place in best.heads for factor in (step, 1 / step)]
            found = trial.losses(tried, ratio, bar)
            # All changes that help, each in proportion to what it saves, are tried at once and one by one.
            gains = [(trace[-1] - kl, split) for kl, split in zip(found, tried, strict=True) if kl < trace[-1]]
            if not gains:
                trace.append(trace[-1])
                step **= 0.5
                continue
            together = best
            for gain, split in gains:
                together = _towards(together, best, split, gain / max(gain for gain, _ in gains))
            bar.total += len(trial.rows)
            (joint,) = trial.losses([together], ratio, bar)
            alone = max(gains, key=lambda item: item[0])
            best, kl = (together, joint) if joint <= trace[-1] - alone[0] else (alone[1], trace[-1] - alone[0])
            trace.append(kl)
            step **= 0.5
    return replace(best, source="learned"), trace


def allocate(
    curves: dict[tuple[int, int], Sequence[tuple[float, float]]], share: float, heads: Sequence[tuple[int, int]]
) -> Split:
    """The split of a mean `share` of the tokens that loses least, on the lower convex hull of each head's curve.

    Args:
        curves: for each (layer, head) points `(share of the tokens kept, loss)`, ascending. Heads without a curve get
            the mean share.
        share: of the tokens that the average head keeps.
        heads: every (layer, head).
    """
    given = {head: points[0][0] for head, points in curves.items()}
    steps = []
    for head, points in curves.items():
        for (left, loss), (right, less) in pairwise(_hull(points)):
            steps.append(((less - loss) / (right - left), head, right - left))
    left = share * len(curves) - sum(given.values())
    for slope, head, width in sorted(steps):
        if left <= 0 or slope >= 0:
            break
        given[head] += min(width, left)
        left -= min(width, left)
    rest = max(left, 0.0) / max(1, len(curves))  # where more slots save nothing, they are shared out
    weights: dict[int, tuple[float, ...]] = {}
    for layer, head in heads:
        weights[layer] = (*weights.get(layer, ()), given.get((layer, head), share - rest) + rest)
    return Split(weights, source="measured")


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of points with ascending x."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def _scaled(split: Split, place: tuple[int, int], factor: float) -> Split:
    """The split with one head's share times `factor`, all shares brought back to a sum of 1."""
    shares = {at: split.weights[at[0]][at[1]] * (factor if at == place else 1) for at in split.heads}
    total = sum(shares.values())
    return replace(split, weights=_table({at: share / total for at, share in shares.items()}))


def _towards(split: Split, base: Split, target: Split, part: float) -> Split:
    """`split`, changed by a part of what changes `base` into `target`, in logarithms."""
    shares = {}
    for layer, head in split.heads:
        was, wanted = (max(x.weights[layer][head], 1e-9) for x in (base, target))
        shares[layer, head] = max(split.weights[layer][head], 1e-9) * (wanted / was) ** part
    total = sum(shares.values())
    return replace(split, weights=_table({at: share / total for at, share in shares.items()}))


def _table(shares: dict[tuple[int, int], float]) -> dict[int, tuple[float, ...]]:
    table: dict[int, tuple[float, ...]] = {}
    for (layer, _), share in sorted(shares.items()):
        table[layer] = (*table.get(layer, ()), share)
    return table
