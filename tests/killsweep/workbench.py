"""What the swept calls guard, the locks that guard it, and what is noted about every trial."""

import asyncio
import ctypes
import mmap
import signal
import time
from collections.abc import Callable
from enum import IntEnum
from multiprocessing import RLock
from multiprocessing import Semaphore as Unreturned
from typing import Protocol

from coheld import Lockable, Owner, Pool, Semaphore, snapshot
from coheld._native import RECOVERING, TASKED
from coheld.testing.contract.places import place_of
from coheld.testing.support.exclusion import Exclusion, Overlap
from killsweep.stepper import MARK, Watched
from shm import spoil

TID_MASK, OWNER_DIED = (1 << 30) - 1, 1 << 30  # of the lock word


class Role(IntEnum):
    """Who calls; also the worker's number of the detectors."""

    TRACED = 0  # is stepped and killed
    WAITER = 1  # is blocked in acquire
    NEWCOMER = 2  # calls about when the traced one is killed
    SUCCESSOR = 3  # calls when all is over
    KEEPER = 4  # holds the lock until the traced one sleeps
    VICTIM = 5  # has died in its body before the traced one calls


class Stage(IntEnum):
    """The places at which the traced child stops; a step is counted from the one before it."""

    WARM = 1  # inside a first call that is not swept: what a process does only once is done
    BEGIN = 2  # next is the swept call
    MEND = 3  # in __recover__
    MENDED = 4
    ENTER = 5  # in the body; the lock is held
    INSIDE = 6  # both detectors have seen it
    LEAVE = 7  # the end of the body
    END = 8  # the call is over


BODY = (Stage.ENTER, Stage.INSIDE)  # from here to the next stage the detectors work: long, and all alike

# Looked up once: in some versions of Python each look-up of an enum's member costs hundreds of steps.
_MEND, _MENDED, _ENTER, _INSIDE, _LEAVE = Stage.MEND, Stage.MENDED, Stage.ENTER, Stage.INSIDE, Stage.LEAVE


class Board(ctypes.Structure):
    """Notes of one trial, in memory that all its processes share. Times are of CLOCK_MONOTONIC, seconds."""

    _fields_ = [
        ("stage", ctypes.c_int),
        ("traced", ctypes.c_int),
        ("doomed", ctypes.c_int),
        ("overlaps", ctypes.c_int),
        ("recoveries", ctypes.c_int),
        ("dead", ctypes.c_int),
        ("killed", ctypes.c_double),
        ("fastest", ctypes.c_double),
        ("entered", ctypes.c_double * len(Role)),
    ]
    stage: int  # where the traced child is
    traced: int  # its process
    doomed: int  # 1: it is killed asleep, and nobody wakes it before
    overlaps: int  # seen by whoever cannot tell it by his exit status any more
    recoveries: int  # calls of __recover__
    dead: int  # the process that the last of them named
    killed: float
    fastest: float  # call of the successor, seconds
    entered: "ctypes.Array[ctypes.c_double]"  # by role: when its last body began


def new_board() -> Board:
    """An empty board that this process and those it forks share."""
    return Board.from_buffer(mmap.mmap(-1, ctypes.sizeof(Board)))


class Bench:
    """The thing that needs exclusion. `pauses` says, by stage, as which stage the traced child stops, or 0."""

    def __init__(self, board: Board, exclusion: Exclusion) -> None:
        self.board = board
        self.exclusion = exclusion
        self.pauses = bytearray(len(Stage) + 1)
        self.linger: Callable[[], None] | None = None

    def pause(self, stage: Stage) -> None:
        """In the traced child: say where we are, and stop."""
        if self.pauses[stage]:
            self.board.stage = self.pauses[stage]
            signal.raise_signal(MARK)

    def work(self, role: Role) -> None:
        """The body of every call."""
        self.pause(_ENTER)
        self.board.entered[role] = time.monotonic()
        try:
            with self.exclusion.inside(role):
                self.pause(_INSIDE)
                if self.linger:
                    self.linger()
        except Overlap:
            self.board.overlaps += 1
            raise
        self.pause(_LEAVE)

    def mend(self, dead: int) -> None:
        """What the next owner does after an owner's death."""
        self.board.recoveries += 1
        self.board.dead = dead
        self.pause(_MEND)
        self.pause(_MENDED)


class Subject(Protocol):
    """A lock under test, around a bench."""

    bench: Bench

    def __init__(self, bench: Bench) -> None: ...

    def use(self, role: Role) -> None:
        """Lock, work, unlock."""


