"""Are our eviction scores those of kvpress 0.5.5? It needs transformers below 5.3: an environment of its own.

    python bench/kvpress_reference.py --folder /tmp/kvpress

makes `venv/` in the folder if it is not there (some gigabytes are installed), lets kvpress score and compress the
cache of a tiny random Qwen3 whose weights lie there too, does the same with `still.methods` in this environment,
prints a table and exits with 1 where anything differs. Scores are compared where both are finite and neither marks an
entry as protected (kvpress gives such entries the largest score, we give infinity); kept entries are compared as sets,
recovered from the compressed keys themselves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = ("kvpress==0.5.5", "transformers==5.2.*", "torch==2.13.0")
TOKENS, SLOTS, SEEDS = 150, (16, 48, 100), (0, 1)
# name, kvpress class and its arguments, our hyper-parameters, whether the scores mean the same
CASES = (
    ("knorm", "KnormPress", {}, {}, True),
    ("keydiff", "KeyDiffPress", {}, {}, True),
    ("snapkv", "SnapKVPress", {"window_size": 12, "kernel_size": 5}, {"window": 12, "kernel_size": 5}, True),
    ("streaming_llm", "StreamingLLMPress", {"n_sink": 4}, {"n_sink": 4}, False),
    ("expected_attention", "ExpectedAttentionPress", {"n_future_positions": 512, "n_sink": 4, "epsilon": 0.02},
     {"future": 512, "n_sink": 4, "epsilon": 0.02}, True),
)  # fmt: skip
TOLERANCE = 1e-4


def build(folder: Path) -> None:
    """A tiny random Qwen3 with attention far from uniform, and contexts for it."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            elif "_proj" in name:
                weight.mul_(6)
    model.save_pretrained(folder / "model")
    seeded = {seed: torch.Generator().manual_seed(seed) for seed in SEEDS}
    ids = {str(seed): torch.randint(0, 128, (2, TOKENS), generator=generator) for seed, generator in seeded.items()}
    save_file(ids, folder / "contexts.safetensors")


def kept_indices(full, kept):
    """Where the kept keys `[.., slots, head_dim]` stand among all `[.., tokens, head_dim]`; -1 for no place."""
    same = (kept[..., :, None, :] == full[..., None, :, :]).all(-1)
    return same.int().argmax(-1).masked_fill(~same.any(-1), -1).sort(-1).values


def dump(folder: Path) -> None:
    """Run in kvpress's environment: its scores and kept indices, to `kvpress.safetensors`."""
    import kvpress
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    out = {}
    for seed, ids in load_file(folder / "contexts.safetensors").items():
        full = DynamicCache()
        with torch.no_grad():
            model.model(input_ids=ids, past_key_values=full)
        for name, cls, arguments, _, _ in CASES:
            for slots in SLOTS:
                press = getattr(kvpress, cls)(compression_ratio=1 - (slots + 0.5) / TOKENS, **arguments)
                scores = []
                score = press.score

                def record(*args, score=score, scores=scores, **kwargs):
                    scores.append(score(*args, **kwargs))
                    return scores[-1]

                press.score = record
                cache = DynamicCache()
                with torch.no_grad(), press(model):
                    model.model(input_ids=ids, past_key_values=cache)
                for layer, state in enumerate(cache.layers):
                    key = f"{name}/{seed}/{slots}/{layer}"
                    out[f"{key}/score"] = scores[layer].float().contiguous()
                    out[f"{key}/kept"] = kept_indices(full.layers[layer].keys, state.keys)
    versions = {"kvpress": "0.5.5", "transformers": transformers.__version__, "torch": torch.__version__}
    save_file(out, folder / "kvpress.safetensors", metadata=versions)


def compare(folder: Path) -> bool:
    """Run here: print one row per method; whether all are equal."""
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from still import methods
    from still.methods.base import LayerView, attention_scale
    from still.reading import read
    from still.rope import Rotary

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    rotary = Rotary.for_model(model)
    with safe_open(str(folder / "kvpress.safetensors"), "pt") as file:
        versions = file.metadata()
        theirs = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    print(f"kvpress 0.5.5 on transformers {versions['transformers']}; still on {transformers.__version__}")
    print(f"{len(SEEDS)} batches of 2 contexts, {TOKENS} tokens, slots {SLOTS}, 3 layers, 2 KV heads\n")
    print(f"{'method':20s} {'max |score diff| / max':>24s} {'kept sets equal':>18s}")
    good = True
    contexts = load_file(folder / "contexts.safetensors")
    contexts = {seed: read(model, ids, queries=True) for seed, ids in contexts.items()}
    for name, _, _, hyper, scored in CASES:
        method, worst, equal, total = methods.get(name, **hyper), 0.0, 0, 0
        for seed, reading in contexts.items():
            for slots in SLOTS:
                for layer, state in enumerate(reading.cache.layers):
                    queries = reading.queries[layer] * attention_scale(model, layer)
                    view = LayerView(layer, state.keys, state.values, torch.arange(TOKENS), slots, queries, rotary)
                    key = f"{name}/{seed}/{slots}/{layer}"
                    if scored:
                        ours, other = method.score(view), theirs[f"{key}/score"]
                        free = ours.isfinite()
                        worst = max(worst, ((ours - other)[free].abs().max() / other[free].abs().max()).item())
                    same = (method.select(view) == theirs[f"{key}/kept"]).all(-1)
                    equal, total = equal + int(same.sum()), total + same.numel()
        good &= equal == total and worst <= TOLERANCE
        print(f"{name:20s} {f'{worst:.1e}' if scored else 'not comparable':>24s} {f'{equal} of {total}':>18s}")
    return good


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the environment, weights and scores go")
    parser.add_argument("--dump", action="store_true", help="only run kvpress; used inside its environment")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.dump:
        dump(folder)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "venv" / "bin" / "python"
    marker = folder / "venv" / "installed.json"
    if not marker.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        marker.write_text(json.dumps(REQUIREMENTS))
    build(folder)
    subprocess.run([str(python), str(Path(__file__).resolve()), "--folder", str(folder), "--dump"], check=True)
    good = compare(folder)
    print("\nall equal" if good else f"\nDIFFERENT (tolerance {TOLERANCE:g}, relative to the largest score)")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
