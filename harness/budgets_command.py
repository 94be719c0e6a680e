"""`still budgets`: calibrate which heads need slots. Loading this module loads neither torch nor matplotlib."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any


class Budgets:
    """`still budgets`: a split of the slots over layers and KV heads, measured or learned."""

    help = "Measure which layers and heads need slots, and write a split that gives them more."
    description = """\
Reduce one KV head at a time to one averaged slot, and to a few compression ratios, and measure what the answers of
calibration rows lose (KL from the full cache, nats per answer token). Slots are then divided so that the next one goes
where it saves most. Writes the split (JSON), the losses and a heat map. With --learn the split is improved further, as
a whole. `still compact --split`, `still sweep --split` and `still train --split` take the file."""
    examples = """\
examples:
  still budgets pocket -o split.json                                         synthetic matters, the pocket's compactor
  still budgets Qwen/Qwen3-0.6B --compactor ./compactor --data rows -o split.json --learn 2
  still budgets Qwen/Qwen3-0.6B --method snapkv --matters 2 -o split.json     no compactor needed
  still budgets ./model --compactor ./compactor --data rows -o split.json --store    into the checkpoint as well"""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("model", metavar="MODEL", help="`pocket`, a folder, or a Hub id of a causal language model")
        parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="the JSON file to write")
        rows = parser.add_mutually_exclusive_group()
        rows.add_argument("--data", metavar="PATH", help="calibration rows in the format of `still data`")
        rows.add_argument("--matters", metavar="N", type=int, help="or N synthetic matters (default: 4)")
        parser.add_argument("--rows", metavar="N", type=int, default=4, help="rows taken from --data (default: 4)")
        parser.add_argument("--facts", metavar="N", type=int, default=64, help="facts of a matter (default: 64)")
        parser.add_argument("--method", metavar="NAME", default="still", help="what compacts a head (default: still)")
        parser.add_argument(
            "--compactor", metavar="PATH",
            help="folder or Hub id of a trained compactor, or the model that it comes with; `untrained` for a fresh "
            "one (default: the model's own)",
        )  # fmt: skip
        parser.add_argument(
            "--store", action="store_true", help="write the split into the compactor's folder as well, as its own"
        )
        numbers = [
            ("--ratio", float, 16.0, "tokens per slot at which slots are divided"),
            ("--questions", int, 8, "questions asked of each row; 0 asks all"),
            ("--floor", int, 1, "slots that every head gets at least"),
            ("--learn", int, 0, "rounds in which the whole split is improved, two forwards a head and row each"),
            ("--seed", int, 0, "of the matters and the choice of questions"),
        ]
        for flag, kind, default, text in numbers:
            parser.add_argument(flag, metavar="N", type=kind, default=default, help=f"{text} (default: {default})")
        parser.add_argument(
            "--levels", metavar="X,Y", default="64,16,4",
            help="compression ratios of the measured head, beside one averaged slot (default: 64,16,4)",
        )  # fmt: skip
        parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
        parser.add_argument("--dtype", metavar="NAME", default="auto", help="such as bfloat16 (default: as saved)")

    def run(self, args: argparse.Namespace) -> int:
        """Measure, divide, draw."""
        from ..budgets import slots_for

        levels = _levels(args.levels)
        slots_for(1, args.ratio)
        if not args.output.absolute().parent.is_dir():
            raise FileNotFoundError(f"--output {args.output}: the folder {args.output.parent} does not exist")
        if args.output.is_dir():
            raise ValueError(f"--output {args.output} is a folder; name a file")
        from dataclasses import replace

        from transformers.utils import logging

        from .. import models
        from ..allocation import learn_split, measure_split
        from .split_figure import save_heat_map

        logging.disable_progress_bar()
        loaded = models.load(args.model, args.device, args.dtype)
        method, folder = _method(args, loaded)
        rows = _rows(args, loaded)
        shown = sys.stderr.isatty()
        started = time.perf_counter()
        found = measure_split(
            loaded.model, rows, method, ratio=args.ratio, levels=levels, questions=args.questions, floor=args.floor,
            seed=args.seed, progress=shown,
        )  # fmt: skip
        seconds, split, learned, measured = time.perf_counter() - started, found.split, [], found.split.to_dict()
        if args.learn:
            split, learned = learn_split(
                loaded.model, rows, method, found.split, ratio=args.ratio, rounds=args.learn, questions=args.questions,
                seed=args.seed, progress=shown,
            )  # fmt: skip
            found = replace(found, split=split)
        split.save(args.output)
        stem = args.output.with_suffix("")
        record = {**found.to_dict(), "measured": measured, "learned": learned, **_provenance(args, loaded, seconds)}
        losses = stem.with_name(stem.name + ".losses.json")
        losses.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        tokens = max(len(row.context_ids) for row in rows)
        figures = save_heat_map(found, tokens, stem, f"{loaded.name}, {method.name}, {len(rows)} rows")
        if args.store:
            _store(folder, split)
        print(_summary(found, learned, tokens, seconds))
        print(f"\n{args.output}  {losses}  {'  '.join(map(str, figures))}")
        return 0


def _levels(text: str) -> list[float]:
    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--levels is {text!r}; give ratios such as 64,16,4") from None
    if min(levels) <= 1:
        raise ValueError(f"--levels has {min(levels):g}; a measured head is compacted, so each must be above 1")
    return sorted(levels, reverse=True)


def _method(args: argparse.Namespace, loaded) -> tuple[Any, Path | None]:
    from .. import methods
    from ..compactor import StillCompactor

    if args.method != "still":
        if args.compactor or args.store:
            raise ValueError(f"--compactor and --store belong to the method still, not to {args.method}")
        if args.method not in methods.SPLIT_NAMES:
            raise ValueError(f"--method is {args.method!r}; a split serves {', '.join(methods.SPLIT_NAMES)}")
        return methods.get(args.method), None
    where = args.compactor or (loaded.compactors[0] if loaded.compactors else None)
    if where is None:
        raise ValueError(f"{loaded.name} comes with no compactor; pass --compactor PATH, or another --method")
    if where == "untrained":
        if args.store:
            raise ValueError("--store needs the folder of a trained compactor, and --compactor is untrained")
        compactor = StillCompactor.for_model(loaded.model, ratio=args.ratio)
        return methods.get("still", compactor=compactor.eval().requires_grad_(False)), None
    if args.store and not Path(where).is_dir():
        raise ValueError(f"--store writes into a folder, and {where} is none: download the compactor first")
    compactor = StillCompactor.from_pretrained(where, model=loaded.model).eval().requires_grad_(False)
    return methods.get("still", compactor=compactor, label=Path(where).name), Path(where)


def _rows(args: argparse.Namespace, loaded) -> list:
    from ..distill.data import load_rows
    from ..distill.rendering import Renderer

    if args.data:
        return load_rows(args.data, Renderer(loaded.tokenizer))[: args.rows]
    from ..eval.matters import Difficulty, generate_matter

    renderer, size = Renderer(loaded.tokenizer), Difficulty("training", args.facts)
    count = 4 if args.matters is None else args.matters
    first = 1_000_000 + 1_000 * args.seed  # apart from the seeds that the sweep asks
    return [_matter_row(renderer, generate_matter(first + index, size, "train")) for index in range(count)]


def _matter_row(renderer, matter):
    """A matter with every question that can be asked of it."""
    from ..distill.data import Row
    from .pocket.dialogue import answer_text

    asked = [(fact.question, answer_text(fact)) for fact in matter.facts]
    turns = [(renderer.later(question), renderer.answer(question, answer)) for question, answer in asked]
    context = renderer.context([(doc.name, doc.text) for doc in matter.documents])
    return Row(f"{matter.split}-{matter.seed}", context, turns)


def _store(folder: Path, split) -> None:
    """Put the split into a compactor's config."""
    from dataclasses import replace

    from ..compactor_io import CONFIG
    from ..config import StillConfig
    from .cells import write_file

    config = StillConfig.from_json((folder / CONFIG).read_text(encoding="utf-8"))
    write_file(folder / CONFIG, replace(config, split=split.to_dict()).to_json().encode())


