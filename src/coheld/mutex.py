"""The handle of a lock: the C mutex, with all that is said and done off its fast path."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from . import _native, ward
from .backends import files, shm
from .errors import CoheldError, IncompatibleError, LockTimeout, NotOwnerError, TooManyLocksError
from .owner import Owner


class Mutex(_native.Mutex):
    """A robust, re-entrant lock in shared memory; what an object's ``__lock__`` is.

    One per resource and process: all objects of the resource share it.  acquire, release and with are C.  Methods that
    begin with an underscore are called by the C code.
    """

    __slots__ = ()
    resource: shm.Resource
    segment: shm.Segment

    @property
    def label(self) -> str:
        """The resource, as messages name it."""
        return self.resource.label(self.offset if self.attached else 0)

    def owner(self) -> Owner | None:
        """Who holds the lock now, or None; a look without a lock, so it may be a moment old. Never blocks."""
        depth, since, who = self._record()
        return Owner(*who, since / 1e9, depth) if depth else None

    def dead(self) -> Owner:
        """Whose death ``__recover__`` has to look at; meant while RECOVERING is up."""
        return Owner(*self._dead())

    def recovered(self) -> None:
        """The caller, who holds the lock, has put right what the dead owner left."""
        self._flag(_native.RECOVERING, False)

    def created(self) -> None:
        """The caller, who holds the lock, has made the resource's first state."""
        self._flag(_native.CREATED, True)
        self.recovered()

    def create(self, obj: object) -> None:
        """Run ``__create__`` unless it has returned before, wherever; blocks while another process is in it."""
        hook = getattr(type(obj), "__create__", None)
        if hook is None or self.flags & _native.CREATED:
            return
        with self:
            if not self.flags & _native.CREATED:
                hook(obj)
                self.created()

    def entrust(self, pid: int) -> None:
        """By the owner: the process works on its behalf. If the owner dies, nobody gets the lock before that is gone.

        Raises: OSError: if it cannot be written down; nothing has changed then.
        """
        ward.write(self._ward(), pid)
        self._flag(_native.WARDED, True)

    def reclaim(self) -> None:
        """By the owner: nobody works on its behalf any more."""
        ward.clear(self._ward())
        self._flag(_native.WARDED, False)

    def __repr__(self) -> str:
        if not self.attached:
            return f"<Mutex {self.label}, not attached>"
        return f"<Mutex {self.label}, {f'held by {owner}' if (owner := self.owner()) else 'free'}>"

    def __copy__(self) -> Mutex:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Mutex:
        return anonymous()

    def __reduce__(self) -> tuple[Callable[..., Mutex], tuple[object, ...]]:
        self.shared = True
        token = self.resource.token(self.offset if self.attached else 0)
        with _handles.guard:
            _handles.known.setdefault(token, self)
        return handle, token

    # -- called by the C code ------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        """Attach, or attach anew where the cell was removed. Raises what the place has to say."""
        with _handles.guard:
            if self.attached:
                if not self.flags & _native.REMOVED:
                    return
                self.resource.retire(self.segment)
            segment, offset = self.resource.attach()
            try:
                self.bind(segment, offset)
            except ValueError as error:
                raise IncompatibleError(f"{segment.path} is damaged: {error}", resource=self.label) from None
            if isinstance(self.resource, shm.Named):
                self.watch()

    def _look(self, obj: object) -> bool:
        """By the owner, about once a second: is the name still this cell's, and has the cell its first state?  One
        that was removed is made anew by whoever comes next, in the middle of an object's life."""
        linked = self._linked()
        if linked:
            self.create(obj)
        return linked

    def _linked(self) -> bool:
        """Does the name still lead to this cell? (Session managers remove a user's shared memory at logout.)"""
        return files.same_file(self.segment.path, self.segment.identity)

    def _owner_died(self, record: tuple[int, int, int, str]) -> None:
        dead = Owner(*record)
        logging.getLogger("coheld").warning("%s: %s died while it held the lock; recovered", self.label, dead)

    def _recover(self, obj: object) -> None:
        """Run the class's ``__recover__``. A plain Lockable does not know the class, and leaves it to those who do."""
        cls = type(obj)
        if obj is None or cls.__mro__[1] is _native.LockableBase:
            return
        if hook := getattr(cls, "__recover__", None):
            hook(obj, self.dead())
        self.recovered()

    def _ward(self) -> str:
        if not isinstance(self.resource, shm.Named):
            self._broken()  # nobody works on behalf of who holds an anonymous lock
        return ward.path_of(self.resource.path)

    def _await_ward(self, deadline: float) -> bool:
        """Kill whoever works on behalf of a dead owner, and wait; False: still there at that time.monotonic()."""
        gone = ward.settle(self._ward(), deadline)
        if gone:
            self._flag(_native.WARDED, False)
        return gone

    def _not_owner(self) -> NoReturn:
        owner = self.owner() if self.attached else None
        holder = f"it is held by {owner}" if owner else "nobody holds it"
        raise NotOwnerError(
            f"{self.label}: process {os.getpid()}, thread {threading.get_native_id()} cannot release it: {holder}",
            resource=self.label,
            owner=owner,
        )

    def _timed_out(self, timeout: float) -> NoReturn:
        owner = self.owner()
        if owner:
            why = f"held by {owner}"
        elif self.flags & _native.WARDED:
            why = "the command of a killed coheld run has not ended yet"
        else:
            why = "its holder has just changed; try again"
        raise LockTimeout(
            f"{self.label}: not got within {float(timeout):g} s; {why}",
            resource=self.label,
            owner=owner,
            waited=float(timeout),
        )

    def _too_many(self) -> NoReturn:
        raise TooManyLocksError(
            f"{self.label}: this thread holds {_native.HELD_LIMIT} locks already, and the kernel frees little more "
            "than that when a thread dies; release some first",
            resource=self.label,
        )

    def _too_deep(self) -> NoReturn:
        raise OverflowError(f"{self.label}: acquired too many times by one thread")

    def _broken(self) -> NoReturn:
        raise IncompatibleError(
            f"{self.label}: its memory is damaged; if nobody uses it, remove {self.segment.path}", resource=self.label
        )


