"""Commands of this room. Loading this module loads neither torch nor matplotlib."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from ..flags import add_flags
from .agent_cells import AGENT_PRESETS, AgentSweepConfig
from .budgets_command import Budgets
from .cells import PRESETS, SweepConfig, read_json
from .rows_command import Rows
from .run_command import Run
from .trainers.commands import COMMANDS as TRAINERS

Config = TypeVar("Config")
COMMITTED = Path("bench/rows")
IMPORTED = ("still.models", "transformers.models.auto.modeling_auto", "transformers.models.qwen3.modeling_qwen3")
"""What takes longest of what the workers of a sweep import."""


class Sweep:
    """`still sweep`: how much can a cache shrink before answers break, for every method side by side."""

    help = "Compare methods of compaction at many ratios: rows, table, figures and an HTML report."
    description = """\
Read each context once, let every method make its small cache, and ask all questions of each.
Results are kept cell by cell (method x ratio x context x seed): stop it at any time and run the same
command again to go on.

With --agent, each cell is an episode: an agent reads a matter document by document, is compacted at each boundary by
a memo, by slots or by both within --budgets, and writes a deliverable that the exact judge grades."""
    examples = """\
examples:
  still sweep --agent --preset quickstart                            whole episodes: read, compact, write, be judged
  still sweep --preset quickstart                                    the model that comes with still, in minutes
  still sweep --ratios 4,8,16 --methods still,snapkv,h2o --count 40 --output results/three
  still sweep --model Qwen/Qwen3-0.6B --compactor ./compactor --tasks ruler --tokens 8192 --count 25
  still sweep --model ./model --compactor ./compactors --seeds 0,1,2 --tasks matters,matters-unseen"""
    resume = "finished cells are kept; run the same command again to go on"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments: one flag a field of `SweepConfig`."""
        parser.add_argument("--preset", choices=sorted(PRESETS), help="start from these settings; flags change them")
        parser.add_argument(
            "-o", "--output", type=Path, metavar="DIR", help="of the results (default: results/PRESET or results/sweep)"
        )
        add_flags(parser, SweepConfig)
        parser.add_argument("--agent", action="store_true", help="play whole episodes: see above")
        add_flags(parser, AgentSweepConfig, skip=[field.name for field in fields(SweepConfig)])
        parser.set_defaults(**{field.name: None for kind in (SweepConfig, AgentSweepConfig) for field in fields(kind)})
        parser.add_argument("--device", metavar="TEXT", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
        parser.add_argument(
            "--workers", type=int, default=1, metavar="N", help="processes that share the work, each with its own copy "
            "of the model, on the GPUs in turn; two are faster than one on a CPU (default: 1)",
        )  # fmt: skip
        _add_committed(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Compute what is missing, then write the report and print its table."""
        if args.workers < 1:
            raise ValueError(f"workers is {args.workers}; it must be 1 or more")
        if args.workers > 1:
            from .workers import make_ready

            make_ready([f"still.harness.{'agent_sweep' if args.agent else 'sweep'}", *IMPORTED])
        if args.agent:
            return self._agent(args)
        config = config_from(args)
        output = args.output or Path("results") / (args.preset or "sweep")
        from .report import write_report
        from .sweep import run_sweep

        run_sweep(config, output, device=args.device, progress=sys.stderr.isatty(), workers=args.workers)
        print(write_report(output, committed=_committed(args)))
        print(f"\n{output}/report.html  {output}/rows.csv  {output}/figures/")
        return 0

    def _agent(self, args: argparse.Namespace) -> int:
        if args.preset and args.preset not in AGENT_PRESETS:
            known = ", ".join(AGENT_PRESETS)
            raise ValueError(f"preset is {args.preset!r}, which is for sweeps of questions; with --agent: {known}")
        start = AGENT_PRESETS[args.preset] if args.preset else AgentSweepConfig()
        config = given_to(args, start, SweepConfig)
        output = args.output or Path("results") / (f"{args.preset}-agent" if args.preset else "agent")
        from .agent_report import write_agent_report
        from .agent_sweep import AgentBench, run_agent_sweep

        bench = AgentBench.load(config, args.device)
        run_agent_sweep(config, output, bench, sys.stderr.isatty(), args.workers, args.device)
        print(write_agent_report(output))
        print(f"\n{output}/report.html  {output}/rows.csv  {output}/figures/  {output}/runs/")
        return 0


class Report:
    """`still report`: the table, the figures and the page again, from the cells alone."""

    help = "Write table, figures and HTML report of a sweep again, from its results folder."
    description = """\
Rebuild rows.csv, rows.json, figures/ and report.html from the cells of a results folder.
Nothing is computed again; a sweep that is still running is reported as far as it got."""
    examples = """\
examples:
  still report results/quickstart"""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("folder", type=Path, metavar="DIR", help="what `still sweep --output` named")
        _add_committed(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Write the report and print its table."""
        from .report import write_report

        if is_agent_sweep(args.folder):
            from .agent_report import write_agent_report

            print(write_agent_report(args.folder))
            print(f"\n{args.folder}/report.html  {args.folder}/rows.csv  {args.folder}/figures/")
            return 0

        print(write_report(args.folder, committed=_committed(args)))
        print(f"\n{args.folder}/report.html  {args.folder}/rows.csv  {args.folder}/figures/")
        return 0


class Trace:
    """`still trace`: what happened in an episode, on a page."""

    help = "Write one HTML page for each run: turns, reads, memos, compactions, bridges, criteria and verdicts."
    description = """\
Write trace.html into every run folder at or below RUN. A run that is still going on is shown as far as it got.
The page holds the rubric's criteria where the run was judged: it is for people, not for the agent."""
    examples = """\
examples:
  still trace runs/memo
  still trace results/agent/runs --output pages"""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a folder that holds many")
        parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="of the pages (default: in each run)")

    def run(self, args: argparse.Namespace) -> int:
        """Write the pages and print their paths."""
        from .cells import write_file
        from .trace import find_runs, trace_page

        for root in find_runs(args.run):
            page = root / "trace.html"
            if args.output is not None:
                name = "-".join(root.relative_to(args.run).parts) or root.resolve().name
                page = args.output / f"{name}.html"
            write_file(page, trace_page(root).encode("utf-8", "replace"))
            print(page)
        return 0


COMMANDS = {
    "sweep": Sweep(), "report": Report(), "run": Run(), "rows": Rows(), "trace": Trace(), "budgets": Budgets(),
    **TRAINERS,
}  # fmt: skip


def config_from(args: argparse.Namespace) -> SweepConfig:
    """The preset's settings, or the defaults, with the flags that were given."""
    return given_to(args, PRESETS[args.preset] if args.preset else SweepConfig(), AgentSweepConfig)


def given_to(args: argparse.Namespace, start: Config, other: type) -> Config:
    """A config with the flags that were given.

    Raises:
        ValueError: one was given that only the other kind of sweep has.
    """
    names = {field.name for field in fields(start)}
    for field in fields(other):
        if field.name not in names and getattr(args, field.name) is not None:
            flag, where = "--" + field.name.replace("_", "-"), "with" if other is AgentSweepConfig else "without"
            raise ValueError(f"{flag} means nothing here; it belongs to a sweep {where} --agent")
    return replace(start, **{name: getattr(args, name) for name in names if getattr(args, name) is not None})


def is_agent_sweep(folder: Path) -> bool:
    """Whether a results folder holds episodes."""
    path = folder / "sweep.json"
    return path.is_file() and "backends" in read_json(path).get("config", {})


def _add_committed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--committed", type=Path, metavar="DIR",
        help=f"folder of CSV rows from earlier runs, shown and marked where a method was not computed "
        f"(default: {COMMITTED} if it is there)",
    )  # fmt: skip


def _committed(args: argparse.Namespace) -> Path | None:
    return args.committed or (COMMITTED if COMMITTED.is_dir() else None)
