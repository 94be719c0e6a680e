"""Reports of both trainers from what their folders hold: figures, a page, a table. No torch; matplotlib to draw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...eval.page_parts import Markup, escape, header, note, page, percent, table, tiles
from ...eval.stats import Interval
from ..figures import ACCENT, FAINT, INK, RC, save
from ..runs import write_atomically

BEHAVIOURS = {
    "behaviour_grep_share": "greps among tool calls", "behaviour_documents_read": "documents read",
    "behaviour_characters_read": "characters read", "behaviour_memo_tokens": "tokens of a memo or slots",
    "behaviour_reread_rate": "characters read again", "behaviour_turns": "turns",
}  # fmt: skip
GAP = "Sampling gap (|log-probability at sampling - in training|, mean over tokens), and clipped tokens"


def write_isft_report(output: str | Path) -> Path:
    """`report.html` and `figures/` of an iSFT run, as far as it got."""
    output = Path(output)
    made_by = _json(output / "isft.json")
    rounds = [_json(path) for path in sorted(output.glob("round-*/round.json"), key=_number)]
    before = _json(output / "before" / "evaluation.json") or {}
    steps = [(each, _json(folder)) for each, folder in _states(output, rounds)]
    shown = []
    if any(scores for _, scores in steps):
        shown.append(_figure(output, "held_out", lambda: _bars(steps), "Hold-out before and after each round"))
    rows = [
        [r["round"], r["teacher"], r["attempts"], r["passed"], percent(r["passed"] / max(1, r["attempts"])),
         r["corrected"], r["leaked"], r["rollouts"], r["rows"], f"{r['tokens']:,}", r["select"]]
        for r in rounds
    ]  # fmt: skip
    head = ["round", "teacher", "attempts", "passed twice", "yield", "after a private bit", "leaked", "kept", "rows",
            "trained tokens", "selection"]  # fmt: skip
    leaks = [[r["round"], *r["leaks"].values()] for r in rounds]
    body = [
        header("iSFT", made_by["settings"]["model"], _conditions(made_by)),
        _best(before, rounds[-1]["evaluation"] if rounds else {}),
        "<h2>Hold-out</h2>", *shown, _scores(steps),
        "<h2>Rounds</h2>", table(head, rows, texts=(1,)),
        "<h2>Leak gate</h2>", note(["Rollouts with a leak of each kind; they are not trained on."]),
        table(["round", *(rounds[0]["leaks"] if rounds else {})], leaks),
    ]  # fmt: skip
    return _write(output, "iSFT", body, made_by)


def write_grpo_report(output: str | Path) -> Path:
    """`report.html` and `figures/` of a GRPO run, as far as it got."""
    output = Path(output)
    made_by, lines = _json(output / "grpo.json"), _lines(output / "metrics.jsonl")
    lines = [line for line in lines if "reward" in line]
    states = [(name, _json(output / "evaluation" / name / "evaluation.json")) for name in ("before", "after")]
    states = [(name, scores) for name, scores in states if scores]
    control = made_by["settings"]["grpo"]["reward"] == "random"
    shown = []
    if lines:
        shown.append(_figure(output, "reward", lambda: _curve(lines), "Reward, criterion pass and all-pass per step"))
        shown.append(_figure(output, "behaviour", lambda: _behaviours(lines), "Behaviour per step"))
        shown.append(_figure(output, "gap", lambda: _gap(lines), GAP))
    if states:
        shown.append(_figure(output, "held_out", lambda: _bars(states), "Hold-out before and after"))
    last = lines[-1] if lines else {}
    names = ("reward", "criterion_rate", "all_pass", "groups_dropped", "unscored", "cut_by_length", "gap", "tokens",
             *(name for name in last if name.startswith(("ledger_", "credit_"))))  # fmt: skip
    body = [
        header("GRPO" + (", control: random reward" if control else ""), made_by["settings"]["model"],
               _conditions(made_by)),
        note(["Rewards of this run are random numbers: what it gains is the noise of the measurement."] * control),
        _best(states[0][1] if states else {}, states[-1][1] if len(states) > 1 else {}),
        *shown, _scores(states),
        "<h2>Steps</h2>",
        table(["step", *names], [[line["step"], *(f"{line.get(n, 0):.4g}" for n in names)] for line in lines]),
        note([f"Last step: {last['groups_dropped']:.0f} groups had no variance and were dropped."] if last else []),
        note(_time(lines)),
    ]  # fmt: skip
    return _write(output, "GRPO", body, made_by)


def _time(lines: Sequence[dict]) -> list[str]:
    """What the steps' seconds went to, in a sentence; nothing of logs that do not say."""
    whole = sum(line.get("seconds_step", 0.0) for line in lines)
    if not whole:
        return []
    parts = {"rollouts": "rollouts", "grading": "grading", "model": "forward and backward"}
    spent = {said: sum(line.get(f"seconds_{name}", 0.0) for line in lines) for name, said in parts.items()}
    spent["all else"] = whole - sum(spent.values())
    shares = ", ".join(f"{said} {seconds / whole:.1%}" for said, seconds in spent.items())
    return [f"{len(lines)} steps took {whole / 60:.1f} minutes: {shares}."]


