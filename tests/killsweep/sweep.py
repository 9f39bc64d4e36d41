"""The kill sweep: one locked call is killed at every instruction of the lock, and at others spread over it.

    COHELD_DIR=$(mktemp -d) PYTHONPATH=tests python -m killsweep.sweep --scene waiter --others 100 --seed 1

prints a report, one JSON object, and ends with 1 if anything was wrong. A first walk through the call, step by
step, lists its instructions; then every trial forks a new cast from this warm process, brings the traced child to
one of these steps, and kills it there. It stands still between two instructions when SIGKILL reaches it, so
every trial is exact: the report counts the instructions at which a child died, not those that were asked for.
"""

import argparse
import json
import logging
import os
import random
import shutil
import sys
import time
from ctypes import CDLL
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import coheld._native
from coheld.testing.support import delays
from killsweep.stepper import Code, Lost, build
from killsweep.trial import ASLEEP, PROMPT, SCENES, Cast, Outcome, Point, Trial, scratch
from killsweep.workbench import SUBJECTS, Counted, Stage

AGAIN = 8  # trials of one point, where a busy machine may have been slow: three in a row have been, in one burst
PATIENT = 0.05  # of the trials with a keeper: nobody else may call there, and a lost wake costs a bounded sleep
ENOUGH = 5  # failures end a sweep


@dataclass
class Report:
    """What a sweep found; all of it goes into the JSON."""

    scene: str
    subject: str
    seed: int
    steps: dict[str, int] = field(default_factory=dict)  # of the whole call, by stage
    wanted: int = 0  # instructions of the lock, by stage and address
    missed: list[str] = field(default_factory=list)  # of them, those where no child died
    killed: int = 0
    recovered: int = 0
    slowest: float = 0.0  # s from a kill to the last of those who waited
    slowest_at: str = ""
    slow: int = 0  # kills after which that took more than PROMPT
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


