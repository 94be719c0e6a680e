"""Messages to token ids through the tokenizer's chat template, piece by piece, so that no sampled token is ever redone.

A window's ids are `base`, then for each turn what `follow` and `opening` give, then exactly what was sampled. Every
piece is the difference between two renderings of short stand-in conversations, so any template works that does not
reword what came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ...prompts import escape
from ..types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "StandsHere7f3a"
_CALL = {"type": "function", "id": "stand0123", "function": {"name": "read", "arguments": {"path": _MARK}}}


class ChatFormat:
    """How one tokenizer renders the agent's conversation.

    Args:
        tokenizer: with a chat template.
        tools: OpenAI's schemas, rendered alike in every window.

    Attributes:
        closing: ids that end an assistant's turn; the first is what the model samples to end it.
        opening: ids that open one.

    Raises:
        ValueError: there is no template, or it cannot render the conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]] = ()):
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: an agent needs one")
        self.tokenizer, self.tools = tokenizer, list(tools) or None
        self._others = sorted(set(tokenizer.get_added_vocab()) - set(map(str, tokenizer.all_special_tokens)))
        asked = [{"role": "user", "content": _MARK}]
        told = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": _MARK}]
        self.closing = self.encode(self._tail(told))
        self._opening = self._text(asked, True)[len(self._text(asked)) :]
        self.opening = self.encode(self._opening)
        if not self.closing or not self.opening:
            raise ValueError("this chat template does not mark where an assistant's turn begins and ends")
        self._shut: dict[str, str] = {}
        self._stand_ins: dict[str, list[dict[str, Any]]] = {
            "user": asked,
            "assistant": told,
            "call": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [_CALL]}],
        }
        self._stand_ins["tool"] = [
            *({**each, "tool_calls": [_call("read", {})]} if "tool_calls" in each else each
              for each in self._stand_ins["call"]),
            {"role": "tool", "content": _MARK, "name": "read", "tool_call_id": "stand0123"},
        ]  # fmt: skip

    def base(self, messages: Sequence[Message]) -> list[int]:
        """Ids of S and U, with the tools."""
        return self.encode(self._text([self._plain(message) for message in messages]))

    def follow(self, messages: Sequence[Message], before: Literal["user", "assistant", "tool"]) -> list[int]:
        """Ids of user messages or tool results.

        Args:
            messages: no assistant among them.
            before: what stands before them; an assistant's turn is taken as closed.
        """
        stand_in = "call" if before == "assistant" and messages[0].role == "tool" else before
        start = self._stand_ins[stand_in]
        whole, shut = self._tail([*start, *map(self._plain, messages)]), self._shut.get(stand_in)
        if shut is None:
            shut = self._shut[stand_in] = self._tail(start)
        if not whole.startswith(shut):
            raise ValueError(f"this chat template rewords a {before} turn when a {messages[0].role} message follows")
        return self.encode(whole[len(shut) :])

    def assistant(self, message: Message) -> list[int]:
        """Ids of an assistant's turn as a model would have sampled it, its end included: for teachers and scripts."""
        asked = self._stand_ins["user"]
        start = self._text(asked, True)
        whole = self._text([*asked, self._plain(message)])
        if not whole.startswith(start):
            raise ValueError("this chat template renders an assistant's turn otherwise than it opens one")
        ids = self.encode(whole[len(start) :])
        return ids[: len(ids) - len(self.closing) + 1]

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of sampled ids, role marks and call marks included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def neutral(self, text: str) -> str:
        """Text with every special and added token broken up, so that it can mark no role and no call."""
        text = escape(self.tokenizer, text)
        for token in self._others:
            if len(token) > 2 and token in text and not token.isalnum():
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _plain(self, message: Message) -> dict[str, Any]:
        plain: dict[str, Any] = {"role": message.role, "content": self.neutral(message.content)}
        if message.calls:
            plain["tool_calls"] = [_call(c.name, c.parsed() or {}, c.id or "call") for c in message.calls]
        if message.call is not None:
            plain |= {"name": message.call.name, "tool_call_id": message.call.id or "call"}
        return plain

    def _tail(self, messages: list[dict[str, Any]]) -> str:
        """What is rendered behind the first mark."""
        text = self._text(messages)
        return text[text.index(_MARK) + len(_MARK) :]

    def _text(self, messages: list[dict[str, Any]], generate: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=self.tools, tokenize=False, add_generation_prompt=generate, enable_thinking=False
            )
        except Exception as problem:  # jinja's own errors, and those that templates raise
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the chat template cannot render the roles {roles}: {problem}") from problem


def _call(name: str, arguments: dict[str, Any], identifier: str = "stand0123") -> dict[str, Any]:
    return {"type": "function", "id": identifier, "function": {"name": name, "arguments": arguments}}
