"""One trial: a traced child is killed at one step of its call; then everyone else must get the lock."""

import contextlib
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from coheld import Lockable
from coheld.backends import waiters
from coheld.testing.support import delays, states
from coheld.testing.support.exclusion import Exclusion
from killsweep.actor import Actor
from killsweep.stepper import Route, Tracee, Walk, trace_me
from killsweep.workbench import BODY, Bench, Board, Cell, Counted, Role, Stage, Subject, new_board

SLICE = 1.2  # s; nobody sleeps longer than this on a lock that is free
SLOWEST = SLICE + delays.LONG / 10  # s; the bound of the next acquire: that sleep, and a busy machine
OLD = 0.001  # s; a waiter has waited for long
PROMPT = 0.1  # s; a waiter that is woken is in by then; one that nobody wakes sleeps twice as long, or longer
CALLS = 20  # of the successor; the fastest shows what a call costs from now on
USUAL = 0.0015  # s; the fastest is no slower: letting others pass who are dead would cost 5 ms, at every call


@dataclass(frozen=True)
class Scene:
    """Who else is there."""

    name: str
    fresh: bool = False  # it is the first call of its process
    waiter: bool = False  # has enrolled and slept before the call begins, and sleeps again during the body
    newcomer: bool = False  # calls about when the child is killed
    victim: bool = False  # has died inside before: the traced child's is the recovering call
    keeper: bool = False  # holds the lock until the traced child sleeps, and then the waiter behind it
    joiner: bool = False  # the waiter comes during the body, and sleeps


SCENES = {
    one.name: one
    for one in (
        Scene("alone"),
        Scene("fresh", fresh=True),
        Scene("waiter", waiter=True),
        Scene("newcomer", waiter=True, newcomer=True),
        Scene("rival", newcomer=True),
        Scene("recovering", victim=True),
        Scene("contended", keeper=True),
        Scene("joined", joiner=True),
    )
}


@dataclass(frozen=True)
class Cast:
    """What all trials of a sweep have in common."""

    library: CDLL  # the stepper
    scene: Scene
    subject: type[Subject]
    bound: float = delays.LONG  # s; who has not ended then hangs


@dataclass(frozen=True, order=True)
class Point:
    """Kill after so many steps from a stage."""

    stage: Stage
    step: int  # ASLEEP: where it sleeps in the kernel
    early: bool = False  # waiter and newcomer have settled before the kill; else they run into it
    patient: bool = False  # nobody else calls before the waiter has it

    def __str__(self) -> str:
        words = [self.stage.name, "asleep" if self.step == ASLEEP else f"+{self.step}"]
        return " ".join(words + ["early"] * self.early + ["patient"] * self.patient)


ASLEEP = -1


@dataclass
class Outcome:
    """What came of one trial."""

    point: Point
    pointer: int  # the instruction that the killed child did not execute any more
    failures: list[str]
    recoveries: int  # by those who came after it
    slowest: float  # s from the kill until the last of those who waited then was in


class _Nobody:
    """The search for cycles of waits, where there are none."""

    @staticmethod
    def search(_lock: object) -> None:
        pass


