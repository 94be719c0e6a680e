"""Commands of this room. Loading this module loads neither torch nor matplotlib."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

from ..flags import add_flags
from .budgets_command import Budgets
from .cells import PRESETS, SweepConfig
from .rows_command import Rows
from .run_command import Run
from .trainers.commands import COMMANDS as TRAINERS

COMMITTED = Path("bench/rows")


class Sweep:
    """`still sweep`: how much can a cache shrink before answers break, for every method side by side."""

    help = "Compare methods of compaction at many ratios: rows, table, figures and an HTML report."
    description = """\
Read each context once, let every method make its small cache, and ask all questions of each.
Results are kept cell by cell (method x ratio x context x seed): stop it at any time and run the same
command again to go on."""
    examples = """\
examples:
  still sweep --preset quickstart                                    the model that comes with still, in minutes
  still sweep --ratios 4,8,16 --methods still,snapkv,h2o --count 40 --output results/three
  still sweep --model Qwen/Qwen3-0.6B --compactor ./compactor --tasks ruler --tokens 8192 --count 25
  still sweep --model ./model --compactor ./compactors --seeds 0,1,2 --tasks matters,matters-unseen"""
    resume = "finished cells are kept; run the same command again to go on"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments: one flag a field of `SweepConfig`."""
        parser.add_argument("--preset", choices=sorted(PRESETS), help="start from these settings; flags change them")
        parser.add_argument(
            "--output", type=Path, metavar="DIR", help="results folder (default: results/PRESET, or results/sweep)"
        )
        add_flags(parser, SweepConfig)
        parser.set_defaults(**{field.name: None for field in fields(SweepConfig)})
        parser.add_argument("--device", metavar="TEXT", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
        _add_committed(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Compute what is missing, then write the report and print its table."""
        config = config_from(args)
        output = args.output or Path("results") / (args.preset or "sweep")
        from .report import write_report
        from .sweep import run_sweep

        run_sweep(config, output, device=args.device, progress=sys.stderr.isatty())
        print(write_report(output, committed=_committed(args)))
        print(f"\n{output}/report.html  {output}/rows.csv  {output}/figures/")
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

        print(write_report(args.folder, committed=_committed(args)))
        print(f"\n{args.folder}/report.html  {args.folder}/rows.csv  {args.folder}/figures/")
        return 0


COMMANDS = {
    "sweep": Sweep(), "report": Report(), "run": Run(), "rows": Rows(), "budgets": Budgets(), **TRAINERS,
}  # fmt: skip


def config_from(args: argparse.Namespace) -> SweepConfig:
    """The preset's settings, or the defaults, with the flags that were given."""
    start = PRESETS[args.preset] if args.preset else SweepConfig()
    given = {field.name: getattr(args, field.name) for field in fields(SweepConfig)}
    return replace(start, **{name: value for name, value in given.items() if value is not None})


def _add_committed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--committed", type=Path, metavar="DIR",
        help=f"folder of CSV rows from earlier runs, shown and marked where a method was not computed "
        f"(default: {COMMITTED} if it is there)",
    )  # fmt: skip


def _committed(args: argparse.Namespace) -> Path | None:
    return args.committed or (COMMITTED if COMMITTED.is_dir() else None)
