"""Tasks of asyncio: a locked coroutine that does nothing, over the plain one; and from a task to another process's."""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import Any

from filelock import AsyncFileLock

from bench import peers, workers
from bench.measure import Plan, in_rounds
from bench.table import Bar, Line, against
from coheld import Lockable

ASYNCIO, ASYNC_FILELOCK = "asyncio.Lock", "filelock async"
BARS = {ASYNCIO: Bar(1.2), ASYNC_FILELOCK: Bar(0.2)}
HAND_OVER = Bar(0.001, absolute=True)
CALLS = {peers.COHELD: 20_000, ASYNCIO: 20_000, ASYNC_FILELOCK: 200}
Call = Callable[[], Awaitable[None]]


class Device(Lockable):
    async def plain(self) -> None:
        pass

    @Lockable.locked
    async def locked(self) -> None:
        pass


class WithLock:
    """`async with` written inside of the method."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock

    async def plain(self) -> None:
        pass

    async def locked(self) -> None:
        async with self._lock:
            pass


def measure(plan: Plan) -> list[Line]:
    with tempfile.NamedTemporaryFile() as file:
        devices = {
            peers.COHELD: Device(),
            ASYNCIO: WithLock(asyncio.Lock()),
            ASYNC_FILELOCK: WithLock(AsyncFileLock(file.name)),
        }
        measures = {name: _over_plain(device, CALLS[name]) for name, device in devices.items()}
        samples = in_rounds(measures, plan.rounds)
    passed = statistics.median(_hand_over(Device(), age=trial * 0.002) for trial in range(plan.deaths))
    lines = against("locked no-op coroutine, over the plain one", "s", samples, BARS)
    return [*lines, Line("from a task to another process's: median", "s", passed, bar=HAND_OVER)]


def _over_plain(device: Any, calls: int) -> Callable[[], float]:
    """Seconds of a locked call minus seconds of a plain one, the two loops one after the other."""
    return lambda: (asyncio.run(_timed(device.locked, calls)) - asyncio.run(_timed(device.plain, calls))) / calls


async def _timed(call: Call, calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        await call()
    return time.perf_counter() - begun


def _hand_over(device: Device, age: float) -> float:
    """Seconds from the release by one task to the first statement of another, who has waited for that long."""
    with workers.worker(lambda tell: asyncio.run(_ask(device, tell))) as waiter:
        return asyncio.run(_release(device, waiter, age))


async def _release(device: Device, waiter: workers.Worker, age: float) -> float:
    async with device:
        waiter.hear()
        await asyncio.sleep(0.01 + age)
        released = time.monotonic()
    return float(waiter.hear()) - released


async def _ask(device: Device, tell: workers.Tell) -> None:
    tell("asking")
    async with device:
        tell(time.monotonic())