class Trial:
    """One lock, one cast. Leave the block, and none of its processes is there any more."""

    def __init__(self, cast: Cast) -> None:
        self.scene = cast.scene
        self._library = cast.library
        self._bound = cast.bound
        self._actors: dict[Role, Actor] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="sweep-", dir=os.environ["COHELD_DIR"])
        self.board: Board = new_board()
        self.bench = Bench(self.board, Exclusion(self._directory.name, len(Role)))
        self.subject = cast.subject(self.bench)
        owned = isinstance(self.subject, Lockable) and not isinstance(self.subject, Counted)
        self.cell = Cell(self.subject) if owned else None

    def __enter__(self) -> Self:
        pid = os.fork()
        if not pid:
            self._be_traced()
        self.board.traced = pid
        self.child = Tracee(self._library, pid)
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.child.pid, signal.SIGKILL)
            os.waitpid(self.child.pid, 0)
        for actor in self._actors.values():
            actor.kill()
        self._directory.cleanup()

    # ---- the cast

    def _be_traced(self) -> None:
        """The traced child: one call to get warm, then the one that is swept."""
        status = 1
        try:
            signal.setitimer(signal.ITIMER_REAL, delays.HANG)  # stepping takes its time
            trace_me(self._library)
            self._make_both_calls()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _make_both_calls(self) -> None:
        use, pause, role = self.subject.use, self.bench.pause, Role.TRACED
        begin, end = Stage.BEGIN, Stage.END
        waiters.of_this_thread()  # to make the first table takes more steps than all the rest
        waiters.deadlock = (
            _Nobody  # a wait of steps is long enough for a search, which takes more; at full speed none is
        )
        if not self.scene.fresh:
            self.bench.pauses[Stage.INSIDE] = Stage.WARM
            use(role)
        self.bench.pauses[:] = range(len(Stage) + 1)
        pause(begin)
        use(role)
        pause(end)

    def _cast(self, role: Role, play: Callable[[], None] | None = None, gated: bool = False) -> Actor:
        actor = Actor(play or (lambda: self.subject.use(role)), self._bound)
        self._actors[role] = actor
        if not gated:
            actor.open_gate()
        return actor

    def _be_victim(self) -> None:
        self.bench.linger = lambda: os.kill(os.getpid(), signal.SIGKILL)
        self.subject.use(Role.VICTIM)

    def _be_keeper(self) -> None:
        self.bench.linger = self._keep
        self.subject.use(Role.KEEPER)

    def _keep(self) -> None:
        """Hold the lock until the traced child is asleep, or dead, and the waiter asleep behind it."""
        board, waiter = self.board, self._actors[Role.WAITER]
        states.wait_until(
            lambda: states.gone(board.traced) or (not board.doomed and states.blocked_in_futex(board.traced)),
            "the traced child sleeps, or is dead",
        )
        waiter.open_gate()
        states.wait_until(lambda: states.blocked_in_futex(waiter.pid), "the waiter sleeps")

    def _be_successor(self) -> None:
        """Call, and call again, and note what a call costs from now on."""
        self.subject.use(Role.SUCCESSOR)
        first = self.board.entered[Role.SUCCESSOR]
        self.board.fastest = min(self._timed_call() for _ in range(CALLS))
        self.board.entered[Role.SUCCESSOR] = first

    def _timed_call(self) -> float:
        began = time.perf_counter()
        self.subject.use(Role.SUCCESSOR)
        return time.perf_counter() - began

    # ---- the play

    def advance(self) -> Stage:
        """Let the traced child run to its next stage, and set the scene there."""
        self.child.run_to_mark()
        return self.arrive()

    def arrive(self) -> Stage:
        """The traced child has come to a stage: set the scene."""
        stage = Stage(self.board.stage)
        if stage is Stage.WARM and self.scene.waiter:
            self._waiter_sleeps().stop()
        if stage is Stage.BEGIN:
            self._before_the_call()
        if stage is Stage.ENTER and self.scene.waiter:
            self._actors[Role.WAITER].go_on()
            self._actors[Role.WAITER].settle()
        if stage is Stage.ENTER and self.scene.joiner:
            self._waiter_sleeps()
        if stage is Stage.ENTER and self.scene.keeper:
            entered = time.monotonic()  # a wait that is old is handed the lock: let it be so at full speed as well
            states.wait_until(lambda: time.monotonic() > entered + OLD, "the wait is old")
        return stage

    def _waiter_sleeps(self) -> Actor:
        waiter = self._cast(Role.WAITER)
        states.wait_until_blocked(waiter.pid)
        return waiter

    def _before_the_call(self) -> None:
        if self.scene.victim:
            self._cast(Role.VICTIM, self._be_victim).end()
        if self.scene.newcomer:
            self._cast(Role.NEWCOMER, gated=True)
        if self.scene.keeper:
            self._cast(Role.WAITER, gated=True)
            self._cast(Role.KEEPER, self._be_keeper)
            states.wait_until(lambda: self.board.entered[Role.KEEPER], "the keeper holds the lock")

    def record(self, body: bool) -> dict[Stage, Walk]:
        """Walk through the whole call, from each stage to the next; through its body only if wanted."""
        while self.advance() is not Stage.BEGIN:
            pass
        walked: dict[Stage, Walk] = {}
        while (stage := Stage(self.board.stage)) is not Stage.END:
            follow = self.child.walk_to_mark if body or stage not in BODY else self.child.glance
            walked[stage] = follow(self.cell and self.cell.words)
            self.arrive()
        return walked

    def run(self, point: Point, route: Route) -> Outcome:
        """Kill the traced child at a point, and see what becomes of the others."""
        self.board.doomed = point.step == ASLEEP
        while self.advance() is not point.stage:
            pass
        pointer = self._come_to(point, route)
        before, seen = self.board.recoveries, self.cell and self.cell.words.look()
        self._kill(point.early)
        failures = self._finish(point.patient)
        recoveries = self.board.recoveries - before
        failures += self._faults(recoveries) + self._mistaken(point, recoveries, seen)
        return Outcome(point, pointer, failures, recoveries, self._slowest())

    def _come_to(self, point: Point, route: Route) -> int:
        """Bring the traced child there, and return the address of its next instruction; 0 where it sleeps."""
        if point.step != ASLEEP:
            self.child.follow(route)  # if its next mark came first, it is killed there
            return self.child.pointer()
        self.child.let_go()
        states.wait_until_blocked(self.child.pid)
        return 0

    def _kill(self, early: bool) -> None:
        if early:
            for actor in self._let_others_run():
                actor.settle()
        self.board.killed = time.monotonic()
        os.kill(self.child.pid, signal.SIGKILL)
        if not early:
            self._let_others_run()
        os.waitpid(self.child.pid, 0)

    def _let_others_run(self) -> list[Actor]:
        others = [self._actors[role] for role in (Role.WAITER, Role.NEWCOMER) if role in self._actors]
        if self.scene.keeper:
            return []  # it lets the waiter in, and sees the child die
        for actor in others:
            actor.go_on()
            actor.open_gate()
        return others

    def _finish(self, patient: bool) -> list[str]:
        """Everyone who called gets the lock, and somebody who comes when all is over."""
        if self.scene.keeper and not patient:
            self._cast(Role.SUCCESSOR, self._be_successor)
        failures = self._ends()
        if Role.SUCCESSOR not in self._actors:
            self._cast(Role.SUCCESSOR, self._be_successor)
        return failures + self._ends()

    def _ends(self) -> list[str]:
        living = [(role, actor) for role, actor in self._actors.items() if actor.status is None]
        return [f"{role.name} {fault}" for role, actor in living if (fault := actor.end())]

    def _faults(self, recoveries: int) -> list[str]:
        """What the notes say against the lock."""
        exclusion, board = self.bench.exclusion, self.board
        faults = [f"{board.overlaps} overlaps were seen"] * (board.overlaps > 0)
        try:
            exclusion.check(deaths=1 + self.scene.victim)
        except AssertionError as error:
            faults.append(str(error))
        if isinstance(self.subject, Counted):
            faults += ["what the dead had is still somebody's"] * self.subject.left()
        elif exclusion.found_dead and not board.recoveries:
            faults.append("the mark of a dead owner was found, and __recover__ was not called")
        if recoveries > 1:
            faults.append(f"__recover__ was called {recoveries} times for one death")
        if recoveries and board.dead not in self._dead():
            faults.append(f"__recover__ was told that process {board.dead} is dead")
        if board.fastest > USUAL:
            faults.append(f"the fastest of {CALLS} later calls took {board.fastest * 1e3:.1f} ms")
        if self._slowest() > SLOWEST:
            faults.append(f"the next owner waited {self._slowest():.2f} s")
        return faults

    def _mistaken(self, point: Point, recoveries: int, seen: int | None) -> list[str]:
        """A dead owner is recovered, and nobody else. Seen: the lock, when the traced child stood still to be killed;
        None: it has no owner."""
        if self.cell is None or seen is None:
            return []
        owned = self.cell.owns(self.child.pid, seen)
        faults = ["no recovery of who died inside"] * (point.stage in BODY and not recoveries)
        if (owned or self.cell.orphaned(seen)) == bool(recoveries):
            return faults
        return [*faults, f"{recoveries} recoveries, where the dead one {'owned it' if owned else 'did not own it'}"]

    def _dead(self) -> set[int]:
        """Whom __recover__ may be told of; 0: nobody knows."""
        victim = self._actors.get(Role.VICTIM)
        return {0, self.child.pid, victim.pid if victim else 0}

    def _slowest(self) -> float:
        """Seconds from the kill until the last of the others was in; not the successor, who is started then."""
        entered = [self.board.entered[role] for role in (Role.WAITER, Role.NEWCOMER) if role in self._actors]
        return max([0.0, *(float(moment) - self.board.killed for moment in entered)])


def scratch() -> Path:
    """A directory for what is compiled."""
    return Path(tempfile.mkdtemp(prefix="sweep-", dir=os.environ["COHELD_DIR"]))
