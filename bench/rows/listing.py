"""coheld ps over many live locks of many processes: its whole time, from the start of the interpreter on."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial

from bench import workers
from bench.measure import Plan
from bench.table import Bar, Line
from coheld import Lockable

BAR = Bar(1.0, absolute=True)
PROCESSES, HELD = 50, 20
COMMAND = "import sys; from coheld.cli import main; sys.exit(main())"


def measure(plan: Plan) -> list[Line]:
    each = min(plan.crowd // 5_000, 200)
    return [_measured(plan, each, "anonymous"), _measured(plan, each, "named")]


def _measured(plan: Plan, each: int, which: str) -> Line:
    with ExitStack() as running:
        for number in range(PROCESSES):
            names = [f"{number}-{lock}" if which == "named" else None for lock in range(each)]
            running.enter_context(workers.worker(partial(_make, names))).hear()
        taken = sorted(_list(each * PROCESSES) for _ in range(plan.runs))
    what = f"ps --json of {each * PROCESSES:,} {which} locks of {PROCESSES} processes"
    return Line(what, "s", taken[len(taken) // 2], bar=BAR)


def _make(names: list[str | None], tell: workers.Tell) -> None:
    locks = [Lockable(lock_name=name) for name in names]
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
