"""The everyday commands `compact`, `ask` and `inspect`, for any Hugging Face causal language model."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flags import add_pass_through

if TYPE_CHECKING:
    from .budgets import Split
    from .cache import StillCache
    from .models import LoadedModel

METHODS = (
    "still", "attention_matching", "cartridge", "expected_attention", "h2o", "keydiff", "knorm", "random", "snapkv",
    "streaming_llm", "truncation",
)  # fmt: skip
"""Methods whose caches a file can hold."""


class Compact:
    """`still compact`: documents to a file that answers questions about them."""

    help = "Read documents and write their compact cache to a file."
    description = """\
Read documents with a model, keep one slot for every RATIO tokens, and write the slots to a file.
`still ask` answers from that file without reading the documents again."""
    examples = """\
examples:
  still compact pocket lease.txt --ratio 8 -o lease.safetensors
  still compact Qwen/Qwen3-0.6B lease.txt amendment.txt --compactor ./compactor -o lease.safetensors
  still compact Qwen/Qwen3-0.6B lease.txt --method snapkv --option.window 32 --slots 512 -o lease.safetensors
  still compact pocket lease.txt --ratio 16 --split split.json -o lease.safetensors    unequal heads, `still budgets`

The method `still` needs a compactor trained for the model: pass its folder or Hub id, or let `still train` make
one. `pocket` comes with its own. The other methods need no training."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("model", metavar="MODEL", help="`pocket`, a folder, or a Hub id of a causal language model")
        parser.add_argument("documents", metavar="DOCUMENT", nargs="+", help="text files in reading order; - is stdin")
        parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="the file to write")
        size = parser.add_mutually_exclusive_group()
        size.add_argument("--ratio", metavar="X", type=float, help="tokens per slot, 1 or more (default: 8)")
        size.add_argument("--slots", metavar="N", type=int, help="slots per KV head, instead of a ratio")
        size.add_argument("--bytes", metavar="N", type=int, help="bytes of all keys and values, instead of a ratio")
        parser.add_argument(
            "--split", metavar="FILE",
            help="how the slots are divided over layers and heads: a file of `still budgets`, or `own` for that of the "
            "compactor (default: equal numbers)",
        )  # fmt: skip
        parser.add_argument(
            "--method", metavar="NAME", choices=METHODS, default="still",
            help=f"how the slots are made: {', '.join(METHODS)} (default: still)",
        )  # fmt: skip
        parser.add_argument(
            "--compactor", metavar="PATH",
            help="folder or Hub id of a trained compactor, or the model that it comes with; `untrained` for a fresh "
            "one, which keeps every RATIO-th token (default: the one that comes with the model)",
        )  # fmt: skip
        parser.add_argument("--dtype", metavar="NAME", default="auto", help="such as bfloat16 (default: as saved)")
        _add_model_flags(parser)
        add_pass_through(parser, "option")
        parser.set_defaults(option={})

    def run(self, args: argparse.Namespace) -> int:
        """Read, compact, write."""
        from .budgets import Split, resolve_slots, slots_for, slots_of_bytes

        ratio = 8.0 if (args.ratio, args.slots, args.bytes) == (None, None, None) else args.ratio
        if ratio is not None:
            slots_for(1, ratio)  # refuses a bad ratio before minutes of work
        _check_output(args.output)
        documents = [_read_document(name) for name in args.documents]
        if args.compactor and args.method != "still":
            raise ValueError(f"--compactor belongs to the method still, not to {args.method}; leave one of them out")
        if args.split == "own" and args.method != "still":
            raise ValueError(f"--split own is the compactor's; {args.method} has none: name a JSON file")
        split = Split.load(args.split) if args.split not in (None, "own") else None
        _quiet()

        import torch

        from . import models
        from .prompts import PromptFormat, render
        from .rope import full_attention_layers, head_dim_of

        beta = args.method == "attention_matching" or args.split is not None
        loaded = models.load(args.model, args.device, args.dtype, "still" if beta else None, args.revision)
        form = PromptFormat.of(loaded.tokenizer)
        ids = torch.tensor([render(loaded.tokenizer, documents, (), form)[0]], device=loaded.model.device)
        tokens = ids.shape[-1]
        if args.bytes is not None:
            heads = loaded.model.config.get_text_config(decoder=True)
            args.slots = slots_of_bytes(
                args.bytes, len(full_attention_layers(heads)), heads.num_key_value_heads, head_dim_of(heads),
                loaded.model.dtype.itemsize,
            )  # fmt: skip
        resolve_slots(tokens, args.slots, ratio)
        _check_length(loaded, tokens)
        _say(f"reading {tokens:,} tokens of {', '.join(name for name, _ in documents)} with {loaded.name}")
        started = time.perf_counter()
        cache = _compact(loaded, ids, args, ratio, split)
        seconds = time.perf_counter() - started
        cache.provenance.update(
            _file_provenance(loaded, args, form.to_dict(), documents, seconds, {"ratio": ratio, "slots": args.slots})
        )
        cache.save(args.output)
        _say(
            f"{args.output}: {_size_of(cache)}, {tokens:,} tokens in {cache.slots:,} slots "
            f"({tokens / cache.slots:.3g}x) by {args.method} in {seconds:.1f} s"
        )
        return 0


