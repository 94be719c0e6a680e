"""The report of an agent's sweep, from its cells alone: rows, a table, figures and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .agent_cells import UNSIZED, AgentStore
from .agent_figures import draw_agent
from .agent_table import Row, agent_rows, agent_table, label, notes
from .cells import CEILING, FLOOR, OURS, write_file, write_json
from .figures import save, size
from .page import STYLE, _table
from .report import to_csv

ABOUT = """\
Every condition plays the same matters with the same model and the same rules; only what crosses a boundary differs.
<b>Held</b> is the peak of attended compacted context (slots or memo tokens), in measured bytes; the system prompt, the
assignment, the bookkeeping and the open window are apart. A boundary's <b>seconds</b> are those of its memo's turns and
of the backend's own work; what is read again counts in tokens. <b>Criterion pass</b> and <b>all-pass</b> are the exact
judge's. The <b>oracle memo</b> is written from the rubric: an upper bound for memos of that size, and no method.
<b>Acquired</b> and <b>lost</b> are means over runs, boundary by boundary: of criteria that the text says, and of
criteria that the model answers when it is asked right behind the boundary, which the agent never sees. <b>Read</b> is
characters read of those available. Intervals are 95&nbsp;%, clustered by matter; all-pass has Wilson's."""


def write_agent_report(folder: str | Path) -> str:
    """Write `rows.csv`, `rows.json`, `figures/` and `report.html` beside the cells; returns the terminal's table.

    Raises:
        FileNotFoundError: the folder holds no sweep.
        ValueError: it holds no finished cell, or a damaged one.
        ModuleNotFoundError: matplotlib is not installed; rows are on disk by then.
    """
    store = AgentStore.open(folder)
    results = store.results()
    if not results:
        raise ValueError(f"{folder} holds no finished cell yet; let `still sweep --agent` run first")
    rows = agent_rows(results, store.header)
    write_file(store.folder / "rows.csv", to_csv(rows).encode())
    write_json(store.folder / "rows.json", {"provenance": store.header["provenance"], "rows": rows})
    drawn = {
        name: save(figure, store.folder / "figures" / name)[1].read_text(encoding="utf-8")
        for name, figure in draw_agent(rows).items()
    }
    write_file(store.folder / "report.html", agent_page(store.header, rows, drawn).encode())
    return "\n\n".join(agent_table(rows, task) for task in dict.fromkeys(row["task"] for row in rows))


COLUMNS = (
    ("condition", label),
    ("budget", lambda r: r["budget"]),
    ("held", lambda r: size(r["held_bytes"]) if r["held_bytes"] else ""),
    ("criterion pass", lambda r: f"{_percent(r['pass_rate'])} ({_ends(r, 'pass')})"),
    ("of full", lambda r: _percent(r["share_of_full"])),
    ("all-pass", lambda r: f"{_percent(r['all_pass'])} ({_ends(r, 'all_pass')})"),
    ("opened", lambda r: f"{r['documents_opened']:,}/{r['documents_total']:,}"),
    ("read", lambda r: f"{r['characters_read']:,}/{r['characters_available']:,}"),
    ("boundaries", lambda r: _number(r["boundaries"])),
    ("s / boundary", lambda r: _number(r["boundary_seconds"], 3)),
    ("decoded / boundary", lambda r: _number(r["boundary_decoded_tokens"])),
    ("read again / boundary", lambda r: _number(r["boundary_prefill_tokens"])),
    ("acquired, text", lambda r: r["acquired_written"]),
    ("lost, text", lambda r: r["lost_written"]),
    ("acquired, answered", lambda r: r["acquired_answered"]),
    ("lost, answered", lambda r: r["lost_answered"]),
    ("forced or repaired", lambda r: _percent(r["forced_or_repaired"])),
    ("degraded", lambda r: str(r["degraded_boundaries"])),
    ("stopped short", lambda r: r["stopped"]),
    ("matters", lambda r: str(r["matters"])),
    ("runs", lambda r: str(r["runs"])),
    ("seeds", lambda r: r["seeds"]),
)


def agent_page(header: dict, rows: Sequence[Row], figures: dict[str, str]) -> str:
    """The whole page; figures are SVG by name."""
    body = [f"<h1>Agent sweep: {escape(header['inputs']['model'])}</h1>", f'<p class="faint">{ABOUT}</p>']
    titles = {"pass_rate": "At equal bytes", "cost": "What a boundary costs", "ledger": "What each boundary keeps"}
    body += [f"<h2>{titles[name]}</h2><figure style='margin:0'>{svg}</figure>" for name, svg in figures.items()]
    for task in dict.fromkeys(row["task"] for row in rows):
        here = [row for row in rows if row["task"] == task]
        cells = [([show(row) or "" for _, show in COLUMNS], _class(row)) for row in here]
        body.append(f"<h2>{escape(task)}</h2>" + _table([name for name, _ in COLUMNS], cells, "Every row."))
        body += [f'<p class="faint">{escape(line)}</p>' for line in notes(here)]
    known = {"inputs": header["inputs"], **header["provenance"]}
    body.append(f"<h2>Provenance</h2><pre>{escape(json.dumps(known, indent=1, ensure_ascii=False))}</pre>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Agent sweep</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _class(row: Row) -> str:
    if row["backend"] in (CEILING, FLOOR):
        return "end"
    ours = row["method"] in OURS and row["backend"] == "kv"
    return "ours" if ours else "control" if row["backend"] in (*UNSIZED, "memo_oracle") else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _ends(row: Row, name: str) -> str:
    return f"{100 * row[f'{name}_low']:.1f} to {100 * row[f'{name}_high']:.1f}"


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
