"""A script in place of a model, with the same tokens, windows and caches: for tests of mechanics and for teachers.

What it says comes from a function, not from the logits, so a run of it shows how the harness works and nothing about
a model. Where a model is given, its keys and values are those of the scripted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..types import Limit, Message, Sampled
from .calls import parser_of
from .chat import ChatFormat
from .local import LocalPolicy, LocalSession, Turn

Player = Callable[[list[Message], Limit], Message]
"""The messages in view in, the assistant's turn out: the open window's, and those that slots stand for."""


class ScriptedPolicy(LocalPolicy):
    """Plays what `player` says.

    Args:
        tokenizer: with a chat template that has tool calls.
        player: makes one player for each episode.
        loaded: a `LoadedModel`, for backends that need keys and values.
        window: tokens of context.
        name: as results print it; it should say that this is a script.
    """

    def __init__(
        self, tokenizer, player: Callable[[], Player], window: int, loaded: Any = None, name: str = "scripted"
    ):
        if loaded is not None:
            super().__init__(loaded, window)
        else:
            self.capabilities, self.bytes_per_token, self.ends = frozenset({"tokens"}), None, set()
        self.name, self.tokenizer, self.player, self.window = name, tokenizer, player, window
        self.parse = parser_of(tokenizer.chat_template or "")

    def session(self, tools: list[dict[str, Any]], queries: bool = False) -> ScriptedSession:
        """A new conversation."""
        return ScriptedSession(self, ChatFormat(self.tokenizer, tools), queries)


class ScriptedSession(LocalSession):
    """See `LocalSession`. Nothing is computed before a backend asks for the window's keys and values."""

    decodes_here = False

    def __init__(self, policy: ScriptedPolicy, chat: ChatFormat, queries: bool):
        super().__init__(policy, chat, queries)
        self.player, self.seen = policy.player(), []

    def start(self, base: Sequence[Message]) -> None:
        """Begin a window afresh."""
        super().start(base)
        self.seen = list(base)

    def pretend(self, slots: int) -> int:
        """Go on as behind so many slots, without any: for token ids of a run whose numbers nobody needs.

        Returns the tokens of the window that they would stand for.
        """
        self._read_on()
        tokens, before = self._state.tokens, self._state.before
        self._begin(before="user" if before == "assistant" else before)
        self._compacted = (slots, slots * (self.policy.bytes_per_token or 0))
        return tokens

    def append(self, messages: Sequence[Message]) -> None:
        """Show messages."""
        super().append(messages)
        self.seen += messages

    def sample(self, limit: Limit) -> Sampled:
        """What the script says, cut at the limit as a model would be."""
        turn = Turn(self._prompt(), limit.tokens, limit, self._prompt_tokens(), frozenset(self.chat.closing[:1]))
        turn.output = self.chat.assistant(self.player(list(self.seen), limit))[: limit.tokens]
        read = self._read
        sampled = replace(self.finish(turn), seconds=0.0)
        self._read = read  # nothing was computed
        self.seen.append(Message("assistant", sampled.text, sampled.calls))
        return sampled

    def accept(self, sampled: Sampled) -> None:
        """Take a recorded turn."""
        super().accept(sampled)
        self.seen.append(Message("assistant", sampled.text, sampled.calls))

    def reject(self) -> None:
        """Forget the last turn."""
        super().reject()
        self.seen.pop()
