"""What a calibration of the split costs: seconds and peak memory against heads and against tokens.

    python bench/calibration.py                                    # Qwen3-0.6B's shape, 2,048 tokens, every head
    python bench/calibration.py --heads 4,8 --tokens 512,1024,2048  # a part, to see both lines

A random model and a random row: what is measured means nothing, time and memory do not depend on it. Each line is one
`measure_split` over the first HEADS heads; the reading and the mixtures, which do not grow with the heads, are counted
apart as the line's `fixed` seconds. Seconds are of the processor where other work shares the machine (`cpu`) and of the
wall (`wall`). Rows go to bench/rows/calibration.csv.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from types import SimpleNamespace

from shapes import SHAPES, append_rows, random_model


def main() -> int:
    """Measure, print, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--tokens", default="2048", help="lengths of the context, comma-separated")
    parser.add_argument("--heads", default="0", help="heads to measure, comma-separated; 0 is all")
    parser.add_argument("--levels", default="16", help="compression ratios beside one averaged slot")
    parser.add_argument("--method", default="knorm", help="what compacts a head")
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-rows", action="store_true", help="print only")
    args = parser.parse_args()

    import torch

    from still import methods
    from still.allocation import measure_split
    from still.budgets import Split
    from still.rope import full_attention_layers

    torch.set_num_threads(args.threads)
    model = random_model(args.shape)
    levels = [float(level) for level in args.levels.split(",")]
    every = Split.uniform(full_attention_layers(model.config), model.config.num_key_value_heads).heads
    rows = []
    for tokens in map(int, args.tokens.split(",")):
        for count in map(int, args.heads.split(",")):
            chosen = every[: count or len(every)]
            row = random_row(tokens, args.questions, model.config.vocab_size)
            seconds = []
            for heads in ([], chosen):
                wall, cpu = time.perf_counter(), time.process_time()
                found = measure_split(
                    model, [row], methods.get(args.method), levels=levels, questions=0, heads=heads, progress=False
                )
                seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
            (_, fixed), (wall, cpu) = seconds
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
            per_head = (cpu - fixed) / len(chosen)
            print(
                f"{args.shape} {tokens:5d} tokens {len(chosen):4d} heads: {wall:7.1f} s wall, {cpu:7.1f} s cpu, of "
                f"which {fixed:6.1f} fixed and {per_head:6.2f} a head; all {len(every)} heads "
                f"{fixed + per_head * len(every):7.0f} s cpu; {found.forwards} forwards, peak {peak:.2f} GiB",
                flush=True,
            )
            common = {"kernel": "calibration", "provider": args.method, "mode": f"{len(chosen)} heads", "x": tokens}
            measured = {"wall": wall, "cpu": cpu, "fixed": fixed, "cpu_a_head": per_head, "peak": peak}
            for metric, value in measured.items():
                unit_of, same = ("GiB" if metric == "peak" else "s"), dict.fromkeys(("median", "p20", "p80"), value)
                rows.append({**common, "metric": metric, "unit": unit_of, **same})
    if not args.no_rows:
        append_rows("calibration", rows, {"shape": args.shape, "levels": levels, "answer_tokens": found.answer_tokens})
    return 0


def random_row(tokens: int, questions: int, vocabulary: int) -> SimpleNamespace:
    """A context of random tokens with questions of 12 and answers of 8."""
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(count)]

    return SimpleNamespace(context_ids=ids(tokens), turns=[(ids(12), ids(8)) for _ in range(questions)])


if __name__ == "__main__":
    sys.exit(main())
