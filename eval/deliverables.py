"""What a run delivered, as a judge sees it: the files that a criterion is judged on, their texts, what is amiss.

A deliverable is there with text, or it is "missing" (no such file), "empty" (no text in it) or "unreadable" (corrupt,
password-protected, of a kind that no reader takes). A criterion whose files all lack text gets that state, and a
policy says what follows: "fail" without a call, "unscored", or "judge", which lets the judge see that it is not there.
Where some of its files have text, the judge reads those, and a mark in place of the others.

A run of ours that has not ended (killed, or its server broke; it can go on) has delivered nothing yet, which is none of
these states: it is refused, so that it gets no verdicts. One that ended badly is judged on what it handed in.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Literal

from .prompting import Section
from .readers import DocumentError, find_outputs, read
from .tasks import Criterion, LabTask

Policy = Literal["fail", "unscored", "judge"]
Names = Literal["exact", "closest"]
_STATES = {"missing": "missing", "empty": "empty", "no_text": "empty"}
_WHY = {"missing": "this file was not delivered", "empty": "this file is empty"}
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u00a0", "''\"\"-- ", "*_`\\")


@dataclass(frozen=True)
class Deliverable:
    """One file as it was read.

    Attributes:
        name: below the output folder, with "/" between folders.
        state: "ok", "missing", "empty" or "unreadable".
        text: all of it; None unless "ok".
        sha256: of the text in UTF-8.
        file_sha256: of the file's bytes.
        reader: which one made the text.
        redlines: tracked changes are shown instead of accepted.
        why: what is wrong, for the reader of a report.
        notes: what the reader saw and the text does not hold.
    """

    name: str
    state: str
    text: str | None = None
    sha256: str = ""
    file_sha256: str = ""
    reader: str = ""
    redlines: bool = False
    why: str = ""
    notes: tuple[str, ...] = ()

    @property
    def section(self) -> Section:
        """What a prompt shows."""
        return Section(self.name, self.text, _WHY.get(self.state, "this file could not be read"))

    def record(self) -> dict[str, Any]:
        """Everything but the text, for result files."""
        known = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "text"}
        known |= {"characters": len(self.text or ""), "notes": list(self.notes)}
        return {key: value for key, value in known.items() if value or key == "characters"}


@dataclass(frozen=True)
class Sheet:
    """The files that a group of criteria is judged on, in the order in which a judge sees them.

    Attributes:
        files: bound ones in the criterion's order, else every output, sorted.
        bound: the criteria name them.
    """

    files: tuple[Deliverable, ...]
    bound: bool

    @property
    def state(self) -> str:
        """ "ok" if any file has text, else what is wrong with the first."""
        if any(each.state == "ok" for each in self.files):
            return "ok"
        return self.files[0].state if self.files else "missing"

    @property
    def why(self) -> str:
        """What is wrong, in words."""
        return "; ".join(each.why for each in self.files if each.why) or "nothing was delivered"

    @cached_property
    def text(self) -> str:
        """The texts, for a judge that takes no prompt."""
        return "\n\n".join(each.text for each in self.files if each.text is not None)

    @cached_property
    def key(self) -> list[list[str]]:
        """What a verdict depends on: names, and hashes or states."""
        return [["bound" if self.bound else "all"], *([each.name, each.sha256 or each.state] for each in self.files)]

    def holds(self, quote: str) -> bool:
        """Whether a quotation stands in the texts; white space, emphasis and the form of quotation marks aside."""
        parts = [_plain(part) for part in re.split(r"\[?\.\.\.\]?|\[?\u2026\]?", quote)]
        return any(parts) and all(part in self._plain for part in parts)

    @cached_property
    def _plain(self) -> str:
        return _plain(self.text)


class UnfinishedRun(ValueError):
    """A run that has not ended, so that what it will deliver cannot be judged yet."""


class Outputs:
    """The output files of one run.

    Args:
        source: a run folder (its `output/` is taken), an output folder, or texts by file name.

    Raises:
        FileNotFoundError: the folder is not there.
        UnfinishedRun: it is a run that has not ended.
    """

    def __init__(self, source: str | Path | Mapping[str, str]):
        self._texts = self._root = None
        self._read: dict[tuple[str, bool], Deliverable] = {}
        self._taken_for: dict[str, set[str]] = {}
        if isinstance(source, Mapping):
            self._texts, self.names = dict(source), tuple(sorted(source))
            return
        root = Path(source)
        if not root.is_dir():
            raise FileNotFoundError(f"there is no folder {root}; name a run folder, or the folder of its outputs")
        self._root = root / "output" if (root / "output").is_dir() else root
        if why := unfinished(root.parent if root.name == "output" else root):
            raise UnfinishedRun(f"{root} is a run that has not ended ({why}): go on with it, or leave it out")
        is_run = self._root == root and any((root / name).is_file() for name in ("config.json", "metrics.json"))
        self.names = () if is_run else find_outputs(self._root)  # a run that delivered nothing has no output/

    def content(self) -> tuple[tuple[str, str], ...]:
        """What tells these files from others: the name of each, and its text or a digest of its bytes."""
        if self._texts is not None:
            return tuple(sorted(self._texts.items()))
        return tuple((name, hashlib.sha256((self._root / name).read_bytes()).hexdigest()) for name in self.names)

    def read(self, name: str, redlines: bool = False) -> Deliverable:
        """One file, read once; `redlines` counts for docx alone."""
        key = name, redlines and name.lower().endswith(".docx")
        if key not in self._read:
            self._read[key] = self._load(*key)
        return self._read[key]

    def sheet(self, task: LabTask, criterion: Criterion, naming: Names = "exact") -> Sheet:
        """The files that a criterion is judged on; with "closest", a misnamed one where the right one is not there."""
        names = dict.fromkeys(self._found(each, naming) for each in task.files_for(criterion, self.names))
        return Sheet(tuple(self.read(each, criterion.include_redlines) for each in names), bool(criterion.deliverables))

    def records(self) -> list[dict[str, Any]]:
        """What was read so far, for result files."""
        taken = {name: {"taken_for": sorted(asked)} for name, asked in self._taken_for.items()}
        return [self._read[key].record() | taken.get(key[0], {}) for key in sorted(self._read)]

    def _found(self, name: str, naming: Names) -> str:
        other = closest(name, self.names) if naming == "closest" and name not in self.names else None
        if other is None:
            return name
        self._taken_for.setdefault(other, set()).add(name)
        return other

    def _load(self, name: str, redlines: bool) -> Deliverable:
        if self._texts is not None:
            return _given(name, self._texts.get(name))
        if name not in self.names:
            return Deliverable(name, "missing", why=f"{name} was not delivered")
        try:
            reading = read(self._root / name, redlines)
        except DocumentError as problem:
            return Deliverable(name, _STATES.get(problem.state, "unreadable"), why=_relative(problem, self._root))
        hashes = {"sha256": reading.text_sha256, "file_sha256": reading.file_sha256}
        return Deliverable(
            name, "ok", reading.text, **hashes, reader=reading.reader, redlines=redlines, notes=reading.notes
        )


def unfinished(run: Path) -> str:
    """Why a run of ours (`still run`) has not ended, by its event log; "" where it has, and for runs of others."""
    log = run / "events.jsonl"
    if not _is_ours(run / "config.json"):
        return ""
    if not log.is_file():  # killed before its first event, or only what it delivered was kept
        return "" if any((run / name).exists() for name in ("metrics.json", "output")) else "it never began"
    last = _last_event(log)
    return "" if last.get("event") == "end" else str(last.get("error") or f"its log ends with {last.get('event')!r}")


def closest(name: str, names: Iterable[str]) -> str | None:
    """The output that LAB's evaluator takes for one that is not there; None where no single one can be meant.

    It is the only one with the same extension, else the one whose stem shares the most words with the name. (LAB then
    lets a model guess; we do not.)
    """
    names = list(names)
    alike = [each for each in names if PurePath(each).suffix.lower() == PurePath(name).suffix.lower()]
    if len(alike) == 1:
        return alike[0]
    shared = {each: len(_words(each) & _words(name)) for each in alike or names}
    best = [each for each, count in shared.items() if count and count == max(shared.values())]
    return best[0] if len(best) == 1 else None


def group_by_sheet(
    task: LabTask, outputs: Outputs, criteria: tuple[Criterion, ...], naming: Names = "exact"
) -> list[tuple[Sheet, list[Criterion]]]:
    """The criteria in groups that are judged on identical texts, in the order in which they first occur."""
    groups: dict[str, tuple[Sheet, list[Criterion]]] = {}
    for criterion in criteria:
        sheet = outputs.sheet(task, criterion, naming)
        groups.setdefault(json.dumps(sheet.key), (sheet, []))[1].append(criterion)
    return list(groups.values())


def _words(name: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", PurePath(name).stem.lower()))


def _is_ours(config: Path) -> bool:
    try:
        return "run" in json.loads(config.read_text(encoding="utf-8"))["still"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _last_event(log: Path) -> dict[str, Any]:
    """The last whole line; a run that was killed while it wrote leaves a torn one."""
    for line in reversed(log.read_bytes().splitlines()):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return {}


def _given(name: str, text: str | None) -> Deliverable:
    if text is None:
        return Deliverable(name, "missing", why=f"{name} was not delivered")
    if not text.strip():
        return Deliverable(name, "empty", why=f"{name} holds no text")
    text = text.encode("utf-8", "replace").decode()
    return Deliverable(name, "ok", text, hashlib.sha256(text.encode()).hexdigest(), reader="given as text")


def _relative(problem: DocumentError, root: Path) -> str:
    return str(problem).replace(f"{root}{os.sep}", "")


def _plain(text: str) -> str:
    return " ".join(text.translate(_QUOTES).split()).casefold()
