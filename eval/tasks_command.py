"""`still tasks split`: training, held-out and test sides of a folder of tasks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


class Tasks:
    """`still tasks`: work on whole folders of LAB tasks."""

    help = "Split LAB tasks into sides that share no documents"
    examples = """\
example:
  still tasks split tasks/ --shares train=0.7,held_out=0.15,test=0.15 --seed 0 --output split.json"""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the verbs."""
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
        split = verbs.add_parser("split", help="divide tasks into sides", description=_split.__doc__)
        split.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folders that hold tasks")
        split.add_argument("--shares", type=parse_shares, default=dict(train=0.8, test=0.2), metavar="NAME=X,...",
            help="sides and their shares, which sum to 1 (default: train=0.8,test=0.2)")  # fmt: skip
        split.add_argument("--seed", type=int, default=0, help="another one, another split (default: 0)")
        split.add_argument("-o", "--output", type=Path, metavar="FILE", help="the JSON file to write (default: stdout)")
        split.set_defaults(verb_run=_split)

    def run(self, args: argparse.Namespace) -> int:
        """Do what the verb says."""
        return args.verb_run(args)


def parse_shares(text: str) -> dict[str, float]:
    """Read "train=0.8,test=0.2".

    Raises:
        argparse.ArgumentTypeError: it is nothing of the kind.
    """
    try:
        pairs = [part.partition("=") for part in text.split(",")]
        found = {name.strip(): float(share) for name, _, share in pairs}
    except ValueError:
        found = {}
    if not found or not all(found) or len(found) < len(pairs) or abs(sum(found.values()) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of shares; write train=0.8,test=0.2, which sum to 1")
    return found


def load_tasks(paths: Sequence[Path]) -> list:
    """Every task in or below the paths.

    Raises:
        FileNotFoundError: there is none.
    """
    from .tasks import find_tasks, load_task

    folders = [folder for path in paths for folder in find_tasks(path)]
    if not folders:
        raise FileNotFoundError(f"there is no task.json below {', '.join(map(str, paths))}; name a folder of LAB tasks")
    return [load_task(folder) for folder in folders]


def _split(args: argparse.Namespace) -> int:
    """Divide tasks into sides: seeded, in the same shares in every practice area, tasks that share documents (a store,
    or copies of one file) on one side. The file holds the rubric hashes that it was made for."""
    import json

    from .splits import split_tasks

    split = split_tasks(load_tasks(args.paths), args.shares, args.seed)
    if not args.output:
        print(json.dumps(split.to_json(), indent=1, ensure_ascii=False))
        return 0
    split.save(args.output)
    width = max(len(area) for area in split.areas)
    print(f"{'':{width}}  " + "  ".join(f"{side:>9}" for side in split.sides))
    for area, counts in split.areas.items():
        print(f"{area:{width}}  " + "  ".join(f"{counts[side]:>9}" for side in split.sides))
    print(f"{'all':{width}}  " + "  ".join(f"{len(ids):>9}" for ids in split.sides.values()))
    for side in (side for side, ids in split.sides.items() if not ids):
        print(f"note: {side!r} got no task; there are too few, or too many that share documents")
    kept = sum(len(group) for group in split.groups)
    print(f"{kept} tasks in {len(split.groups)} groups were kept together because they share documents")
    print(f"the split is in {args.output}")
    return 0
