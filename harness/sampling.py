"""Who answers what open episodes want sampled: in one batch here, in parallel by a server, or one by one."""

from __future__ import annotations

from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

from .types import Limit, Policy, Sampled, Session


@dataclass(frozen=True, eq=False)
class Request:
    """A turn that the loop wants sampled."""

    session: Session
    limit: Limit


Answer = tuple[Request, Sampled | Exception]
"""A request, and its turn or what broke it."""


class Sampler(Protocol):
    """Answers requests as their turns end, so that no episode waits for another one's longer turn."""

    def ask(self, request: Request) -> None:
        """Take one more request."""

    def answered(self) -> list[Answer]:
        """Wait until a turn has ended; there is one that was asked for and not answered yet."""


class OneByOne:
    """Samples a turn when its answer is wanted."""

    def __init__(self):
        self._asked: deque[Request] = deque()

    def ask(self, request: Request) -> None:
        """See `Sampler`."""
        self._asked.append(request)

    def answered(self) -> list[Answer]:
        """See `Sampler`."""
        return [tried(self._asked.popleft())]


class InParallel:
    """Asks a server from several threads.

    Args:
        width: threads.
    """

    def __init__(self, width: int):
        self._pool = ThreadPoolExecutor(width)
        self._asked: list[Future[Answer]] = []

    def ask(self, request: Request) -> None:
        """See `Sampler`."""
        self._asked.append(self._pool.submit(tried, request))

    def answered(self) -> list[Answer]:
        """See `Sampler`."""
        wait(self._asked, return_when=FIRST_COMPLETED)
        ended = [future for future in self._asked if future.done()]
        self._asked = [future for future in self._asked if future not in ended]
        return [future.result() for future in ended]


def tried(request: Request) -> Answer:
    """A request sampled by its own session."""
    try:
        return request, request.session.sample(request.limit)
    except Exception as problem:
        return request, problem


def sampler(policy: Policy, together: int) -> Sampler:
    """Who answers for `together` open episodes of a policy."""
    if together > 1 and "kv" in policy.capabilities:
        from .policies.batch import Batch

        return Batch()
    return InParallel(together) if together > 1 else OneByOne()
