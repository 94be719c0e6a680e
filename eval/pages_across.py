"""The report across runs: what each system reaches, where, how two differ, and which criteria look at fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    percent,
    points,
    table,
    tiles,
)
from .pages import title_of
from .quarantine import Item, item_statistics
from .scored import Rubrics, ScoredRun, judges_of
from .summary import UNNAMED, BothScores, Overview

BANDS = ((1.0, "all"), (0.95, "95 % or more"), (0.9, "90 to 95 %"), (0.8, "80 to 90 %"), (0.0, "less than 80 %"))


def runs_page(
    runs: Sequence[ScoredRun],
    found: Sequence[Overview],
    rubrics: Rubrics | None = None,
    links: Mapping[int, str] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """All runs as a page; each judge's verdicts make a section of their own.

    Args:
        found: of `summary.overview`.
        rubrics: for titles.
        links: index of a run -> the address of its own page, relative to this one.
        notes: what the reader must know first.
    """
    rubrics, links = rubrics or Rubrics(), links or {}
    systems = list(dict.fromkeys(_name(run) for run in runs))
    judges = judges_of(runs)
    facts = [
        f"{count(len({(run.system, run.task, run.run_id) for run in runs}), 'run')} of "
        f"{count(len({run.task for run in runs}), 'task')} by {count(len(systems), 'system')}",
        f"Graded by {', '.join(judges)}",
    ]
    body = [header("Results across runs", "How much of the work was done right", facts)]
    tasks = len({run.task for run in runs})
    body.append(note([*notes, few_tasks(tasks)]))
    for each in found:
        if len(found) > 1:
            body.append(f"<h2>Judge: {escape(each.judge)}</h2>")
        body += _judge_section(each)
    body.append(_runs_table(runs, rubrics, links))
    body.append(_items_table(item_statistics(runs)))
    body.append(
        '<p class="faint">A task passes only if every criterion is met. Intervals are 95 %: criterion rates by a '
        "bootstrap over tasks (below 20 by Student's t), since the criteria of a task stand or fall together; "
        "all-pass by Wilson's method, or robust to tasks where a task has several runs. Criteria without a verdict are "
        "in no rate.</p>"
    )
    return page("Results across runs", body, "Verdicts are a language model's reading. They are no legal advice.")


def _judge_section(found: Overview) -> list[str]:
    parts = [_headline(next(iter(found.systems.values()))) if len(found.systems) == 1 else ""]
    parts.append(_systems_table(found.systems))
    pairs = [
        [first, second, points(each.criterion.interval), p_value(each.criterion.p_value),
         points(each.all_pass.interval if each.all_pass else None), f"{each.only_a} / {each.only_b}",
         p_value(each.mcnemar), f"{each.tasks:,}"]
        for first, second, each in found.pairs
    ]  # fmt: skip
    head = [
        "first",
        "second",
        "criteria, points",
        "p",
        "all-pass, points",
        "only first / second",
        "p (McNemar)",
        "tasks",
    ]
    parts.append(table(head, pairs, "First minus second on the tasks that both did, paired.", (0, 1)))
    for name, areas in found.areas.items():
        if len(areas) > 1:
            rows = [
                [area, f"{each.runs:,}", interval(each.micro), interval(each.macro),
                 percent(each.all_pass.estimate if each.all_pass else None), f"{each.unscored:,}"]
                for area, each in areas.items()
            ]  # fmt: skip
            head = ["practice area", "runs", "criteria", "mean over tasks", "all-pass", "not judged"]
            parts.append(f"<h3>{escape(name)} by practice area</h3>" + table(head, rows))
    return parts


def _headline(scores: BothScores) -> str:
    found = scores.official
    low, high = found.all_pass_bounds
    rate = percent(found.all_pass.estimate) if found.all_pass else "unknown"
    bounds = f" (from {percent(low)} to {percent(high)} if the unknown ones are counted)" if found.unknown else ""
    entries = [
        (rate, f"of runs meet every criterion{bounds}", ""),
        (percent(found.micro.estimate) if found.micro else "unknown", "of all criteria met", ""),
        (percent(found.macro.estimate) if found.macro else "unknown", "of a task's criteria met, on average", ""),
    ]
    if found.unscored:
        entries.append((f"{found.unscored:,}", "criteria not judged", "open"))
    if found.cost is not None:
        entries.append((dollars(found.cost), "cost of judging", ""))
    return tiles(entries)


def _systems_table(scores: Mapping[str, BothScores]) -> str:
    rows = []
    for name, both in scores.items():
        for label, found in ((name, both.official), ("\u2003without quarantined criteria", both.without)):
            if found is not None:
                rows.append(
                    [label, f"{found.runs:,}", f"{found.criteria:,}", interval(found.micro), interval(found.macro),
                     interval(found.all_pass), f"{found.unknown:,}", f"{found.unscored:,}", dollars(found.cost)]
                )  # fmt: skip
    head = ["system", "runs", "criteria", "criteria met", "mean over tasks", "all-pass", "unknown", "not judged",
            "judging"]  # fmt: skip
    return table(head, rows, "Each system under this judge, with every criterion; 95 % intervals below the rates.")


def _runs_table(runs: Sequence[ScoredRun], rubrics: Rubrics, links: Mapping[int, str]) -> str:
    rows = []
    for index, run in enumerate(runs):
        labels = [verdict.label for verdict in run.verdicts]
        title = escape(title_of(run, rubrics.find(run.task)))
        name = f'<a href="{escape(links[index])}">{title}</a>' if index in links else title
        run_id = f" \u00b7 {escape(run.run_id)}" if run.run_id != run.task else ""
        state = {True: "all met", False: "not all", None: "unknown"}[run.all_pass]
        rows.append(
            [Markup(f"{name}<small>{escape(run.task)}{run_id}</small>"), _name(run), run.judge,
             f"{labels.count('pass')} of {len(labels)}", state, labels.count("unscored") or ""]
        )  # fmt: skip
    shares = [_share(run) for run in runs]
    bands, rest = [], [share for share in shares if share is not None]
    for least, name in BANDS:
        inside = [share for share in rest if share >= least]
        rest = [share for share in rest if share < least]
        bands.append([name, len(inside)])
    head = ["task", "system", "judge", "criteria met", "task", "not judged"]
    spread = table(["criteria met", "runs"], bands, "How close the runs came") if len(runs) > 4 else ""
    return f"<h2>Runs</h2>{spread}" + table(head, rows, "", (0, 1, 2))


def _items_table(items: Sequence[Item]) -> str:
    flagged = [(item, flags) for item in items if (flags := [f for f in item.flags() if f != "always passes"])]
    always = sum("always passes" in item.flags() for item in items)
    rows = [
        [Markup(f"{escape(item.title)}<small>{escape(item.task)} {escape(item.criterion)}</small>"),
         ", ".join(flags), f"{item.passes} of {item.verdicts}", percent(item.split, 0),
         "\u2013" if item.discrimination is None else f"{item.discrimination:+.2f}", item.rubric]
        for item, flags in flagged
    ]  # fmt: skip
    if not rows:
        return ""
    head = ["criterion", "what is odd", "passes", "judges split", "correlation", "rubric hash"]
    told = (f'<p class="faint">Seen in three runs or more. Candidates for a quarantine list, to be read by a person; '
            f"{count(always, 'criterion').replace('criterions', 'criteria')} always passed.</p>")  # fmt: skip
    return f"<h2>Criteria to look at</h2>{told}" + table(head, rows, "", (0, 1))


def _share(run: ScoredRun) -> float | None:
    scored = [verdict.passed for verdict in run.verdicts if verdict.passed is not None]
    return sum(scored) / len(scored) if scored else None


def _name(run: ScoredRun) -> str:
    return run.system or UNNAMED
