"""A cheap judge on everything, a strong one where it can change the result.

For **all-pass** a task with more than a few cheap fails is lost whatever a strong judge says of the rest: it ends
there. Otherwise the strong judge takes the fails, and where no fail is left after that the passes too, the only place
where a false pass can still matter: every criterion of an all-pass was checked by it. For **rates** the strong judge
takes what the cheap one is likely to get wrong: criteria on which its votes differ, that it left unscored, and the
kinds that cheap judges misread. Beside either, a random sample goes to both judges, so that the cheap one's error rates
can be measured without bias (`role` "audit").
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from .ensemble import Ask, Panel, Verdicts
from .kinds import KINDS, criterion_kind
from .verdicts import CriterionVerdict, Tokens, total_cost

if TYPE_CHECKING:
    from .tasks import Criterion


@dataclass(frozen=True)
class Cascade:
    """A cheap judge and a strong one; either may be an ensemble.

    Attributes:
        cheap: judges every criterion.
        strong: judges what the policy hands on; its verdict replaces the cheap one's.
        policy: "all-pass" or "rates"; see the module.
        most_fails: all-pass: with more cheap fails than this the task has failed.
        kinds: rates: kinds of criteria that always go to the strong judge; see `kinds.py`.
        audit: share of the criteria that go to both judges at random, 0 to 1.
        seed: of that sample.
    """

    cheap: Panel
    strong: Panel
    policy: Literal["all-pass", "rates"] = "all-pass"
    most_fails: int = 3
    kinds: tuple[str, ...] = ("distractor", "absence", "counting")
    audit: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in ("all-pass", "rates"):
            raise ValueError(f"a cascade has the policy {self.policy!r}; there are all-pass and rates")
        if not 0 <= self.audit <= 1 or self.most_fails < 0:
            raise ValueError(f"a cascade has audit {self.audit} and most_fails {self.most_fails}; "
                             "the first is a share from 0 to 1, the second 0 or more")  # fmt: skip
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"a cascade escalates the kinds {sorted(unknown)}; there are {', '.join(KINDS)}")
        if self.cheap.name == self.strong.name:
            raise ValueError(f"both judges of a cascade are called {self.cheap.name!r}; name two different ones")

    @property
    def name(self) -> str:
        """ "cascade(cheap, strong)"."""
        return f"cascade({self.cheap.name}, {self.strong.name})"

    async def verdicts(self, criteria: Sequence[Criterion], ask: Ask) -> Verdicts:
        """Ask the cheap judge about everything and the strong one where the policy says so."""
        cheap = await ask(self.cheap, criteria)
        audited = self._sample(criteria)
        strong: dict[str, CriterionVerdict] = {}

        async def escalate(chosen: Sequence[Criterion]) -> None:
            fresh = [each for each in chosen if each.id not in strong]
            if fresh:
                strong.update(await ask(self.strong, fresh))

        if self.policy == "rates":
            doubted = {each.id for each in criteria if self._doubtful(each, cheap[each.id])}
            await escalate([each for each in criteria if each.id in doubted | audited])
        else:
            lost = sum(cheap[each.id].label == "fail" for each in criteria) > self.most_fails
            doubted = {each.id for each in criteria if cheap[each.id].label != "pass" and not lost}
            await escalate([each for each in criteria if each.id in doubted | audited])
            merged = {**cheap, **strong}  # the audit too may have overturned the last fail, or found one
            if not any(verdict.label == "fail" for verdict in merged.values()):
                await escalate(criteria)
        return {each.id: self._merge(cheap[each.id], strong.get(each.id), each.id in audited) for each in criteria}

    def _sample(self, criteria: Sequence[Criterion]) -> set[str]:
        """Drawn by each criterion's own hash, so it does not depend on the others or on their order."""
        drawn = set()
        for each in criteria:
            rng = random.Random(f"audit:{self.seed}:{each.id}:{each.rubric_hash}")
            if rng.random() < self.audit:
                drawn.add(each.id)
        return drawn

    def _doubtful(self, criterion: Criterion, verdict: CriterionVerdict) -> bool:
        split = len({vote.label for vote in verdict.votes}) > 1
        return verdict.label == "unscored" or split or criterion_kind(criterion) in self.kinds

    def _merge(self, cheap: CriterionVerdict, strong: CriterionVerdict | None, audited: bool) -> CriterionVerdict:
        if strong is None:
            return replace(cheap, role="cheap")
        votes = (replace(cheap, role="cheap"), replace(strong, role="strong"))
        return replace(
            strong,
            judge=self.name,
            role="audit" if audited else "strong",
            tokens=sum((vote.tokens for vote in votes), Tokens()),
            cost=total_cost(votes),
            cached=cheap.cached and strong.cached,
            votes=votes,
        )
