"""Command-line flags made from config dataclasses, so that the two cannot drift apart."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


def add_flags(parser: argparse.ArgumentParser, config: type, skip: Collection[str] = ()) -> None:
    """Give `parser` one flag for each field of the dataclass `config`.

    `learning_rate: float = 4e-5` becomes `--learning-rate 4e-5`. The help text is the field's metadata
    `help`, else its line under `Attributes:` in the class's docstring. Types that flags know: str, int, float,
    bool (`--name` and `--no-name`), Path, `Literal` (choices), any of them `| None`, and
    `tuple[X, ...]` or `list[X]` (comma-separated). A field without a default is a required flag.

    Args:
        parser: the command's parser.
        config: a dataclass; importing it must not load torch.
        skip: fields that get no flag.

    Raises:
        TypeError: a field's type is not one that flags know.
    """
    hints = typing.get_type_hints(config)
    helps = _documented(config)
    for field in dataclasses.fields(config):
        if field.name in skip or not field.init:
            continue
        default = _default(field)
        required = default is dataclasses.MISSING
        text = field.metadata.get("help") or helps.get(field.name, "")
        if not required:
            text = f"{text} (default: {_show(default)})" if text else f"default: {_show(default)}"
        keywords: dict[str, Any] = {
            "dest": field.name,
            "help": text.replace("%", "%%"),
            "required": required,
            "default": None if required else default,
        }
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, **keywords, **_parsing(hints[field.name], f"{config.__name__}.{field.name}"))


def from_flags(args: argparse.Namespace, config: type[Config], **fixed: Any) -> Config:
    """Make the dataclass from parsed flags; `fixed` gives the fields that had none."""
    names = {field.name for field in dataclasses.fields(config) if field.init}
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return config(**{**given, **fixed})


def add_pass_through(parser: argparse.ArgumentParser, prefix: str) -> None:
    """Let the command take `--PREFIX.key value` for any key; they arrive as the dict `args.PREFIX`.

    Values are read as JSON where they are JSON (`1e-4`, `true`, `[1, 2]`) and as text otherwise.
    """
    taken = parser.get_default("pass_through") or ()
    parser.set_defaults(pass_through=(*taken, prefix))


def take_pass_through(args: argparse.Namespace, extra: Sequence[str]) -> list[str]:
    """Move `--PREFIX.key value` from `extra` into `args.PREFIX`; the arguments that nobody knows are returned."""
    prefixes = getattr(args, "pass_through", None) or ()
    for prefix in prefixes:
        setattr(args, prefix, {})
    unknown, rest = [], list(extra)
    while rest:
        word = rest.pop(0)
        match = re.match(r"--(\w+)\.([\w.\-]+)(?:=(.*))?$", word, re.DOTALL)
        if not match or match[1] not in prefixes:
            unknown.append(word)
            continue
        value = match[3]
        if value is None:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        getattr(args, match[1])[match[2].replace("-", "_")] = _json_or_text(value)
    return unknown


def _parsing(hint: Any, where: str) -> dict[str, Any]:
    """The `add_argument` keywords that parse one type."""
    hint = _without_none(hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is typing.Literal:
        return {"choices": inner, "type": type(inner[0])}
    if origin in (tuple, list):
        return {"type": _listed(_scalar(inner[0], where), origin), "metavar": f"{_meta(inner[0])},..."}
    return {"type": _scalar(hint, where), "metavar": _meta(hint)}


def _scalar(hint: Any, where: str) -> Callable[[str], Any]:
    if hint not in (str, int, float, Path):
        raise TypeError(f"{where} has type {hint}; flags know str, int, float, bool, Path, Literal, and lists of them")
    return hint


def _listed(item: Callable[[str], Any], container: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return container(item(part.strip()) for part in text.split(",") if part.strip())

    parse.__name__ = f"comma-separated {item.__name__}"  # argparse puts this name into its message
    return parse


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        if len(inner) == 1:
            return inner[0]
    return hint


def _meta(hint: Any) -> str:
    return {str: "TEXT", int: "N", float: "X", Path: "PATH"}.get(hint, "VALUE")


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(str(part) for part in value) or "none"
    return "none" if value is None else str(value)


def _documented(config: type) -> dict[str, str]:
    """What the docstring says of each field under `Attributes:` (or `Args:`), lines joined."""
    helps: dict[str, str] = {}
    for base in reversed(config.__mro__):
        name, section = None, False
        for line in (base.__doc__ or "").splitlines():
            start = re.match(r"(\s*)(\w+)(?: \([^)]*\))?: (.*)", line)
            if re.match(r"\s*(Attributes|Args):\s*$", line):
                section, indent = True, None
            elif section and start and (indent is None or len(start[1]) == indent):
                indent, name = len(start[1]), start[2]
                helps[name] = start[3].strip()
            elif section and name and line.strip():
                helps[name] += " " + line.strip()
            else:
                section, name = section and not line.strip() and name is None, None
    return {name: text.rstrip(".") for name, text in helps.items()}


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
