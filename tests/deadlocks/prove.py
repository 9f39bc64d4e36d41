"""The search for cycles of waits, for as long as one likes: random rings, of which exactly one member must be told, and
crowds in no cycle, of which nobody may be.

    COHELD_DIR=$(mktemp -d) PYTHONPATH=tests python -m deadlocks.prove --rings 100 --seconds 60 --seed 1

prints a report, one JSON object, and ends with an error if anything was wrong.  A ring has 2 to 20 members, who are
threads and tasks of up to 6 processes.  A crowd takes locks in order, or with time-outs in any; some of it is killed,
and some of it forks with locks in hand; and one process looks for cycles without a pause.
"""

import argparse
import json
import logging
import os
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field

import coheld
from coheld.testing.callers import test_deadlocks as callers
from coheld.testing.support import procs, states

LARGEST, PROCESSES = 20, 6


@dataclass
class Report:
    """What was done; all of it goes into the JSON."""

    seed: int
    rings: int = 0
    sizes: dict[int, int] = field(default_factory=dict)
    slowest: float = 0.0  # s from the word that closes a ring to the end of the last of its members
    median: float = 0.0
    turns: int = 0  # of crowds: all locks got
    late: int = 0  # and time-outs that passed
    deaths: int = 0
    forks: int = 0
    looks: int = 0  # of the process that looks all the time
    seconds: float = 0.0


def random_layout(rng: random.Random) -> list[tuple[list[int], list[int]]]:
    """For each process, the members that are its threads, and its tasks."""
    size = rng.randint(2, LARGEST)
    groups: list[tuple[list[int], list[int]]] = [([], []) for _ in range(rng.randint(1, min(size, PROCESSES)))]
    for number in range(size):
        rng.choice(rng.choice(groups)).append(number)
    return [group for group in groups if any(group)]


def ring(layout: Sequence[tuple[list[int], list[int]]]) -> float:
    """Close it: one is told the whole of it, and the others go on.  Seconds until all have ended."""
    size = sum(len(threads) + len(tasks) for threads, tasks in layout)
    with ExitStack() as stack:
        workers = [stack.enter_context(procs.start(callers.members, size, *group)) for group in layout]
        for worker in workers:
            worker.expect("all hold")
        for worker in workers:
            worker.tell("go")
        begun = time.monotonic()
        answers = {number: answer for worker in workers for number, answer in worker.result().items()}
        took = time.monotonic() - begun
        pids = zip(workers, layout, strict=True)
        where = {number: worker.pid for worker, group in pids for number in [*group[0], *group[1]]}
    told = {number: answer for number, answer in answers.items() if answer != "got it"}
    assert len(answers) == size and len(told) == 1, (layout, answers)
    [(number, error)] = told.items()
    callers.assert_tells_all(error, number, size, where)
    return took


def rings(report: Report, count: int) -> None:
    took = []
    for number in range(count):
        layout = random_layout(random.Random(f"{report.seed}:ring:{number}"))
        took.append(ring(layout))
        size = sum(len(threads) + len(tasks) for threads, tasks in layout)
        report.sizes[size] = report.sizes.get(size, 0) + 1
        report.rings += 1
        report.slowest, report.median = max(took), statistics.median(took)


def until_told(link: procs.Link, seed: int) -> tuple[int, int]:
    """callers.stress, again and again."""
    turns = late = 0
    while not link._connection.poll(0):
        got, missed = callers.stress(link, seed + turns, 0.01)
        turns, late = turns + got, late + missed
    return turns, late


def forking(link: procs.Link, seed: int) -> int:
    """Forks with a lock in hand; the child wants that one, and another behind it. How often."""
    rng, forks = random.Random(seed), 0
    beds = [callers.Bed(number) for number in range(callers.BEDS)]
    while not link._connection.poll(0):
        first, second = sorted(rng.sample(range(callers.BEDS), 2))
        with beds[first], beds[second]:
            child = os.fork()
            if not child:
                with beds[first], beds[second]:
                    pass
                os._exit(0)
            time.sleep(rng.uniform(0, 0.3))  # so long that the child looks for cycles
        assert os.waitpid(child, 0)[1] == 0
        forks += 1
    return forks


def crowd(report: Report, seconds: float, seed: int) -> None:
    """Nobody is told, and nothing is found."""
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        watcher = stack.enter_context(procs.start(callers.watch))
        busy = [stack.enter_context(procs.start(until_told, seed + number)) for number in range(2)]
        forker = stack.enter_context(procs.start(forking, seed))
        while time.monotonic() < end:
            with procs.start(callers.killed_in_it, seed + report.deaths) as victim:
                victim.expect("begins")
                states.wait_until(lambda pid=victim.pid: waits_of(pid), "the victim waits")
                victim.kill()
            report.deaths += 1
        for worker in (*busy, forker, watcher):
            with suppress(BrokenPipeError):
                worker.tell("stop")
        for worker in busy:
            turns, late = worker.result()
            report.turns, report.late = report.turns + turns, report.late + late
        report.forks += forker.result()
        report.looks += watcher.result()


def waits_of(pid: int) -> bool:
    return any(wait.pid == pid for wait in callers.waits_here())


def prove(count: int, seconds: float, seed: int) -> Report:
    """Raises: AssertionError: with what was wrong."""
    report, begun = Report(seed), time.monotonic()
    rings(report, count)
    if seconds:
        crowd(report, seconds, seed)
    report.seconds = time.monotonic() - begun
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deadlocks.prove", description=__doc__)
    parser.add_argument("--rings", type=int, default=100, metavar="N", help="how many rings (default: 100)")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="of crowds (default: 60)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32), metavar="N")
    options = parser.parse_args()
    assert os.environ.get("COHELD_DIR"), "COHELD_DIR names an empty directory for its locks"
    logging.getLogger("coheld").setLevel(logging.ERROR)  # deaths are what this is made of
    print(f"seed {options.seed}, coheld {coheld.__version__}", flush=True)
    print(json.dumps(asdict(prove(options.rings, options.seconds, options.seed)), indent=1))


if __name__ == "__main__":
    main()
