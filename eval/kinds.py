"""Kinds of criteria, told from their words: what a judge finds easy on one kind it gets wrong on another.

A judge that skims for "mentions X" passes distractors and absences wrongly, and one that does not count passes "at
least 8 of the 12". So error rates are reported per kind, and a cascade asks its strong judge about the risky ones.
The rules read English; they are hints for tables and for routing and never decide a verdict.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from .tasks import Criterion

Kind = Literal["presence", "numeric", "counting", "absence", "distractor"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_NUMBER = r"(?:\d+|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)"
_NOUNS = r"(?:issues|items|elements|points|factors|categories|provisions|risks|matters|documents|sections|deviations)"
_COUNTING = re.compile(
    rf"\b(?:at least|no fewer than|not fewer than|a minimum of)\s+(?!1\b){_NUMBER}(?:\s*\(\d+\))?"
    rf"\s*(?:%|percent|per cent)?\s+(?:of\b|(?:[\w-]+\s+){{0,2}}{_NOUNS}\b)"
    rf"|\bfewer than\s+(?!1\b){_NUMBER}\b(?!\s+(?:days|months|years|weeks))"
    rf"|\b{_NUMBER} (?:or more|out) of\b|\b\d+ of (?:the )?(?:following )?{_NUMBER}\b",
    re.IGNORECASE,
)
_NEGATED = (
    r"(?:do(?:es)? not|is not|are not|must not|never|avoids?|refrains?|contains? no|includes? no|makes? no|omits?)"
)
_ABSENCE = re.compile(
    r"^(?:(?:PASS (?:only )?(?:if|when|unless)[,:]?\s+)?(?:(?:the|an?|its?|no part of the)\s+)?"
    rf"(?:[\w'\u2019-]+\s+){{0,4}}?){_NEGATED}\b|^(?:no|without)\b",
    re.IGNORECASE,
)
_AMOUNT = re.compile(
    r"[$€£¥]\s?\d|\b\d[\d,.]*\s?(?:%|percent\b|per cent\b|bps\b|basis points\b|x\b|million\b|billion\b|[MB]\b)"
    r"|\b(?:USD|EUR|GBP|CHF)\s?\d",
    re.IGNORECASE,
)


def kind_of(title: str, match_criteria: str = "") -> Kind:
    """The kind of a criterion by its two texts; the title alone, where no more is known.

    A distractor passes when a red herring is *not* treated as an issue, an absence when something is not there, a
    counting one needs several of a list, a numeric one an amount or a rate. Everything else is presence.
    """
    passing = re.split(r"\bFAIL\b", match_criteria, maxsplit=1)[0].strip()
    if "DISTRACTOR" in title.upper():
        return "distractor"
    if _ABSENCE.search(passing or title) or re.search(r"\bdo(?:es)? not\b", title, re.IGNORECASE):
        return "absence"
    if _COUNTING.search(title) or _COUNTING.search(passing):
        return "counting"
    return "numeric" if _AMOUNT.search(title) or _AMOUNT.search(passing) else "presence"


def criterion_kind(criterion: Criterion) -> Kind:
    """The kind of a criterion of a task; one that expects a value to be absent is a distractor whatever its words."""
    return "distractor" if criterion.is_distractor else kind_of(criterion.title, criterion.match_criteria)