def smoothed(values: Sequence[float], share: float = 0.3) -> list[float]:
    """An exponential mean, unbiased at its beginning."""
    found, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = (1 - share) * mean + share * value, (1 - share) * weight + share
        found.append(mean / weight)
    return found


def _states(output: Path, rounds: Sequence[dict]) -> list[tuple[str, Path]]:
    folders = [("before", output / "before" / "evaluation.json")]
    for each in rounds:
        number = each["round"]
        folders.append((f"round {number}", output / f"round-{number}" / "evaluation" / "evaluation.json"))
    return folders


def _number(path: Path) -> int:
    return int(path.parent.name.removeprefix("round-"))


def _scores(states: Sequence[tuple[str, dict | None]]) -> str:
    rows = [
        [name, backend, _rate(found["criteria"]), _rate(found["all_pass"]), found["rollouts"], found["unscored"],
         found["failed"]]
        for name, scores in states for backend, found in (scores or {}).items()
    ]  # fmt: skip
    head = ["", "backend", "criterion pass", "all-pass", "rollouts", "unscored", "failed"]
    return table(head, rows, "95 % intervals, clustered by task", texts=(0, 1))


def _rate(found: dict[str, float] | None) -> Markup:
    if found is None:
        return Markup("\u2013")
    low, high = 100 * found["low"], 100 * found["high"]
    return Markup(f"{percent(found['estimate'])}<small>{low:.1f} to {high:.1f}</small>")


def _best(before: dict, after: dict) -> str:
    entries = []
    for backend in after:
        if before.get(backend, {}).get("criteria") and after[backend]["criteria"]:
            gain = 100 * (after[backend]["criteria"]["estimate"] - before[backend]["criteria"]["estimate"])
            kind = "pass" if gain > 0 else "fail" if gain < 0 else ""
            entries.append((f"{gain:+.1f}", f"points of criterion pass on {backend}, before to after", kind))
    return tiles(entries) if entries else ""


def _conditions(made_by: dict[str, Any]) -> list[str]:
    parts, stamp = made_by["settings"], made_by["provenance"]
    run, train = parts["run"], parts["train"]
    return [
        f"backend {run['backend']}, budget {run['budget'] or run['ratio']}, window {run['window']}; "
        f"trains: policy {train['train_policy']}, compactor {train['compactor_mode']}; "
        f"normaliser {train['normaliser']}; seed {train['train_seed']}",
        f"{stamp['device']['name']}, {' '.join(f'{k} {v}' for k, v in stamp['versions'].items())}, {stamp['created']}",
    ]  # fmt: skip


