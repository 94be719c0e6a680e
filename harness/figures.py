"""Figures of a sweep, as a paper would print them. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cells import CEILING, CHUNKED, CHUNKS, CONTROLS, FLOOR, OURS, QUANTISED, UNEVEN, write_file
from .rows import COMPUTED, Row

INK, FAINT, GRID = "#1f2328", "#6e7681", "#e6e8eb"
ACCENT = "#d1410c"


@dataclass(frozen=True)
class Style:
    """How one method is drawn: colour, marker, label."""

    colour: str
    marker: str
    label: str


# Hues of Okabe and Ito and of Tol's muted scheme; markers tell apart what a grey print cannot.
STYLES = {
    "still": Style(ACCENT, "o", OURS["still"]),
    "still-uneven": Style("#7a1fa2", "o", OURS["still-uneven"]),
    "still-placed": Style("#b08968", "o", "STILL, placed but untrained"),
    "still-untrained": Style("#8a8f98", "o", "STILL, untrained"),
    "still-wrong-matter": Style("#8a8f98", "x", "STILL, wrong matter"),
    "attention_matching": Style("#0072b2", "s", "Attention Matching"),
    "cartridge": Style("#332288", "D", "Cartridge"),
    "expected_attention": Style("#56b4e9", "P", "ExpectedAttention"),
    "snapkv": Style("#009e73", "^", "SnapKV"),
    "h2o": Style("#cc79a7", "v", "H2O"),
    "keydiff": Style("#e69f00", "X", "KeyDiff"),
    "knorm": Style("#882255", "<", "Knorm"),
    "streaming_llm": Style("#999933", ">", "StreamingLLM"),
    "truncation": Style("#117733", "d", "Truncation"),
    "random": Style("#b5a642", "*", "Random"),
    "int8": Style(INK, "h", "int8"),
    "int4": Style(INK, "p", "int4"),
}
OTHERS = ("#44aa99", "#ddcc77", "#aa4499", "#88ccee")

RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "svg.fonttype": "none",
    "figure.facecolor": "white",
}


def style_of(method: str) -> Style:
    """The style of a method; one that this table does not know gets a colour of its own by its name."""
    if method in STYLES:
        return STYLES[method]
    if method in CHUNKED:
        plain = style_of(method.removesuffix(CHUNKS))
        return Style(plain.colour, "$c$", f"{plain.label}, in chunks")
    if (plain := method.removesuffix(UNEVEN)) in STYLES:
        return Style(STYLES[plain].colour, "$u$", f"{STYLES[plain].label}, uneven heads")
    return Style(OTHERS[sum(method.encode()) % len(OTHERS)], "8", method)


def draw(rows: Sequence[Row], parts: Sequence[Row], task: str, note: str = "") -> dict[str, Any]:
    """The figures of one task by name: `pass_rate`, `likelihood` and, where questions carry tags, `facts`.

    There is none as long as no method with a ratio was computed.

    Args:
        rows: of `make_rows`, committed ones among them.
        parts: of `breakdown`.
        task: whose rows to draw.
        note: conditions, printed under every figure.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as problem:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'still-kv[plot]'") from problem
    rows = [row for row in rows if row["task"] == task]
    parts = [row for row in parts if row["task"] == task and row["method"] == "still"]
    if not _series(rows):
        return {}
    with matplotlib.rc_context(RC):
        figures = {"pass_rate": _pass_rate(rows, note), "likelihood": _likelihood(rows, note)}
        if parts:
            figures["facts"] = _facts(parts, rows, note)
    return figures


def save(figure, stem: str | Path) -> list[Path]:
    """Write a figure as PNG and SVG; returns the paths."""
    import matplotlib

    stem = Path(stem)
    paths = [stem.with_name(stem.name + ending) for ending in (".png", ".svg")]
    image = io.BytesIO()
    with matplotlib.rc_context(RC):
        figure.savefig(image, format="png", dpi=200)
    figure.set_layout_engine("none")  # it is laid out: finding out again takes as long as drawing
    write_file(paths[0], image.getvalue())
    write_file(paths[1], svg(figure, stem.name).encode())
    return paths


def svg(figure, name: str) -> str:
    """The figure as an SVG element: the same rows give the same text, and two names no id in common."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])


def _figure(width: float, height: float, panels: int, **options):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    return figure, figure.subplots(1, panels, squeeze=False, **options)[0]


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows with a ratio by method, controls first and STILL last, so that it is drawn on top."""
    series: dict[str, list[Row]] = {}
    for row in rows:
        if row["ratio"] is not None and row["method"] not in (FLOOR, CEILING, *QUANTISED):
            series.setdefault(row["method"], []).append(row)
    order = sorted(series, key=lambda name: (name == "still", name not in CONTROLS))
    return {name: sorted(series[name], key=lambda row: row["ratio"]) for name in order}


