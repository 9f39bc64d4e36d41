"""A lock that a store on another host has: the local lock of the same name, and the store's grant.

Processes of one host first agree through the local lock (lock cohorting: Dice, Marathe and Shavit, 2012), so a host
sends one contender; re-entry, threads, tasks, deadlines, who waits and who died here are the local lock's.  Whoever has
that needs the grant as well, before a body runs:

    local lock    grant          state
    -             -              free, here
    held          -              asks the store, or waits there
    held          this owner's   held: the body runs
    -             kept in memo   the next of this host has it without the store being asked, if somebody waits here

How the grant comes, goes and is lost:

    taken         the store gives a nonce of ours its lease, and a token greater than all before; or the memo has it
    renewed       by a thread of this process, while the owner is of this process (a frozen one keeps no lease alive)
    lost          the store says so, or its time is over and nobody could ask: the owner is told (see leases.py)
    given back    with the change, in one step; before the local lock, so nobody here runs without it

A change is made in the store first, and there only by the last nonce; then in the local state, which is a copy, so that
fields are read as ever.  Killed between the two, the memo says that the copy is not known to be one.
"""

from __future__ import annotations

import threading
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from .. import native
from ..errors import DeadlockError, IncompatibleError
from ..owner import Owner
from ..waiting import FOREVER, left, patience
from . import waiters
from .away import Away, owner_of
from .store import Found, Known
from .tasking import current_task
from .waiters import Waiter

if TYPE_CHECKING:
    from .base import Handle as _Base
else:
    _Base = object


