"""Do the kernels hold their bars on this GPU? Correctness, every timing, the bars and the roofline, in one call.

    python bench/gpu.py                              # half an hour of one H100 or H200
    python bench/gpu.py --parts correctness kernels  # some of it
    python bench/gpu.py --dry                        # the same way through on a CPU, at tiny sizes; no number counts

Rows are appended to bench/rows/kernels.csv and compaction_time.csv; bench/figures/roofline.png is drawn. Bars are
measured against what the same run measured of the device: a large copy, a large matrix product, and the fastest of
PyTorch's attention kernels. Memory errors are looked for by

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m pytest -n 0 tests/kernels -k "not aot and not dispatch"
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from shapes import ROWS

from still.bench.arithmetic import QWEN3_4B
from still.cli import main as still

HERE = Path(__file__).resolve().parent
PARTS = ("correctness", "kernels", "compaction")


def bars(results: list[dict], roof: dict) -> list[tuple[str, float, str, float]]:
    """What was asked, the measured value, `>=` or `<=`, and the bar, for each shape of `still bench`."""
    found = []
    for result in results:
        ours = result["providers"][result["ours"]]
        others = {name: each for name, each in result["providers"].items()
                  if name not in (result["ours"], "copy", "reference", "eager")}  # fmt: skip
        median = ours["seconds"]["median"]
        name, mode, config, x = result["kernel"], result["mode"], result["config"], result["x"]
        best = min((each["seconds"]["median"] for each in others.values()), default=None)
        if name == "strip_rope":
            share = result["bytes"] / median / roof["bandwidth"]
            found.append((f"strip_rope T={x}: share of the copy bandwidth", share, ">=", 0.85))
        elif name == "latent_attention":
            latents = config["latents"]
            what = f"latent_attention {mode} T={x} t={latents}"
            wanted = 1.2 if mode == "backward" else 1.3 if latents in (164, 1024) else 1.1
            if best:
                found.append((f"{what}: times faster than PyTorch's best", best / median, ">=", wanted))
            if mode == "forward" and latents >= 1024:
                rate = result["operations"] / median / roof["rate"]
                found.append((f"{what}: share of the matrix rate", rate, ">=", 0.5))
            memory = [each["memory"] for each in others.values() if each["memory"] is not None]
            if mode == "forward" and ours["memory"] is not None:
                share = ours["memory"] / QWEN3_4B.cache_bytes(x)
                found.append((f"{what}: extra memory over Qwen3-4B's cache", share, "<=", 0.05))
            elif memory:
                found.append((f"{what}: memory over PyTorch's least", ours["memory"] / min(memory), "<=", 0.1))
        elif mode == "decode":
            what = f"prefix_attention decode t={x} batch={config['batch']} spread={config['spread']}"
            found.append((f"{what}: share of the bandwidth", ours["share_of_floor"], ">=", 0.75))
            if best and config["spread"] == 1:
                found.append((f"{what}: times faster than PyTorch's best", best / median, ">=", 1.0))
    return found


def correctness(dry: bool) -> int:
    """The kernels' own tests, on the GPU."""
    which = ["-k", "refused or nothing"] if dry else ["-m", "full or not full", "-k", "not aot"]
    command = [sys.executable, "-m", "pytest", "-q", str(HERE.parent / "tests" / "kernels"), *which]
    return subprocess.run(command, cwd=HERE.parent).returncode


def kernels(dry: bool, output: Path, names: str | None) -> tuple[int, list[tuple[str, float, str, float]]]:
    """`still bench` with the rows and the figure that are committed."""
    small = ["--tokens", "64", "--repeats", "2", "--device", "cpu"] if dry else []
    code = still(["bench", "--output", str(output), *(["--kernels", names] if names else []), *small])
    if not dry:
        shutil.move(output / "roofline.png", HERE / "figures" / "roofline.png")
    document = json.loads((output / "kernels.json").read_text())
    return code, bars(document["results"], document["roof"])


def compaction(dry: bool, tokens: list[int]) -> tuple[int, list[tuple[str, float, str, float]]]:
    """A Qwen3-4B-shaped cache: chunks of 8,192 appended, and one pass over the whole context beside it."""
    script, found = [sys.executable, str(HERE / "compaction_time.py")], []
    for length in [96] if dry else tokens:
        chunk = 48 if dry else 8192
        for size in dict.fromkeys((chunk, length)):
            ask = ["--tokens", str(length), "--chunk", str(size), "--ratios", "8", *([] if dry else ["50"])]
            ask += ["--shape", "tiny", "--threads", "1", "--repeats", "1", "--no-rows"] if dry else [
                "--shape", "qwen3-4b", "--device", "cuda", "--repeats", "3"]  # fmt: skip
            done = subprocess.run([*script, *ask], cwd=HERE, stdout=subprocess.PIPE, text=True)
            *lines, last = done.stdout.rstrip().splitlines() or [""]
            if not last.startswith("{"):
                return done.returncode or 1, found
            print("\n".join(lines))
            how = "one pass" if size == length else f"chunks of {size}"
            for each in json.loads(last)["results"]:
                what = f"compaction T={length} {each['ratio']:g}x, {how}: time share over share of the arithmetic"
                if size == chunk:
                    found.append((what, each["times_its_share"], "<=", 2.0))
    return 0, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kernels", help="of `still bench`, with commas between (default: all)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072], help="of the compactions")
    parser.add_argument("--dry", action="store_true", help="on a CPU at tiny sizes: does every step run?")
    parser.add_argument("--output", type=Path, help="folder for the rows of the kernels (default: bench/rows)")
    args = parser.parse_args()
    import torch

    if not args.dry and not torch.cuda.is_available():
        print("torch finds no GPU here; --dry walks through on a CPU", file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)
    code, found = 0, []
    output = args.output or (HERE.parent / "results" / "dry-bench" if args.dry else ROWS)
    if "correctness" in args.parts:
        code = correctness(args.dry)
    if "kernels" in args.parts:
        failed, more = kernels(args.dry, output, args.kernels)
        code, found = code or failed, [*found, *more]
    if "compaction" in args.parts:
        failed, more = compaction(args.dry, args.tokens)
        code, found = code or failed, [*found, *more]
    held = [value >= bar if how == ">=" else value <= bar for _, value, how, bar in found]
    print(f"\n{'bar':92}{'measured':>10}{'asked':>9}")
    for (what, value, how, bar), kept in zip(found, held, strict=True):
        print(f"{what:92}{value:10.3f}{how:>4}{bar:5.2f}{'' if kept else '  MISSED'}")
    print(f"{sum(held)} of {len(held)} bars held" + ("; a dry run measures nothing" if args.dry else ""))
    return code


if __name__ == "__main__":
    sys.exit(main())
