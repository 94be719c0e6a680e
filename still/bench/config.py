"""What `still bench` measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class BenchConfig:
    """The flags of `still bench`.

    Attributes:
        kernels: operations to measure; none is all of them.
        tokens: context lengths; none is 8k, 32k and 128k on a GPU and 512, 2k on a CPU.
        device: such as cuda:0 or cpu; none is a GPU where there is one.
        dtype: of keys and values; none is bfloat16 on a GPU and float32 on a CPU.
        repeats: calls a timing on a CPU, and tens of milliseconds a timing on a GPU.
        output: folder for kernels.csv (rows are appended), kernels.json and roofline.png.
        floors: print the floors of a chip from its data sheet (h100 or h200), and measure nothing.
        figure: draw the roofline, which needs matplotlib (the extra plot).
    """

    kernels: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    device: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    repeats: int = 9
    output: Path = Path("results/bench")
    floors: Literal["h100", "h200"] | None = None
    figure: bool = True

    def __post_init__(self) -> None:
        if self.repeats < 2:
            raise ValueError(f"repeats is {self.repeats}; it must be 2 or more")
        if any(tokens < 1 for tokens in self.tokens):
            raise ValueError(f"tokens is {min(self.tokens)}; it must be 1 or more")
