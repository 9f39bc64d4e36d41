"""Processes that hold the lock for a while and ask again at once: the longest wait, and how even the shares.

The holder computes, and lets go for the shortest moment: there an unfair lock starves the others most. A wait
that began inside the run counts in full, however late it ends.
"""

import statistics
import time
from dataclasses import dataclass
from functools import partial

from bench import peers, workers
from bench.measure import Plan, in_rounds
from bench.table import Bar, Line, beside


@dataclass(frozen=True)
class Turns:
    """What one process got: its turns, and its longest wait in seconds."""

    count: int
    longest: float


def measure(plan: Plan) -> list[Line]:
    few = _lines(2, 0.001, plan, longest=Bar(0.010, absolute=True), apart=Bar(10, absolute=True))
    many = _lines(8, 0.010, plan, longest=Bar(0.160, absolute=True), apart=None)
    return few + many


def _lines(processes: int, hold: float, plan: Plan, longest: Bar, apart: Bar | None) -> list[Line]:
    names = peers.installed(peers.COHELD, peers.MP_RLOCK)
    runs = in_rounds({name: partial(_run, name, processes, hold, plan.turns) for name in names}, plan.runs)
    waits = {name: [max(turns.longest for turns in run) for run in runs[name]] for name in names}
    shares = {name: [_apart([turns.count for turns in run]) for run in runs[name]] for name in names}
    what = f"{processes} processes that hold {hold * 1000:.0f} ms"
    return [
        *beside(f"{what}: longest wait", "s", waits, [peers.MP_RLOCK], longest),
        *beside(f"{what}: shares apart by", "%", shares, [peers.MP_RLOCK], apart),
    ]


def _run(name: str, processes: int, hold: float, seconds: float) -> list[Turns]:
    return workers.together([partial(_take_turns, peers.new(name), hold, seconds)] * processes)


def _take_turns(device: peers.Device, hold: float, seconds: float) -> Turns:
    """Hold, let go and ask again for `seconds`."""
    count, longest = 0, 0.0
    end = time.monotonic() + seconds
    while (asked := time.monotonic()) < end:
        entered = device.held(partial(_occupy, hold))
        longest = max(longest, entered - asked)
        count += 1
    return Turns(count, longest)


def _occupy(hold: float) -> float:
    entered = time.monotonic()
    while time.monotonic() < entered + hold:
        pass
    return entered


def _apart(counts: list[int]) -> float:
    """The largest share minus the smallest, in per cent of a fair one."""
    return 100 * (max(counts) - min(counts)) / statistics.mean(counts)
