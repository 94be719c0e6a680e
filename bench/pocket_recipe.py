"""The pocket from nothing: its base and three compactors, as the recipes have them, and how long each part takes.

    python bench/pocket_recipe.py -o runs/recipe               # two hours on two cores
    python bench/pocket_recipe.py -o runs/recipe --list        # the commands, nothing run

The base comes first, on all cores, in calls of ten minutes. Then the compactors, each in three goes of one thread, as
many side by side as there are cores: whoever has most goes before it is next. What was finished is not run again, and
what was cut off goes on from its newest checkpoint. Seconds of every part that was run go to
bench/rows/pocket_recipe.csv, with those of the whole.
"""

from __future__ import annotations

import argparse
import os
import shlex
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from shapes import ROWS, append_csv, run_still

from still.provenance import provenance

GOES, SEEDS = 3, 3
CALL = 10
"""Minutes of one call that trains the base."""


def folder(root: Path, seed: int, go: int) -> Path:
    """Where a go of a compactor writes it."""
    return root / f"go-{go}" / f"compactor-seed{seed}"


def command(root: Path, seed: int, go: int) -> str:
    """What makes it."""
    start = f" --start-from {folder(root, seed, go - 1)}" if go else ""
    return f"pocket compactor --base {root}/base --output {root}/go-{go} --seed {seed}{start}"


def still(arguments: str, log: Path, threads: int) -> float:
    """Run a `still` command, its output appended to a file; the seconds that it took.

    Raises:
        RuntimeError: it failed.
    """
    start = time.monotonic()
    if code := run_still(shlex.split(arguments), log, threads):
        raise RuntimeError(f"still {arguments} ended with {code}: see {log}, mend it and start again")
    return time.monotonic() - start


def make_base(root: Path, threads: int) -> float:
    """Call the recipe of the base until it is done; the seconds of all calls."""
    seconds, calls = 0.0, 0
    while not (root / "base" / "recipe.json").exists():
        seconds += still(f"pocket base --output {root} --minutes {CALL}", root / "base.log", threads)
        calls += 1
        print(f"base: call {calls}, {seconds / 60:.1f} minutes so far", flush=True)
    return seconds


def make_compactors(root: Path, workers: int, note) -> None:
    """Run every go that is not done, those of the seed that has most left first."""
    left = {seed: [go for go in range(GOES) if not done(root, seed, go)] for seed in range(SEEDS)}
    running: dict = {}
    with ThreadPoolExecutor(workers) as pool:
        while running or any(left.values()):
            waiting = sorted((s for s in left if left[s] and s not in running.values()), key=lambda s: -len(left[s]))
            for seed in waiting[: workers - len(running)]:
                go = left[seed].pop(0)
                log = root / f"compactor-{seed}.log"
                running[pool.submit(still, command(root, seed, go), log, 1)] = seed
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for job in ended:
                seed = running.pop(job)
                note(f"compactor {seed}, go {GOES - len(left[seed])}", job.result())


def done(root: Path, seed: int, go: int) -> bool:
    """Whether a go has written its compactor: it does so last."""
    return (folder(root, seed, go) / "compactor.safetensors").exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of all parts")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="threads of the base, and goes side by side")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    root = args.output
    if args.list:
        print(f"still pocket base --output {root} --minutes {CALL}      # until it says that it is done")
        print("\n".join(f"still {command(root, seed, go)}" for seed in range(SEEDS) for go in range(GOES)))
        return
    start, rows, made = time.monotonic(), [], provenance(vars(args), 0, "cpu")

    def note(part: str, seconds: float) -> None:
        print(f"{part}: {seconds / 60:.1f} minutes", flush=True)
        rows.append({
            "part": part, "seconds": round(seconds, 1), "cores": args.cores, "device": made["device"]["name"],
            "commit": (made["git"] or {}).get("commit", ""),
        })  # fmt: skip

    try:
        if seconds := make_base(root, args.cores):
            note("base", seconds)
        make_compactors(root, args.cores, note)
        note("all parts of this call", time.monotonic() - start)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from here") from None
    finally:
        if rows:
            append_csv(ROWS / "pocket_recipe.csv", rows)


if __name__ == "__main__":
    main()
