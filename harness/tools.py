"""LAB's six tools over one workspace: bash, read, write, edit, glob, grep.

`documents/` is served from text that was converted at task load and cannot be written; `output/` is graded; the rest
is the agent's own. Nothing that an agent can ask raises: a mistake of its own, a full disk or a dead sandbox is a
`ToolResult` that says so.
"""

from __future__ import annotations

import difflib
import errno
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..eval.pandoc import markdown_to_docx, pandoc_path
from ..eval.readers import SUFFIXES, DocumentError, Limits, read_bytes
from .confined import Confined, OutsideError, Parts, is_plain, parse, shown_names
from .documents import Documents, valid
from .sandbox import Sandbox, SandboxError

PROBLEMS = {
    "unknown_tool": "no tool has this name",
    "bad_arguments": "the arguments are no JSON, or not those of the tool",
    "off": "the tool is not available on this machine",
    "outside": "the path leads out of the workspace, or through a link",
    "read_only": "documents/ cannot be written",
    "missing": "there is no such file",
    "unreadable": "the file gives no text",
    "no_match": "edit: the text is not in the file, or there more than once",
    "second_read": "one document is read a turn",
    "failed": "bash: exit code other than 0",
    "timeout": "bash or grep: the time was over",
    "environment": "not the agent's doing: a full disk, a sandbox that does not start",
}
"""What can go wrong, as `ToolResult.problem` says it."""

GREP_SECONDS = 10.0
LONGEST_LINE = 500


@dataclass(frozen=True)
class ToolResult:
    """What a tool gives back.

    Attributes:
        text: what the agent is shown.
        ok: whether the tool did what it was asked.
        truncated: the agent was shown less than there is; the text says so and how to get the rest.
        document: `read`: the name of the task's document that was read, as `Workspace.names` shows it; None otherwise.
        characters: `read`: how many characters of the file are in `text`.
        start: `read`: where in the file's text they begin.
        total: `read`: length of the file's text.
        problem: empty, or one of `PROBLEMS`.
        path: `write` and `edit`: the file that is now on disk, relative to the workspace.
    """

    text: str
    ok: bool = True
    truncated: bool = False
    document: str | None = None
    characters: int = 0
    start: int = 0
    total: int = 0
    problem: str = ""
    path: str | None = None


class ToolError(Exception):
    """A mistake that the agent is told of; `problem` is one of `PROBLEMS`."""

    def __init__(self, problem: str, message: str):
        super().__init__(message)
        self.problem = problem


