"""Making an anonymous lock: seconds for each of many that all live, in a fresh process every round.

Fresh, so that nothing freed in an earlier round is used again; the first one, which sets up the process, is
not counted. filelock and fasteners are not here: their locks are made at the first acquire.
"""

import multiprocessing
import time
from collections.abc import Callable
from functools import partial

from bench import peers, workers
from bench.measure import Plan, gc_off, in_rounds
from bench.table import Bar, Line, against

BARS = {peers.MP_RLOCK: Bar(0.10), peers.PYATS: None}
MOST = 20_000
"""Never more at once: a lock may cost its maker a memory map, and those are few."""


def measure(plan: Plan) -> list[Line]:
    measures = {name: _measure(_maker(name), plan.loop) for name in peers.installed(peers.COHELD, *BARS)}
    return against("making an anonymous lock", "s", in_rounds(measures, plan.rounds), BARS)


def _maker(name: str) -> Callable[[], object]:
    """The bare lock of multiprocessing; of others, an object that inherits it."""
    return multiprocessing.get_context("fork").RLock if name == peers.MP_RLOCK else peers.device_class(name)


def _measure(make: Callable[[], object], target: float) -> Callable[[], float]:
    once = workers.alone(partial(_seconds_each, make, 50))
    count = min(MOST, max(1, round(target / once)))
    return lambda: workers.alone(partial(_seconds_each, make, count))


def _seconds_each(make: Callable[[], object], count: int) -> float:
    kept = [make()]
    with gc_off():
        begin = time.perf_counter()
        kept += [make() for _ in range(count)]
        return (time.perf_counter() - begin) / count
