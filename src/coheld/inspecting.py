"""Questions about an object's lock, answered as values."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

from . import native
from .backends import backend_of, files
from .backends import waiters as waiting
from .backends.base import Handle
from .backends.survey import Resource, survey
from .backends.waiters import Waiter
from .lessees import with_leases
from .owner import Owner
from .semaphore import Semaphore


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts since the lock was made: times it was taken (the first level only), times that somebody had to wait for
    it, owners that died holding it; and how many wait now."""

    acquisitions: int
    contended: int
    recoveries: int
    waiters: int


def holder(obj: object) -> Owner | None:
    """Who holds the object's lock now, in whatever process; None if nobody does.

    Takes no lock and never blocks, so the answer may be a moment old.  Raises: NotInitializedError: if it has no lock.
    TypeError: of a Semaphore or Pool, which several hold at once: resources() has them.
    """
    return _lock_of(obj).owner()


def statistics(obj: object) -> Statistics:
    """How the object's lock has been used, by all processes.  Never blocks.

    Raises: NotInitializedError: if it has no lock.  TypeError: as holder.
    """
    return Statistics(*_lock_of(obj)._counters())


def waiters(obj: object) -> list[Waiter]:
    """Who waits for the object's lock, for one of its guards or for its readers, in whatever process; the oldest first.

    Only looks, and never blocks, so the answer may be a moment old, and who has just begun to wait may be missing.
    Raises: NotInitializedError: if it has no lock.  TypeError: as holder.
    """
    lock = _lock_of(obj)
    cell = waiting.cell_of(lock)
    waits = [wait for wait in waiting.all_waits(files.lock_directory()) if wait.cell == cell]
    found = [wait.told() for wait in sorted(waits, key=lambda wait: wait.since)]
    asker: Waiter | None = lock.asker() if lock.far else None  # type: ignore[attr-defined]  # a Remote has it
    return found if asker is None else [asker, *found]


def resources() -> list[Resource]:
    """All resources of this user, of every process, on this machine: those that are busy first.

    Of one that a store has it is what this host knows: who of this host has it, or wants it. The store is not asked.
    Only looks: takes no lock, makes nothing, and never waits for anybody, so the answer may be a moment old. Anonymous
    locks of processes that have ended, and not been swept yet, may be among them.
    """
    directory = files.lock_directory()
    return sorted(with_leases(survey(directory), directory), key=_busyness, reverse=True)


def called(name: str) -> list[Resource]:
    """Those of resources() that are called so; and the one of that name that the store of COHELD_BACKEND has, which is
    asked who has it.

    Raises: BackendError: if it cannot be asked.
    """
    found = resources()
    backend: Any = backend_of(None)
    if backend.CAPABILITIES.files or not files.is_name(name) or (there := backend.seen(name)) is None:
        return [one for one in found if name in (one.called, one.name)]
    path = backend.named(name).path
    part = next((one for one in found if one.place.rpartition(":")[0] == path), None)
    part = part or Resource(name, "lock", backend.scheme, backend.where, store=backend.where)
    others = [one for one in found if name in (one.called, one.name) and one.place != part.place]
    return [replace(part, name=name, holder=there[1]), *others]


def _busyness(resource: Resource) -> tuple[object, ...]:
    held = resource.holder is not None
    return resource.busy, resource.waiters, held, resource.contended, resource.acquisitions


def _lock_of(obj: object) -> Handle:
    if _is_of_several(obj):
        raise TypeError(
            f"{type(obj).__name__} is held by several at once: free() says what nobody has, and, where it has a name, "
            "coheld.resources() which processes have the rest, and who waits"
        )
    lock: Handle = native.lock_of(obj)
    lock.attach()
    return lock


def _is_of_several(obj: object) -> bool:
    """May several hold it at once?"""
    pool = sys.modules.get("coheld.pool")  # else there is none
    return isinstance(obj, Semaphore) or (pool is not None and isinstance(obj, pool.Pool))
