"""The half of a lock that a file guards: takes and gives back, in Python.

A thread first has the claim of its process (claims.py), then the file's lock, then writes its record (record.py).  The
file's lock says who owns; the record tells the others who that is, and the next owner whether the one before has died.
Nobody is woken by another process: who waits looks again, at first after a fraction of a millisecond, later every few.

    claim   guard     depth     state
    -       free      0         free
    C       free      0         a thread of this process tries
    C       locked    0         entering or leaving: a death here is no news, no body runs
    C       locked    n > 0     held
    -       free      n > 0     the owner has died: whoever locks the guard next finds that

Why nobody is kept out by who asks again at once: each waiter has a slot in the record, and a newcomer that finds one
which is older than half a millisecond waits until the lock has changed hands, or for as long as a waiter sleeps, twice.
Then it takes all slots away: those that live are there again at their next look.
"""

from __future__ import annotations

import _thread
import errno
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn, Protocol

from .. import observing
from ..errors import TooManyLocksError
from ..native import READERS, RECOVERING, REMOVED, WARDED
from ..process import start_of, thread_runs
from ..waiting import FOREVER, LONGEST_NAP, Patience, left, naps, patience
from . import claims, waiters
from .base import Handle, Resource
from .called import Shared
from .record import CELL_SIZE, Cell, Record
from .stateful import Stateful

_HANDOFF_AGE = 500_000  # ns
_SLICE = 1_000_000_000  # ns between two looks at the name
_MISSING: Any = object()
_NEVER = 1 << 63
_DEEPEST = 0xFFFF_FFFF


class Place(Resource, Protocol):
    """What it locks, and by which file."""

    def open_guard(self, segment: Any, offset: int, /) -> int:
        """A new descriptor of the file that guards the cell. Raises: FileNotFoundError."""

    def guards(self, segment: Any, fd: int, /) -> bool:
        """Is that file still the one?"""

    def give_back(self, offset: int, /) -> None:
        """The cell is never used again, by nobody. Only a lock that never left its process is told so."""


