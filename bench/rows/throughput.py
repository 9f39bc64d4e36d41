"""Several processes that call a short locked method without a pause: calls per second of all together."""

import time
from functools import partial
from itertools import repeat

from bench import peers, workers
from bench.measure import Plan, gc_off, in_rounds
from bench.table import Bar, Line, against

BARS = {
    peers.MP_RLOCK: Bar(2.0, at_least=True),
    peers.PYATS: Bar(1.5, at_least=True),
    peers.FILELOCK: None,
    peers.FASTENERS: None,
}
BATCH = 10
"""Calls between two looks at the clock."""


def measure(plan: Plan) -> list[Line]:
    return _with_processes(2, plan) + _with_processes(8, plan)


def _with_processes(count: int, plan: Plan) -> list[Line]:
    names = peers.installed(peers.COHELD, *BARS)
    measures = {name: partial(_rate, name, count, plan.burst) for name in names}
    return against(f"{count} processes, short calls", "/s", in_rounds(measures, plan.bursts), BARS)


def _rate(name: str, processes: int, burst: float) -> float:
    job = partial(_calls, peers.new(name), burst)
    return sum(workers.together([job] * processes)) / burst


def _calls(device: peers.Device, burst: float) -> int:
    """How many calls this process completes within `burst` seconds; a batch that ends later counts not."""
    done = 0
    with gc_off():
        end = time.monotonic() + burst
        while True:
            for _ in repeat(None, BATCH):
                device.locked()
            if time.monotonic() > end:
                return done
            done += BATCH
