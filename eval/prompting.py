"""Prompts of judges: files with slots, known by their hash, whose shared part comes first.

A prompt file is text with slots in braces (`{{` and `}}` write a brace). Lines `--- system ---` and `--- user ---`
start its two messages; without them all of it is the user's. There are two kinds:

- ours: `{title}`, `{deliverables}` and `{criteria}` (and `{instructions}`, if wanted). Deliverables are fenced, any
  number of criteria fits a call, and the answer is `{"verdicts": [{"id", "evidence", "reason", "verdict"}]}`;
- LAB's: `{task_description}`, `{agent_output}`, `{criterion_title}` and `{match_criteria}`, so that LAB's own
  `rubric_criterion.txt` works as it is: sections as LAB writes them, one criterion a call, `{"verdict", "reasoning"}`.

Everything before the first slot of a criterion is the same for all criteria on the same files, so a server with a
prefix cache computes it once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Any

from .tasks import Criterion

FOLDER = Path(__file__).resolve().parent / "prompts"
OURS = {"title", "instructions", "deliverables", "criteria"}
LABS = {"task_description", "task_title", "task_instructions", "agent_output", "criterion_title", "match_criteria"}
_OF_A_CRITERION = {"criteria", "criterion_title", "match_criteria"}
_PART = re.compile(r"^--- (system|user) ---[ \t]*\n", re.MULTILINE)

Messages = list[dict[str, Any]]

_VERDICT = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "evidence": {"type": "array", "items": {"type": "string"}},
        "reason": {"type": "string"},
        "verdict": {"type": "string", "enum": ["pass", "fail"]},
    },
    "required": ["id", "evidence", "reason", "verdict"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {"verdicts": {"type": "array", "items": _VERDICT}},
    "required": ["verdicts"],
    "additionalProperties": False,
}
"""Of our answers. It names no ids: providers put the schema before the prompt, where a change empties their cache."""

LAB_SCHEMA = {
    "type": "object",
    "properties": {"verdict": {"type": "string", "enum": ["pass", "fail"]}, "reasoning": {"type": "string"}},
    "required": ["verdict", "reasoning"],
    "additionalProperties": False,
}


class PromptError(ValueError):
    """A prompt that is not there or cannot be filled."""


@dataclass(frozen=True)
class Section:
    """One file that a judge sees: its name, and its text or the reason why there is none."""

    name: str
    text: str | None
    why: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt file.

    Attributes:
        name: "plain", "checklist", or the name of the user's file.
        text: the file's.
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        try:
            slots = self.slots
        except ValueError as problem:
            raise PromptError(f"prompt {self.name!r} has a stray brace ({problem}); write it twice") from None
        if unknown := slots - OURS - LABS:
            raise PromptError(f"prompt {self.name!r} has slots {sorted(unknown)}; there are {sorted(OURS | LABS)}")
        needed = {"agent_output", "criterion_title", "match_criteria"} if slots & LABS else {"deliverables", "criteria"}
        if missing := needed - slots:
            raise PromptError(f"prompt {self.name!r} lacks the slots {sorted(missing)}")
        if slots & LABS and slots & OURS:
            raise PromptError(f"prompt {self.name!r} mixes our slots with LAB's; use {sorted(OURS)} or {sorted(LABS)}")
        if not _slots(self._user[: self._split]) & {"deliverables", "agent_output"}:
            raise PromptError(f"prompt {self.name!r} asks for the criterion before the deliverable; turn them round")

    @property
    def slots(self) -> set[str]:
        """Names of the slots in it."""
        return _slots(self.text)

    @cached_property
    def sha256(self) -> str:
        """Sixteen hex digits of the text: the prompt's version."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @cached_property
    def is_labs(self) -> bool:
        """It has LAB's slots: one criterion a call."""
        return bool(self.slots & LABS)

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the answer."""
        return LAB_SCHEMA if self.is_labs else SCHEMA

    def shared(self, title: str, instructions: str, sections: Sequence[Section], bound: bool = True) -> tuple[str, str]:
        """The system message and the beginning of the user's, which all criteria on these files have in common.

        Args:
            title: the task's, the only text of it that LAB's judge sees.
            instructions: the task's, for prompts that have a slot for them.
            sections: the files, in the order of the criterion.
            bound: the criterion names these files; LAB heads them differently from "every output".
        """
        outputs = lab_sections(sections, bound) if self.is_labs else fenced(sections)
        values = {
            "title": title, "task_title": title, "task_description": title, "instructions": instructions,
            "task_instructions": instructions, "deliverables": outputs, "agent_output": outputs,
        }  # fmt: skip
        return self._system.format_map(values), self._user[: self._split].format_map(values)

    def question(self, criteria: Sequence[Criterion]) -> str:
        """The end of the user's message: the criteria, and how to answer.

        Raises:
            PromptError: this prompt takes one criterion a call.
        """
        if self.is_labs and len(criteria) > 1:
            raise PromptError(f"prompt {self.name!r} takes one criterion a call; set criteria per call to 1")
        listed = "\n\n".join(f"## {each.id}\n\n{each.title}\n\n{each.match_criteria}" for each in criteria)
        first = criteria[0]
        values = {"criteria": listed, "criterion_title": first.title, "match_criteria": first.match_criteria}
        return self._user[self._split :].format_map(values)

    @cached_property
    def _parts(self) -> tuple[str, str]:
        pieces = _PART.split(self.text)
        if len(pieces) == 1:
            return "", self.text
        named = dict(zip(pieces[1::2], pieces[2::2], strict=True))
        if pieces[0].strip() or len(pieces) > 5 or "user" not in named:
            raise PromptError(f"prompt {self.name!r} needs '--- user ---' once, '--- system ---' at most once")
        return named.get("system", "").strip(), named["user"].strip() + "\n"

    @property
    def _system(self) -> str:
        return self._parts[0]

    @property
    def _user(self) -> str:
        return self._parts[1]

    @cached_property
    def _split(self) -> int:
        """Where the first slot of a criterion stands in the user's text."""
        places = [self._user.find(f"{{{slot}}}") for slot in _OF_A_CRITERION]
        return min((place for place in places if place >= 0), default=0)