def _plot(axis, name: str, rows: list[Row], x: str, y: str, dodge: float = 1.0, scale: float = 1.0) -> None:
    points = [row for row in rows if row[y] is not None]
    if not points:
        return
    style, ours, control = style_of(name), name == "still", name in CONTROLS
    committed = any(row["source"] != COMPUTED for row in points)
    label = style.label + (" (committed rows)" if committed else "")
    xs, ys = [row[x] * dodge for row in points], [row[y] * scale for row in points]
    if y == "pass_rate":
        low, high = [row["pass_low"] * scale for row in points], [row["pass_high"] * scale for row in points]
        if ours:
            axis.fill_between(xs, low, high, color=style.colour, alpha=0.15, linewidth=0, zorder=4)
        else:
            axis.vlines(xs, low, high, color=style.colour, alpha=0.45, linewidth=0.9, zorder=2)
    axis.plot(
        xs, ys, label=label, color=style.colour, marker=style.marker, zorder=5 if ours else 3,
        linewidth=2.6 if ours else 1.1, markersize=7 if ours else 4.8,
        markeredgecolor=style.colour if style.marker[0] in "x$" else "white",  # letters are thin
        markeredgewidth=1.1 if ours or control else 0.6,
        linestyle=":" if control else "--" if committed else "-", alpha=1.0 if ours else 0.9,
    )  # fmt: skip


def _ends(axis, rows: Sequence[Row]) -> None:
    """Ceiling and floor as lines, the ceiling's name above it and the floor's below."""
    for name, text, side in ((CEILING, "full cache", 1), (FLOOR, "no context", -1)):
        row = next((row for row in rows if row["method"] == name), None)
        if row is None or row["pass_rate"] is None:
            continue
        value = 100 * row["pass_rate"]
        _level(axis, value, f"{text} {value:.1f}", side)


def _level(axis, value: float, text: str, side: int) -> None:
    axis.axhline(value, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axis.annotate(
        text, (1.0, value), xycoords=("axes fraction", "data"), xytext=(-2, 3 * side), textcoords="offset points",
        ha="right", va="bottom" if side > 0 else "top", fontsize=8, color=FAINT,
    )  # fmt: skip


def _ratio_axis(axis, rows: Sequence[Row]) -> None:
    ratios = sorted({row["ratio"] for row in rows if row["ratio"] is not None})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ratios, [f"{ratio:g}x" for ratio in ratios], minor=False)
    axis.xaxis.set_minor_locator(_no_ticks())
    if ratios:
        axis.set_xlim(ratios[0] / 1.18, ratios[-1] * 1.18)
    axis.set_xlabel("compression ratio (context tokens per slot)")


def _no_ticks():
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _bytes_axis(axis, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator

    axis.set_xscale("log", base=2)
    powers = LogLocator(base=2, subs=(1.0,), numticks=12)
    low, high = axis.get_xlim()
    few = sum(low <= tick <= high for tick in powers.tick_values(low, high)) < 2
    axis.xaxis.set_major_locator(FixedLocator(sorted({*axis.dataLim.intervalx})) if few else powers)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value).replace("iB", "").replace(" ", "")))
    axis.xaxis.set_minor_locator(_no_ticks())
    axis.set_xlabel("measured bytes of the cache (log scale)")
    axis.invert_xaxis()


