"""Where an episode stands: changed by what was sampled and by logged events alone, so a replay ends up the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .bridge import Ledger
from .tools import ToolResult
from .triggers import WindowStats
from .types import MEMO, Artifact, Kind, Sampled, ToolCall


@dataclass
class State:
    """The loop's memory.

    Attributes:
        ledger: which documents were read, and which files there are.
        tokens_of: tokens of each document.
        turns: assistant's turns so far.
        window: number of the open window.
        reads: documents read in it.
        progress: a document was read or a file written in it.
        held: what crossed the last boundary.
        files: the agent's files: path to sha256 and size.
        memo_ready: a good memo was written in this window.
        blocks: reads that were refused because a memo is due.
        over: memos that were longer than the budget.
        must_compact: a read made way for a compaction.
        deferred: the turn to issue again after it.
        read_this_turn: a document was read in the turn at hand.
        flaw: of the last memo.
        decoded: tokens that memos of this window took.
        rejected: memos of this window that were sampled again.
        mistakes: turns in a row with nothing but mistakes.
        nudged: the agent was told of a missing deliverable.
        reviewed: the agent was asked to check its work again.
        stop: why the run must stop.
        history: the window's turns as text.
    """

    ledger: Ledger
    tokens_of: dict[str, int] = field(default_factory=dict)
    turns: int = 0
    window: int = 0
    reads: int = 0
    progress: bool = False
    held: Artifact | None = None
    files: dict[str, list] = field(default_factory=dict)
    memo_ready: bool = False
    blocks: int = 0
    over: int = 0
    must_compact: bool = False
    deferred: Sampled | None = None
    read_this_turn: bool = False
    flaw: str = ""
    decoded: int = 0
    rejected: int = 0
    mistakes: int = 0
    nudged: bool = False
    reviewed: bool = False
    stop: str = ""
    history: list[str] = field(default_factory=list)

    def took(self, sampled: Sampled, kind: Kind) -> None:
        """A turn was sampled."""
        self.turns += 1
        self.read_this_turn = False
        self.decoded += sampled.output_tokens if kind == "memo" else 0
        calls = "".join(f"\n{call.name} {call.arguments}" for call in sampled.calls)
        self.history.append(f"assistant: {sampled.text}{calls}")

    def threw_away(self, sampled: Sampled) -> None:
        """A memo was rejected."""
        self.decoded += sampled.output_tokens
        self.rejected += 1

    def saw(self, event: Mapping[str, Any], sampled: Sampled) -> None:
        """A call was answered."""
        failed = event["name"] == "write" and not event["ok"] and not event["rule"] and MEMO in event["arguments"]
        self.blocks += event["rule"] == "memo_due" or failed
        self.over += event["rule"] == "memo_over"
        if event["rule"] == "deferred":
            self.must_compact = True
            self.deferred = sampled if len(sampled.calls) == 1 else None
        if event["rule"] == "overflow":
            self.stop = "overflow"
        if event["ok"] and event["document"]:
            self.reads, self.progress, self.read_this_turn = self.reads + 1, True, True
            start, characters = event["start"], event["document_characters"]
            self.ledger.note(event["document"], self.window, start, characters, event["total"])
        if event["ok"] and event["path"] == MEMO:
            self.memo_ready = self.progress
        if "files" in event:
            self.progress = self.progress or event["path"] != MEMO
            self.has(event["files"])

    def has(self, files: dict[str, list]) -> None:
        """The agent's files are these now."""
        self.files = files
        self.ledger.files = {name: size for name, (_, size) in files.items()}

    def next_window(self, artifact: Artifact) -> None:
        """A boundary was crossed."""
        self.held, self.window = artifact, self.window + 1
        self.reads = self.blocks = self.over = self.decoded = self.rejected = 0
        self.progress = self.memo_ready = self.must_compact = False
        self.history = []

    def stats(self, tokens: int, next_document: int, reserve: int, window: int) -> WindowStats:
        """What decides about a compaction."""
        unread = len(self.ledger.unread)
        return WindowStats(self.reads, unread, tokens, next_document, reserve, window, self.progress)


def kind_of(sampled: Sampled, demanded: bool) -> Kind:
    """What a turn does: a memo, a draft, the end, or anything else."""
    paths = [str((call.parsed() or {}).get("path", "")) for call in sampled.calls if call.name in ("write", "edit")]
    if demanded or MEMO in paths:
        return "memo"
    if any(path.startswith("output/") for path in paths):
        return "draft"
    return "action" if sampled.calls else "final"


def sampled_from(event: Mapping[str, Any]) -> Sampled:
    """The turn that an event records."""
    known = {each.name: event[each.name] for each in fields(Sampled) if each.name in event}
    known["calls"] = tuple(ToolCall(**call) for call in event["calls"])
    return Sampled(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


def sampled_fields(sampled: Sampled) -> dict[str, Any]:
    """What an event records of a turn. Ids are not copied one by one: that would take longer than all the rest."""
    every = {each.name: getattr(sampled, each.name) for each in fields(Sampled)}
    return every | {"calls": tuple(asdict(call) for call in sampled.calls)}


def tool_fields(call: ToolCall, rule: str, result: ToolResult) -> dict[str, Any]:
    """What an event says of a call and its result."""
    return {
        "name": call.name, "arguments": call.arguments, "ok": result.ok, "rule": rule, "problem": result.problem,
        "characters": len(result.text), "document": result.document, "start": result.start,
        "document_characters": result.characters if result.document else 0, "total": result.total,
        "truncated": result.truncated, "path": result.path,
    }  # fmt: skip
