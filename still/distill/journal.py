"""Finished work on disk, one JSON object a line, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file of records by id. A line that a kill cut short is forgotten.

    Args:
        path: the file; made with its folder when the first record is added.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.records: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            return
        whole = self.path.read_bytes()
        kept = whole.rfind(b"\n") + 1
        if kept < len(whole):
            os.truncate(self.path, kept)
        for number, line in enumerate(whole[:kept].splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[record["id"]] = record
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{number}: this line is damaged; remove it to do its work again"
                ) from error

    def __contains__(self, id_: str) -> bool:
        return id_ in self.records

    def __getitem__(self, id_: str) -> dict[str, Any]:
        return self.records[id_]

    def add(self, id_: str, **values: Any) -> None:
        """Write a record and wait until the disk has it."""
        record = {"id": id_, **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[id_] = record


def write_atomically(path: str | Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
