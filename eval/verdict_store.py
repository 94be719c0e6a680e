"""Verdicts by the content that they depend on, in SQLite: what was judged once is never asked again.

The key is a hash of the prompt's version, the judge and its parameters, the task's title, the converted text of every
file, the criterion, and how it was asked (criteria a call, the seed of their order). Only verdicts go in, each
committed as it arrives, so a run that is killed goes on where it was; an error never goes in. Several processes may
share a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .verdicts import Tokens

VERSION = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS verdicts (
    key BLOB PRIMARY KEY, label TEXT NOT NULL CHECK (label IN ('pass', 'fail')), reason TEXT NOT NULL,
    judge TEXT NOT NULL, details TEXT NOT NULL, created REAL NOT NULL
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Kept:
    """What is kept of a verdict: nothing of the deliverable but the judge's quotations."""

    label: str
    reason: str
    evidence: tuple[str, ...] = ()
    misquotes: tuple[str, ...] = ()
    judge: str = ""
    tokens: Tokens = field(default_factory=Tokens)


def verdict_key(*parts: str | int | None) -> bytes:
    """The hash of everything that a verdict depends on, in a fixed order."""
    return hashlib.sha256(repr((VERSION, *parts)).encode("utf-8", "surrogatepass")).digest()


def default_store() -> Path:
    """Where verdicts are kept when nothing else is said: `$XDG_CACHE_HOME/still/verdicts.sqlite`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "still" / "verdicts.sqlite"


class VerdictStore:
    """An open file of verdicts; a context manager.

    Args:
        path: made with its folder where it is not there, for the user's eyes only; ":memory:" keeps nothing.

    Raises:
        ValueError: the file is something else, or of a later version.
    """

    def __init__(self, path: str | Path = ":memory:"):
        self.path = str(path)
        if self.path != ":memory:":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with closing(os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))):
                pass
        self._base = sqlite3.connect(self.path, isolation_level=None, timeout=60, check_same_thread=False)
        try:
            version = self._base.execute("PRAGMA user_version").fetchone()[0]
            tables = {name for (name,) in self._base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if version not in (0, VERSION) or (tables and "verdicts" not in tables):
                raise ValueError(f"{path} holds no verdicts of version {VERSION}; name another file, or remove it")
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = NORMAL")  # a commit outlives the process, if not a power cut
            self._base.execute(_TABLE)
            self._base.execute(f"PRAGMA user_version = {VERSION}")
        except sqlite3.DatabaseError as problem:
            self._base.close()
            raise ValueError(f"{path} is no verdict cache ({problem}); name another file, or remove it") from problem

    def get(self, key: bytes) -> Kept | None:
        """The verdict under a key, or None."""
        statement = "SELECT label, reason, judge, details FROM verdicts WHERE key = ?"
        row = self._base.execute(statement, (key,)).fetchone()
        if row is None:
            return None
        label, reason, judge, details = row
        evidence, misquotes, tokens = json.loads(details)
        return Kept(label, reason, tuple(evidence), tuple(misquotes), judge, Tokens(*tokens))

    def put(self, verdicts: Iterable[tuple[bytes, Kept]]) -> None:
        """Keep verdicts, all of them or none; the first one under a key stays.

        Raises:
            ValueError: one is neither a pass nor a fail.
        """
        rows: list[Sequence[Any]] = []
        now = time.time()
        for key, kept in verdicts:
            if kept.label not in ("pass", "fail"):
                raise ValueError(f"a verdict {kept.label!r} is never cached; only pass and fail are")
            details = json.dumps([kept.evidence, kept.misquotes, kept.tokens.counts])
            rows.append((key, kept.label, kept.reason, kept.judge, details, now))
        statement = "INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?, ?)"
        if len(rows) == 1:
            self._base.execute(statement, rows[0])
        elif rows:
            with self._base:
                self._base.execute("BEGIN IMMEDIATE")
                self._base.executemany(statement, rows)

    def __len__(self) -> int:
        return self._base.execute("SELECT count(*) FROM verdicts").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def __enter__(self) -> VerdictStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
