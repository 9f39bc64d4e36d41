"""What tasks and readers need of a lock that a file guards; _task.h, _entrust.h and _reading.h are its twins in C.

A task owns by a claim of its own (claims.py): a thread of coheld that waits in its stead hands its claim over.  What
runs in a coroutine is the task's, a plain locked call as well.

A reader has the lock for the moment in which it counts itself in (tally.py); a writer waits with the lock, and looks
again every few milliseconds, until nobody is in.  Which locks a thread reads is its own to know: who is in may come in
again, past a writer that waits for it, and an exclusive call inside would wait for itself.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import NotOwnerError
from ..native import READERS
from ..observing import observed
from ..process import at_fork
from ..waiting import FOREVER, left, naps
from . import beside, claims, waiters
from .record import Cell
from .tally import Tally
from .tasking import current_task, running_loop

if TYPE_CHECKING:
    from .base import Handle as _Half
else:
    _Half = object

_HANDOFF_AGE = 500_000  # ns


class _Reads(threading.local):
    """Of this thread: by the identity of each register by which it is in, how many calls deep."""

    def __init__(self) -> None:
        self.depth: dict[int, int] = {}

    def forget(self) -> None:
        self.depth.clear()


_reads = _Reads()
at_fork(child=_reads.forget)


class InTask:
    """A reading call of a task: made before it is counted in, so that an interrupt, wherever it comes, finds who counts
    it out: the call, or the end of this.  Its marks go with what they say in one step, see stateful.py."""

    __slots__ = ("__weakref__", "_forks", "counted", "register")

    def __init__(self) -> None:
        self._forks = claims.forks()
        self.register: Tally | None = None
        self.counted = False

    def enter(self, register: Tally) -> None:
        """By the owner of the lock, or one who is in."""
        self.register = register
        register.enter(self)

    def leave(self) -> None:
        """The end of it; again, or in a child of a fork, which is not in, nothing."""
        if self.register is not None and self._forks == claims.forks() and self.counted:
            self.register.leave(self)

    def __del__(self) -> None:
        self.leave()


class InThread(InTask):
    """The same of a thread, which knows how deep it is in."""

    __slots__ = ("_depth", "known")

    def __init__(self) -> None:
        super().__init__()
        self._depth, self.known = _reads.depth, False

    def enter(self, register: Tally) -> None:
        super().enter(register)
        depth, key = self._depth, id(register)
        deeper = depth.get(key, 0) + 1
        depth[key] = deeper
        self.known = True

    def leave(self) -> None:
        depth, key = self._depth, id(self.register)
        if self.known and self._forks == claims.forks():
            deep = depth.get(key, 0)
            self.known = False
            if deep > 1:
                depth[key] = deep - 1
            else:
                depth.pop(key, None)
        super().leave()


class Shared(_Half):
    """A part of Polled."""

    __slots__ = ()
    queued: bool
    readers: Tally | None

    if TYPE_CHECKING:
        _owners: dict[int, claims.Claim]
        _sleepers: deque[Any]
        _cell: Cell | None
        _seat: waiters.Place | None
        _named: tuple[Any, Any]

        def _place(self) -> Cell: ...
        def _release(self, claim: claims.Claim) -> None: ...
        def _hold(self) -> claims.Claim | None: ...
        def _hold_of(self, caller: claims.Caller) -> claims.Claim | None: ...
        def _take(
            self,
            obj: Any,
            method: str,
            timeout: float | None,
            /,
            stop: bytearray | None = None,
            reads: bool = False,
        ) -> bool: ...
        def _take_and_tell(
            self, obj: Any, method: str, timeout: float | None, tried: bool, keep: bool = False
        ) -> bool: ...
        def _doze(self, seconds: float, sleepers: deque[Any]) -> None: ...

    # -- tasks ---------------------------------------------------------------------------------------------------------

    @property
    def task(self) -> Any:
        """The task of this process that owns it, or None."""
        claim = self._owners.get(0)
        return claim.owner_task() if claim is not None and claim.depth and not claim.leaving else None

    def _refuse_to_wait(self) -> None:
        """Before a sleep.  Raises: DeadlockError: if who has it could not go on meanwhile."""
        owner, here = self.task, running_loop()  # one that is gone has died
        if owner is not None and here is not None and owner.get_loop() is here:
            self._stuck()
        if self.readers is not None and self.readers.here():
            self._reads_itself(self._thread_is_in())

    def _task_take(self, obj: object, method: bytes, patient: bool, /) -> bool:
        """For the running task; False: it is not free, or others wait; patient: also one that waits for long."""
        task = current_task()
        if task is None:
            self._no_task()
        mine = self._hold_of(claims.of_task(task))
        if mine is None and self._hold_of(claims.this_thread()) is not None:
            self._stuck()
        if mine is None and (self.queued or (patient and self._somebody_waits_long())):
            return False
        _ = self.task  # one that is gone has died
        label = method.decode(errors="replace")
        return self._take_and_tell(obj, label, 0, not patient) if observed() else self._take(obj, label, 0)

    def _somebody_waits_long(self) -> bool:
        since = self._cell.waiting_since() if self._cell is not None else 0
        return bool(since) and time.monotonic_ns() - since >= _HANDOFF_AGE

    def _task_give(self) -> None:
        """One level is given back, by the task; or by whoever unwinds one that is gone."""
        claim = self._hold_of(claims.this_caller())
        if claim is None or claim.task is None:
            claim = self._owners.get(0)
            if claim is None or claim.dead or claim.leaving or not claim.is_abandoned():
                self._not_owner()
        self._release(claim)

    def _task_deepen(self, levels: int, /) -> None:
        claim = self._hold()
        if claim is None:
            self._not_owner()
        claim.depth += levels
        claim.cell.depth = claim.depth

    def _task_bury(self, task: Any, /) -> None:
        """If it is the owner, it is gone."""
        with suppress(NotOwnerError):
            if (claim := self._hold_of(claims.of_task(task))) is not None:
                claim.die()

    def _wait_turn(self, stop: bytearray, reads: bool, /) -> bool:
        """Blocks the calling thread until it holds the lock, or somebody sets the byte."""
        return self._take(None, "", None, stop, reads)

    def _entrust(self, task: Any, tid: int, method: bytes, /) -> None:
        """What the calling thread holds is the task's, whose loop runs in thread tid."""
        claim = self._hold_of(claims.this_thread())
        if claim is None:
            self._not_owner()
        caller = claims.of_task(task)
        del claim.held[self]
        claim.mark, claim.held, claim.task = caller.mark, caller.held, caller.task
        caller.held[self] = claim
        self._name_task(caller)
        claim.cell.write_owner((*caller.who[:2], tid), method, caller.address)

    def _name_task(self, caller: claims.Caller) -> None:
        """By the owner, before the record says that a task has it: others find its name."""
        cell = self._place()
        if (task := caller.task and caller.task()) is None or self._named == (caller.mark, cell):
            return
        if self._seat is None:
            self._seat = waiters.seat()
        if self._seat is not None:
            self._seat.seat_task(waiters.cell_of(self), task)
            self._named = caller.mark, cell

    def _nudge(self) -> None:
        """All of this process that wait look again."""
        with suppress(IndexError):
            while True:
                self._sleepers.popleft().release()

    # -- readers -------------------------------------------------------------------------------------------------------

    def _open_register(self, value: int = 0) -> None:
        """By the owner."""
        self.readers = beside.opened(Tally, self.segment, self.offset, value)

    def _held_by(self) -> list[tuple[int, int, int]]:
        found = beside.existing(Tally, self.segment, self.offset)
        return found.living() if found else []

    def _thread_is_in(self) -> bool:
        """By the register of now: an earlier one is of a file that has lost its name."""
        return self.readers is not None and id(self.readers) in _reads.depth

    def _thread_reads(self, obj: object, method: str, timeout: float | None, /) -> Any:
        """How the calling thread is in, by a call of its own; None: not within the time."""
        register = self.readers
        if register is not None and not (id(register) in _reads.depth or self._task_reads()):
            register = None
        return self._count_in(obj, method, timeout, register, InThread())

    def _read(self, obj: object, method: bytes, again: bool, /) -> Any:
        """How the running task is in, or None."""
        if self.queued and not again and not self._mine():
            return None
        return self._count_in(obj, method.decode(errors="replace"), 0, self.readers if again else None, InTask())

    def _count_in(self, obj: object, method: str, timeout: float | None, register: Tally | None, place: InTask) -> Any:
        """At that place.  register: by which the caller is in already, and passes all who wait."""
        try:
            if register is not None:
                place.enter(register)
                return place
            return self._queue_to_read(obj, method, timeout, place)
        except BaseException:
            place.leave()
            raise

    def _queue_to_read(self, obj: object, method: str, timeout: float | None, place: InTask) -> Any:
        mine = self._mine()
        if not self._take(obj, method, timeout, None, True):
            return None
        if mine:
            return self  # a level more
        try:
            return self._read_on(place)
        finally:
            self.release()

    def _read_on(self, place: InTask | None = None) -> InTask:
        """By the owner: this process has one reader more, at that place, or a new one of a task."""
        if self.readers is None:
            self._open_register()
        register = self.readers
        assert register is not None
        place = place or InTask()
        place.enter(register)
        self._place().flags |= READERS
        return place

    def _await_readers(self, deadline: float, stop: bytearray | None) -> bool:
        """By the owner: until nobody reads; False: not by that time.monotonic()."""
        if self.readers is None:
            self._open_register()
        if stop is not None:
            return self._look_on(deadline, stop)
        method, look_on = self._record()[2][3], partial(self._look_on, deadline, stop)
        kind = waiters.kind_of(waiters.FOR_READERS, deadline < FOREVER, False)
        return waiters.listed(self, kind, method, look_on)

    def _look_on(self, deadline: float, stop: bytearray | None) -> bool:
        register = self.readers
        assert register is not None
        who, cell, patience = (
            claims.this_caller().who,
            self._place(),
            waiters.begin_patience(self, stop is not None, False),
        )
        try:
            for nap in naps():
                if not register.busy():
                    break
                if left(deadline) <= 0 or (stop and stop[0]):
                    return False
                if register.here():
                    self._reads_itself(self._thread_is_in())
                patience.look()
                cell.enrol(who, 0)
                self._doze(min(nap, left(deadline)), deque())
        finally:
            cell.leave(who)
        return True
