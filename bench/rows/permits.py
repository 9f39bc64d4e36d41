"""A semaphore's acquire and release, uncontended; and how soon a killed process's permit is a waiter's."""

import multiprocessing
import os
import signal
import statistics
import time

from bench import peers, workers
from bench.measure import Plan, calibrated, in_rounds
from bench.table import Bar, Line, against
from coheld import Semaphore

MP_SEMAPHORE = "mp.Semaphore"
BARS = {MP_SEMAPHORE: Bar(1.5)}
DEATH = Bar(0.05, absolute=True)


def measure(plan: Plan) -> list[Line]:
    makers = {peers.COHELD: Semaphore, MP_SEMAPHORE: multiprocessing.get_context("fork").Semaphore}
    measures = {name: calibrated("it.acquire(); it.release()", make(2), plan.loop) for name, make in makers.items()}
    lines = against("acquire and release of a semaphore", "s", in_rounds(measures, plan.rounds), BARS)
    back = [_after_death(Semaphore(1), age=trial * 0.002) for trial in range(plan.deaths)]
    return [
        *lines,
        Line("a killed process's permit is a waiter's: median", "s", statistics.median(back)),
        Line("a killed process's permit is a waiter's: longest", "s", max(back), bar=DEATH),
    ]


def _after_death(semaphore: Semaphore, age: float) -> float:
    """Seconds from the kill of who has it to the first statement of another, who has waited for that long."""
    with workers.worker(lambda tell: _keep(semaphore, tell)) as holder:
        holder.hear()
        with workers.worker(lambda tell: _ask(semaphore, tell)) as waiter:
            waiter.hear()
            time.sleep(0.01 + age)
            killed = time.monotonic()
            os.kill(holder.pid, signal.SIGKILL)
            return float(waiter.hear()) - killed


def _keep(semaphore: Semaphore, tell: workers.Tell) -> None:
    semaphore.acquire()
    tell("have")
    signal.pause()


def _ask(semaphore: Semaphore, tell: workers.Tell) -> None:
    tell("asking")
    semaphore.acquire()
    tell(time.monotonic())
