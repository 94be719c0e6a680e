"""What a process keeps of the memory that tensors gave back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from still import memory

FAULTS = """
import resource, sys
import torch
from still import memory

print(int(memory.keep_freed()))
for turn in range(40):  # the heap grows until two such pieces fit among what else is allocated
    if turn == 30:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    first = torch.ones(24 << 18)  # 24 MiB
    second = first * 2
    del first, second
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> tuple[int, int]:
    """Whether freed memory is kept, and how often ten rounds of two tensors met a page that was new to the process."""
    kept = {name: value for name, value in os.environ.items() if name not in memory.OWN}
    ran = subprocess.run([sys.executable, "-c", FAULTS], env={**kept, **environment}, capture_output=True, text=True,
                         check=True)  # fmt: skip
    return tuple(map(int, ran.stdout.split()))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_freed_memory_serves_the_next_tensors_unless_the_environment_says_otherwise():
    kept, met = faults()
    assert kept
    untouched, others = faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert not untouched
    assert met < others / 4


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not memory.keep_freed()
