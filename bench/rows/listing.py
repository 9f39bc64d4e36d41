"""coheld ps over many live locks of many processes: its whole time, from the start of the interpreter on."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack

from bench import workers
from bench.measure import Plan
from bench.table import Bar, Line
from coheld import Lockable

BAR = Bar(1.0, absolute=True)
PROCESSES, HELD = 50, 20
COMMAND = "import sys; from coheld.cli import main; sys.exit(main())"


def measure(plan: Plan) -> list[Line]:
    each = min(plan.crowd // 5_000, 200)
    with ExitStack() as running:
        for _ in range(PROCESSES):
            running.enter_context(workers.worker(lambda tell: _make(each, tell))).hear()
        taken = sorted(_list(each * PROCESSES) for _ in range(plan.runs))
    what = f"ps --json of {each * PROCESSES:,} locks of {PROCESSES} processes"
    return [Line(what, "s", taken[len(taken) // 2], bar=BAR)]


def _make(count: int, tell: workers.Tell) -> None:
    locks = [Lockable() for _ in range(count)]
    for lock in locks[:HELD]:
        lock.acquire()
    tell("made")
    time.sleep(workers.PATIENCE)


def _list(least: int) -> float:
    begin = time.perf_counter()
    command = [sys.executable, "-c", COMMAND, "ps", "--json", "--all"]
    done = subprocess.run(command, check=True, capture_output=True, env=os.environ)
    taken = time.perf_counter() - begin
    assert len(done.stdout.splitlines()) >= least
    return taken
