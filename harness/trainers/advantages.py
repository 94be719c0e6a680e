"""Advantages of trajectories against their group, once for each rollout whatever number of windows it has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean, pstdev

TINY = 1e-8
"""Spread of rewards below which a group says nothing."""


@dataclass(frozen=True)
class Advantages:
    """What a step's rewards amount to.

    Attributes:
        of: advantage by trajectory; those of dropped groups and unscored ones are not in it.
        dropped: groups without variance.
        kept: groups that train.
        unscored: trajectories without a reward.
        lone: groups with fewer than two scored trajectories, dropped too.
    """

    of: dict[str, float]
    dropped: tuple[str, ...]
    kept: tuple[str, ...]
    unscored: tuple[str, ...]
    lone: tuple[str, ...]

    def with_equals(self, rewards: Mapping[str, float | None]) -> Advantages:
        """The same, and groups without variance train too, at advantage 0: distillation learns from every rollout."""
        scored = [name for name, reward in rewards.items() if reward is not None]
        return replace(self, of={name: self.of.get(name, 0.0) for name in scored})


def group_advantages(
    rewards: Mapping[str, float | None], group_of: Mapping[str, str], scale: str = "none"
) -> Advantages:
    """Reward minus the mean of the group's trajectories; rows have no part in it.

    Args:
        rewards: by trajectory; None is unscored and left out of the baseline.
        group_of: the group of each trajectory, usually its task.
        scale: "group" divides by the group's standard deviation, "none" does not.

    Raises:
        ValueError: a reward is NaN or infinite, or there is no such scale.
    """
    if scale not in ("none", "group"):
        raise ValueError(f"scale is {scale!r}; it is none or group")
    groups: dict[str, dict[str, float]] = {}
    unscored = []
    for name, reward in rewards.items():
        groups.setdefault(group_of[name], {})
        if reward is None:
            unscored.append(name)
        elif not math.isfinite(reward):
            raise ValueError(f"the reward of {name} is {reward}: a reward function must give a number, or None where "
                             f"it could not score")  # fmt: skip
        else:
            groups[group_of[name]][name] = float(reward)
    found, dropped, kept, lone = {}, [], [], []
    for group, scored in groups.items():
        if len(scored) < 2:
            lone.append(group)
            continue
        mean, spread = fmean(scored.values()), pstdev(scored.values())
        if spread < TINY:
            dropped.append(group)
            continue
        kept.append(group)
        for name, reward in scored.items():
            found[name] = (reward - mean) / (spread if scale == "group" else 1.0)
    return Advantages(found, tuple(dropped), tuple(kept), tuple(unscored), tuple(lone))


def combined_reward(rate: float | None, all_pass: bool | float | None, share: float = 0.1) -> float | None:
    """`(1 - share) * criterion rate + share * all-pass`; None where either is unscored.

    All-pass alone starves most groups: at 5 % and eight rollouts two thirds of them would have no signal.

    Raises:
        ValueError: the share is none.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must lie between 0 and 1")
    if rate is None or (all_pass is None and share):
        return None
    return (1 - share) * rate + share * float(all_pass or 0.0)
