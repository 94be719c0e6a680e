"""Documents and deliverables to text: which reader ran, what it read and what came out, or an error that says why not.

Word is read by pandoc, sheets by openpyxl, slides by markitdown, PDF by pdfplumber, mail by the standard library. Each
foreign format is read in a process of its own, with limits on time and memory, so that a file which breaks its parser
costs only itself. Nothing is cut: a file gives its whole text or a `DocumentError`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from .pandoc import pandoc_read, pandoc_version
from .reading import DocumentError, Limits, Reading, as_path, needs_extra, run_bounded

if TYPE_CHECKING:
    from email.message import EmailMessage

PLAIN = (".txt", ".md", ".markdown", ".text", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml")
PANDOC = {".docx": "docx", ".odt": "odt", ".rtf": "rtf", ".epub": "epub", ".html": "html", ".htm": "html"}
PARSED = {".xlsx": "xlsx", ".xlsm": "xlsx", ".pptx": "pptx", ".pdf": "pdf"}
PARSERS = {"xlsx": "openpyxl", "pptx": "markitdown", "pdf": "pdfplumber"}
MAIL = (".eml",)
SUFFIXES = (*PLAIN, *PANDOC, *PARSED, *MAIL)
ZIPPED = (".docx", ".odt", ".epub", ".xlsx", ".xlsm", ".pptx")
OLDER = {".doc": ".docx", ".xls": ".xlsx", ".ppt": ".pptx", ".msg": ".eml"}

OLE = bytes.fromhex("d0cf11e0a1b11ae1")
"""How older office files and encrypted newer ones begin."""
HEADERS = ("From", "To", "Cc", "Bcc", "Date", "Subject")


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

        package = PARSERS[PARSED[suffix]]
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError as problem:
            raise needs_extra(package, problem) from problem
    if suffix in MAIL:
        return "email"
    return f"{pandoc_version()} {PANDOC[suffix]}" + (", changes shown" if redlines and suffix == ".docx" else "")


Outcome = tuple[str, str, list[str]]
"""Text, reader, notes."""


def _reader_of(name: str) -> Callable[[str, bytes, bool, Limits], Outcome]:
    suffix = _suffix(name)
    for suffixes, reader in ((PLAIN, _plain), (PANDOC, _pandoc), (PARSED, _parsed), (MAIL, _mail)):
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
    text, notes = pandoc_read(name, data, PANDOC[suffix], limits, redlines)
    return text, reader_key(name, redlines), notes


def _parsed(name: str, data: bytes, redlines: bool, limits: Limits) -> Outcome:
    kind, reader = PARSED[_suffix(name)], reader_key(name)
    if _suffix(name) in ZIPPED:
        _check_zip(name, data, limits)
    with as_path(name, data) as source:
        command = [sys.executable, "-P", "-m", f"{__package__}.converters", kind, source, str(limits.memory_bytes)]
        answer = json.loads(run_bounded(name, command, limits))
    if "state" in answer:
        raise DocumentError(name, answer["state"], answer["message"])
    return answer["text"], reader, answer["notes"]


def _mail(name: str, data: bytes, redlines: bool, limits: Limits) -> Outcome:
    from email import message_from_bytes, policy

    message = message_from_bytes(data, policy=policy.default)
    if not message.keys():
        raise DocumentError(name, "corrupt", "has no headers of a mail; export it again as .eml")
    body, reader = message.get_body(("plain", "html")), "email"
    text = _part(body) if body is not None else ""
    if body is not None and body.get_content_subtype() == "html":
        text, _ = pandoc_read("body.html", text.encode("utf-8", "replace"), "html", limits)
        reader = f"email, {pandoc_version()} html"
    lines = [f"{key}: {message[key]}" for key in HEADERS if message[key]]
    attached = [
        f"- {part.get_filename() or 'without a name'} ({part.get_content_type()}, {len(_payload(part)):,} bytes)"
        for part in message.iter_attachments()
    ]
    if attached:
        lines.append("\n".join(["Attachments (named here, not read):", *attached]))
    notes = [f"{len(attached)} attachments are named and not read"] if attached else []
    return "\n".join(lines) + f"\n\n{text.strip()}\n", reader, notes


def _part(part: EmailMessage) -> str:
    """The text of a part, whatever its charset is said to be."""
    try:
        return part.get_content()
    except (LookupError, UnicodeError):
        return _payload(part).decode("utf-8", "replace")


def _payload(part: EmailMessage) -> bytes:
    """The bytes of a part; of an attached mail, the mail."""
    if part.is_multipart():
        return b"".join(inner.as_bytes() for inner in part.get_payload())
    return part.get_payload(decode=True) or b""


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
