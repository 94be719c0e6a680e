"""What the verbs of `still judges` do."""

from __future__ import annotations

import argparse
import asyncio
import csv
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .agreement import JudgeComparison, Rates, compare_judges
from .page_parts import dollars, few_tasks
from .questions import write_text
from .scored import Rubrics, RunFolders, ScoredRun, graded_by, judges_of, load_runs
from .stats import Interval, for_json


def compare(args: argparse.Namespace) -> int:
    """Print the study's table, and write what was asked for."""
    found, _ = comparisons(args)
    print(f"reference: {found[0].reference}, {found[0].runs} runs, per 1,000 criteria {dollars(found[0].costs[0])}")
    for each in found:
        rates = each.rates
        print(f"\n{each.candidate}: {len(rates.pairs)} criteria, per 1,000 {dollars(each.costs[1])}")
        kappa = rates.kappa
        told = f"{kappa.estimate:.3f} ({kappa.low:.3f} to {kappa.high:.3f})" if kappa else "not defined"
        counts = rates.counts
        print(f"  agreement   {_rate(rates.agreement)}\n  kappa       {told}")
        print(f"  false pass  {_rate(rates.false_pass)}  {counts['false_pass']} of "
              f"{counts['false_pass'] + counts['both_fail']}")  # fmt: skip
        print(f"  false fail  {_rate(rates.false_fail)}  {counts['false_fail']} of "
              f"{counts['false_fail'] + counts['both_pass']}")  # fmt: skip
        print(f"  McNemar p   {'< 0.0001' if rates.mcnemar < 1e-4 else f'{rates.mcnemar:.4f}'}")
        for kind, part in each.by_kind.items():
            print(f"  {kind:11} {_rate(part.agreement)}  false pass {_rate(part.false_pass)}  of {len(part.pairs)}")
        if sum(each.unscored) or each.unpaired or each.only_one:
            print(f"  left out: {each.unscored[0]} and {each.unscored[1]} unscored, {each.unpaired} without a "
                  f"counterpart; {each.only_one} runs graded by one alone")  # fmt: skip
        for task, part in list(each.by_task.items())[:5]:
            wrong = part.counts["false_pass"], part.counts["false_fail"]
            if any(wrong):
                print(f"  {task}: {wrong[0]} false passes, {wrong[1]} false fails of {len(part.pairs)}")
        for warning in (*each.warnings, few_tasks(len(each.by_task))):
            if warning:
                print(f"  note: {warning}")
    if args.html:
        from .pages_judges import judges_page

        write_text(args.html, judges_page(found))
    if args.figure:
        from .pages_judges import figure_of

        svg = figure_of(found)
        if not svg:
            raise ValueError("the figure needs what the candidates' verdicts cost, and these files do not say")
        write_text(args.figure, svg)
    if args.json:
        numbers = for_json([_comparison_json(each) for each in found])
        write_text(args.json, json.dumps(numbers, indent=1, ensure_ascii=False))
    return 0


def report(args: argparse.Namespace) -> int:
    """Write a page for each run, one across them, and all numbers."""
    from .dual import file_name
    from .pages import run_page
    from .pages_across import runs_page
    from .quarantine import Quarantine
    from .summary import overview

    rubrics = Rubrics(args.task)
    runs = load_named(args.paths, rubrics, RunFolders(args.runs))
    quarantine = Quarantine.load(args.quarantine) if args.quarantine else Quarantine()
    links: dict[int, str] = {}
    for index, run in enumerate(runs):
        name = file_name("-".join(part for part in (run.system, run.task, run.judge) if part))[:120]
        links[index] = f"runs/{index + 1:04d}-{name}.html"
        write_text(args.output / links[index], run_page(run, rubrics.find(run.task)))
    found = overview(runs, quarantine, args.seed)
    notes = [f"Quarantine entry {e.task} {e.criterion} took no effect: {why}." for e, why in quarantine.unused(runs)]
    write_text(args.output / "index.html", runs_page(runs, found, rubrics, links, notes))
    numbers = [each.to_json() for each in found]
    write_text(args.output / "numbers.json", json.dumps(for_json(numbers), indent=1, ensure_ascii=False))
    for each in found:
        for system, scores in each.systems.items():
            official = scores.official
            whole = f"{official.all_passed} of {official.runs} runs pass whole"
            open_ = f", {official.unscored} unscored" if official.unscored else ""
            print(f"{system} by {each.judge}: {whole}, criteria {_rate(official.micro)}{open_}")
    print(f"{len(runs)} runs: {args.output / 'index.html'}")
    return 0


def items(args: argparse.Namespace) -> int:
    """Print item statistics as CSV; exit code 0 whatever they say."""
    from .quarantine import candidates, item_statistics

    found = item_statistics(load_named(args.paths, Rubrics(args.task), RunFolders(args.runs)))
    if args.candidates:
        suspects = candidates(found, args.least)
        suspects.save(args.candidates)
        print(f"{len(suspects.entries)} criteria to go through are in {args.candidates}", file=sys.stderr)
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["task", "criterion", "rubric", "kind", "runs", "verdicts", "passes", "unscored", "judges_split",
                  "correlation", "flags", "title"])  # fmt: skip
    for item in sorted(found, key=lambda item: (not item.flags(args.least), item.task, item.criterion)):
        numbers = ["" if value is None else f"{value:.3f}" for value in (item.split, item.discrimination)]
        out.writerow([item.task, item.criterion, item.rubric, item.kind, item.runs, item.verdicts, item.passes,
                      item.unscored, *numbers, "; ".join(item.flags(args.least)), item.title])  # fmt: skip
    return 0


