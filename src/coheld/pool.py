"""Pool: any free one of some resources, for as long as a lease lasts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from secrets import randbits
from time import monotonic
from typing import Any, Generic, TypeVar
from uuid import UUID

from . import native, waiting
from .errors import CoheldError, LockTimeout, PermitError
from .lockable import Lockable
from .process import start_of
from .state import shared, snapshot

R = TypeVar("R")
_SLICE = 0.05
"""How long who waits sleeps at most before it looks whether those who hold leases live, seconds."""


@dataclass(frozen=True)
class _Request:
    """A wait for one of those keys.  Of a process, whose death ends it.  number: whoever asks has drawn it, and can
    withdraw what it asked for wherever an interrupt came."""

    number: int
    pid: int
    start: int
    keys: list[str]


@dataclass(frozen=True)
class _Lease:
    """A resource is somebody's."""

    number: int
    pid: int
    start: int


class _Ledger(Lockable):
    """Who has what, and who waits for what, in the order in which they came.  A free resource goes to the first that it
    fits: each takes its own, and leaves what an earlier one could have."""

    leases: dict[str, _Lease] = shared(default_factory=dict)
    queue: list[_Request] = shared(default_factory=list)

    def serve(self, steps: waiting.Steps[str]) -> str:
        """By the owner, of a thread."""
        return waiting.run(steps, native.lock_of(self))

    def fitting(self, number: int) -> str | None:
        """By the owner: what the request may take now."""
        earlier: set[str] = set()
        for request in self.queue:
            if request.number == number:
                return next((key for key in request.keys if key not in self.leases and key not in earlier), None)
            earlier.update(request.keys)
        return None

    def take(self, number: int) -> str | None:
        """By the owner: what the request has from now on; None: it waits on."""
        if (key := self.fitting(number)) is not None:
            self.withdraw(number)
            self.leases[key] = _Lease(number, *_me())
        return key

    def withdraw(self, number: int) -> None:
        """By the owner: it waits no more."""
        self.queue[:] = [request for request in self.queue if request.number != number]

    @Lockable.locked
    def give_back(self, key: str, number: int) -> bool:
        """False: this process does not have it so."""
        if self.leases.get(key) != _Lease(number, *_me()):
            return False
        del self.leases[key]
        return True

    @Lockable.locked
    def forget(self, number: int) -> None:
        """Nothing of the request is left."""
        self.withdraw(number)
        for key in [key for key, one in self.leases.items() if one.number == number]:
            del self.leases[key]

    def bury(self) -> None:
        """By the owner: what dead processes had or waited for is nobody's."""
        owners: list[_Lease | _Request] = [*self.leases.values(), *self.queue]
        alive = {(one.pid, one.start): _lives(one) for one in owners}
        if all(alive.values()):
            return
        for key in [key for key, one in self.leases.items() if not alive[one.pid, one.start]]:
            del self.leases[key]
        self.queue[:] = [one for one in self.queue if alive[one.pid, one.start]]

    def steps(self, number: int, deadline: float) -> waiting.Steps[str]:
        """By the owner: what the request has got. Raises: LockTimeout: nothing, by the deadline."""
        lock = native.lock_of(self)
        while (key := self.take(number)) is None:
            self.bury()
            if (key := self.take(number)) is not None:
                break
            if (left := waiting.left(deadline)) <= 0:
                raise LockTimeout
            with suppress(LockTimeout):
                yield from lock._wait_steps(self, lambda: self.fitting(number), min(left, _SLICE))
        return key


def _lives(one: _Lease | _Request) -> bool:
    """Does its process?"""
    return start_of(one.pid) == one.start


def _me() -> tuple[int, int]:
    pid = os.getpid()
    return pid, start_of(pid) or 0


def _surely(act: Callable[[], None]) -> None:
    """act(), and again where an interrupt has broken it off, which is raised after that: nothing is lost by that."""
    interrupted: BaseException | None = None
    for _ in range(100):  # what raises each time is no interrupt
        try:
            act()
            break
        except (CoheldError, OSError):
            if interrupted is None:
                raise
            break  # done already, when the interrupt came
        except BaseException as error:  # of a signal's handler; whoever has the ledger has it for moments
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _moments(deadline: float) -> float:
    """How long to wait for the ledger, which everybody has for moments only, by who tries once, too; seconds."""
    return max(waiting.left(deadline), 0.1)


