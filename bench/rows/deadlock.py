"""Each has a lock and wants the next one's: how long from the wait that closes the ring until it is told."""

import asyncio
import statistics
import time

import coheld
from bench import workers
from bench.measure import Plan
from bench.table import Bar, Line
from coheld import DeadlockError, Lockable

BAR = Bar(1.0, absolute=True)
TASKS = 20


def measure(plan: Plan) -> list[Line]:
    two = [_two_processes() for _ in range(plan.deaths)]
    tasks = [asyncio.run(_ring_of_tasks()) for _ in range(plan.deaths)]
    what = "a ring is closed, and one is told"
    return [
        Line(f"{what}: 2 processes, median", "s", statistics.median(two), bar=BAR),
        Line(f"{what}: 2 processes, longest", "s", max(two), bar=BAR),
        Line(f"{what}: {TASKS} tasks, median", "s", statistics.median(tasks), bar=BAR),
    ]


def _two_processes() -> float:
    first, second = Lockable(), Lockable()

    def want_second(tell: workers.Tell) -> None:
        with first:
            tell("have")
            second.acquire()

    with second, workers.worker(want_second) as elder:
        elder.hear()
        while not coheld.waiters(second):
            time.sleep(0.001)
        return _until_told(first)


def _until_told(wanted: Lockable) -> float:
    begun = time.monotonic()
    try:
        wanted.acquire()
    except DeadlockError:
        return time.monotonic() - begun
    raise AssertionError("it was had")


async def _ring_of_tasks() -> float:
    locks, times = [Lockable() for _ in range(TASKS)], []

    async def want_next(number: int) -> None:
        async with locks[number]:
            await asyncio.sleep(0)
            begun = time.monotonic()
            try:
                async with locks[(number + 1) % TASKS]:
                    pass
            except DeadlockError:
                times.append(time.monotonic() - begun)

    await asyncio.gather(*map(want_next, range(TASKS)))
    [told] = times
    return told
