"""The sweep's report as one HTML page that needs nothing else: figures inline, no scripts, no fonts to fetch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from .cells import CEILING, CONTROLS, FLOOR
from .figures import size, style_of
from .rows import COMPUTED, Row

STYLE = """
:root { color-scheme: light; --ink: #1f2328; --faint: #6e7681; --line: #d8dee4; --soft: #f6f8fa; --accent: #d1410c; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: var(--ink); background: #fff;
  max-width: 1080px; margin: 2.5rem auto 5rem; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { max-width: 46rem; } .faint, caption, details summary { color: var(--faint); }
.lead { font-size: 1.05rem; } .scroll { overflow-x: auto; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin: .5rem 0 1rem; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .22rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; background: var(--soft); } th:first-child, td:first-child { text-align: left; }
tr.ours td { color: var(--accent); font-weight: 600; } tr.end td { background: var(--soft); }
tr.control td { color: var(--faint); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 0 2rem; }
pre { background: var(--soft); padding: .8rem 1rem; overflow-x: auto; font-size: 12px; }
"""

ABOUT = """\
Every row answers the same questions from a cache of the same context. <b>Ratio</b> is context tokens per slot;
at one ratio all methods keep exactly the same number of slots, and bytes are measured, not computed.
<b>Pass</b> is judged by exact value. <b>Stale</b> is the share of amended facts for which a superseded value was given.
<b>KL</b> is KL(full || compact) and <b>CE</b> the cross-entropy of the reference answer, both in nats per token;
<b>utilisation</b> is (none &minus; compact) / (none &minus; full). Intervals are 95&nbsp;%, clustered by context;
all-pass has Wilson's. Reference answers are those that the full cache gives rightly, in its own words."""


def html_page(
    header: dict, rows: Sequence[Row], parts: Sequence[Row], pairs: Sequence[Row], figures: Sequence[tuple]
) -> str:
    """The whole page.

    Args:
        header: the store's `sweep.json`.
        rows: of `make_rows`.
        parts: of `breakdown`.
        pairs: of `compare`.
        figures: `(task, name, svg)`.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    body = [f"<h1>Compaction sweep: {escape(header['inputs']['model'].split()[0])}</h1>"]
    body += [f'<p class="lead">{escape(line)}</p>' for line in summary(rows, pairs)]
    body.append(f'<p class="faint">{ABOUT}</p>')
    for task in tasks:
        body.append(f"<h2>{escape(task)}</h2>")
        here = {name: svg for at, name, svg in figures if at == task}
        body.append(_figure(here.get("pass_rate")))
        body.append(_rows(rows, task))
        body.append("<h3>Where STILL wins and where it loses</h3>")
        body.append(_wins_and_losses([row for row in pairs if row["task"] == task]))
        if "facts" in here:
            body.append("<h3>By kind of fact</h3>" + _figure(here["facts"]))
            body.append(_parts([row for row in parts if row["task"] == task]))
        if "likelihood" in here:
            body.append("<h3>Likelihoods</h3>" + _figure(here["likelihood"]))
    command = header["provenance"].get("command")
    body.append("<h2>Provenance</h2>")
    body.append(f"<pre>{escape(command)}</pre>" if command else "")
    known = {"inputs": header["inputs"], **header["provenance"]}
    body.append(f"<pre>{escape(json.dumps(known, indent=1, ensure_ascii=False))}</pre>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Compaction sweep</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(filter(None, body)) + "\n</body></html>\n"
    )


def summary(rows: Sequence[Row], pairs: Sequence[Row]) -> list[str]:
    """The result in sentences: STILL at 8x (or the ratio nearest to it) of the first task, and its nearest rival."""
    ours = [row for row in rows if row["method"] == "still" and row["task"] == rows[0]["task"]]
    if not ours:
        return []
    row = min(ours, key=lambda row: abs(row["ratio"] - 8))
    lines = [
        f"At {row['ratio']:g}x ({row['slots']:,.0f} slots, {size(row['nbytes'])} of {size(row['full_nbytes'])}) "
        f"STILL answers {_percent(row['pass_rate'])} of the questions ({_interval(row)})"
        + (f", {_percent(row['share_of_full'])} of what the full cache answers." if row["share_of_full"] else ".")
    ]
    rivals = [pair for pair in pairs if pair["task"] == row["task"] and pair["ratio"] == row["ratio"]]
    if rivals:
        best = min(rivals, key=lambda pair: pair["difference"])
        lines.append(
            f"The best other method there is {style_of(best['method']).label}: STILL minus it is "
            f"{100 * best['difference']:+.1f} points ({100 * best['low']:+.1f} to {100 * best['high']:+.1f})."
        )
    return lines


COLUMNS = (
    ("method", lambda r: _name(r)),
    ("ratio", lambda r: f"{r['ratio']:g}x" if r["ratio"] else ""),
    ("slots", lambda r: f"{r['slots']:,.0f}"),
    ("bytes", lambda r: size(r["nbytes"])),
    ("facts / slot", lambda r: _number(r["facts_per_slot"], 2)),
    ("pass", lambda r: f"{_percent(r['pass_rate'])} ({_interval(r)})"),
    ("of full", lambda r: _percent(r["share_of_full"])),
    ("all-pass", lambda r: _percent(r["all_pass"])),
    ("stale", lambda r: _percent(r["stale_rate"])),
    ("KL", lambda r: _number(r["kl"], 3)),
    ("CE", lambda r: _number(r["cross_entropy"], 3)),
    ("utilisation", lambda r: _percent(r["utilisation"])),
    ("compact s", lambda r: _number(r["compact_seconds"], 3)),
    ("read s", lambda r: _number(r["read_seconds"], 3)),
    ("synthesis", lambda r: "yes" if r["synthesis"] else "no"),
    ("query-aware", lambda r: "yes" if r["query_aware"] else "no"),
    ("contexts", lambda r: str(r["sets"])),
    ("questions", lambda r: f"{r['questions']:,}"),
    ("seeds", lambda r: r["seeds"]),
    ("source", lambda r: r["source"]),
    ("notes", lambda r: r.get("warnings") or ""),
)


def _rows(rows: Sequence[Row], task: str) -> str:
    rows = [row for row in rows if row["task"] == task]
    cells = [([show(row) for _, show in COLUMNS], _class(row)) for row in rows]
    return _table([name for name, _ in COLUMNS], cells, "Every row; rows not computed here name their source.")


def _wins_and_losses(pairs: Sequence[Row]) -> str:
    """Two tables side by side: differences whose interval lies above zero, and all the others."""
    if not pairs:
        return "<p>No other method was computed at STILL's ratios.</p>"

    def side(title: str, chosen: list[Row]) -> str:
        cells = [
            ([style_of(r["method"]).label, f"{r['ratio']:g}x", f"{100 * r['difference']:+.1f}",
              f"{100 * r['low']:+.1f} to {100 * r['high']:+.1f}", f"{r['only_ours']} / {r['only_theirs']}"], "")
            for r in chosen
        ]  # fmt: skip
        head = ["against", "STILL at", "points", "95 %", "only STILL / only other"]
        return "<div>" + _table(head, cells, f"{title}: {len(chosen)}") + "</div>"

    wins = [row for row in pairs if row["low"] > 0]
    losses = [row for row in pairs if row["high"] < 0]
    even = [row for row in pairs if row not in wins and row not in losses]
    return (
        '<p class="faint">STILL minus the other method on the same questions, at equal slots; the quantised caches are '
        "met by the largest STILL cache that takes no more bytes.</p>"
        f'<div class="pair">{side("STILL ahead", wins)}<div>{side("STILL behind", losses)}'
        f"{side('no difference shown', even)}</div></div>"
    )


def _parts(parts: Sequence[Row]) -> str:
    names = list(dict.fromkeys(row["facts"] for row in parts))
    keys = list(dict.fromkeys((row["method"], row["ratio"]) for row in parts))
    at = {(row["method"], row["ratio"], row["facts"]): row for row in parts}
    cells = []
    for method, ratio in keys:
        found = [at.get((method, ratio, name)) for name in names]
        label = [_name({"method": method, "source": COMPUTED}), f"{ratio:g}x" if ratio else ""]
        shown = [f"{_percent(r['pass_rate'])} ({_interval(r)})" if r else "" for r in found]
        cells.append((label + shown, _class({"method": method, "control": method in CONTROLS})))
    inner = _table(["method", "ratio", *names], cells, "Criterion pass rate by tag of the question.")
    return f"<details><summary>Every method by kind of fact</summary>{inner}</details>"


def _figure(svg: str | None) -> str:
    return f"<figure style='margin:0'>{svg}</figure>" if svg else ""


def _table(head: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], caption: str) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "\n".join(
        f'<tr class="{kind}">' + "".join(f"<td>{escape(text)}</td>" for text in cells) + "</tr>" for cells, kind in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def _name(row: Row) -> str:
    names = {CEILING: "full cache", FLOOR: "no context"}
    return names.get(row["method"], style_of(row["method"]).label) + ("" if row["source"] == COMPUTED else " *")


def _class(row: Row) -> str:
    if row["method"] in (CEILING, FLOOR):
        return "end"
    return "ours" if row["method"] == "still" else "control" if row["control"] else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _interval(row: Row) -> str:
    return "" if row["pass_rate"] is None else f"{100 * row['pass_low']:.1f} to {100 * row['pass_high']:.1f}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
