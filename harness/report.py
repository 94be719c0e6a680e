"""The report of a sweep, from its cells alone: rows, a table for the terminal, figures and one HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from .cells import CEILING, CONTROLS, FLOOR, QUANTISED, CellStore, write_file, write_json
from .figures import draw, save, size, style_of
from .page import html_page
from .rows import COMPUTED, Row, breakdown, committed_rows, compare, make_rows

CELL = 13
"""Width of a column of the terminal's table: a rate of 100, its half-width and a space between columns."""


def write_report(folder: str | Path, committed: str | Path | None = None) -> str:
    """Write `rows.csv`, `rows.json`, `facts.csv`, `comparisons.csv`, `figures/` and `report.html` beside the cells.

    Args:
        folder: what `still sweep --output` named; a sweep that is still running is reported as far as it got.
        committed: folder of CSV rows from earlier runs, shown where a method was not computed, and marked. They are
            kept in the results folder, so that a later report has them too.

    Returns:
        The table for the terminal.

    Raises:
        FileNotFoundError: the folder holds no sweep.
        ValueError: it holds no finished cell, or a damaged one.
        ModuleNotFoundError: matplotlib is not installed; rows and table are on disk by then.
    """
    store = CellStore.open(folder)
    results = store.results()
    if not results:
        raise ValueError(f"{folder} holds no finished cell yet; let `still sweep` run first")
    rows, parts, pairs = make_rows(results, store.header), breakdown(results), compare(results)
    kept = store.folder / "committed.csv"
    if committed is not None and (earlier := committed_rows(committed, rows)):
        write_file(kept, to_csv(earlier).encode())
    if kept.exists():
        rows += committed_rows(store.folder, rows, only=kept.name)
    for name, table_rows in (("rows", rows), ("facts", parts), ("comparisons", pairs)):
        write_file(store.folder / f"{name}.csv", to_csv(table_rows).encode())
    write_json(store.folder / "rows.json", {"provenance": store.header["provenance"], "rows": rows})
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    shown = []
    for task in tasks:
        note = conditions(rows, task)
        for name, figure in draw(rows, parts, task, note).items():
            stem = store.folder / "figures" / (name if len(store.config.methods_of) == 1 else f"{name}-{_plain(task)}")
            shown.append((task, name, save(figure, stem)[1].read_text(encoding="utf-8")))
    write_file(store.folder / "report.html", html_page(store.header, rows, parts, pairs, shown).encode())
    return "\n\n".join(table(rows, task) for task in tasks)


def to_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV text; a missing value is an empty field."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def conditions(rows: Sequence[Row], task: str) -> str:
    """What was measured, in a line that stands under every figure."""
    row = next((row for row in rows if row["task"] == task and row["method"] == CEILING), None)
    if row is None:
        return ""
    difficulty = f", {row['difficulty']} difficulty {row['digest']}" if row["difficulty"] else ""
    return (
        f"{row['model'].split()[0]}, {task}{difficulty}: {row['sets']} contexts of {row['tokens']:,.0f} tokens, "
        f"{row['questions']:,} questions; 95 % intervals clustered by context"
    )


def table(rows: Sequence[Row], task: str) -> str:
    """The pass rates of one task for the terminal: methods down, ratios across, with half-widths."""
    rows = [row for row in rows if row["task"] == task]
    ratios = sorted({row["ratio"] for row in rows if row["ratio"] is not None})
    at = {(row["method"], row["ratio"]): row for row in rows}
    names = list(dict.fromkeys(row["method"] for row in rows))
    plain = [name for name in (CEILING, *QUANTISED, FLOOR) if (name, None) in at]
    swept = sorted(
        (name for name in names if name not in plain),
        key=lambda name: (name in CONTROLS, name != "still", -_mean([at.get((name, ratio)) for ratio in ratios])),
    )
    width = max(len(_label(at, name, ratios)) for name in names)
    lines = [conditions(rows, task), ""]
    lines.append(f"{'criterion pass rate, %':<{width}}  " + "".join(f"{f'{ratio:g}x':>{CELL}}" for ratio in ratios))
    for key, head in (("slots", "slots per KV head"), ("nbytes", "bytes")):
        values = [next((row[key] for row in rows if row["ratio"] == ratio), None) for ratio in ratios]
        shown = [("" if v is None else size(v) if key == "nbytes" else f"{v:,.0f}") for v in values]
        lines.append(f"{head:<{width}}  " + "".join(f"{text:>{CELL}}" for text in shown))
    rule = "-" * (width + 2 + CELL * len(ratios))
    lines.append(rule)
    for name in swept:
        cells = "".join(f"{_rate(at.get((name, ratio))):>{CELL}}" for ratio in ratios)
        lines.append(f"{_label(at, name, ratios):<{width}}  {cells}")
    lines.append(rule)
    for name in plain:
        row = at[name, None]
        nbytes = size(row["nbytes"]) if row["nbytes"] else ""
        lines.append(f"{_label(at, name, [None]):<{width}}  {_rate(row):>{CELL}}  {nbytes}")
    notes = ["+- is half of the 95 % interval."]
    if any(row["source"] != COMPUTED for row in rows):
        notes.append("* from committed rows, not computed here.")
    if any(row["query_aware"] for row in rows):
        notes.append("(q) query-aware.")
    warned = [row for row in rows if row.get("warnings")]
    notes += dict.fromkeys(f"{_label(at, row['method'], [row['ratio']])}: {row['warnings']}." for row in warned)
    return "\n".join([*lines, *notes])


def _mean(rows: Sequence[Row | None]) -> float:
    rates = [row["pass_rate"] for row in rows if row and row["pass_rate"] is not None]
    return sum(rates) / max(1, len(rates))


def _label(at: dict, name: str, ratios: Sequence[float | None]) -> str:
    found = [at[name, ratio] for ratio in (*ratios, None) if (name, ratio) in at]
    label = {CEILING: "full cache", FLOOR: "no context"}.get(name) or style_of(name).label
    mark = " *" if any(row["source"] != COMPUTED for row in found) else ""
    return label + mark + (" (q)" if any(row["query_aware"] for row in found) else "")


def _rate(row: Row | None) -> str:
    if row is None or row["pass_rate"] is None:
        return "-"
    return f"{100 * row['pass_rate']:.1f} +-{50 * (row['pass_high'] - row['pass_low']):4.1f}"


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(name).name)


