"""The command `pocket`: train the pocket's base and its compactors again, in steps of a few minutes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path


class Pocket:
    """`still pocket`: the recipes behind the weights that ship."""

    help = "Train the pocket model and its compactors again, in resumable steps."
    description = """\
Train the pocket base, then its compactors, from nothing but the code: under two hours on two CPU cores.
Every call goes on where the last one stopped."""
    examples = """\
examples:
  still pocket base --output runs/pocket --minutes 10
  still pocket compactor --output runs/pocket --seed 0
  still pocket compactor --output runs/uneven --seed 0 --base pocket --split split.json --uneven 0.5"""
    resume = "run the same command again to go on from the newest state"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("part", choices=("base", "compactor"), help="what to train; the base comes first")
        parser.add_argument("--output", type=Path, default=Path("runs/pocket"), metavar="DIR", help="folder of the run")
        parser.add_argument("--minutes", type=float, default=120, help="stop the base's training after so long")
        parser.add_argument("--seed", type=int, default=0, help="seed of the part")
        parser.add_argument("--base", metavar="DIR", help="base of the compactor (default: OUTPUT/base)")
        parser.add_argument("--steps", type=int, metavar="N", help="steps of the compactor (default: the recipe's)")
        parser.add_argument("--start-from", metavar="DIR", help="a trained compactor to go on from")
        parser.add_argument("--split", metavar="FILE", help="split of `still budgets` that the compactor is to carry")
        parser.add_argument(
            "--uneven", type=float, default=0.0, metavar="SHARE",
            help="share of the steps whose slots are divided unevenly, around the split (default: 0)",
        )  # fmt: skip

    def run(self, args: argparse.Namespace) -> int:
        """Train the part."""
        if args.part == "base":
            from .base import BaseRecipe, train_base

            done = train_base(args.output, BaseRecipe(seed=args.seed), args.minutes)
            print(f"finished: {args.output / 'base'}" if done else "not finished; run the same command again")
            return 0
        from ...models import load
        from .compactors import recipe, train_compactor

        base = load(args.base or str(args.output / "base"), device="cpu", dtype="bfloat16")
        folder = args.output / f"compactor-seed{args.seed}"
        config = recipe(args.seed) if args.steps is None else recipe(args.seed, args.steps)
        config = replace(config, start_from=args.start_from, split=args.split, uneven=args.uneven)
        scores = train_compactor(base, folder, config)
        print(f"finished: {folder}, {scores}")
        return 0


COMMANDS = {"pocket": Pocket()}
