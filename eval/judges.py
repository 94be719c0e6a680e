"""Judges: what one is, which are known by name, the exact one and the scripted one. `client.py` holds the served ones.

A judge has a `name`, an `identity()` (everything that its verdicts depend on, as JSON can hold it) and either `ask`,
which takes a chat and returns a `Reply`, or `decide`, which judges without a prompt. Keys come from the environment
only: a config names the variable, and nothing that is written holds its value.
"""

from __future__ import annotations

import inspect
import os
import tomllib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from .judge import Verdict, exact_criterion
from .prompting import Messages
from .tasks import Criterion
from .verdicts import Tokens

Trouble = Literal["throttled", "transient", "refused", "rejected", "fatal"]


class JudgeError(Exception):
    """A call that gave no answer.

    Attributes:
        trouble: "throttled" and "transient" are tried again; "refused" and "rejected" (too long, a parameter that the
            server does not take) concern this call alone; "fatal" (a wrong key, an unknown model, no credit left)
            concerns every call to this judge.
        retry_after: seconds that the server asks to wait; None where it does not say.
        tokens: that it cost all the same.
    """

    def __init__(self, trouble: Trouble, message: str, retry_after: float | None = None, tokens: Tokens | None = None):
        super().__init__(message)
        self.trouble, self.retry_after, self.tokens = trouble, retry_after, tokens


@dataclass(frozen=True)
class Reply:
    """An answer as it came: its text, why it ended ("stop", "length", ...), and the tokens that the server counted."""

    text: str
    tokens: Tokens = field(default_factory=lambda: Tokens(calls=1))
    finish: str = "stop"


class Judge(Protocol):
    """A judge that reads a prompt. `ask` raises `JudgeError` and nothing else."""

    name: str

    def identity(self) -> dict[str, Any]:
        """What a verdict of this judge depends on."""

    async def ask(self, chat: Messages, schema: Mapping[str, Any]) -> Reply:
        """Answer one chat."""

    async def aclose(self) -> None:
        """Close connections."""