class Remote(_Base):
    """A mixin, before a local Mutex that has a slot `away`; _local_take and _local_give are that one's own."""

    __slots__ = ()
    far: ClassVar[bool] = True
    away: Away

    if TYPE_CHECKING:

        def _local_take(
            self, obj: Any, method: str, deadline: float, keep: bool = False, stop: bytearray | None = None
        ) -> bool: ...
        def _local_give(self) -> None: ...

    # -- take and give back --------------------------------------------------------------------------------------------

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
        """As of every lock."""
        if reads:
            self._no_readers()
        deadline = FOREVER if timeout is None else time.monotonic() + timeout
        if not self._local_take(obj, method, 0 if timeout is not None and timeout <= 0 else deadline, keep, stop):
            return False
        if self._record()[0] > 1 and (granted := self._has_grant(timeout)) is not None:
            return granted
        if not self._secured(obj, deadline, stop):
            return False
        if not method and stop is None and (task := current_task()) is not None and self.task is None:
            self._entrust(task, threading.get_native_id(), b"")
            self._entrusted(task)
        return True

    def _has_grant(self, timeout: float | None) -> bool | None:
        """By who has just got one level more.  None: an interrupt has left the local lock alone with this thread, and
        the store is to be asked.  Else, where it has no grant, that level goes: it is a signal's handler in a thread
        that asks the store, or gives back; or the thread has it by another lease."""
        away = self.away
        if not away.is_between() and (away.grant is not None or not away.has_another()):
            return None if away.grant is None else True
        self._local_give()
        if timeout is not None:
            return False
        raise DeadlockError(
            f"{self.label}: this is a signal's handler, whose thread asks the store for the lock or gives it back, and "
            "it cannot have it in between; or the thread has it by an object with another lease: give all of a name "
            "the same URL",
            resource=self.label,
        )

    def _secured(self, obj: Any, deadline: float, stop: bytearray | None) -> bool:
        got = False
        try:
            got = self.away.secure(obj, deadline, stop)
        finally:
            if not got and self._mine():
                self._local_give()
        return got

    def acquire(self, blocking: bool = True, timeout: float | None = None, *, block: Any = None) -> bool:
        """As Lockable.acquire."""
        wait = patience(blocking if block is None else block, timeout)
        return self._take(None, "", None if wait == FOREVER else wait)

    def __enter__(self) -> Any:
        self._take(None, "", None)
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release()

    def release(self) -> None:
        """As Lockable.release; the last level asks the store, and blocks for that."""
        if not (self.attached and self._mine()):
            self._not_owner()
        if self._record()[0] > self.away.level:
            self._local_give()
            return
        try:
            self.away.part(loud=True)
        finally:
            if self._mine():
                self._local_give()

    def _wait_turn(self, stop: bytearray, reads: bool, /) -> bool:
        return self._take(None, "", None, stop, reads)

    # -- guards --------------------------------------------------------------------------------------------------------

    def _part(self, loud: bool) -> None:
        """By the owner, before _suspend: the grant goes, or stays with this host."""
        self._listen()
        self.away.part(loud)

    def _listen(self) -> None:
        """By the owner, who is about to wait for news: what comes from now on wakes it, also before it sleeps."""
        self._flag(native.GUARDED, True)
        self.away.store.listen(self.away.name, self.away)

    def _suspend(self, loud: bool, /) -> int:
        if self.away.grant is not None:
            self._part(loud)
        return int(super()._suspend(loud))

    def _resume(self, obj: object, method: str, levels: int, deadline: float, keep: bool, /) -> bool:
        wait = None if deadline == FOREVER else max(0.0, left(deadline))
        if not self._take(obj, method or "wait_for", wait, keep=keep):
            return False
        for _ in range(1, levels):
            self._local_take(obj, method, FOREVER)
        return True

    def _stir(self) -> bool:
        """Who waits here for a guard looks again; False: somebody has the local lock.  It is not waited for: those who
        wait for other locks hear by the same thread."""
        if not self._local_take(None, "", 0):
            return False
        self._local_give()
        return True

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def _task_take(self, obj: object, method: bytes, patient: bool, /) -> bool:
        asks = patient and current_task() is not None and not self.away.may_pass_on()
        if asks and not (self.attached and self._mine()):
            waiters.of_this_thread()  # whose name is told beside the task's
            return False  # a thread asks the store, and the loop goes on meanwhile
        if not super()._task_take(obj, method, patient):
            return False
        if self._record()[0] > 1:
            granted = self._has_grant(None)
            if granted is not None:
                return granted
        memo = self.away._memo_here()
        if patient and not self.away.passes_on(memo):
            super()._task_give()  # a thread asks the store, and the loop goes on meanwhile
            return False
        got = False
        try:
            got = self.away.secure(obj, 0)
        finally:
            if not got:
                super()._task_give()
        return got

    def _task_give(self) -> None:
        try:
            if self._record()[0] == 1 and self._mine():
                self.away.part(loud=True)
        finally:
            super()._task_give()

    # -- state ---------------------------------------------------------------------------------------------------------

    def _adopt(self, view: Any, former: Any, /) -> bool:
        pending = self.away.pending is not None
        if pending and not self._mine():
            time.sleep(0.001)  # the owner takes it in before others look at the copy
            return False
        fits = super()._adopt(view, former)
        if fits and pending:
            self.away.absorbed_by(view)
        return bool(fits)

    def _look(self, _obj: object) -> bool:
        return self._linked()  # its first state is the store's to know

    def _owner_died(self, record: tuple[int, int, int, str]) -> None:
        self.away.grant = None  # of a thread or task of this process, if it was one
        super()._owner_died(record)

    def created(self) -> None:
        self.away.makes = True
        super().created()

    def recovered(self) -> None:
        self.away.recovers = True
        super().recovered()

    def _is_created(self) -> bool:
        memo = self.away._memo_here()
        if self.away.grant is not None or memo.valid:
            return bool(memo.created or memo.known.version)
        found = self.away.load()
        return bool(found.created or found.known.version)  # whoever has the lock elsewhere, and for how long

    def _recover(self, obj: object) -> None:
        if self.away.grant is not None:  # else the local lock alone is there, and it is not this owner's turn yet
            super()._recover(obj)

    def dead(self) -> Owner:
        return owner_of(self.away.dead) or super().dead()

    # -- what it says --------------------------------------------------------------------------------------------------

    def owner(self) -> Owner | None:
        """Who has it; of another host as the store says, which is asked. Raises: BackendError."""
        here = super().owner()
        if self.away.stays_here(here is not None):
            return here  # the store knows who asked for the grant, not who has it
        return self.owner_by(self.away.store.load(self.away.name, self.away.seen.known))

    def owner_by(self, found: Found) -> Owner | None:
        """Who has it, where the store has just said that."""
        here = super().owner()
        ours = self.away.stays_here(here is not None) or self.away.is_ours(found.nonce)
        return here if ours else owner_of(found.holder)

    def asker(self) -> Waiter | None:
        """Who has the local lock, and not the store's yet; a look, as waiters() has one."""
        here = super().owner()
        return None if here is None or self.away.stays_here(True) else waiters.asking(here)

    def _known_owner(self) -> Owner | None:
        return self.away.holder() or super().owner()

    def __repr__(self) -> str:
        where = f"{self.resource.scheme}: {self.label}"
        if not self.attached:
            return f"<Mutex {where}, not attached>"
        here = super().owner()
        return f"<Mutex {where}, {f'held by {here}' if here else 'not held by this host'}>"

    def _exists(self) -> bool:
        """Is there something of it, here or there?  Asks the store. Raises: BackendError."""
        return super()._exists() or bool(self.away.store.load(self.away.name, Known()).known.incarnation.strip(b"\0"))

    def _vanish(self) -> None:
        self.away.remove()

    def _why_not(self) -> str:
        here, there = super().owner(), self.away.holder()
        return f"held by {there}" if there is not None else f"held by {here}" if here else "try again"

    def _no_readers(self) -> NoReturn:
        raise IncompatibleError(
            f"{self.label}: locks in a store have no reading calls yet; use exclusive ones", resource=self.label
        )

    def _thread_reads(self, _obj: object, _method: str, _timeout: float | None, /) -> Any:
        self._no_readers()

    def _read(self, _obj: object, _method: bytes, _again: bool, /) -> Any:
        self._no_readers()


def far_mutex() -> Any:
    """The Mutex of a store's locks, over the one that this machine has."""
    scheme = "file" if native.missing else "shm"
    local = import_module(f"{__package__}.{scheme}").Mutex

    class Mutex(Remote, local):  # type: ignore[misc, valid-type]  # known at run time
        """A lock of a store, and the local one of its name."""

        __slots__ = ("away",)

        def __init__(self, resource: Any, *where: Any) -> None:
            if native.missing:
                super().__init__(resource, *where)
            self.away = Away(self, resource)

        def _local_take(
            self, obj: Any, method: str, deadline: float, keep: bool = False, stop: bytearray | None = None
        ) -> bool:
            if native.missing:
                wait = None if deadline == FOREVER else max(0.0, left(deadline))
                return bool(local._take(self, obj, method, wait, stop, keep=keep))
            if stop is not None:
                return bool(local._wait_turn(self, stop, False))
            return bool(local._resume(self, obj, method, 1, deadline, keep))

        def _local_give(self) -> None:
            local.release(self)

    return Mutex