class Pool(Generic[R]):
    """Any free one of the resources, for all threads, tasks and processes that have a copy of the pool.

    ``with pool.lease() as resource:``, or ``async with``. A free resource goes to the request that has waited longest
    of those that it fits. A lease belongs to the process that took it: when that ends, however it ends, the resource is
    free again. Without a name the pool reaches other processes by fork, spawn or pickle, as its resources do; with one
    any process of this user finds it, and brings its own objects for the same resources: they are matched by what names
    them, not by their place in the list.

    resources: what names one is, in this order: the lock_name of a Lockable; its attribute name, a str; the identity of
    the lock of a Lockable; itself, if it is a str, int, bytes, path, UUID or Enum.

    Raises: TypeError: if a resource has none of these, or there is none at all.  ValueError: if two are named alike.
    What a Lockable of that lock_name raises: IncompatibleError, InsecureError, OSError.
    """

    def __init__(self, resources: Iterable[R], name: str | None = None) -> None:
        self._resources: dict[str, R] = {}
        if isinstance(resources, str | bytes):
            raise TypeError("a pool takes several resources, as a list: [name]")
        for resource in resources:
            key = _key_of(resource)
            if key in self._resources:
                raise ValueError(f"two resources of a pool are named {key}")
            self._resources[key] = resource
        if not self._resources:
            raise TypeError("a pool needs at least one resource")
        self._ledger = _Ledger(lock_name=name)

    def lease(self, timeout: float | None = None, where: Callable[[R], object] | None = None) -> Lease[R]:
        """A context manager, with or async with, whose value is the resource; for one use.

        Entering it blocks the thread, or suspends the task, for at most timeout seconds (None: for ever; zero or less:
        tries once). where: which resources will do; asked once for each, here.

        Raises: TypeError, ValueError: if timeout is no number of seconds, or where fits none.  On entry, LockTimeout:
        if none was to be had in that time.
        """
        seconds = waiting.seconds_of(timeout)
        if where is not None and not callable(where):
            raise TypeError(f"where must be a function of a resource, not {type(where).__name__}")
        keys = [key for key, resource in self._resources.items() if where is None or where(resource)]
        if not keys:
            raise ValueError(f"where fits none of the {len(self._resources)} resources")
        return Lease(self, keys, seconds)

    def __len__(self) -> int:
        return len(self._resources)

    def free(self) -> list[R]:
        """Those that nobody has; a look without a lock, so it may be a moment old. Never blocks."""
        leases = snapshot(self._ledger).leases
        leased = {key for key, lease in leases.items() if _lives(lease)}
        return [resource for key, resource in self._resources.items() if key not in leased]

    def __repr__(self) -> str:
        return f"<Pool {native.lock_of(self._ledger).label}: {len(self.free())} of {len(self)} free>"


Pool.__module__ = "coheld"  # as its users know it


class Lease(Generic[R]):
    """One request of a pool, and what it got: see Pool.lease."""

    def __init__(self, pool: Pool[R], keys: list[str], seconds: float) -> None:
        self._pool, self._keys, self._seconds = pool, keys, seconds
        self._number: int | None = None
        self._key: str | None = None

    def __enter__(self) -> R:
        ledger, deadline = self._begin()
        serve = Lockable.locked(timeout=_moments(deadline))(_Ledger.serve)  # no interrupt comes between lock and body
        try:
            self._key = serve(ledger, self._steps(deadline))
            return self._got()
        except BaseException as error:
            _surely(self._forget)
            raise self._said(error) from None

    async def __aenter__(self) -> R:
        from . import aio

        ledger, deadline = self._begin()
        try:
            if not await aio.acquire(ledger, _moments(deadline)):
                raise LockTimeout
            try:
                self._key = await aio.serve(self._steps(deadline), native.lock_of(ledger))
            finally:
                ledger.release()
        except BaseException as error:
            await self._whatever_comes(self._forget)
            raise self._said(error) from None
        return self._got()

    def __exit__(self, *_exception: object) -> None:
        _surely(self._give_back)

    async def __aexit__(self, *_exception: object) -> None:
        await self._whatever_comes(self._give_back)

    def _steps(self, deadline: float) -> waiting.Steps[str]:
        ledger, number = self._pool._ledger, self._number
        assert number is not None
        ledger.queue.append(_Request(number, *_me(), self._keys))
        return (yield from ledger.steps(number, deadline))

    async def _whatever_comes(self, act: Callable[[], None]) -> None:
        """act(), with the ledger; who is cancelled meanwhile is so after that."""
        from . import aio

        ledger = self._pool._ledger
        lock = native.lock_of(ledger)

        def steps() -> waiting.Steps[None]:
            try:
                yield waiting.Take(ledger, "", 1, waiting.FOREVER, keep=True)
            finally:
                if lock._mine():
                    try:
                        act()
                    finally:
                        lock.release()

        await aio.serve(steps(), lock)

    def _give_back(self) -> None:
        """Raises: PermitError."""
        if self._key is None or self._number is None or not self._pool._ledger.give_back(self._key, self._number):
            raise PermitError(f"{self._pool!r}: this process does not have the lease that it gives back")
        self._key = None

    def _forget(self) -> None:
        """Nothing of the request is left."""
        assert self._number is not None
        self._pool._ledger.forget(self._number)

    def _begin(self) -> tuple[_Ledger, float]:
        if self._number is not None:
            raise RuntimeError("a lease is for one use: call pool.lease() again")
        self._number = randbits(62)
        return self._pool._ledger, monotonic() + self._seconds

    def _got(self) -> R:
        assert self._key is not None
        return self._pool._resources[self._key]

    def _said(self, error: BaseException) -> BaseException:
        return self._not_got() if isinstance(error, LockTimeout) else error

    def _not_got(self) -> LockTimeout:
        ledger, label = self._pool._ledger, native.lock_of(self._pool._ledger).label
        holders = sorted({one.pid for key, one in snapshot(ledger).leases.items() if key in self._keys})
        who = ", ".join(f"process {pid}" for pid in holders[:5]) or "others, who have just given them back"
        return LockTimeout(
            f"pool {label}: none of {len(self._keys)} resources was free for {self._seconds:g} s; they are with {who}",
            resource=label,
            waited=self._seconds,
        )


def _key_of(resource: Any) -> str:
    """What names a resource, in every process."""
    lock = native.peek(resource) if isinstance(resource, Lockable) else None
    if lock is not None and lock.resource.named:
        return f"lock {lock.label}"
    name = getattr(resource, "name", None)
    if isinstance(name, str) and not isinstance(resource, Enum | os.PathLike):
        return f"name {name!r}"
    if lock is not None:
        lock.shared = True
        return f"lock {lock.__reduce__()[1]!r}"
    if isinstance(resource, str | int | bytes | os.PathLike | UUID | Enum):
        return f"{type(resource).__qualname__} {resource!r}"
    raise TypeError(
        f"what names {resource!r} for other processes? Give it an attribute name, or a lock_name, or let the pool have "
        "its name, a str"
    )
