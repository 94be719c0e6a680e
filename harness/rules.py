"""The rules between an agent's call and its tool, and those for memos: a mistake is an answer, never an exception."""

from __future__ import annotations

import json
from dataclasses import replace

from .bridge import reading_note
from .state import State
from .tools import NEXT, ToolResult, Workspace, failure
from .triggers import Decision, Thresholds, boundaries_ahead, decide
from .types import MEMO, Backend, Sampled, Session, ToolCall

MISTAKES = frozenset({"unknown_tool", "bad_arguments", "outside", "missing", "read_only"})
"""Problems of a call that are the agent's own."""
SMALLEST_PART = 64
"""Tokens below which reading a document in parts makes no sense."""
MARGIN = 16
"""Tokens that the marks around a result may take."""


class Rules:
    """What may be done in the state at hand.

    Args:
        workspace: documents and tools.
        session: the conversation, for its size and its tokenizer.
        backend: whether there are boundaries and memos.
        state: read, never changed here.
        names: tools of this run.
        window: tokens of context.
        reserve: tokens kept free.
        thresholds: documents that make a compaction due.
        one_read: whether documents are read one a turn, with compactions (not so in LAB's plain loop).
    """

    def __init__(
        self, workspace: Workspace, session: Session, backend: Backend, state: State, names: list[str], window: int,
        reserve: int, thresholds: Thresholds, one_read: bool,
    ):  # fmt: skip
        self.workspace, self.session, self.backend, self.state = workspace, session, backend, state
        self.names, self.window, self.reserve = names, window, reserve
        self.thresholds, self.one_read = thresholds, one_read

    def answer(self, call: ToolCall, sampled: Sampled, waiting: int) -> tuple[str, ToolResult]:
        """The rule that answers a call, empty where its tool does, and the result.

        Args:
            call: one of the turn's.
            sampled: the turn.
            waiting: tokens of the results of the calls before it.
        """
        if sampled.problem or sampled.finish == "length":
            cut = f"the turn was cut at {sampled.output_tokens} tokens"
            return "syntax", failure("bad_arguments", cut if sampled.finish == "length" else sampled.problem)
        if call.name not in self.names:
            return "", failure("unknown_tool", f"there is no tool {call.name!r}; there are {', '.join(self.names)}")
        call = self._named(call)
        path = str((call.parsed() or {}).get("path", ""))
        room = self.window - self.session.size().total - waiting - MARGIN
        if self.one_read and call.name == "read" and "documents/" in path:
            if self.state.read_this_turn:
                return "one_read", failure("second_read", "one document is read a turn; read this one in the next")
            if self.memo_is_due():
                return "memo_due", failure("", f"write {MEMO} first; no document is read before it")
            return self._read(call, room - self.reserve)
        result = self.workspace.call(call.name, call.arguments)
        if self.one_read and self.session.count(result.text) > room:
            shown = self.session.cut(result.text, max(0, room - MARGIN))
            result = replace(result, text=f"{shown}\n[cut: the context is full]", truncated=True)
        return self._check_memo(result) if result.path == MEMO and self.backend.writes_memo else ("", result)

    def _read(self, call: ToolCall, room: int) -> tuple[str, ToolResult]:
        """A document whole if it fits, after a compaction if it then would, else in parts."""
        result = self._place(self.workspace.call(call.name, call.arguments))
        tokens = self.session.count(result.text)
        if tokens <= room or not result.ok:
            return "", result
        if not self.backend.compacts:
            return "overflow", failure("", f"the context is full: {tokens} tokens do not fit any more")
        if self.state.progress:
            return "deferred", failure("", f"not read yet: its {tokens} tokens fit after a compaction")
        while tokens > room >= SMALLEST_PART and result.characters > 1:
            limit = max(1, int(result.characters * room / tokens * 0.97))
            result = self._place(self.workspace.call("read", {**(call.parsed() or {}), "limit": limit}))
            tokens = self.session.count(result.text)
        if tokens > room:
            return "overflow", failure("", "not even a part of this document fits into an empty window")
        return "", result

    def _named(self, call: ToolCall) -> ToolCall:
        """A read of "next" as one of the first document that was not read to its end, from where reading stopped."""
        given, unread = call.parsed() or {}, self.state.ledger.unread
        if call.name != "read" or given.get("path") != NEXT or not unread:
            return call
        part = self.state.ledger.read.get(unread[0])
        given = {**({"offset": part.characters} if part else {}), **given, "path": f"documents/{unread[0]}"}
        return replace(call, arguments=json.dumps(given))

    def _place(self, result: ToolResult) -> ToolResult:
        """A document that was read to its end, with how far the agent is and what is next in the list."""
        if result.document is None or not result.ok or result.truncated:
            return result
        ledger = self.state.ledger
        return replace(result, text=result.text + reading_note(ledger.documents, ledger.unread, result.document))

    def _check_memo(self, result: ToolResult) -> tuple[str, ToolResult]:
        if not result.ok:
            return "", result
        memo, most = self.memo(), self.backend.memo_tokens
        if not memo.strip():
            return "memo_empty", replace(result, ok=False, text=f"Error: {MEMO} is empty; write it again")
        tokens = self.session.count(memo)
        if tokens > most and self.state.over < 2:
            text = f"Error: {MEMO} has {tokens} tokens, at most {most} are kept; write it again, shorter"
            return "memo_over", replace(result, ok=False, text=text)
        return "", result

    def memo(self) -> str:
        """The memo as it lies in the workspace; empty where a command made it a link, or took it away."""
        try:
            return self.workspace.files.read((MEMO,), 1 << 24).decode(errors="replace")
        except (ValueError, FileNotFoundError, IsADirectoryError):
            return ""

    def memo_is_due(self) -> bool:
        """Whether nothing more may be read before a memo is written."""
        due = self.due(self.session.size().total)
        return self.backend.writes_memo and not self.state.memo_ready and due.level == "force"

    def flaw(self, sampled: Sampled, demanded: bool) -> str:
        """What is wrong with a memo, or an empty string; other turns have no flaw."""
        if demanded:
            over = self.session.count(sampled.text) > self.backend.memo_tokens
            flaws = {
                "a tool call": bool(sampled.calls),
                "cut": sampled.finish == "length",
                "empty": not sampled.text.strip(),
                "over its budget": over,
            }
            return next((name for name, there in flaws.items() if there), "")
        memos = [call for call in sampled.calls if MEMO in call.arguments[:200] and call.name in ("write", "")]
        if not (memos and self.backend.writes_memo):
            return ""
        if sampled.finish == "length":
            return "cut"
        return "" if str((memos[0].parsed() or {}).get("content", "x")).strip() else "empty"

    def due(self, tokens: int) -> Decision:
        """Whether a compaction is due with so many tokens in the window."""
        if not self.backend.compacts:
            return Decision()
        if self.state.must_compact:
            return Decision("force", "overflow")
        unread = self.state.ledger.unread
        upcoming = min(self.left(unread[0]), self.room()) if unread else 0
        return decide(self.state.stats(tokens, upcoming, self.reserve, self.window), self.thresholds)

    def must_demand(self, due: Decision, tokens: int) -> bool:
        """Whether the harness must ask for the memo itself: the agent would or could not write it, or has no room."""
        stuck = bool(due) and self.state.blocks >= 2
        return stuck or (due.level == "force" and tokens + self.reserve // 2 > self.window)

    def room(self) -> int:
        """Tokens of documents that fit into a window that has just begun."""
        held = self.state.held.tokens if self.state.held else 0
        bridge = 64 + 16 * min(len(self.state.ledger.documents), 100)
        return max(SMALLEST_PART, self.window - self.reserve - self.session.size().base - held - bridge)

    def left(self, name: str) -> int:
        """Tokens of a document that were not read yet."""
        part, tokens = self.state.ledger.read.get(name), self.state.tokens_of[name]
        return tokens if part is None else round(tokens * (1 - part.characters / max(1, part.total)))

    def ahead(self) -> int:
        """Boundaries to come, this one included."""
        unread = [self.left(name) for name in self.state.ledger.unread]
        return boundaries_ahead(unread, self.room(), self.thresholds)
