"""From an agent's cells to rows, a table for the terminal and CSV. Imports neither torch nor matplotlib."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from ..eval.stats import clustered_rate
from ..eval.summary import all_pass_rate
from .agent_cells import UNSIZED, AgentCell, AgentSweepConfig
from .cells import CEILING, OURS

Row = dict[str, Any]
Result = dict[str, Any]
NAMES = {
    "full": "full context", "none": "no context", "plain": "plain loop", "trim": "last tokens", "memo": "memo",
    "memo_oracle": "oracle memo (upper bound)", "memo_kv": "memo, with its KV",
}  # fmt: skip
CELL = 20
"""Characters of a budget's column."""


def agent_rows(results: Sequence[Result], header: dict) -> list[Row]:
    """One row for each group of matters and condition, matters and seeds taken together.

    Args:
        results: of cells, as the store gives them.
        header: the store's `sweep.json`.

    Returns:
        Rows in the order of the groups and conditions. Rates are shares, sizes bytes, times seconds. A run that stopped
        short is in every rate with what it delivered, and counted in `stopped`.
    """
    config = AgentSweepConfig.from_json(header["config"])
    groups: dict[tuple, list[Result]] = defaultdict(list)
    for result in results:
        cell = AgentCell(**result["cell"])
        groups[cell.task, cell.condition].append(result)
    full = {task: _rate(found) for (task, condition), found in groups.items() if condition.backend == CEILING}
    order = list(config.conditions)
    tasks = list(dict.fromkeys(task for task, _ in groups))
    rows = [_row(task, condition, found, full.get(task), header) for (task, condition), found in groups.items()]
    places = {(c.name, c.budget): place for place, c in enumerate(order)}
    tasks.sort(key=lambda task: -_percent_of(task))
    return sorted(rows, key=lambda r: (tasks.index(r["task"]), places[r["condition"], r["budget"]]))


def _percent_of(task: str) -> float:
    words = task.replace("%", "").split()
    return next((float(word) for word in words if word.replace(".", "").isdigit()), 0.0)


def _row(task: str, condition: Any, group: list[Result], full: float | None, header: dict) -> Row:
    scored = [(r, each) for r in group for each in r["criteria"] if each["label"] != "unscored"]
    rate = clustered_rate([float(e["label"] == "pass") for _, e in scored], [r["cell"]["set_id"] for r, _ in scored])
    whole = [all(each["label"] == "pass" for each in r["criteria"]) for r in group]
    every = all_pass_rate(whole, [r["cell"]["set_id"] for r in group])
    ours, theirs = [r["metrics"]["still"] for r in group], [r["metrics"] for r in group]
    boundaries = [b for r in group for b in r["boundaries"]]
    each = group[0]["bytes_per_token"] or 0
    turns = sum(m["turn_count"] for m in theirs)
    stamps = [r["provenance"] for r in group]
    return {
        "task": task, "condition": condition.name, "backend": condition.backend, "method": condition.method,
        "mode": condition.mode, "budget": condition.budget,
        "pass_rate": _short(rate.estimate), "pass_low": _short(rate.low), "pass_high": _short(rate.high),
        "interval": rate.method,
        "all_pass": _short(every.estimate), "all_pass_low": _short(every.low), "all_pass_high": _short(every.high),
        "share_of_full": _short(rate.estimate / full) if full else None,
        "held_bytes": _mean(o["peak_compacted_bytes"] for o in ours),
        "held_tokens": _mean(o["peak_compacted_tokens"] for o in ours),
        "peak_context_bytes": _mean(o["peak_context"] * each for o in ours),
        "documents_opened": sum(m["documents_read"] for m in theirs),
        "documents_total": sum(m["total_documents"] for m in theirs),
        "characters_read": sum(o["characters_read"] for o in ours),
        "characters_available": sum(o["characters_available"] for o in ours),
        "boundaries": _mean(len(r["boundaries"]) for r in group),
        "boundary_seconds": _short(median(map(_seconds, boundaries))) if boundaries else None,
        "boundary_decoded_tokens": _mean(b["decoded_tokens"] for b in boundaries),
        "boundary_prefill_tokens": _mean(b["prefill_tokens"] for b in boundaries),
        "acquired_written": _moves(group, "written", 0), "lost_written": _moves(group, "written", 1),
        "acquired_answered": _moves(group, "answered", 0), "lost_answered": _moves(group, "answered", 1),
        "degraded_boundaries": sum(bool(b["degraded"]) for b in boundaries),
        "forced_or_repaired": _short(sum(o["forced_or_repaired"] * m["turn_count"] for o, m in zip(ours, theirs,
                                     strict=True)) / turns) if turns else None,
        "rejected_turns": sum(o["rejected"] for o in ours),
        "stopped": " ".join(f"{k}={n}" for k, n in sorted(Counter(o["stop"] for o in ours).items()) if k != "done"),
        "matters": len({r["cell"]["set_id"] for r in group}), "runs": len(group), "criteria": len(scored),
        "unscored": sum(len(r["criteria"]) for r in group) - len(scored),
        "turns": _short(turns / len(group)), "seeds": " ".join(map(str, sorted({r["cell"]["seed"] for r in group}))),
        "seconds_per_run": _short(median(m["wall_clock_seconds"] for m in theirs)),
        "model": header["inputs"]["model"],
        "compactors": " + ".join(v for k, v in sorted(header["inputs"].items()) if k.startswith("compactor")),
        "bytes_per_token": each,
        "device": _one(s["device"]["name"] for s in stamps), "commit": _one(_commit(s) for s in stamps),
        "versions": _one(" ".join(f"{k} {v}" for k, v in s["versions"].items()) for s in stamps),
    }  # fmt: skip


