"""The report on judges: each candidate against the reference, where it errs, what it costs, and every disagreement."""

from __future__ import annotations

from collections.abc import Sequence

from .agreement import JudgeComparison, Rates
from .chart import Point, cost_figure
from .page_parts import (
    Markup,
    count,
    dollars,
    escape,
    few_tasks,
    header,
    interval,
    note,
    p_value,
    page,
    points,
    quoted,
    table,
)
from .stats import Interval
from .verdicts import CriterionVerdict


def judges_page(comparisons: Sequence[JudgeComparison], most: int = 200) -> str:
    """One reference and its candidates as a page.

    Args:
        comparisons: all with the same reference.
        most: disagreements shown of each candidate; how many are left out is said.
    """
    reference = comparisons[0].reference
    facts = [f"Reference: {reference}", f"{count(comparisons[0].runs, 'run')} graded by both"]
    body = [
        header("Comparison of judges", f"How judges differ from {reference}", facts),
        note([few_tasks(max(len(each.by_task) for each in comparisons)),
              *(f"{each.candidate}: {warning}." for each in comparisons for warning in each.warnings)]),
        rates_table(comparisons),
        _figure(comparisons),
        '<p class="faint">Agreement: the same label. False pass: passed among those that the reference failed; these '
        "go out unseen, so they weigh more. False fail: failed among those that it passed. Rates with 95 % "
        "intervals that take the criteria of a task together; kappa by a bootstrap over tasks; McNemar's p takes "
        "criteria for independent. Cost: what the verdicts cost when they were made, per 1,000 criteria. The reference "
        "is another judge, not the truth.</p>",
    ]
    for each in comparisons:
        body += [f"<h2>{escape(each.candidate)}</h2>", _counts(each), _kinds(each), _tasks(each)]
        body.append(_disagreements(each, most))
    return page(
        "Comparison of judges", body, "Both columns are language models' readings unless a judge's name says so."
    )


def rates_table(comparisons: Sequence[JudgeComparison]) -> str:
    """The table of the verifier study."""
    rows = []
    for each in comparisons:
        rates = each.rates
        lean = rates.leniency.interval if rates.leniency else None
        rows.append(
            [each.candidate, interval(rates.agreement), kappa(rates.kappa), interval(rates.false_pass),
             interval(rates.false_fail), p_value(rates.mcnemar), points(lean), dollars(each.costs[1]),
             f"{len(rates.pairs):,}", f"{sum(each.unscored):,}"]
        )  # fmt: skip
    head = ["judge", "agreement", "kappa", "false pass", "false fail", "McNemar p", "pass rate, points", "per 1,000",
            "criteria", "not judged"]  # fmt: skip
    cost = dollars(comparisons[0].costs[0])
    return table(head, rows, f"Against {comparisons[0].reference} (per 1,000 criteria: {cost})")


def figure_of(comparisons: Sequence[JudgeComparison]) -> str:
    """Cost against disagreement as SVG; "" where no candidate's cost is known."""
    found = []
    for each in comparisons:
        agreement = each.rates.agreement
        if agreement and each.costs[1]:
            turned = Interval(
                1 - agreement.estimate, 1 - agreement.high, 1 - agreement.low, agreement.n, agreement.clusters,
                agreement.method,
            )  # fmt: skip
            found.append(Point(each.candidate, each.costs[1], turned, each.rates.false_pass))
    return cost_figure(found, comparisons[0].reference, comparisons[0].costs[0])


def kappa(found: Interval | None) -> Markup:
    """Kappa with its interval; a dash where it is not defined."""
    return (
        Markup("\u2013")
        if found is None
        else Markup(f"{found.estimate:.2f}<small>{found.low:.2f} to {found.high:.2f}</small>")
    )


def _figure(comparisons: Sequence[JudgeComparison]) -> str:
    svg = figure_of(comparisons)
    return f"<figure>{svg}</figure>" if svg else ""


def _counts(comparison: JudgeComparison) -> str:
    table_ = comparison.rates.counts
    rows = [
        [f"{comparison.reference}: met", table_["both_pass"], table_["false_fail"]],
        [f"{comparison.reference}: not met", table_["false_pass"], table_["both_fail"]],
    ]
    runs = comparison.all_pass
    same = sum(number for (first, second), number in runs.items() if first == second and first is not None)
    known = sum(number for pair, number in runs.items() if None not in pair)
    left = [f"{count(comparison.unpaired, 'verdict')} without a counterpart"] if comparison.unpaired else []
    left += [f"{count(comparison.only_one, 'run')} graded by one of the two"] if comparison.only_one else []
    told = f"The two agree on whether the whole task passes in {same} of {count(known, 'run')} where both know."
    if left:
        told += f" Left out: {'; '.join(left)}."
    head = ["", f"{comparison.candidate}: met", f"{comparison.candidate}: not met"]
    return table(head, rows, "Verdicts") + f"<p>{escape(told)}</p>"


def _kinds(comparison: JudgeComparison) -> str:
    rows = [[kind, *_rates(rates)] for kind, rates in comparison.by_kind.items()]
    return table(["kind of criterion", *_HEAD], rows, "By kind of criterion, told from its words")


def _tasks(comparison: JudgeComparison) -> str:
    found = comparison.by_task
    if len(found) < 2:
        return ""
    rows = [[task, *_plain(rates)] for task, rates in found.items()]
    head = ["task", "criteria", "disagree", "false passes", "false fails"]
    inner = table(head, rows, "By task, the one with the most disagreements first")
    return f"<details><summary>By task ({len(found)})</summary>{inner}</details>" if len(found) > 12 else inner


_HEAD = ("criteria", "agreement", "false pass", "false fail")


def _rates(rates: Rates) -> list[str]:
    return [f"{len(rates.pairs):,}", interval(rates.agreement), interval(rates.false_pass), interval(rates.false_fail)]


def _plain(rates: Rates) -> list[int]:
    counts = rates.counts
    wrong = counts["false_pass"] + counts["false_fail"]
    return [len(rates.pairs), wrong, counts["false_pass"], counts["false_fail"]]


def _disagreements(comparison: JudgeComparison, most: int) -> str:
    found = comparison.disagreements
    if not found:
        return "<p>They agree on every criterion.</p>"
    parts = [f"<h3>Disagreements ({len(found):,})</h3>"]
    for pair in found[:most]:
        kind = "false pass" if pair.false_pass else "false fail"
        named = ((comparison.reference, pair.reference), (comparison.candidate, pair.candidate))
        sides = "".join(_side(name, verdict) for name, verdict in named)
        where = " \u00b7 ".join(escape(each) for each in (pair.task, pair.run_id, pair.kind))
        parts.append(
            f'<div class="item {pair.reference.label}"><div class="head"><span class="badge">{kind}</span>'
            f'<span class="id">{escape(pair.reference.id)}</span>'
            f'<span class="what">{escape(pair.reference.title)}</span></div>'
            f'<div class="body"><p class="meta">{where}</p><div class="pair">{sides}</div></div></div>'
        )
    if len(found) > most:
        parts.append(f"<p>{len(found) - most:,} more are in the files.</p>")
    return "\n".join(parts)


def _side(judge: str, verdict: CriterionVerdict) -> str:
    word = {"pass": "met", "fail": "not met"}[verdict.label]
    quotes = "".join(f'<blockquote dir="auto">{escape(quoted(quote))}</blockquote>' for quote in verdict.evidence)
    return (
        f'<div><p class="label">{escape(judge)}: <span class="badge {verdict.label}">{word}</span></p>'
        f'<p class="said" dir="auto">{escape(verdict.reason)}</p>{quotes}</div>'
    )
