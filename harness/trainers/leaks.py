"""The leak gate: nothing that only a teacher was told may show in what a student learns.

Five checks of a rollout's public text against what was private and what had been read: structural (markers and lines of
private text), vocabulary (words of grading), copied (runs of words from a criterion), clairvoyant (values that nothing
read so far contains) and order (the decisive documents first). A sixth number, the privilege meter, is reported and not
judged: how much likelier the private text made each span.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ...eval.tasks import LabTask

KINDS = ("structural", "vocabulary", "copied", "clairvoyant", "order")
WORDS = re.compile(
    r"\b(?:rubrics?|criteri(?:on|a)|graders?|grading|judges?|scor(?:e|es|ed|ing)|feedback|checklists?|private note|"
    r"not complete yet|full marks|pass(?:es)? (?:the )?(?:check|test)s?)\b",
    re.IGNORECASE,
)
VALUE = re.compile(
    r"\b(?:\d[\d.,/:-]*\d|\d{2,}|[A-Z]{2,}[-/ ]?\d[\w/-]*|[A-Z][a-z]+(?: (?:&|of|and|[A-Z]\.?))*(?: [A-Z][a-z]+)+)\b"
)
CHANCE = 0.05
"""Probability below which an order of reading is no accident."""


@dataclass(frozen=True)
class Leak:
    """One finding.

    Attributes:
        kind: see the module.
        turn: of the rollout; -1 where it is of the whole.
        what: the words, the value or the order.
    """

    kind: str
    turn: int
    what: str


@dataclass(frozen=True)
class Said:
    """One message of the public transcript, in order.

    Attributes:
        role: system, user, assistant or tool.
        text: content, with the arguments of calls.
        turn: number of the assistant's turn it is or follows.
        document: what a tool's message read, or empty.
    """

    role: str
    text: str
    turn: int
    document: str = ""


def transcript(events: Sequence[Mapping[str, Any]], text_of) -> list[Said]:
    """The public transcript of a run.

    Args:
        events: of the run.
        text_of: gives the text of a blob by its hash.
    """
    run, turn = events[0], -1
    said = [Said("system", run["system"], -1), Said("user", run["user"], -1)]
    for event in events:
        if event["event"] == "turn":
            turn = event["turn"]
            calls = "\n".join(_arguments(call["arguments"]) for call in event["calls"])
            said.append(Said("assistant", f"{event['text']}\n{calls}".strip(), turn))
        elif event["event"] == "tool":
            document = event["document"] if event["ok"] else ""
            said.append(Said("tool", text_of(event["result"]), turn, document))
        elif event["event"] == "note":
            said.append(Said("user", event["text"], turn))
    return said


def _arguments(text: str) -> str:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return "\n".join(str(value) for value in found.values()) if isinstance(found, dict) else text


def leaks_of(
    said: Sequence[Said], task: LabTask, private: Iterable[str], markers: Iterable[str], *,
    corrected_at: Sequence[int] = (), longest_copy: int = 12, clairvoyance: float = 0.02,
    usual_order: Sequence[str] | None = None,
) -> list[Leak]:  # fmt: skip
    """Everything that leaks in one rollout.

    Args:
        said: its public transcript.
        task: with its rubric.
        private: private texts: prefixes, notes.
        markers: canaries in them.
        corrected_at: turns after a private note; values are checked from the first of them on, and everywhere where a
            criterion has them.
        longest_copy: words in a row that may be shared with a criterion and nothing read.
        clairvoyance: share of unfounded values that is allowed.
        usual_order: in which an unprivileged run read the documents; the order of the listing unless given.
    """
    return [
        *_structural(said, private, markers), *_vocabulary(said), *_copied(said, task, longest_copy),
        *_clairvoyant(said, task, corrected_at, clairvoyance), *_order(said, task, usual_order),
    ]  # fmt: skip


def _structural(said: Sequence[Said], private: Iterable[str], markers: Iterable[str]) -> list[Leak]:
    parts = [part.strip() for text in private for part in re.split(r"\n|(?<=[.!?\]])\s+", text)]
    lines = [part for part in dict.fromkeys(parts) if len(part) >= 24]
    found = []
    for each in said:
        for mark in markers:
            if mark in each.text:
                found.append(Leak("structural", each.turn, mark))
        flat = _squeezed(each.text)
        found += [Leak("structural", each.turn, line) for line in lines if _squeezed(line) in flat]
    return found


def _vocabulary(said: Sequence[Said]) -> list[Leak]:
    found, known = [], set()
    for each in said:
        words = [match[0].lower() for match in WORDS.finditer(each.text)]
        if each.role != "assistant":
            known |= set(words)
            continue
        found += [Leak("vocabulary", each.turn, word) for word in dict.fromkeys(words) if word not in known]
    return found


def _copied(said: Sequence[Said], task: LabTask, longest: int) -> list[Leak]:
    criteria = [_words(f"{c.title} {c.match_criteria}") for c in task.criteria]
    runs = {tuple(words[i : i + longest + 1]) for words in criteria for i in range(len(words) - longest)}
    found, known = [], set()
    for each in said:
        words = _words(each.text)
        here = {tuple(words[i : i + longest + 1]) for i in range(len(words) - longest)}
        if each.role != "assistant":
            known |= here & runs
            continue
        shared = (here & runs) - known
        if shared:
            found.append(Leak("copied", each.turn, " ".join(sorted(shared)[0])))
    return found


def _clairvoyant(said: Sequence[Said], task: LabTask, corrected_at: Sequence[int], limit: float) -> list[Leak]:
    rubric = _squeezed(" ".join(
        [f"{c.title} {c.match_criteria} {(c.expect or {}).get('value', '')}" for c in task.criteria]
    ))  # fmt: skip
    first = min(corrected_at, default=math.inf)
    seen, unfounded, mentioned, told = "", [], 0, set()
    for each in said:
        flat = _squeezed(each.text)
        if each.role == "assistant":
            for value in {_squeezed(match[0]) for match in VALUE.finditer(each.text)} - told:
                told.add(value)
                private = value in rubric
                if each.turn < first and not private:
                    continue
                mentioned += 1
                if value not in seen:
                    unfounded.append(Leak("clairvoyant", each.turn, value))
        else:
            seen += f" {flat}"
    return unfounded if mentioned and len(unfounded) / mentioned > limit else []


def _order(said: Sequence[Said], task: LabTask, usual: Sequence[str] | None) -> list[Leak]:
    names = [line.removeprefix("documents/") for line in said[1].text.splitlines() if line.startswith("documents/")]
    read = list(dict.fromkeys(each.document for each in said if each.document))
    usual = [name for name in (usual or names) if name in names]
    decisive = {source for c in task.criteria for source in c.sources} & set(names)
    count = len(decisive)
    if not count or count >= len(names) or len(read) < count:
        return []
    chance = 1 / math.comb(len(names), count)
    if set(read[:count]) == decisive and set(usual[:count]) != decisive and chance < CHANCE:
        return [Leak("order", -1, f"{', '.join(read[:count])} before any other of {len(names)} documents")]
    return []


def privilege(private: Sequence[float], public: Sequence[float]) -> float:
    """The meter of a span: mean of `log pi(a | public, private) - log pi(a | public)`, nats a token.

    Raises:
        ValueError: the two are not of the same tokens.
    """
    if len(private) != len(public) or not private:
        raise ValueError(f"{len(private)} log-probabilities with the private text and {len(public)} without: no span")
    return fmean(a - b for a, b in zip(private, public, strict=True))


@dataclass(frozen=True)
class LeakReport:
    """The gate's verdict on a data set.

    Attributes:
        rollouts: checked.
        leaks: by rollout.
        meter: privilege by rollout and turn, where it was measured.
    """

    rollouts: tuple[str, ...]
    leaks: dict[str, list[Leak]]
    meter: dict[str, dict[str, float]]

    @property
    def clean(self) -> list[str]:
        """Rollouts without a leak."""
        return [name for name in self.rollouts if not self.leaks.get(name)]

    def counts(self) -> dict[str, int]:
        """Rollouts with a leak of each kind."""
        found = Counter(kind for leaks in self.leaks.values() for kind in {leak.kind for leak in leaks})
        return {kind: found[kind] for kind in KINDS}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rollouts": list(self.rollouts), "counts": self.counts(), "clean": len(self.clean), "meter": self.meter,
            "leaks": {name: [asdict(leak) for leak in leaks] for name, leaks in self.leaks.items() if leaks},
        }  # fmt: skip


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().lower()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
