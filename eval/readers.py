"""Documents and deliverables to text: which reader ran, what it read and what came out, or an error that says why not.

Word is read by pandoc, sheets by openpyxl, slides by markitdown, PDF by pdfplumber, mail by the standard library. Each
foreign format is read in a process of its own, with limits on time and memory, so that a file which breaks its parser
costs only itself. Nothing is cut: a file gives its whole text or a `DocumentError`.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

PLAIN = (".txt", ".md", ".markdown", ".text", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml")
PANDOC = {".docx": "docx", ".odt": "odt", ".rtf": "rtf", ".epub": "epub", ".html": "html", ".htm": "html"}
PARSED = {".xlsx": "xlsx", ".xlsm": "xlsx", ".pptx": "pptx", ".pdf": "pdf"}
MAIL = (".eml",)
SUFFIXES = (*PLAIN, *PANDOC, *PARSED, *MAIL)
ZIPPED = (".docx", ".odt", ".epub", ".xlsx", ".xlsm", ".pptx")
OLDER = {".doc": ".docx", ".xls": ".xlsx", ".ppt": ".pptx", ".msg": ".eml"}

OLE = bytes.fromhex("d0cf11e0a1b11ae1")
"""How older office files and encrypted newer ones begin."""
WRITTEN = (
    "markdown+lists_without_preceding_blankline-blank_before_header-blank_before_blockquote-tex_math_dollars"
    "-citations-example_lists-yaml_metadata_block-pandoc_title_block-raw_tex-raw_attribute"
    "-simple_tables-multiline_tables"
)
"""Pandoc's name for the markdown that a deliverable is written in."""
DRAWN_TABLES = "+simple_tables+multiline_tables"
PANDOC_HEAP = 251
"""Pandoc's exit code when it runs out of the memory allowed."""

STATES = ("missing", "empty", "no_text", "too_large", "encrypted", "corrupt", "too_slow", "unsupported")


class DocumentError(ValueError):
    """A file that gives no text.

    Attributes:
        name: the file, as it was named by the caller.
        state: one of `STATES`.
    """

    def __init__(self, name: str, state: str, message: str):
        super().__init__(f"{name} {message}")
        self.name, self.state = name, state

    def __reduce__(self):
        return _remake, (type(self), self.name, self.state, str(self))


def _remake(kind: type, name: str, state: str, text: str) -> DocumentError:
    return kind(name, state, text.removeprefix(f"{name} "))


@dataclass(frozen=True)
class Limits:
    """What one file may cost; what is over a limit is an error, never a cut.

    Attributes:
        file_bytes: size of the file.
        unpacked_bytes: size of everything in a zipped format (docx, xlsx, pptx, odt, epub).
        members: files in a zipped format.
        seconds: time of the reader.
        memory_bytes: memory of the reader.
    """

    file_bytes: int = 64 << 20
    unpacked_bytes: int = 512 << 20
    members: int = 20_000
    seconds: float = 180.0
    memory_bytes: int = 2 << 30


@dataclass(frozen=True)
class Reading:
    """The text of one file and how it came about.

    Attributes:
        name: the file, as it was named by the caller.
        text: all of it, with "\\n" between lines.
        reader: program or library with its version, for example `pandoc 3.9 docx, changes accepted`.
        file_sha256: of the file's bytes.
        text_sha256: of the text in UTF-8.
        file_bytes: size of the file.
        notes: what the reader saw and the text does not hold (a header, an attachment), one sentence each.
    """

    name: str
    text: str
    reader: str
    file_sha256: str
    text_sha256: str
    file_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def characters(self) -> int:
        """Length of the text."""
        return len(self.text)

    def record(self) -> dict[str, Any]:
        """Everything but the text, for result files."""
        known = asdict(self) | {"characters": self.characters, "notes": list(self.notes)}
        del known["text"]
        return known


