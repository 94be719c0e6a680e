"""The documents of a task as text: converted once, kept on disk by content, counted."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..eval.readers import DocumentError, Limits, Reading, read_bytes, reader_key
from ..eval.tasks import AgentTask

LAYOUT = 1
"""Version of the cache's files: an older one is converted again."""


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/still/documents`, or the same below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "still" / "documents"


@dataclass(frozen=True)
class Documents:
    """What a solving agent may read of a task, as text.

    Attributes:
        task: what may be seen of the task; it also gives the bytes of each document.
        readings: name to reading of every document that gave text.
        errors: name to the reason of every document that gave none; a run goes on without them.
    """

    task: AgentTask
    readings: Mapping[str, Reading]
    errors: Mapping[str, DocumentError] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        task: AgentTask,
        cache: str | Path | None = None,
        limits: Limits | None = None,
        workers: int | None = None,
    ) -> Documents:
        """Convert every document of a task, or take it from the cache.

        Args:
            task: `LabTask.agent_view()`.
            cache: folder of converted texts, by content; `default_cache()` when left out.
            limits: what one document may cost.
            workers: documents converted at a time; one for each core when left out.

        Raises:
            ModuleNotFoundError: a document's reader is not installed.
        """
        folder = default_cache() if cache is None else Path(cache)
        limits = limits or Limits()
        readings: dict[str, Reading] = {}
        errors: dict[str, DocumentError] = {}

        def convert(name: str) -> Reading | DocumentError:
            try:
                return _cached(folder, name, task.read(name), limits)
            except DocumentError as problem:
                return problem

        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            for name, found in zip(task.documents, pool.map(convert, task.documents), strict=True):
                (errors if isinstance(found, DocumentError) else readings)[name] = found
        return cls(task, readings, errors)

    @property
    def names(self) -> tuple[str, ...]:
        """Every document of the task, those without text too, sorted, with "/" between folders."""
        return self.task.documents

    def text(self, name: str) -> str:
        """The whole text of a document.

        Raises:
            FileNotFoundError: it is no document of the task.
            DocumentError: it gave no text.
        """
        return valid(self.reading(name).text)

    def reading(self, name: str) -> Reading:
        """The text of a document, its hashes and its reader; see `text`."""
        if name in self.errors:
            raise self.errors[name]
        if name not in self.readings:
            raise FileNotFoundError(f"{name!r} is no document of this task; it has {len(self.names)} others")
        return self.readings[name]

    def sha256(self, name: str) -> str:
        """Hash of a document's text, in UTF-8; of nothing where it gave none."""
        return hashlib.sha256(b"").hexdigest() if name in self.errors else self.reading(name).text_sha256

    def characters(self, name: str) -> int:
        """Length of a document's text; 0 where it gave none."""
        return 0 if name in self.errors else self.reading(name).characters

    def record(self) -> list[dict]:
        """Name, reader, hashes and counts of each document, or its error; for a run's first event."""
        return [
            {"name": name, "error": str(self.errors[name]), "state": self.errors[name].state}
            if name in self.errors
            else self.readings[name].record()
            for name in self.names
        ]


def valid(text: str) -> str:
    """The text, with a "?" for each half of a surrogate pair, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _cached(folder: Path, name: str, data: bytes, limits: Limits) -> Reading:
    key = json.dumps([LAYOUT, hashlib.sha256(data).hexdigest(), reader_key(name)])
    digest = hashlib.sha256(key.encode()).hexdigest()
    file = folder / digest[:2] / f"{digest}.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8", errors="surrogatepass"))
        reading = Reading(**known | {"name": name, "notes": tuple(known["notes"])})
        if hashlib.sha256(reading.text.encode("utf-8", "surrogatepass")).hexdigest() == reading.text_sha256:
            return reading
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not converted yet, or a file that a crash or a hand left behind: it is written anew
    reading = read_bytes(name, data, limits=limits)
    record = reading.record() | {"text": reading.text}
    del record["characters"]
    try:
        write_atomically(file, json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    except OSError as problem:
        warnings.warn(f"the text of {name} could not be kept in {folder}: {problem}", stacklevel=2)
    return reading


def write_atomically(file: Path, data: bytes) -> None:
    """Write a file so that a crash or a full disk leaves the old one, or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
