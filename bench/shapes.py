"""What the benches share: models of a real shape with random weights, their arithmetic, and rows of measurements.

All arithmetic is in floating-point operations, two for a multiplication with its addition; matrix products alone.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from still import memory
from still.bench.arithmetic import Decoder
from still.provenance import describe_device, git_state, versions

memory.keep_freed()  # as commands do
ROWS = Path(__file__).parent / "rows"
COLUMNS = (
    "kernel", "provider", "mode", "metric", "unit", "x", "median", "p20", "p80", "config", "device", "version",
    "commit",
)  # fmt: skip
SHAPES = {
    "pocket": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048, "attention_bias": True,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "qwen3-4b": {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 512,
    },
}  # fmt: skip
TOKENS = {"pocket": 1050, "qwen3-0.6b": 4096, "qwen3-4b": 8192, "tiny": 256}


def shape_config(shape: str, **overrides):
    """The configuration of one of `SHAPES`."""
    from transformers import Qwen3Config

    rope = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen3Config(**{
        **SHAPES[shape], "max_position_embeddings": 40960, "rope_parameters": rope, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": None, **overrides,
    })  # fmt: skip


def random_model(shape: str, seed: int = 0, device: str = "cpu", dtype: str = "float32", **overrides):
    """A frozen model of that shape with random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = shape_config(shape, **overrides)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=getattr(torch, dtype))
    return model.to(device=device, dtype=getattr(torch, dtype)).eval().requires_grad_(False)


def decoder(shape: str) -> Decoder:
    """What its arithmetic depends on."""
    c = SHAPES[shape]
    return Decoder(
        c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], c["num_attention_heads"],
        c["num_key_value_heads"], c["head_dim"],
    )  # fmt: skip


def prefill_flops(shape: str, tokens: int, start: int = 0) -> float:
    """Reading `tokens` tokens after `start` others, without logits."""
    return decoder(shape).prefill(tokens, start)


def compaction_flops(shape: str, tokens: int, slots: int, blocks: int = 2) -> float:
    """Compacting all layers of one row in one pass."""
    return decoder(shape).compaction(tokens, slots, blocks)


def milliseconds(
    call: Callable[[], object], repeats: int, wait: Callable[[], object] = lambda: None, warm: bool = True
) -> list[float]:
    """Wall times of `repeats` calls, after one that is not counted if `warm`; `wait` returns when a device is done."""
    if warm:
        call()
        wait()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        wait()
        times.append(1e3 * (time.perf_counter() - started))
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[3]}


def append_rows(name: str, rows: Iterable[dict], config: dict, folder: Path = ROWS, on: str = "cpu") -> Path:
    """Append measurements to `rows/<name>.csv`; conditions are added to each, `on` is the device."""
    device, git = describe_device(on), git_state() or {}
    known, named = versions(), ("still-kv", "torch", "transformers", *(("triton",) if on != "cpu" else ()))
    threads = f", {os.cpu_count()} cores" + (f", {device['threads']} threads" if "threads" in device else "")
    common = {
        "config": json.dumps(config, sort_keys=True),
        "device": device["name"] + (threads if on == "cpu" else ""),
        "version": " ".join(f"{name} {known[name]}" for name in named if name in known),
        "commit": git.get("commit", "") + ("+changes" if git.get("dirty") else ""),
    }
    path = folder / f"{name}.csv"
    append_csv(path, [{**row, **common} for row in rows], COLUMNS)
    return path


def append_csv(path: Path, rows: list[dict], columns: Iterable[str] | None = None) -> None:
    """Append rows to a table, which begins with their columns (those of the first row unless given)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns or rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def run_still(argv: Sequence[str], log: Path, threads: int = 1, launcher: Sequence[str] = ()) -> int:
    """One command of `still`, its output appended to a file; its exit status.

    Args:
        argv: after `still`.
        log: the file.
        threads: of each process.
        launcher: arguments of Python before `-m still.cli`, such as those of `accelerate launch`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", *launcher, "-m", "still.cli", *argv]
    with log.open("a", encoding="utf-8") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        return subprocess.run(command, env=environment, stdout=file, stderr=file).returncode
