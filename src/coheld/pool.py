"""Pool: any free one of some resources, for as long as a lease lasts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from secrets import randbits
from time import monotonic
from typing import Any, Generic, TypeVar
from uuid import UUID

from . import native, waiting
from .backends import backend_of, default
from .backends.sessions import Client
from .errors import (
    BackendError,
    CoheldError,
    IncompatibleError,
    LeaseLostError,
    LockTimeout,
    NotInitializedError,
    PermitError,
)
from .ledger import Ledger, NotGot, Request, enrol, lives, lost, me, moments, peers_of
from .lockable import Lockable
from .state import snapshot

R = TypeVar("R")


class Pool(Generic[R]):
    """Any free one of the resources, for all threads, tasks and processes that have a copy of the pool.

    ``with pool.lease() as resource:``, or ``async with``. A free resource goes to the request that has waited longest
    of those that it fits. A lease belongs to the process that took it: when that ends, however it ends, the resource is
    free again; so it is when nothing refers to the lease any more, or when its coroutine is destroyed. Without a name
    the pool reaches other processes by fork, spawn or pickle, as its resources do; with one any process of this user
    finds it, and brings its own objects for the same resources: they are matched by what names them, not by their place
    in the list.

    resources: what names one is, in this order: the lock_name of a Lockable; its attribute name, a str; the identity of
    the lock of a Lockable; itself, if it is a str, int, bytes, path, UUID or Enum.

    Raises: TypeError: if a resource has none of these, or there is none at all.  ValueError: if two are named alike.
    What a Lockable of that lock_name raises: IncompatibleError, InsecureError, OSError.

    With a name and COHELD_BACKEND=redis://… it is for all hosts. A lease lasts then as long as that of the store on
    what this process has there, which is renewed: where that was lost, the end of the block raises LeaseLostError.
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
        if name is not None and not backend_of(None).CAPABILITIES.semaphores:
            raise IncompatibleError(f"pool {name!r}: {default()} has locks and their state; pools are local so far")
        self._ledger = Ledger(lock_name=name)

    _ledger: Any = None

    def lease(self, timeout: float | None = None, where: Callable[[R], object] | None = None) -> Lease[R]:
        """A context manager, with or async with, whose value is the resource; for one use.

        Entering it blocks the thread, or suspends the task, for at most timeout seconds (None: for ever; zero or less:
        tries once). where: which resources will do; asked once for each, here.

        Raises: TypeError, ValueError: if timeout is no number of seconds, or where fits none.  On entry, LockTimeout:
        if none was to be had in that time.  LeaseLostError: if this process stood still meanwhile, for longer than the
        lease that it has at a store; trying again may well work.
        """
        self._check_initialized()
        seconds = waiting.seconds_of(timeout)
        if where is not None and not callable(where):
            raise TypeError(f"where must be a function of a resource, not {type(where).__name__}")
        keys = [key for key, resource in self._resources.items() if where is None or where(resource)]
        if not keys:
            raise ValueError(f"where fits none of the {len(self._resources)} resources")
        return Lease(self, keys, seconds)

    def __len__(self) -> int:
        self._check_initialized()
        return len(self._resources)

    def free(self) -> list[R]:
        """Those that nobody has; a look without a lock, so it may be a moment old. Never blocks, but for a question to
        the store where one has the pool, which may raise BackendError."""
        self._check_initialized()
        leases, peers = snapshot(self._ledger).leases, peers_of(self._ledger)
        leased = {key for key, lease in leases.items() if lease.number not in lost.numbers and lives(lease, peers)}
        return [resource for key, resource in self._resources.items() if key not in leased]

    def __repr__(self) -> str:
        if self._ledger is None:
            return f"<{type(self).__name__}, not attached>"
        if native.lock_of(self._ledger).far:  # who looks at it may be a debugger
            return f"<{type(self).__name__} {native.lock_of(self._ledger).label}: {len(self)} resources>"
        return f"<{type(self).__name__} {native.lock_of(self._ledger).label}: {len(self.free())} of {len(self)} free>"

    def _check_initialized(self) -> None:
        if self._ledger is None:
            raise NotInitializedError(f"{type(self).__name__}: Pool.__init__ has not run")


Pool.__module__ = "coheld"  # as its users know it