class Sweep:
    """One scene and one subject."""

    def __init__(self, cast: Cast, seed: int, body: bool) -> None:
        self._cast = cast
        self._random = random.Random(f"{seed}:{cast.scene.name}:{cast.subject.__name__}")
        self._outcomes: list[Outcome] = []
        self._straight = False  # to the address, instead of the step
        self.report = Report(cast.scene.name, cast.subject.__name__, seed)
        with Trial(self._cast) as trial:
            self._walks = trial.record(body)
            self._cell, self._walked = trial.cell, trial.child.pid
        self.report.steps = {stage.name: len(walk) for stage, walk in self._walks.items()}
        self._code = Code(coheld._native.__file__)
        self._of_lock = {stage: self._code.of_lock(walk.pointers) for stage, walk in self._walks.items()}

    # ---- which points

    def lock_points(self, share: float, most: int | None) -> list[Point]:
        """Every step inside the lock's code (or a random share of them; or at most so many of all of them)."""
        steps = [(stage, step) for stage, steps in self._of_lock.items() for step in steps]
        if most is not None and most < len(steps):
            return [self._point(*one) for one in sorted(self._random.sample(steps, most))]
        return [self._point(*one) for one in steps if self._random.random() < share]

    def other_points(self, count: int) -> list[Point]:
        """So many steps, as many in each stage, spread evenly over it."""
        each = max(1, count // len(self._walks))
        steps = {
            (stage, int((number + self._random.random()) * len(walk) / each))
            for stage, walk in self._walks.items()
            for number in range(each)
        }
        return [self._point(*one) for one in sorted(steps)]

    def asleep(self) -> list[Point]:
        """Where the traced child sleeps, if it has to wait."""
        return [Point(Stage.BEGIN, ASLEEP, patient=one) for one in (False, True) if self._cast.scene.keeper]

    def ends(self) -> list[Point]:
        """Inside, and where the call is all but over: who dies there has the lock, and has it no more."""
        return [self._point(Stage.INSIDE, 0), self._point(Stage.LEAVE, len(self._walks[Stage.LEAVE]) - 1)]

    def _point(self, stage: Stage, step: int) -> Point:
        patient = self._cast.scene.keeper and self._random.random() < PATIENT
        return Point(stage, step, early=self._random.random() < 0.5, patient=patient)

    # ---- the trials

    def run(self, points: list[Point]) -> None:
        """Kill at each, until enough is wrong."""
        for point in points:
            if len(self.report.failures) >= ENOUGH:
                return
            self._note(self._outcome(point))

    def _outcome(self, point: Point) -> Outcome:
        """Of a trial; of another where a busy machine may have been slow. Who sleeps on a free lock is so again."""
        for _ in range(AGAIN):
            outcome = self._try(point)
            if not (self._is_soon(point) and outcome.slowest > PROMPT):
                return outcome
        outcome.failures.append(f"the waiter slept on for {outcome.slowest:.2f} s")
        return outcome

    def _is_soon(self, point: Point) -> bool:
        """Is the waiter in soon?  Another call comes by; or it looks for the dead itself, as those who wait for what is
        counted do."""
        joined = self._cast.scene.joiner and issubclass(self._cast.subject, Counted)
        return joined or (self._cast.scene.keeper and not point.patient)

    def _try(self, point: Point) -> Outcome:
        walk, step = self._walks[point.stage], max(point.step, 0)
        route = walk.straight_to(step) if self._straight else walk.route(step)
        try:
            with Trial(self._cast) as trial:
                return trial.run(point, route)
        except (Lost, AssertionError) as error:
            return Outcome(point, 0, [str(error)], 0, 0.0)

    def _note(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        where = f"{outcome.point} at {self._code.name(outcome.pointer)}"
        self.report.failures += [f"{where}: {failure}" for failure in outcome.failures]
        self.report.killed += 1
        self.report.recovered += outcome.recoveries > 0
        self.report.slow += outcome.slowest > PROMPT
        if outcome.slowest > self.report.slowest:
            self.report.slowest, self.report.slowest_at = outcome.slowest, where

    def cover(self) -> None:
        """Try again what was missed, straight to the address, as libc's way through the vdso is not as long each time;
        and count the instructions of the lock at which a child died."""
        self._straight = True
        for _ in range(AGAIN):
            self.run(list(self._missed().values()))
        missed = [(point, pointer) for (_, pointer), point in self._missed().items()]
        self.report.missed = [f"{point} at {self._code.name(pointer)}" for point, pointer in missed]
        self.report.wanted = len(self._wanted())

    def _wanted(self) -> dict[tuple[Stage, int], int]:
        """The lock's instructions, and the step of each."""
        return {
            (stage, self._walks[stage].pointers[step]): step for stage, steps in self._of_lock.items() for step in steps
        }

    def _missed(self) -> dict[tuple[Stage, int], Point]:
        died_at = {(one.point.stage, one.pointer) for one in self._outcomes}
        missed = [(place, step) for place, step in self._wanted().items() if place not in died_at]
        return {place: self._point(place[0], step) for place, step in missed}

    # ---- what the walk says

    def check_walk(self) -> None:
        """The lock is the child's from one instruction on to another, without a gap."""
        if self._cell is None:
            return
        owned = [self._cell.owns(self._walked, seen) for walk in self._walks.values() for seen in walk.seen]
        changes = sum(before != after for before, after in pairwise(owned))
        if owned[0] or owned[-1] or changes != 2:
            self.report.failures.append(f"it comes and goes: {changes} times in {len(owned)} steps")


def sweep(options: argparse.Namespace, library: CDLL) -> Report:
    """All of it."""
    began = time.monotonic()
    cast = Cast(library, SCENES[options.scene], SUBJECTS[options.subject], options.bound)
    work = Sweep(cast, options.seed, options.body)
    work.run(work.asleep() + work.ends())
    work.run(work.lock_points(options.share, options.most))
    work.run(work.other_points(options.others))
    if options.share == 1 and options.most is None:
        work.cover()
    work.check_walk()
    work.report.seconds = time.monotonic() - began
    return work.report


def options_of(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill a locked call at each of its instructions.")
    parser.add_argument("--scene", choices=SCENES, default="alone")
    parser.add_argument("--subject", choices=SUBJECTS, default="Method")
    parser.add_argument("--share", type=float, default=1.0, help="of the lock's instructions, 0 to 1")
    parser.add_argument("--most", type=int, help="of the lock's instructions, number; instead of a share")
    parser.add_argument("--others", type=int, default=100, help="number of other steps")
    parser.add_argument("--body", action="store_true", help="others inside the body, not only where it begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bound", type=float, default=delays.LONG, help="seconds after which a process hangs")
    return parser.parse_args(arguments)


def main() -> int:
    """0: nothing was wrong."""
    options = options_of(sys.argv[1:])
    logging.getLogger("coheld").setLevel(logging.ERROR)  # it warns of every owner that we kill
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # stepping is much faster on a single processor
    directory = scratch()
    try:
        report = sweep(options, build(directory))
    finally:
        shutil.rmtree(directory)
    print(json.dumps(asdict(report), indent=1))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
