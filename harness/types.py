"""What the harness's parts hand one another: messages, samples, sizes, artifacts, and the three protocols.

The message format, as a small model learns it. A conversation is `S U`, then turns:

    system      what the agent is and how it works (S)
    user        the assignment and the names of the documents (U)
    user        the BRIDGE, once something was compacted (B)
    assistant   optional text, then at most a few tool calls, each a name and one JSON object
    tool        the result of one call, as text

Role markers and tool calls are the tokenizer's own: its chat template renders them, and text of documents, memos and
results can never contain them (special tokens are broken up). In the pocket's template a whole turn is

    <|assistant|><|call|>read {"path": "01-document-1.txt"}<|end|><|tool|> ...text...<|end|><|assistant|>
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Role = Literal["system", "user", "assistant", "tool"]
Kind = Literal["action", "memo", "draft", "review", "final"]

MEMO = "memento.md"
"""The memo's file, in the agent's working directory."""


@dataclass(frozen=True)
class ToolCall:
    """One call as the model wrote it.

    Attributes:
        name: of the tool; nothing says that there is such a tool.
        arguments: JSON text; nothing says that it is valid.
        id: as the server gave it; empty for local models.
    """

    name: str
    arguments: str
    id: str = ""

    def parsed(self) -> dict[str, Any] | None:
        """The arguments, or None where they are no JSON object."""
        try:
            found = json.loads(self.arguments)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None


class NoRoom(ValueError):
    """A policy's window is full: no turn fits."""


@dataclass(frozen=True)
class Message:
    """One message of the conversation.

    Attributes:
        role: who speaks.
        content: the text.
        calls: of an assistant's turn.
        call: the call that a tool's message answers.
    """

    role: Role
    content: str
    calls: tuple[ToolCall, ...] = ()
    call: ToolCall | None = None


@dataclass(frozen=True)
class Limit:
    """How one turn is sampled.

    Attributes:
        tokens: longest output.
        temperature: 0 is greedy.
        seed: of this turn and attempt alone, so that a resumed run draws the same.
    """

    tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Sampled:
    """One assistant turn as it was sampled.

    Attributes:
        text: what stands before the calls.
        calls: in order.
        finish: "stop", "length" where it was cut, or "content_filter" where a server kept it back, which ends the run.
        problem: what is wrong with the syntax of its calls; empty if nothing is.
        append_ids: prompt tokens since the turn before: closing marks, tool results, the bridge, the opening mark.
        output_ids: exactly the tokens that were sampled, the end token included; empty where a server hides them.
        logprobs: of `output_ids`.
        margin: smallest gap between the two best logits over the turn, in nats; None where it is not known.
        prompt_tokens: of the whole prompt that was attended to.
        output_tokens: sampled.
        seconds: wall time.
        cost: in dollars; None where there are no prices.
        version: of the weights that sampled it, as a trainer counts them; None where nothing trains.
    """

    text: str
    calls: tuple[ToolCall, ...] = ()
    finish: Literal["stop", "length", "content_filter"] = "stop"
    problem: str = ""
    append_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    margin: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    cost: float | None = None
    version: int | None = None


@dataclass(frozen=True)
class ContextSize:
    """What a window's context holds, in entries per KV head, each part apart.

    Attributes:
        base: of S and U, always exact.
        compacted: slots, or tokens of the memo: what the budget is about.
        raw: everything else: the bridge's bookkeeping and the window's own turns.
        compacted_bytes: of `compacted`; measured where there are tensors, else tokens times bytes a token.
    """

    base: int
    compacted: int
    raw: int
    compacted_bytes: int

    @property
    def total(self) -> int:
        """All entries."""
        return self.base + self.compacted + self.raw


@dataclass(frozen=True)
class Artifact:
    """What crosses a boundary.

    Attributes:
        kind: "none", "text" (a memo, or trimmed text), "memo_kv", "kv" or "hybrid".
        text: the memo; empty where there is none.
        path: file of the slots, relative to the run's folder; empty where there is none.
        sha256: of the text, or of the file.
        tokens: of the memo or slots per KV head: everything of the budget that is in use after this boundary.
        nbytes: the same in bytes.
        details: what the backend wants a reader to know: method, slots of this window, ratio.
    """

    kind: str
    text: str = ""
    path: str = ""
    sha256: str = ""
    tokens: int = 0
    nbytes: int = 0
    details: dict[str, Any] = field(default_factory=dict)


class Session(Protocol):
    """One conversation on one engine. Inside a window every prompt extends the one before, token by token."""

    def start(self, base: Sequence[Message]) -> None:
        """Begin a window afresh with S and U; all else is forgotten."""

    def append(self, messages: Sequence[Message]) -> None:
        """Add user messages, or the results of the last turn's calls."""

    def sample(self, limit: Limit) -> Sampled:
        """One assistant turn, which is then part of the window."""

    def accept(self, sampled: Sampled) -> None:
        """Take a recorded turn as though it had just been sampled; nothing is computed until it is needed."""

    def reject(self) -> None:
        """Forget the last turn as though it had never been sampled."""

    def repeat(self, sampled: Sampled) -> Sampled:
        """Put a turn of an earlier window behind this one's prompt, without sampling; the turn as it stands here."""

    def count(self, text: str) -> int:
        """Tokens of a text."""

    def cut(self, text: str, tokens: int, last: bool = False) -> str:
        """The first tokens of a text, or the last ones."""

    def size(self) -> ContextSize:
        """The window as it is now, tokens that wait to be read included."""


class Policy(Protocol):
    """A model that plays the agent.

    Attributes:
        name: as results print it.
        capabilities: of "tokens" (exact ids in and out) and "kv" (its cache can be compacted).
        window: tokens that fit into its context.
        bytes_per_token: of its KV cache; None where it is not known.
    """

    name: str
    capabilities: frozenset[str]
    window: int
    bytes_per_token: int | None

    def session(self, tools: list[dict[str, Any]], queries: bool = False) -> Session:
        """A new conversation with these tools, in OpenAI's schema; `queries` are kept for backends that need them."""


class Backend(Protocol):
    """What crosses a boundary, and how.

    Attributes:
        name: as results print it.
        needs: capabilities that the policy must have.
        compacts: whether there are boundaries at all.
        writes_memo: whether a boundary needs a turn of the model.
        memo_tokens: that a memo may have; 0 where none is written.
    """

    name: str
    needs: frozenset[str]
    compacts: bool
    writes_memo: bool
    memo_tokens: int

    def compact(self, session: Session, base: Sequence[Message], memo: str, boundary: Boundary) -> Artifact:
        """Close the window: leave the session holding S, U and what crosses, ready for the bridge."""

    def restore(self, session: Session, base: Sequence[Message], artifact: Artifact, folder: Path) -> None:
        """The same from an artifact that an earlier start of this run left in `folder`."""


@dataclass(frozen=True)
class Boundary:
    """What a backend may know when it closes a window.

    Attributes:
        window: number of the window that closes, from 0.
        held: the artifact of the boundary before, or None.
        ahead: boundaries that are still to come, this one included, as far as the documents tell.
        folder: where slots are saved.
        history: the window's own turns as text, oldest first; for backends that keep text.
    """

    window: int
    held: Artifact | None
    ahead: int
    folder: Path
    history: Callable[[], str]
