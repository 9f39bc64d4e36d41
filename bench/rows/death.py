"""The holder is killed while another process waits: how long until that one owns the lock.

Counted from just before the SIGKILL is sent to the waiter's first statement inside, both on CLOCK_MONOTONIC,
which all processes of a machine share.
"""

import logging
import math
import os
import signal
import time

from bench import peers, workers
from bench.measure import Plan
from bench.table import Bar, Line, beside

BAR = Bar(0.005, absolute=True)
PEERS = (peers.MP_RLOCK, peers.PYATS, peers.FILELOCK, peers.FASTENERS)


def measure(plan: Plan) -> list[Line]:
    _log_to_nowhere()
    samples = {name: _deaths(name, plan) for name in peers.installed(peers.COHELD, *PEERS)}
    worst = {name: [max(delays)] for name, delays in samples.items()}
    what = "holder killed, waiter owns it"
    median_lines = beside(f"{what}: median", "s", samples, PEERS, BAR)
    return median_lines + beside(f"{what}: worst", "s", worst, PEERS, BAR)


def _deaths(name: str, plan: Plan) -> list[float]:
    """Seconds of every trial, or infinity alone: a lock that is not freed once need not be tried again."""
    delays = []
    for trial in range(plan.deaths):
        delays.append(_death(peers.new(name), age=trial * 0.002, patience=plan.patience))
        if math.isinf(delays[-1]):
            return delays[-1:]
    return delays


def _death(device: peers.Device, age: float, patience: float) -> float:
    """Kill a holder behind whom a process slept `age` seconds; infinity if that has nothing in `patience`."""
    with workers.worker(lambda tell: _hold(device, tell)) as holder:
        holder.hear()
        with workers.worker(lambda tell: _ask(device, tell)) as waiter:
            waiter.hear()
            workers.wait_until_asleep(waiter.pid)
            time.sleep(age)
            killed = time.monotonic()
            os.kill(holder.pid, signal.SIGKILL)
            return _heard_within(waiter, patience) - killed


def _hold(device: peers.Device, tell: workers.Tell) -> None:
    def stay() -> None:
        tell("mine")
        signal.pause()

    device.held(stay)


def _ask(device: peers.Device, tell: workers.Tell) -> None:
    tell("asking")
    tell(device.held(time.monotonic))


def _heard_within(waiter: workers.Worker, patience: float) -> float:
    try:
        return float(waiter.hear(patience))
    except TimeoutError:
        return math.inf


def _log_to_nowhere() -> None:
    """Recovering logs a line. Making and writing it belongs to the figure, but not on the screen."""
    logging.getLogger("coheld").addHandler(logging.FileHandler(os.devnull))
