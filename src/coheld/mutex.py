"""Locks by what names them: a new one, a name; and how a name is taken away."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import native
from .backends import backend_of, files
from .backends.base import Handle, known
from .errors import LockTimeout
from .process import start_of


def anonymous(cls: type | None = None) -> Handle:
    """A new lock that others reach by fork, spawn or pickle, of an object of that class. Raises: OSError: if there is
    no room for it."""
    return _maker_of_anonymous()(cls)


@functools.cache
def _maker_of_anonymous() -> Callable[[type | None], Handle]:
    """All of a process live in one place: to look at the environment takes longer than to make one."""
    make: Callable[[type | None], Handle] = backend_of(None).anonymous
    return make


def named(name: str, url: str | None = None) -> Handle:
    """The lock of that name, made if it is missing. Raises: as the place has to say, IncompatibleError for one."""
    backend = backend_of(url)
    files.check_name(name)
    resource = backend.named(name)
    mutex: Handle = known((resource.scheme, *resource.token(0)), lambda: backend.Mutex(resource))
    mutex.attach()
    return mutex


def remove(name: str, timeout: float | None = 0) -> bool:
    """Remove a named lock or semaphore: it goes with its state, from the store that has it where one does, and whoever
    still has it gets a new one of that name.

    Takes the lock first, for at most timeout seconds (None: for ever). False: there was none.
    Raises: LockTimeout: if it is held all that time, or by the caller, or a permit of it by a process that lives.
    BackendError: if the store cannot be asked; it may be gone then.  LeaseLostError: if it is not, as the lease was
    over.
    """
    backend = backend_of(None)
    files.check_name(name)
    mutex: Handle = backend.Mutex(backend.existing(name))  # not the handle that other threads may attach anew meanwhile
    if not mutex._exists():
        return False
    mutex.attach()
    if mutex._mine():  # the caller would go on under a lock that others get anew
        mutex._timed_out(0)
    if not mutex.acquire(timeout=timeout):
        mutex._timed_out(timeout or 0)
    try:
        if holder := _holder_of_a_part(mutex):
            raise LockTimeout(f"{mutex.label}: {holder} of it", resource=mutex.label)
        _unlink(mutex)
    finally:
        mutex.release()
    return True


def _holder_of_a_part(mutex: Any) -> str:
    """By the owner: who has permits or leases, and lives; empty: nobody."""
    if mutex.far:
        from .backends import sessions  # which decode, and are for stores alone
        from .state.looking import fields_in

        peers = sessions.at(mutex.away._store, mutex.away.lease)
        clients = sessions.holders_in(fields_in(mutex.away.load().payload))
        peers.ask(clients, anew=True)
        return next((f"{one} has permits or leases" for one in clients if not peers.is_gone(one)), "")
    if held := mutex._held_by():
        return f"process {held[0][0]} has permits"
    if not mutex.version:
        return ""
    from .state.looking import lessees_of

    return next((f"process {pid} has leases" for pid, start in lessees_of(mutex) if start_of(pid) == start), "")


def _unlink(mutex: Handle) -> None:
    """By the owner.  Killed after _vanish: a name without a state, as one that was just made."""
    mutex._vanish()
    mutex._flag(native.REMOVED, True)
    try:
        mutex.resource.retire(mutex.segment)
    finally:
        mutex._flag(native.REMOVED, not mutex._linked())  # one whose file could not be removed stays in use
