"""Rows of training data: what a row holds, how rows are read from disk, and how they become batches.

A row is one context with several questions. It is a JSON object on a line of a `.jsonl` file, or a row of a Hugging
Face `datasets` dataset, with these columns:

    id               string   names the row; unique in its dataset
    context          what is read and then compacted: a string, or a list of documents {name, text}, or a list of
                     messages {role, content}
    context_ids      list of int: the same as token ids, special tokens included; wins over `context`
    turns            list of objects: what is asked of this one context, in any order
      question       string, asked as a user message
      answer         string: what the base model answers with the full context; only answers are supervised
      kind           string, optional: `fact`, `string` (exact words of the text) or `edit` (an edited sentence)
    source           string, optional: where the context came from
    split            string, optional: `validation` (also `test`, `held_out`) rows are scored, never trained on

Further columns are kept in the file and ignored here. Texts and documents are shown to the model as `still ask` shows
them; after messages or ids every question is a user message of its own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..calibration import as_asked
from .objective import IGNORE
from .rendering import Renderer

HELD_OUT = ("validation", "valid", "val", "test", "held_out")
"""What `split` may say of a row that is never trained on."""


class RowError(ValueError):
    """A row that is not in the format: the message names file, line and field."""


@dataclass(frozen=True)
class Row:
    """A row as token ids, ready to be put into batches.

    Attributes:
        context_ids: the context, special tokens included.
        turns: question ids, as they are after an answer, and answer ids of every turn; an answer includes what ends it.
        opening: ids of the turns' questions when they come first after the context; empty where they are the same.
        kinds: the turns' kinds, `""` where the row names none.
        raw_ids: what is read after the compaction and before the first question, and stays raw: with it a compactor
            learns slots behind which the model reads on as it should, as contexts in chunks need.
    """

    id: str
    context_ids: Sequence[int]
    turns: Sequence[tuple[Sequence[int], Sequence[int]]]
    opening: Sequence[Sequence[int]] = ()
    kinds: Sequence[str] = ()
    held_out: bool = False
    raw_ids: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the context."""
        return len(self.context_ids)


@dataclass(frozen=True)
class RawRow:
    """A row as it was read, with the place that errors name."""

    values: dict[str, Any] = field(repr=False)
    place: str


def read_rows(path: str | Path) -> Iterator[RawRow]:
    """Rows of a `.jsonl` file, of a folder of them, of a folder that `datasets` saved, or of a Hub dataset.

    Raises:
        FileNotFoundError: the path looks like a file or folder, and holds no rows.
        RowError: a line is not a JSON object.
        ModuleNotFoundError: the data need the `datasets` package and it is not installed.
    """
    where = Path(path)
    if where.is_file() and where.suffix in (".jsonl", ".json"):
        yield from _read_jsonl(where)
        return
    files = sorted(where.glob("*.jsonl")) if where.is_dir() else []
    if files:
        for file in files:
            yield from _read_jsonl(file)
        return
    if where.exists() and not where.is_dir():
        raise FileNotFoundError(f"{path} is no .jsonl file; `still train --help` describes the rows")
    yield from _read_dataset(path)


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    split = path.name.split("-")[0].removesuffix(".jsonl")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise RowError(f"{place}: this line is no JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(values, dict):
                raise RowError(f"{place}: a row must be a JSON object, this is a {type(values).__name__}")
            if split in HELD_OUT:
                values.setdefault("split", split)
            yield RawRow(values, place)


def _read_dataset(path: str | Path) -> Iterator[RawRow]:
    where = Path(path)
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} holds no .jsonl file, and to read it as a dataset takes the `datasets` package: "
            "pip install 'still-kv[train]'"
        ) from error
    saved = (where / "dataset_info.json").exists() or (where / "dataset_dict.json").exists()
    if where.is_dir() and not saved and not any(where.rglob("*.parquet")):
        raise FileNotFoundError(f"the folder {path} holds neither .jsonl files nor a saved dataset")
    try:
        loaded = datasets.load_from_disk(str(where)) if saved else datasets.load_dataset(str(path))
    except (OSError, ValueError) as problem:
        if where.exists():
            raise
        reason = str(problem).strip().splitlines()[0]
        raise FileNotFoundError(f"no data {path}: not a file or folder, and the Hub says: {reason}") from problem
    parts = loaded if isinstance(loaded, dict) else {"": loaded}
    for split, rows in parts.items():
        for number, values in enumerate(rows):
            values = {name: value for name, value in values.items() if value is not None}
            if split in HELD_OUT:
                values.setdefault("split", split)
            yield RawRow(values, f"{path}[{split or 'rows'}]:{number + 1}")


def encode(raw: RawRow, renderer: Renderer) -> Row:
    """Check a row and turn it into token ids.

    Raises:
        RowError: a field is missing, empty or of the wrong type; the message names file, line and field.
    """
    values, place = raw.values, raw.place
    turns = _checked(values, "turns", list, place)
    if not turns:
        raise RowError(f"{place}: turns is empty; a row needs one question or more")
    encoded, opening, kinds = [], [], []
    context = values.get("context")
    shown = "context_ids" not in values and (isinstance(context, str) or _are_documents(context))
    for index, turn in enumerate(turns):
        name = f"turns[{index}]"
        if not isinstance(turn, dict):
            raise RowError(f"{place}: {name} is a {type(turn).__name__}; it must be an object with question and answer")
        question = _text(turn, "question", place, f"{name}.")
        answer = _text(turn, "answer", place, f"{name}.")
        encoded.append((renderer.later(question), renderer.answer(question, answer)))
        if shown:
            opening.append(renderer.opening(question))
        kinds.append(str(turn.get("kind") or ""))
    return Row(
        str(values.get("id", place)),
        _context_ids(values, renderer, place),
        encoded,
        opening,
        kinds,
        str(values.get("split", "")).lower() in HELD_OUT,
    )


