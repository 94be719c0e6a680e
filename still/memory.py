"""Keep what tensors gave back, on CPUs: pages that are new to a process cost as much as what is done with them.

glibc hands every freed piece of more than 128 KiB or so back to the system, and the next tensor of that size gets fresh
pages, each zeroed at its first touch. PyTorch's own guide to CPUs has tcmalloc or jemalloc preloaded for that reason;
two settings of glibc do as much and need no other library.
"""

from __future__ import annotations

import ctypes
import os
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST = 32 << 20  # glibc takes no higher threshold: what is larger comes from the system, and goes back to it
OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed() -> bool:
    """Let this process keep freed memory, in pieces of up to 32 MiB, for its next tensors; `still` commands call it.

    Its resident size stays at its peak. Where the environment sets glibc's allocator already (`MALLOC_*`,
    `GLIBC_TUNABLES`), or the C library is another one, nothing is changed.

    Returns:
        Whether it does now.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in OWN):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, LARGEST) and mallopt(TRIM_THRESHOLD, -1))
