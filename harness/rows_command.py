"""The command `rows`: training rows of runs, shown with their masks or written to disk. Loading it loads no torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .windows import IGNORE, KINDS, WindowRow

COLOURS = {"action": 34, "memo": 35, "draft": 32, "review": 36, "final": 33}
GREY, BOLD, OFF = "\x1b[90m", "\x1b[1m", "\x1b[0m"
NAMES = {number: name for name, number in KINDS.items()}


class Rows:
    """`still rows`: what a rollout would train."""

    help = "Show, check and export the training rows of agent runs: one row a window, loss on its own turns alone."
    description = """\
SOURCE is a run's folder, a folder of runs, or a file of rows. `show` prints one row with its mask in colours: grey is
context, a colour is trained (action, memo, draft, review, final); turns that are context on purpose say why.
`export` writes all rows: .jsonl holds rows or, with --messages, plain conversations; any other name a data set."""
    examples = """\
examples:
  still rows show runs/memo/assignments/terms-100/matter-000/seed-0 --row 1
  still rows list runs/memo
  still rows export runs/memo -o rows.jsonl
  still rows export runs/memo -o messages.jsonl --messages
  still rows export runs/memo -o data/round-1 --push me/matters-round-1"""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("verb", choices=("show", "list", "export"), help="what to do")
        parser.add_argument("source", metavar="SOURCE", type=Path, help="a run, a folder of runs, or a file of rows")
        parser.add_argument("--row", metavar="N", type=int, default=0, help="which row to show (default: 0)")
        parser.add_argument("--tokenizer", metavar="TEXT", help="the student's (default: who played)")
        parser.add_argument(
            "--train-on", choices=("own", "all"), default="own",
            help="own leaves out turns with mistakes; all is what a policy gradient trains (default: own)",
        )  # fmt: skip
        parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto", help="(default: auto)")
        parser.add_argument("-o", "--output", metavar="PATH", type=Path, help="export: .jsonl, or a data set's folder")
        parser.add_argument("--messages", action="store_true", help="export: plain conversations for other trainers")
        parser.add_argument("--push", metavar="NAME", help="export: push the data set to the Hub as well, private")

    def run(self, args: argparse.Namespace) -> int:
        """Print or write."""
        rows, tokenizer = opened(args.source, args.tokenizer, args.train_on)
        if args.verb == "list":
            print("\n".join(listed(rows)))
        elif args.verb == "show":
            if not 0 <= args.row < len(rows):
                raise ValueError(f"--row is {args.row}; {args.source} has {len(rows)} rows, numbered from 0")
            colour = args.colour == "always" or (args.colour == "auto" and sys.stdout.isatty())
            print(shown(rows[args.row], tokenizer, colour))
        else:
            export(rows, args, tokenizer)
        return 0


def load_tokenizer(name: str) -> Any:
    """A tokenizer by a plug-in's name, a folder or a Hub id.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    from transformers import AutoTokenizer

    from .. import models

    named = models.find(name)
    try:
        return AutoTokenizer.from_pretrained(str(named.path) if named else name)
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise FileNotFoundError(f"no tokenizer {name!r} ({reason}): give one with --tokenizer") from problem


def opened(source: Path, tokenizer: str | None, train_on: str = "own") -> tuple[list[WindowRow], Any]:
    """The rows of a run, of every run below a folder, or of a file, and the student's tokenizer.

    Args:
        source: where they are.
        tokenizer: its name; that of the model that played first unless given, or of the student that it taught.
        train_on: see `rows_of_run`.

    Raises:
        FileNotFoundError: there is no run and no file of rows, or no such tokenizer.
        ValueError: no run has ended; where some have, it is said of how many others the rows are left out.
    """
    from .row_files import read_rows
    from .windows import rows_of_run

    if source.is_file() or (source / "dataset_info.json").is_file():
        rows = read_rows(source)
        return rows, load_tokenizer(tokenizer or student_of(source, rows[0].policy if rows else "pocket"))
    runs = sorted(path.parent for path in source.rglob("events.jsonl"))
    if not runs:
        raise FileNotFoundError(f"{source} holds no run and no rows: give a folder with an events.jsonl below it")
    ended = {run: found[0]["policy"] for run in runs if (found := _ended(run))}
    if not ended:
        raise ValueError(f"none of the {len(runs)} runs of {source} has ended: let them go on")
    if cut := [run for run in runs if run not in ended]:
        print(f"{len(cut)} of {len(runs)} runs have not ended and are left out, first {cut[0]}", file=sys.stderr)
    student = load_tokenizer(tokenizer or student_of(source, next(iter(ended.values()))))
    return [row for run in ended for row in rows_of_run(run, student, train_on=train_on)], student


