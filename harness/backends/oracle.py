"""The oracle's memo: an upper bound for every memo of the same size, and no method.

It is written by the harness, which knows the rubric: of what was read, as many of the asked facts as fit. No model
that writes its own memo can keep more of them in as many tokens in this form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...eval.tasks import LabTask
from ..run_config import RunConfig
from ..types import Boundary, Policy, Session
from .text import TextBackend


class AskedFacts:
    """The facts that a rubric asks for, found in text.

    Args:
        task: with its rubric; only criteria with an `expect` block count.

    Attributes:
        asked: the criterion of each party, in the assignment's order where it numbers the parties.
    """

    def __init__(self, task: LabTask):
        self.numbers = {party: number for number, party in re.findall(r"^(\d+)\. (.+)$", task.instructions, re.M)}
        self.asked = {c.expect["party"]: c for c in task.criteria if c.expect and not c.expect.get("absent")}
        if self.numbered:
            self.asked = dict(sorted(self.asked.items(), key=lambda each: int(self.numbers[each[0]])))
        self.values = {
            party: [criterion.expect["value"], *criterion.expect.get("superseded", ())]
            for party, criterion in self.asked.items()
        }

    @property
    def numbered(self) -> bool:
        """Whether the assignment gives every party a number."""
        return self.asked.keys() <= self.numbers.keys()

    def line(self, party: str, value: str) -> str:
        """How a memo or a draft states a fact."""
        return f"{self.numbers[party]}. {party}: {value}" if self.numbered else f"{party}: {value}"

    def learn(self, text: str, known: dict[str, str]) -> None:
        """Take every asked party's value from a document into `known`, later sentences over earlier ones."""
        for sentence in re.split(r"(?<=[.;])\s+|\n", text):
            for party, values in self.values.items():
                if party in sentence:
                    known.update((party, value) for value in values if value in sentence)


class OracleMemo(TextBackend):
    """`memo_oracle`: text as `memo` has it, chosen by the rubric.

    Args:
        config: its budget.
        policy: the model.
        task: with its rubric.
    """

    def __init__(self, config: RunConfig, policy: Policy, task: LabTask):
        super().__init__(config, policy)
        self.facts = AskedFacts(task)
        if not self.facts.asked:
            raise ValueError(f"no criterion of {task.id} has an 'expect' block; an oracle's memo cannot be written")

    def keep(self, session: Session, memo: str, boundary: Boundary) -> tuple[str, str]:
        """What was held and what the window said, the shortest lines first where not all fit."""
        known: dict[str, str] = {}
        if boundary.held:
            self.facts.learn(boundary.held.text, known)
        self.facts.learn(boundary.history(), known)
        return "memo", "\n".join(self.fitting(session, known.items()))

    def fitting(self, session: Session, known: Iterable[tuple[str, str]]) -> list[str]:
        """As many lines as the budget takes."""
        lines = [self.facts.line(party, value) for party, value in known]
        kept: list[str] = []
        for line in sorted(lines, key=session.count):
            if session.count("\n".join([*kept, line])) > self.tokens:
                break
            kept.append(line)
        return [line for line in lines if line in kept]