def correct(args: argparse.Namespace) -> int:
    """Print the judge's rate, and the rate by the labels."""
    from .corrections import audited, corrected_rate, label_pairs

    runs = load_named(args.paths, Rubrics(args.task), RunFolders(args.runs))
    judge = judges_of(runs)
    if len(judge) > 1:
        raise ValueError(f"the runs were graded by {', '.join(judge)}; name files of one judge")
    if args.labels:
        sample = label_pairs(runs, load_named(args.labels, Rubrics(args.task)))
        judged = [(run.task, bool(v.passed)) for run in runs for v in run.verdicts if v.passed is not None]
    else:
        judged, sample = audited(runs)
    if not sample:
        raise ValueError("no criterion has both a verdict and a label; name --labels of the same runs, or runs that a "
                         "cascade audited")  # fmt: skip
    found = corrected_rate(judged, sample, args.method)
    print(f"judge's own rate  {100 * found.raw:.1f} % of {len(judged)} criteria")
    print(f"by the labels     {_rate(found.interval)}  ({found.interval.method})")
    shares = [
        f"{100 * each:.1f} %" if each is not None else "not known" for each in (found.sensitivity, found.specificity)
    ]
    print(f"on the sample     passes {shares[0]} of what the labels pass, fails {shares[1]} of what they fail")
    return 0


def cost(args: argparse.Namespace) -> int:
    """Print what judging comes to."""
    from .bill import Workload, estimate, observed
    from .prices import Prices

    load = Workload(**{name: getattr(args, name) for name in vars(Workload())})
    print(f"{load.outputs:,} outputs, {load.verdicts:,} verdicts of {load.criteria} criteria a task")
    if args.scores:
        runs = load_named(args.scores)
        for judge in judges_of(runs):
            bill = observed(load, graded_by(runs, judge))
            print(f"{judge}: {_tokens(bill.tokens)}, {dollars(bill.dollars)} ({dollars(bill.per_thousand)} per 1,000), "
                  "as seen in the graded runs")  # fmt: skip
        return 0
    prices = Prices.load(args.prices)
    names = args.judge or sorted(prices.table)
    if missing := [name for name in names if prices.find(name) is None]:
        raise ValueError(f"the price table has no {', '.join(missing)}; add them to a file of your own (--prices FILE)")
    sizes = [0 if size == "all" else int(size) if size.isdigit() else -1 for size in args.criteria_per_call]
    print(f"\n{'US dollars':28}" + "".join(f"{f'{size or load.criteria} a call':>26}" for size in sizes))
    for name in names:
        cells = []
        for size in sizes:
            plain, cached = (estimate(load, prices.find(name), size, how).dollars for how in (False, True))
            cells.append(f"{dollars(cached)} ({dollars(plain)})")
        print(f"{name:28}" + "".join(f"{cell:>26}" for cell in cells))
    print("\nWith the server's prefix cache; in brackets without. Reasoning tokens are not in it.")
    return 0


def export(args: argparse.Namespace) -> int:
    """Write rows."""
    from .export import export_rows, save_rows
    from .prompting import load_prompt
    from .splits import Split

    found, runs = comparisons(args)
    if len(found) > 1:
        raise ValueError(
            f"there are several judges: {', '.join(e.candidate for e in found)}; choose one by --candidate"
        )
    if bool(args.split) != bool(args.side):
        raise ValueError("--split and --side go together: the file, and the side whose tasks are exported")
    tasks = side_of(Split.load(args.split), args.side) if args.split else None
    done = export_rows(found[0], runs, Rubrics(args.task), load_prompt(args.prompt), args.agreements, args.seed, tasks)
    save_rows(args.output, done.rows)
    wrong = sum(row["label"] != row["candidate_label"] for row in done.rows)
    print(f"{len(done.rows)} rows, {wrong} of them disagreements, are in {args.output}")
    for why, number in done.left_out.items():
        print(f"left out: {number}, because {why}")
    return 0


