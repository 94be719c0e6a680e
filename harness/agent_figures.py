"""Figures of an agent's sweep. matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .agent_cells import SLOTS, UNSIZED
from .agent_table import NAMES, Row, conditions, held, label
from .cells import CEILING, FLOOR, OURS
from .figures import FAINT, GRID, INK, RC, Style, _bytes_axis, _level, _note, style_of

LOOK = {
    "memo": Style("#0072b2", "s", NAMES["memo"]), "memo_oracle": Style("#332288", "*", NAMES["memo_oracle"]),
    "memo_kv": Style("#56b4e9", "P", NAMES["memo_kv"]), "trim": Style("#999933", ">", NAMES["trim"]),
}  # fmt: skip
HYBRID = dict(zip(OURS, ("#882255", "#cc6677"), strict=True))
"""Colours of memo and STILL."""
DODGE = 0.025
"""By which share of their bytes neighbouring conditions stand apart, so that equal ones do not cover each other."""
WITHOUT_TEXT = ("kv", "memo_kv")
"""Backends of which keys and values alone cross."""
LEVELS = {CEILING: 1, FLOOR: -1, "plain": 1}


def look(row: Row) -> Style:
    """How a condition is drawn: one colour for a backend or method, the same in every figure."""
    if row["backend"] in LOOK:
        return LOOK[row["backend"]]
    found = style_of(row["method"])
    if row["backend"] == "hybrid":
        return Style(HYBRID.get(row["method"], found.colour), "D", label(row))
    return Style(found.colour, found.marker, label(row))


def draw_agent(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures by name: `pass_rate` and, where boundaries were crossed, `cost`, and probed, `ledger`.

    Args:
        rows: of `agent_rows`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as problem:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'still-kv[plot]'") from problem
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["task"], []).append(row)
    with matplotlib.rc_context(RC):
        figures = {
            "pass_rate": _grid(groups, [
                ("pass_rate", 100, "criterion pass rate (%)", ("pass_low", "pass_high")),
                ("all_pass", 100, "all-pass rate (%)", ("all_pass_low", "all_pass_high")),
            ]),
        }  # fmt: skip
        if any(row["held_bytes"] for row in rows):
            figures["cost"] = _grid(groups, [
                ("boundary_seconds", 1, "seconds a boundary", None),
                ("boundary_decoded_tokens", 1, "tokens decoded a boundary", None),
            ])  # fmt: skip
        if any(row["acquired_answered"] or row["acquired_written"] for row in rows):
            figures["ledger"] = _ledger(groups)
    return figures


def _figure(columns: int, lines: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5 * columns + 2.2, 2.9 * lines + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    return figure, figure.subplots(lines, columns, squeeze=False, sharey="row")


def _grid(groups: dict[str, list[Row]], measures: Sequence[tuple]):
    """One column a group of matters, one line a measure, bytes held along the bottom, more to the left."""
    figure, axes = _figure(len(groups), len(measures))
    handles: dict[str, Any] = {}
    for column, (task, rows) in enumerate(groups.items()):
        for line, (name, scale, words, ends) in enumerate(measures):
            axis = axes[line][column]
            sized = list(dict.fromkeys(row["condition"] for row in rows if row["budget"]))
            for place, condition in enumerate(sized):
                points = [r for r in rows if r["condition"] == condition and r[name] is not None and r["held_bytes"]]
                if points:
                    _line(axis, points, name, scale, ends, handles, 1 + DODGE * (place - (len(sized) - 1) / 2))
            if axis.lines:
                _bytes_axis(axis, rows)
            else:
                axis.set_xticks([])
                axis.text(0.5, 0.5, "no run crossed a boundary", transform=axis.transAxes, ha="center", color=FAINT)
            axis.set_xlabel("bytes held (log scale)" if line == len(measures) - 1 else "")
            axis.grid(axis="y", color=GRID, linewidth=0.8)
            axis.set_axisbelow(True)
            if scale == 100:
                axis.set_ylim(-8, 108)
                for row in rows:
                    if row["backend"] in UNSIZED and row[name] is not None:
                        value = 100 * row[name]
                        _level(axis, value, f"{label(row)} {value:.1f}", LEVELS[row["backend"]])
            else:
                axis.set_ylim(bottom=0)
            if column == 0:
                axis.set_ylabel(words)
            if line == 0:
                axis.set_title(task)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8.5)
    _note(figure, _conditions(groups))
    return figure


def _line(
    axis, points: list[Row], name: str, scale: float, ends: tuple[str, str] | None, handles: dict, dodge: float
) -> None:
    points = sorted(points, key=lambda p: (p["held_bytes"], len(p["budget"]), p["budget"]))
    style = look(points[0])
    xs, ys = [p["held_bytes"] * dodge for p in points], [scale * p[name] for p in points]
    if ends:
        axis.vlines(xs, [scale * p[ends[0]] for p in points], [scale * p[ends[1]] for p in points],
                    color=style.colour, alpha=0.35, linewidth=0.9)  # fmt: skip
    (handle,) = axis.plot(xs, ys, **_stroke(points[0], style))
    handles.setdefault(style.label, handle)


def _stroke(row: Row, style: Style) -> dict[str, Any]:
    """How a condition's line is drawn: thick for STILL, hollow and dashed where it recompacts, dotted for a bound."""
    again, bound = row["mode"] == "recompact", row["backend"] == "memo_oracle"
    return {
        "color": style.colour, "marker": style.marker, "markersize": 9 if bound else 5.5,
        "markeredgecolor": style.colour if again else "white", "markeredgewidth": 1.2 if again else 0.6,
        "markerfacecolor": "white" if again else style.colour,
        "linewidth": 2.2 if row["backend"] in SLOTS and row["method"] in OURS and not again else 1.3,
        "linestyle": ":" if bound else (0, (4, 2)) if again else "-",
    }  # fmt: skip


def _ledger(groups: dict[str, list[Row]]):
    """Criteria held behind each boundary at the largest budget: what the model answers, what the text says."""
    kinds = {"answered": "the model answers", "written": "the text says"}
    figure, axes = _figure(len(groups), len(kinds))
    handles: dict[str, Any] = {}
    for column, (task, rows) in enumerate(groups.items()):
        largest = {row["condition"]: row for row in rows}  # rows come by rising budget
        for line, (kind, words) in enumerate(kinds.items()):
            axis = axes[line][column]
            for row in largest.values():
                values = held(row, kind)
                if values and row["backend"] != FLOOR and (kind == "answered" or row["backend"] not in WITHOUT_TEXT):
                    style = look(row)
                    (drawn,) = axis.plot(range(1, len(values) + 1), values, **_stroke(row, style))
                    handles.setdefault(style.label, drawn)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_ylim(bottom=0)
            axis.grid(axis="y", color=GRID, linewidth=0.8)
            axis.spines["bottom"].set_color(INK)
            if line == 0:
                axis.set_title(task)
            if column == 0:
                axis.set_ylabel(f"criteria that\n{words}")
        axes[-1][column].set_xlabel("boundary")
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8.5)
    _note(figure, _conditions(groups))
    return figure


def _conditions(groups: dict[str, list[Row]]) -> str:
    rows = [row for found in groups.values() for row in found]
    return conditions(rows).replace(f", {rows[0]['task']}", "", 1)
