"""Time calls on the user's device, and the two numbers that bound any of them: copy bandwidth and matrix rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .arithmetic import Roof, Work


@dataclass
class Case:
    """One question: how fast is this operation on these shapes, computed in these ways?

    Attributes:
        kernel: the public function.
        mode: `forward`, `backward`, `decode`, ...
        x: what the table runs along, in tokens or slots.
        work: what any implementation has to do at the least.
        providers: how it can be computed; each call does the work once and returns the result, or several.
        config: the shapes, for the row.
        exact: the result in fp64, computed when it is asked for; None where the case is too large to check.
        ours: the provider that is checked and whose share of the floor is reported.
        whole: for some providers a call whose memory is reported in the place of its own: forward and backward.
    """

    kernel: str
    mode: str
    x: int
    work: Work
    providers: dict[str, Callable[[], Any]]
    config: dict[str, Any] = field(default_factory=dict)
    exact: Callable[[], Any] | None = None
    ours: str = "triton"
    whole: dict[str, Callable[[], Any]] = field(default_factory=dict)


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Median and the 20th and 80th percentile of one call, the L2 cache emptied before each on a GPU."""
    if device.type == "cuda":
        from triton.testing import do_bench

        times = [value / 1e3 for value in do_bench(call, warmup=50, rep=10 * repeats, quantiles=[0.5, 0.2, 0.8])]
        return dict(zip(("median", "p20", "p80"), times, strict=True))
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return percentiles(times)


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile; all three are the value itself where there is one."""
    if len(times) == 1:
        return dict.fromkeys(("median", "p20", "p80"), times[0])
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"median": statistics.median(times), "p20": fifths[0], "p80": fifths[3]}


def extra_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call holds at its peak beyond what was there before; None where torch does not count them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def roof(device: torch.device, dtype: torch.dtype, repeats: int) -> Roof:
    """Copy bandwidth and matrix rate, each of the best size out of a few."""
    large = device.type == "cuda"
    bandwidths, rates = [], []
    for megabytes in (256, 1024) if large else (16, 64):
        source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        took = seconds(lambda a=source, b=target: b.copy_(a), device, repeats)["median"]
        bandwidths.append(2 * source.numel() / took)
    for n in (4096, 8192) if large else (512, 1024):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates.append(2 * n**3 / seconds(lambda a=a, b=b: a @ b, device, repeats)["median"])
    return Roof(max(bandwidths), max(rates))


def error(got: Any, exact: Any) -> float:
    """The largest difference, over the largest exact value; of several results that of the worst."""
    if isinstance(got, tuple):
        return max(error(*pair) for pair in zip(got, exact, strict=True))
    return ((got.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def runs(call: Callable[[], Any]) -> bool:
    """Whether a way to compute it takes these shapes on this device."""
    try:
        call()
    except RuntimeError:
        return False
    return True