def _bars(states: Sequence[tuple[str, dict | None]]):
    figure, axes = _axes(len(states) * 1.1 + 3.5, 2.8, 2, sharey=True)
    colours = [ACCENT, "#0072b2", "#009e73", "#cc79a7"]
    names = list(dict.fromkeys(backend for _, scores in states for backend in (scores or {})))
    for axis, (key, title) in zip(axes, (("criteria", "criterion pass, %"), ("all_pass", "all-pass, %")), strict=True):
        for number, backend in enumerate(names):
            for place, (_, scores) in enumerate(states):
                found = (scores or {}).get(backend, {}).get(key)
                if found:
                    x, value = place + 0.8 * (number + 0.5) / len(names) - 0.4, 100 * found["estimate"]
                    error = [[value - 100 * found["low"]], [100 * found["high"] - value]]
                    label = backend if not place else None
                    axis.bar(x, value, 0.75 / len(names), color=colours[number % 4], label=label, yerr=error,
                             error_kw={"elinewidth": 0.8, "ecolor": INK})  # fmt: skip
        axis.set_title(title)
        axis.set_xticks(range(len(states)), [name for name, _ in states])
        axis.set_ylim(0, 100)
    known = axes[0].get_legend_handles_labels()
    figure.legend(*known, frameon=False, loc="outside upper center", ncols=max(1, len(names)))
    return figure


def _curve(lines: Sequence[dict]):
    figure, (axis,) = _axes(6.2, 2.8, 1)
    steps = [line["step"] for line in lines]
    for key, colour, label in (("reward", ACCENT, "reward"), ("criterion_rate", "#0072b2", "criterion pass"),
                               ("all_pass", "#009e73", "all-pass")):  # fmt: skip
        values = [line[key] for line in lines]
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(steps, smoothed(values), color=colour, label=label)
    axis.set_xlabel("step")
    figure.legend(frameon=False, loc="outside upper center", ncols=3)  # the curves may lie anywhere
    return figure


def _behaviours(lines: Sequence[dict]):
    figure, axes = _axes(9.0, 2.1, len(BEHAVIOURS))
    for axis, (key, title) in zip(axes, BEHAVIOURS.items(), strict=True):
        values = [line.get(key, 0.0) for line in lines]
        axis.plot([line["step"] for line in lines], values, color=FAINT, alpha=0.4, linewidth=0.8)
        axis.plot([line["step"] for line in lines], smoothed(values), color=INK)
        axis.set_title(title, fontsize=7)
    return figure


def _gap(lines: Sequence[dict]):
    figure, axes = _axes(6.2, 2.2, 2)
    steps = [line["step"] for line in lines]
    axes[0].plot(steps, [max(1e-9, line.get("gap", 0.0)) for line in lines], color=INK)
    axes[0].set_yscale("log")
    axes[0].set_title("sampling gap, nats a token")
    for key in ("clipped", "truncated"):
        axes[1].plot(steps, [line.get(key, 0.0) for line in lines], label=key)
    axes[1].set_title("share of tokens")
    axes[1].legend(frameon=False)
    return figure


def _axes(width: float, height: float, panels: int, **options):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False, **options)[0]


def _figure(output: Path, name: str, draw, title: str) -> str:
    """A figure on disk and in the page; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return note([f"{title}: figures need matplotlib, pip install 'still-kv[plot]'"])
    with matplotlib.rc_context(RC):
        paths = save(draw(), output / "figures" / name)
    return f"<figure>{paths[1].read_text(encoding='utf-8')}<figcaption>{escape(title)}</figcaption></figure>"


def _write(output: Path, title: str, body: Sequence[str], made_by: dict[str, Any]) -> Path:
    commit = (made_by["provenance"].get("git") or {}).get("commit", "no checkout")
    text = page(title, body, f"made by {made_by['provenance'].get('command')} at {commit}")
    write_atomically(output / "report.html", text.encode())
    return output / "report.html"


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def yield_difference(kept: Sequence[bool], plain: Sequence[bool], tasks: Sequence[str]) -> Interval:
    """What private submits add to the share of kept rollouts, paired by attempt, clustered by task."""
    from ...eval.stats import paired_difference

    return paired_difference([float(x) for x in kept], [float(x) for x in plain], list(tasks)).interval
