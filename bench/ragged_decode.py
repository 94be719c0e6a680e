"""Is decoding from unequal heads as fast as from equal ones? Milliseconds a token, end to end, at the same total slots.

    python bench/ragged_decode.py                                     # Qwen3-0.6B's shape on this device
    python bench/ragged_decode.py --shape pocket --slots 64 --batch 32

Uniform slots run in sdpa and in "still"; unequal ones, 60 to 1 over the heads of every layer, in "still". Weights and
slots are random: time does not depend on them. Each side is the median of several steps.
Rows go to bench/rows/ragged_decode.csv; the last line of stdout is one JSON document, and the exit status says whether
unequal heads were within 10 % of equal ones in the same attention.
"""

from __future__ import annotations

import argparse
import json
import sys

from shapes import SHAPES, append_rows, milliseconds, random_model, spread

SPREAD, BAR = 60, 1.10


def main() -> int:
    """Measure, print, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--slots", type=int, default=512, help="slots of the average head")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default=None, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-rows", action="store_true", help="print only")
    args = parser.parse_args()

    import torch

    from still.attention import register
    from still.budgets import Split
    from still.cache import StillCache
    from still.rope import full_attention_layers
    from still.types import CompactKV

    register()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    model = random_model(args.shape).to(device, dtype)
    heads, width, tokens = model.config.num_key_value_heads, model.config.head_dim, 16 * args.slots
    layers = full_attention_layers(model.config)
    shares = [SPREAD ** (head / max(1, heads - 1)) for head in range(heads)]
    counts = Split({layer: tuple(shares) for layer in layers}).counts(tokens, args.slots)

    def random_pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(2, *shape, device=device, dtype=dtype).unbind(0)

    uniform = {layer: CompactKV(*random_pair(args.batch, heads, args.slots, width)) for layer in layers}
    uneven = {
        layer: CompactKV(*random_pair(args.batch, sum(own), width), counts=own) for layer, own in counts.items()
    }
    step = torch.full((args.batch, 1), 3, device=device)

    @torch.inference_mode()
    def decode(cache: StillCache) -> None:
        model(step, past_key_values=cache)
        cache.crop(-1)
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {}
    for name, attention, records in (
        ("uniform sdpa", "sdpa", uniform), ("uniform still", "still", uniform), ("60:1 still", "still", uneven),
    ):  # fmt: skip
        model.set_attn_implementation(attention)
        cache = StillCache.from_layers(model.config, records, tokens)
        times[name] = milliseconds(lambda c=cache: decode(c), args.repeats)
    config = {"shape": args.shape, "slots": args.slots, "batch": args.batch, "dtype": str(dtype), "device": device}
    rows, medians = [], {}
    for name, each in times.items():
        medians[name] = spread(each)["median"]
        row = {"kernel": "decode", "provider": name, "mode": f"batch {args.batch}", "metric": "time", "unit": "ms"}
        rows.append({**row, "x": args.slots, **spread(each)})
        print(f"{name:<14} {medians[name]:8.2f} ms a token")
    if not args.no_rows:
        append_rows("ragged_decode", rows, config)
    times_equal = medians["60:1 still"] / medians["uniform still"]
    print(json.dumps({**config, "counts": list(counts[layers[0]]), "medians_ms": medians, "bar": BAR,
                      "times_equal_heads": times_equal, "within": times_equal <= BAR}))  # fmt: skip
    return 0 if times_equal <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
