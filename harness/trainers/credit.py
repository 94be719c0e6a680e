"""Credit for single windows from what their boundaries hold: potential shaping, and the ledger of criteria. Pure.

Plain GRPO gives every window of a trajectory the trajectory's advantage. The credits here say more of where it was
earned (`lines` says it of single lines), and mix with it: `(1 - share) * plain + share * credit`. Even credit is the
plain advantage again, so that a share changes no scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, pstdev


@dataclass(frozen=True)
class Trajectory:
    """What credit needs of a rollout with M boundaries.

    Attributes:
        reward: of the rollout.
        held: criteria that are there behind each boundary, M sets of ids.
        potential: of each boundary, M numbers from 0 to 1; that of the start is 0.
        read: share of the documents that were read before each window begins, M + 1 numbers from 0.0 on.
        passed: criteria that its deliverables meet, by id; unscored ones left out.
    """

    reward: float
    held: Sequence[frozenset[str]]
    potential: Sequence[float]
    read: Sequence[float]
    passed: Mapping[str, bool]

    def __post_init__(self) -> None:
        if not len(self.held) == len(self.potential) == len(self.read) - 1:
            raise ValueError(
                f"{len(self.held)} boundaries have {len(self.potential)} potentials and begin {len(self.read)} windows"
            )

    @property
    def windows(self) -> int:
        """Windows, one more than boundaries."""
        return len(self.read)


def returns(reward: float, potential: Sequence[float], decay: float = 1.0) -> list[float]:
    """What each window still earns: decayed sums of the potential's steps, the last of which ends at the reward.

    With a decay of 1 they telescope to the reward minus the potential where the window began, which leaves the best
    policy as it is; smaller ones keep credit near where it was earned, at the price of bias.
    """
    states = [0.0, *potential, reward]
    steps = [after - before for before, after in pairwise(states)]
    found, ahead = [], 0.0
    for step in reversed(steps):
        ahead = step + decay * ahead
        found.append(ahead)
    return found[::-1]


def potential_credit(group: Mapping[str, Trajectory], decay: float = 1.0) -> dict[str, list[float]]:
    """Each window's return minus the group's mean return where as much of the matter was read.

    Of several windows that begin with the same share read, the first is held against the others' first, and so on.

    Args:
        group: scored trajectories of one task.
        decay: see `returns`.

    Returns:
        By trajectory, a number for each window.
    """
    earned = {name: returns(one.reward, one.potential, decay) for name, one in group.items()}

    def mean_at(share: float, rank: int) -> float:
        return fmean(earned[name][_window_at(one.read, share, rank)] for name, one in group.items())

    return {
        name: [
            value - mean_at(share, one.read[:number].count(share))
            for number, (value, share) in enumerate(zip(earned[name], one.read, strict=True))
        ]
        for name, one in group.items()
    }


def _window_at(read: Sequence[float], share: float, rank: int) -> int:
    """The window that is open when this share of the documents is read: of those that begin there the one of this
    rank, or the last."""
    begin = [number for number, start in enumerate(read) if start == share]
    if begin:
        return begin[min(rank, len(begin) - 1)]
    return max(number for number, start in enumerate(read) if start < share or not number)


def criterion_advantages(passed: Mapping[str, Mapping[str, bool]]) -> dict[str, dict[str, float]]:
    """Each criterion's own advantage: whether it passes, minus how often it does in the group.

    Args:
        passed: by trajectory of one task, criteria that its deliverables meet; unscored ones left out.

    Returns:
        By trajectory and criterion, numbers from -1 to 1; their mean is the rate's advantage where all are scored.
    """
    rates = {
        criterion: fmean(one[criterion] for one in passed.values() if criterion in one)
        for criterion in {name for one in passed.values() for name in one}
    }
    return {
        name: {criterion: met - rates[criterion] for criterion, met in one.items()} for name, one in passed.items()
    }


def ledger_credit(group: Mapping[str, Trajectory]) -> dict[str, list[float]]:
    """Each criterion's own advantage, given to the windows that earned or lost it.

    Passed: half to the window that acquired it, half to the last, which drafts. Failed, and acquired before: to the
    window whose boundary lost it, or to the last where it was still there. Failed and never acquired: to all alike.

    Args:
        group: scored trajectories of one task.

    Returns:
        By trajectory, a number for each window; their mean is the trajectory's share of passed criteria against the
        group's, criterion by criterion.
    """
    own = criterion_advantages({name: one.passed for name, one in group.items()})
    found = {}
    for name, one in group.items():
        credit = [0.0] * one.windows
        for criterion, advantage in own[name].items():
            for window, part in _responsible(one, criterion).items():
                credit[window] += part * advantage / len(one.passed) * one.windows
        found[name] = credit
    return found


def _responsible(one: Trajectory, criterion: str) -> dict[int, float]:
    """The windows that a criterion's advantage goes to, with their shares."""
    last = one.windows - 1
    there = [criterion in held for held in one.held]
    acquired = there.index(True) if any(there) else None
    if one.passed[criterion]:
        return {last: 1.0} if acquired is None else {acquired: 0.5, last: 0.5}
    if acquired is None:
        return dict.fromkeys(range(one.windows), 1 / one.windows)
    if there[-1]:
        return {last: 1.0}
    return {max(n for n in range(1, len(there)) if there[n - 1] and not there[n]): 1.0}


def mixed(plain: float, credit: Sequence[float], share: float) -> list[float]:
    """The advantage of each window.

    Raises:
        ValueError: the share is none.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must lie between 0 and 1")
    return [(1 - share) * plain + share * each for each in credit]


def correlation(trajectories: Sequence[Trajectory]) -> float | None:
    """How far the last potential foretells the reward: potentials under 0.3 say little. None where nothing varies."""
    pairs = [(one.potential[-1], one.reward) for one in trajectories if one.potential]
    if len(pairs) < 2 or not all(pstdev(side) for side in zip(*pairs, strict=True)):
        return None
    (a, b), n = zip(*pairs, strict=True), len(pairs)
    return sum((x - fmean(a)) * (y - fmean(b)) for x, y in pairs) / n / (pstdev(a) * pstdev(b))
