"""What runs come to: criterion pass rates, all-pass, and the difference of two systems, each with its interval.

Unscored verdicts are in no rate and always counted beside it. A run whose all-pass hangs on one is "unknown": it is
left out of the all-pass rate, which is given with the bounds that it would have if all unknown runs failed or passed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import mean
from typing import Any

from .quarantine import Quarantine
from .scored import ScoredRun, judges_of
from .stats import Interval, PairedDifference, cluster_bootstrap, clustered_rate, mcnemar, paired_difference, wilson

UNNAMED = "not named"
"""The system of runs whose files name none."""


@dataclass(frozen=True)
class Summary:
    """The numbers of a set of runs under one judge.

    Attributes:
        runs: how many.
        tasks: how many different ones.
        criteria: verdicts, unscored ones included.
        unscored: of these, neither pass nor fail.
        micro: share of all scored criteria that pass, by `stats.cluster_bootstrap`; None where none was scored.
        macro: mean over tasks of that share.
        all_pass: share of the runs in which every criterion passes: Wilson, and clustered by task where a task has
            several runs; None where it is unknown for every run.
        all_passed: runs in which every criterion passes.
        unknown: runs whose all-pass hangs on unscored criteria.
        cost: US dollars for judging; None where a file does not say.
    """

    runs: int
    tasks: int
    criteria: int
    unscored: int
    micro: Interval | None
    macro: Interval | None
    all_pass: Interval | None
    all_passed: int
    unknown: int
    cost: float | None

    @property
    def all_pass_bounds(self) -> tuple[float, float]:
        """The all-pass rate if every unknown run failed, and if every one passed."""
        return self.all_passed / self.runs, (self.all_passed + self.unknown) / self.runs


@dataclass(frozen=True)
class BothScores:
    """The two scores that are always reported together.

    Attributes:
        official: with every criterion.
        without: without those on the quarantine list; None where none of them is.
        dropped: verdicts that the list took out.
    """

    official: Summary
    without: Summary | None
    dropped: int


def summarise(runs: Sequence[ScoredRun], seed: int = 0, draws: int = 2000) -> Summary:
    """Rates and intervals of runs that one judge graded.

    Args:
        seed: of the bootstrap over tasks.
        draws: its resamples.

    Raises:
        ValueError: there are no runs, or several judges graded them.
    """
    if not runs:
        raise ValueError("there are no runs to summarise")
    if len(judges := {run.judge for run in runs}) > 1:
        raise ValueError(f"the runs were graded by {sorted(judges)}; summarise those of one judge at a time")
    scored = [(float(v.passed), run.task) for run in runs for v in run.verdicts if v.passed is not None]
    values, clusters = [value for value, _ in scored], [task for _, task in scored]
    known = [run for run in runs if run.all_pass is not None]
    costs = [run.judging_cost for run in runs]
    return Summary(
        runs=len(runs),
        tasks=len({run.task for run in runs}),
        criteria=sum(len(run.verdicts) for run in runs),
        unscored=sum(len(run.verdicts) for run in runs) - len(scored),
        micro=cluster_bootstrap(values, clusters, draws=draws, seed=seed) if scored else None,
        macro=cluster_bootstrap(values, clusters, macro=True, draws=draws, seed=seed) if scored else None,
        all_pass=all_pass_rate([bool(run.all_pass) for run in known], [run.task for run in known]) if known else None,
        all_passed=sum(bool(run.all_pass) for run in known),
        unknown=len(runs) - len(known),
        cost=None if None in costs else sum(costs),
    )


def both_scores(runs: Sequence[ScoredRun], quarantine: Quarantine, seed: int = 0) -> BothScores:
    """The official score, and the one without the criteria on the list."""
    kept = quarantine.without(runs)
    dropped = sum(len(run.verdicts) for run in runs) - sum(len(run.verdicts) for run in kept)
    return BothScores(summarise(runs, seed), summarise(kept, seed) if dropped and kept else None, dropped)


def by(runs: Sequence[ScoredRun], key: Callable[[ScoredRun], str], seed: int = 0) -> dict[str, Summary]:
    """A summary for each value of `key`, such as the practice area, in sorted order."""
    groups: dict[str, list[ScoredRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return {name: summarise(groups[name], seed) for name in sorted(groups)}


@dataclass(frozen=True)
class SystemsCompared:
    """Two systems on the tasks that both did.

    Attributes:
        tasks: in common.
        criteria: in common and scored in both.
        criterion: difference of the criterion pass rate, a - b, paired by criterion and clustered by task.
        all_pass: difference of the all-pass rate over tasks, paired; None where no task is known in both.
        only_a: tasks that a passes in every run and b in none, of those known in both.
        only_b: the other way round.
        mcnemar: p-value on these tasks.
    """

    tasks: int
    criteria: int
    criterion: PairedDifference
    all_pass: PairedDifference | None
    only_a: int
    only_b: int
    mcnemar: float


def compare_systems(a: Sequence[ScoredRun], b: Sequence[ScoredRun]) -> SystemsCompared:
    """Two systems under the same judge, on what both were graded on; several runs of a task are averaged first.

    Raises:
        ValueError: the judges differ, or no criterion was scored in both.
    """
    judges = ({run.judge for run in a}, {run.judge for run in b})
    if judges[0] != judges[1] or len(judges[0]) != 1:
        raise ValueError(f"the systems were graded by {sorted(judges[0])} and {sorted(judges[1])}; compare under one")
    (first, wordings), (second, others) = _rates(a), _rates(b)
    same = {key for key in wordings if not others.get(key) or not wordings[key] or wordings[key] & others[key]}
    shared = [key for key in first if key in second and key in same]
    if not shared:
        raise ValueError("no criterion was scored in both systems; grade the same tasks")
    tasks = [task for task, _ in shared]
    criterion = paired_difference([first[key] for key in shared], [second[key] for key in shared], tasks)
    whole_a, whole_b = _whole(a), _whole(b)
    known = [task for task in whole_a if task in whole_b]
    pairs = [(whole_a[task], whole_b[task]) for task in known]
    only_a, only_b = sum(x == 1 and y == 0 for x, y in pairs), sum(x == 0 and y == 1 for x, y in pairs)
    return SystemsCompared(
        tasks=len(set(tasks)),
        criteria=len(shared),
        criterion=criterion,
        all_pass=paired_difference([x for x, _ in pairs], [y for _, y in pairs], known) if known else None,
        only_a=only_a,
        only_b=only_b,
        mcnemar=mcnemar(only_a, only_b),
    )


@dataclass(frozen=True)
class Overview:
    """What one judge's verdicts come to, for every system.

    Attributes:
        judge: its name.
        systems: system -> both scores.
        areas: system -> practice area -> summary.
        pairs: every two systems that were graded on something in common.
    """

    judge: str
    systems: dict[str, BothScores]
    areas: dict[str, dict[str, Summary]]
    pairs: list[tuple[str, str, SystemsCompared]]

    def to_json(self) -> dict[str, Any]:
        """All numbers, as `still judges report` writes them."""
        return {
            "judge": self.judge,
            "systems": {
                name: {**asdict(both), "areas": {area: asdict(found) for area, found in self.areas[name].items()}}
                for name, both in self.systems.items()
            },
            "pairs": [{"first": first, "second": second, **asdict(found)} for first, second, found in self.pairs],
        }


def overview(runs: Sequence[ScoredRun], quarantine: Quarantine | None = None, seed: int = 0) -> list[Overview]:
    """Everything that is reported across runs, judge by judge; systems that no file names are "not named"."""
    found = []
    for judge in judges_of(runs):
        systems: dict[str, list[ScoredRun]] = {}
        for run in runs:
            if run.judge == judge:
                systems.setdefault(run.system or UNNAMED, []).append(run)
        pairs = []
        for first, second in combinations(systems, 2):
            if {run.task for run in systems[first]} & {run.task for run in systems[second]}:
                with suppress(ValueError):  # tasks in common, but no criterion that was scored in both
                    pairs.append((first, second, compare_systems(systems[first], systems[second])))
        found.append(
            Overview(
                judge,
                {name: both_scores(each, quarantine or Quarantine(), seed) for name, each in systems.items()},
                {name: by(each, lambda run: run.area, seed) for name, each in systems.items()},
                pairs,
            )
        )
    return found


def all_pass_rate(passed: Sequence[bool], tasks: Sequence[Hashable]) -> Interval:
    """Share of runs that pass whole: Wilson, and clustered by task, or matter, where one has several runs.

    Args:
        passed: of each run.
        tasks: of each run, in the same order.
    """
    if len(set(tasks)) == len(tasks):
        return wilson(sum(passed), len(passed))
    return clustered_rate(map(float, passed), tasks)


def _rates(runs: Sequence[ScoredRun]) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], set[str]]]:
    """(task, criterion) -> mean over runs, and -> the rubric hashes that the files tell."""
    given: dict[tuple[str, str], list[bool]] = {}
    hashes: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        for verdict in run.verdicts:
            if verdict.passed is not None:
                key = run.task, verdict.id
                given.setdefault(key, []).append(verdict.passed)
                hashes.setdefault(key, set()).update({run.hashes[verdict.id]} if verdict.id in run.hashes else ())
    return {key: mean(values) for key, values in given.items()}, hashes


def _whole(runs: Sequence[ScoredRun]) -> Mapping[str, float]:
    """Task -> share of its known runs in which every criterion passes."""
    given: dict[str, list[bool]] = {}
    for run in runs:
        if run.all_pass is not None:
            given.setdefault(run.task, []).append(run.all_pass)
    return {task: mean(values) for task, values in given.items()}
