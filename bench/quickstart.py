"""How long does `make quickstart` take, once installed?

    python bench/quickstart.py                  # both sweeps from nothing, as a user runs them
    python bench/quickstart.py --workers 1

It runs `make quickstart` into an empty folder and appends seconds to bench/rows/quickstart.csv: of the sweep of
questions, of the agent's, each with its report, and of both. Installing, where it is needed, comes first and is not
counted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shapes import append_rows

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="WORKERS of the Makefile (default: 2)")
    parser.add_argument("--no-rows", action="store_true", help="print, but append nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "quickstart")
        make = ["make", "-C", str(ROOT), f"WORKERS={args.workers}", f"RESULTS={results}"]
        subprocess.run([*make, ".venv/.installed-plot"], check=True)
        began = time.time()
        status = subprocess.run([*make, "quickstart"], check=False).returncode
        if status:
            return status
        ended = time.time()
        middle = (results / "report.html").stat().st_mtime  # the last file of the first sweep
        seconds = {"questions": middle - began, "agent": ended - middle, "both": ended - began}
        print(", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
        if not args.no_rows:
            row = {"kernel": "quickstart", "provider": "still", "metric": "time", "unit": "s", "x": args.workers}
            rows = [{**row, "mode": name, **dict.fromkeys(("median", "p20", "p80"), value)}
                    for name, value in seconds.items()]  # fmt: skip
            append_rows("quickstart", rows, {"workers": args.workers})
    return 0


if __name__ == "__main__":
    sys.exit(main())
