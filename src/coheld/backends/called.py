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
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import NotOwnerError
from ..native import READERS
from ..observing import observed
from ..process import at_fork
from ..waiting import left, naps
from . import beside, claims
from .record import Cell
from .tally import Tally
from .tasking import current_task

if TYPE_CHECKING:
    from .base import Handle as _Half
else:
    _Half = object

_HANDOFF_AGE = 500_000  # ns


class _Reads(threading.local):
    """Of this thread: by each lock that it reads, how many calls deep."""

    def __init__(self) -> None:
        self.depth: dict[int, int] = {}

    def forget(self) -> None:
        self.depth.clear()


_reads = _Reads()
at_fork(child=_reads.forget)


class InThread:
    """A thread is in, by a reading call of its own."""

    def __init__(self, lock: Any, tally: Tally) -> None:
        self._lock, self._tally = lock, tally
        _reads.depth[id(lock)] = _reads.depth.get(id(lock), 0) + 1

    def leave(self) -> None:
        """The end of it; in a child of a fork, which is not in, nothing."""
        mine = _reads.depth
        if id(self._lock) not in mine:
            return
        mine[id(self._lock)] -= 1
        if not mine[id(self._lock)]:
            del mine[id(self._lock)]
        self._tally.leave()


class Shared(_Half):
    """A part of Polled."""

    __slots__ = ()
    queued: bool
    readers: Tally | None

    if TYPE_CHECKING:
        _owners: dict[int, claims.Claim]
        _sleepers: deque[Any]
        _cell: Cell | None

        def _place(self) -> Cell: ...
        def _teller(self) -> Callable[[], None]: ...
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
        def _take_and_tell(self, obj: Any, method: str, timeout: float | None, tried: bool) -> bool: ...
        def _doze(self, seconds: float, sleepers: deque[Any]) -> None: ...

    # -- tasks ---------------------------------------------------------------------------------------------------------

    @property
    def task(self) -> Any:
        """The task of this process that owns it, or None."""
        claim = self._owners.get(0)
        return claim.owner_task() if claim is not None and claim.depth and not claim.leaving else None

    def _refuse_to_wait(self) -> None:
        """Before a sleep.  Raises: DeadlockError: if who has it could not go on meanwhile."""
        here = current_task()
        if here is not None:
            owner = self.task
            if owner is not None and owner.get_loop() is here.get_loop():
                self._stuck()
        else:
            _ = self.task  # one that is gone has died
        if self.readers is not None and self.readers.here():
            self._reads_itself(id(self) in _reads.depth)

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
        claim.cell.write_owner((*caller.who[:2], tid), method)

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

    def _thread_reads(self, obj: object, method: str, timeout: float | None, /) -> Any:
        """How the calling thread is in, by a call of its own; None: not within the time."""
        if id(self) in _reads.depth or self._task_reads():
            assert self.readers is not None
            self.readers.enter()
            return InThread(self, self.readers)
        how = self._queue_to_read(obj, method, timeout)
        return how if how is None or how is self else InThread(self, how)

    def _read(self, obj: object, method: bytes, again: bool, /) -> Any:
        """How the running task is in, or None."""
        if again and self.readers is not None:
            self.readers.enter()
            return self.readers
        if self.queued and not self._mine():
            return None
        return self._queue_to_read(obj, method.decode(errors="replace"), 0)

    def _queue_to_read(self, obj: object, method: str, timeout: float | None) -> Any:
        mine = self._mine()
        if not self._take(obj, method, timeout, None, True):
            return None
        if mine:
            return self  # a level more
        try:
            return self._read_on()
        finally:
            self.release()

    def _read_on(self) -> Tally:
        """By the owner: this process has one reader more."""
        if self.readers is None:
            self._open_register()
        assert self.readers is not None
        self.readers.enter()
        self._place().flags |= READERS
        return self.readers

    def _await_readers(self, deadline: float, stop: bytearray | None) -> bool:
        """By the owner: until nobody reads; False: not by that time.monotonic()."""
        if self.readers is None:
            self._open_register()
        assert self.readers is not None
        who, cell, tell = claims.this_caller().who, self._place(), self._teller()
        try:
            for nap in naps():
                if not self.readers.busy():
                    break
                if left(deadline) <= 0 or (stop and stop[0]):
                    return False
                if self.readers.here():
                    self._reads_itself(id(self) in _reads.depth)
                tell()
                cell.enrol(who, 0)
                self._doze(min(nap, left(deadline)), deque())
        finally:
            cell.leave(who)
        return True
