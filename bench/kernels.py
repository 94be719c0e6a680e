"""How fast are the kernels against the device's limits, and against the best of what PyTorch brings?

    python bench/kernels.py                             # a GPU: bf16, 8k, 32k and 128k tokens; a CPU: the references
    python bench/kernels.py --kernels rope --tokens 8192

`still bench` with its rows appended to bench/rows/kernels.csv: it measures copy bandwidth and matrix rate, checks every
provider against fp64, times it, and prints the share of the floor. bench/NOTES.md has the floors and what was tried.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from still.cli import main

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    code = main(["bench", "--output", str(here / "rows"), *sys.argv[1:]])
    if (here / "rows" / "roofline.png").exists():
        shutil.move(here / "rows" / "roofline.png", here / "figures" / "roofline.png")
    sys.exit(code)
