"""`still grade`: runs in, `scores.json` out. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .grade import Grader
    from .grading import Grading
    from .tasks import LabTask
    from .verdicts import CriterionVerdict

STOPPED, UNSCORED = 3, 1


class Grade:
    """`still grade`: judge what runs delivered against their tasks' rubrics."""

    help = "Grade runs against LAB rubrics with any judge: scores.json, verdict by verdict, resumable."
    description = """\
Judge the deliverables of one run or of many against the rubrics of their tasks, and write LAB's scores.json into each
run folder. Verdicts are kept by content: run the same command again and only what is missing is asked.
Exit code 0: every criterion has a verdict. 1: some are unscored, or a run has not ended. 3: stopped (budget, key,
model); go on by running it again."""
    examples = """\
examples:
  still grade runs/7 --task tasks/real-estate/review-lease --judge gpt-5.5
  still grade results/ --task tasks/ --judge Qwen/Qwen3-32B@http://localhost:8000/v1 --criteria-per-call 8
  still grade results/ --task tasks/ --judge gpt-5.5 --judge claude-sonnet-4-6 --rule mean
  still grade results/ --task tasks/ --judge deepseek-v4-flash --prompt checklist --strong claude-opus-4-8 --max-cost 20
  still grade runs/7 --task tasks/real-estate/review-lease --judge exact          (synthetic matters, no calls)
  still grade report results/ --task tasks/ --output report/                      (HTML, a page a run and one for all)

Keys are read from the environment alone (OPENAI_API_KEY, ANTHROPIC_API_KEY, GEMINI_API_KEY, ...)."""
    resume = "every verdict so far is kept; run the same command again to go on"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        from .ensemble import RULES
        from .grade import GradeConfig

        defaults = {field.name: field.default for field in fields(GradeConfig)}
        add = parser.add_argument
        add(
            "runs",
            nargs="+",
            type=Path,
            metavar="RUN",
            help="a run folder, a folder of outputs, or one that holds runs",
        )
        add("--task", type=Path, metavar="PATH",
            help="the task's folder, or a folder of tasks in which each run's task is found by its id")  # fmt: skip
        add("--judge", action="append", metavar="NAME",
            help="exact, MODEL@http://HOST:PORT/v1, a model of a known provider, or a name from --judges; "
            "several make an ensemble")  # fmt: skip
        add("--rule", choices=RULES, default="mean", help="how several judges are joined (default: mean)")
        add("--strong", metavar="NAME", help="a second, better judge, asked where it can change the result")
        add(
            "--policy",
            choices=["all-pass", "rates"],
            default="all-pass",
            help="what --strong is asked (default: all-pass)",
        )
        add("--most-fails", type=int, default=3, metavar="N", help="all-pass: more cheap fails end it (default: 3)")
        add("--audit", type=float, default=0.05, metavar="X", help="share that goes to both judges (default: 0.05)")
        add("--judges", type=Path, metavar="FILE", help="a TOML table of judges: endpoints, parameters, limits")
        add("--prices", type=Path, metavar="FILE", help="a TOML table of prices, added to ours")
        add("--cache", type=Path, metavar="FILE", help="where verdicts are kept (default: the user's cache folder)")
        add("--no-cache", action="store_true", help="keep no verdicts: everything is asked afresh")
        add(
            "--prompt",
            default=defaults["prompt"],
            metavar="NAME|FILE",
            help="plain, checklist, or a file (default: plain)",
        )
        add("--criteria-per-call", type=_per_call, default=1, metavar="K", help="1, 4, 8, ... or all (default: 1)")
        add("--repeats", type=int, default=1, metavar="N", help="verdicts a judge, joined by majority (default: 1)")
        add("--seed", type=int, default=0, metavar="N", help="of the order in repeats and of the audit (default: 0)")
        add(
            "--prime",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="fill the prefix cache with one call first",
        )
        add("--reasks", type=int, default=2, metavar="N", help="how often useless answers are asked again (default: 2)")
        for state in ("missing", "empty", "unreadable"):
            add(f"--{state}", choices=["fail", "unscored", "judge"], default="fail",
                help=f"what a criterion gets whose deliverables are {state} (default: fail)")  # fmt: skip
        add("--names", choices=["exact", "closest"], default="exact",
            help="closest: take a misnamed output for a missing one, as LAB does (default: exact)")  # fmt: skip
        add("--max-cost", type=float, metavar="X", help="US dollars; a run that reaches them stops cleanly")
        add("--max-tokens", type=int, metavar="N", help="tokens, input and output; the same")
        add("-o", "--output", type=Path, metavar="DIR", help="where scores go (default: into each run folder)")
        add("--dry-run", action="store_true", help="say what would be asked and what that may cost, and ask nothing")
        add("--quiet", action="store_true", help="no progress bar")

    def run(self, args: argparse.Namespace) -> int:
        """Grade, and print a line for each run; `report` in place of the first run writes pages instead."""
        if args.runs[0] == Path("report"):
            return report(args)
        if not args.judge or not args.task:
            raise ValueError(
                f"give {'--task PATH' if args.judge else '--judge NAME'}; `still grade --help` has examples"
            )
        from .cascade import Cascade
        from .deliverables import unfinished
        from .ensemble import Ensemble
        from .grade import GradeConfig, Grader
        from .judges import find_judge, load_judges
        from .prices import Prices
        from .verdict_store import VerdictStore, default_store

        self.resume = "" if args.no_cache else Grade.resume
        found = {run: path for path in args.runs for run in find_runs(path)}
        left = {run: why for run in found if (why := unfinished(run.parent if run.name == "output" else run))}
        for run, why in left.items():
            print(f"{run}: left out, this run has not ended ({why}); go on with it, then grade it", file=sys.stderr)
            del found[run]
        jobs = [(load_task_of(run, args.task), run) for run in found]
        places = targets(found, args.output)
        table = load_judges(args.judges) if args.judges else {}
        judges = [find_judge(name, table) for name in args.judge]
        judge: Any = judges[0] if len(judges) == 1 else Ensemble(tuple(judges), args.rule)
        if args.strong:
            strong = find_judge(args.strong, table)
            judge = Cascade(judge, strong, args.policy, args.most_fails, audit=args.audit, seed=args.seed)
        config = GradeConfig(**{field.name: getattr(args, field.name) for field in fields(GradeConfig)})
        bar = Bar(on=not args.quiet and sys.stderr.isatty())
        gradings: list[Tally] = []

        def done(grading: Grading, run: Path) -> None:
            written = grading.save(places[run])
            gradings.append(Tally(grading))
            bar.write(f"{written}: {grading.scores()['summary']}{price(grading.cost)}")

        async def whole() -> None:
            where = ":memory:" if args.no_cache else args.cache or default_store()
            with VerdictStore(where) as store:
                grader = Grader(
                    judge, config, store=store, prices=Prices.load(args.prices), told=bar.told, planned=bar.planned
                )
                async with grader:
                    if args.dry_run:
                        bar.write(plan(grader, jobs))
                        return
                    await grader.grade_all(((task, run, run_id(run)) for task, run in jobs), done)

        try:
            asyncio.run(whole())
        finally:
            bar.close()
        if args.dry_run:
            return 0
        print(total(gradings))
        return (
            STOPPED
            if any(each.stopped for each in gradings)
            else UNSCORED if left or any(e.unscored for e in gradings) else 0
        )


