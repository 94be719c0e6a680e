"""One verdict from several: of repeats of a judge, or of several judges.

Rules, on the labels of one criterion:

- "strict": passes if all pass, as LAB's `all_pass` of two judges;
- "majority": passes if more than half pass; a tie fails, since a false pass weighs more than a false fail;
- "mean": LAB's official way for two families. Each judge keeps its own scores file, whose all-pass values (0 or 1)
  are averaged; a criterion of the joint file has the strict label.

A vote that is unscored leaves the verdict unscored where it could change it, and does not otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from .judge import Label
from .verdicts import CriterionVerdict, Tokens, total_cost

if TYPE_CHECKING:
    from .tasks import Criterion

Rule = Literal["mean", "strict", "majority"]
RULES: tuple[str, ...] = get_args(Rule)


class Panel(Protocol):
    """Whoever gives verdicts: a judge, an ensemble, a cascade. The latter two have `verdicts(criteria, ask)`."""

    name: str


Verdicts = Mapping[str, CriterionVerdict]
Ask = Callable[[Panel, Sequence["Criterion"]], Awaitable[Verdicts]]
"""Judges criteria with a judge or a panel; what the engine hands to `verdicts`."""


@dataclass(frozen=True)
class Ensemble:
    """Several judges on every criterion.

    Attributes:
        judges: two or more, or panels.
        rule: see the module.
    """

    judges: tuple[Panel, ...]
    rule: Rule = "majority"

    def __post_init__(self) -> None:
        object.__setattr__(self, "judges", tuple(self.judges))
        names = [judge.name for judge in self.judges]
        if len(set(names)) < max(2, len(names)):
            raise ValueError(f"an ensemble has the judges {names}; it needs two or more with different names")
        if self.rule not in RULES:
            raise ValueError(f"an ensemble has the rule {self.rule!r}; there are {', '.join(RULES)}")

    @property
    def name(self) -> str:
        """ "strict(a, b)"."""
        return f"{self.rule}({', '.join(judge.name for judge in self.judges)})"

    async def verdicts(self, criteria: Sequence[Criterion], ask: Ask) -> Verdicts:
        """Ask every judge, all at once, and join their verdicts."""
        given = await asyncio.gather(*(ask(judge, criteria) for judge in self.judges))
        return {each.id: join([votes[each.id] for votes in given], self.rule, self.name) for each in criteria}


def join(votes: Sequence[CriterionVerdict], rule: Rule, name: str) -> CriterionVerdict:
    """One verdict from several on the same criterion.

    Args:
        votes: at least one.
        rule: see the module.
        name: of the joint verdict's judge.
    """
    label = joint_label([vote.label for vote in votes], rule)
    speaker = next((vote for vote in votes if vote.label == label), votes[0])
    counts = ", ".join(f"{vote.judge or 'judge'} {vote.label}" for vote in votes)
    split = len({vote.label for vote in votes}) > 1
    return CriterionVerdict(
        speaker.id,
        speaker.title,
        label,
        f"{speaker.reason} [{counts}]" if split else speaker.reason,
        speaker.evidence,
        speaker.misquotes,
        name,
        speaker.state,
        all(vote.cached for vote in votes),
        sum((vote.tokens for vote in votes), Tokens()),
        total_cost(votes),
        any(vote.stale for vote in votes),
        votes=tuple(votes),
    )


def joint_label(labels: Sequence[Label], rule: Rule) -> Label:
    """The label that the rule gives; see the module."""
    passes, fails, total = labels.count("pass"), labels.count("fail"), len(labels)
    if rule == "majority":
        if 2 * passes > total:
            return "pass"
        return "fail" if 2 * fails >= total else "unscored"
    if fails:
        return "fail"
    return "pass" if passes == total else "unscored"
