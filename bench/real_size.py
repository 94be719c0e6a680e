"""Do the commands run at a real model's size? Peak memory and seconds of each, beside the arithmetic.

    python bench/real_size.py --folder /tmp/real             # Qwen3-0.6B's shape, random weights, 4,096 tokens

Makes a model folder (2.4 GB in fp32), a byte tokenizer, a document and training rows in FOLDER, then runs `still
compact`, `still ask` and ten steps of `still train`, each in a process of its own, batch 1. Answers of random weights
mean nothing; time and memory do not depend on them. Rows go to bench/rows/real_size.csv, and the last line of stdout is
one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from shapes import SHAPES, TOKENS, append_rows, compaction_flops, prefill_flops, random_model

QUESTION, ANSWER_TOKENS = "When does the term end?", 16
CHAT = (
    "{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer():
    """Special tokens and 256 bytes: any text, one token a byte, made offline."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate((*specials, *letters))}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=specials[0], eos_token=specials[1], extra_special_tokens=specials[2:],
        chat_template=CHAT, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def prepare(folder: Path, shape: str, tokens: int, ratio: float) -> None:
    """Model, tokenizer, an untrained compactor, a document of `tokens` bytes, and rows to train on."""
    from still import StillCompactor

    model = random_model(shape, pad_token_id=0, eos_token_id=1)
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    StillCompactor.for_model(model, ratio=ratio, chunk=tokens).save_pretrained(folder / "compactor")
    rng = random.Random(0)
    words = ("lease", "term", "party", "notice", "ends", "on", "the", "fee", "of", "shall", "pay")
    text = " ".join(rng.choice(words) for _ in range(tokens))[: tokens - 40]  # room for the chat's own tokens
    (folder / "document.txt").write_text(text)
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(2):
            turns = [{"question": f"{QUESTION} ({i})", "answer": f"On day {rng.randrange(1000)}."} for i in range(4)]
            file.write(json.dumps({"id": f"r{number}", "context": text[number:], "turns": turns}) + "\n")


def run(command: list[str], threads: int) -> dict:
    """Seconds and peak memory of one command of `still`, in GiB."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "still.cli", *command], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": time.perf_counter() - started, "peak_gib": usage.ru_maxrss * unit / 2**30,
        "exit": child.returncode, "output": output[-2000:],
    }  # fmt: skip


def arithmetic(shape: str, tokens: int, slots: int, steps: int) -> dict[str, float]:
    """Floating-point operations of each command; training counts a backward pass as two forward ones.

    A training step is the teacher's pass over context and turns, the compaction forward and backward, and the
    student's turns forward and backward (to the slots alone, so about two forward passes in all).
    """
    turns = 150
    compaction = compaction_flops(shape, tokens, slots)
    step = prefill_flops(shape, tokens) + 3 * compaction + 4 * prefill_flops(shape, turns, tokens)
    return {
        "compact": prefill_flops(shape, tokens) + compaction,
        "ask": prefill_flops(shape, len(QUESTION) + ANSWER_TOKENS, slots),
        "train": steps * step,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="about 3 GB of room for Qwen3-0.6B's shape")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--ratio", type=float, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-rows", action="store_true", help="print, but append nothing")
    args = parser.parse_args()
    folder, tokens = args.folder, args.tokens or TOKENS[args.shape]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "trained", ignore_errors=True)  # a finished run would not train again
    # In a process of its own: this one stays small, and a child's peak memory starts from its parent's.
    source = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; "
    source += f"import real_size; real_size.prepare(Path({str(folder)!r}), {args.shape!r}, {tokens}, {args.ratio})"
    subprocess.run([sys.executable, "-c", source], check=True)
    file, model, ratio = str(folder / "document.safetensors"), str(folder / "model"), f"{args.ratio:g}"
    commands = {
        "compact": ["compact", model, str(folder / "document.txt"), "--compactor", str(folder / "compactor"),
                    "--ratio", ratio, "-o", file, "--device", "cpu"],
        "ask": ["ask", file, QUESTION, "--max-new-tokens", str(ANSWER_TOKENS), "--device", "cpu"],
        "train": ["train", model, "--data", str(folder / "rows.jsonl"), "-o", str(folder / "trained"),
                  "--device", "cpu", "--steps", str(args.steps), "--batch", "1", "--ratios", ratio,
                  "--lengths", str(2 * tokens), "--held-out", "0", "--eval-every", "0",
                  "--save-every", str(args.steps)],
    }  # fmt: skip
    flops, rows, results = arithmetic(args.shape, tokens, int(tokens / args.ratio), args.steps), [], []
    for name, command in commands.items():
        got = run(command, args.threads)
        results.append({"command": name, "gflop": flops[name] / 1e9, **got})
        failed = "" if got["exit"] == 0 else f" FAILED: {got['output']}"
        work = f"{flops[name] / 1e9:,.1f} GFLOP"
        print(f"still {name:8s} {got['seconds']:8.1f} s, peak {got['peak_gib']:6.2f} GiB, {work}{failed}", flush=True)
        for metric, unit, value in (("time", "s", got["seconds"]), ("peak memory", "GiB", got["peak_gib"]),
                                    ("arithmetic", "GFLOP", flops[name] / 1e9)):  # fmt: skip
            rows.append({"kernel": f"still {name}", "provider": "still", "mode": "full", "metric": metric, "unit": unit,
                         "x": tokens, "median": value, "p20": value, "p80": value})  # fmt: skip
    config = {"shape": args.shape, "tokens": tokens, "ratio": args.ratio, "steps": args.steps, "batch": 1,
              "threads": args.threads, "dtype": "float32"}  # fmt: skip
    if not args.no_rows and all(each["exit"] == 0 for each in results):
        append_rows("real_size", rows, config)
    print(json.dumps({"question": "real_size", **config, "results": results}))
    return max(each["exit"] for each in results)


if __name__ == "__main__":
    sys.exit(main())