def _provenance(args: argparse.Namespace, loaded, seconds: float) -> dict[str, Any]:
    from ..provenance import provenance

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
                if isinstance(value, str | int | float | bool | Path | None)}  # fmt: skip
    return provenance(device=loaded.model.device, seed=args.seed, settings=settings, seconds=round(seconds, 3))


def _summary(found, learned: list[float], tokens: int, seconds: float) -> str:
    from ..budgets import slots_for

    counts = found.split.counts(tokens, slots_for(tokens, found.ratio))
    flat = sorted((n for own in counts.values() for n in own), reverse=True)
    lines = [
        f"{found.rows} rows, {found.answer_tokens} answer tokens, {found.forwards} forwards in {seconds:.1f} s",
        f"KL at {found.ratio:g}x, nats per answer token: "
        + ", ".join(f"{kl:.3f} with {mix:.0%} uneven" for mix, kl in found.mixes.items()),
        f"slots at {found.ratio:g}x of {tokens:,} tokens: {flat[0]} in the largest of {len(flat)} heads, {flat[-1]} in "
        f"the smallest; the larger half holds {sum(flat[: len(flat) // 2]) / sum(flat):.0%}",
    ]
    if learned:
        lines.insert(2, "learned: KL " + " -> ".join(f"{kl:.3f}" for kl in learned))
    for layer, own in counts.items():
        lines.append(f"  layer {layer:>2}: " + " ".join(f"{count:>5}" for count in own))
    return "\n".join(lines)
