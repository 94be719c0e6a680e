"""The way to a provider: how many calls at once, how fast, and what happens when one fails.

Concurrency adapts as TCP does: each success widens the lane a little, being throttled halves it, once for all calls
that were under way together. A wait that the server asks for holds for the whole lane, not for one call. Calls that are
tried again go before those that still wait for their first turn, so that each comes to its end.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from .judges import JudgeError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Retry:
    """When to give a call up.

    Attributes:
        attempts: at one call, the first included.
        first: seconds before the second attempt; doubled for each one after, with jitter.
        longest: most seconds between attempts that we choose ourselves.
        patience: most seconds that a server may ask to wait; a longer wait is a failure.
    """

    attempts: int = 6
    first: float = 0.5
    longest: float = 60.0
    patience: float = 300.0


class Lane:
    """All calls to one provider with one key.

    Args:
        most: calls in flight, at most.
        requests_per_minute: calls are spaced out to keep this; None is no limit.
        tokens_per_minute: the same for tokens.
        start: calls in flight to begin with.
    """

    def __init__(
        self,
        most: int = 64,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        start: int = 8,
    ):
        self.most, self.width = most, float(min(start, most))
        self._per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._free_at = self._resume_at = 0.0
        self._busy, self._epoch = 0, 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def run(self, call: Callable[[], Awaitable[Result]], tokens: int = 0, retry: Retry | None = None) -> Result:
        """Make a call, again where that may help, and return its result.

        Args:
            call: one attempt; it raises `JudgeError`.
            tokens: an estimate, for the limit on tokens.
            retry: when to give up.

        Raises:
            JudgeError: the last attempt's.
        """
        retry = retry or Retry()
        for attempt in range(1, retry.attempts + 1):
            await self._enter(tokens, again=attempt > 1)
            epoch = self._epoch
            try:
                result = await call()
            except JudgeError as problem:
                final = problem.trouble not in ("throttled", "transient") or attempt == retry.attempts
                if (problem.retry_after or 0.0) > retry.patience:
                    raise
                if problem.trouble == "throttled":
                    self._narrow(epoch, problem.retry_after)
                if final:
                    raise
                wait = min(retry.longest, retry.first * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
                wait = max(wait, problem.retry_after or 0.0)
            else:
                self.width = min(self.most, self.width + 1 / self.width)
                return result
            finally:
                self._leave()
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    def _narrow(self, epoch: int, wait: float | None) -> None:
        if epoch == self._epoch:
            self.width, self._epoch = max(1.0, self.width / 2), epoch + 1
        if wait:
            self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + wait)

    async def _enter(self, tokens: int, again: bool) -> None:
        if self._busy >= int(self.width) or self._waiting:
            turn = asyncio.get_running_loop().create_future()
            (self._waiting.appendleft if again else self._waiting.append)(turn)
            try:
                await turn  # `_leave` has counted us in
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave()
                raise
        else:
            self._busy += 1
        try:
            await self._pace(tokens)
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        self._busy -= 1
        while self._waiting and self._busy < int(self.width):
            turn = self._waiting.popleft()
            if not turn.done():
                self._busy += 1
                turn.set_result(None)

    async def _pace(self, tokens: int) -> None:
        """Wait until the provider wants calls again, and for this call's own slot in time."""
        now = asyncio.get_running_loop().time
        while (wait := self._resume_at - now()) > 0:
            await asyncio.sleep(wait)
        spacing = max(self._per_request, self._per_token * tokens)
        if spacing:
            start = max(now(), self._free_at)
            self._free_at = start + spacing
            await asyncio.sleep(start - now())
