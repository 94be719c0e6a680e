"""From cells to rows: what the table, the figures and the report show. Imports neither torch nor transformers."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..eval.matters.words import VALUE_COUNTS
from ..eval.stats import clustered_rate, paired_difference
from ..eval.summary import all_pass_rate
from .cells import CEILING, CHUNKED, CONTROLS, FLOOR, LEARNED, OURS, PLACED, QUANTISED, SweepConfig

COMPUTED = "computed"
Row = dict[str, Any]
Result = dict[str, Any]


def make_rows(results: Sequence[Result], header: dict) -> list[Row]:
    """One row for each task, method and ratio, seeds taken together.

    Args:
        results: of cells, as the store gives them.
        header: the store's `sweep.json`.

    Returns:
        Rows in the order of the tasks, then ceiling and floor, then by method and ratio. Rates are shares, sizes
        bytes, times seconds; `kl` and `cross_entropy` are nats per token of the reference answers, of which there are
        `likelihood_tokens`: answers that the full cache gives rightly, in its own words.
    """
    cells = _by_set(results)
    groups: dict[tuple, list[Result]] = defaultdict(list)
    for result in results:
        cell = result["cell"]
        groups[cell["task"], cell["method"], cell["ratio"]].append(result)
    rows = [_row(task, method, ratio, group, cells, header) for (task, method, ratio), group in groups.items()]
    return sorted(rows, key=lambda row: _order(row, SweepConfig.from_json(header["config"])))


def _by_set(results: Iterable[Result]) -> dict[tuple, Result]:
    """Floor and ceiling results by task, set and method."""
    return {
        (result["cell"]["task"], result["cell"]["set_id"], result["cell"]["method"]): result
        for result in results
        if result["cell"]["method"] in (FLOOR, CEILING)
    }


def _order(row: Row, config: SweepConfig) -> tuple:
    methods = [CEILING, FLOOR, *LEARNED, *(name for name in config.methods)]
    place = methods.index(row["method"]) if row["method"] in methods else len(methods)
    tasks = list(config.methods_of)
    return tasks.index(row["task"]) if row["task"] in tasks else len(tasks), place, row["ratio"] or 0


def _row(task: str, method: str, ratio: float | None, group: list[Result], ends: dict, header: dict) -> Row:
    scored = [(result, each) for result in group for each in result["questions"] if each["label"] != "unscored"]
    passes = [float(each["label"] == "pass") for _, each in scored]
    sets = [result["cell"]["set_id"] for result, _ in scored]
    rate = clustered_rate(passes, sets) if passes else None
    whole = [all(each["label"] == "pass" for each in result["questions"]) for result in group]
    all_pass = all_pass_rate(whole, [result["cell"]["set_id"] for result in group])
    records = [result["record"] for result in group]
    slots = fmean(record["slots"] for record in records)
    facts = fmean(result["facts"] for result in group)
    bits = _bits(group)
    asked = [each for result in group for each in result["questions"]]
    tokens = sum(each["tokens"] for each in asked)
    floor = [ends.get((task, result["cell"]["set_id"], FLOOR)) for result in group]
    ceiling = [ends.get((task, result["cell"]["set_id"], CEILING)) for result in group]
    full_rate = _pass_rate(ceiling)
    stamps = [result["provenance"] for result in group]
    seeds = sorted({result["cell"]["seed"] for result in group} - {None})
    difficulty = [result["source"].get("difficulty") or {} for result in group]
    return {
        "task": task,
        "method": method,
        "trained": method in (*OURS, *CHUNKED, PLACED, "still-wrong-matter", "cartridge"),
        "synthesis": records[0]["synthesis"],
        "query_aware": records[0]["query_aware"],
        "control": method in CONTROLS,
        "ratio": ratio,
        "tokens": round(fmean(record["tokens"] for record in records), 1),
        "slots": round(slots, 1),
        "nbytes": round(fmean(record["nbytes"] for record in records)),
        "full_nbytes": round(fmean(record["full_nbytes"] for record in records)),
        "facts_per_slot": _rounded(facts / slots if slots else None),
        "bits_per_fact": _rounded(bits),
        "bits_per_slot": _rounded(bits * facts / slots if bits and slots else None),
        "pass_rate": _rounded(rate and rate.estimate),
        "pass_low": _rounded(rate and rate.low),
        "pass_high": _rounded(rate and rate.high),
        "interval": rate.method if rate else "",
        "all_pass": _rounded(all_pass.estimate),
        "all_pass_low": _rounded(all_pass.low),
        "all_pass_high": _rounded(all_pass.high),
        "recall": _rounded(fmean(each["recall"] for _, each in scored)) if scored else None,
        "stale_rate": _stale_rate(asked),
        "share_of_full": _rounded(rate.estimate / full_rate if rate and full_rate else None),
        "kl": _rounded(sum(each["kl"] for each in asked) / tokens if tokens else None),
        "cross_entropy": _rounded(sum(each["cross_entropy"] for each in asked) / tokens if tokens else None),
        "likelihood_tokens": tokens,
        "utilisation": _utilisation(group, floor, ceiling),
        "compact_seconds": _rounded(median(record["seconds"] for record in records)),
        "read_seconds": _rounded(median(record["read_seconds"] for record in records)),
        "sets": len({result["cell"]["set_id"] for result in group}),
        "questions": len({(result["cell"]["set_id"], each["id"]) for result, each in scored}),
        "unscored": len(asked) - len(scored),
        "seeds": " ".join(map(str, seeds)),
        "pass_by_seed": " ".join(f"{_pass_rate([r for r in group if r['cell']['seed'] == s]):.4f}" for s in seeds),
        "difficulty": _one(each.get("name", "") for each in difficulty),
        "digest": _one(str(result["source"].get("digest", "")) for result in group),
        "model": header["inputs"]["model"],
        "compactor": _one(str(record["options"].get("label", "")) for record in records),
        "warnings": _one(text for result in group for text in result["warnings"]),
        "options": json.dumps({k: v for k, v in records[0]["options"].items() if k not in ("label", "seed")}),
        "device": _one(stamp["device"]["name"] for stamp in stamps),
        "commit": _one(_commit(stamp) for stamp in stamps),
        "versions": _one(" ".join(f"{k} {v}" for k, v in stamp["versions"].items()) for stamp in stamps),
        "source": COMPUTED,
    }


def _rounded(value: float | None, digits: int = 6) -> float | None:
    return None if value is None else round(value, digits)


def _one(values: Iterable[str]) -> str:
    """The value that all share, or every one of them: cells of one row may come from several runs."""
    return " + ".join(dict.fromkeys(value for value in values if value))


def _commit(stamp: dict) -> str:
    git = stamp["git"]
    return "" if git is None else git["commit"][:12] + ("-dirty" if git["dirty"] else "")


def _pass_rate(group: Iterable[Result | None]) -> float | None:
    labels = [each["label"] for result in group if result for each in result["questions"]]
    scored = [label for label in labels if label != "unscored"]
    return scored.count("pass") / len(scored) if scored else None


def _stale_rate(asked: list[dict]) -> float | None:
    """Share of the amended facts for which a superseded value was given."""
    amended = [each for each in asked if each["tags"].get("amended")]
    return _rounded(fmean(each["stale"] for each in amended)) if amended else None


def _utilisation(group: list[Result], floor: list[Result | None], ceiling: list[Result | None]) -> float | None:
    """(none - compact) / (none - full) of the summed cross-entropy, on the same questions."""
    if not all(floor) or not all(ceiling):
        return None
    sides = (group, floor, ceiling)
    here, none, full = (sum(each["cross_entropy"] for result in side for each in result["questions"]) for side in sides)
    return _rounded((none - here) / (none - full)) if none != full else None


def _bits(group: list[Result]) -> float | None:
    """Mean bits of a value, from the number of values of its kind; None for questions that were not generated so."""
    kinds = [each["tags"].get("kind") for result in group for each in result["questions"]]
    if any(result["source"].get("generator") != "matters" for result in group) or not set(kinds) <= set(VALUE_COUNTS):
        return None
    return fmean(math.log2(VALUE_COUNTS[kind]) for kind in kinds)


def breakdown(results: Sequence[Result]) -> list[Row]:
    """Pass rates by tag of the question: amended facts, kinds of exact strings, depth in the context."""
    groups: dict[tuple, list[tuple[float, str]]] = defaultdict(list)
    order: dict[str, None] = {}
    for result in results:
        cell = result["cell"]
        for each in result["questions"]:
            if each["label"] == "unscored":
                continue
            for name in _tags(each["tags"]):
                order[name] = None
                groups[cell["task"], cell["method"], cell["ratio"], name].append(
                    (float(each["label"] == "pass"), cell["set_id"])
                )
    rows = []
    for (task, method, ratio, name), values in groups.items():
        rate = clustered_rate(*zip(*values, strict=True))
        ceiling = groups.get((task, CEILING, None, name), [])
        full = fmean(value for value, _ in ceiling) if ceiling else 0.0
        rows.append(
            {
                "task": task, "method": method, "ratio": ratio, "facts": name,
                "pass_rate": _rounded(rate.estimate), "pass_low": _rounded(rate.low), "pass_high": _rounded(rate.high),
                "share_of_full": _rounded(rate.estimate / full) if full else None, "questions": rate.n,
            }
        )  # fmt: skip
    names = sorted(order, key=_tag_order)
    return sorted(rows, key=lambda row: (row["task"], row["method"], row["ratio"] or 0, names.index(row["facts"])))


DEPTHS = 5


def _tags(tags: dict) -> list[str]:
    names = [f"task: {tags['task']}"] if "task" in tags else []
    if "amended" in tags:
        names.append("amended" if tags["amended"] else "never amended")
    if tags.get("kind"):
        names.append(f"kind: {tags['kind']}")
    if isinstance(tags.get("depth"), int | float):
        fifth = min(DEPTHS - 1, int(tags["depth"] * DEPTHS))
        names.append(f"depth: {100 * fifth // DEPTHS} to {100 * (fifth + 1) // DEPTHS} %")
    return names


def _tag_order(name: str) -> tuple:
    head = name.split(":")[0]
    heads = ["task", "amended", "never amended", "kind", "depth"]
    digits = "".join(filter(str.isdigit, name.split(" to ")[0]))
    return heads.index(head) if head in heads else len(heads), int(digits or 0), name


def compare(results: Sequence[Result], ours: str = "still") -> list[Row]:
    """STILL against every other method, question by question: wins and losses alike.

    Methods with a ratio are met at the same ratio, that is at equal slots; the quantised caches at the largest STILL
    cache that takes no more bytes than theirs. `difference` is ours minus theirs, paired, clustered by question set.
    """
    groups: dict[tuple, list[Result]] = defaultdict(list)
    for result in results:
        cell = result["cell"]
        groups[cell["task"], cell["method"], cell["ratio"]].append(result)
    rows = []
    for (task, method, ratio), theirs in groups.items():
        if method in (FLOOR, CEILING, *LEARNED):
            continue
        meets = ratio if method not in QUANTISED else _no_larger(groups, task, ours, theirs)
        mine = groups.get((task, ours, meets))
        if mine is None:
            continue
        a, b = _means(mine), _means(theirs)
        both = [key for key in a if key in b]
        if not both:
            continue
        pair = paired_difference([a[key] for key in both], [b[key] for key in both], [key[0] for key in both])
        rows.append(
            {
                "task": task, "method": method, "ratio": meets, "difference": _rounded(pair.interval.estimate),
                "low": _rounded(pair.interval.low), "high": _rounded(pair.interval.high),
                "only_ours": pair.only_a, "only_theirs": pair.only_b, "questions": len(both),
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row["task"], row["ratio"] or 0, -row["difference"]))


def _no_larger(groups: dict, task: str, ours: str, theirs: list[Result]) -> float | None:
    limit = fmean(result["record"]["nbytes"] for result in theirs)
    fits = [
        ratio for (at, method, ratio), group in groups.items()
        if at == task and method == ours and fmean(result["record"]["nbytes"] for result in group) <= limit
    ]  # fmt: skip
    return min(fits) if fits else None


def _means(group: list[Result]) -> dict[tuple[str, str], float]:
    """Mean verdict of each question over the seeds."""
    seen: dict[tuple[str, str], list[float]] = defaultdict(list)
    for result in group:
        for each in result["questions"]:
            if each["label"] != "unscored":
                seen[result["cell"]["set_id"], each["id"]].append(float(each["label"] == "pass"))
    return {key: fmean(values) for key, values in seen.items()}


def committed_rows(folder: str | Path, rows: Sequence[Row], only: str = "*.csv") -> list[Row]:
    """Rows of earlier runs that stand in for methods that were not computed: same model, same difficulty.

    Args:
        folder: of CSV files that a sweep wrote.
        rows: what was computed; a row of the same task, method and ratio wins over a committed one.
        only: pattern of the files' names.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of committed rows")
    known = {(row["task"], row["method"], row["ratio"]) for row in rows}
    alike = {(row["task"], row["model"], row["digest"]) for row in rows}
    found = []
    for path in sorted(folder.glob(only)):
        with open(path, encoding="utf-8", newline="") as file:
            for text in csv.DictReader(file):
                if not {"task", "method", "ratio", "model", "digest", "source"} <= set(text):
                    continue
                row = {name: value if name in TEXT_COLUMNS else _typed(value) for name, value in text.items()}
                key = row["task"], row["method"], row["ratio"]
                if key not in known and (row["task"], row["model"], row["digest"]) in alike:
                    found.append({**row, "source": path.name if row["source"] == COMPUTED else row["source"]})
    return found


TEXT_COLUMNS = ("task", "method", "seeds", "pass_by_seed", "difficulty", "digest", "model", "compactor", "options",
                "device", "commit", "versions", "source", "interval", "warnings")  # fmt: skip


def _typed(value: str) -> Any:
    if value in ("True", "False"):
        return value == "True"
    try:
        number = float(value)
    except ValueError:
        return value or None
    return int(number) if number.is_integer() and "." not in value else number
