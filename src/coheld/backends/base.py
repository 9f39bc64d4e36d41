"""What every backend gives: a Handle is an object's ``__lock__``, with all that is said and done off its fast path.

A backend is a module with a scheme (``shm:``), and has

    Mutex               its Handle: takes and gives back, knows owner, flags and counters
    anonymous(cls)      a new Mutex that others reach by fork, spawn or pickle; cls is for display
    named(name)         the resource of that name, as this process finds it
    resource(*token)    the resource that a pickled Mutex travels as
    CAPABILITIES        what it can give that others cannot

A resource says how to get from a description that can travel to a place that holds the lock.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from time import monotonic
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, TypeVar

from .. import native, observing
from ..errors import CoheldError, IncompatibleError, LockTimeout, NotOwnerError
from ..owner import Owner
from ..process import at_fork, thread_name
from ..waiting import FOREVER, TOLD_AFTER
from . import files, leaving, of_scheme, waiters
from .monitor import Monitor
from .tasking import Tasking

if TYPE_CHECKING:
    from .._native import Mutex as _Half  # what a backend's own half has to have
else:
    _Half = object


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What only some backends give.

    handoff_bound: a wait among callers that ask again at once ends within so many seconds after the turns before it;
    None: it ends, but nobody says when, nor in which order.  wakes_without_polling: who waits sleeps until the lock is
    given back.  uninterruptible_entry: an interrupt never leaves a call's lock taken; otherwise it may stay with the
    thread that was interrupted, until that releases it or ends.  held_limit: how many locks a thread may hold at once;
    None: as many as it can have open files.

    files: a name is a file of this machine, in the directory of this process, and is gone with that; otherwise all who
    reach the store have it, and the file is that of the local lock.  leases: a lock is held for a time, which is
    renewed, and is lost with it; it has a fencing token (see coheld.leases).  cohorts: it passes among the processes of
    a host without the store being asked, for as long as that is fair to others.  handlers: a signal's handler may take
    it wherever it interrupts its own thread; otherwise not while that asks the store for it, or gives it back:
    DeadlockError.  readers: there are reading calls.
    semaphores: a Semaphore or a Pool may have a name.  What is not there raises IncompatibleError.
    """

    handoff_bound: float | None
    wakes_without_polling: bool
    uninterruptible_entry: bool
    held_limit: int | None
    files: bool
    leases: bool
    cohorts: bool
    handlers: bool
    readers: bool
    semaphores: bool


class Resource(Protocol):
    """What a Mutex locks; it says how to get from a description that can travel to a place that holds the lock."""

    scheme: str
    path: str

    @property
    def named(self) -> bool:
        """Is it found by a name, and may be removed?"""

    def attach(self) -> tuple[Any, int]:
        """The segment, and the offset of the lock in it. Raises: as the place has to say."""

    def retire(self, segment: Any) -> None:
        """The lock that is there is marked REMOVED. Raises: IncompatibleError: if that cannot be."""

    def token(self, offset: int) -> tuple[object, ...]:
        """The description that travels."""

    def label(self, offset: int) -> str:
        """What messages call it."""


