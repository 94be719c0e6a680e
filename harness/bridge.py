"""What the agent is told: S and U, and the BRIDGE that stands where a window's turns were.

`rewrite` is pure and the only renderer of a boundary: the loop and the training rows both call it, so what a model is
trained on has the shape of what it meets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .run_config import RunConfig
from .types import MEMO, Artifact, Message

LISTED = 100
"""Names of documents that are listed at most; `glob` gives the rest."""


@dataclass(frozen=True)
class Part:
    """What was read of a document.

    Attributes:
        window: in which it was read.
        characters: up to which one; `total` where it was read whole.
        total: its length.
    """

    window: int
    characters: int
    total: int

    @property
    def whole(self) -> bool:
        """Read to its end."""
        return self.characters >= self.total


@dataclass
class Ledger:
    """The bookkeeping that a bridge prints.

    Attributes:
        documents: names in reading order, those without text left out.
        read: what was read of them, in the order of reading.
        files: the agent's files with their sizes in bytes.
    """

    documents: tuple[str, ...]
    read: dict[str, Part] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    @property
    def unread(self) -> list[str]:
        """Documents of which nothing, or not all, was read."""
        return [name for name in self.documents if name not in self.read or not self.read[name].whole]

    def note(self, name: str, window: int, start: int, characters: int, total: int) -> None:
        """Take down that a part was read."""
        known = self.read.pop(name, Part(window, 0, total))
        reached = start + characters if start <= known.characters else known.characters
        self.read[name] = Part(window, max(known.characters, reached), total)


@dataclass(frozen=True)
class Counters:
    """What is left.

    Attributes:
        window: number of the window that begins.
        max_windows: of the run.
        turns: that are left.
        tokens: that are left in this window before the bridge.
    """

    window: int
    max_windows: int
    turns: int
    tokens: int


def base_messages(
    instructions: str, deliverables: Sequence[str], documents: Sequence[str], config: RunConfig, memo_tokens: int
) -> list[Message]:
    """S and U: the same in every window of a run."""
    rules = ["You work on a legal matter. documents/ is read-only; what you write into output/ is handed in."]
    if config.backend != "plain":
        rules.append("Read every document in full, one read a turn.")
    if memo_tokens:
        rules.append(
            f"When a memo is due, write {MEMO}: facts found, open questions, provisional judgements, at most "
            f"{memo_tokens} tokens. It then replaces all earlier messages, so it must hold everything that matters."
        )
    elif config.backend not in ("full", "plain"):
        rules.append("Earlier messages are compacted from time to time.")
    rules.append("When the deliverables are written, answer without a tool call.")
    asked = "\n".join(f"output/{name}" for name in deliverables) or "as the assignment says, into output/"
    listed = _listed([f"documents/{name}" for name in documents])
    task = f"{instructions.strip()}\n\nDeliverables:\n{asked}\n\nDocuments ({len(documents)}):\n{listed}"
    return [Message("system", " ".join(rules)), Message("user", task)]


def rewrite(base: Sequence[Message], artifact: Artifact, ledger: Ledger, counters: Counters) -> list[Message]:
    """The messages that the next window begins with: S and U as they are, and the BRIDGE.

    Pure: the same arguments always give the same messages. The memo's section is there for text backends alone; names
    are what slots keep worst, so the rest is there for all.
    """
    read = [_read_line(name, part) for name, part in ledger.read.items()]
    sections = [
        f"[BRIDGE {counters.window} of at most {counters.max_windows - 1}]\n"
        "Continue the assignment above, do not restart it. Earlier messages were compacted.",
        f"## Files already read ({sum(part.whole for part in ledger.read.values())} of {len(ledger.documents)})\n"
        + _listed(read),
        f"## Files not yet read\n{_listed([f'documents/{name}' for name in ledger.unread])}",
    ]
    if artifact.text:
        title = "Memo" if artifact.kind != "trimmed" else "End of the earlier messages"
        sections.insert(1, f"## {title}\n{artifact.text.strip()}")
    if ledger.files:
        sections.append("## Working files\n" + _files(ledger.files))
    left = counters.max_windows - counters.window
    sections.append(f"## Left\n{counters.turns} turns, {left} windows, {max(0, counters.tokens)} tokens here")
    return [*base, Message("user", "\n".join(sections))]


def memo_reminder(reads: int, forced: bool) -> str:
    """What is added to a tool's result when a memo is due: part of what the agent sees, in training too."""
    due = f"{reads} documents" if reads != 1 else "1 document"
    when = "now: nothing more is read before it" if forced else "before the next read"
    return f"\n\n[{due} since the last memo: write {MEMO} {when}.]"


def reading_note(documents: Sequence[str], unread: Sequence[str], name: str) -> str:
    """What is added to a document that was read to its end: how far the agent is, and what comes next."""
    left = [other for other in unread if other != name]
    following = f"; next: documents/{left[0]}" if left else ""
    return f"\n\n[{len(documents) - len(left)} of {len(documents)} documents read{following}]"


def memo_demand(tokens: int) -> str:
    """The note that asks for a memo as plain text, when the agent did not write it itself."""
    return f"Write the memo now: answer with the text of {MEMO} alone, at most {tokens} tokens, without a tool call."


def review() -> str:
    """The note of the neutral gate: the same for good work and bad, in training and in evaluation."""
    return "Read the assignment and your deliverables once more. Mend what is missing, or answer without a tool call."


def nudge(missing: Sequence[str]) -> str:
    """The one note that an agent gets which stops without its deliverables."""
    names = ", ".join(f"output/{name}" for name in missing) or "any file in output/"
    return f"There is no {names}. Write it with exactly that name, then answer without a tool call."


def _read_line(name: str, part: Part) -> str:
    where = f"window {part.window}"
    if not part.whole:
        where += f", characters 0 to {part.characters} of {part.total}; go on with offset {part.characters}"
    return f"documents/{name} ({where})"


def _files(files: Mapping[str, int]) -> str:
    return _listed([f"{name} ({size} bytes)" for name, size in files.items()])


def _listed(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - LISTED} more; glob lists them"] if len(lines) > LISTED else []
    return "\n".join([*lines[:LISTED], *more]) or "none"
