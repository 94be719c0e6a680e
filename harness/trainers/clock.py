"""Where a step's seconds go: rollouts, grading, the model's forward and backward, and all the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up seconds by what they went to, until they are taken."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Count from here."""
        self._began, self._spent = time.perf_counter(), {}

    @contextmanager
    def measuring(self, what: str) -> Iterator[None]:
        """Count the time of the block as `what`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] = self._spent.get(what, 0.0) + time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Seconds since the start, `seconds_step`, and those that were measured; and start again."""
        found = {"seconds_step": time.perf_counter() - self._began}
        found |= {f"seconds_{what}": seconds for what, seconds in self._spent.items()}
        self.start()
        return {name: round(seconds, 4) for name, seconds in found.items()}
