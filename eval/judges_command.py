"""`still judges`: the arguments of its verbs. What they do is in `judges_verbs.py`, loaded when one runs."""

from __future__ import annotations

import argparse
from pathlib import Path


class Judges:
    """`still judges`: measure judges on graded runs, and make a cheap one better."""

    help = "Compare judges on graded runs: agreement, error rates, cost; reports; prompt tuning"
    description = """\
Everything here starts from graded runs: folders of scores.json, LAB's or those of `still grade`. A path may be given as
NAME=PATH to name the system that made its runs."""
    examples = """\
examples:
  still judges compare graded/opus graded/deepseek graded/mini --task tasks/ --html judges.html
  still judges compare results/ --reference claude-sonnet-4-6          (several judges in one folder)
  still judges report results/ --task tasks/ --output report/
  still judges report A=runs/a B=runs/b --quarantine quarantine.json --output report/
  still judges items results/ --task tasks/ --candidates quarantine.json
  still judges correct results/cheap --labels labels/ --method prediction-powered
  still judges cost --tasks 100 --rollouts 8 --steps 200 --judge claude-sonnet-4-6,deepseek-v4-flash
  still judges export graded/opus graded/deepseek --task tasks/ --output rows.jsonl
  still judges tune graded/opus --task tasks/ --judge deepseek-v4-flash --proposer gpt-5.5 --output tuned/"""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the verbs."""
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
        compare = verbs.add_parser("compare", help="agreement, kappa, false passes and fails, cost, by kind and task",
            description="Hold judges against a reference on the runs that both graded.")  # fmt: skip
        _two_sides(compare, "every other judge of the paths")
        compare.add_argument("--html", type=Path, metavar="FILE", help="write the report with every disagreement")
        compare.add_argument("--figure", type=Path, metavar="FILE", help="write cost against disagreement as SVG")
        compare.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")

        report = verbs.add_parser("report", help="HTML: one page a run, and one across runs",
            description="Write index.html across all runs, and a page for each run that it links to.")  # fmt: skip
        _runs(report)
        report.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where the pages go")
        report.add_argument("--quarantine", type=Path, metavar="FILE", help="criteria that a second score leaves out")
        report.add_argument("--seed", type=int, default=0, help="of the bootstrap over tasks (default: 0)")

        items = verbs.add_parser("items", help="criteria that never or always pass, split judges, or look wrong",
            description="Statistics of each criterion over runs and judges, as CSV on stdout.")  # fmt: skip
        _runs(items)
        items.add_argument("--candidates", type=Path, metavar="FILE",
            help="write a quarantine list of what looks at fault, for a person to go through")  # fmt: skip
        items.add_argument(
            "--least", type=int, default=3, metavar="N", help="runs before anything is said (default: 3)"
        )

        correct = verbs.add_parser("correct", help="a judge's pass rate, corrected by labels on a sample",
            description="What the pass rate would be by the labels, with an honest interval.")  # fmt: skip
        _runs(correct)
        correct.add_argument("--labels", type=Path, action="append", metavar="PATH",
            help="graded runs whose judge is right: people's labels, or a strong judge's; left out, the audit sample "
            "of a cascade's runs is taken")  # fmt: skip
        correct.add_argument("--method", choices=["prediction-powered", "rogan-gladen"], default="prediction-powered",
            help="the first wants a random sample of these runs' criteria (default: prediction-powered)")  # fmt: skip

        cost = verbs.add_parser("cost", help="what judging will cost, up to a whole training run",
            description="Extrapolate a bill from the price table, or from graded runs.")  # fmt: skip
        _workload(cost)
        cost.add_argument("--judge", type=_listed, metavar="NAME,...", help="models of the price table (default: all)")
        cost.add_argument("--criteria-per-call", type=_listed, default=["1", "4", "8", "16", "all"], metavar="K,...",
            help="default: 1,4,8,16,all")  # fmt: skip
        cost.add_argument("--prices", type=Path, metavar="FILE", help="a TOML table of prices, added to ours")
        cost.add_argument("--scores", type=Path, action="append", metavar="PATH",
            help="graded runs: extrapolate from what their verdicts took instead")  # fmt: skip

        export = verbs.add_parser("export", help="disagreements as rows to fine-tune a judge on",
            description="Write chats as JSON lines: a judge's prompt, and the reference's verdict.")  # fmt: skip
        _two_sides(export, "the other judge", required=True)
        export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the JSONL file to write")
        export.add_argument(
            "--prompt", default="checklist", metavar="NAME|FILE", help="to train for (default: checklist)"
        )
        export.add_argument("--agreements", type=float, default=1.0, metavar="X",
            help="random agreements for each disagreement (default: 1)")  # fmt: skip
        _split(export, "the side whose tasks are exported")

        tune = verbs.add_parser("tune", help="let a model edit a judge's prompt; held-out tasks decide",
            description="Keep an edit only if false passes fall on held-out tasks, by an interval.")  # fmt: skip
        _runs(tune, "graded by the reference judge", required=True)
        tune.add_argument("--judge", required=True, metavar="NAME", help="the judge to tune, as `still grade` names it")
        tune.add_argument("--proposer", required=True, metavar="NAME", help="the model that proposes edits, likewise")
        tune.add_argument(
            "-o", "--output", type=Path, required=True, metavar="DIR", help="for prompt.md, log.json and versions"
        )
        tune.add_argument("--reference", metavar="NAME", help="the reference, where the runs have several judges")
        tune.add_argument("--judges", type=Path, metavar="FILE", help="a TOML table of judges, as for `still grade`")
        tune.add_argument("--prices", type=Path, metavar="FILE", help="a TOML table of prices, added to ours")
        tune.add_argument(
            "--cache", type=Path, metavar="FILE", help="where verdicts are kept (default: the user's cache)"
        )
        _split(tune, "the side that decides", "held_out")
        tune.add_argument(
            "--tuning-side", metavar="NAME", help="the side that cases come from (default: the other one)"
        )
        _tuning(tune)

    def run(self, args: argparse.Namespace) -> int:
        """Do what the verb says."""
        from . import judges_verbs

        return getattr(judges_verbs, args.verb)(args)


def _runs(parser: argparse.ArgumentParser, what: str = "", required: bool = False) -> None:
    told = f"graded runs: files of scores, or folders that hold them{', ' + what if what else ''}"
    parser.add_argument("paths", nargs="+", metavar="PATH", help=told)
    _places(parser, required)


def _places(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--task", type=Path, action="append", default=[], required=required, metavar="PATH",
        help="folders of tasks: for wordings, kinds and hashes of criteria")  # fmt: skip
    parser.add_argument("--runs", type=Path, action="append", default=[], metavar="DIR",
        help="the runs themselves, where scores were written elsewhere (still grade --output)")  # fmt: skip


def _two_sides(parser: argparse.ArgumentParser, others: str, required: bool = False) -> None:
    told = "graded runs: the reference's, then those of each candidate; or one folder with the files of several judges"
    parser.add_argument("paths", nargs="+", metavar="PATH", help=told)
    _places(parser, required)
    parser.add_argument("--reference", metavar="NAME", help="the reference judge (default: the first one)")
    parser.add_argument("--candidate", action="append", metavar="NAME", help=f"default: {others}")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default: 0)")


def _split(parser: argparse.ArgumentParser, what: str, side: str | None = None) -> None:
    parser.add_argument("--split", type=Path, metavar="FILE", help="of `still tasks split`"
        + ("; left out, half of the tasks decide" if side else ""))  # fmt: skip
    parser.add_argument("--side", default=side, metavar="NAME", help=what + (f" (default: {side})" if side else ""))


def _workload(parser: argparse.ArgumentParser) -> None:
    from .bill import Workload

    helps = {
        "tasks": "different tasks", "rollouts": "outputs of each task in a step", "steps": "training steps",
        "criteria": "of a task", "deliverable_tokens": "that a criterion is judged on",
        "instruction_tokens": "at the end of a prompt", "criterion_tokens": "title and wording",
        "verdict_tokens": "reason, quotations and label", "repeats": "verdicts on each criterion",
    }  # fmt: skip
    for name, default in vars(Workload()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{helps[name]} (default: {default})")


def _tuning(parser: argparse.ArgumentParser) -> None:
    from .tune import TuneConfig

    helps = {
        "prompt": "to start from: checklist, plain, or a file", "rounds": "at most", "edits": "asked for in a round",
        "cases": "shown in a round", "allowed_false_fails": "rise that is allowed on held-out tasks, as a share",
        "confidence": "that false passes have fallen, over all rounds", "criteria_per_call": "of the judge; 0 is all",
        "max_cost": "US dollars for the judge", "max_tokens": "tokens for the judge", "seed": "of the choice of cases",
    }  # fmt: skip
    kinds = {"max_cost": float, "max_tokens": int}
    for name, default in vars(TuneConfig()).items():
        kind = kinds.get(name, type(default))
        told = f"{helps[name]} (default: {'no limit' if default is None else default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=told)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