class Ask:
    """`still ask`: a question to a compact cache."""

    help = "Answer a question from a compact cache."
    description = """\
Answer a question from a file that `still compact` wrote. The answer goes to stdout as it is made; slots, bytes
and seconds go to stderr. The file's sha256 is checked first, against corruption."""
    examples = """\
examples:
  still ask lease.safetensors "When does the term end?"
  still ask lease.safetensors "Who pays the service charge?" --max-new-tokens 200
  still ask lease.safetensors "When does the term end?" --model ./qwen3-0.6b     # the model has moved"""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument("file", metavar="FILE", type=Path, help="a file of `still compact`")
        parser.add_argument("question", metavar="QUESTION", help="as you would ask a person")
        parser.add_argument("--model", metavar="MODEL", help="where the model is now (default: as the file names it)")
        parser.add_argument(
            "--max-new-tokens", metavar="N", type=int, default=256, help="longest answer, in tokens (default: 256)"
        )
        parser.add_argument(
            "--verify", action=argparse.BooleanOptionalAction, default=True,
            help="check the sha256 of the file's data before it is used (default: yes)",
        )  # fmt: skip
        _add_model_flags(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Load, ask, stream."""
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens is {args.max_new_tokens}; it must be 1 or more")
        if not args.question.strip():
            raise ValueError("the question is empty")
        _quiet()

        import torch
        from transformers import TextStreamer

        from . import models
        from .cache import StillCache
        from .cache_io import read_header
        from .calling import passing
        from .prompts import PromptFormat, render_question

        about = read_header(args.file)["description"]
        made_with = about["provenance"]
        name = args.model or made_with.get("model")
        if not name:
            raise ValueError(f"{args.file} does not say which model it belongs to; pass --model")
        revision = args.revision or made_with.get("revision")
        loaded = models.load(name, args.device, about["dtype"], "still" if _needs_still(about) else None, revision)
        cache = StillCache.load(args.file, loaded.model, verify=args.verify)
        form = made_with.get("prompt_format")
        form = PromptFormat(**form) if form else PromptFormat.of(loaded.tokenizer)
        held = cache.token_ids[0].tolist()
        question = torch.tensor(
            [render_question(loaded.tokenizer, args.question, held, form)], device=loaded.model.device
        )
        slots, tokens, size = cache.slots, cache.logical_length, _size_of(cache)
        stops = {"stop_strings": ["\n"], "tokenizer": loaded.tokenizer} if form.style == "plain" else {}
        streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        prompt = cache.prompt(question)
        started = time.perf_counter()
        with torch.inference_mode():
            written = loaded.model.generate(
                **prompt,
                **passing(loaded.model, cache),
                streamer=streamer,
                max_new_tokens=args.max_new_tokens,
                pad_token_id=_pad_id(loaded),
                **_greedy(),
                **stops,
            )
        seconds = time.perf_counter() - started
        new = written.shape[-1] - prompt["input_ids"].shape[-1]
        sys.stdout.flush()
        _say(f"{slots:,} slots for {tokens:,} tokens ({tokens / slots:.3g}x), {size}; {new} tokens in {seconds:.2f} s")
        return 0


class Inspect:
    """`still inspect`: what is in a file."""

    help = "Say what a compact cache file, or a split of slots over heads, holds and how it was made."
    description = """\
Say what a file of `still compact` holds and how it was made, or show a split of `still budgets`, by layer and
KV head. No model is loaded."""
    examples = """\
examples:
  still inspect lease.safetensors
  still inspect split.json                        slots of each head, as shares of the mean
  still inspect ./compactor                       the split that a compactor carries
  still inspect lease.safetensors --verify        also check the sha256 of its data
  still inspect lease.safetensors --json          everything, for programs"""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        parser.add_argument(
            "file", metavar="FILE", type=Path,
            help="a file of `still compact` or `still budgets`, or the folder of a compactor",
        )  # fmt: skip
        parser.add_argument("--verify", action="store_true", help="check the sha256 of the file's data")
        parser.add_argument("--json", action="store_true", help="print everything as JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print the description."""
        from .cache_io import read_header, verify_data

        if args.file.is_dir() or args.file.suffix == ".json":
            return _show_split(args.file, args.json)
        header = read_header(args.file)
        if args.verify:
            verify_data(args.file)
        about = {
            "file": str(args.file),
            "file_bytes": args.file.stat().st_size,
            "sha256": header["sha256"] + (" (verified)" if args.verify else ""),
            **header["description"],
        }
        if args.json:
            print(json.dumps(about, indent=2, default=str))
            return 0
        for name, value in _flat(about):
            print(f"{name:<28} {value}")
        return 0


COMMANDS = {"compact": Compact(), "ask": Ask(), "inspect": Inspect()}


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the model on the Hub")


def _needs_still(about: dict[str, Any]) -> bool:
    """Whether a cache needs the attention "still"."""
    return about["beta"] or about.get("ragged", False)


def _show_split(path: Path, as_json: bool) -> int:
    """Print a split as a table of layers and heads."""
    from .budgets import Split
    from .config import StillConfig

    if path.is_dir():
        file = path / "compactor.json"
        if not file.is_file():
            raise FileNotFoundError(f"{path} holds no compactor.json; name a file of `still compact` or a compactor")
        held = StillConfig.from_json(file.read_text(encoding="utf-8")).split
        if held is None:
            raise ValueError(f"the compactor in {path} carries no split; `still budgets ... --store` puts one in")
        split = Split.from_dict(held)
    else:
        split = Split.load(path)
    if as_json:
        print(json.dumps(split.to_dict(), indent=2))
        return 0
    mean = 1 if split.exact else sum(map(sum, split.weights.values())) / len(split.heads) or 1
    kind = "slots" if split.exact else "slots of each KV head, where 1 is the mean"
    print(f"{split.source} split, floor {split.floor}, model {split.fingerprint or 'any of this shape'}; {kind}")
    heads = max(map(len, split.weights.values()))
    print("layer" + "".join(f"{f'head {head}':>10}" for head in range(heads)))
    for layer, shares in sorted(split.weights.items()):
        print(f"{layer:>5}" + "".join(f"{share / mean:>10.3g}" for share in shares))
    return 0


def _compact(
    loaded: LoadedModel, ids: Any, args: argparse.Namespace, ratio: float | None, split: Split | None
) -> StillCache:
    from . import methods
    from .attention import attending
    from .compactor import StillCompactor
    from .reading import read

    budget = {"ratio": ratio} if ratio is not None else {"slots": args.slots}
    if args.method != "still":
        method = methods.get(args.method, **args.option, split=split)
        return method.compact(loaded.model, read(loaded.model, ids, queries=method.needs_queries), **budget)
    if args.option:
        raise ValueError(f"the method still takes no --option.{next(iter(args.option))}; give --compactor instead")
    where = args.compactor or (loaded.compactors[0] if loaded.compactors else None)
    if where is None:
        raise ValueError(
            f"{loaded.name} comes with no compactor; pass --compactor PATH (`still train` makes one), or choose a "
            f"method that needs no training, such as --method expected_attention"
        )
    if where == "untrained":
        compactor = StillCompactor.for_model(loaded.model, **budget)
    else:
        compactor = StillCompactor.from_pretrained(where, model=loaded.model)
    if args.split is not None:
        compactor = compactor.with_split(split or "own")
    # Chunks after the first are read behind slots, which stock attention cannot bias.
    with attending(loaded.model) if compactor.config.beta else nullcontext():
        return compactor.prefill(loaded.model, ids, **budget)


def _file_provenance(
    loaded: LoadedModel,
    args: argparse.Namespace,
    form: dict[str, str],
    documents: list[tuple[str, str]],
    seconds: float,
    budget: dict[str, Any],
) -> dict[str, Any]:
    from .provenance import provenance

    texts = [
        {"name": name, "characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in documents
    ]
    return provenance(
        device=loaded.model.device,
        model=str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model,
        revision=args.revision or getattr(loaded.model.config, "_commit_hash", None),
        prompt_format=form,
        documents=texts,
        compactor_source=None if args.method != "still" else str(args.compactor or loaded.compactors[0]),
        budget=budget,
        seconds=round(seconds, 3),
    )


def _read_document(name: str) -> tuple[str, str]:
    """Name and text of a document, or of stdin for `-`."""
    if name == "-":
        text, name = sys.stdin.read(), "stdin"
    else:
        path = Path(name)
        if path.is_dir():
            raise IsADirectoryError(f"{name} is a folder; name the text files in it, in reading order")
        try:
            text, name = path.read_text(encoding="utf-8"), path.name
        except UnicodeDecodeError as problem:
            raise ValueError(
                f"{name} is not UTF-8 text (byte {problem.start} is {problem.object[problem.start]:#04x}); "
                f"convert it to text first"
            ) from None
    if not text.strip():
        raise ValueError(f"{name} is empty; there is nothing to read")
    return name, text


def _check_output(path: Path) -> None:
    """Refuse a place that cannot be written, before minutes of work."""
    if path.is_dir():
        raise IsADirectoryError(f"--output {path} is a folder; name a file, such as {path / 'matter.safetensors'}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output {path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PermissionError(f"--output {path}: the folder {path.absolute().parent} cannot be written to")


def _check_length(loaded: LoadedModel, tokens: int) -> None:
    longest = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest and tokens > longest:
        _say(f"warning: {tokens:,} tokens are more than the {longest:,} that {loaded.name} was made for")


def _quiet() -> None:
    """Keep the library's progress bars for loading weights out of the way."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


def _greedy() -> dict[str, Any]:
    """Greedy decoding, whatever sampling the model's own configuration asks for."""
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}


def _pad_id(loaded: LoadedModel) -> int | None:
    tokenizer = loaded.tokenizer
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _size_of(cache: StillCache) -> str:
    return human_bytes(cache.nbytes)


def human_bytes(count: int) -> str:
    """Bytes for people, in powers of 1,000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _flat(about: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested entries as `outer.inner` names, in order."""
    rows: list[tuple[str, Any]] = []
    for name, value in about.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, human_bytes(value) if name.endswith("bytes") and value else value))
    return rows


def _say(text: str) -> None:
    print(f"still: {text}", file=sys.stderr, flush=True)
