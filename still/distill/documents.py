"""A folder of documents to text, and text to contexts of a given length."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .rendering import Renderer

PLAIN = (".txt", ".md", ".markdown", ".text", ".rst")
CONVERTED = (".docx", ".pdf", ".pptx", ".xlsx", ".html", ".htm", ".eml", ".epub", ".csv")

_SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+(?=\S)|\n+")


@dataclass(frozen=True)
class Document:
    """A file's name, relative to its folder, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Context:
    """What is read at once: one document's piece, or several short documents.

    Attributes:
        parts: `(name, text)` of each document's piece.
        tokens: its length as the model is shown it.
        length: the wanted length that it was cut to.
        split: `train` or `validation`.
    """

    parts: tuple[tuple[str, str], ...]
    tokens: int
    length: int
    split: str

    @property
    def id(self) -> str:
        """Sixteen hex digits of its text and wanted length."""
        return hashlib.sha256(repr((self.parts, self.length)).encode()).hexdigest()[:16]

    @property
    def text(self) -> str:
        """The text of all parts."""
        return "\n\n".join(text for _, text in self.parts)


def read_documents(folder: str | Path) -> tuple[list[Document], Counter]:
    """Every document in a folder, in order of name, and how many files were left out and why.

    Raises:
        FileNotFoundError: there is no such folder, or no document in it.
        ModuleNotFoundError: a file needs the `documents` extra, which is not installed.
        ValueError: a file cannot be read.
    """
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"{folder}: there is no such file or folder of documents")
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    base = root.parent if root.is_file() else root
    documents, dropped = [], Counter()
    for path in files:
        if path.suffix.lower() not in PLAIN + CONVERTED:
            dropped[f"file_{path.suffix.lower() or 'without_suffix'}"] += 1
            continue
        text = _plain(path) if path.suffix.lower() in PLAIN else _convert(path)
        if not text.strip():
            dropped["file_without_text"] += 1
            continue
        documents.append(Document(str(path.relative_to(base)), text.strip()))
    if not documents:
        raise FileNotFoundError(f"{folder} holds no document with text; {', '.join(PLAIN + CONVERTED)} are read")
    return documents, dropped


def _plain(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert or remove it") from error


def _convert(path: Path) -> str:
    try:
        from markitdown import MarkItDown
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} takes the `documents` extra to read: pip install 'still-kv[documents]', or move the file away"
        ) from error
    try:
        return MarkItDown().convert(str(path)).text_content
    except Exception as error:  # markitdown's converters raise whatever their parsers raise
        raise ValueError(f"{path} cannot be converted to text: {error}") from error


def is_held_out(document: Document, share: float, seed: int) -> bool:
    """Whether a document's contexts are kept for validation; depends on its name and the seed alone."""
    digest = hashlib.sha256(f"{seed}:{document.name}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < share


def cut(
    documents: Iterable[Document], length: int, renderer: Renderer, split: str, dropped: Counter
) -> Iterator[Context]:
    """Contexts of at most `length` tokens, cut between sentences; short documents share one.

    A document whose rest is under half of `length` is continued with the next one. What is left at the end counts
    as `short_context` in `dropped` when it is under a quarter.
    """
    parts: list[tuple[str, list[str]]] = []

    def made() -> tuple[tuple[str, str], ...]:
        return tuple((name, " ".join(pieces)) for name, pieces in parts)

    def size() -> int:
        return len(renderer.context(list(made())))

    tokens = 0  # an estimate that never is too low by much; `size` has the last word
    for document in documents:
        parts.append((document.name, []))
        for sentence, cost in _sentences(document.text, length // 4, renderer):
            if any(pieces for _, pieces in parts) and tokens + cost > length:
                yield from _emit(made, size, parts, length, split)
                parts[:] = [(document.name, [])]
                tokens = 0
            if not parts[-1][1]:
                tokens = len(renderer.context([*made()[:-1], (document.name, sentence)]))
            else:
                tokens += cost
            parts[-1][1].append(sentence)
        if tokens >= length // 2:
            yield from _emit(made, size, parts, length, split)
            parts, tokens = [], 0
    if parts and tokens >= length // 4:
        yield from _emit(made, size, parts, length, split)
    elif parts:
        dropped["short_context"] += 1


def _emit(made, size, parts, length, split) -> Iterator[Context]:
    """The context of `parts`, without the last sentences while it is too long."""
    parts[:] = [part for part in parts if part[1]]
    while parts and (tokens := size()) > length:
        parts[-1][1].pop()
        parts[:] = [part for part in parts if part[1]]
    if parts:
        yield Context(made(), tokens, length, split)


def _sentences(text: str, longest: int, renderer: Renderer) -> Iterator[tuple[str, int]]:
    """Sentences with their tokens; one of more than `longest` tokens is cut between words."""
    for sentence in filter(None, (piece.strip() for piece in _SENTENCE_END.split(text))):
        cost = renderer.count(" " + sentence)
        if cost <= longest:
            yield sentence, cost
            continue
        words = sentence.split()
        step = max(1, len(words) * longest // cost)
        for start in range(0, len(words), step):
            piece = " ".join(words[start : start + step])
            yield piece, renderer.count(" " + piece)
