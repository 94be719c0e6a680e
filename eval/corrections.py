"""A judge's pass rate, corrected by labels on a sample: what the rate would be by the labels.

Two estimators, for two kinds of sample. **Prediction-powered** (Angelopoulos et al. 2023, with their power tuning)
takes a random sample of the very criteria whose rate is wanted: it adds to the judge's rate the mean of label minus
judge on the sample, and is right on average whatever the judge is like. **Rogan-Gladen** (1978; for judges, Lee et al.
2025) takes the judge's sensitivity and specificity, which may come from other tasks, and is right where these carry
over. Neither is for all-pass: errors inside a task hang together.

Intervals take the criteria of a task together, on both sides of the correction, with Student's t over tasks. They are
never narrower than what the errors seen in the sample, plus one of each kind that might have been, allow.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from .scored import ScoredRun
from .stats import Interval, t_quantile, wilson

Method = Literal["prediction-powered", "rogan-gladen"]


@dataclass(frozen=True)
class Labelled:
    """One criterion with both: what the judge says and what the label says.

    Attributes:
        task: it belongs to this cluster.
        judge: passed, by the judge.
        label: passed, by the label.
    """

    task: str
    judge: bool
    label: bool


@dataclass(frozen=True)
class Corrected:
    """A corrected rate.

    Attributes:
        raw: the judge's own pass rate.
        interval: the corrected rate.
        sensitivity: share passed by the judge among those that the label passes; None where there are none.
        specificity: share failed by the judge among those that the label fails; None where there are none.
        labelled: size of the sample.
        weight: prediction-powered: how much the judge counts, 0 to 1; 1 otherwise.
    """

    raw: float
    interval: Interval
    sensitivity: float | None
    specificity: float | None
    labelled: int
    weight: float = 1.0


def corrected_rate(
    judged: Sequence[tuple[str, bool]],
    sample: Sequence[Labelled],
    method: Method = "prediction-powered",
    confidence: float = 0.95,
) -> Corrected:
    """The pass rate of `judged` as the labels would have it.

    Args:
        judged: (task, passed) of every criterion that the judge scored, the sampled ones included.
        sample: for "prediction-powered" a random sample of them.

    Raises:
        ValueError: nothing is judged, fewer than two criteria are labelled, or for "rogan-gladen" the sample lacks
            passes or fails, or shows a judge that is no better than chance.
    """
    if not judged or len(sample) < 2:
        raise ValueError(f"{len(judged)} criteria are judged and {len(sample)} labelled; it needs one and two or more")
    passes, fails = ([each for each in sample if each.label is kind] for kind in (True, False))
    sensitivity = sum(each.judge for each in passes) / len(passes) if passes else None
    specificity = sum(not each.judge for each in fails) / len(fails) if fails else None
    raw = sum(passed for _, passed in judged) / len(judged)
    if method == "rogan-gladen":
        estimate, spread, floor = _rogan_gladen(judged, passes, fails, raw, sensitivity, specificity)
        weight = 1.0
    else:
        estimate, spread, floor, weight = _prediction_powered(judged, sample, raw)
    clusters = {task for task, _ in judged} | {each.task for each in sample}
    labelled_tasks = len({each.task for each in sample})
    df = max(1, min(len(clusters), labelled_tasks) - 1)
    told = f"{method}, {len(sample)} labels on {labelled_tasks} tasks, robust to {len(clusters)} clusters, t({df})"
    low, high = _bounds(estimate, max(spread, floor), t_quantile(0.5 + confidence / 2, df), confidence)
    point = min(1.0, max(0.0, estimate))
    found = Interval(point, min(low, point), max(high, point), len(judged), len(clusters), told, confidence)
    return Corrected(raw, found, sensitivity, specificity, len(sample), weight)


def label_pairs(judged: Sequence[ScoredRun], labels: Sequence[ScoredRun]) -> list[Labelled]:
    """The criteria that both score, matched by task and run id; labels left unscored are no labels.

    Raises:
        ValueError: two labelled runs have the same task and run id, or two judged ones that labels are for.
    """
    known = {(run.task, run.run_id): run for run in labels}
    if len(known) < len(labels):
        raise ValueError("labels of several judges or systems share a task and run id; name one file for each run")
    meant = Counter((run.task, run.run_id) for run in judged)
    if twice := [key for key in known if meant[key] > 1]:
        raise ValueError(
            f"labels are for run {twice[0][1]!r} of {twice[0][0]}, and {meant[twice[0]]} judged runs are called so; "
            f"name the files of one system"
        )
    found = []
    for run in judged:
        truth = known.get((run.task, run.run_id))
        said = {verdict.id: verdict.passed for verdict in truth.verdicts} if truth else {}
        for verdict in run.verdicts:
            label = said.get(verdict.id)
            if verdict.passed is not None and label is not None:
                found.append(Labelled(run.task, verdict.passed, label))
    return found


def audited(runs: Sequence[ScoredRun]) -> tuple[list[tuple[str, bool]], list[Labelled]]:
    """From a cascade's runs: the cheap judge's verdicts on everything, and the random sample that both judged."""
    judged, sample = [], []
    for run in runs:
        for verdict in run.verdicts:
            votes = {vote.role: vote.passed for vote in verdict.votes}
            cheap = verdict.passed if verdict.role == "cheap" else votes.get("cheap")
            if cheap is None:
                continue
            judged.append((run.task, cheap))
            if verdict.role == "audit" and votes.get("strong") is not None:
                sample.append(Labelled(run.task, cheap, bool(votes["strong"])))
    return judged, sample


def _prediction_powered(
    judged: Sequence[tuple[str, bool]], sample: Sequence[Labelled], raw: float
) -> tuple[float, float, float, float]:
    """Estimate, clustered variance, least variance, weight of the judge."""
    n, total = len(sample), len(judged)
    label, judge = sum(each.label for each in sample) / n, sum(each.judge for each in sample) / n
    spread = sum((each.judge - judge) ** 2 for each in sample) / n
    joint = sum((each.label - label) * (each.judge - judge) for each in sample) / n
    weight = min(1.0, max(0.0, joint / spread / (1 + n / total))) if spread else 0.0
    rest = [each.label - weight * each.judge for each in sample]
    gap = sum(rest) / n
    influence: dict[str, float] = {}
    for task, passed in judged:
        influence[task] = influence.get(task, 0.0) + weight * (passed - raw) / total
    for each, value in zip(sample, rest, strict=True):
        influence[each.task] = influence.get(each.task, 0.0) + (value - gap) / n
    seen = [*rest, -weight, 1.0]  # one false pass and one false fail more than were seen
    middle = sum(seen) / len(seen)
    floor = sum((value - middle) ** 2 for value in seen) / len(seen) / n
    return weight * raw + gap, _sandwich(influence), floor, weight


def _rogan_gladen(
    judged: Sequence[tuple[str, bool]],
    passes: Sequence[Labelled],
    fails: Sequence[Labelled],
    raw: float,
    sensitivity: float | None,
    specificity: float | None,
) -> tuple[float, float, float]:
    """Estimate, clustered variance, least variance."""
    if sensitivity is None or specificity is None:
        raise ValueError(
            f"the labelled sample has {len(passes)} passes and {len(fails)} fails; rogan-gladen needs both"
        )
    power = sensitivity + specificity - 1
    if power <= 0.05:
        raise ValueError(
            f"on the sample the judge has sensitivity {sensitivity:.2f} and specificity {specificity:.2f}, hardly "
            "better than chance; its verdicts cannot be corrected"
        )
    rate = (raw + specificity - 1) / power
    share = min(1.0, max(0.0, rate))
    influence: dict[str, float] = {}
    for task, passed in judged:
        influence[task] = influence.get(task, 0.0) + (passed - raw) / len(judged) / power
    for each in passes:
        influence[each.task] = influence.get(each.task, 0.0) - share * (each.judge - sensitivity) / len(passes) / power
    for each in fails:
        error = (not each.judge) - specificity
        influence[each.task] = influence.get(each.task, 0.0) + (1 - share) * error / len(fails) / power
    hit = (sensitivity * len(passes) + 1) / (len(passes) + 2)
    miss = (specificity * len(fails) + 1) / (len(fails) + 2)
    floor = (
        raw * (1 - raw) / len(judged)
        + share**2 * hit * (1 - hit) / (len(passes) + 2)
        + (1 - share) ** 2 * miss * (1 - miss) / (len(fails) + 2)
    ) / power**2
    return rate, _sandwich(influence), floor


def _bounds(estimate: float, variance: float, t: float, confidence: float) -> tuple[float, float]:
    """Wilson's interval with the effective sample size that the variance implies, as in `stats.clustered_rate`.

    It depends on t^2 / n alone, so t takes the place of z through n. Outside of 0 to 1 it is the straight one.
    """
    if not 0 < estimate < 1 or not variance < math.inf:
        reach = t * math.sqrt(variance)
        return max(0.0, estimate - reach), min(1.0, estimate + reach)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    effective = estimate * (1 - estimate) / variance * (z / t) ** 2
    found = wilson(estimate * effective, effective, confidence)
    return found.low, found.high


def _sandwich(influence: dict[str, float]) -> float:
    m = len(influence)
    return m / (m - 1) * sum(value**2 for value in influence.values()) if m > 1 else math.inf
