"""Models behind an OpenAI-compatible server as the agent, for backends whose boundary is text.

`ServerPolicy` speaks chat completions, as every server and closed model does: the server renders messages and parses
calls. `TokenServerPolicy` sends token ids to the completions endpoint and takes ids back (vLLM's `return_token_ids`):
token-in, token-out as with a local model, rendered and parsed here. Retries, backoff and Retry-After are the openai
client's own; `ask` asks again where a reply came that is none.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ...eval.prices import Prices
from ...eval.verdicts import Tokens
from ..documents import valid
from ..types import ContextSize, Limit, Message, Sampled, ToolCall
from .calls import without_thinking

T = TypeVar("T")
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


class ReplyError(ValueError):
    """What a server answered with success and is no turn of a model."""


def ask(config: ServerConfig, request: Callable[[], Any], read: Callable[[Any], T]) -> T:
    """What `read` makes of a server's reply; where that is none it is asked again, as often as the config says.

    Args:
        config: of the server.
        request: sends the request.
        read: takes the reply apart, and raises ReplyError where it is not what it should be.

    Raises:
        ReplyError: no reply was; it names the server and what it said last.
    """
    for attempt in range(config.retries + 1):
        if attempt:
            time.sleep(min(0.5 * 2 ** (attempt - 1), 8.0))
        reply = None
        try:
            reply = request()
            return read(reply)
        except ValueError as problem:  # ReplyError, and what a body that is no JSON raises in the client
            last = problem
    said = "" if reply is None else f"; it said {valid(str(reply)):.300}"
    where = config.base_url or "the default server"
    raise ReplyError(f"{config.model} at {where} gave no turn, asked {attempt + 1} times: {last}{said}") from last


def first_choice(reply: Any) -> Any:
    """The choice of a reply, which has one.

    Raises:
        ReplyError: it has none.
    """
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices or choices[0] is None:
        raise ReplyError("the reply has no choices")
    return choices[0]


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
        """Dollars for a response's usage; None where it, or the price, is not known."""
        read, written = _counts(usage)
        if self.price is None or read is None or written is None:
            return None
        details = getattr(usage, "prompt_tokens_details", None)
        cached = getattr(details, "cached_tokens", None) or 0
        return self.price.of(Tokens(input=read, output=written, cached=cached))


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
        """One turn.

        Raises:
            ReplyError: the server gave none, however often it was asked.
        """
        started, config = time.perf_counter(), self.policy.config
        settings = {config.limit_name: limit.tokens, "temperature": limit.temperature, "seed": limit.seed}
        request = {"model": config.model, "messages": self.messages, "tools": self.tools or None, **_known(settings)}
        sampled = ask(config, lambda: self.policy.client.chat.completions.create(**request), self._turn)
        sampled = replace(sampled, seconds=round(time.perf_counter() - started, 6))
        self.accept(sampled)
        return sampled

    def _turn(self, reply: Any) -> Sampled:
        """The turn in a reply, as `ask` wants it."""
        choice, usage = first_choice(reply), getattr(reply, "usage", None)
        message = getattr(choice, "message", None)
        if not hasattr(message, "content"):
            raise ReplyError("the reply has no message")
        said, finish = _text(message.content), choice.finish_reason
        calls = tuple(map(_call, getattr(message, "tool_calls", None) or ()))
        broken = [call for call in calls if call.parsed() is None]
        read, written = _counts(usage)
        return Sampled(
            text=without_thinking(said).strip(),
            calls=calls,
            finish=finish if finish in ("length", "content_filter") else "stop",
            problem=f"the arguments of {broken[0].name} are no JSON object" if broken else "",
            prompt_tokens=self.size().total if read is None else read,
            output_tokens=self.count(said + "".join(call.arguments for call in calls)) if written is None else written,
            cost=self.policy.cost(usage),
        )

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


def _counts(usage: Any) -> tuple[int | None, int | None]:
    """Tokens read and written, as far as the server counted them."""
    read, written = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    return read if isinstance(read, int) else None, written if isinstance(written, int) else None


def _text(content: Any) -> str:
    """A message's text, whole or in parts, of which only those of text count."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = (None, "text", "output_text")
        content = "".join(str(part.get("text") or "") for part in content if part.get("type") in kinds)
    if not isinstance(content, str | None):
        raise ReplyError(f"the message's content is a {type(content).__name__}")
    return valid(content or "")


def _call(call: Any) -> ToolCall:
    """A call; servers of various makers give its arguments as text or as an object."""
    function = getattr(call, "function", None)
    if function is None:
        raise ReplyError("a tool call names no function")
    given = function.arguments
    arguments = given if isinstance(given, str) else json.dumps(given or {}, ensure_ascii=False)
    return ToolCall(valid(function.name or ""), valid(arguments or "{}"), valid(call.id or ""))


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