def report(args: argparse.Namespace) -> int:
    """`still grade report RUN ...`: HTML of runs that are graded, as `still judges report` writes it.

    Raises:
        ValueError: no run is named.
    """
    from .judges_command import Judges

    if not args.runs[1:]:
        raise ValueError("name the graded runs: still grade report RUN ... --output DIR")
    words = ["report", *map(str, args.runs[1:]), "--output", str(args.output or "report"), "--seed", str(args.seed)]
    words += ["--task", str(args.task)] if args.task else []
    parser = argparse.ArgumentParser()
    Judges().configure(parser)
    return Judges().run(parser.parse_args(words))


def plan(grader: Grader, jobs: Sequence[tuple[LabTask, Path]]) -> str:
    """A line for each judge: what it would be asked about all runs, and what that may cost."""
    from .planning import Estimate

    found = dict.fromkeys(grader.leaves, Estimate())
    for task, run in jobs:
        for name, one in grader.plan(task, run).items():
            found[name] += one
    strong = "; the strong judge is counted as if it were asked everything" if hasattr(grader.judge, "strong") else ""
    lines = [f"{len(jobs)} runs, nothing is asked{strong}"]
    for name, one in found.items():
        line = (
            f"{name}: {one.criteria} verdicts, {one.without_call} without a call, {one.cached} from the cache, "
            f"{one.calls} calls; about {one.input_tokens:,} tokens in ({one.prefix_tokens:,} of them in shared "
            f"beginnings) and {one.output_tokens:,} out"
        )
        known = grader.askers[name].price if name in grader.askers else None
        if known:
            plain, cached = one.dollars(known)
            line += f"; about ${plain:.2f}, ${cached:.2f} with a prefix cache"
        lines.append(line)
    return "\n".join(lines)