@dataclass(frozen=True)
class JudgeConfig:
    """A judge behind an OpenAI-compatible endpoint.

    Attributes:
        name: what results call it.
        model: what the server calls it.
        base_url: of the endpoint, "/v1" included.
        api_key_env: the environment variable that holds the key; empty for servers that want none.
        temperature: None leaves the parameter out; so does a model that refuses it.
        max_tokens: of an answer; None is the server's own limit.
        structured: ask for JSON by a schema, by "json_object", or by the prompt alone; "auto" starts with the schema
            and steps down where the server refuses it.
        cache_marks: mark the shared part of the prompt for providers whose prefix cache wants that.
        timeout: seconds for one attempt.
        concurrency: most calls in flight; adapted below that.
        requests_per_minute: the provider's limit, kept by spacing calls out; None is none.
        tokens_per_minute: the same for tokens, estimated before the call.
        extra: further parameters of the request, for example `{"reasoning_effort": "low"}`.
    """

    name: str
    model: str
    base_url: str
    api_key_env: str = ""
    temperature: float | None = 0.0
    max_tokens: int | None = None
    structured: Literal["auto", "schema", "object", "none"] = "auto"
    cache_marks: bool = False
    timeout: float = 180.0
    concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kinds, told in _KINDS:
            value = getattr(self, name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise ValueError(f"judge {self.name!r} has {name} {value!r}; it is {told}")
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"judge {self.name!r} has base_url {self.base_url!r}; write http://HOST:PORT/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError(f"the base_url of judge {self.name!r} carries a secret; set api_key_env instead")
        if self.structured not in ("auto", "schema", "object", "none"):
            raise ValueError(
                f"judge {self.name!r} has structured {self.structured!r}; it is auto, schema, object or none"
            )
        if self.concurrency < 1 or self.timeout <= 0:
            raise ValueError(f"judge {self.name!r} needs a concurrency of 1 or more and a timeout over 0")

    def identity(self) -> dict[str, Any]:
        """What a verdict depends on: not the key, the limits or the time-out."""
        keep = ("model", "base_url", "temperature", "max_tokens", "structured", "extra")
        return {key: getattr(self, key) for key in keep}


_TEXT, _COUNT, _NUMBER = ((str,), "a text"), ((int,), "a whole number"), ((int, float), "a number")
_KINDS = (
    *((name, *_TEXT) for name in ("name", "model", "base_url", "api_key_env")),
    *((name, *kind) for name, kind in (("concurrency", _COUNT), ("timeout", _NUMBER))),
    ("max_tokens", (int, type(None)), "a whole number"),
    *((name, (int, float, type(None)), "a number")
      for name in ("temperature", "requests_per_minute", "tokens_per_minute")),
    ("cache_marks", (bool,), "true or false"),
    ("extra", (dict,), "a table"),
)  # fmt: skip

PROVIDERS = {
    ("gpt-", "o1", "o3", "o4", "chatgpt-"): ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    ("claude-",): ("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
    ("gemini-",): ("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    ("mistral-", "ministral-", "magistral-"): ("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    ("deepseek-",): ("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
}
"""Prefixes of model names, as LAB picks providers: the OpenAI-compatible endpoint and the variable of the key."""

LOCAL_KEY_ENV = "STILL_JUDGE_API_KEY"
"""The variable read for `MODEL@URL`, where it is set; servers of one's own mostly want no key."""


def find_judge(name: str, table: Mapping[str, JudgeConfig] | None = None) -> Judge:
    """A judge by what the command line calls it.

    Args:
        name: "exact"; a name in the user's table; `MODEL@URL`; or a model of a provider that is known.
        table: what `load_judges` read.

    Raises:
        ValueError: nothing is called so.
    """
    if name == "exact":
        return ExactJudge()
    config = find_config(name, table)
    from .client import OpenAIJudge

    return OpenAIJudge(config)


def find_config(name: str, table: Mapping[str, JudgeConfig] | None = None) -> JudgeConfig:
    """The settings of a served judge by its name, as `find_judge` takes it; no key is needed yet.

    Raises:
        ValueError: nothing is called so.
    """
    table = table or {}
    model, at, url = name.partition("@http")
    if name in table:
        return table[name]
    if at and model:
        return JudgeConfig(model, model, f"http{url}", LOCAL_KEY_ENV if os.environ.get(LOCAL_KEY_ENV) else "")
    for prefixes, place in PROVIDERS.items():
        if name.startswith(prefixes):
            return JudgeConfig(name, name, *place)
    prefixes = ", ".join(f"{prefix}*" for group in PROVIDERS for prefix in group)
    raise ValueError(
        f"no judge is called {name!r}; write exact, MODEL@http://HOST:PORT/v1, a model of a known provider ({prefixes})"
        + (f", or one of your table: {', '.join(table)}" if table else ", or name a --judges file")
    )


def load_judges(path: str | Path) -> dict[str, JudgeConfig]:
    """Read a TOML table of judges: one `[name]` each, with the fields of `JudgeConfig`; `model` is required.

    Where `base_url` is left out, the provider is found by the model's name.

    Raises:
        ValueError: it is no such table.
    """
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as problem:
        raise ValueError(f"{path} is no TOML: {problem}") from problem
    known = {each.name for each in fields(JudgeConfig)}
    found = {}
    for name, entry in raw.items():
        if not isinstance(entry, dict) or "model" not in entry:
            raise ValueError(f"{path}: judge {name!r} needs a table with a model")
        if unknown := sorted(set(entry) - known):
            raise ValueError(f"{path}: judge {name!r} has unknown settings {unknown}; there are {sorted(known)}")
        if "base_url" not in entry:
            found[name] = replace(find_config(str(entry["model"])), **{**entry, "name": name})
        else:
            found[name] = JudgeConfig(**{**entry, "name": name})
    return found


class ExactJudge:
    """Judges criteria with an `expect` block by machine (synthetic matters); no call, no cost."""

    name = "exact"

    def identity(self) -> dict[str, Any]:
        """Nothing but its name."""
        return {"model": "exact"}

    def decide(self, criterion: Criterion, text: str) -> Verdict:
        """See `judge.exact_criterion`."""
        return exact_criterion(text, criterion)

    async def aclose(self) -> None:
        """Nothing is open."""


class ScriptedJudge:
    """A judge that is a function, for tests and for models in this process.

    Args:
        answer: takes the chat and returns a text or a `Reply`, or raises `JudgeError`; it may be a coroutine.
        name: what results call it; its verdicts are cached under it.
    """

    def __init__(self, answer: Callable[[Messages], str | Reply | Awaitable[str | Reply]], name: str = "scripted"):
        self._answer, self.name = answer, name

    def identity(self) -> dict[str, Any]:
        """Nothing but its name: give functions that answer differently different names."""
        return {"model": f"scripted:{self.name}"}

    async def ask(self, chat: Messages, schema: Mapping[str, Any]) -> Reply:
        """Call the function."""
        reply = self._answer(chat)
        if inspect.isawaitable(reply):
            reply = await reply
        return Reply(reply) if isinstance(reply, str) else reply

    async def aclose(self) -> None:
        """Nothing is open."""
