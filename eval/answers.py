"""A judge's answer to verdicts, strictly: what is not clearly a verdict on a criterion that was asked is none.

The last JSON object of the right shape counts, whatever prose stands around it; where another one in the answer, a
draft or a quotation, gives a criterion the other label, it is asked again. What was written while thinking, up to
`</think>`, does not count, nor does an object inside another one that broke off. Names are checked: an unknown one is
left out, one given twice is asked again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_NESTED = re.compile(r'(?:[\[,]|":)\s*\Z')
_DECODER = json.JSONDecoder(object_pairs_hook=lambda pairs: _unique(pairs))


@dataclass(frozen=True)
class Said:
    """What the judge said of one criterion."""

    label: Literal["pass", "fail"]
    reason: str
    quotes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What an answer holds.

    Attributes:
        said: by criterion id; a criterion that is not in it has to be asked again.
        problems: what was wrong, in words that the judge can be told.
    """

    said: Mapping[str, Said]
    problems: tuple[str, ...] = ()


def parse_answer(text: str, ids: Sequence[str], labs: bool = False) -> Answer:
    """Read an answer to the criteria `ids`.

    Args:
        text: what the judge wrote, hidden reasoning aside.
        ids: the criteria that were asked, in order.
        labs: LAB's form `{"verdict", "reasoning"}` for one criterion, in any order of its keys. Ours has a list of
            verdicts, each with its reason before the verdict.
    """
    keys = {"verdict"} if labs else {"verdicts"}
    objects = _objects(text)
    if not labs and len(ids) == 1:
        objects = [{"verdicts": [each]} if "verdict" in each else each for each in objects]
    answers = [each for each in objects if keys <= each.keys()]
    if not answers or answers[-1] is not objects[-1]:
        return Answer({}, ("the answer ended without a whole JSON object of the form that was asked for",))
    *others, last = [_one(each, ids[0]) if labs else _listed(each["verdicts"], ids) for each in answers]
    both = [name for name, one in last.said.items()
            if any(name in other.said and other.said[name].label != one.label for other in others)]  # fmt: skip
    said = {name: one for name, one in last.said.items() if name not in both}
    return Answer(said, (*last.problems, *(f"criterion {name} was both passed and failed" for name in both)))


def _one(verdict: Mapping[str, Any], name: str) -> Answer:
    said, problem = _said(verdict, "reasoning")
    return Answer({name: said}) if said else Answer({}, (problem,))


def _listed(verdicts: Any, ids: Sequence[str]) -> Answer:
    if not isinstance(verdicts, list) or not all(isinstance(each, dict) for each in verdicts):
        return Answer({}, ('"verdicts" was no list of objects',))
    asked = {name.strip(): name for name in ids}
    found: dict[str, Said] = {}
    problems, seen = [], set()
    for each in verdicts:
        given = each.get("id", ids[0] if len(ids) == 1 else None)
        name = asked.get(given.strip()) if isinstance(given, str) else None
        if name is None:
            problems.append(f"there is no criterion {_short(given)}")
            continue
        if name in seen:
            problems.append(f"criterion {name} was judged twice")
            found.pop(name, None)
            continue
        seen.add(name)
        said, problem = _said(each, "reason", ordered=True)
        if said:
            found[name] = said
        else:
            problems.append(f"criterion {name}: {problem}")
    problems += [f"criterion {name} was left out" for name in ids if name not in seen]
    return Answer(found, tuple(problems))


def _said(item: Mapping[str, Any], reason_key: str, ordered: bool = False) -> tuple[Said | None, str]:
    verdict, reason = item.get("verdict"), item.get(reason_key)
    label = verdict.strip().lower() if isinstance(verdict, str) else verdict
    if label not in ("pass", "fail"):
        return None, f"the verdict was {_short(verdict)}, neither pass nor fail"
    if not isinstance(reason, str) or not reason.strip():
        return None, f'there was no "{reason_key}"'
    keys = list(item)
    if ordered and keys.index(reason_key) > keys.index("verdict"):
        return None, "the verdict came before its reason"
    quotes = item.get("evidence", [])
    quotes = [quotes] if isinstance(quotes, str) else quotes if isinstance(quotes, list) else []
    texts = tuple(_writable(each) for each in quotes if isinstance(each, str) and each.strip())
    return Said(label, _writable(reason), texts), ""


def _writable(text: str) -> str:
    """The text with "?" for each half of a pair (a lone "\\ud83d" in the JSON), which no file or data base takes."""
    return text.strip().encode("utf-8", "replace").decode()


def _short(value: Any) -> str:
    """What a judge wrote, as a message may repeat it."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def _objects(text: str) -> list[dict[str, Any]]:
    """The outermost JSON objects of a text after its thinking, in order; an empty one stands for one that is broken.

    Many models' prompts open the thinking, so `</think>` alone ends it; one inside an object is a quotation.
    """
    found: list[dict[str, Any]] = []
    thinking = text.lstrip().startswith("<think>")
    place, end, broken = text.find("{"), 0, False
    while place >= 0:
        if text.find("</think>", end, place) >= 0:
            found, thinking = [], False
        try:
            value, after = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            value, after = {}, place + 1
        if broken and _NESTED.search(text, max(0, place - 64), place):
            value = {}
        found.append(value)
        end, broken = after, not value
        place = text.find("{", end)
    return [] if thinking or "</think>" in text[end:] else found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)
