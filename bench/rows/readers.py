"""Reading calls that do nothing, from one process and from two: calls per second of all together."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import repeat
from typing import Any

from bench import peers, workers
from bench.measure import Plan, gc_off, in_rounds
from bench.table import Bar, Line, against
from coheld import Lockable

FASTENERS, FILELOCK = "fasteners readers", "filelock readers"
ONE = "one process"
BARS = {ONE: Bar(1.6, at_least=True)}
PEERS = {FASTENERS: Bar(50, at_least=True), FILELOCK: Bar(50, at_least=True)}
BATCH = {peers.COHELD: 100, ONE: 100, FASTENERS: 1, FILELOCK: 1}
"""Calls between two looks at the clock."""


class Device(Lockable):
    @Lockable.locked(exclusive=False)
    def read(self) -> None:
        pass


class WithLock:
    """`with` written inside of the method; each process has a lock object of its own on the same file."""

    def __init__(self, enter: Callable[[Any], Any], make: Callable[[str], Any]) -> None:
        self._path, self._enter, self._make = os.path.join(tempfile.mkdtemp(), "lock"), enter, make
        self.begin()

    def begin(self) -> None:
        self._lock = self._make(self._path)

    def read(self) -> None:
        with self._enter(self._lock):
            pass


def _fasteners() -> WithLock:
    import fasteners

    return WithLock(lambda lock: lock.read_lock(), fasteners.InterProcessReaderWriterLock)


def _filelock() -> WithLock:
    import filelock

    return WithLock(lambda lock: lock.read_lock(), partial(filelock.ReadWriteLock, is_singleton=False))


MAKERS: Mapping[str, Callable[[], Any]] = {peers.COHELD: Device, FASTENERS: _fasteners, FILELOCK: _filelock}


def measure(plan: Plan) -> list[Line]:
    measures = {name: partial(_rate, name, 2, plan.burst) for name in MAKERS}
    samples = in_rounds({**measures, ONE: partial(_rate, peers.COHELD, 1, plan.burst)}, plan.bursts)
    return against("2 processes of readers, short calls", "/s", samples, BARS | PEERS)


def _rate(name: str, processes: int, burst: float) -> float:
    job = partial(_calls, MAKERS[name](), BATCH[name], burst)
    return sum(workers.together([job] * processes)) / burst


def _calls(device: Any, batch: int, burst: float) -> int:
    """How many calls this process completes within `burst` seconds; a batch that ends later counts not."""
    if isinstance(device, WithLock):
        device.begin()
    done, read = 0, device.read
    with gc_off():
        end = time.monotonic() + burst
        while True:
            for _ in repeat(None, batch):
                read()
            if time.monotonic() > end:
                return done
            done += batch