def _rate(group: list[Result]) -> float:
    labels = [each["label"] for r in group for each in r["criteria"] if each["label"] != "unscored"]
    return labels.count("pass") / len(labels) if labels else 0.0


def _seconds(boundary: Result) -> float:
    """A boundary's wall time: the turns that wrote its memo, rejected ones too, and the backend's own work."""
    return boundary["seconds"] + boundary["memo_seconds"]


def _moves(group: list[Result], kind: str, side: int) -> str:
    """Mean number of criteria acquired (side 0) or lost (side 1) at each boundary, over the runs that crossed it."""
    runs = [r[kind] for r in group if r[kind]]
    most = max(map(len, runs), default=0)
    means = [fmean(len(run[n][side]) for run in runs if n < len(run)) for n in range(most)]
    return " ".join(f"{mean:.2f}" for mean in means)


def held(row: Row, kind: str) -> list[float]:
    """Criteria that are held behind each boundary, from what was acquired and lost."""
    ups, downs = (list(map(float, row[f"{side}_{kind}"].split())) for side in ("acquired", "lost"))
    total, found = 0.0, []
    for up, down in zip(ups, downs, strict=True):
        total += up - down
        found.append(total)
    return found


def _mean(values: Any) -> float | None:
    """None where there are no values, or some are not known."""
    values = list(values)
    return _short(fmean(values)) if values and None not in values else None


def _short(value: float) -> float:
    return round(value, 6)


def _one(values: Any) -> str:
    return " + ".join(dict.fromkeys(value for value in values if value))


def _commit(stamp: dict) -> str:
    git = stamp["git"]
    return "" if git is None else git["commit"][:12] + ("-dirty" if git["dirty"] else "")


def label(row: Row) -> str:
    """A condition for people."""
    if row["backend"] in NAMES:
        return NAMES[row["backend"]]
    method = OURS.get(row["method"], row["method"])
    again = ", recompacted" if row["mode"] == "recompact" else ""
    return f"memo + {method}{again}" if row["backend"] == "hybrid" else f"KV by {method}{again}"


def agent_table(rows: Sequence[Row], task: str) -> str:
    """The pass rates of one group for the terminal: conditions down, budgets across, all-pass beside each."""
    rows = [row for row in rows if row["task"] == task]
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["budget"]))
    at = {(row["condition"], row["budget"]): row for row in rows}
    sized = list(dict.fromkeys(row["condition"] for row in rows if row["backend"] not in UNSIZED))
    names = {row["condition"]: label(row) for row in rows}
    title = "criterion pass % / all-pass %"
    width = max(map(len, [*names.values(), title]))
    lines = [conditions(rows), "", f"{title:<{width}}" + "".join(f"{b:>{CELL}}" for b in budgets)]
    lines.append("-" * (width + CELL * len(budgets)))
    for name in sized:
        lines.append(f"{names[name]:<{width}}" + "".join(f"{_cell(at.get((name, b))):>{CELL}}" for b in budgets))
    for row in rows:
        if row["backend"] in UNSIZED:
            lines.append(f"{names[row['condition']]:<{width}}{_cell(row):>{CELL}}")
    return "\n".join([*lines, *notes(rows)])


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    half = 50 * (row["pass_high"] - row["pass_low"])
    return f"{100 * row['pass_rate']:.1f}+-{half:.1f} / {100 * row['all_pass']:.0f}"


def conditions(rows: Sequence[Row]) -> str:
    """What was measured, in a line that stands under every figure."""
    row = rows[0]
    opened = sum(r["documents_opened"] for r in rows) / max(1, sum(r["documents_total"] for r in rows))
    read = sum(r["characters_read"] for r in rows) / max(1, sum(r["characters_available"] for r in rows))
    counts = sorted({r["criteria"] for r in rows})
    criteria = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return (
        f"{row['model']}, {row['task']}: {row['matters']} matters, {criteria} criteria a condition; "
        f"{100 * opened:.0f} % of documents opened, {100 * read:.0f} % of characters read; 95 % intervals clustered by "
        f"matter"
    )


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know besides; conditions of which the same is true share a line."""
    found = ["+- is half of the 95 % interval; a budget in t is as many bytes as that many raw tokens take."]
    said: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        where = f"{label(row)} {row['budget']}".strip()
        if row["stopped"]:
            said[f"runs that stopped short, of {row['runs']}: {row['stopped']}"].append(where)
        if row["unscored"]:
            said[f"{row['unscored']} criteria unscored"].append(where)
        if row["budget"] and row["held_bytes"] is None:
            said["bytes a token are not known, so there is no point in the figures"].append(where)
        elif row["budget"] and not row["held_bytes"]:
            said["no run crossed a boundary, so nothing was held and there is no point in the figures"].append(where)
    for what, places in said.items():
        found.append(f"{'all conditions' if len(places) == len(rows) else ', '.join(places)}: {what}.")
    return found
