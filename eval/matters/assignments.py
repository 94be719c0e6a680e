"""Matters for an agent: an assignment names a few parties, and the documents say much of others besides.

The share of the facts that is asked for is the *relevance*. A memo writer sees the assignment and may leave all else
out; a compaction that does not look at the assignment must keep everything. At 100, 25 and 5 % the number of criteria
is the same, and so is the assignment; only what lies around the asked facts grows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from .generate import Difficulty, Matter, generate_matter
from .lab_format import AUTHORSHIP, FORMAT, LabTaskFiles, criterion_of, distractor_of, in_order, place_tasks

FAMILY, DELIVERABLE = "assignments", "terms.md"
DISTRACTORS = 2


@dataclass(frozen=True)
class Assignment:
    """What is asked of a matter.

    Attributes:
        relevance: share of the facts that is asked for, above 0 and at most 1.
        criteria: facts that are asked for.
        documents: that they are spread over; amendments stand in the last one.
    """

    relevance: float = 1.0
    criteria: int = 20
    documents: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.relevance <= 1:
            raise ValueError(f"relevance is {self.relevance}; it is a share above 0, and at most 1")
        if self.criteria < 1 or self.documents < 1:
            raise ValueError(f"criteria is {self.criteria} and documents {self.documents}; both are 1 or more")

    @property
    def difficulty(self) -> Difficulty:
        """Of the matters."""
        return Difficulty("assignment", round(self.criteria / self.relevance), documents=self.documents)

    @property
    def label(self) -> str:
        """The relevance for people."""
        return f"{100 * self.relevance:g} %"


def assignment_task(matter: Matter, asked: Assignment) -> LabTaskFiles:
    """Lay a matter out as a LAB task that asks for a part of it, by the names of the parties."""
    rng = random.Random(f"asked of {matter.seed}")
    facts = [matter.facts[place] for place in sorted(rng.sample(range(len(matter.facts)), asked.criteria))]
    others = [fact for fact in matter.facts if fact not in facts]
    documents = in_order(matter)
    names = "\n".join(f"{number}. {party}" for number, party in enumerate(sorted(fact.party for fact in facts), 1))
    instructions = (
        f"Report the one term that the documents fix for each of these parties, as it stands after all amendments, and "
        f"for no other party:\n{names}\n\n{AUTHORSHIP}\n\nOutput: `{DELIVERABLE}`."
    )
    criteria = [criterion_of(f"C-{number + 1:03d}", "", fact, documents) for number, fact in enumerate(facts)]
    for fact in others[:DISTRACTORS]:
        criteria.append(distractor_of(f"C-{len(criteria) + 1:03d}", "DISTRACTOR: ", fact.kind, fact.value))
    name = f"assignments/terms-{100 * asked.relevance:g}/matter-{matter.seed:03d}"
    task = {
        "title": f"Terms of {asked.criteria} Parties, Matter {matter.seed}", "work_type": "review",
        "tags": ["synthetic", f"relevance {asked.label}"], "instructions": instructions,
        "deliverables": {DELIVERABLE: DELIVERABLE}, "criteria": criteria,
    }  # fmt: skip
    return LabTaskFiles(name, task, documents, f"{name}/documents")


def write_assignments(
    output: str | Path, asked: Assignment, seeds: Iterable[int], split: str = "held_out", unseen_templates: bool = False
) -> list[Path]:
    """Write the matters of these seeds as LAB tasks below `output/tasks`; see `write_lab_tasks`."""
    difficulty = asked.difficulty
    config = {
        "format": FORMAT, "difficulty": asdict(difficulty), "digest": difficulty.digest, "split": split,
        "unseen_templates": unseen_templates, "relevance": asked.relevance, "criteria": asked.criteria,
    }  # fmt: skip

    def make(seed: int) -> LabTaskFiles:
        return assignment_task(generate_matter(seed, difficulty, split, unseen_templates), asked)

    return place_tasks(Path(output), FAMILY, list(seeds), config, make)
