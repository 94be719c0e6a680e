"""The commands `still data` and `still train`. This module loads neither torch nor transformers."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, fields

from ..config import StillConfig
from ..flags import add_flags, add_pass_through, from_flags
from .config import DataConfig, TrainConfig

FORMAT = """\
Rows are JSON objects, one a line of a .jsonl file, or rows of a Hugging Face dataset (a saved one or a Hub name):
  id                 string   names the row
  context            string, or a list of {name, text} (documents), or of {role, content} (messages): what is compacted
  context_ids        list of int, the same as token ids (wins over context)
  turns              list of questions asked of this one context:
    question         string   asked as a user message
    answer           string   what the base model answers with the full context; only answers are supervised
    kind             string   optional: fact, string (exact words of the text) or edit (an edited sentence)
  source             string   optional: where the context came from
  split              string   optional: validation rows are scored and never trained on
Other columns are ignored. Any dataset in this format trains.
"""


class Data:
    """`still data`."""

    help = "make training contexts with questions and answers from a folder of documents"
    description = (
        "Make training rows from a folder of documents: contexts of a given length, several questions each (facts,\n"
        "exact strings, and edits: a sentence is changed so that the answer changes), answered by the base model with\n"
        "the full context. Repeated contexts and questions that the base answers without the context are dropped;\n"
        "manifest.json counts everything that was dropped and why. Run it again to go on after a kill.\n\n" + FORMAT
    )
    examples = (
        "examples:\n"
        "  still data contracts/ -o rows --model Qwen/Qwen3-0.6B --endpoint http://localhost:8000/v1 --api-model big\n"
        "  still data contracts/ -o rows --model Qwen/Qwen3-4B --questions 16 --context-tokens 2048,4096,8192\n\n"
        "txt, md and rst are read as they are; docx, pdf, pptx, xlsx and html take the `documents` extra.\n"
        "The server's key comes from the environment variable OPENAI_API_KEY."
    )
    resume = "run the same command again to go on; finished requests and answers are kept"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("documents", help="folder of documents, or one document")
        parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where the rows go")
        parser.add_argument("--model", required=True, help="the base model: it answers, and is compacted later")
        add_flags(parser, DataConfig)

    def run(self, args: argparse.Namespace) -> int:
        """Make the rows and say what came of it."""
        config = from_flags(args, DataConfig)
        from transformers.utils import logging

        from ..models import load
        from .generate import generate

        logging.disable_progress_bar()
        base = load(args.model, device=config.device, dtype=config.dtype, revision=config.revision)
        made = generate(args.documents, args.output, base, config)
        for split, count in made.rows.items():
            print(f"{split}: {count} contexts, {made.turns[split]} questions")
        for reason, count in made.dropped.items():
            print(f"  dropped {count:6d}  {reason}")
        print(f"rows are in {made.path}")
        if made.failed:
            reason = next(iter(made.failed.values()))
            print(f"{len(made.failed)} requests failed ({reason}); run the same command again to send them again")
        return 1 if made.failed else 0


class Train:
    """`still train`."""

    help = "train a compactor for any causal language model"
    description = (
        "Train a compactor by distillation: the frozen model with its full cache teaches the same model with the\n"
        "compact cache, on the tokens of the answers. Every step draws a context length and a ratio. Run it again to\n"
        "go on from the newest whole checkpoint. With several processes: accelerate launch -m still.cli train ...\n\n"
        + FORMAT
    )
    examples = (
        "examples:\n"
        "  still train Qwen/Qwen3-0.6B --data rows -o compactor --lengths 1024,2048 --ratios 4,8,16 --lr 1e-4\n"
        "  still train pocket --data rows -o compactor --steps 400 --compactor.blocks 3 --trainer.report_to tensorboard"
        "\n\n--compactor.KEY VALUE sets a field of a fresh compactor: " + ", ".join(f.name for f in fields(StillConfig))
        + ".\n--trainer.KEY VALUE sets an argument of transformers.TrainingArguments."
    )  # fmt: skip
    resume = "run the same command again to go on from the newest whole checkpoint"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("model", help="the base model: a name that comes with still, a folder, or a Hub name")
        parser.add_argument("--data", required=True, help=".jsonl file, folder of them, saved dataset or Hub name")
        parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where the compactor goes")
        parser.add_argument("--device", help="where it runs (default: the first GPU, else the CPU)")
        add_flags(parser, TrainConfig)
        add_pass_through(parser, "compactor")
        add_pass_through(parser, "trainer")

    def run(self, args: argparse.Namespace) -> int:
        """Train and print the scores."""
        config = from_flags(args, TrainConfig)
        unknown = set(args.compactor) - set(asdict(StillConfig()))
        if unknown:
            raise ValueError(f"--compactor.{sorted(unknown)[0]}: a compactor has no such field")
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        from ..models import load
        from .train import place, train

        device, dtype = place(args.device, config.dtype)
        base = load(args.model, device, dtype, config.attention, config.revision)
        scores = train(
            base, args.data, args.output, config, compactor_options=args.compactor, trainer_options=args.trainer
        )
        for name, value in scores.items():
            print(f"{name:16s} {value:8.4f}" if "kl" in name.split("_") else f"{name:16s} {value:8.1%}")
        print(f"the compactor is in {args.output}")
        return 0


COMMANDS = {"data": Data(), "train": Train()}
