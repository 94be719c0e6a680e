"""Criteria that should not count: a list keyed by task, criterion and rubric hash, and the items that look like it.

Rubrics have defects: facts that stand in no document, stale names, conditions that nothing can meet. An entry takes
effect only on the criterion that was looked at: once its text changes, the hash differs and the entry is reported as
out of date instead of applied. Both scores are always given: with every criterion, and without those on the list.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from .kinds import Kind
from .questions import write_text
from .scored import ScoredRun


@dataclass(frozen=True)
class Entry:
    """One criterion on the list.

    Attributes:
        task: the task's id.
        criterion: the criterion's id.
        rubric: its rubric hash (`still lab show` prints it).
        reason: what is wrong with it.
        by: who says so.
        date: when.
    """

    task: str
    criterion: str
    rubric: str
    reason: str
    by: str = ""
    date: str = ""


@dataclass(frozen=True)
class Quarantine:
    """The list. An empty one leaves everything as it is."""

    entries: tuple[Entry, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Quarantine:
        """Read a JSON list of entries.

        Raises:
            ValueError: it is none, or an entry lacks its task, criterion, rubric hash or reason.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as problem:
            raise ValueError(f"{path} is no JSON: {problem}") from problem
        known = [each.name for each in fields(Entry)]
        entries = []
        for each in raw if isinstance(raw, list) else [raw]:
            if not isinstance(each, dict) or not all(each.get(key) for key in known[:4]):
                raise ValueError(f"{path}: entry {each!r} needs {', '.join(known[:4])}")
            entries.append(Entry(**{key: str(each[key]) for key in known if key in each}))
        return cls(tuple(entries))

    def save(self, path: str | Path) -> None:
        """Write the list as JSON."""
        write_text(Path(path), json.dumps([asdict(entry) for entry in self.entries], indent=1, ensure_ascii=False))

    @cached_property
    def _keys(self) -> frozenset[tuple[str, str, str]]:
        return frozenset((entry.task, entry.criterion, entry.rubric) for entry in self.entries)

    def holds(self, run: ScoredRun, criterion: str) -> bool:
        """Whether this very criterion, by its hash, is on the list."""
        return (run.task, criterion, run.hashes.get(criterion)) in self._keys

    def without(self, runs: Iterable[ScoredRun]) -> list[ScoredRun]:
        """The runs without the criteria on the list; a run that has no others is left out."""
        kept = [
            replace(run, verdicts=tuple(each for each in run.verdicts if not self.holds(run, each.id))) for run in runs
        ]
        return [run for run in kept if run.verdicts]

    def unused(self, runs: Sequence[ScoredRun]) -> list[tuple[Entry, str]]:
        """Entries that took no effect on these runs, each with the reason: the rubric changed, or is not known."""
        found = []
        for entry in self.entries:
            there = [run for run in runs if run.task == entry.task and entry.criterion in {v.id for v in run.verdicts}]
            hashes = {run.hashes.get(entry.criterion) for run in there}
            if not there or entry.rubric in hashes:
                continue
            unknown = "its rubric hash is not known: name the tasks' folder"
            now = ", ".join(sorted(each for each in hashes if each))
            found.append((entry, f"the criterion has changed: its rubric hash is now {now}" if now else unknown))
        return found


@dataclass(frozen=True)
class Item:
    """How one criterion behaves over runs and judges.

    Attributes:
        task, criterion, rubric, title, kind: which one it is.
        verdicts: pass or fail ones.
        passes: of these, passes.
        unscored: verdicts that are neither.
        runs: that were graded.
        split: share of the runs that several judges graded on which they differ; None where none was.
        discrimination: correlation of passing it with the rate of passing the task's other criteria, over verdicts;
            None where either does not vary. Below zero, the better outputs fail it.
    """

    task: str
    criterion: str
    rubric: str
    title: str
    kind: Kind
    verdicts: int
    passes: int
    unscored: int
    runs: int
    split: float | None
    discrimination: float | None

    @property
    def pass_rate(self) -> float | None:
        """Share of passes among the verdicts; None without any."""
        return self.passes / self.verdicts if self.verdicts else None

    def flags(self, least: int = 3) -> tuple[str, ...]:
        """What is odd about it, said only from `least` runs on: never passes, always passes, judges split, negative."""
        if self.runs < least or not self.verdicts:
            return ()
        found = {
            "never passes": self.passes == 0,
            "always passes": self.passes == self.verdicts,
            "judges split": (self.split or 0) >= 0.2,
            "better outputs fail it": (self.discrimination or 0) <= -0.2,
        }
        return tuple(name for name, holds in found.items() if holds)


def item_statistics(runs: Sequence[ScoredRun]) -> list[Item]:
    """Each criterion of each task over all runs and judges; criteria whose hash changed are items of their own."""
    given: dict[tuple[str, str, str], list[tuple[ScoredRun, Any]]] = {}
    for run in runs:
        for verdict in run.verdicts:
            given.setdefault((run.task, verdict.id, run.hashes.get(verdict.id, "")), []).append((run, verdict))
    items = []
    for (task, criterion, rubric), pairs in given.items():
        labels: dict[tuple[str, str], set[str]] = {}
        for run, verdict in pairs:
            if verdict.passed is not None:
                labels.setdefault((run.system, run.run_id), set()).add((run.judge, verdict.label))
        shared = [found for found in labels.values() if len({judge for judge, _ in found}) > 1]
        rest = [(float(v.passed), _rest(run, criterion)) for run, v in pairs if v.passed is not None]
        items.append(
            Item(
                task=task,
                criterion=criterion,
                rubric=rubric,
                title=pairs[-1][1].title,
                kind=pairs[-1][0].kinds.get(criterion, "presence"),
                verdicts=len(rest),
                passes=sum(passed == 1 for passed, _ in rest),
                unscored=len(pairs) - len(rest),
                runs=len({(run.system, run.run_id) for run, _ in pairs}),
                split=mean(len({label for _, label in found}) > 1 for found in shared) if shared else None,
                discrimination=_correlation([(x, y) for x, y in rest if y is not None]),
            )
        )
    return items


def candidates(items: Iterable[Item], least: int = 3) -> Quarantine:
    """Entries to look at by hand: criteria that never pass, that split judges, or that the better outputs fail.

    That an item always passes is no defect. Nothing here says that a criterion is wrong: each entry's reason gives the
    numbers, and a person decides.
    """
    entries = []
    for item in items:
        flags = [flag for flag in item.flags(least) if flag != "always passes"]
        if flags and item.rubric:
            numbers = f"{item.passes} of {item.verdicts} verdicts pass over {item.runs} runs"
            entries.append(Entry(item.task, item.criterion, item.rubric, f"to check: {', '.join(flags)} ({numbers})"))
    return Quarantine(tuple(entries))


def _rest(run: ScoredRun, criterion: str) -> float | None:
    others = [verdict.passed for verdict in run.verdicts if verdict.id != criterion and verdict.passed is not None]
    return mean(others) if others else None


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    if len(pairs) < 3:
        return None
    x_mean, y_mean = mean(x for x, _ in pairs), mean(y for _, y in pairs)
    x_spread = sum((x - x_mean) ** 2 for x, _ in pairs)
    y_spread = sum((y - y_mean) ** 2 for _, y in pairs)
    if x_spread < 1e-12 or y_spread < 1e-12:
        return None
    return sum((x - x_mean) * (y - y_mean) for x, y in pairs) / (x_spread * y_spread) ** 0.5
