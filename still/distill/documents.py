"""A folder of documents to text, and text to contexts of a given length."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
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


def held_out_names(documents: Sequence[Document], share: float, seed: int) -> set[str]:
    """Names of the documents that are kept for validation: about a share of them, and at least one of several.

    Which ones depends on each name and the seed, so that documents added later leave the others where they were, unless
    so few draw below the share that the lowest draw decides.
    """

    def draw(document: Document) -> float:
        digest = hashlib.sha256(f"{seed}:{document.name}".encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64

    if share == 0 or len(documents) < 2:
        return set()
    return {doc.name for doc in documents if draw(doc) < share} or {min(documents, key=draw).name}


def cut(
    documents: Iterable[Document], length: int, renderer: Renderer, split: str, dropped: Counter
) -> Iterator[Context]:
    """Contexts of at most `length` tokens, cut between sentences; short documents share one.

    A document whose rest is under half of `length` is continued with the next one. What is left at the end counts
    as `short_context` in `dropped` when it is under a quarter.
    """
    pieces: list[tuple[str, str, int]] = []  # name, sentence, tokens
    frame: dict[tuple[str, ...], int] = {}

    def parts(chosen: list[tuple[str, str, int]]) -> tuple[tuple[str, str], ...]:
        return tuple(
            (name, " ".join(part[1] for part in group)) for name, group in groupby(chosen, lambda part: part[0])
        )

    def tokens(chosen: list[tuple[str, str, int]]) -> int:
        """About as many tokens as the context of these pieces has; making the context counts them exactly."""
        names = tuple(dict.fromkeys(piece[0] for piece in chosen))
        if names not in frame:
            frame[names] = len(renderer.context([(name, "A") for name in names]))
        return frame[names] + sum(piece[2] for piece in chosen)

    def emit(chosen: list[tuple[str, str, int]]) -> Iterator[Context]:
        """The context of these pieces; returns those at the end that do not fit."""
        rest: list[tuple[str, str, int]] = []
        while chosen and (size := len(renderer.context(list(parts(chosen))))) > length:
            rest.insert(0, chosen[-1])
            chosen = chosen[:-1]
        if not chosen:
            raise ValueError(f"a context of {length} tokens has no room for a piece of {rest[0][0]}; make it longer")
        yield Context(parts(chosen), size, length, split)
        return rest

    for document in documents:
        for sentence, cost in _sentences(document.text, length // 4, renderer):
            piece = (document.name, sentence, cost)
            if pieces and tokens([*pieces, piece]) > length:
                pieces = yield from emit(pieces)
            pieces.append(piece)
        if tokens(pieces) >= length // 2:
            pieces = yield from emit(pieces)
    if pieces and tokens(pieces) >= length // 4:
        pieces = yield from emit(pieces)
    if pieces:
        dropped["short_context"] += 1


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
