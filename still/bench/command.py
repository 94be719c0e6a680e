"""The command `still bench`: the kernels checked and timed on this machine, against their floor."""

from __future__ import annotations

import argparse
import csv
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..flags import add_flags, from_flags
from .config import BenchConfig

if TYPE_CHECKING:
    import torch

    from .arithmetic import Roof
    from .measure import Case

COLUMNS = (
    "kernel", "provider", "mode", "metric", "unit", "x", "median", "p20", "p80", "config", "device", "version",
    "commit",
)  # fmt: skip


class Bench:
    """`still bench`: correctness, timings and the roofline of every kernel."""

    help = "Check and time the kernels on this machine, against its measured limits."
    description = """\
Measure copy bandwidth and matrix rate, then for each kernel and shape: the error against fp64, the time of every
way to compute it, and the share of the floor (bytes over bandwidth or operations over rate, whichever is longer).
On a CPU the PyTorch references run against eager PyTorch. Rows are appended to kernels.csv."""
    examples = """\
examples:
  still bench
  still bench --kernels rope --tokens 8192,131072 --device cuda:0
  still bench --floors h200"""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags."""
        add_flags(parser, BenchConfig)

    def run(self, args: argparse.Namespace) -> int:
        """Measure, print, write; 1 where a kernel's numbers are wrong."""
        config = from_flags(args, BenchConfig)
        if config.floors:
            from .floors import TOKENS, table

            print(table(config.floors, config.tokens or TOKENS))
            return 0
        return bench(config)


COMMANDS = {"bench": Bench()}


