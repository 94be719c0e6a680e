"""How long does compaction take against the prefill, and against its share of the prefill's arithmetic?

    python bench/compaction_time.py                          # the pocket's shape, 1,050 tokens, two threads
    python bench/compaction_time.py --shape qwen3-0.6b       # Qwen3-0.6B's shape, 4,096 tokens: minutes
    python bench/compaction_time.py --shape qwen3-4b --device cuda --tokens 131072 --chunk 8192 --ratios 8 50

Weights are random: time does not depend on them. For every ratio it measures one forward pass over the context (no
logits) and the compaction of its cache, in one pass or chunk after chunk, and appends rows to
bench/rows/compaction_time.csv. The bar: time(compaction) / time(prefill) is at most 1.5 times (2 times on a GPU)
flops(compaction) / flops(prefill). The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys

from shapes import SHAPES, TOKENS, append_rows, compaction_flops, milliseconds, prefill_flops, random_model, spread

BARS = {"cpu": 1.5, "cuda": 2.0}


def in_turns(long, short, repeats: int, wait) -> tuple[list[float], list[float]]:
    """Wall times of two calls: `repeats` of the long one, each followed by short ones that take as long together.

    Whatever else slows the machine for a while slows both.
    """
    first, then = milliseconds(long, 1, wait), milliseconds(short, 1, wait)
    for _ in range(repeats - 1):
        first += milliseconds(long, 1, wait, warm=False)
        then += milliseconds(short, max(1, round(first[-1] / min(then))), wait, warm=False)
    return first, then


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="pocket")
    parser.add_argument("--tokens", type=int, help="context (default: 1,050 for the pocket, 4,096 for Qwen3-0.6B)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--chunk", type=int, help="compact so many tokens at a time (default: all in one pass)")
    parser.add_argument("--placement", type=int, default=0, metavar="WIDTH", help="of the scorers (default: 0, none)")
    parser.add_argument("--scout", type=int, metavar="LAYER", help="that scores for all (default: each for itself)")
    parser.add_argument("--device", default="cpu", choices=BARS)
    parser.add_argument("--dtype", help="of the model (default: float32, bfloat16 on a GPU)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-rows", action="store_true", help="print, but append nothing")
    args = parser.parse_args()
    import torch

    from still import StillCompactor, read, slots_for
    from still.placement import COMPARED, LATER, listed

    torch.set_num_threads(args.threads)
    gpu = args.device == "cuda"
    # The compactor's own linear layers over latents are fp32: TF32 lets the matrix units do them.
    torch.set_float32_matmul_precision("high" if gpu else "highest")
    wait = torch.cuda.synchronize if gpu else (lambda: None)
    tokens, dtype = args.tokens or TOKENS[args.shape], args.dtype or ("bfloat16" if gpu else "float32")
    chunk = min(args.chunk or tokens, tokens)
    spans = [(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]
    model = random_model(args.shape, device=args.device, dtype=dtype)
    compactor = StillCompactor.for_model(model, ratio=8, chunk=chunk, placement=args.placement, scout=args.scout)
    compactor.trains(False)
    ids = torch.randint(3, SHAPES[args.shape]["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(args.device)
    reading, arithmetic = read(model, ids), prefill_flops(args.shape, tokens)

    def compact(ratio):
        if len(spans) == 1:
            return compactor.compact_rows(reading.cache, [tokens], ratio=ratio)
        return [
            compactor.compact_layer(
                layer, stored.keys[:, :, start:stop], stored.values[:, :, start:stop],
                torch.arange(start, stop, device=ids.device), slots_for(stop - start, ratio),
            )
            for start, stop in spans
            for layer, stored in enumerate(reading.cache.layers)
        ]  # fmt: skip

    heads = len(compactor.layers) * compactor.kv_heads
    width = 2 * compactor.layers["0"].key_head.out_features
    again = listed(tokens)
    looks = tokens * (width + 1) + again * (width + LATER + 1)
    if args.scout is not None and len(spans) == 1:  # chunk after chunk, every layer looks for itself
        heads = compactor.kv_heads
    scoring = 2 * heads * (args.placement * looks + again * COMPARED * (width + again)) if args.placement else 0
    rows, results = [], []
    for ratio in args.ratios:
        prefill, ours = in_turns(lambda: read(model, ids), lambda r=ratio: compact(r), args.repeats, wait)
        counts = [slots_for(stop - start, ratio) for start, stop in spans]
        work = sum(compaction_flops(args.shape, b - a, n) for (a, b), n in zip(spans, counts, strict=True))
        work += scoring
        times = spread(prefill), spread(ours)
        share, time_share = work / arithmetic, times[1]["median"] / times[0]["median"]
        for mode, each, flops in (("prefill", times[0], arithmetic), ("compact", times[1], work)):
            row = {"kernel": "compaction", "provider": "still", "mode": mode, "x": ratio}
            rows.append({**row, "metric": "time", "unit": "ms", **each})
            rows.append({**row, "metric": "arithmetic", "unit": "GFLOP", **dict.fromkeys(each, flops / 1e9)})
        results.append({
            "ratio": ratio, "slots": sum(counts), "prefill_ms": times[0]["median"], "compact_ms": times[1]["median"],
            "share_of_time": time_share, "share_of_arithmetic": share, "times_its_share": time_share / share,
        })  # fmt: skip
        print(
            f"{ratio:5g}x {sum(counts):5d} slots: prefill {times[0]['median']:9.1f} ms, compaction "
            f"{times[1]['median']:9.1f} ms = {time_share:6.1%} of its time for {share:6.1%} of its arithmetic: "
            f"{time_share / share:.2f} times its share"
        )
    config = {"shape": args.shape, "tokens": tokens, "chunk": chunk, "batch": 1, "dtype": dtype,
              "repeats": args.repeats, "placement": args.placement, "scout": args.scout}  # fmt: skip
    if not args.no_rows:
        append_rows("compaction_time", rows, config, on=args.device)
    bar = BARS[args.device]
    within = all(each["times_its_share"] <= bar for each in results)
    print(json.dumps({"question": "compaction_time", **config, "threads": args.threads, "bar": bar, "within": within,
                      "prefill_gflop": arithmetic / 1e9, "results": results}))  # fmt: skip
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
