"""The judge behind any OpenAI-compatible endpoint: `openai`'s async client, with its errors sorted by what to do.

The client's own retries are off: `lanes.py` retries, where the whole provider can be slowed down.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from .judges import JudgeConfig, JudgeError, Reply
from .prompting import Messages
from .verdicts import Tokens

if TYPE_CHECKING:
    import openai

_STEP_DOWN = {"schema": "object", "object": "none"}
_FORM_WORDS = ("response_format", "json_schema", "json_object", "structured", "guided", "grammar")
_UNSUPPORTED_WORDS = ("support", "default", "deprecated", "not allowed", "not permitted")
_LONG_WORDS = ("context length", "context_length", "too long", "too large", "maximum context", "max_model_len")
_MODERATION_WORDS = (
    "moderation", "flagged", "content policy", "content_filter", "content filter", "content management policy",
    "content exists risk",
)  # fmt: skip
_BROKE_WORDS = ("insufficient_quota", "credit balance", "insufficient balance", "billing")
_CONNECT = 10.0  # seconds for a connection: an address where nobody is says so soon, however long an answer may take


class OpenAIJudge:
    """A judge behind `POST {base_url}/chat/completions`.

    Args:
        config: where it is and what is sent; see `JudgeConfig`.

    Attributes:
        adapted: what was left out or renamed because the model refused it, in words.

    Raises:
        ValueError: its key is wanted and the environment has none.
        ModuleNotFoundError: the `eval` extra is not installed.
    """

    def __init__(self, config: JudgeConfig):
        import openai  # noqa: F401 - fails here, where the message can say which judge wants it

        self.config, self.name = config, config.name
        self.adapted: list[str] = []
        self._form = {"auto": "schema"}.get(config.structured, config.structured)
        self._temperature, self._limit = config.temperature, "max_tokens"
        self._connect = min(_CONNECT, config.timeout)
        self._key = os.environ.get(config.api_key_env, "") if config.api_key_env else ""
        if config.api_key_env and not self._key:
            raise ValueError(
                f"judge {self.name!r} needs a key; put it into the environment variable {config.api_key_env}"
            )
        self._clients: dict[asyncio.AbstractEventLoop, openai.AsyncOpenAI] = {}

    def identity(self) -> dict[str, Any]:
        """See `JudgeConfig.identity`."""
        return self.config.identity()

    async def ask(self, chat: Messages, schema: Mapping[str, Any]) -> Reply:
        """One attempt.

        Raises:
            JudgeError: there was no answer; the key is in no message.
        """
        import openai

        request = self._request(chat, schema)
        try:
            # `chat.completions.create` would first walk through the whole request, at a third of a call's cost, and
            # its `ChatCompletion` is made of whatever came, unchecked.
            body = await self._client().post("/chat/completions", cast_to=str, body=request)
        except openai.APIStatusError as problem:
            if problem.status_code in (400, 404, 422, 501) and self._adapt(request, problem.message):
                return await self.ask(chat, schema)
            raise self._sorted(problem) from None
        except openai.APITimeoutError as problem:
            if type(problem.__cause__).__name__ == "ConnectTimeout":  # of httpx or httpx2, by the client's version
                said = f"no connection to {self.config.base_url} within {self._connect:g} s"
                raise JudgeError("transient", said) from None
            raise JudgeError("throttled", f"no answer within {self.config.timeout:g} s") from None
        except openai.APIConnectionError as problem:
            why = problem.__cause__ or problem
            said = f"the connection to {self.config.base_url} failed ({type(why).__name__}: {why})"
            raise JudgeError("transient", self._scrub(said)) from None
        except (openai.OpenAIError, ValueError, TypeError) as problem:
            raise JudgeError("transient", self._scrub(f"{type(problem).__name__}: {problem}")) from None
        return self._reply(body)

    async def aclose(self) -> None:
        """Close this loop's connections."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()

    def _client(self) -> openai.AsyncOpenAI:
        """One client for each event loop: connections belong to the loop that opened them."""
        import openai

        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients = {each: client for each, client in self._clients.items() if not each.is_closed()}
            timeout = openai.Timeout(self.config.timeout, connect=self._connect)
            self._clients[loop] = openai.AsyncOpenAI(
                api_key=self._key or "none", base_url=self.config.base_url, max_retries=0, timeout=timeout
            )
        return self._clients[loop]

    def _request(self, chat: Messages, schema: Mapping[str, Any]) -> dict[str, Any]:
        config, form = self.config, self._form
        request: dict[str, Any] = {"model": config.model, "messages": chat}
        if self._temperature is not None:
            request["temperature"] = self._temperature
        if config.max_tokens is not None:
            request[self._limit] = config.max_tokens
        if form == "schema":
            named = {"name": "verdicts", "strict": True, "schema": schema}
            request["response_format"] = {"type": "json_schema", "json_schema": named}
        elif form == "object":
            request["response_format"] = {"type": "json_object"}
        return request | config.extra

    def _reply(self, body: str) -> Reply:
        tokens = None
        try:
            completion = json.loads(body)
            tokens = _tokens(completion.get("usage"))
            choice = completion["choices"][0]
            text, refusal = _text(choice["message"].get("content")), choice["message"].get("refusal")
            finish = choice.get("finish_reason") or "stop"
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
            said = self._scrub(f"the server's answer was no chat completion: {body}")
            raise JudgeError("transient", said, tokens=tokens if tokens and tokens.input else None) from None
        if refusal or finish == "content_filter":
            said = self._scrub(str(refusal or "a content filter stopped the answer"))
            raise JudgeError("refused", said, tokens=tokens)
        return Reply(text, tokens, finish)

    def _sorted(self, problem: openai.APIStatusError) -> JudgeError:
        status = problem.status_code
        said = self._scrub(f"{status}: {problem.message.removeprefix(f'Error code: {status} - ')}")
        wait = retry_after(problem.response.headers)
        if status in (400, 403) and _any(_MODERATION_WORDS, f"{problem.code} {said}"):
            return JudgeError("refused", said)
        if status in (401, 403, 404) or (status in (402, 429) and _any(_BROKE_WORDS, said)):
            return JudgeError("fatal", said)
        if status == 429 or (status in (503, 529) and wait is not None):
            return JudgeError("throttled", said, wait)
        if status in (408, 409, 425) or status >= 500:
            return JudgeError("transient", said, wait)
        if status == 413 or _any(_LONG_WORDS, said):
            return JudgeError("rejected", f"too long for the judge: {said}")
        return JudgeError("rejected", said)

    def _adapt(self, request: Mapping[str, Any], refusal: str) -> bool:
        """Leave out or rename what the model refuses; False where the refusal is about something else.

        Verdicts do not change their identity by it: the same model always refuses the same.
        """
        sent = request.get("response_format", {}).get("type")
        form = {"json_schema": "schema", "json_object": "object"}.get(sent)
        if form and self.config.structured == "auto" and _any(_FORM_WORDS, refusal):
            if self._form == form:  # calls in flight together hear the same refusal; the first one steps down
                self._form = _STEP_DOWN[form]
                self.adapted.append(f"structured output: {self._form}")
            return True
        if "temperature" in request and "temperature" in refusal and _any(_UNSUPPORTED_WORDS, refusal):
            if self._temperature is not None:
                self._temperature = None
                self.adapted.append("temperature left out")
            return True
        if "max_tokens" in request and "max_completion_tokens" in refusal and "instead" in refusal:
            if self._limit == "max_tokens":
                self._limit = "max_completion_tokens"
                self.adapted.append("max_completion_tokens for max_tokens")
            return True
        return False

    def _scrub(self, text: str) -> str:
        """The text without the key, at most 500 characters of it: servers like to repeat what they were sent."""
        return (text.replace(self._key, "[key]") if self._key else text)[:500]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait (`Retry-After` in seconds or as a date, `retry-after-ms`), or None."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        text = headers.get(name, "")
        try:
            return max(0.0, float(text) / unit)
        except ValueError:
            pass
        try:
            return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError):
            continue
    return None