class Handle(Monitor, Tasking, _Half):
    """A robust, re-entrant lock; what an object's ``__lock__`` is.  A backend's Mutex is this and its own half, which
    takes and gives back: ``class Mutex(Handle, native.Mutex)``.

    One per resource and process: all objects of the resource share it.  Methods that begin with an underscore are
    called by the backend's half.
    """

    __slots__ = ()
    far: ClassVar[bool] = False
    """Does a store on another host have it?"""
    find_schema: ClassVar[Callable[[type], Any]] = staticmethod(lambda _cls: None)
    """The shared fields of a class, or None; by lockable.py."""
    resource: Resource
    segment: Any

    @property
    def label(self) -> str:
        """The resource, as messages name it."""
        return self.resource.label(self.offset if self.attached else 0)

    def owner(self) -> Owner | None:
        """Who holds the lock now, or None; a look without a lock, so it may be a moment old. Never blocks."""
        if (owner := self._owner()) is None:
            return None
        if (task := self.task) is not None and (owner.pid, owner.task_id) == (os.getpid(), id(task)):  # else it is new
            return replace(owner, thread=thread_name(owner.pid, owner.tid), task=task.get_name())
        return waiters.Names(files.directory_here()).tell(owner, waiters.cell_of(self))

    def _owner(self) -> Owner | None:
        """The same in short, without names."""
        depth, since, who = self._record()
        return Owner(*who, since / 1e9, depth, self._task_address()) if depth else None

    def _known_owner(self) -> Owner | None:
        """As owner(), and nobody is asked for it."""
        return self.owner()

    def dead(self) -> Owner:
        """Whose death ``__recover__`` has to look at; meant while RECOVERING is up."""
        return Owner(*self._dead())

    def recovered(self) -> None:
        """The caller, who holds the lock, has put right what the dead owner left."""
        self._flag(native.RECOVERING, False)

    def created(self) -> None:
        """The caller, who holds the lock, has made the resource's first state."""
        self._flag(native.CREATED, True)
        self.recovered()

    def create(self, obj: object) -> None:
        """Run ``__create__`` unless it has returned before, wherever; blocks while another process is in it."""
        hook = getattr(type(obj), "__create__", None)
        if hook is None or self._is_created():
            return
        with self:
            if not self._is_created():
                self._run_creation(hook, obj)
                self.created()

    def entrust(self, pid: int) -> None:
        """By the owner: the process works on its behalf. If the owner dies, nobody gets the lock before that is gone.

        Raises: OSError: if it cannot be written down; nothing has changed then.
        """
        _ward().write(self._ward_path(), pid)
        self._flag(native.WARDED, True)

    def reclaim(self) -> None:
        """By the owner: nobody works on its behalf any more."""
        _ward().clear(self._ward_path())
        self._flag(native.WARDED, False)

    def __repr__(self) -> str:
        if not self.attached:
            return f"<Mutex {self.resource.scheme}: {self.label}, not attached>"
        state = f"held by {owner}" if (owner := self.owner()) else "free"
        return f"<Mutex {self.resource.scheme}: {self.label}, {state}>"

    def __copy__(self) -> Handle:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        made: Handle = of_scheme(self.resource.scheme).anonymous()
        if self.view is not None:
            self.view._copy_to(made)
        return made

    def __reduce__(self) -> tuple[Callable[..., Handle], tuple[object, ...]]:
        self.shared = True
        token = self.resource.scheme, *self.resource.token(self.offset if self.attached else 0)
        with _handles.guard:
            _handles.known.setdefault(token, self)
        return handle, token

    def _exists(self) -> bool:
        """Is there something of that name?"""
        return os.path.lexists(self.resource.path)

    def _vanish(self) -> None:
        """By the owner, before the name is taken off: what is of it on other hosts goes."""

    def attach(self) -> None:
        """Attach, or attach anew where the name has been taken off. Raises what the place has to say."""
        if not self.attached or (self.flags & native.REMOVED and not self._linked()):
            self._attach()

    # -- called by the backend's half ----------------------------------------------------------------------------------

    def _attach(self, left: int | None = None) -> None:
        """Attach, or attach anew where the cell was removed. Raises what the place has to say.

        Anew only by one who held the cell, saw there that it is removed, and left it (left: its place): whoever looks
        without the lock may see the mark of a remover that takes it back, as it cannot take the name off.
        """
        with _handles.guard:
            if self.attached:
                if left not in (None, self.place) or not self.flags & native.REMOVED:
                    return  # another thread has attached it anew
                self.resource.retire(self.segment)
            segment, offset = self.resource.attach()
            try:
                self.bind(segment, offset)
            except ValueError as error:
                raise IncompatibleError(f"{segment.path} is damaged: {error}", resource=self.label) from None
            if self.resource.named:
                self.watch()
        leaving.at_exit(waiters.leave)

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
        observing.recovered(self)

    def _enlist(self) -> None:
        """By a thread that takes a lock for the first time: it has a place in the table of waiters from now on, and its
        name is there; or none."""
        waiters.of_this_thread()

    def _take_seat(self) -> None:
        """By the owner, for a task: there is a seat from now on for the names of the tasks that own it, or none."""
        if (place := waiters.seat()) is not None:
            self._sit(place.table.map, place.slot, place)

    def _waits_on(self, seconds: float, told: bool, searches: bool) -> float:
        """By who has waited for so long: how long that will have been when it asks again.  Raises: DeadlockError."""
        if searches:
            begun = monotonic()
            waiters.deadlock().search(self)
            seconds += monotonic() - begun  # from its end on: else who searches slowly would do nothing else
        if not told and seconds >= TOLD_AFTER:
            self._waits_long(seconds)
        again = seconds + waiters.SEARCH_AGAIN if searches else FOREVER
        return min(again, TOLD_AFTER) if seconds < TOLD_AFTER else again

    def _waits_long(self, seconds: float, why: str = "") -> None:
        """By who waits for it, once; why: for what more than the lock."""
        logging.getLogger("coheld").warning(
            "%s: waited for %.3g s so far; %s; coheld ps shows more", self.label, seconds, why or self._why_not()
        )

    def _recover(self, obj: object) -> None:
        """Run the class's ``__recover__``. A plain Lockable does not know the class, and leaves it to those who do.
        Who dies in ``__create__`` leaves nothing: that is begun anew."""
        cls = type(obj)
        if obj is None or cls.__mro__[1] is native.LockableBase:
            return
        if hasattr(cls, "__create__") and not self._is_created():
            self.create(obj)
            return
        if hook := getattr(cls, "__recover__", None):
            hook(obj, self.dead())
            self._commit()  # before the flag: else a guard that waits, or a death in the body, would lose it for good
        self.recovered()

    def _ward_path(self) -> str:
        if not self.resource.named:
            self._broken()  # nobody works on behalf of who holds an anonymous lock
        return str(_ward().path_of(self.resource.path))

    def _await_ward(self, deadline: float) -> bool:
        """Kill whoever works on behalf of a dead owner, and wait; False: still there at that time.monotonic()."""
        gone: bool = _ward().settle(self._ward_path(), deadline)
        if gone:
            self._flag(native.WARDED, False)
        return gone

    def _not_owner(self) -> NoReturn:
        owner = self._known_owner() if self.attached else None
        holder = f"it is held by {owner}" if owner else "nobody holds it"
        raise NotOwnerError(
            f"{self.label}: process {os.getpid()}, thread {threading.get_native_id()} cannot release it: {holder}",
            resource=self.label,
            owner=owner,
        )

    def _timed_out(self, timeout: float) -> NoReturn:
        raise LockTimeout(
            f"{self.label}: not got within {float(timeout):g} s; {self._why_not()}",
            resource=self.label,
            owner=self._known_owner(),
            waited=float(timeout),
        )

    def _why_not(self) -> str:
        """Who has it, or what else is in the way."""
        if self.readers is not None and self.readers.head.value:
            if not self.readers.free():
                return f"all permits are with {self._readers()}"
        elif readers := self._readers():
            return f"read by {readers}"
        if owner := self.owner():
            return f"held by {owner}"
        if self.flags & native.WARDED:
            return "the command of a killed coheld run has not ended yet"
        return "its holder has just changed; try again"

    def _readers(self) -> str:
        """Who is in a reading call now, as messages say it."""
        counts = self.readers.living() if self.readers is not None else []
        return ", ".join(f"process {pid}" + (f" ({count} times)" if count > 1 else "") for pid, _, count in counts[:5])

    def _open_register(self, value: int = 0) -> None:
        """By the owner: the register beside it is mapped from here on. value: permits, or 0: of readers."""
        raise NotImplementedError

    def _held_by(self) -> list[tuple[int, int, int]]:
        """By the owner: the processes that read it, or have permits that it guards: number, start, how many."""
        return []

    def _tell_taken(self, obj: object, waited: float, tried: bool) -> None:
        """By a new owner, where somebody observes."""
        observing.taken(self, obj, waited, tried)

    def _tell_timed_out(self) -> None:
        """By who has waited in vain, where somebody observes."""
        observing.timed_out(self)

    def _tell_given(self) -> None:
        """By who has given it back, where that was told."""
        observing.given(self)

    def _too_deep(self) -> NoReturn:
        raise OverflowError(f"{self.label}: acquired too many times by one thread")

    def _broken(self) -> NoReturn:
        raise IncompatibleError(
            f"{self.label}: its memory is damaged; if nobody uses it, remove {self.segment.path}", resource=self.label
        )


