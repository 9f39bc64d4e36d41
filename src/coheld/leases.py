"""Leases: what a holder asks of a lock that a store on another host has.

Such a lock is held for a time, and renewed while its holder lives and can reach the store.  A holder that was stopped,
or cut off, for longer has lost it: others may have it, whatever it believes.  It cannot change the shared state any
more, as that is in the same store; what lies outside of it is protected by the token, or by asking before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import native
from .errors import IncompatibleError, LeaseLostError, NotLockedError


def token(obj: object) -> int:
    """The fencing token of the caller's hold: greater than that of every holder before, of all hosts.

    Give it to what you change outside of the shared state, which refuses a smaller one than it has seen. It fits into
    63 bits. A store that has not written it to its disk does so now, by the first call of each hold, which blocks for
    one round trip (PostgreSQL); else it never blocks.

    Raises: NotLockedError: if the caller does not hold the lock.  IncompatibleError: of a local lock, which is never
    lost by time, and has none.  LeaseLostError, BackendError: if the store is asked, and has another holder, or cannot
    be reached.
    """
    return int(_far(obj, "a fencing token").token())


def lost(obj: object) -> bool:
    """Has the caller lost the lock that it holds?  As far as this process knows; never blocks.

    True: another has it, or the lease is over and could not be renewed, so another may have it. Of a local lock: never.
    Of a Semaphore at a store: are permits of this process lost?
    Raises: NotLockedError: if the caller does not hold it, or the process no permit.
    """
    if isinstance(obj, native.SemaphoreBase):
        permits = _permits_of(obj)
        return permits is not None and bool(permits.lost())
    lock = native.lock_of(obj)
    return bool(lock.away.lost()) if lock.far else not _local(lock)


def ensure_held(obj: object) -> None:
    """Ask the store, before what cannot be undone, whether the caller still holds the lock; the lease begins anew then.

    Blocks for one round trip; of a local lock, not at all.
    Of a Semaphore at a store: whether this process still has its permits.
    Raises: LeaseLostError: if it is lost.  BackendError: if the store cannot be asked.  NotLockedError: if the caller
    does not hold it, or the process no permit.
    """
    if isinstance(obj, native.SemaphoreBase):
        if (permits := _permits_of(obj)) is not None:
            permits.ensure()
        return
    lock = native.lock_of(obj)
    if lock.far:
        lock.away.ensure()
    else:
        _local(lock)


def when_lost(obj: object, call: Callable[[LeaseLostError], object]) -> None:
    """Call it whenever this process finds out that it has lost the lock which it held, in the thread that finds out; of
    a Semaphore: the permits.

    It must not block, and what it raises is logged. It stays for as long as the process has the lock.
    Raises: TypeError: if it cannot be called.
    """
    if not callable(call):
        raise TypeError(f"when_lost needs a function of the error, not {type(call).__name__}")
    if isinstance(obj, native.SemaphoreBase):
        if (permits := _permits_of(obj)) is not None:
            permits.has.when_lost.append(call)
        return
    lock = native.lock_of(obj)
    if lock.far:
        lock.away.when_lost.append(call)


def _permits_of(semaphore: Any) -> Any:
    """None: they are local, and never lost by time."""
    semaphore._check_initialized()
    return semaphore._permits if semaphore._lock.far else None


def _far(obj: object, what: str) -> Any:
    lock: Any = native.lock_of(obj)
    if not lock.far:
        raise IncompatibleError(f"{lock.label} is a local lock, and has not {what}", resource=lock.label)
    return lock.away


def _local(lock: Any) -> bool:
    if not (lock.attached and lock._mine()):
        raise NotLockedError(f"{lock.label}: this is for who holds the lock", resource=lock.label)
    return True
