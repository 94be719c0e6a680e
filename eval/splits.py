"""Training, held-out and test sides of a folder of tasks: seeded, balanced by practice area, without shared documents.

A document that lies on two sides tells the one about the other, so tasks that share any are kept together, whether
they share a store (firm-knowledge) or hold copies of one file. Such a group goes to one side as a whole; the sides
are then filled so that each practice area comes as near to the wanted shares as its groups allow.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .questions import write_text
from .tasks import LabTask

POOLED = "(small areas)"
"""The stratum of practice areas that are too small to give every side a task."""


@dataclass(frozen=True)
class Split:
    """Which task lies on which side.

    Attributes:
        sides: side -> task ids, sorted.
        shares: side -> the wanted share of tasks, 0 to 1.
        seed: what it was drawn with.
        areas: practice area -> side -> tasks.
        groups: tasks that were kept together because they share documents, the large groups first.
        rubrics: task id -> rubric hash, so that a later reader sees which rubrics the split was made for.
    """

    sides: dict[str, tuple[str, ...]]
    shares: dict[str, float]
    seed: int
    areas: dict[str, dict[str, int]]
    groups: tuple[tuple[str, ...], ...]
    rubrics: dict[str, str]

    def side_of(self, task_id: str) -> str:
        """The side of one task.

        Raises:
            KeyError: the split does not hold it.
        """
        for side, ids in self.sides.items():
            if task_id in ids:
                return side
        raise KeyError(f"the split does not hold task {task_id!r}; it was made of {len(self.rubrics)} others")

    def to_json(self) -> dict[str, Any]:
        """Everything, as `still tasks split` writes it."""
        return {
            "seed": self.seed,
            "shares": self.shares,
            "sides": {side: list(ids) for side, ids in self.sides.items()},
            "areas": self.areas,
            "kept_together": [list(group) for group in self.groups],
            "rubrics": self.rubrics,
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, path: str | Path) -> Split:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no split.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict) or "sides" not in data:
            raise ValueError(f"{path} is no split; `still tasks split` writes one")
        sides = {side: tuple(ids) for side, ids in data["sides"].items()}
        groups = tuple(tuple(group) for group in data["kept_together"])
        return cls(sides, data["shares"], data["seed"], data["areas"], groups, data["rubrics"])


def split_tasks(tasks: Sequence[LabTask], shares: Mapping[str, float], seed: int = 0) -> Split:
    """Divide tasks into sides.

    Groups are dealt out large ones first, in seeded order, each to the side that lacks the most tasks of the practice
    areas that it touches, then to the one that lacks the most altogether. Areas too small to give every side a task
    are taken together. The same tasks, shares and seed give the same split whatever the order that they come in.

    Args:
        shares: side -> wanted share; they sum to 1.

    Raises:
        ValueError: no tasks, two with one id, or shares that do not sum to 1.
    """
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares are {dict(shares)}; give each side one above 0 that sum to 1, as train=0.8,test=0.2")
    if not tasks:
        raise ValueError("there are no tasks to split")
    by_id = {task.id: task for task in tasks}
    if len(by_id) < len(tasks):
        twice = sorted(name for name, count in Counter(task.id for task in tasks).items() if count > 1)
        raise ValueError(f"several tasks have the ids {twice}; name one tasks/ folder")

    groups = sorted(_sharing(tasks))
    random.Random(f"split:{seed}").shuffle(groups)
    groups.sort(key=len, reverse=True)
    sizes = Counter(task.practice_area for task in tasks)
    small = {area for area, size in sizes.items() if size * min(shares.values()) < 1}
    strata = {task.id: POOLED if task.practice_area in small else task.practice_area for task in tasks}
    wanted = Counter(strata.values())
    placed: dict[str, Counter[str]] = {side: Counter() for side in shares}
    sides: dict[str, list[str]] = {side: [] for side in shares}
    for group in groups:
        parts = Counter(strata[name] for name in group)

        def lack(side: str, parts: Counter[str] = parts) -> tuple[float, float]:
            here = sum(count * (shares[side] * wanted[area] - placed[side][area]) for area, count in parts.items())
            return round(here, 9), shares[side] * len(tasks) - len(sides[side])

        side = max(shares, key=lack)
        sides[side] += group
        placed[side] += parts
    counts = Counter((side, by_id[name].practice_area) for side, ids in sides.items() for name in ids)
    return Split(
        sides={side: tuple(sorted(ids)) for side, ids in sides.items()},
        shares=dict(shares),
        seed=seed,
        areas={area: {side: counts[side, area] for side in shares} for area in sorted(sizes)},
        groups=tuple(tuple(group) for group in groups if len(group) > 1),
        rubrics={name: by_id[name].rubric_hash for name in sorted(by_id)},
    )


def _sharing(tasks: Iterable[LabTask]) -> list[list[str]]:
    """Groups of task ids that are connected by documents, each sorted."""
    holders: dict[str, list[str]] = defaultdict(list)
    parent: dict[str, str] = {}
    for task in tasks:
        parent[task.id] = task.id
        for document in _documents(task):
            holders[document].append(task.id)

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for first, *others in holders.values():
        for other in others:
            parent[root(other)] = root(first)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(parent):
        groups[root(name)].append(name)
    return list(groups.values())


def _documents(task: LabTask) -> Iterable[str]:
    """What stands for a task's documents: the shared store as one, found or only named, else each file's hash."""
    if task.docs_dir:
        yield f"store {Path(task.docs_dir).name}"
    if task.docs_dir and task.documents_folder != task.folder / "documents":
        return
    for name in task.documents:
        content = (task.documents_folder / name).read_bytes()
        if content:
            yield hashlib.sha256(content).hexdigest()