def _tool(name: str, description: str, required: str, **properties: tuple[str, str]) -> dict[str, Any]:
    """An OpenAI tool schema; each property is `(type, description)`."""
    shown = {key: {"type": kind, "description": text} for key, (kind, text) in properties.items()}
    parameters = {
        "type": "object",
        "properties": shown,
        "required": required.split(),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


NEXT = "next"
"""A path that `read` takes: the harness knows what was read."""
TOOLS = (
    _tool(
        "read",
        "Read a file as text: documents/NAME, output/NAME or a file of your own. Word, Excel, PowerPoint, PDF and mail "
        "are converted. Without a limit the whole file is read. One document a turn.",
        "path",
        path=("string", f"for example documents/lease.docx; {NEXT}: the next document that was not read to its end"),
        offset=("integer", "first character to read (default: 0)"),
        limit=("integer", "most characters to read (default: all)"),
    ),
    _tool(
        "write",
        "Write a text file, replacing what was there. Deliverables go to output/. A .docx is written in markdown and "
        "converted to Word.",
        "path content",
        path=("string", "for example output/memo.docx"),
        content=("string", "the whole text of the file"),
    ),
    _tool(
        "edit",
        "Replace a text in a file of yours. The old text is given exactly as `read` shows it.",
        "path old_string new_string",
        path=("string", "for example output/memo.docx"),
        old_string=("string", "text to replace; it must be there exactly once unless replace_all is true"),
        new_string=("string", "text to put in its place"),
        replace_all=("boolean", "replace every occurrence (default: false)"),
    ),
    _tool(
        "glob",
        "List files by name: ** stands for any folders, * for any part of a name.",
        "pattern",
        pattern=("string", "for example documents/**/*.docx, or **"),
    ),
    _tool(
        "grep",
        "Search the text of all documents and files, line by line, with a regular expression.",
        "pattern",
        pattern=("string", "a regular expression"),
        path=("string", "a file, or a pattern as glob takes it (default: every file)"),
        ignore_case=("boolean", "(default: false)"),
    ),
    _tool(
        "bash",
        "Run a command in a sandbox without network, in /workspace. documents/ holds the original files and cannot be "
        "written. Each call is a new shell.",
        "command",
        command=("string", "what bash runs"),
        timeout=("number", "seconds (default: the harness's limit, which it cannot exceed)"),
    ),
)


class Workspace:
    """One episode's folder and the tools over it.

    Args:
        root: an existing folder of this episode alone; `output/` is made in it.
        documents: the task's documents as text.
        sandbox: what `bash` runs in; without one, `bash` is off.
        longest: most characters of one result of bash, glob and grep; `read` is bounded by its `limit` alone.

    Attributes:
        names: of the documents as the agent is shown them, with the real ones.

    Raises:
        ValueError: the task's own folder, with its rubric, could be reached from `root` or from the sandbox; or two
            documents are shown by one name.
        ModuleNotFoundError: the task asks for a docx, and there is no pandoc.
    """

    def __init__(self, root: str | Path, documents: Documents, sandbox: Sandbox | None = None, longest: int = 30_000):
        self.files = Confined(root)
        self.root, self.documents, self.sandbox, self.longest = self.files.root, documents, sandbox, longest
        self.names = shown_names(documents.names)
        self.limits = Limits()
        self._refuse_reachable(documents.task.folder)
        if any(name.lower().endswith(".docx") for name in documents.task.deliverables):
            pandoc_path()
        with suppress(FileExistsError):  # a command may have left anything of that name, until the run is put back
            self.root.joinpath("output").mkdir()

    def specs(self) -> list[dict[str, Any]]:
        """The tools that are on, as OpenAI tool schemas."""
        return [tool for tool in TOOLS if tool["function"]["name"] != "bash" or self.sandbox is not None]

    def call(self, name: str, arguments: Mapping[str, Any] | str) -> ToolResult:
        """Run one tool.

        Args:
            name: as the model wrote it.
            arguments: a mapping, or the JSON text that the model wrote.
        """
        result = self._call(name, arguments)
        return replace(result, text=valid(result.text))

    def _call(self, name: str, arguments: Mapping[str, Any] | str) -> ToolResult:
        try:
            given = check_arguments(name, arguments)
            tool: Callable[..., ToolResult] = getattr(self, f"_{name}")
            return tool(**given)
        except ToolError as mistake:
            return failure(mistake.problem, str(mistake))
        except OutsideError as mistake:
            return failure("outside", str(mistake))
        except FileNotFoundError as mistake:
            return failure("missing", str(mistake))
        except DocumentError as mistake:
            return failure("missing" if mistake.state == "missing" else "unreadable", str(mistake))
        except OSError as problem:
            mine = problem.errno in (errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.ENOTDIR, errno.EACCES)
            reason = f"{name} failed: {problem.strerror or problem}; nothing was changed"
            return failure("bad_arguments" if mine else "environment", reason)

    def _read(self, path: str, offset: int = 0, limit: int | None = None) -> ToolResult:
        if offset < 0 or (limit is not None and limit < 1):
            raise ToolError("bad_arguments", f"offset {offset} and limit {limit}: from 0 on, and 1 or more")
        if path == NEXT:
            raise ToolError("missing", "every document is read; give a path to read one again")
        text, document = self._text(parse(path))
        if offset and offset >= len(text):
            raise ToolError("bad_arguments", f"offset {offset} is past the end; {path} has {len(text):,} characters")
        shown = text[offset:] if limit is None else _cut(text[offset : offset + limit], text[offset + limit :])
        end = offset + len(shown)
        result = ToolResult(shown, True, end < len(text), document, len(shown), offset, len(text))
        if result.truncated:
            note = f"[characters {offset:,} to {end:,} of {len(text):,}; go on with offset {end}]"
            result = replace(result, text=f"{shown}\n\n{note}")
        return result

    def _write(self, path: str, content: str) -> ToolResult:
        parts = self._writable(path)
        self.files.write(parts, self._as_file(parts, content))
        return self._written(parts, f"wrote {len(content):,} characters")

    def _edit(self, path: str, old_string: str, new_string: str, replace_all: bool = False) -> ToolResult:
        parts = self._writable(path)
        text, _ = self._text(parts)
        count = text.count(old_string) if old_string else 0
        if count == 0:
            raise ToolError("no_match", f"the old text is not in {path}; read it again and copy it exactly")
        if count > 1 and not replace_all:
            raise ToolError("no_match", f"the old text is in {path} {count} times; give more of it, or replace_all")
        self.files.write(parts, self._as_file(parts, text.replace(old_string, new_string), edited=True))
        return self._written(parts, f"replaced {count} {'place' if count == 1 else 'places'}")

    def _glob(self, pattern: str) -> ToolResult:
        names = list(self._named(pattern))
        return self._bounded("\n".join(names) if names else f"no file matches {pattern}")

    def _grep(self, pattern: str, path: str | None = None, ignore_case: bool = False) -> ToolResult:
        import regex

        try:
            wanted = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
        except (regex.error, RecursionError, MemoryError, OverflowError) as mistake:
            raise ToolError("bad_arguments", f"{pattern!r:.200} is no regular expression: {mistake}") from mistake
        found, skipped, until = [], 0, time.monotonic() + GREP_SECONDS
        for name in self._named(path or "**"):
            try:
                text, _ = self._text(parse(name))
            except (DocumentError, OutsideError, ToolError, OSError):
                skipped += 1
                continue
            try:
                found += _matches(wanted, name, text, until)
            except TimeoutError as slow:
                raise ToolError("timeout", f"{pattern!r} takes too long to search for; make it simpler") from slow
        if skipped:
            found.append(f"[{skipped} files give no text and were not searched]")
        return self._bounded("\n".join(found) if found else f"nothing matches {pattern}")

    def _bash(self, command: str, timeout: float | None = None) -> ToolResult:
        if self.sandbox is None:
            raise ToolError("off", "bash is off: there is no sandbox here; use read, write, edit, glob and grep")
        if "\0" in command or valid(command) != command:
            raise ToolError("bad_arguments", "the command is no valid text")
        if timeout is not None and not timeout > 0:
            raise ToolError("bad_arguments", f"timeout is {timeout}; it is more than 0 seconds")
        task, seconds = self.documents.task, min(timeout or self.sandbox.seconds, self.sandbox.seconds)
        try:
            ran = self.sandbox.run(command, self.root, task.folder, task.hidden, seconds)
        except SandboxError as problem:
            raise ToolError("environment", str(problem)) from problem
        shown = self._bounded(ran.text.rstrip("\n"))
        ended = f"[stopped after {seconds:g} seconds]" if ran.code is None else f"[exit code {ran.code}]"
        text = "\n".join(filter(None, [shown.text, "" if ran.code == 0 else ended])) or "[no output]"
        problem = "timeout" if ran.code is None else "failed" if ran.code else ""
        return replace(shown, text=text, ok=not problem, truncated=shown.truncated or ran.left_out > 0, problem=problem)

    def _refuse_reachable(self, folder: Path) -> None:
        """A workspace in the task's own folder, or around it, would show the rubric."""
        folder = folder.resolve()
        for place in (folder, folder.parent if folder.name == "documents" else folder):
            if self.root.is_relative_to(place) or place.is_relative_to(self.root):
                raise ValueError(f"the workspace {self.root} and the task's folder {place} hold one another: move one")
        if self.sandbox is not None and self.sandbox.shows(folder):
            raise ValueError(f"the task lies in {folder}, which every command in the sandbox can read: move it")

    def _text(self, parts: Parts) -> tuple[str, str | None]:
        """The text of a document, with its name, or of a file of the agent's."""
        path = "/".join(parts)
        if parts[:1] == ("documents",):
            given = path.removeprefix("documents/")
            name = next((shown for shown, real in self.names.items() if given in (shown, real)), None)
            if name is None:
                raise ToolError("missing", f"there is no {path}{self._nearest(path)}")
            return self.documents.text(self.names[name]), name
        try:
            data = self.files.read(parts, self.limits.file_bytes)
        except FileNotFoundError as mistake:
            raise ToolError("missing", f"{mistake}{self._nearest(path)}") from mistake
        except ValueError as mistake:
            if isinstance(mistake, OutsideError):
                raise
            raise ToolError("unreadable", str(mistake)) from mistake
        if not data:
            return "", None
        name = path if path.lower().endswith(SUFFIXES) else path + ".txt"
        try:
            return read_bytes(name, data, limits=self.limits).text, None
        except DocumentError as mistake:
            if mistake.state == "no_text":
                return "", None
            raise

    def _nearest(self, path: str) -> str:
        near = difflib.get_close_matches(path, list(self._named("**")), 1)
        return f"; did you mean {near[0]}?" if near else "; glob ** lists the files"

    def _named(self, pattern: str) -> Iterator[str]:
        """Documents, then the agent's files, whose name is or matches `pattern`."""
        wanted = "/".join(parse(pattern)) or "**"
        matches = glob_pattern(wanted)
        own = (path for path, _ in self.files.files() if not path.startswith("documents/"))
        for path in (*(f"documents/{name}" for name in self.names), *own):
            if path == wanted or path.startswith(wanted + "/") or matches.fullmatch(path):
                yield path

    def _writable(self, path: str) -> Parts:
        parts = parse(path)
        if not parts or path.endswith("/") or parts == ("output",):
            raise ToolError("bad_arguments", f"{path!r} names no file")
        if parts[0] == "documents":
            raise ToolError("read_only", f"{path} cannot be written; deliverables go to output/")
        if not is_plain(path):
            raise ToolError("bad_arguments", f"{path!r} has a line break or another control character; leave it out")
        return parts

    def _as_file(self, parts: Parts, content: str, edited: bool = False) -> bytes:
        name = parts[-1].lower()
        if name.endswith((".xlsx", ".xlsm", ".pptx", ".pdf", ".odt", ".epub", ".rtf", ".doc", ".xls", ".ppt")):
            how = "make it with bash" if self.sandbox is not None else "write a .docx, .md or .txt"
            raise ToolError("bad_arguments", f"{parts[-1]} is no text file; {how}")
        try:
            data = content.encode("utf-8")
        except UnicodeEncodeError as mistake:
            raise ToolError("bad_arguments", f"the text is no valid Unicode: {mistake.reason}") from mistake
        return markdown_to_docx(parts[-1], data, edited, self.limits) if name.endswith(".docx") else data

    def _written(self, parts: Parts, what: str) -> ToolResult:
        path = "/".join(parts)
        return ToolResult(f"{what} in {path}", path=path)

    def _bounded(self, text: str) -> ToolResult:
        if len(text) <= self.longest:
            return ToolResult(text)
        shown = text[: self.longest].rpartition("\n")[0] or text[: self.longest]
        note = f"[{len(text) - len(shown):,} more characters are not shown; ask for less]"
        return ToolResult(f"{shown}\n{note}", truncated=True)


def failure(problem: str, message: str) -> ToolResult:
    """The result of a call that did nothing."""
    return ToolResult(f"Error: {message}", ok=False, problem=problem)


def check_arguments(name: str, arguments: Mapping[str, Any] | str) -> dict[str, Any]:
    """The arguments of a call, if they are what the tool's schema says.

    Raises:
        ToolError: there is no such tool, or the arguments are not its own.
    """
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    if name not in schemas:
        raise ToolError("unknown_tool", f"there is no tool {name!r}; there are {', '.join(schemas)}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as mistake:
            raise ToolError("bad_arguments", f"the arguments of {name} are no JSON: {mistake}") from mistake
    if not isinstance(arguments, Mapping):
        raise ToolError("bad_arguments", f"the arguments of {name} are no JSON object")
    properties = schemas[name]["properties"]
    given = {key: value for key, value in arguments.items() if value is not None}
    if missing := [key for key in schemas[name]["required"] if key not in given]:
        raise ToolError("bad_arguments", f"{name} needs {', '.join(missing)}")
    if unknown := [str(key) for key in given if key not in properties]:
        raise ToolError("bad_arguments", f"{name} takes {', '.join(properties)}, and no {', '.join(unknown)}")
    for key, value in given.items():
        kind = properties[key]["type"]
        if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
            raise ToolError("bad_arguments", f"{name}: {key} is {value!r:.80}; it is of type {kind}")
    return given


TYPES: dict[str, tuple[type, ...]] = {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,)}


@lru_cache
def glob_pattern(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression over whole paths: `**/` any folders, `*` and `?` within a name."""
    kinds = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(kinds.get(piece) or re.escape(piece) for piece in pieces), re.DOTALL)


def _matches(wanted: Any, name: str, text: str, until: float) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if match := wanted.search(line, timeout=max(1e-3, until - time.monotonic())):
            yield f"{name}:{number}: {_excerpt(line, match.start())}"


def _excerpt(line: str, at: int) -> str:
    """A line, or of a long one what is around the match."""
    if len(line) <= LONGEST_LINE:
        return line
    start = max(0, min(at - LONGEST_LINE // 2, len(line) - LONGEST_LINE))
    end = start + LONGEST_LINE
    return "..." * (start > 0) + line[start:end] + "..." * (end < len(line))


def _cut(piece: str, rest: str) -> str:
    """A piece of text without the word that its end would cut in two, where the word is short."""
    if not rest or rest[0].isspace() or piece[-1:].isspace():
        return piece
    whole = piece.rstrip("".join(set(piece[-64:]) - set(" \n\t")))
    return whole if whole else piece