def _text(content: Any) -> str:
    """What a message says: its content, or of one in parts, as reasoning models send it, the texts."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError(f"content is a {type(content).__name__}")
    return content or ""


def _tokens(usage: Any) -> Tokens:
    """The server's count; one that cannot be read counts as none, since the answer beside it is paid for all the same.

    Asked again, such a server would only count in the same way.
    """
    try:
        return _counted(usage or {})
    except (AttributeError, TypeError, ValueError, OverflowError):
        return Tokens(calls=1)


def _counted(usage: Mapping[str, Any]) -> Tokens:
    """A count, under the names that providers use for its parts."""
    prompt, completion = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens_details") or {}

    def first(*values: Any) -> int:
        count = next((int(value) for value in values if value), 0)
        if count < 0:
            raise ValueError(f"{count} tokens")
        return count

    total = first(usage.get("prompt_tokens"))
    cached = first(
        prompt.get("cached_tokens"), usage.get("prompt_cache_hit_tokens"), usage.get("cache_read_input_tokens")
    )
    write = first(prompt.get("cache_write_tokens"), usage.get("cache_creation_input_tokens"))
    if cached + write > total:  # counted beside the prompt instead of within it
        total += cached + write
    return Tokens(
        input=total,
        cached=cached,
        cache_write=write,
        output=first(usage.get("completion_tokens")),
        reasoning=first(completion.get("reasoning_tokens")),
        calls=1,
    )


def _any(words: tuple[str, ...], text: str) -> bool:
    return any(word in text.lower() for word in words)
