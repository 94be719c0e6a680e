"""What the processes of `test_workers.py` do; a module, so that they find it by its name."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def squares(number: int, offset: int):
    """What squares numbers, and yields each with who did it."""

    def work(piece):
        for value in piece:
            yield offset + value * value, number, os.getpid()

    return work


def breaking(number: int, what: str):
    """What breaks at its second item."""

    def work(piece):
        yield piece
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("slots is 0; it must be 1 or more") if what == "mistake" else ZeroDivisionError("a defect")

    return work


def loading(number: int, what: str):
    """What cannot even begin."""
    raise FileNotFoundError(f"no model {what}")


def slow(number: int, folder: str):
    """What writes its process's number and takes its time."""

    def work(piece):
        Path(folder, str(os.getpid())).touch()
        time.sleep(600)
        yield piece

    return work


def knowing(number: int, module: str):
    """Says whether a module had been imported when the process began."""
    return lambda piece: [module in sys.modules]