class Lease(Generic[R]):
    """One request of a pool, and what it got: see Pool.lease."""

    _client: Client | None = None
    _number: int | None = None
    _key: str | None = None

    def __init__(self, pool: Pool[R], keys: list[str], seconds: float) -> None:
        self._pool, self._keys, self._seconds = pool, keys, seconds

    def __enter__(self) -> R:
        ledger, deadline = self._begin()
        serve = Lockable.locked(timeout=moments(ledger, deadline))(Ledger.serve)  # no interrupt comes before the body
        try:
            self._client = enrol(self._drawn(), ledger)
            self._key = serve(ledger, self._steps(deadline))
            return self._got()
        except BaseException as error:
            if not self._is_over(error):
                waiting.surely(self._forget)
            raise self._said(error) from None

    async def __aenter__(self) -> R:
        from . import aio

        ledger, deadline = self._begin()
        try:
            lock = native.lock_of(ledger)
            if lock.far:
                number = self._drawn()
                enrols = partial(enrol, number, ledger)
                self._client = await aio.by_thread(lock, enrols, lambda _client: lost.end(number))
            if not await aio.acquire(ledger, moments(ledger, deadline)):
                raise LockTimeout
            try:
                self._key = await aio.serve(self._steps(deadline), lock)
            except GeneratorExit:  # it is destroyed where it waits, without the ledger, which whoever runs now may have
                raise
            except BaseException:
                if lock._mine():
                    await aio.leave(ledger)
                raise
            await aio.leave(ledger)
            return self._got()
        except GeneratorExit:
            self._lose()
            raise
        except BaseException as error:
            if not self._is_over(error):
                await self._forget_in_task()
            raise self._said(error) from None

    def __exit__(self, *_exception: object) -> None:
        if not sys.is_finalizing():  # a generator that nobody has ended: modules go now, and the process gives it back
            waiting.surely(self._give_back)

    async def __aexit__(self, kind: type[BaseException] | None = None, *_exception: object) -> None:
        if kind is GeneratorExit:
            self._lose()
        else:
            await self._give_back_in_task()

    def __del__(self) -> None:
        """A signal's handler may have raised as its end began."""
        self._lose()

    def _steps(self, deadline: float) -> waiting.Steps[str]:
        assert self._number is not None
        ledger: Ledger = self._pool._ledger
        lost.begin_request(self._number, ledger)
        key = yield from ledger.steps(Request(self._number, *me(), self._keys, self._client), deadline)
        lost.waits.pop(self._number, None)
        return key

    async def _give_back_in_task(self) -> None:
        """Whatever comes: who is cancelled meanwhile is so after that."""
        from . import aio

        ledger = self._pool._ledger
        lock = native.lock_of(ledger)

        def steps() -> waiting.Steps[None]:
            destroyed = False
            try:
                yield waiting.Take(ledger, "", 1, waiting.FOREVER, keep=True)
            except GeneratorExit:
                destroyed = True  # and whoever runs now may have the ledger
                raise
            finally:
                if not destroyed and lock._mine():
                    try:
                        self._give_back()
                        if lock.far:
                            yield waiting.Depart(loud=True)
                    finally:
                        if lock._mine():
                            lock.release()

        try:
            await aio.serve(steps(), lock)
        except GeneratorExit:
            self._lose()
            raise

    async def _forget_in_task(self) -> None:
        """As _forget; who is cancelled meanwhile leaves it to others."""
        from . import aio

        try:
            if not await aio.acquire(self._pool._ledger, moments(self._pool._ledger, 0)):
                self._lose()
                return
        except BaseException:
            self._lose()
            raise
        try:
            self._forget()
        finally:
            await aio.leave(self._pool._ledger)

    def _is_over(self, error: BaseException) -> bool:
        """Does the ledger know nothing of the request that has failed?"""
        assert self._number is not None
        if isinstance(error, NotGot) or self._number not in lost.ledgers:
            lost.end(self._number)
        return self._number not in lost.ledgers

    def _lose(self) -> None:
        """Nobody else ends it. Never blocks."""
        if self._number is not None:
            lost.note(self._number)

    def _give_back(self) -> None:
        """Raises: PermitError."""
        key, number, ledger = self._key, self._number, self._pool._ledger
        if key is None or number is None:
            raise self._not_mine()
        try:
            if not ledger.give_back(key, number):
                raise self._not_mine()
        except (BackendError, LeaseLostError):
            if native.lock_of(ledger).far:  # a thread does it, once the store can be reached, or in a hold that lasts
                self._key = None
                self._lose()
            raise
        self._key = None
        lost.end(number)

    def _not_mine(self) -> CoheldError:
        number = self._number
        if number is None or self._key is None or lost.sessions.get(number) is None:
            return PermitError(f"{self._pool!r}: this process does not have the lease that it gives back")
        self._key = None
        lost.end(number)
        return self._is_lost()

    def _is_lost(self) -> LeaseLostError:
        label = native.lock_of(self._pool._ledger).label
        return LeaseLostError(
            f"pool {label}: the lease of the store on this resource was lost, and another may have had it",
            resource=label,
        )

    def _forget(self) -> None:
        """Nothing of the request is left, or soon nothing is: who has the ledger may have been stopped."""
        assert self._number is not None
        try:
            self._pool._ledger.forget({self._number})
        except (LockTimeout, BackendError, LeaseLostError):
            self._lose()
        else:
            lost.end(self._number)

    def _begin(self) -> tuple[Ledger, float]:
        if self._number is not None:
            raise RuntimeError("a lease is for one use: call pool.lease() again")
        self._number = randbits(62)
        return self._pool._ledger, monotonic() + self._seconds

    def _drawn(self) -> int:
        assert self._number is not None
        return self._number

    def _got(self) -> R:
        """Raises: LeaseLostError: of a store, where this process stood still since it was enrolled."""
        assert self._key is not None
        session = lost.sessions.get(self._drawn())
        if session is not None and not session.is_good():
            self._key = None
            raise self._is_lost()
        return self._pool._resources[self._key]

    def _said(self, error: BaseException) -> BaseException:
        return self._not_got() if isinstance(error, LockTimeout) else error

    def _not_got(self) -> LockTimeout:
        ledger, label = self._pool._ledger, native.lock_of(self._pool._ledger).label
        return LockTimeout(
            f"pool {label}: none of {len(self._keys)} resources was free for {self._seconds:g} s; they are with "
            f"{ledger.lessees(self._keys)}",
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
