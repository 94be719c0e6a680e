"""The command `pocket`: train the pocket's base and its compactors again, in steps of a few minutes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...models import LoadedModel


PARTS = {
    "base": "the model, from nothing", "compactor": "for a base", "agent": "the base goes on to play the agent's game",
    "agent-compactor": "a compactor goes on to the agent's windows",
}  # fmt: skip


class Pocket:
    """`still pocket`: the recipes behind the weights that ship."""

    help = "Train the pocket model and its compactors again, in resumable steps."
    description = """\
Train the pocket base, then its compactors, from nothing but the code: under two hours on two CPU cores.
Every call goes on where the last one stopped."""
    examples = """\
examples:
  still pocket base --output runs/pocket --minutes 10
  still pocket base --output runs/longer --start-from DIR                  # its second part alone: long matters
  still pocket compactor --output runs/pocket --seed 0
  still pocket compactor --output runs/second --base pocket --start-from runs/pocket/compactor-seed0   # at 32x
  still pocket compactor --output runs/16x --base pocket --ratios 16       # one that serves a single ratio
  still pocket compactor --output runs/uneven --seed 0 --base pocket --split split.json --uneven 0.5
  still pocket agent --output runs/agent --minutes 10                      # teach the pocket the agent's game
  still pocket agent --output runs/told --start-from pocket-agent --slips 0.5 --steps 150   # and to take a private note
  still pocket agent-compactor --output runs/agent --start-from DIR        # and its compactor the agent's windows"""
    resume = "run the same command again to go on from the newest state"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("part", choices=tuple(PARTS), help="; ".join(f"{k}: {v}" for k, v in PARTS.items()))
        parser.add_argument(
            "-o", "--output", type=Path, default=Path("runs/pocket"), metavar="DIR", help="folder of the run"
        )
        parser.add_argument("--minutes", type=float, default=120, help="stop a base's training after so long")
        parser.add_argument("--seed", type=int, default=0, help="seed of the part")
        parser.add_argument("--base", metavar="DIR", help="base of a compactor (default: OUTPUT/base)")
        parser.add_argument("--steps", type=int, metavar="N", help="steps of the part (default: the recipe's)")
        parser.add_argument("--start-from", metavar="DIR", help="what to go on from: a trained compactor, or a base")
        parser.add_argument(
            "--ratios", type=_ratios, metavar="LIST", help="ratios of a compactor's training (default: 2 to 64)"
        )
        parser.add_argument("--split", metavar="FILE", help="split of `still budgets` that the compactor is to carry")
        parser.add_argument(
            "--slips", type=float, metavar="SHARE",
            help="share of an agent's steps on wrong drafts, a private note, and the draft again (default: 0)",
        )  # fmt: skip
        parser.add_argument(
            "--uneven", type=float, metavar="SHARE",
            help="share of the steps whose slots are divided unevenly, around the split (default: the recipe's)",
        )  # fmt: skip

    def run(self, args: argparse.Namespace) -> int:
        """Train the part."""
        if args.part in ("base", "agent"):
            done = self._base(args) if args.part == "base" else self._agent(args)
            print(f"finished: {args.output / 'base'}" if done else "not finished; run the same command again")
            return 0
        from ...models import load

        base = load(args.base or str(args.output / "base"), device="cpu", dtype="bfloat16")
        folder = args.output / f"{args.part}-seed{args.seed}"
        made = self._compactor(args, base, folder) if args.part == "compactor" else self._windows(args, base, folder)
        print(f"finished: {folder}, {made}")
        return 0

    def _base(self, args: argparse.Namespace) -> bool:
        from .base import BaseRecipe, train_base

        recipe = BaseRecipe(seed=args.seed, **_given(steps=args.steps, start=args.start_from))
        return train_base(args.output, recipe, args.minutes)

    def _agent(self, args: argparse.Namespace) -> bool:
        from .agent_base import GOES_ON, AgentRecipe, train_agent

        given = _given(steps=args.steps, start=args.start_from, slips=args.slips)
        if args.start_from:
            given["learning_rate"] = GOES_ON
        recipe = AgentRecipe(seed=args.seed, **given)
        return train_agent(args.output, recipe, args.minutes)

    def _compactor(self, args: argparse.Namespace, base: LoadedModel, folder: Path) -> dict[str, float]:
        from .compactors import recipe, train_compactor

        config = recipe(args.seed, args.steps, args.start_from)
        given = _given(split=args.split, uneven=args.uneven, ratios=args.ratios)
        return train_compactor(base, folder, replace(config, **given))

    def _windows(self, args: argparse.Namespace, base: LoadedModel, folder: Path) -> Path:
        from ...compactor import StillCompactor
        from .agent_compactor import train_agent_compactor

        if args.start_from is None:
            raise ValueError("agent-compactor goes on from a compactor of bare matters: give --start-from DIR")
        compactor = StillCompactor.from_pretrained(args.start_from, model=base.model)
        return train_agent_compactor(base, compactor, folder, seed=args.seed, **_given(steps=args.steps))


def _ratios(text: str) -> list[float]:
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = [0.0]
    if min(ratios) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ratios of 1 or more, such as 8,16")
    return ratios


def _given(**values: object) -> dict[str, object]:
    """What was said on the command line."""
    return {name: value for name, value in values.items() if value is not None}


COMMANDS = {"pocket": Pocket()}
