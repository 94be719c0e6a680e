"""How long do many questions of one context take? Seconds for all answers, and the tensors' bytes that they add.

    python bench/asking.py                                            # the pocket's shape
    python bench/asking.py --shape qwen3-0.6b --questions 8 --new 8   # a real model's

Three ways to ask, greedy, of the same cache: `harness.ask`, as sweeps do (all rows behind one context, and likelihoods
too); `generate` on a batch (the cache is repeated for every row); `generate` on one question after the other. Weights
and slots are random: time does not depend on them. The ways take turns, and each number is the median of its turns.
Rows go to bench/rows/asking.csv; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys

from shapes import SHAPES, TOKENS, append_rows, milliseconds, random_model, spread

QUESTION, ANSWER = 12, 8
"""Tokens of each."""


def main() -> int:
    """Measure, print, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="pocket")
    parser.add_argument("--tokens", type=int, help="of the context (default: as many as the shape is measured at)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1, 8], help="tokens per slot (default: 1 8)")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--new", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-rows", action="store_true", help="print only")
    args = parser.parse_args()

    import torch

    from still.cache import StillCache
    from still.harness.ask import Prompt, ask
    from still.rope import full_attention_layers
    from still.types import CompactKV

    torch.manual_seed(0)
    model = random_model(args.shape, device=args.device, dtype=args.dtype)
    config, tokens = model.config, args.tokens or TOKENS[args.shape]
    stop = config.vocab_size - 1
    drawn = torch.randint(3, stop, (args.questions, QUESTION + ANSWER), device=args.device)
    questions, context = drawn[:, :QUESTION], torch.randint(3, stop, (1, tokens), device=args.device)
    prompt = Prompt(questions.tolist(), [[*row[QUESTION:], stop] for row in drawn.tolist()], (stop,))
    greedy = {"do_sample": False, "max_new_tokens": args.new, "eos_token_id": stop, "pad_token_id": 0}

    def made(slots: int) -> StillCache:
        shape = (2, 1, config.num_key_value_heads, slots, config.head_dim)
        return StillCache.from_layers(config, {
            layer: CompactKV(*torch.randn(shape, device=args.device, dtype=model.dtype).unbind(0))
            for layer in full_attention_layers(config)
        }, tokens, token_ids=context)  # fmt: skip

    def one_by_one(cache: StillCache) -> None:
        for question in questions:
            own = cache.clone()
            model.generate(**own.prompt(question[None]), past_key_values=own, **greedy)

    def batch(cache: StillCache) -> None:
        own = cache.clone()
        model.generate(**own.prompt(questions), past_key_values=own, **greedy)

    ways = {
        "ask": lambda cache: ask(model, cache, prompt, max_new_tokens=args.new),
        "generate, a batch": batch,
        "generate, one by one": one_by_one,
    }
    settings = {"shape": args.shape, "tokens": tokens, "questions": args.questions, "new": args.new,
                "dtype": args.dtype, "repeats": args.repeats}  # fmt: skip

    def timed(cache: StillCache) -> dict[str, dict[str, float]]:
        times: dict[str, list[float]] = {name: [] for name in ways}
        with torch.inference_mode():
            for turn in range(args.repeats):
                for name, way in ways.items():
                    times[name] += milliseconds(lambda way=way: way(cache), 1, warm=turn == 0)
        return {name: {key: value / 1e3 for key, value in spread(each).items()} for name, each in times.items()}

    results, rows = [], []
    for ratio in args.ratios:
        cache = made(round(tokens / ratio))
        seconds = timed(cache)
        copies = cache.nbytes * args.questions
        for name, each in seconds.items():
            held = {"ask": 0, "generate, a batch": copies}.get(name, cache.nbytes)
            print(f"{ratio:5g}x {name:<22} {each['median']:8.2f} s   copies of the context: {held / 2**20:8.1f} MiB")
            rows.append({"kernel": "questions", "provider": name, "mode": f"{ratio:g}x", "metric": "time", "unit": "s",
                         "x": args.questions, **each})  # fmt: skip
        medians = {name: each["median"] for name, each in seconds.items()}
        results.append({"ratio": ratio, "nbytes": cache.nbytes, "seconds": medians})
    if not args.no_rows:
        append_rows("asking", rows, settings, on=args.device)
    print(json.dumps({"question": "asking", **settings, "threads": torch.get_num_threads(), "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