def bench(config: BenchConfig) -> int:
    """Run `still bench`.

    Returns:
        0, or 1 where an error against fp64 is over the bar.

    Raises:
        ValueError: an unknown kernel or an unusable device.
    """
    import torch

    from ..provenance import provenance
    from . import OPERATIONS
    from .measure import roof

    if unknown := [name for name in config.kernels if name not in OPERATIONS]:
        raise ValueError(f"there is no benchmark {unknown[0]!r}; there are {', '.join(OPERATIONS)}")
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {config.device}, and torch finds no GPU; leave out --device to use the CPU")
    gpu = device.type == "cuda"
    dtype = getattr(torch, config.dtype or ("bfloat16" if gpu else "float32"))
    tokens = config.tokens or ((8192, 32768, 131072) if gpu else (512, 2048))
    config.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with torch.no_grad():
        limits = roof(device, dtype, config.repeats)
        rates = f"copies {limits.bandwidth / 1e9:.0f} GB/s, multiplies {limits.rate / 1e12:.2f} TFLOP/s"
        print(f"{device}, {dtype}: {rates}")
        results = measure_all(config.kernels or OPERATIONS, device, dtype, tokens, config.repeats, limits)
    about = provenance(config, seed=0, device=device)
    rows = [row for result in results for row in table_rows(result, about, dtype, limits)]
    append(config.output / "kernels.csv", rows)
    document = {**about, "roof": vars(limits), "dtype": str(dtype), "results": results}
    (config.output / "kernels.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if config.figure:
        draw(config.output / "roofline.png", results, limits, f"{about['device']['name']}, {dtype}")
    print(f"wrote {config.output / 'kernels.csv'}, kernels.json{' and roofline.png' if config.figure else ''}")
    return 1 if any(result["wrong"] for result in results) else 0


def measure_all(names, device: torch.device, dtype: torch.dtype, tokens, repeats: int, limits: Roof) -> list[dict]:
    """Every case of the operations, printed as it comes."""
    from importlib import import_module

    print(f"{'kernel':18}{'mode':10}{'x':>8}  {'provider':16}{'ms':>9}{'floor':>8}{'error':>9}{'memory':>10}  config")
    results = []
    for name in names:
        for case in import_module(f".{name}", __package__).cases(device, dtype, tuple(tokens)):
            result = measure_case(case, device, dtype, repeats, limits)
            results.append(result)
            for provider, found in result["providers"].items():
                memory = "" if found["memory"] is None else f"{found['memory'] / 2**20:.1f} MiB"
                checked = "" if found["error"] is None else f"{found['error']:.1e}"
                print(
                    f"{case.kernel:18}{case.mode:10}{case.x:8d}  {provider:16}{found['seconds']['median'] * 1e3:9.3f}"
                    f"{found['share_of_floor']:8.1%}{checked:>9}{memory:>10}  "
                    + " ".join(f"{key}={value}" for key, value in case.config.items())
                )
    return results


def measure_case(case: Case, device: torch.device, dtype: torch.dtype, repeats: int, limits: Roof) -> dict[str, Any]:
    """Error and time of every provider; `wrong` names ours where its error is past twice that of PyTorch's best."""
    import torch

    from .measure import error, extra_memory, seconds

    exact, floor, found = case.exact() if case.exact else None, limits.floor(case.work), {}
    for name, call in case.providers.items():
        checked = None if exact is None or name == "copy" else error(call(), exact)
        took = seconds(call, device, repeats)
        found[name] = {
            "seconds": took, "error": checked, "memory": extra_memory(case.whole.get(name, call), device),
            "share_of_floor": floor / took["median"],
        }  # fmt: skip
    mine = found[case.ours]["error"]
    others = [each["error"] for name, each in found.items() if name != case.ours and each["error"] is not None]
    bar = max(8 * torch.finfo(dtype).eps, 2 * min(others, default=0.0))
    wrong = [case.ours] if mine is not None and not mine <= bar else []
    if wrong:
        print(f"WRONG: {case.ours} of {case.kernel} differs from fp64 by {mine:.1e}, more than {bar:.1e}")
    return {
        "kernel": case.kernel, "mode": case.mode, "x": case.x, "config": case.config, "bytes": case.work.bytes,
        "operations": case.work.operations, "floor": floor, "ours": case.ours, "wrong": wrong, "providers": found,
    }  # fmt: skip


def table_rows(result: dict, about: dict, dtype: torch.dtype, limits: Roof) -> list[dict]:
    """The measurements of one case as rows of kernels.csv."""
    git, device = about["git"] or {}, about["device"]
    common = {
        "kernel": result["kernel"], "mode": result["mode"], "x": result["x"],
        "config": json.dumps({**result["config"], "dtype": str(dtype).removeprefix("torch.")}, sort_keys=True),
        "device": device["name"] + ("" if device["type"] == "cuda" else f", {os.cpu_count()} cores"),
        "version": " ".join(f"{k} {v}" for k, v in about["versions"].items() if k in ("still-kv", "torch", "triton")),
        "commit": git.get("commit", "") + ("+changes" if git.get("dirty") else ""),
    }  # fmt: skip
    rows = []
    for provider, found in result["providers"].items():
        times = found["seconds"]
        slow_first = {"median": times["median"], "p20": times["p80"], "p80": times["p20"]}
        metrics = [
            ("time", "ms", {key: value * 1e3 for key, value in times.items()}),
            ("bandwidth", "GB/s", {key: result["bytes"] / value / 1e9 for key, value in slow_first.items()}),
            ("rate", "TFLOP/s", {key: result["operations"] / value / 1e12 for key, value in slow_first.items()}),
            ("share of floor", "1", {key: result["floor"] / value for key, value in slow_first.items()}),
        ]
        for name, unit, value in (("memory", "MiB", found["memory"]), ("error", "1", found["error"])):
            if value is not None:
                metrics.append((name, unit, dict.fromkeys(times, value / 2**20 if name == "memory" else value)))
        rows += [{**common, "provider": provider, "metric": name, "unit": unit, **each} for name, unit, each in metrics]
    copied = dict.fromkeys(("median", "p20", "p80"), limits.bandwidth / 1e9)
    return [*rows, {**common, "provider": "device", "metric": "copy bandwidth", "unit": "GB/s", **copied}]


def append(path: Path, rows: list[dict]) -> None:
    """Add rows to a CSV file, with a header if it is new."""
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def draw(path: Path, results: list[dict], limits: Roof, where: str) -> None:
    """The roofline: what was reached over operations a byte, under what the device was measured to do."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    intensities = [result["operations"] / result["bytes"] for result in results]
    ridge = limits.rate / limits.bandwidth
    span = [min(*intensities, ridge) / 2, max(*intensities, ridge) * 2]
    line = sorted([*span, ridge])
    axes.plot(line, [min(x * limits.bandwidth, limits.rate) / 1e12 for x in line], color="#1f2328", lw=1.2)
    markers = dict(zip(sorted({result["kernel"] for result in results}), "osDv^", strict=False))
    shown = set()
    for result, intensity in zip(results, intensities, strict=True):
        for provider, found in result["providers"].items():
            if provider == "copy":
                continue
            ours = provider == result["ours"]
            label = result["kernel"] if ours and result["kernel"] not in shown else None
            shown.add(result["kernel"] if ours else None)
            axes.plot(
                intensity, result["operations"] / found["seconds"]["median"] / 1e12, markers[result["kernel"]],
                color="#d1410c" if ours else "#8a8f98", ms=6 if ours else 4, label=label,
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s")
    axes.set_title(f"Measured roofline, {where}; grey: other ways to compute the same", fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)
    plt.close(figure)