def tune(args: argparse.Namespace) -> int:
    """Tune a prompt; exit code 0 if an edit was kept, 1 if none."""
    from .judges import find_judge, load_judges
    from .prices import Prices
    from .splits import Split, split_tasks
    from .tasks_command import load_tasks
    from .tune import TuneConfig, Tuner
    from .verdict_store import VerdictStore, default_store

    tasks = {task.id: task for task in load_tasks(args.task)}
    runs = load_named(args.paths, Rubrics(args.task), RunFolders(args.runs))
    reference = args.reference or judges_of(runs)[0]
    runs = graded_by(runs, reference)
    judged = [tasks[name] for name in sorted({run.task for run in runs}) if name in tasks]
    split = Split.load(args.split) if args.split else split_tasks(judged, {"tuning": 0.5, "held_out": 0.5}, args.seed)
    held_out, tuning = side_of(split, args.side), side_of(split, tuning_side(split, args))
    table = load_judges(args.judges) if args.judges else {}
    judge, proposer = find_judge(args.judge, table), find_judge(args.proposer, table)
    config = TuneConfig(**{name: getattr(args, name) for name in vars(TuneConfig())})

    async def whole() -> Any:
        with VerdictStore(args.cache or default_store()) as store:
            tuner = Tuner(judge, proposer, runs, tasks, sorted(tuning), sorted(held_out), args.output, config, store,
                          Prices.load(args.prices), lambda line: print(line, flush=True))  # fmt: skip
            try:
                return await tuner.tune()
            finally:
                await judge.aclose()
                await proposer.aclose()

    found = asyncio.run(whole())
    kept = sum(edit["kept"] for each in found.rounds for edit in each["edits"])
    print(f"{kept} edits kept against {reference}; {found.stopped}; the prompt is {args.output / 'prompt.md'}")
    return 0 if kept else 1


def comparisons(args: argparse.Namespace) -> tuple[list[JudgeComparison], list[ScoredRun]]:
    """Each candidate against the reference, and all runs.

    Raises:
        ValueError: there is only one judge, or a name that nobody has.
    """
    rubrics = Rubrics(args.task)
    folders = RunFolders(args.runs)
    sides = [load_named([path], rubrics, folders) for path in args.paths]
    runs = [run for side in sides for run in side]
    reference = args.reference or judges_of(sides[0])[0]
    others = args.candidate or [judge for judge in judges_of(runs) if judge != reference]
    if not others:
        raise ValueError(f"all of these runs were graded by {reference!r} alone; name runs that another judge graded")
    first = graded_by(runs, reference)
    return [compare_judges(first, graded_by(runs, judge), args.seed) for judge in others], runs


def load_named(
    paths: Sequence[str | Path], rubrics: Rubrics | None = None, folders: RunFolders | None = None
) -> list[ScoredRun]:
    """Runs of each path; NAME=PATH names the system that made them, whatever their files say."""
    runs: list[ScoredRun] = []
    for path in map(str, paths):
        name, equals, rest = path.partition("=")
        named = bool(equals) and not Path(path).exists()
        found = load_runs([rest if named else path], rubrics, folders)
        runs += [dataclasses.replace(run, system=name) for run in found] if named else found
    return runs


def tuning_side(split: Any, args: argparse.Namespace) -> str:
    """The side that is tuned on: the one named, else the only other one, so that a test side is never looked at.

    Raises:
        ValueError: there are several others and none is named.
    """
    others = [side for side in split.sides if side != args.side]
    if args.tuning_side or len(others) == 1:
        return args.tuning_side or others[0]
    raise ValueError(f"the split has the sides {', '.join(split.sides)}; say with --tuning-side which one to tune on")


def side_of(split: Any, side: str) -> set[str]:
    """The tasks of one side.

    Raises:
        ValueError: the split has no such side.
    """
    if side not in split.sides:
        raise ValueError(f"the split has no side {side!r}; it has {', '.join(split.sides)}")
    return set(split.sides[side])


def _comparison_json(each: JudgeComparison) -> dict[str, Any]:
    words = {True: "pass", False: "fail", None: "unknown"}
    return {
        "reference": each.reference, "candidate": each.candidate, "runs": each.runs,
        "unscored": list(each.unscored), "unpaired": each.unpaired, "only_one": each.only_one,
        "cost_per_thousand": list(each.costs), "warnings": list(each.warnings),
        "all_pass": {f"{words[a]}/{words[b]}": number for (a, b), number in each.all_pass.items()},
        **_rates_json(each.rates),
        "by_kind": {kind: _rates_json(part) for kind, part in each.by_kind.items()},
        "by_task": {task: _rates_json(part) for task, part in each.by_task.items()},
        "disagreements": [
            {"task": p.task, "run_id": p.run_id, "criterion": p.reference.id, "rubric": p.rubric, "kind": p.kind,
             "reference": p.reference.label, "candidate": p.candidate.label}
            for p in each.disagreements
        ],
    }  # fmt: skip


def _rates_json(rates: Rates) -> dict[str, Any]:
    found = {name: getattr(rates, name) for name in ("agreement", "kappa", "false_pass", "false_fail")}
    return {
        "criteria": len(rates.pairs), "counts": rates.counts, "mcnemar_p": rates.mcnemar,
        **{name: dataclasses.asdict(value) if value else None for name, value in found.items()},
    }  # fmt: skip


def _rate(found: Interval | None) -> str:
    if found is None:
        return "not defined"
    return f"{100 * found.estimate:5.1f} % ({100 * found.low:.1f} to {100 * found.high:.1f})"


def _tokens(tokens: Any) -> str:
    return f"{tokens.input:,} tokens in ({tokens.cached:,} cached), {tokens.output:,} out, {tokens.calls:,} calls"