def _ended(run: Path) -> list[dict[str, Any]]:
    """The events of a run that has ended, or none."""
    from .runs import read_run

    events = read_run(run)
    return events if events and events[-1]["event"] == "end" else []


def student_of(source: Path, played: str) -> str:
    """Whose tokenizer rows were made with: of a teacher's rows in a folder of `still isft` its student's, else who
    played."""
    if played.startswith("teacher "):
        for folder in (source.absolute(), *source.absolute().parents):
            if (folder / "isft.json").is_file():
                return json.loads((folder / "isft.json").read_text(encoding="utf-8"))["settings"]["model"]
    return played


def listed(rows: Iterable[WindowRow]) -> Iterator[str]:
    """A line for each row."""
    for number, row in enumerate(rows):
        kinds = {name: 0 for name in COLOURS}
        for label, kind in zip(row.labels, row.token_kind, strict=True):
            if label != IGNORE:
                kinds[NAMES[kind]] += 1
        trained = ", ".join(f"{count} {name}" for name, count in kinds.items() if count)
        behind = f" behind {len(row.prefix_ids)} tokens as slots" if row.prefix_plan else ""
        yield (
            f"{number:>4}  {row.trajectory_id}  window {row.window + 1} of {row.n_windows}, {row.backend}: "
            f"{len(row.input_ids)} tokens{behind}, trained {row.trained} ({trained})"
        )


def shown(row: WindowRow, tokenizer: Any, colour: bool) -> str:
    """One row as text: trained tokens in the colour of their kind, the rest grey; without colours, between marks."""
    lines = [*listed([row]), ""]
    for step in row.prefix_plan:
        lines.append(f"prefix {step['start']}-{step['end']}: {step['keep']}, {step['slots']} entries a head")
    reasons = {span["start"]: span["untrained"] for span in row.spans if span["untrained"]}
    parts, place = [], 0
    while place < len(row.input_ids):
        end, kind, trained = place, row.token_kind[place], row.labels[place] != IGNORE
        while (
            end < len(row.input_ids) and row.token_kind[end] == kind and (row.labels[end] != IGNORE) == trained
            and (end == place or end not in reasons)
        ):  # fmt: skip
            end += 1
        text = tokenizer.decode(row.input_ids[place:end], skip_special_tokens=False)
        name = NAMES[kind]
        if trained:
            parts.append(f"\x1b[{COLOURS[name]}m{BOLD}{text}{OFF}" if colour else f"[{name}: {text}]")
        else:
            note = f"(not trained, {reasons[place]}: {text})" if place in reasons else text
            parts.append(f"{GREY}{note}{OFF}" if colour else note)
        place = end
    legend = " ".join(f"\x1b[{code}m{BOLD}{name}{OFF}" for name, code in COLOURS.items()) if colour else ""
    return "\n".join([*lines, "".join(parts), *([legend] if legend else [])])


def export(rows: list[WindowRow], args: argparse.Namespace, tokenizer: Any) -> None:
    """Write the rows as the flags say."""
    from . import row_files
    from .runs import write_atomically
    from .windows import check_rows

    check_rows(rows)
    if args.output is None and args.push is None:
        raise ValueError("say where to: -o rows.jsonl, -o FOLDER for a data set, or --push NAME")
    if args.messages:
        if args.output is None or args.output.suffix != ".jsonl":
            raise ValueError(f"--messages writes JSON lines; -o is {args.output}, name a .jsonl")
        lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in row_files.messages(rows, tokenizer))
        write_atomically(args.output, "".join(lines).encode())
    elif args.output is not None and args.output.suffix == ".jsonl":
        row_files.write_rows(args.output, rows)
    elif args.output is not None:
        row_files.save_dataset(rows, args.output)
    if args.push is not None:
        row_files.push(rows, args.push)
    print(f"{len(rows)} rows, {sum(row.trained for row in rows):,} trained tokens")