def _context_ids(values: dict, renderer: Renderer, place: str) -> list[int]:
    if "context_ids" in values:
        ids = _checked(values, "context_ids", list, place)
        if not ids or not all(isinstance(id_, int) and 0 <= id_ < len(renderer.tokenizer) for id_ in ids):
            raise RowError(
                f"{place}: context_ids must be a list of token ids from 0 to {len(renderer.tokenizer) - 1}, not empty"
            )
        return ids
    if isinstance(values.get("context"), list):
        for index, message in enumerate(values["context"]):
            if not isinstance(message, dict) or not ({"role", "content"} <= set(message) or "text" in message):
                raise RowError(
                    f"{place}: context[{index}] must be a document {{name, text}} or a message {{role, content}}"
                )
        if not values["context"]:
            raise RowError(f"{place}: context is an empty list")
        context = values["context"]
        if _are_documents(context):
            context = [(part.get("name") or "", part["text"]) for part in context]
    else:
        context = _text(values, "context", place)
    try:
        return renderer.context(context)
    except ValueError as error:
        raise RowError(f"{place}: context: {error}") from error


def _are_documents(context: Any) -> bool:
    return isinstance(context, list) and all(isinstance(part, dict) and "text" in part for part in context)


def _checked(values: dict, name: str, kind: type, place: str, within: str = "") -> Any:
    if values.get(name) is None:
        raise RowError(f"{place}: {within}{name} is missing")
    if not isinstance(values[name], kind):
        raise RowError(f"{place}: {within}{name} is a {type(values[name]).__name__}; it must be a {kind.__name__}")
    return values[name]


def _text(values: dict, name: str, place: str, within: str = "") -> str:
    text = _checked(values, name, str, place, within)
    if not text.strip():
        raise RowError(f"{place}: {within}{name} is empty")
    return text


def load_rows(path: str | Path, renderer: Renderer) -> list[Row]:
    """Every row of `path` as token ids, checked.

    Raises:
        RowError: a row is not in the format, two rows share an id, or there is none.
    """
    rows, seen = [], {}
    for raw in read_rows(path):
        row = encode(raw, renderer)
        if row.id in seen:
            raise RowError(f"{raw.place}: id {row.id!r} is also that of {seen[row.id]}; ids must be unique")
        seen[row.id] = raw.place
        rows.append(row)
    if not rows:
        raise RowError(f"{path} holds no row")
    return rows


def collate(rows: Sequence[Row], rng: random.Random, questions: int = 0, pad_id: int = 0) -> dict[str, torch.Tensor]:
    """One batch for `Distiller.forward`, without its `slots`.

    Args:
        rows: the contexts of the batch.
        rng: draws which questions are asked and in which order.
        questions: questions asked of each context; 0 asks all.
        pad_id: id that fills shorter rows; masks cover it.

    Returns:
        `context_ids` and `context_mask` `[batch, T]`, padded on the left; `turn_ids`, `turn_mask` and `labels`
        `[batch, L]`, padded on the right, labels on answers only.
    """
    turns = []
    for row in rows:
        order = rng.sample(range(len(row.turns)), min(questions or len(row.turns), len(row.turns)))
        ids, labels = [], []
        for question, answer in as_asked(row, order):
            ids += [*question, *answer]
            labels += [IGNORE] * len(question) + answer
        turns.append((ids, labels))
    width, length = max(row.tokens for row in rows), max(len(ids) for ids, _ in turns)
    shape, after = (len(rows), width), (len(rows), length)
    batch = {
        "context_ids": torch.full(shape, pad_id),
        "context_mask": torch.zeros(shape, dtype=torch.long),
        "turn_ids": torch.full(after, pad_id),
        "turn_mask": torch.zeros(after, dtype=torch.long),
        "labels": torch.full(after, IGNORE),
    }
    for index, (row, (ids, labels)) in enumerate(zip(rows, turns, strict=True)):
        batch["context_ids"][index, width - row.tokens :] = torch.as_tensor(row.context_ids)
        batch["context_mask"][index, width - row.tokens :] = 1
        batch["turn_ids"][index, : len(ids)] = torch.tensor(ids)
        batch["turn_mask"][index, : len(ids)] = 1
        batch["labels"][index, : len(labels)] = torch.tensor(labels)
    return batch


def split_rows(rows: Iterable[Row], held_out: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to score: as their `split` says, else a seeded share of them."""
    rows = list(rows)
    scored = [row for row in rows if row.held_out]
    if scored or held_out == 0:
        return [row for row in rows if not row.held_out], scored
    order = sorted(range(len(rows)), key=lambda index: random.Random(f"{seed}:{rows[index].id}").random())
    count = min(max(1, round(held_out * len(rows))), len(rows) - 1)
    chosen = set(order[:count])
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]