class Gatekeeping(Handle if TYPE_CHECKING else object):  # type: ignore[misc]  # a mixin, before a Mutex
    """Of the lock that the one who waits for a permit of a semaphore holds: a backend's Gate is this and its Mutex."""

    __slots__ = ()

    def _waits_long(self, _seconds: float, _why: str = "") -> None:
        """Who is next says who has the permits, and for how long it has waited in all: see Semaphore._patience."""

    def _owner_died(self, _record: tuple[int, int, int, str]) -> None:
        """It has waited, and no work of it is half done."""

    def _recover(self, _obj: object) -> None:
        self.recovered()

    def __reduce__(self) -> tuple[Callable[..., Handle], tuple[object, ...]]:
        self.shared = True  # type: ignore[misc]  # its Mutex has that
        token = self.resource.scheme, *self.resource.token(self.offset if self.attached else 0)
        known(("gate", *token), lambda: self)
        return gate, token


def _ward() -> ModuleType:
    """Of Linux; elsewhere nobody works on behalf of an owner."""
    return import_module("coheld.ward")


H = TypeVar("H", bound="Handle")


class _Handles:
    """The handles that more than one object may come to share, by what travels in a pickle."""

    def __init__(self) -> None:
        self.known: weakref.WeakValueDictionary[tuple[object, ...], Handle] = weakref.WeakValueDictionary()
        self.begin()

    def begin(self) -> None:
        self.guard = threading.RLock()  # a forked child must not inherit it locked


