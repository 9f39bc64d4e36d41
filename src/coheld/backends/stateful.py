"""What shared state and guards need of a lock that a file guards; _shared.h and _lock.h are its twins in C.

Why no guard is forgotten.  A guard is found false by the owner, who then reads epoch, sets GUARDED, gives the lock
back, and looks every few milliseconds.  Whatever makes the guard true is done by a later owner, whose release finds
GUARDED, takes it down and moves epoch on, while it has the lock: each that still waits sets it again, with the lock.
A releaser that dies on the way is found as an owner that died, which is news as well, or has taken GUARDED down.
Threads of the process that gives back are woken; all others find it at their next look.

A signal's handler runs in the middle of everything here.  It has its turn at calls, at the end of loops and where
functions begin, and nowhere else: a look and a store with none of these between are one step to it.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from ..native import GUARDED
from ..waiting import FOREVER, left, naps
from . import claims, waiters
from .base import views_guard
from .record import Cell

if TYPE_CHECKING:
    from .._native import Mutex as _Half
else:
    _Half = object


class Stateful(_Half):
    """A part of Polled."""

    __slots__ = ("_pending", "_watchers", "atomic", "creating", "guarding", "view")
    view: Any
    atomic: int
    guarding: bool
    creating: bool
    _pending: Any
    _watchers: deque[Any]

    if TYPE_CHECKING:
        _cell: Cell | None

        def _place(self) -> Cell: ...
        def _hold(self) -> claims.Claim | None: ...
        def _owns(self, cell: Cell | None) -> bool: ...
        def _again(self, claim: claims.Claim) -> bool: ...
        def _leave(self, claim: claims.Claim) -> None: ...
        def _is_orphaned(self, cell: Cell) -> bool: ...
        def _take(self, obj: Any, method: str, timeout: float | None, /, *, keep: bool) -> bool: ...
        def _doze(self, seconds: float, sleepers: deque[Any]) -> None: ...
        def _not_owner(self) -> NoReturn: ...
        def _tell_given(self) -> None: ...

    def __init__(self) -> None:
        self.view = self._pending = None
        self.atomic, self.guarding, self.creating = 0, False, False

    def _begin_turn(self) -> None:
        """By a new owner.  What one before had not committed never was: it ended, or is the parent of this process."""
        self.atomic, self.guarding, self.creating = 0, False, False
        self._discard()

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        return int(self._place().version)

    @property
    def pending(self) -> bool:
        return self._pending is not None

    def _adopt(self, view: Any, former: Any, /) -> bool:
        """As of the native one, see _shared.h."""
        mine = self._mine()
        with views_guard():
            fits = view.cell is self._cell and self.view is former
            if fits and (former is None or mine):
                self.view = view
        return fits

    def _put(self, index: int, value: object, mark: int, /) -> None:
        """The owner's value of a field of its view."""
        view = self.view
        if view is None or not self._owns(view.cell):
            raise RuntimeError("no such field, or not the owner")
        self._touch(view)
        view._assign(index, value, mark)

    def _touch(self, view: Any) -> None:
        """By the owner: it may have changed something, from here on."""
        self._pending = view

    def _commit(self) -> None:
        """The owner's changes so far become the last commit. Raises: as View._commit; the last commit stands then."""
        while (view := self._pending) is not None:  # again, if a signal's handler has changed more meanwhile
            try:
                view._commit()
            except BaseException:
                self._discard()
                raise
            self._pending = None
            if view._touched():
                self._pending = view

    def _discard(self) -> None:
        """The owner's changes since the last commit are dropped."""
        if (view := self._pending) is not None:
            view._discard()
            self._pending = None

    def _drop_state(self, cell: Cell) -> None:
        """The file of the state goes before its cell is somebody else's."""
        if self.view is not None and cell.version:
            with suppress(OSError):
                self.view._unlink()

    # -- guards --------------------------------------------------------------------------------------------------------

    def _suspend(self, loud: bool, /) -> int:
        """The owner gives all levels back, and is told of the next release; loud: this is one. Returns the epoch."""
        claim = self._hold()
        if claim is None:
            self._not_owner()
        told = loud and self._tell(claim.cell)
        epoch = int(claim.cell.epoch)
        claim.cell.flags |= GUARDED
        self._leave(claim)
        if told:
            self._wake_watchers()
        if claim.told:
            self._tell_given()
        return epoch

    def _tell(self, cell: Cell) -> bool:
        """By the owner: from here on, what they who wait for a guard have read of epoch is old. Did anybody wait?"""
        if not cell.flags & GUARDED:
            return False
        cell.flags &= ~GUARDED
        cell.epoch = cell.epoch + 1 & 0xFFFF_FFFF
        cell.forget_watchers()
        return True

    def _wake_watchers(self) -> None:
        with suppress(IndexError):
            while True:
                self._watchers.popleft().release()

    def _sleep(self, epoch: int, until: float, method: str, timed: bool, /) -> bool:
        """Until there was a release or a death since that epoch; False: not by that time.monotonic().  timed: see
        waiting.Sleep."""
        kind = waiters.kind_of(waiters.FOR_GUARD, timed, False)
        return waiters.listed(self, kind, method, lambda: self._sleep_on(epoch, until))

    def _sleep_on(self, epoch: int, deadline: float) -> bool:
        who = claims.this_thread().who
        cell = self._place()
        try:
            for nap in naps():
                if self._cell is not cell or self._is_news(cell, epoch):
                    return True
                if left(deadline) <= 0:
                    return False
                cell.enrol(who, 0)
                self._doze(min(nap, left(deadline)), self._watchers)
        finally:
            cell.leave(who)
        return False

    def _is_news(self, cell: Cell, epoch: int) -> bool:
        """Not GUARDED: told a moment ago; or this is not the cell that the epoch was read from."""
        return cell.epoch != epoch or not cell.flags & GUARDED or self._is_orphaned(cell)

    def _resume(self, obj: object, method: str, levels: int, deadline: float, keep: bool, /) -> bool:
        """Take so many levels; False: not by that time.monotonic().  keep: it must be had, whatever comes."""
        if not self._take(obj, method, None if deadline == FOREVER else max(0.0, left(deadline)), keep=keep):
            return False
        for _ in range(1, levels):
            claim = self._hold()
            assert claim is not None
            self._again(claim)
        return True