class _Handles:
    """The handles that more than one object may come to share, by what travels in a pickle."""

    def __init__(self) -> None:
        self.known: weakref.WeakValueDictionary[tuple[object, ...], Mutex] = weakref.WeakValueDictionary()
        self.begin()

    def begin(self) -> None:
        self.guard = threading.RLock()  # a forked child must not inherit it locked


_handles = _Handles()
os.register_at_fork(after_in_child=_handles.begin)


def anonymous() -> Mutex:
    """A new lock that others reach by fork, spawn or pickle. Raises: OSError: if there is no room for it."""
    arena, offset = shm.new_cell()
    return Mutex(arena, arena.segment, offset)


def named(name: str) -> Mutex:
    """The lock of that name, made if it is missing. Raises: as the place has to say, IncompatibleError for one."""
    files.check_name(name)
    mutex = _known(shm.Named(name, files.lock_directory()))
    mutex._attach()
    return mutex


def handle(*token: Any) -> Mutex:
    """What a pickled Mutex is loaded by. Never raises: what cannot be reached raises at the first call."""
    kind, *where = token
    if mutex := _handles.known.get(token):
        return mutex
    mutex = _known(shm.RemoteCell(*where) if kind == "arena" else shm.Named(*where))
    with suppress(CoheldError, OSError):
        mutex._attach()
    return mutex


def _known(resource: shm.Resource) -> Mutex:
    token = resource.token(0)
    with _handles.guard:
        if (mutex := _handles.known.get(token)) is None:
            mutex = _handles.known[token] = Mutex(resource)
        return mutex


def remove(name: str, timeout: float | None = 0) -> bool:
    """Remove a named lock: its file goes, and whoever still has it attaches to a new one of that name.

    Takes the lock first, for at most timeout seconds (None: for ever). False: there was none.
    Raises: LockTimeout: if it is held all that time, or by the caller.
    """
    files.check_name(name)
    resource = shm.Named(name, files.lock_directory())
    if not os.path.lexists(resource.path):
        return False
    mutex = Mutex(resource)  # not the shared handle, which another thread may attach anew meanwhile
    if not mutex.acquire(timeout=timeout):
        mutex._timed_out(timeout or 0)
    try:
        if mutex._record()[0] > 1:  # held before: the caller would go on under a lock that others get anew
            mutex._timed_out(0)
        _unlink(mutex)
    finally:
        mutex.release()
    return True


def _unlink(mutex: Mutex) -> None:
    mutex._flag(_native.REMOVED, True)
    try:
        shm.unlink_named(mutex.segment)
    finally:
        mutex._flag(_native.REMOVED, not mutex._linked())  # one whose file could not be removed stays in use