class Method(Lockable):
    """A locked method."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench

    @Lockable.locked
    def use(self, role: Role) -> None:
        self.bench.work(role)

    def __recover__(self, dead: Owner) -> None:
        self.bench.mend(dead.pid)


class With(Method):
    """A with statement, around a locked method."""

    def use(self, role: Role) -> None:
        with self:
            super().use(role)


class Try(Method):
    """The traced child tries once; the others wait."""

    def use(self, role: Role) -> None:
        if not self.acquire(blocking=role is not Role.TRACED):
            raise AssertionError("somebody has the lock")
        self.bench.work(role)
        self.release()


class TryAfter(Method):
    """Who comes when all is over tries once first: then nothing but his release can wake a forgotten waiter."""

    def use(self, role: Role) -> None:
        if role is Role.SUCCESSOR and self.acquire(blocking=False):
            self.bench.work(role)
            self.release()
        else:
            super().use(role)


class Task(Method):
    """The traced child is a task; the others are threads."""

    def use(self, role: Role) -> None:
        if role is not Role.TRACED:
            super().use(role)
            return
        self.loop = getattr(self, "loop", None) or asyncio.new_event_loop()
        self.loop.run_until_complete(self._use(role))

    async def _use(self, role: Role) -> None:
        async with self:
            self.bench.work(role)


class Cell:
    """Whose is a Lockable now? By what pthread, the kernel and a task wrote of it, not by what it says of itself."""

    def __init__(self, lockable: Lockable) -> None:
        path, cell = place_of(lockable)
        self.words = Watched(path, cell + spoil.LOCK_WORD, cell + spoil.FLAGS)

    @staticmethod
    def owns(pid: int, seen: int) -> bool:
        """Does it, whose only thread calls? No other is a task."""
        return seen & TID_MASK == pid or bool(seen >> 32 & TASKED)

    @staticmethod
    def orphaned(seen: int) -> bool:
        """Has somebody died with it before, whom nobody has recovered?"""
        return bool(seen & OWNER_DIED or seen >> 32 & RECOVERING)


class Counted:
    """What a process has here is counted, and not owned: nobody recovers it, and it comes back when that dies."""

    def left(self) -> bool:
        """When all is over, does somebody still have it?"""
        raise NotImplementedError


class Read(Counted, Method):
    """The traced child reads; the others write."""

    def use(self, role: Role) -> None:
        if role is Role.TRACED:
            self.read(role)
        else:
            super().use(role)

    @Lockable.locked(exclusive=False)
    def read(self, role: Role) -> None:
        self.bench.work(role)

    def left(self) -> bool:
        return bool(self.__lock__._held_by())


class Permit(Counted):
    """A semaphore's only permit."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.semaphore = Semaphore(1)

    def use(self, role: Role) -> None:
        with self.semaphore:
            self.bench.work(role)

    def left(self) -> bool:
        got = [self.semaphore.acquire(blocking=False) for _ in range(2)]
        if any(got):
            self.semaphore.release(sum(got))
        return got != [True, False] or self.semaphore.free() != 1


class Rent(Counted):
    """A lease of a pool's only resource."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.pool = Pool(["the only one"])

    def use(self, role: Role) -> None:
        with self.pool.lease():
            self.bench.work(role)

    def left(self) -> bool:
        ledger = snapshot(self.pool._ledger)
        return bool(ledger.leases or ledger.queue)


# What follows must not pass: the sweep has to find out.


class NotReturned(Counted):
    """A dead process keeps its permit."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.semaphore = Unreturned(1)

    def use(self, role: Role) -> None:
        with self.semaphore:
            self.bench.work(role)

    def left(self) -> bool:
        return False


class NotRobust:
    """Nobody gets it from a dead owner."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.lock = RLock()

    def use(self, role: Role) -> None:
        with self.lock:
            self.bench.work(role)


class NotExclusive:
    """No lock at all."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def use(self, role: Role) -> None:
        self.bench.work(role)


class NotRecovered(Lockable):
    """Nobody looks at what a dead owner left."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench = bench

    @Lockable.locked
    def use(self, role: Role) -> None:
        self.bench.work(role)


class NotAtOnce(Method):
    """Gives it back, and takes it again."""

    def use(self, role: Role) -> None:
        self.acquire()
        self.release()
        super().use(role)


class NotDead(Method):
    """Recovers after everybody."""

    def use(self, role: Role) -> None:
        if role is Role.SUCCESSOR and not self.bench.board.recoveries:
            self.bench.mend(0)
        super().use(role)


SUBJECTS: dict[str, type[Subject]] = {
    one.__name__: one
    for one in (
        *(Method, With, Try, TryAfter, Task, Read, Permit, Rent),
        *(NotReturned, NotRobust, NotExclusive, NotRecovered, NotAtOnce, NotDead),
    )
}
