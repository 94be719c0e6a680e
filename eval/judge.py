"""The exact judge: one value is expected, one value must be given.

It is meant for synthetic matters, RULER and any question whose answer is a literal string. It leans to one side: an odd
way of giving the right value can fail. So an answer fails when it lists several values, takes the right one back, gives
it inside a longer number or name, in another currency, or also names a value that was superseded. It reads no English,
though: what takes a value back in words that it does not know, or gives another sum in words alone, can pass. A missing
answer is unscored, which is neither.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .matters.words import MONTHS
from .questions import Question

if TYPE_CHECKING:
    from .tasks import Criterion

Label = Literal["pass", "fail", "unscored"]


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer.

    Attributes:
        label: "pass", "fail" or "unscored". Unscored means that there was nothing to judge; it counts as neither.
        stale: the answer gives a superseded value, alone or beside the right one.
        recall: share of the expected values that occur as whole values, 0 to 1, whatever else is said.
        reason: why, in a few words.
    """

    label: Label
    stale: bool = False
    recall: float = 0.0
    reason: str = ""

    @property
    def passed(self) -> bool | None:
        """True, False, or None when unscored."""
        return None if self.label == "unscored" else self.label == "pass"


_MONTH = re.compile(rf"\b(?:{'|'.join(f'{month[:3]}(?:{month[3:]})?' for month in MONTHS)})\b")
_FILE = re.compile(r"[\w./-]+\.(?:txt|md|docx|xlsx|pptx|pdf|eml|csv|json)\b")
_PLACE = re.compile(
    r"\b(?:document|clause|section|schedule|annex|paragraph|page|amendment|part|item|exhibit|article)s?"
    r"\s+(?:no\.?\s*)?\d{1,2}\b(?![/,.\-:]?\d)",
    re.IGNORECASE,
)
_SCALE = r"(?:\s*(?:%|percent|hundred|thousand|million|billion|trillion|bn|mn)\b|\s*%|\s?[kKmM]\b)"
_LIMIT = re.compile(r"\bnot\s+(?:to\s+)?(?:exceed|more|less|later|earlier|above|over)\b", re.IGNORECASE)
_NOT = r"(?:not|never|neither|nor|cannot|\w+n['\u2019]t|no longer)"
_DENIED = re.compile(
    rf"\b(?:{_NOT}|rather than|instead of|other than|except|excluding|unlike|unknown|unclear)\b"
    r"|\b(?:formerly|previously|originally|initially|used to|was once|replace[sd]|supersede[sd]|incorrect(?:ly)?"
    r"|wrong(?:ly)?|outdated|false(?:ly)?)(?:\W+\w+){0,4}\W*$",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"^\W*(?:(?:which|that|it|this|is|was|were|has|had|been|being|now|but)\W+){0,4}"
    rf"(?:{_NOT}|wrong|incorrect|false|outdated|superseded|replaced|void)\b(?!\s+only)",
    re.IGNORECASE,
)
# What says of the words before it, in their sentence or the next, that they were wrong, and nothing else.
_RETRACTION = re.compile(
    r"^\W*(?:no,?\s+(?:wait|sorry|actually)\b|(?:scratch|strike|make)\s+that\b|i\s+mean\b|(?:sorry|correction)\s*[,:;]"
    r"|(?:(?:this|that|the)\s+(?:\w+\s+)?(?:figure|value|number|amount|sum|date|name|answer|entry)|this|that|it)"
    r"\s+(?:is|was)\s+(?:(?:not|no longer)\s+(?:right|correct|true|valid|so)|wrong|incorrect|false|outdated)\b)",
    re.IGNORECASE,
)
_OPEN = re.compile(
    r"[\s*_`]*[:|\u2013\u2014-]\W*(?:unknown|unclear|none|n/?a|tbd|not\s+(?:known|found|stated|given|available))\W*$",
    re.IGNORECASE,
)
_TABLE = re.compile(r"(?:^[ \t]*\|.*\n?)+", re.MULTILINE)
_CODES = {"$": "USD", "€": "EUR", "£": "GBP"}
_CURRENCY = re.compile(r"\b(USD|EUR|GBP|CHF|CAD|AUD|NZD|HKD|SGD|JPY|CNY|INR|SEK|NOK|DKK|ZAR)\s*$|([$€£¥])\s+$")
_OR_AFTER = re.compile(r"^\W*(?:or|and/or|through|until)\b|^[/\u2013~]", re.IGNORECASE)
_OR_BEFORE = re.compile(r"\b(?:or|either|between)\W*$|[/~]$", re.IGNORECASE)
_WORD = r"[^\W\d_]+(?:[-'\u2019][^\W\d_]+)*"
_VALUE, _ECHO = "\N{LOZENGE}", "\N{SECTION SIGN}"  # stand for an expected value and for words of the question
# Words that an English sentence may write with a capital and that name nobody.
_PLAIN = frozenset(
    re.findall(
        r"\w+",
        """a according after all amendment an and annex answer as at based because before both but by certainly clause
        contract correct court document documents dr esq file final finally for from further he hence here his her i
        in it its matter mr mrs ms name note of on per person question section she since sir so specifically state
        sure that the their then therefore they this thus to under we what when which while who with yes you your""",
    )
)


