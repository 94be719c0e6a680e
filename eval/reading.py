"""What reading a file gives: its text with where it came from, or an error with a state; and what it may cost."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

STATES = ("missing", "empty", "no_text", "too_large", "encrypted", "corrupt", "too_slow", "unsupported")
PANDOC_HEAP = 251
"""Pandoc's exit code when it runs out of the memory allowed."""


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


def run_bounded(name: str, command: list[str], limits: Limits) -> bytes:
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


@contextmanager
def as_path(name: str, data: bytes) -> Iterator[str]:
    """A file with these bytes while a reader needs one."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "document" + PurePath(name).suffix.lower())
        source.write_bytes(data)
        yield str(source)


def needs_extra(what: str, problem: Exception) -> ModuleNotFoundError:
    """The error that says how to get a reader which is not installed."""
    return ModuleNotFoundError(f"{what} is needed to read this: pip install 'still-kv[documents]' ({problem})")
