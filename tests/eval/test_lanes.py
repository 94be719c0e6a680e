"""Concurrency that adapts, waits that are kept, and limits a minute: on a clock that jumps instead of waiting."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from still.eval.client import retry_after
from still.eval.judges import JudgeError
from still.eval.lanes import Lane, Retry


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer when nothing is ready, so that tests wait for nothing."""

    def __init__(self):
        super().__init__()
        self.jumped = 0.0

    def time(self) -> float:
        return super().time() + self.jumped

    def _run_once(self):
        timers = [timer for timer in self._scheduled if not timer._cancelled]
        if not self._ready and timers:
            self.jumped += max(0.0, heapq.nsmallest(1, timers)[0]._when - self.time())
        super()._run_once()


def run(main):
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(main())


def test_the_lane_widens_with_success_and_halves_once_for_all_that_were_throttled_together():
    async def main():
        lane, widths = Lane(most=32, start=8), []

        async def fine():
            await asyncio.sleep(0.01)

        for _ in range(20):
            await asyncio.gather(*(lane.run(fine) for _ in range(64)))
            widths.append(lane.width)
        assert widths[-1] == 32
        failed = set()

        async def throttled(name):
            await asyncio.sleep(0.01)
            if name not in failed:
                failed.add(name)
                raise JudgeError("throttled", "slow down")

        before = lane.width
        await asyncio.gather(*(lane.run(lambda name=name: throttled(name)) for name in range(32)))
        assert before / 2 <= lane.width < before
        return widths

    widths = run(main)
    assert widths == sorted(widths)


def test_no_more_calls_than_the_lane_is_wide_are_in_flight():
    async def main():
        lane, busy, most = Lane(most=5, start=5), 0, 0

        async def call():
            nonlocal busy, most
            busy += 1
            most = max(most, busy)
            await asyncio.sleep(0.01)
            busy -= 1

        await asyncio.gather(*(lane.run(call) for _ in range(100)))
        return most

    assert run(main) == 5


def test_a_wait_that_the_server_asks_for_holds_for_the_whole_lane():
    async def main():
        lane, times = Lane(start=4), []
        now = asyncio.get_running_loop().time
        start = now()

        async def call(name):
            times.append((name, now() - start))
            if name == 0 and len(times) == 1:
                raise JudgeError("throttled", "wait", 7.0)

        first = asyncio.create_task(lane.run(lambda: call(0)))
        await asyncio.sleep(0.1)
        await asyncio.gather(first, *(lane.run(lambda name=name: call(name)) for name in range(1, 4)))
        return times

    times = run(main)
    assert times[0][1] < 1
    assert all(when >= 6.99 for _, when in times[1:])
    assert len(times) == 5


def test_back_off_doubles_and_ends():
    async def main():
        times = []

        async def call():
            times.append(asyncio.get_running_loop().time())
            raise JudgeError("transient", "oops")

        with pytest.raises(JudgeError, match="oops"):
            await Lane().run(call, retry=Retry(attempts=5, first=1.0, longest=4.0))
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    waits = run(main)
    assert len(waits) == 4
    for wait, most in zip(waits, (1, 2, 4, 4), strict=True):
        assert most / 2 - 0.01 <= wait <= most + 0.01


def test_a_call_that_is_tried_again_goes_before_those_that_wait_for_their_first_turn():
    async def main():
        lane, tried = Lane(most=1, start=1), []

        async def call(name):
            tried.append(name)
            await asyncio.sleep(1)
            if tried.count(0) < 3:
                raise JudgeError("transient", "oops")

        await asyncio.gather(
            *(lane.run(lambda name=name: call(name), retry=Retry(first=0.5, attempts=9)) for name in range(40))
        )
        return tried

    tried = run(main)
    assert tried.index(2) > max(place for place, name in enumerate(tried) if name == 0)


def test_one_call_waits_as_long_as_its_server_asks_while_the_others_go_on():
    async def main():
        lane, times, now = Lane(), [], asyncio.get_running_loop().time
        start = now()

        async def call(name):
            times.append((name, now() - start))
            if name == "hurt" and len(times) == 1:
                raise JudgeError("transient", "back at once", 9.0)

        hurt = asyncio.create_task(lane.run(lambda: call("hurt")))
        await asyncio.sleep(0.1)
        await lane.run(lambda: call("well"))
        await hurt
        return dict(times)

    times = run(main)
    assert times["hurt"] >= 9
    assert times["well"] < 1


@pytest.mark.parametrize(
    ("trouble", "wait"), [("rejected", None), ("refused", None), ("fatal", None), ("throttled", 10_000.0)]
)
def test_what_waiting_cannot_mend_is_not_tried_again(trouble, wait):
    async def main():
        calls = 0

        async def call():
            nonlocal calls
            calls += 1
            raise JudgeError(trouble, "no", wait)

        lane = Lane(start=1, most=1)
        for _ in range(3):
            with pytest.raises(JudgeError):
                await lane.run(call)
        return calls

    assert run(main) == 3


@pytest.mark.parametrize(
    ("limits", "tokens"), [({"requests_per_minute": 120}, 0), ({"tokens_per_minute": 60_000}, 500)]
)
def test_limits_a_minute_space_calls_out(limits, tokens):
    async def main():
        lane, times = Lane(most=50, start=50, **limits), []

        async def call():
            times.append(asyncio.get_running_loop().time())

        await asyncio.gather(*(lane.run(call, tokens) for _ in range(21)))
        return times[-1] - times[0]

    assert run(main) == pytest.approx(10.0, abs=0.2)


def test_a_waiter_that_is_cancelled_takes_no_place():
    async def main():
        lane, done = Lane(most=1, start=1), []

        async def call(name):
            await asyncio.sleep(1)
            done.append(name)

        tasks = [asyncio.create_task(lane.run(lambda name=name: call(name))) for name in range(4)]
        await asyncio.sleep(0.5)
        tasks[1].cancel()
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await lane.run(lambda: call("last"))
        return done

    assert run(main) == [2, 3, "last"]


def test_retry_after_is_read_in_every_form():
    later = datetime.now(UTC) + timedelta(seconds=30)
    assert retry_after({"retry-after": "12"}) == 12
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "1"}) == 0.25
    assert retry_after({"retry-after": format_datetime(later, usegmt=True)}) == pytest.approx(30, abs=2)
    assert retry_after({"retry-after": "-3"}) == 0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None