class Tally:
    """What the last lines need of a grading, so that many runs keep no texts in memory."""

    def __init__(self, grading: Grading):
        from .verdicts import Tokens, count_states

        self.passed, self.unscored, self.criteria = grading.n_passed, grading.n_unscored, len(grading.verdicts)
        self.all_pass, self.stopped, self.cost = grading.all_pass, grading.stopped, grading.cost
        self.states = count_states(grading.verdicts)
        self.reasons = Counter(each.reason for each in grading.verdicts if each.label == "unscored")
        judges = [each for each in grading.judging["judges"].values() if "tokens" in each]
        self.tokens = sum((Tokens(**each["tokens"]) for each in judges), Tokens())
        self.fresh = sum(each["fresh_verdicts"] for each in judges)
        self.cached = sum(each["cached_verdicts"] for each in judges)


class Bar:
    """A progress bar with the running pass rate and cost, on stderr; it counts every judge's verdicts."""

    def __init__(self, on: bool):
        from tqdm import tqdm

        self.bar = tqdm(total=0, unit=" verdicts", disable=not on, dynamic_ncols=True, smoothing=0.05)
        self.passed = self.scored = self.unscored = 0
        self.cost: float | None = 0.0

    def planned(self, count: int) -> None:
        """So many verdicts more are under way."""
        self.bar.total += count
        self.bar.refresh()

    def told(self, verdict: CriterionVerdict) -> None:
        """One is final."""
        self.passed += verdict.label == "pass"
        self.unscored += verdict.label == "unscored"
        self.scored += verdict.label != "unscored"
        if not verdict.cached:
            self.cost = None if verdict.cost is None or self.cost is None else self.cost + verdict.cost
        rate = f"{100 * self.passed / self.scored:.1f} % pass" if self.scored else "no verdict yet"
        unscored = f", {self.unscored} unscored" if self.unscored else ""
        self.bar.set_postfix_str(f"{rate}{unscored}{price(self.cost)}", refresh=False)
        self.bar.update()

    def write(self, line: str) -> None:
        """A line on stdout, above the bar."""
        from tqdm import tqdm

        with tqdm.external_write_mode(sys.stdout):
            print(line, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def find_runs(path: Path) -> list[Path]:
    """The run folders at or below a path; a folder that is neither a run nor holds one is taken for outputs.

    Raises:
        FileNotFoundError: the path is not there.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}; name a run folder, or one that holds runs")
    if (path / "output").is_dir() or _is_run(path):
        return [path]
    below = {file.parent for name in ("config.json", "metrics.json") for file in path.rglob(name)}
    below |= {folder.parent for folder in path.rglob("output") if folder.is_dir()}
    runs = sorted(each for each in below if not _inside_a_run(each, below))
    return runs or [path]


def load_task_of(run: Path, root: Path) -> LabTask:
    """The task of a run: the one at `root`, or the one below it that the run's own files name.

    Raises:
        FileNotFoundError: `root` is not there.
        ValueError: the run does not say which task it is of, or that one is not below `root`.
    """
    from .tasks import load_task

    if root.is_file() or (root / "task.json").is_file():
        return load_task(root)
    named = next((each for each in (_told_task(run / name) for name in _NAMES_TASK) if each), None)
    if named is None:
        raise ValueError(f"{run} does not say which task it is of (config.json: task); name the task's own folder")
    if not root.exists():
        raise FileNotFoundError(f"{root} is not there; name the task's folder, or one above it")
    for base in (root, root / "tasks"):
        if (base / named / "task.json").is_file():
            return load_task(base / named, base)
    raise ValueError(f"{run} is of task {named!r}, which is not below {root}; name the folder that ids are relative to")


_NAMES_TASK = ("config.json", "scores.json", "status.json")


def _told_task(file: Path) -> str | None:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    named = known.get("task") or known.get("task_id") if isinstance(known, dict) else None
    return named if isinstance(named, str) else None


def targets(runs: Mapping[Path, Path], output: Path | None) -> dict[Path, Path]:
    """The folder that each run's scores go to.

    Args:
        runs: each run, and the path that it was found at or below.
        output: of all; None for the runs' own folders.

    Raises:
        ValueError: scores of two runs would go to one place, or one is a bare folder of outputs, where a scores file
            would be taken for one.
    """
    several = len(set(runs.values())) > 1
    found = {run: target(run, output, given, several) for run, given in runs.items()}
    taken: dict[Path, Path] = {}
    for run, folder in found.items():
        if (other := taken.setdefault(folder.resolve(), run)) != run:
            raise ValueError(f"scores of {other} and of {run} would both go to {folder}; grade them one by one")
    return found


def target(run: Path, output: Path | None, given: Path, several: bool) -> Path:
    """The folder that a run's scores go to, which was found at or below `given`, one of `several` or the only one."""
    if output:
        below = run.relative_to(given)
        return output / given.resolve().name / below if several else output / below
    if run.name == "output" and not (run / "output").is_dir():
        return run.parent
    if not (run / "output").is_dir() and not _is_run(run):
        raise ValueError(f"{run} is a folder of outputs and no run; say with --output where its scores go")
    return run


def run_id(run: Path) -> str:
    """What the run calls itself, else its folder's name."""
    try:
        known = json.loads((run / "config.json").read_text(encoding="utf-8")).get("run_id")
    except (OSError, ValueError, AttributeError):
        known = None
    folder = run.resolve()
    return known if isinstance(known, str) and known else (folder.parent if folder.name == "output" else folder).name


def total(gradings: Sequence[Tally]) -> str:
    """The last lines: what all runs came to."""
    from .verdicts import Tokens

    criteria, passed = sum(each.criteria for each in gradings), sum(each.passed for each in gradings)
    unscored = sum(each.unscored for each in gradings)
    states: dict[str, int] = {}
    for each in gradings:
        for state, count in each.states.items():
            states[state] = states.get(state, 0) + count
    tokens = sum((each.tokens for each in gradings), Tokens())
    costs = [each.cost for each in gradings]
    rate = f"{100 * passed / (criteria - unscored):.1f} %" if criteria > unscored else "none"
    lines = [
        f"{len(gradings)} runs, {sum(each.all_pass is True for each in gradings)} all-pass; {passed} of "
        f"{criteria - unscored} scored criteria pass ({rate}), {unscored} unscored",
        f"verdicts: {sum(e.fresh for e in gradings)} from calls, {sum(e.cached for e in gradings)} from the cache; "
        + ", ".join(f"{count} {state}" for state, count in states.items()),
        f"tokens: {tokens.input - tokens.cached:,} uncached and {tokens.cached:,} cached in, {tokens.output:,} out"
        + (price(None if None in costs else sum(costs)) or " (cost unknown: no price in the table)"),
    ]
    if stopped := next((each.stopped for each in gradings if each.stopped), ""):
        return "\n".join([*lines, f"stopped: {stopped}"])
    for reason, count in sum((each.reasons for each in gradings), Counter()).most_common(1):
        lines.append(f"unscored, {count} of {unscored} times: {' '.join(reason.split())[:300]}")
    return "\n".join(lines)


def price(cost: float | None) -> str:
    """A cost for the end of a line, or nothing where it is unknown."""
    return "" if cost is None else f" (${cost:.4f})"


def _inside_a_run(folder: Path, runs: set[Path]) -> bool:
    """Whether it is among a run's deliverables, or what an agent worked in, whose `output/` is not yet delivered."""
    places = (folder, *folder.parents)
    return any(place.name in ("output", "workspace") and place.parent in runs for place in places)


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "metrics.json"))


def _per_call(text: str) -> int:
    if text == "all":
        return 0
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of criteria; write 1, 4, 8, ... or all")
    return int(text)
