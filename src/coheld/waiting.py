"""How long to wait, as users say it and as a loop needs it; and waiting until something holds that others bring about:
one description of it, as a generator, and who serves it.

``until`` yields what it has to wait for, a Step, and is sent what came of it.  ``run`` serves it by blocking the
thread, and aio.py by suspending the task.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import GEN_CLOSED, getgeneratorstate
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import CoheldError

if TYPE_CHECKING:
    from ._native import Mutex

T = TypeVar("T")
FOREVER = math.inf
_AGES = 9e9  # seconds; 285 years and more are for ever, and no clock can count them in nanoseconds
_FIRST_NAP, LONGEST_NAP = 0.0002, 0.005
MOMENTS = 0.1
"""For how long to wait at least, by who tries once, too, for what everybody has for moments only, seconds."""
_MISSING: Any = object()


def _told_after() -> float:
    """COHELD_WARN_AFTER, seconds; 10 without it, or where it is no number; never, if it is not above zero."""
    try:
        seconds = float(os.environ.get("COHELD_WARN_AFTER", "10"))
    except ValueError:
        seconds = math.nan
    if math.isnan(seconds):
        logging.getLogger("coheld").warning("COHELD_WARN_AFTER is no number of seconds; 10 it is")
        return 10.0
    return seconds if seconds > 0 else FOREVER


TOLD_AFTER = _told_after()
"""A wait that is longer is told of in the log, once; seconds."""


def seconds_of(timeout: object) -> float:
    """A time-out in seconds: None is FOREVER, and whatever is not above zero is 0: try once.

    Raises: TypeError, ValueError: if it is no number of seconds.
    """
    if timeout is None:
        return FOREVER
    if not any(hasattr(type(timeout), how) for how in ("__float__", "__index__")):
        raise TypeError(f"timeout must be a number of seconds or None, not {type(timeout).__name__}")
    try:
        seconds = float(timeout)  # type: ignore[arg-type]  # it has one of the two
    except OverflowError:
        raise ValueError("timeout is too large a number") from None
    if math.isnan(seconds):
        raise ValueError("timeout must not be NaN")
    return max(0.0, seconds) if seconds < _AGES else FOREVER


def patience(blocking: object, timeout: object, block: object = _MISSING) -> float:
    """How long the arguments of an acquire ask to wait, seconds. block is what pyATS calls blocking."""
    seconds = seconds_of(timeout)
    return seconds if (blocking if block is _MISSING else block) else 0.0


def naps() -> Iterator[float]:
    """How long to sleep between looks, seconds: short, then longer, within a bound of some milliseconds."""
    nap = _FIRST_NAP
    while True:
        yield nap
        nap = min(nap * 1.5, LONGEST_NAP)


def left(deadline: float) -> float:
    """Seconds until that time.monotonic(); not above zero once it is there."""
    return deadline - monotonic()


def moments(deadline: float) -> float:
    """How long who has until that deadline waits for what everybody has for moments only, seconds."""
    return max(left(deadline), MOMENTS)


class Patience:
    """Of one wait.  ask: called when it has lasted for long, with how long, and whether that was told of; returns when
    to call again.  All in seconds since it began."""

    def __init__(self, ask: Callable[[float, bool], float], first: float) -> None:
        self._ask, self._told, self._begun = ask, False, monotonic()
        self._next = first

    @property
    def until(self) -> float:
        """When to look next, a time.monotonic()."""
        return self._begun + self._next

    def look(self) -> None:
        """Called again and again.  Raises: DeadlockError: where the wait cannot end."""
        waited = monotonic() - self._begun
        if waited >= self._next:
            self._next = self._ask(waited, self._told)
            self._told = waited >= TOLD_AFTER


def telling(lock: Any, why: Callable[[], str]) -> Patience:
    """Of a wait for more than the lock, of which one line tells once it has lasted for long."""

    def tell(waited: float, _told: bool) -> float:
        lock._waits_long(waited, why())
        return FOREVER

    return Patience(tell, TOLD_AFTER)


class NotSo(Exception):
    """The deadline has passed, and it does not hold.  Internal: whoever called says it in his own words."""


@dataclass(frozen=True)
class Sleep:
    """Answered with True: a release or a death after that epoch; False: none until that time.  timed: the whole wait
    has a deadline.  For a call of that method."""

    epoch: int
    until: float
    timed: bool
    method: str = ""

    def block(self, lock: Mutex) -> bool:
        return lock._sleep(self.epoch, self.until, self.method, self.timed)


@dataclass(frozen=True)
class Take:
    """The lock, so many levels of it; answered with whether it was got by the deadline.  keep: who asks must have it,
    whatever comes meanwhile."""

    obj: object
    method: str
    levels: int
    deadline: float
    keep: bool

    def block(self, lock: Mutex) -> bool:
        return lock._resume(self.obj, self.method, self.levels, self.deadline, self.keep)


@dataclass(frozen=True)
class Attempt:
    """To take a permit of a semaphore, until that deadline.  Answered with None: this process has one more; the epoch
    that the next release moves on: none was free; or False: another has kept the register for longer than moments."""

    semaphore: Any
    deadline: float

    def block(self, _lock: Mutex) -> int | None:
        found: int | None = self.semaphore._permits._try(moments(self.deadline))
        return found


@dataclass(frozen=True)
class Depart:
    """A store that has the lock is told that it goes, before the owner gives it up.  loud: see Handle._suspend."""

    loud: bool

    def block(self, lock: Any) -> None:
        lock._part(self.loud)


@dataclass(frozen=True)
class Inquiry:
    """A store is asked, by another thread where it is a task that waits; answered with what ask() says.  undo: called
    with that, where nobody is there for it any more; never blocks."""

    ask: Callable[[], Any]
    undo: Callable[[Any], object] = id

    def block(self, _lock: Mutex) -> Any:
        return self.ask()


Step = Sleep | Take | Attempt | Depart | Inquiry
Steps = Generator[Step, Any, T]


def until(lock: Any, obj: object, holds: Callable[[], T], deadline: float, keep: bool) -> Steps[T]:
    """What holds() returns once that is true.  The lock is held by who calls; it is given up, all levels of it, while
    it does not hold, and held again whenever holds() is called.

    keep: it is held at the end, however that comes, but for that of a coroutine that is destroyed, which can wait for
    nothing any more, or of a lock that cannot be had any more; else it may not be where this raises.
    Raises: NotSo: if the deadline passes.
    """
    depth, _, (_, _, _, method) = lock._record()
    patience: Patience | None = None
    first = keep  # who waits inside of a call may have changed something; who waits before it has not
    while not (value := holds()):
        if monotonic() >= deadline:
            raise NotSo
        take = Take(obj, method, depth, FOREVER if keep else deadline, keep)
        try:
            if lock.far:
                yield Depart(first)
            epoch = lock._suspend(first)
            patience = patience or telling(lock, partial(_not_yet, lock))
            patience.look()
            while not (yield Sleep(epoch, min(deadline, patience.until), deadline < FOREVER, method)):
                if left(deadline) <= 0:
                    break
                patience.look()
            got = yield take
        except GeneratorExit:  # first of all: the collector may run in the thread that owns the lock now
            raise
        except BaseException as error:
            if keep:
                yield from _taken_back(lock, take, error)
            raise
        if not got:
            raise NotSo
        first = False
    return value


def _not_yet(lock: Any) -> str:
    """Why a wait for what others bring about goes on, as messages say it."""
    return f"it is not yet so; {lock._why_not() if lock._owner() else 'nobody holds it'}"


def _taken_back(lock: Mutex, take: Take, error: BaseException) -> Steps[None]:
    """Until the lock is held, whatever signal's handlers raise meanwhile; the last of that is what is raised.

    Raises: CoheldError, OSError: if the lock cannot be had any more.
    """
    last = error
    while True:
        try:
            if lock._mine():
                break
            yield take
        except (GeneratorExit, CoheldError, OSError):
            raise
        except BaseException as newer:
            last = newer
    if last is not error:
        raise last


def run(steps: Steps[T], lock: Mutex) -> T:
    """Serve the steps by blocking the calling thread, to their end."""
    act: Callable[[], Step] = partial(next, steps)
    while True:
        try:
            while True:
                step = act()
                act = partial(steps.send, step.block(lock))
        except StopIteration as end:
            result: T = end.value
            return result
        except BaseException as error:
            if getgeneratorstate(steps) == GEN_CLOSED:  # they have raised it, and are at their end
                raise
            act = partial(steps.throw, error)  # a signal's handler has, and they see it where they wait


def surely(act: Callable[[], None]) -> None:
    """act(), and again where an interrupt has broken it off, which is raised after that: nothing is lost by that."""
    interrupted: BaseException | None = None
    for _ in range(100):  # what raises each time is no interrupt
        try:
            act()
            break
        except (CoheldError, OSError):
            if interrupted is None:
                raise
            break  # done already, when the interrupt came
        except BaseException as error:  # of a signal's handler
            interrupted = error
    if interrupted is not None:
        raise interrupted
