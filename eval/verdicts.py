"""What a grader says of one criterion, and how `scores.json` carries it.

LAB's own fields (`criteria_results`) hold id, title, verdict and reasoning. Everything else lies in the block `still`:

- `verdicts`: a list in rubric order, one `CriterionVerdict.to_json()` each, which `read_verdicts` turns back;
- `judging`: how the run was judged (`grade.Grading.scores` documents its keys).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from .judge import Label

State = Literal[
    "judged",  # a judge answered
    "missing",  # the deliverable is not there: decided by the policy, without a call
    "unreadable",  # it is there and no reader can read it (corrupt, password-protected, unknown type)
    "empty",  # it holds no text
    "error",  # every attempt failed: the server's errors, time-outs, cut answers
    "malformed",  # answers came, and none was a whole verdict on this criterion
    "refused",  # the judge declined, or a content filter stopped it
    "rejected",  # the server will not take this request at all: too long for the model, or a parameter it refuses
    "stopped",  # the budget ended, or a judge earlier in line gave none
]
"""How a verdict came about. The first four may carry a label; the others are always unscored."""

STATES: tuple[str, ...] = get_args(State)
DELIVERABLE_STATES: tuple[str, ...] = ("missing", "unreadable", "empty")


@dataclass(frozen=True)
class Tokens:
    """Tokens that a server reported, summed over calls.

    Attributes:
        input: all prompt tokens, cached ones included.
        cached: of these, read from the server's prefix cache.
        cache_write: of these, written to a prefix cache that charges for it.
        output: completion tokens, reasoning included.
        reasoning: of these, hidden reasoning.
        calls: answers that the tokens belong to.
    """

    input: int = 0
    cached: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0
    calls: int = 0

    @property
    def counts(self) -> tuple[int, ...]:
        """The fields in their order."""
        return self.input, self.cached, self.cache_write, self.output, self.reasoning, self.calls

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(*(mine + its for mine, its in zip(self.counts, other.counts, strict=True)))

    @property
    def total(self) -> int:
        """Input and output."""
        return self.input + self.output

    def share(self, parts: int) -> list[Tokens]:
        """Split over `parts` verdicts that one call gave; the shares sum to the whole, remainders go to the first."""
        split = [divmod(count, parts) for count in self.counts]
        return [Tokens(*(whole + (index < rest) for whole, rest in split)) for index in range(parts)]


@dataclass(frozen=True)
class CriterionVerdict:
    """The verdict on one criterion of one run.

    Attributes:
        id: the criterion's.
        title: the criterion's.
        label: "pass", "fail" or "unscored"; an error is never turned into one of the first two.
        reason: the judge's, or what went wrong.
        evidence: passages that the judge quoted and that stand in the deliverable (white space aside).
        misquotes: passages that it quoted and that do not stand there.
        judge: the name of the judge, or of the panel ("strict(a, b)", "cascade(a, b)").
        state: see `State`.
        cached: every call behind it came from the verdict cache.
        tokens: what it cost to get, its share of a call for several criteria; a cached one keeps the original's.
        cost: in US dollars by the price table, 0.0 where it took no call; None where the price is unknown.
        stale: the deliverable gives a superseded value (exact judge only).
        seed: of the criteria's order in a repeat; None in rubric order.
        role: in a cascade: "cheap", "strong", or "audit" for the strong judge's random sample.
        votes: the verdicts that this one was made from (repeats, ensembles, cascades).
    """

    id: str
    title: str
    label: Label
    reason: str = ""
    evidence: tuple[str, ...] = ()
    misquotes: tuple[str, ...] = ()
    judge: str = ""
    state: State = "judged"
    cached: bool = False
    tokens: Tokens = Tokens()
    cost: float | None = None
    stale: bool = False
    seed: int | None = None
    role: str = ""
    votes: tuple[CriterionVerdict, ...] = ()

    def __post_init__(self) -> None:
        if self.state not in (*DELIVERABLE_STATES, "judged") and self.label != "unscored":
            raise ValueError(f"{self.id} is {self.state!r} and cannot be a {self.label}; an error is never a verdict")

    @property
    def passed(self) -> bool | None:
        """True, False, or None when unscored."""
        return None if self.label == "unscored" else self.label == "pass"

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; what has its default is left out."""
        plain = asdict(self) | {"votes": [vote.to_json() for vote in self.votes]}
        plain["tokens"] = {name: count for name, count in plain["tokens"].items() if count}
        keep = ("id", "title", "label", "state", "judge", "cost")
        return {key: value for key, value in plain.items() if key in keep or value not in (None, "", (), [], {}, False)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CriterionVerdict:
        """Read what `to_json` wrote; keys of later versions are left out."""
        known = {key: data[key] for key in (each.name for each in fields(cls)) if key in data}
        for key in ("evidence", "misquotes"):
            known[key] = tuple(data.get(key, ()))
        known["tokens"] = Tokens(**data.get("tokens", {}))
        known["votes"] = tuple(cls.from_json(vote) for vote in data.get("votes", ()))
        return cls(**known)


def read_verdicts(scores: Mapping[str, Any]) -> list[CriterionVerdict]:
    """The verdicts of a `scores.json`, ours with their details, LAB's with what it has, in rubric order."""
    detailed = {each["id"]: each for each in (scores.get("still") or {}).get("verdicts", ())}
    return [
        CriterionVerdict.from_json(
            {"judge": scores.get("judge_model", ""), **detailed.get(each["id"], {})}
            | {"id": each["id"], "title": each["title"], "label": each["verdict"], "reason": each.get("reasoning", "")}
            | ({} if each["id"] in detailed or each["verdict"] != "unscored" else {"state": "error"})
        )
        for each in scores["criteria_results"]
    ]


def count_states(verdicts: Iterable[CriterionVerdict]) -> dict[str, int]:
    """How many verdicts came about in which way; states that did not occur are left out."""
    found = Counter(verdict.state for verdict in verdicts)
    return {state: found[state] for state in STATES if found[state]}


def total_cost(verdicts: Iterable[CriterionVerdict]) -> float | None:
    """The sum in US dollars, or None where the price of any verdict is unknown."""
    costs = [verdict.cost for verdict in verdicts]
    return None if None in costs else sum(costs)