def read(path: str | Path, redlines: bool = False, limits: Limits | None = None) -> Reading:
    """Read one file.

    Args:
        path: the file; its suffix says what it is.
        redlines: show every tracked change and comment of a docx, instead of accepting the changes.
        limits: what the file may cost; the defaults of `Limits` when left out.

    Raises:
        DocumentError: it is not there, or gives no text; `state` says which.
        ModuleNotFoundError: the `documents` extra is not installed.
    """
    path, limits = Path(path), limits or Limits()
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise DocumentError(str(path), "missing", "is no file; name the file itself")
        _check_size(str(path), size, limits)
        data = path.read_bytes()
    except FileNotFoundError as problem:
        raise DocumentError(str(path), "missing", "is not there; check the name") from problem
    return read_bytes(path.name, data, redlines, limits)


def read_bytes(name: str, data: bytes, redlines: bool = False, limits: Limits | None = None) -> Reading:
    """Read a file that is in memory; see `read`."""
    limits = limits or Limits()
    _check_size(name, len(data), limits)
    text, reader, notes = _reader_of(name)(name, data, redlines, limits)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise DocumentError(name, "no_text", "holds no text; if it is a scan, put it through text recognition first")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Reading(name, text, reader, hashlib.sha256(data).hexdigest(), digest, len(data), tuple(notes))


def find_outputs(folder: str | Path) -> tuple[str, ...]:
    """Names of the files below a run's `output/` that a judge may see, sorted, with "/" between folders.

    Left out, as LAB does: `node_modules`, hidden files and folders, and the lock files of office programs. Left out
    too: links, since an agent that can make one could have a judge read any file of this machine.
    """
    root, found = Path(folder), []
    for here, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name != "node_modules" and not name.startswith(".")]
        for name in files:
            path = Path(here, name)
            if not name.startswith((".", "~$")) and path.is_file() and not path.is_symlink():
                found.append(path.relative_to(root).as_posix())
    return tuple(sorted(found))


def reader_key(name: str, redlines: bool = False) -> str:
    """What a text depends on besides the file's bytes: the reader, its version and how it was asked.

    Raises:
        DocumentError: no reader takes such files.
    """
    suffix = _suffix(name)
    _reader_of(name)
    if suffix in PLAIN:
        return "text"
    if suffix in PARSED:
        from importlib.metadata import PackageNotFoundError, version

        package = {"xlsx": "openpyxl", "pptx": "markitdown", "pdf": "pdfplumber"}[PARSED[suffix]]
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError as problem:
            raise _needs_extra(package, problem) from problem
    if suffix in MAIL:
        return "email"
    return f"{_pandoc_version()} {PANDOC[suffix]}" + (", changes shown" if redlines and suffix == ".docx" else "")


Outcome = tuple[str, str, list[str]]
"""Text, reader, notes."""


def _reader_of(name: str) -> Callable[[str, bytes, bool, Limits], Outcome]:
    suffix = _suffix(name)
    for suffixes, reader in ((PLAIN, _plain), (PANDOC, _pandoc)):
        if suffix in suffixes:
            return reader
    mend = f"save it as {OLDER[suffix]}" if suffix in OLDER else f"these are read: {' '.join(SUFFIXES)}"
    raise DocumentError(name, "unsupported", f"is of a kind that no reader takes ({suffix or 'no suffix'}); {mend}")


def _suffix(name: str) -> str:
    return PurePath(name).suffix.lower()


def _check_size(name: str, size: int, limits: Limits) -> None:
    if not size:
        raise DocumentError(name, "empty", "is empty (0 bytes); write it again")
    if size > limits.file_bytes:
        message = f"has {size:,} bytes, more than the {limits.file_bytes:,} allowed; split it or raise `file_bytes`"
        raise DocumentError(name, "too_large", message)


def _plain(name: str, data: bytes, redlines: bool, limits: Limits) -> Outcome:
    for encoding in ("utf-8-sig", "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            break
        return text, f"text {encoding.removesuffix('-sig')}", []
    raise DocumentError(name, "corrupt", "is no text, whatever its name says; give it the suffix of what it is")


def _pandoc(name: str, data: bytes, redlines: bool, limits: Limits) -> Outcome:
    suffix = _suffix(name)
    if suffix in ZIPPED:
        _check_zip(name, data, limits)
    changes = ["--track-changes=" + ("all" if redlines else "accept")] if suffix == ".docx" else []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "document" + suffix)
        source.write_bytes(data)
        memory = f"-M{limits.memory_bytes >> 20}M"
        command = [pandoc_path(), "+RTS", memory, "-RTS", "--sandbox", "-f", PANDOC[suffix], "-t", "markdown"]
        done = _bounded(name, [*command, "--wrap=none", *changes, str(source)], limits)
    return done.decode("utf-8"), reader_key(name, redlines), []


