"""Tool calls in the text that a model sampled, in the syntaxes that chat templates teach."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from ..types import ToolCall

Parsed = tuple[str, tuple[ToolCall, ...], str]
"""Text before the calls, the calls, and what is wrong with their syntax."""

_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


def parser_of(chat_template: str) -> Callable[[str], Parsed]:
    """The parser for the calls that a chat template renders.

    Raises:
        ValueError: the template renders no calls in a syntax that is known here.
    """
    for mark, parse in (("<|call|>", marked), ("<function=", tagged), ("<tool_call>", wrapped)):
        if mark in chat_template:
            return parse
    raise ValueError(
        "this chat template renders tool calls in no known syntax (<|call|>NAME JSON, <tool_call>JSON</tool_call>, "
        "<function=NAME>); serve the model behind an OpenAI-compatible server that parses them, and name that policy"
    )


def marked(text: str) -> Parsed:
    """`text<|call|>NAME {"key": ...}`, the pocket's own."""
    before, *parts = without_thinking(text).split("<|call|>")
    calls = []
    for part in parts:
        name, _, arguments = part.strip().partition(" ")
        calls.append(ToolCall(name, arguments.strip() or "{}"))
    return before.strip(), tuple(calls), _problem(calls)


def wrapped(text: str) -> Parsed:
    r"""`text<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>`, as Hermes and Qwen write them."""
    text = without_thinking(text)
    before = text.split("<tool_call>")[0]
    calls = []
    for part in text.split("<tool_call>")[1:]:
        inner, end, _ = part.partition("</tool_call>")
        try:
            found = json.loads(inner)
            calls.append(ToolCall(str(found["name"]), json.dumps(found.get("arguments") or {}, ensure_ascii=False)))
        except (ValueError, KeyError, TypeError, AttributeError):
            calls.append(ToolCall("", inner.strip()))
        if not end:
            return before.strip(), tuple(calls), "a call is not closed by </tool_call>"
    return before.strip(), tuple(calls), _problem(calls)


def tagged(text: str) -> Parsed:
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`, as Qwen's coders write."""
    text = without_thinking(text)
    before = re.split(r"<tool_call>|<function=", text)[0]
    calls = []
    for name, body in re.findall(r"<function=([^>\n]*)>(.*?)(?:</function>|\Z)", text, re.DOTALL):
        pairs = re.findall(r"<parameter=([^>\n]*)>\n?(.*?)\n?</parameter>", body, re.DOTALL)
        calls.append(ToolCall(name.strip(), json.dumps({key: _value(value) for key, value in pairs})))
    open_calls = text.count("<function=") - text.count("</function>")
    return before.strip(), tuple(calls), "a call is not closed by </function>" if open_calls > 0 else _problem(calls)


def without_thinking(text: str) -> str:
    """The text without a reasoning block, which stays in the window that it was written in and goes no further."""
    return _THINKING.sub("", text)


def _value(text: str):
    return int(text) if re.fullmatch(r"\d{1,12}", text) else text


def _problem(calls: list[ToolCall]) -> str:
    for call in calls:
        if not call.name:
            return f"a call names no tool: {call.arguments[:80]!r}"
        if call.parsed() is None:
            return f"the arguments of {call.name} are no JSON object: {call.arguments[:80]!r}"
    return ""
