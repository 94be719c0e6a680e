"""Micro-benchmarks of every kernel and every way to compute the same: `pytest bench/micro.py` (the extra `bench`).

pytest-benchmark keeps and compares runs: `pytest bench/micro.py --benchmark-autosave`, then `--benchmark-compare`.
Sizes are small, and nothing is checked; `still bench` checks, finds the floor and measures the sizes that count.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from still.bench import OPERATIONS

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE, TOKENS = (torch.bfloat16, 8192) if GPU else (torch.float32, 256)


def calls():
    """One parameter for each case and provider."""
    torch.manual_seed(0)
    for operation in OPERATIONS:
        for case in import_module(f"still.bench.{operation}").cases(DEVICE, DTYPE, (TOKENS,)):
            shape = "-".join(f"{key}={value}" for key, value in case.config.items())
            for provider, call in case.providers.items():
                yield pytest.param(call, id=f"{case.kernel}-{case.mode}-{case.x}-{shape}-{provider}")


@pytest.mark.parametrize("call", list(calls()))
def test_time(benchmark, call):
    def once():
        call()
        if GPU:
            torch.cuda.synchronize()

    with torch.no_grad():
        benchmark(once)