def exact_judge(answer_text: str | None, question: Question) -> Verdict:
    """Judge an answer against the exact value that the question expects.

    It passes when every expected value occurs as a whole value (no letter or digit next to it, not a part of a longer
    number, date or name), the answer does not deny it, no superseded value occurs outside of it, and the answer gives
    no other value of that kind. Only white space and the punctuation around a value are normalised: upper and lower
    case, and the way of writing a date or a sum, are not. File names, "clause 4" and what the question itself says
    are not taken for values.

    Args:
        answer_text: the model's answer without its reasoning; None when there is none because something failed.
        question: several `answers` must all be given, and nothing else of their kind.
    """
    if answer_text is None:
        return Verdict("unscored", reason="there is no answer to judge")
    text = _squeeze(answer_text)
    asked = _squeeze(question.text)
    expected = [_squeeze(value) for value in question.answers]
    spans = {value: _whole(value, text) for value in expected}
    recall = sum(bool(found) for found in spans.values()) / len(expected)

    rest = _cut(text, [span for found in spans.values() for span in found])
    stale = any(_whole(_squeeze(value), rest, ignore_case=True) for value in question.wrong)

    if not text:
        reason = "the answer is empty"
    elif stale:
        reason = "gives a superseded value"
    elif recall < 1:
        missing = next(value for value, found in spans.items() if not found)
        reason = f"does not give {missing!r} as a whole value"
    elif other := _other_value(rest, asked, expected, str(question.tags.get("kind", ""))):
        reason = f"also gives {other!r}"
    elif any(_denied(text, span) for found in spans.values() for span in found):
        reason = "takes the value back or offers it as one of several"
    elif any(_other_currency(text, span) for found in spans.values() for span in found):
        reason = "gives the value in another currency"
    else:
        return Verdict("pass", recall=1.0, reason="gives the expected value and no other")
    return Verdict("fail", stale, recall, reason)


def exact_criterion(deliverable: str | None, criterion: Criterion) -> Verdict:
    """Judge a deliverable against a criterion whose `expect` block can be checked by machine.

    Only the sentences and lines that name the criterion's party are read, each with the next one where that takes it
    back, and they must give one value between them: write one line for each party. A criterion with `expect["absent"]`
    passes when its value stands nowhere in the deliverable. An empty deliverable fails every criterion, those too.

    Args:
        deliverable: the text of the files that the criterion is bound to; None when they could not be read.
        criterion: see `tasks.Criterion`.

    Raises:
        ValueError: the criterion has no `expect` block, so a judge that reads is needed.
    """
    expect = criterion.expect
    if expect is None:
        raise ValueError(f"criterion {criterion.id!r} has no 'expect' block; the exact judge cannot judge it")
    if deliverable is None:
        return Verdict("unscored", reason="there is no deliverable to judge")
    if not deliverable.strip():
        return Verdict("fail", reason="the deliverable is empty")
    if expect.get("absent"):
        if _whole(_squeeze(expect["value"]), _squeeze(deliverable), ignore_case=True):
            return Verdict("fail", reason=f"gives {expect['value']!r}, which it must not")
        return Verdict("pass", recall=1.0, reason=f"does not give {expect['value']!r}")
    lines = [deliverable[start:end] for start, end in sentences(deliverable)]
    named = [names(line, expect["party"]) for line in lines]
    about = [line for line, here in zip(lines, named, strict=True) if here]
    if not about:
        return Verdict("fail", reason=f"says nothing of {expect['party']}")
    for line, before in zip(lines[1:], named, strict=False):
        if before and _RETRACTION.match(line):
            return Verdict("fail", reason=f"takes back what it says of {expect['party']}: {_squeeze(line)!r}")
    if len(about) > 1 and (_left_open(about, expect["party"]) or _rows_differ(deliverable, expect["party"])):
        return Verdict("fail", reason=f"says different things of {expect['party']}")
    question = Question(
        criterion.id,
        f"{expect['question']} {expect['party']}",
        expect["value"],
        tuple(expect.get("superseded", ())),
        {"kind": expect.get("kind", "")},
    )
    return exact_judge("\n".join(about), question)


def sentences(text: str) -> list[tuple[int, int]]:
    """Where the sentences and lines of a deliverable begin and end: spans of `text`, breaks between them left out."""
    cuts = [match.span() for match in re.finditer(r"[\n\r]+|(?<=[.!?;])\s+", text)]
    starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(text)]
    return list(zip(starts, ends, strict=True))