def size(nbytes: float) -> str:
    """Bytes for people: `512 B`, `33 KiB`, `4.1 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.3g} {unit}" if nbytes < 10 else f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    raise AssertionError


def _pass_rate(rows: Sequence[Row], note: str):
    figure, (left, right) = _figure(9.6, 4.1, 2, sharey=True)
    series = _series(rows)
    spread = 0.011
    for place, (name, points) in enumerate(series.items()):
        dodge = 1.0 if name == "still" else 1 + spread * (place - (len(series) - 2) / 2)
        _plot(left, name, points, "ratio", "pass_rate", dodge, 100)
        _plot(right, name, points, "nbytes", "pass_rate", 1.0, 100)
    for row in rows:
        if row["method"] in (*QUANTISED, CEILING) and row["pass_rate"] is not None:
            style = style_of(row["method"]) if row["method"] in QUANTISED else Style(INK, "o", "full")
            right.errorbar(
                [row["nbytes"]], [100 * row["pass_rate"]],
                yerr=[[100 * (row["pass_rate"] - row["pass_low"])], [100 * (row["pass_high"] - row["pass_rate"])]],
                color=style.colour, marker=style.marker, markersize=6.5, elinewidth=0.9, zorder=6, linestyle="none",
            )  # fmt: skip
            right.annotate(
                style.label, (row["nbytes"], 100 * row["pass_rate"]), xytext=(0, -9), textcoords="offset points",
                ha="center", va="top", fontsize=8, color=style.colour, zorder=7, path_effects=_halo(),
            )  # fmt: skip
    for axis in (left, right):
        _ends(axis, rows)
        axis.set_ylim(-8, 106)
        axis.set_yticks(range(0, 101, 20))
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    _ratio_axis(left, rows)
    _bytes_axis(right, rows)
    left.set_ylabel("criterion pass rate (%)")
    left.set_title("at equal slots")
    right.set_title("at equal bytes")
    _legend(figure, left, series)
    _note(figure, note)
    return figure


def _halo() -> list:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground="white")]


def _legend(figure, axis, series: dict[str, list[Row]]) -> None:
    """One legend beside the panels, best method first, STILL in its colour."""
    handles, labels = axis.get_legend_handles_labels()
    rank = {}
    for name, points in series.items():
        rates = [row["pass_rate"] for row in points if row["pass_rate"] is not None]
        rank[style_of(name).label] = (name in CONTROLS, name != "still", -sum(rates) / max(1, len(rates)))
    order = sorted(range(len(labels)), key=lambda i: rank[labels[i].removesuffix(" (committed rows)")])
    legend = figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside right center", frameon=False,
        fontsize=8.5, labelspacing=0.62, handlelength=2.0,
    )  # fmt: skip
    for text in legend.get_texts():
        if text.get_text() == "STILL":
            text.set_color(ACCENT)
            text.set_fontweight("bold")


def _likelihood(rows: Sequence[Row], note: str):
    figure, (left, right) = _figure(9.6, 3.6, 2)
    series = _series(rows)
    for name, points in series.items():
        _plot(left, name, points, "ratio", "kl")
        _plot(right, name, [row for row in points if row["utilisation"] is not None], "ratio", "utilisation", 1.0, 100)
    for axis in (left, right):
        _ratio_axis(axis, rows)
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    values = [row["utilisation"] for points in series.values() for row in points if row["utilisation"] is not None]
    left.set_ylim(bottom=0)
    left.set_ylabel("nats per answer token")
    left.set_title("KL(full || compact)")
    right.set_ylim(max(-60, min([0, *(100 * v for v in values)]) - 8), 106)
    right.set_ylabel("% of the way from no context to full cache")
    right.set_title("cross-entropy utilisation")
    _level(right, 100, "full cache", 1)
    _level(right, 0, "no context", -1)
    _legend(figure, left, series)
    _note(figure, note)
    return figure


SHADES = ("#d1410c", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933", "#332288")
MARKERS = "os^DvPX<>"
PANELS = {
    "amended": "amended facts",
    "never amended": "amended facts",
    "kind": "exact strings",
    "depth": "depth in the context",
}


def _facts(parts: Sequence[Row], rows: Sequence[Row], note: str):
    """STILL by kind of fact: what an average hides."""
    panels: dict[str, list[str]] = {}
    for row in parts:
        head = row["facts"].split(":")[0]
        names = panels.setdefault(PANELS.get(head, head), [])
        if row["facts"] not in names:
            names.append(row["facts"])
    figure, axes = _figure(3.3 * len(panels) + 0.3, 3.5, len(panels), sharey=True)
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for place, name in enumerate(names):
            points = sorted((row for row in parts if row["facts"] == name), key=lambda row: row["ratio"])
            colour = SHADES[place % len(SHADES)]
            xs, ys = [row["ratio"] for row in points], [100 * row["pass_rate"] for row in points]
            low, high = [100 * row["pass_low"] for row in points], [100 * row["pass_high"] for row in points]
            axis.fill_between(xs, low, high, color=colour, alpha=0.10, linewidth=0)
            axis.plot(xs, ys, color=colour, marker=MARKERS[place % len(MARKERS)], markersize=5, linewidth=1.5,
                      markeredgecolor="white", markeredgewidth=0.6, label=name.split(": ")[-1])  # fmt: skip
        _ratio_axis(axis, parts)
        axis.set_title(title)
        axis.set_ylim(-3, 106)
        axis.set_yticks(range(0, 101, 20))
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.legend(frameon=False, fontsize=8, loc="lower left", handlelength=1.6)
    axes[0].set_ylabel("STILL: criterion pass rate (%)")
    _note(figure, note)
    return figure


def _note(figure, note: str) -> None:
    if note:
        figure.supxlabel(note, fontsize=7.5, color=FAINT, x=0.008, ha="left")
