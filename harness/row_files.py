"""Training rows on disk: a data set with documented columns, a plain file of rows, or messages for other trainers.

`datasets` is imported only to save, load and push a data set. The plain file needs nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .runs import write_atomically
from .windows import WindowRow

COLUMNS = tuple(each.name for each in fields(WindowRow))
SPAN = {"start": "int32", "end": "int32", "kind": "string", "turn": "int32", "version": "int32", "untrained": "string"}
STEP = {"keep": "string", "start": "int32", "end": "int32", "slots": "int32", "first": "int32", "last": "int32"}
LISTS = {"input_ids": "int32", "labels": "int32", "token_kind": "int8", "logprobs": "float32", "prefix_ids": "int32"}
NUMBERS = {
    "round": "int32", "attempt": "int32", "window": "int32", "n_windows": "int32", "is_last": "bool",
    "temperature": "float32", "score": "float32", "all_pass": "float32", "corrections": "int32", "weight": "float32",
}  # fmt: skip


def write_rows(path: str | Path, rows: Iterable[WindowRow]) -> Path:
    """Write rows as JSON lines, atomically; NaN is null."""
    path = Path(path)
    lines = (json.dumps(_plain(row), ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    write_atomically(path, "".join(lines).encode())
    return path


def read_rows(path: str | Path) -> list[WindowRow]:
    """Rows from JSON lines, or from a folder of a saved data set.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it holds no rows of this kind.
    """
    path = Path(path)
    if path.is_dir():
        return load_dataset(path)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, TypeError, KeyError) as problem:
            raise ValueError(f"line {number} of {path} is no training row ({problem}); build the file again") from None
    return rows


def to_dataset(rows: Sequence[WindowRow]):
    """The rows as a `datasets.Dataset` whose features are the columns of `WindowRow`.

    Raises:
        ModuleNotFoundError: `datasets` is not installed.
    """
    datasets = _datasets()
    value = datasets.Value
    features = {}
    for name in COLUMNS:
        if name in LISTS:
            features[name] = datasets.List(value(LISTS[name]))
        elif name in ("spans", "prefix_plan"):
            step = SPAN if name == "spans" else STEP
            features[name] = datasets.List({key: value(kind) for key, kind in step.items()})
        else:
            features[name] = value(NUMBERS.get(name, "string"))
    columns = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def from_dataset(dataset: Iterable[dict[str, Any]]) -> list[WindowRow]:
    """Rows of a data set, further columns left out.

    Raises:
        ValueError: a column is missing.
    """
    return [_row(each) for each in dataset]


def save_dataset(rows: Sequence[WindowRow], folder: str | Path) -> None:
    """Save the rows as a data set in a folder."""
    to_dataset(rows).save_to_disk(str(folder))


def load_dataset(where: str | Path, split: str = "train") -> list[WindowRow]:
    """Rows from a folder of `save_dataset`, or from the Hub."""
    datasets = _datasets()
    if Path(where).is_dir():
        return from_dataset(datasets.load_from_disk(str(where)))
    return from_dataset(datasets.load_dataset(str(where), split=split))


def push(rows: Sequence[WindowRow], name: str, private: bool = True, **options: Any) -> None:
    """Push the rows to the Hub as a data set, private unless told otherwise."""
    to_dataset(rows).push_to_hub(name, private=private, **options)


def messages(rows: Iterable[WindowRow], tokenizer: Any = None) -> Iterator[dict[str, Any]]:
    """Plain conversations for other trainers: {messages, tools, task_id, ...}, one a window.

    The loss belongs on `train` messages alone: assistant's turns that this window trains. Rows behind slots cannot be
    given so, since their past is in no message.

    Args:
        rows: of a text backend.
        tokenizer: checks that its template renders the messages to the very tokens of the row.

    Raises:
        ValueError: a row is behind slots, was built without its text, or would be rendered otherwise, as by a template
            that drops earlier thinking.
    """
    for row in rows:
        where = f"window {row.window} of {row.trajectory_id}"
        if row.prefix_plan:
            raise ValueError(f"{where} goes on behind slots, which no message can say: export rows of a text backend")
        if not row.messages:
            raise ValueError(f"{where} has no messages: build it with rows_of_run, from the run's folder")
        said, spans = json.loads(row.messages), iter(row.spans)
        if tokenizer is not None and not _renders(row, said, tokenizer):
            raise ValueError(
                f"{where}: the chat template renders these messages to other tokens than were sampled (it may drop "
                f"earlier thinking, or write calls otherwise): train on input_ids and labels instead"
            )
        for message in said:
            if message["role"] == "assistant":
                message["train"] = not next(spans)["untrained"]
        kept = {name: getattr(row, name) for name in ("task_id", "trajectory_id", "round", "window", "n_windows")}
        yield {"messages": said, "tools": json.loads(row.tools), **kept, "weight": row.weight}


def _renders(row: WindowRow, said: list[dict[str, Any]], tokenizer: Any) -> bool:
    from .policies.chat import ChatFormat

    tools = json.loads(row.tools)
    chat, plain = ChatFormat(tokenizer, tools), []
    for message in said:
        calls = [
            {**call, "function": {**call["function"], "arguments": _object(call["function"]["arguments"])}}
            for call in message.get("tool_calls", [])
        ]
        content = message["content"] if message["role"] == "assistant" else chat.neutral(message["content"])
        plain.append({**message, "content": content, **({"tool_calls": calls} if calls else {})})
    text = tokenizer.apply_chat_template(plain, tools=tools or None, tokenize=False, enable_thinking=False)
    return chat.encode(text)[: len(row.input_ids)] == row.input_ids


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _plain(row: WindowRow) -> dict[str, Any]:
    plain = asdict(row)
    plain["logprobs"] = [None if math.isnan(x) else x for x in row.logprobs]
    for name in ("score", "all_pass"):
        plain[name] = None if math.isnan(plain[name]) else plain[name]
    return plain


def _row(plain: dict[str, Any]) -> WindowRow:
    missing = [name for name in COLUMNS if name not in plain]
    if missing:
        raise ValueError(f"there is no column {', '.join(missing)}: these are rows of another kind")
    known = {name: plain[name] for name in COLUMNS}
    known["logprobs"] = [math.nan if x is None else x for x in known["logprobs"]]
    for name in ("score", "all_pass"):
        known[name] = math.nan if known[name] is None else known[name]
    for name in ("spans", "prefix_plan"):
        known[name] = [dict(each) for each in known[name]]
    return WindowRow(**known)


def _datasets():
    try:
        import datasets
    except ModuleNotFoundError as problem:
        raise ModuleNotFoundError("data sets need datasets: pip install 'still-kv[train]'") from problem
    return datasets