def markdown_to_docx(name: str, markdown: bytes, from_docx: bool = False, limits: Limits | None = None) -> bytes:
    """A Word file of a markdown text in UTF-8.

    Args:
        name: for messages.
        markdown: as people write it: a list or heading needs no blank line before it, and `$`, `@` and `%` are text.
        from_docx: it is what `read` shows of a docx, edited: tables may be drawn with dashes alone.
        limits: what the conversion may cost.

    Raises:
        DocumentError: pandoc does not take it.
        ModuleNotFoundError: there is no pandoc.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "text.md"), Path(folder, "text.docx")
        source.write_bytes(markdown)
        command = [
            pandoc_path(),
            "--sandbox",
            "-f",
            WRITTEN + DRAWN_TABLES * from_docx,
            "-t",
            "docx",
            "-o",
            str(target),
            str(source),
        ]
        _bounded(name, command, limits or Limits())
        return target.read_bytes()


def _bounded(name: str, command: list[str], limits: Limits) -> bytes:
    """What a reader's process prints.

    Raises:
        DocumentError: it failed, or ran past a limit.
    """
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=limits.seconds)
    except subprocess.TimeoutExpired as problem:
        message = f"was not read within {limits.seconds:g} seconds; split it or raise `seconds`"
        raise DocumentError(name, "too_slow", message) from problem
    if done.returncode == PANDOC_HEAP or done.returncode == -9:
        message = f"takes more than {limits.memory_bytes >> 20} MiB of memory to read; split it or raise `memory_bytes`"
        raise DocumentError(name, "too_large", message)
    if done.returncode:
        reason = " ".join(done.stderr.decode("utf-8", "replace").split())[:300] or f"exit code {done.returncode}"
        raise DocumentError(name, "corrupt", f"cannot be read ({reason}); open it in its own program and save it again")
    return done.stdout


def _check_zip(name: str, data: bytes, limits: Limits) -> None:
    """Refuse what is no zip, is encrypted, or would unpack to more than the limits."""
    if data.startswith(OLE):
        if "EncryptedPackage".encode("utf-16-le") in data:
            raise DocumentError(name, "encrypted", "is protected by a password; save it without one")
        message = f"is of an older format than {_suffix(name)}; save it as {_suffix(name)} in its own program"
        raise DocumentError(name, "unsupported", message)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as problem:
        message = f"is damaged ({problem}); open it in its own program and save it again"
        raise DocumentError(name, "corrupt", message) from problem
    if any(member.flag_bits & 1 for member in members):
        raise DocumentError(name, "encrypted", "is protected by a password; save it without one")
    unpacked = sum(member.file_size for member in members)
    if unpacked > limits.unpacked_bytes or len(members) > limits.members:
        message = (
            f"unpacks to {unpacked:,} bytes in {len(members):,} files; {limits.unpacked_bytes:,} bytes and "
            f"{limits.members:,} files are allowed: it may be a zip bomb, and else `unpacked_bytes` can be raised"
        )
        raise DocumentError(name, "too_large", message)


@lru_cache
def pandoc_path() -> str:
    """Where pandoc is: the one that comes with `pypandoc_binary`, or the system's.

    Raises:
        ModuleNotFoundError: there is none.
    """
    try:
        import pypandoc

        return pypandoc.get_pandoc_path()
    except (ModuleNotFoundError, OSError) as problem:
        raise _needs_extra("pandoc", problem) from problem


@lru_cache
def _pandoc_version() -> str:
    shown = subprocess.run([pandoc_path(), "--version"], capture_output=True, text=True, check=True).stdout
    return " ".join(shown.split()[:2])


def _needs_extra(what: str, problem: Exception) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{what} is needed to read this: pip install 'still-kv[documents]' ({problem})")
