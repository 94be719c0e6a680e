"""Models behind an OpenAI-compatible server as the agent, for backends whose boundary is text.

`ServerPolicy` speaks chat completions, as every server and closed model does: the server renders messages and parses
calls. `TokenServerPolicy` sends token ids to the completions endpoint and takes ids back (vLLM's `return_token_ids`):
token-in, token-out as with a local model, rendered and parsed here. Retries, backoff and Retry-After are the openai
client's own.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...eval.prices import Prices
from ...eval.verdicts import Tokens
from ..types import ContextSize, Limit, Message, Sampled, ToolCall
from .calls import without_thinking

CHARACTERS_PER_TOKEN = 3.5
"""Of English, a little less than usual: tokens are over-estimated until the server has counted them."""


@dataclass(frozen=True)
class ServerConfig:
    """Where a model is served.

    Attributes:
        model: as the server calls it.
        base_url: of the server's OpenAI-compatible interface; the openai client's default unless given.
        api_key_env: environment variable that holds the key; servers of your own need none.
        window: tokens of context that the model takes.
        bytes_per_token: of its KV cache, to set budgets in bytes; not known unless given.
        retries: of a request that failed in a way that may pass.
        timeout: seconds for one request.
        limit_name: what the server calls the limit on new tokens; older servers know max_tokens alone.
    """

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    window: int = 131_072
    bytes_per_token: int | None = None
    retries: int = 6
    timeout: float = 600.0
    limit_name: str = "max_completion_tokens"

    def client(self):
        """An `openai.OpenAI` that retries by itself.

        Raises:
            ValueError: there is no key for a server that may need one.
        """
        from openai import OpenAI

        key = os.environ.get(self.api_key_env)
        if key is None and self.base_url is None:
            raise ValueError(f"{self.api_key_env} is not set: set it, or give the address of a server of your own")
        return OpenAI(base_url=self.base_url, api_key=key or "none", max_retries=self.retries, timeout=self.timeout)


class ServerPolicy:
    """See `ServerConfig`.

    Args:
        config: where the model is.
        prices: to say what turns cost; those that come with still unless given.
    """

    capabilities: frozenset[str] = frozenset()

    def __init__(self, config: ServerConfig, prices: Prices | None = None):
        self.config, self.client, self.name, self.window = config, config.client(), config.model, config.window
        self.bytes_per_token = config.bytes_per_token
        self.price = (prices or Prices.load()).find(config.model)

    def session(self, tools: list[dict[str, Any]], queries: bool = False) -> ServerSession:
        """A new conversation."""
        return ServerSession(self, tools)

    def cost(self, usage: Any) -> float | None:
        """Dollars for a response's usage; None where the price is not known."""
        if self.price is None or usage is None:
            return None
        details = getattr(usage, "prompt_tokens_details", None)
        cached = getattr(details, "cached_tokens", None) or 0
        return self.price.of(Tokens(input=usage.prompt_tokens, output=usage.completion_tokens, cached=cached))


class ServerSession:
    """See `harness.types.Session`. Tokens are the server's own count, and an estimate for what it has not seen yet."""

    def __init__(self, policy: ServerPolicy, tools: list[dict[str, Any]]):
        self.policy, self.tools = policy, tools
        self.messages: list[dict[str, Any]] = []
        self._base = self._counted = self._waiting = 0

    def start(self, base: Sequence[Message]) -> None:
        """Begin a window afresh."""
        self.messages = [_chat(message) for message in base]
        self._base = self.count(str(self.tools)) + sum(self.count(message.content) for message in base)
        self._counted, self._waiting = self._base, 0

    def append(self, messages: Sequence[Message]) -> None:
        """Add messages."""
        self.messages += [_chat(message) for message in messages]
        self._waiting += sum(self.count(message.content) + 4 for message in messages)

    def sample(self, limit: Limit) -> Sampled:
        """One request."""
        started = time.perf_counter()
        settings = {self.policy.config.limit_name: limit.tokens, "temperature": limit.temperature, "seed": limit.seed}
        reply = self.policy.client.chat.completions.create(
            model=self.policy.config.model, messages=self.messages, tools=self.tools or None, **_known(settings)
        )
        choice, usage = reply.choices[0], reply.usage
        calls = tuple(
            ToolCall(call.function.name or "", call.function.arguments or "{}", call.id or "")
            for call in choice.message.tool_calls or ()
        )
        broken = [call for call in calls if call.parsed() is None]
        sampled = Sampled(
            text=without_thinking(choice.message.content or "").strip(),
            calls=calls,
            finish="length" if choice.finish_reason == "length" else "stop",
            problem=f"the arguments of {broken[0].name} are no JSON object" if broken else "",
            prompt_tokens=usage.prompt_tokens if usage else self.size().total,
            output_tokens=usage.completion_tokens if usage else self.count(choice.message.content or ""),
            seconds=round(time.perf_counter() - started, 6),
            cost=self.policy.cost(usage),
        )
        self.accept(sampled)
        return sampled

    def accept(self, sampled: Sampled) -> None:
        """Take a recorded turn."""
        self._undo = len(self.messages), self._counted, self._waiting
        self.messages.append(_chat(Message("assistant", sampled.text, sampled.calls)))
        self._counted, self._waiting = sampled.prompt_tokens + sampled.output_tokens, 0

    def reject(self) -> None:
        """Forget the last turn."""
        count, self._counted, self._waiting = self._undo
        del self.messages[count:]

    def repeat(self, sampled: Sampled) -> Sampled:
        """Put a turn of an earlier window behind this one's prompt."""
        here = replace(sampled, prompt_tokens=self.size().total)
        self.accept(here)
        return here

    def count(self, text: str) -> int:
        """Tokens of a text, estimated."""
        return math.ceil(len(text) / CHARACTERS_PER_TOKEN)

    def cut(self, text: str, tokens: int, last: bool = False) -> str:
        """The first tokens of a text, or the last ones, by the same estimate."""
        size = int(tokens * CHARACTERS_PER_TOKEN)
        return text if self.count(text) <= tokens else (text[len(text) - size :] if last else text[:size])

    def size(self) -> ContextSize:
        """The window as it is now."""
        return ContextSize(self._base, 0, max(0, self._counted - self._base) + self._waiting, 0)


def _chat(message: Message) -> dict[str, Any]:
    """A message as the interface takes it."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        plain["tool_calls"] = [
            {"id": call.id or f"call_{number}", "type": "function",
             "function": {"name": call.name, "arguments": call.arguments if call.parsed() is not None else "{}"}}
            for number, call in enumerate(message.calls)
        ]  # fmt: skip
        plain["content"] = message.content or None
    if message.call is not None:
        plain["tool_call_id"] = message.call.id or "call_0"
    return plain


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """Seeds as every server takes them: 31 bits."""
    return {**settings, "seed": settings["seed"] % (1 << 31)}
