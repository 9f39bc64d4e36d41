"""Tasks of asyncio: a locked coroutine that does nothing, over the plain one; and from a task to another process's."""

import asyncio
import os
import signal
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
DEATH = Bar(0.02, absolute=True)
ALONE = "without us"
TICKS = {ALONE: Bar(0.95, at_least=True)}
WAITERS = 100
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
    deaths = [_after_death(Device(), age=trial * 0.002) for trial in range(plan.deaths)]
    return [
        *lines,
        Line("from a task to another process's: median", "s", passed, bar=HAND_OVER),
        Line("a killed process's lock is a waiting task's: longest", "s", max(deaths), bar=DEATH),
        *_ticks(plan),
    ]


def _ticks(plan: Plan) -> list[Line]:
    """How often a 1 ms ticker of the loop ticks, while 100 of its tasks wait for a lock that is held elsewhere."""
    with workers.worker(_hold_for_ever(device := Device())) as holder:
        holder.hear()
        measures = {
            peers.COHELD: lambda: asyncio.run(_tick(plan.turns / 3, [device.locked] * WAITERS)),
            ALONE: lambda: asyncio.run(_tick(plan.turns / 3, [])),
        }
        samples = in_rounds(measures, plan.runs)
    return against(f"ticks of 1 ms while {WAITERS} tasks wait", "", samples, TICKS)


async def _tick(seconds: float, calls: list[Call]) -> float:
    waiting = [asyncio.ensure_future(call()) for call in calls]
    ticks, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        await asyncio.sleep(0.001)
        ticks += 1
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return ticks


def _hold_for_ever(device: Device) -> Callable[[workers.Tell], None]:
    def hold(tell: workers.Tell) -> None:
        with device:
            tell("have")
            signal.pause()

    return hold


def _after_death(device: Device, age: float) -> float:
    """Seconds from the kill of a process whose task has it to the first statement of a task that waits."""
    with workers.worker(lambda tell: asyncio.run(_keep(device, tell))) as holder:
        holder.hear()
        with workers.worker(lambda tell: asyncio.run(_ask(device, tell))) as waiter:
            waiter.hear()
            time.sleep(0.01 + age)
            killed = time.monotonic()
            os.kill(holder.pid, signal.SIGKILL)
            return float(waiter.hear()) - killed


async def _keep(device: Device, tell: workers.Tell) -> None:
    async with device:
        tell("have")
        await asyncio.sleep(60)


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