def load_prompt(name: str | Path) -> Prompt:
    """A prompt by its name, or the user's own by its file.

    Raises:
        PromptError: there is none, or it cannot be filled.
    """
    own = {file.stem: file for file in sorted(FOLDER.glob("*.md"))}
    file = own.get(str(name)) or Path(name)
    if not file.is_file():
        raise PromptError(f"there is no prompt {str(name)!r}; name a file, or one of ours: {', '.join(own)}")
    return Prompt(file.stem if str(name) in own else file.name, file.read_text(encoding="utf-8"))


def messages(system: str, shared: str, question: str, cache_marks: bool = False) -> Messages:
    """The chat of one call; with `cache_marks`, the shared part is a block of its own that asks to be cached.

    What no request can hold, such as the byte of a file's name that is no UTF-8, is a "?" in it.
    """
    system, shared, question = (each.encode("utf-8", "replace").decode() for each in (system, shared, question))
    chat: Messages = [{"role": "system", "content": system}] if system else []
    content: Any = shared + question
    if cache_marks:
        mark = {"cache_control": {"type": "ephemeral"}}
        content = [{"type": "text", "text": shared, **mark}, {"type": "text", "text": question}]
    return [*chat, {"role": "user", "content": content}]


def fenced(sections: Sequence[Section]) -> str:
    """The files one after another between lines with a code that occurs in none of them.

    The code is made from the texts, so the same files always give the same prompt.
    """
    if not sections:
        return "(nothing was delivered)"
    texts = [section.text or "" for section in sections]
    names = [json.dumps(section.name, ensure_ascii=False) for section in sections]
    code, salt = "", 0
    while not code or any(code in text for text in (*texts, *names)):
        digest = hashlib.sha256(str(salt).encode())
        for text in texts:
            digest.update(text.encode("utf-8", "surrogatepass"))
        code, salt = f"DELIVERED-{digest.hexdigest()[:16]}", salt + 1
    blocks = []
    for name, section in zip(names, sections, strict=True):
        body = f"({section.why})" if section.text is None else section.text
        blocks.append(f"[{code} begin {name}]\n{body}\n[{code} end {name}]")
    return "\n\n".join(blocks)


def lab_sections(sections: Sequence[Section], bound: bool = True) -> str:
    """The files as LAB's evaluator puts them: a heading each, and a mark in place of a file that is not there."""
    heading = "## Agent Output: " if bound else "## "
    blocks = [
        f"{heading}{each.name}\n" + (f"(File not found: {each.name})" if each.text is None else each.text)
        for each in sections
    ]
    return "\n\n".join(blocks) or "(No agent output found)"


def identity(prompt: Prompt) -> Mapping[str, str]:
    """What result files say of a prompt."""
    return {"name": prompt.name, "sha256": prompt.sha256}


def _slots(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}
