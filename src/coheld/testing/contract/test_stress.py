"""Stress: many who use one lock in every way at once, also on a busy machine, also while some of them are killed."""

import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from coheld import Lockable, Owner, holder, statistics
from coheld.testing.support import delays, procs, seeds, states
from coheld.testing.support.exclusion import Exclusion

RUN = delays.MEDIUM  # how long the workers of a row call


@dataclass(frozen=True)
class Row:
    """How many, how deep, how long (s), in what surroundings."""

    processes: int
    threads: int
    depth: int = 0
    hold: float = 0.0
    load: bool = False  # a busy process per core besides
    kills: int = 0
    method: str = "fork"

    def __str__(self) -> str:
        words = [f"{self.processes}x{self.threads}", f"depth-{self.depth}", f"hold-{self.hold * 1000:g}ms"]
        words += ["load"] * self.load + [f"{self.kills}-kills"] * bool(self.kills) + [self.method]
        return " ".join(words)


ROWS = [
    Row(2, 1),
    Row(8, 1),
    Row(1, 8),
    Row(4, 4),
    Row(2, 1, depth=200),
    Row(3, 2, depth=3, hold=0.0005),
    Row(8, 1, depth=1, hold=0.001),
    Row(2, 8, depth=2, hold=0.0001),
    Row(3, 2, depth=2, method="spawn"),
    Row(3, 2, depth=2, method="forkserver"),
    Row(2, 1, load=True),
    Row(4, 2, depth=2, hold=0.0005, load=True),
    Row(4, 1, kills=10),
    Row(3, 3, depth=3, hold=0.0005, kills=10),
    Row(6, 1, depth=1, hold=0.002, kills=20),
    Row(3, 2, depth=1, load=True, kills=10),
]


class Device(Lockable):
    """Watched by two detectors of overlap."""

    def __init__(self, exclusion: Exclusion, stop: Path) -> None:
        super().__init__()
        self.exclusion, self.stop = exclusion, stop

    def __recover__(self, dead: Owner) -> None:
        assert holder(self) and dead.pid != os.getpid()

    @Lockable.locked
    def use(self, worker: int, levels: int, hold: float) -> None:
        """Go so many levels deeper, and use it there."""
        if levels:
            with self:
                self.use(worker, levels - 1, hold)
            return
        with self.exclusion.inside(worker):
            if hold:
                time.sleep(hold)

    @Lockable.locked(timeout=delays.LONG)
    def use_in_time(self, worker: int, levels: int, hold: float) -> None:
        self.use(worker, levels, hold)


Way = Callable[[Device, int, int, float], object]


def call_if_free(device: Device, worker: int, levels: int, hold: float) -> None:
    if device.acquire(blocking=False):
        device.use(worker, levels, hold)
        device.release()


def call_if_free_soon(device: Device, worker: int, levels: int, hold: float) -> None:
    if device.acquire(timeout=0.001):
        device.use(worker, levels, hold)
        device.release()


def enter(device: Device, worker: int, levels: int, hold: float) -> None:
    with device:
        device.use(worker, levels, hold)


WAYS: list[Way] = [Device.use, Device.use_in_time, enter, call_if_free, call_if_free_soon]


def call(device: Device, row: Row, worker: int, seed: float) -> None:
    """Call it in all ways until the test says stop."""
    rng = random.Random(seed)
    while not device.stop.exists():
        rng.choice(WAYS)(device, worker, rng.randint(0, row.depth), rng.uniform(0, 2 * row.hold))


def work(link: procs.Link, device: Device, row: Row, number: int, seed: float) -> None:
    """One process: all of its threads call."""
    link.say("ready")
    with ThreadPoolExecutor(row.threads) as pool:
        workers = range(number * row.threads, (number + 1) * row.threads)
        calls = [pool.submit(call, device, row, worker, seed + worker) for worker in workers]
        for one in calls:
            one.result()


def burn(link: procs.Link) -> None:
    link.say("burning")
    while True:
        pass


@contextmanager
def busy_machine(busy: bool) -> Iterator[None]:
    """A process per core that does nothing but compute."""
    with ExitStack() as stack:
        for _ in range(len(os.sched_getaffinity(0)) if busy else 0):
            burner = stack.enter_context(procs.start(burn))
            stack.callback(burner.kill)
            burner.expect("burning")
        yield


class Crew:
    """The working processes of a row."""

    def __init__(self, row: Row, device: Device, rng: random.Random, stack: ExitStack) -> None:
        self.row, self.device, self.rng, self.stack = row, device, rng, stack
        self.workers = [self._start(number) for number in range(row.processes)]
        for worker in self.workers:
            worker.expect("ready")

    def _start(self, number: int) -> procs.FunctionWorker:
        arguments = (self.device, self.row, number, self.rng.random())
        return self.stack.enter_context(procs.start(work, *arguments, method=self.row.method))

    def go_on(self) -> None:
        """Wait until all together have made some more calls."""
        calls = self.device.exclusion.counted + self.rng.randint(1, 30)
        states.wait_until(lambda: self.device.exclusion.counted >= calls, "they go on")

    def kill_one(self) -> None:
        """Kill any of them, wherever it is, and put another in its place."""
        number = self.rng.randrange(self.row.processes)
        self.workers[number].kill()
        self.workers[number] = self._start(number)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_stress(row: Row, tmp_path: Path, rng: random.Random) -> None:
    print(f"COHELD_TEST_SEED={seeds.SEED}")
    device = Device(Exclusion(tmp_path, workers=row.processes * row.threads), tmp_path / "stop")
    with busy_machine(row.load), ExitStack() as stack:
        crew = Crew(row, device, rng, stack)
        end = time.monotonic() + RUN
        for _ in range(row.kills):
            crew.go_on()
            crew.kill_one()
        states.wait_until(lambda: time.monotonic() >= end, "the time is over")
        crew.go_on()
        device.stop.touch()
    with device:
        pass
    device.exclusion.check(deaths=row.kills)
    assert statistics(device).recoveries <= row.kills
    assert row.kills or statistics(device).waiters == 0
    assert holder(device) is None