def names(sentence: str, name: str) -> bool:
    """Whether a sentence names somebody or something: as a whole, in upper or lower case, over any spaces."""
    return bool(_whole(name, _squeeze(sentence), ignore_case=True))


def _left_open(about: Sequence[str], party: str) -> bool:
    """Whether a line that begins with the party says that nothing is known, as in "Party: unknown"."""
    lines = map(_squeeze, about)
    found = [(line, span) for line in lines for span in _whole(party, line, ignore_case=True)[:1]]
    return any(_OPEN.match(line[end:]) and not re.search(_WORD, line[:start]) for line, (start, end) in found)


def _rows_differ(text: str, party: str) -> bool:
    """Whether a table of two columns has rows for one party that say different things."""
    for table in _TABLE.findall(text):
        rows = [[cell.strip(" *_`") for cell in row.strip(" \t|").split("|")] for row in table.splitlines()]
        if len({row[1] for row in rows if len(row) == 2 and row[0].casefold() == party.casefold()}) > 1:
            return True
    return False


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _whole(value: str, text: str, ignore_case: bool = False) -> list[tuple[int, int]]:
    """Spans of `value` in `text` where it is a value of its own and not a part of a longer one."""
    edge = r"[^\W_]"  # a letter or a digit, of any script
    sign = r"(?<![\-\u2212+$€£])" if value[0] in "$€£0123456789" else ""
    before = rf"(?<!{edge})(?<!{edge}['\u2019\-])(?<!\d[.,/:]){sign}"
    after = rf"(?!{edge})(?!-{edge})(?![.,/:]\d)" + (rf"(?!{_SCALE})" if value[-1].isdigit() else "")
    flags = re.IGNORECASE if ignore_case else 0
    return [match.span() for match in re.finditer(before + re.escape(value) + after, text, flags)]


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text with a mark in place of every span."""
    for start, end in sorted(spans, reverse=True):
        text = f"{text[:start]}{_VALUE}{text[end:]}"
    return text


def _other_value(rest: str, asked: str, expected: Sequence[str], kind: str) -> str | None:
    """A value in what is left of the answer that the question does not say itself."""
    if any(char.isdigit() for value in expected for char in value):
        rest, said = _PLACE.sub(" ", _FILE.sub(" ", rest)), set(_numbers(asked))
        others = [number for number in _numbers(rest) if number not in said]
        if kind == "date":
            others += _MONTH.findall(rest)
        return others[0] if others else None
    if kind == "variable":
        others = [name for name in re.findall(r"\b[A-Z]{3,}\b", rest) if name not in re.findall(r"\w+", asked)]
        return next((name for name in others if name != "VAR"), None)
    return _other_name(rest, asked, expected)


def _numbers(text: str) -> list[str]:
    """Words with a digit in them, without the punctuation around."""
    return [match.strip(".,:-/") for match in re.findall(r"[\w/.,:$€£-]*\d[\w/.,:-]*", text)]


def _other_name(rest: str, asked: str, expected: Sequence[str]) -> str | None:
    """Capitalised words that are neither the question's names, nor a part of the answer, nor plain English."""
    plain = _PLAIN | {word for word in re.findall(_WORD, asked) if word.islower()}
    for name in sorted(re.findall(r"[A-Z]\w+(?:\s+[A-Z]\w+)+", asked), key=len, reverse=True):
        rest = rest.replace(name, _ECHO)
    parts = {word for text in (asked, *expected) for word in re.findall(_WORD, text)}
    for run in re.findall(rf"(?:{_WORD}|{_VALUE})(?:\s+(?:{_WORD}|{_VALUE}))*", rest):
        name: list[str] = []  # capitalised words in a row
        for word in [re.sub(r"['\u2019]s$", "", word) for word in run.split()] + [""]:
            if word == _VALUE or (word[:1].isupper() and word.lower() not in plain):
                name.append(word)
                continue
            if len(name) > 1 or any(each != _VALUE and each not in parts for each in name):
                return " ".join(each for each in name if each != _VALUE) or "the same name again"
            name = []
    return None


def _other_currency(text: str, span: tuple[int, int]) -> bool:
    """Whether a sum has a currency before it that is not its own, as in "EUR $5"."""
    sign, found = text[span[0]], _CURRENCY.search(text[max(0, span[0] - 6) : span[0]])
    return sign in _CODES and found is not None and found[1] != _CODES[sign] and found[2] != sign


def _denied(text: str, span: tuple[int, int]) -> bool:
    """Whether the words around a value take it back or offer it as one of several."""
    before, after = text[: span[0]], text[span[1] :]
    sentence = _LIMIT.sub(" ", re.split(r"[.!?;]\s", before)[-1])
    return any(
        (
            _DENIED.search(sentence),
            _TAKEN_BACK.match(after),
            _RETRACTION.match(after),
            _OR_AFTER.match(after),
            _OR_BEFORE.search(before),
        )
    )