native.tell_after(TOLD_AFTER)
_handles = _Handles()
at_fork(child=_handles.begin)


def views_guard() -> threading.RLock:
    """Held by whoever attaches a handle, or gives it a view."""
    return _handles.guard


def handles() -> list[Handle]:
    """Those of this process that are named, or have travelled."""
    return [lock for reference in _handles.known.valuerefs() if (lock := reference()) is not None]


def known(token: tuple[object, ...], make: Callable[[], H]) -> H:
    """The one handle of what the token says; made if this process has none."""
    with _handles.guard:
        found: H | None = _handles.known.get(token)  # type: ignore[assignment]  # what was made for that token
        if found is None:
            _handles.known[token] = found = make()
        return found


def gate(*token: Any) -> Handle:
    """What a pickled Gate is loaded by; attached at its first use."""
    scheme, *where = token
    backend = of_scheme(scheme)
    made: Handle = known(("gate", *token), lambda: backend.Gate(backend.resource(*where)))
    return made


def _found(scheme: str, *where: Any) -> Handle:
    """Where this process has not that backend: what says so at its first call."""
    try:
        backend = of_scheme(scheme)
    except (CoheldError, ValueError) as error:
        backend, resource = of_scheme("file" if native.missing else "shm"), _Missing(scheme, where, error)
    else:
        resource = backend.resource(*where)
    made: Handle = backend.Mutex(resource)
    return made


class _Missing:
    """What such a lock has for a resource."""

    named = True
    path = ""

    def __init__(self, scheme: str, where: tuple[object, ...], error: Exception) -> None:
        self.scheme, self._where, self._error = scheme, where, error

    def attach(self) -> NoReturn:
        raise IncompatibleError(f"{self.label(0)} cannot be used here: {self._error}")

    def retire(self, segment: Any) -> None:
        """There is none."""

    def token(self, _offset: int) -> tuple[object, ...]:
        return self._where

    def label(self, _offset: int) -> str:
        return f"a lock of {self.scheme}:"


def handle(*token: Any) -> Handle:
    """What a pickled Mutex is loaded by. Never raises: what cannot be reached raises at the first call."""
    if found := _handles.known.get(token):
        return found
    mutex: Handle = known(token, lambda: _found(*token))
    with suppress(CoheldError, OSError):
        mutex.attach()
    return mutex