class Polled(Stateful, Shared, Handle):
    """A Handle with all that it needs but a place."""

    resource: Place
    __slots__ = (
        "__weakref__",
        "_cell",
        "_check",
        "_copies",
        "_forks",
        "_named",
        "_owners",
        "_seat",
        "_sleepers",
        "queued",
        "readers",
        "resource",
        "segment",
        "shared",
    )

    def __init__(self, resource: Any, segment: Any = None, offset: int = 0, /) -> None:
        super().__init__()
        self.resource, self.segment, self.shared, self._copies = resource, segment, False, claims.copies()
        self._cell: Cell | None = None if segment is None else Cell(segment.map, offset)
        self.queued, self.readers = False, None
        self._check = _NEVER  # when to look at the name again, ns
        self._begin()

    def _begin(self) -> None:
        """In this process nobody has it."""
        self._forks = claims.forks()
        self._owners: dict[int, claims.Claim] = {}
        self._sleepers: deque[Any] = deque()
        self._watchers: deque[Any] = deque()
        self._seat: waiters.Place | None = None
        self._named: tuple[Any, Any] = None, None  # whose name is on the seat, and for which cell

    def bind(self, segment: Any, offset: int, /) -> None:
        """This cell from now on. Raises: ValueError: if none is there."""
        cell = Cell(segment.map, offset) if 0 <= offset <= len(segment.map) - CELL_SIZE else None
        if cell is None or not cell.sane():
            raise ValueError(f"no lock at offset {offset}")
        self.view = None  # first: what it knows is of the cell before
        self.segment, self._cell, self.shared, self.readers = segment, cell, True, None

    def watch(self) -> None:
        """Ask _look() at the next acquire, and then about once a second."""
        self._check = 0

    # -- what it says --------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        return self._cell is not None

    @property
    def offset(self) -> int:
        return self._place().offset

    @property
    def place(self) -> int:
        """Another one for each cell that this was ever bound to, as long as somebody keeps that."""
        return id(self._place())

    @property
    def flags(self) -> int:
        return int(self._place().flags)

    def _place(self) -> Cell:
        if self._cell is None:
            raise RuntimeError("not attached to a lock")
        return self._cell

    def _record(self) -> tuple[int, int, tuple[int, int, int, str]]:
        """Depth, since when, and who; depth is 0 if that one has died."""
        cell = self._place()
        depth, owner = cell.depth, cell.owner()
        return depth if depth and _lives(owner) else 0, cell.since, owner

    def _is_orphaned(self, cell: Cell) -> bool:
        """Has its owner died?  What that has left stays as it is, and an owner that comes or goes changes it."""
        depth, owner = cell.depth, cell.owner()
        return bool(depth) and not _lives(owner) and (cell.depth, cell.owner()) == (depth, owner)

    def _task_address(self) -> int:
        return int(self._place().task)

    def _dead(self) -> tuple[int, int, int, str]:
        return self._place().dead()

    def _counters(self) -> tuple[int, int, int, int]:
        cell = self._place()
        return cell.acquisitions, cell.contended, cell.recoveries, len(cell.waiters())

    def _flag(self, bit: int, up: bool, /) -> None:
        """By the owner only."""
        cell = self._place()
        if not self._hold():
            self._not_owner()
        cell.flags = cell.flags | bit if up else cell.flags & ~bit

    # -- take and give back --------------------------------------------------------------------------------------------

    def acquire(self, blocking: bool = True, timeout: float | None = None, *, block: bool = _MISSING) -> bool:
        """As Lockable.acquire."""
        wait = patience(blocking if block is _MISSING else block, timeout)
        return self._take(None, "", None if wait == FOREVER else wait)

    def __enter__(self) -> Any:
        self._take(None, "", None)
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release()

    def release(self) -> None:
        """As Lockable.release."""
        claim = self._hold()
        if claim is None:
            self._not_owner()
        self._release(claim)

    def _release(self, claim: claims.Claim) -> None:
        if claim.depth > 1:
            claim.depth = claim.cell.depth = claim.depth - 1
        else:
            try:
                self._commit()
            finally:
                # else what ran in the commit has forked, and this is the child
                if self._forks != claims.forks() or self._owners.get(0) is not claim:
                    self._not_owner()
                self._give(claim)
                if claim.told:
                    self._tell_given()

    def _mine(self) -> bool:
        return self._owns(self._cell)

    def _owns(self, cell: Cell | None) -> bool:
        """Does the caller hold that cell?  The lock may have got another one since, where files were taken away."""
        claim = self._hold()
        return claim is not None and claim.cell is cell

    def _hold(self) -> claims.Claim | None:
        """The caller's hold: of the task that runs, or of its thread."""
        if self._forks != claims.forks():
            self._begin()
        caller = claims.this_caller()
        claim = self._hold_of(caller)
        return self._hold_of(claims.this_thread()) if claim is None and caller.task else claim

    def _hold_of(self, caller: claims.Caller) -> claims.Claim | None:
        claim = caller.held.get(self)
        if claim is None or not claim.depth or claim.leaving or self._owners.get(0) is not claim:
            return None
        return claim

    def _take(
        self,
        obj: Any,
        method: str,
        timeout: float | None,
        /,
        stop: bytearray | None = None,
        reads: bool = False,
        keep: bool = False,
    ) -> bool:
        """True: held. False: not within the time. obj: whose __recover__ may run; None: nobody's.

        stop: somebody sets its byte to end the wait, which is not the calling thread's own then.  reads: to count a
        reader in, with the others who read.  keep: it must be had, whatever comes.
        """
        if observing.observed() and stop is None and not reads:
            return self._take_and_tell(obj, method, timeout, timeout is not None and timeout <= 0, keep)
        return self._take_untold(obj, method, timeout, stop, reads, keep)

    def _take_untold(
        self,
        obj: Any,
        method: str,
        timeout: float | None,
        stop: bytearray | None = None,
        reads: bool = False,
        keep: bool = False,
    ) -> bool:
        """As _take; observers do not hear of it."""
        deadline = FOREVER if timeout is None else time.monotonic() + timeout
        while True:
            if (claim := self._hold()) is not None:
                return self._again(claim)
            if self._cell is None:
                self._attach()
            claim = self._wait(deadline, method, stop, keep) if timeout is None or timeout > 0 else self._try()
            if claim is None:
                return False
            held = None if claim.depth else self._enter(claim, obj, method, deadline, stop, reads)
            if held is not None:
                return held

    def _take_and_tell(self, obj: Any, method: str, timeout: float | None, tried: bool, keep: bool = False) -> bool:
        """As _take.  A try first, as every take begins with one; but not past those who have waited for long."""
        waits, begun = timeout is None or timeout > 0, 0.0
        later = waits and self._somebody_waits_long() and self._hold() is None
        got = not later and self._take_untold(obj, method, 0)
        if waits and not got:
            begun = time.monotonic()
            got = self._take_untold(obj, method, timeout, keep=keep)
            if not got:
                self._tell_timed_out()
        claim = self._hold()
        if not got or claim is None or claim.depth > 1:
            return got
        try:
            claim.told = True
            self._tell_taken(obj, time.monotonic() - begun if begun else 0.0, tried)
            if self._hold() is not claim:  # an observer has forked, and this is the child
                self._not_owner()
        except BaseException:
            if self._hold() is claim:
                self._release(claim)
            raise
        return True

    def _observe(self, obj: object, waited: float, /) -> None:
        """The running task owns it by way of a thread that has waited in its stead."""
        if (claim := self._hold()) is not None:
            claim.told = True
            self._tell_taken(obj, waited, False)

    def _again(self, claim: claims.Claim) -> bool:
        if claim.depth >= _DEEPEST:
            self._too_deep()
        claim.depth += 1
        claim.cell.depth = claim.depth
        return True

    def _try(self) -> claims.Claim | None:
        """One try; never blocks.  With the claim come the file's lock and nothing else: no record is written yet."""
        caller = claims.this_caller()
        claim = caller.held[self] = claims.Claim(caller, self.segment, self._place())
        try:
            if self._claim(claim) and self._guard(claim):
                return claim
            self._drop(claim)
        except BaseException:
            self._drop(claim)
            raise
        return None if self._cell is claim.cell else self._try()

    def _claim(self, claim: claims.Claim) -> bool:
        found = self._owners.setdefault(0, claim)
        while found is not claim and found.over(claim.mark):
            before, found = found, found.heir.setdefault(0, claim)
            if found is claim:
                claim.inherit(before)
                self._owners[0] = claim
        return found is claim

    def _guard(self, claim: claims.Claim) -> bool:
        """Lock the file.  One that is not there any more, or that another has replaced, guards nothing."""
        open_it = partial(self.resource.open_guard, claim.segment, claim.cell.offset)
        with suppress(FileNotFoundError):
            try:
                if not claim.guard(open_it):
                    return False
            except OSError as error:
                if error.errno == errno.EMFILE:
                    self._too_many(error)
                raise
            if self._is_right(claim):
                return True
        claim.cell.flags |= REMOVED  # the cell is nobody's, and says so to this process's other threads
        self._drop(claim)
        self._attach(id(claim.cell))
        return False

    def _too_many(self, error: OSError) -> NoReturn:
        raise TooManyLocksError(
            f"{self.label}: this process has as many open files as it may (ulimit -n), and each lock of files that is "
            "held takes one; release some first",
            resource=self.label,
        ) from error

    def _is_right(self, claim: claims.Claim) -> bool:
        """Has it locked the file that guards the cell?  If a signal's handler has inherited that, _enter finds out."""
        fd = claim.fd
        try:
            right = fd is None or self.resource.guards(claim.segment, fd)
        except OSError:
            if claim.fd is fd:
                raise
            right = True
        return right or claim.fd is not fd

    def _drop(self, claim: claims.Claim) -> None:
        """Give up a claim, and its guard before it.  No call stands between a look and what it is for: a signal's
        handler may have inherited the claim."""
        claim.let_go()
        owners, held = self._owners, claim.held
        if 0 in owners and owners[0] is claim:
            del owners[0]
        else:
            claim.dead = True  # it may be somebody's heir, and is passed over
        if self in held and held[self] is claim:
            del held[self]
        with suppress(IndexError):
            self._sleepers.popleft().release()

    def _give(self, claim: claims.Claim) -> None:
        told = self._tell(claim.cell)
        self._leave(claim)
        if told:
            self._wake_watchers()

    def _leave(self, claim: claims.Claim) -> None:
        claim.leaving = True  # interrupted from here on, it is the next try of this thread that goes on
        if self._owners.get(0) is claim:
            claim.cell.depth = 0
        self._drop(claim)

    def _wait(self, deadline: float, method: str, stop: bytearray | None, keep: bool) -> claims.Claim | None:
        """Try, sleep, try again.  What it gives back may be the hold of a signal's handler that came in between."""
        self._stand_back(deadline)
        if (claim := self._try()) is not None:
            return claim
        if stop is not None:
            return self._try_on(deadline, stop, waiters.begin_patience(self, True, False))
        patience = waiters.begin_patience(self, False, deadline == FOREVER and not keep)
        try_on = partial(self._try_on, deadline, stop, patience)
        return waiters.listed(self, waiters.kind_of(waiters.FOR_LOCK, deadline < FOREVER, keep), method, try_on)

    def _try_on(self, deadline: float, stop: bytearray | None, patience: Patience) -> claims.Claim | None:
        since, enrolled = time.monotonic_ns(), self._place()
        claim = None
        try:
            for nap in naps():
                claim = self._hold() or self._try()
                if claim is not None:
                    break
                if left(deadline) <= 0 or (stop and stop[0]):
                    return None
                self._refuse_to_wait()
                patience.look()
                enrolled = self._place()
                enrolled.enrol(claims.this_thread().who, since)
                self._doze(min(nap, left(deadline)), self._sleepers)
        finally:
            enrolled.leave(claims.this_thread().who)
        if claim is not None and not claim.depth:
            claim.cell.contended += 1
        return claim

    def _stand_back(self, deadline: float) -> None:
        """Let those pass who have waited for long."""
        cell = self._place()
        oldest = cell.waiting_since()
        if not oldest or time.monotonic_ns() - oldest < _HANDOFF_AGE:
            return
        passes, until = cell.acquisitions, time.monotonic() + 2 * LONGEST_NAP
        while cell.acquisitions == passes and cell.waiting_since():
            if left(min(deadline, until)) <= 0:
                if left(until) <= 0:
                    cell.forget_waiters()
                return
            self._doze(LONGEST_NAP / 5, self._sleepers)

    def _doze(self, seconds: float, sleepers: deque[Any]) -> None:
        """Until a thread of this process wakes these, or for so long.  Handlers of signals run."""
        alarm = _thread.allocate_lock()
        alarm.acquire()
        sleepers.append(alarm)
        try:
            alarm.acquire(timeout=max(0.0, seconds))
        finally:
            with suppress(ValueError):
                sleepers.remove(alarm)

    # -- a new owner ---------------------------------------------------------------------------------------------------

    def _enter(
        self, claim: claims.Claim, obj: Any, method: str, deadline: float, stop: bytearray | None, reads: bool
    ) -> bool | None:
        """True: held. False: too late. None: begin again."""
        cell = claim.cell
        try:
            dead = _inherit(cell) if cell.depth else None
            caller = claims.this_caller()
            self._name_task(caller)
            cell.write_owner(caller.who, method.encode(errors="replace"), caller.address)
            cell.since = time.monotonic_ns()
            cell.acquisitions += 1
            self._begin_turn()
            claim.depth = 1
            if self._owners.get(0) is not claim:  # a signal's handler came between, and had it
                claim.depth = 0
                return None
            cell.depth = 1
            if dead is None and not cell.flags & (RECOVERING | REMOVED | WARDED | READERS) and cell.since < self._check:
                return True
            return self._settle(claim, obj, dead, deadline, stop, reads)
        except BaseException:
            if self._hold() is claim:
                self._give(claim)
            elif self._owners.get(0) is claim:
                self._drop(claim)
            raise

    def _settle(
        self, claim: claims.Claim, obj: Any, dead: Any, deadline: float, stop: bytearray | None, reads: bool
    ) -> bool | None:
        """The rare duties."""
        cell = claim.cell
        if dead:
            self._hook(self._owner_died, dead)
        if cell.flags & WARDED and not self._hook(self._await_ward, deadline):
            self._give(claim)
            return False
        if cell.since >= self._check:
            self._check = cell.since + _SLICE
            if not self._hook(self._look, obj):
                cell.flags |= REMOVED
        if cell.flags & REMOVED:
            self._give(claim)
            self._attach(id(claim.cell))
            return None
        if cell.flags & READERS and (not reads or cell.flags & RECOVERING) and not self._await_readers(deadline, stop):
            self._give(claim)
            return False
        if cell.flags & RECOVERING:
            self._hook(self._recover, obj)
        return True

    def _hook(self, hook: Callable[[Any], Any], argument: Any) -> Any:
        """Call it; a child that it has forked, and that comes back, owns nothing."""
        result = hook(argument)
        if self._hold() is None:
            self._not_owner()
        return result

    def __del__(self) -> None:
        """A cell that no other process can know goes back, and the file of its state before it.  Nobody holds it: who
        does keeps the handle."""
        with suppress(AttributeError, TypeError):  # half made, or the interpreter ends
            if not self.shared and self._cell is not None and self._copies == claims.copies():
                self._drop_state(self._cell)
                if self.readers is not None:
                    self.readers.unlink()
                self.resource.give_back(self._cell.offset)


def _lives(owner: Record) -> bool:
    return start_of(owner[0]) == owner[1] and thread_runs(owner[0], owner[2])


def _inherit(cell: Cell) -> Record:
    """What a dead owner left.  Its depth stays until the next one's is written: a death in between is found again."""
    dead = cell.owner()
    if not cell.flags & RECOVERING:
        cell.bury()
    cell.flags |= RECOVERING
    cell.recoveries += 1
    return dead
