"""Pool: any free one of some resources, for as long as a lease lasts."""

from __future__ import annotations

import _thread
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from secrets import randbits
from time import monotonic
from typing import Any, Generic, TypeVar
from uuid import UUID

from . import native, waiting
from .backends import tasking
from .errors import CoheldError, LockTimeout, NotInitializedError, PermitError
from .lockable import Lockable
from .process import at_fork, start_of
from .state import shared, snapshot

R = TypeVar("R")
_SLICE = 0.05
"""How long who waits sleeps at most before it looks whether those who hold leases live, seconds."""
_MOMENTS = 0.1
"""For how long to wait for the ledger at least, which all have for moments, seconds."""


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


class _NotGot(LockTimeout):
    """The deadline has passed, and nothing of the request is left."""


class _Ledger(Lockable):
    """Who has what, and who waits for what, in the order in which they came.  A free resource goes to the first that it
    fits: each takes its own, and leaves what an earlier one could have."""

    leases: dict[str, _Lease] = shared(default_factory=dict)
    queue: list[_Request] = shared(default_factory=list)

    def serve(self, steps: waiting.Steps[str]) -> str:
        """By the owner, of a thread."""
        return waiting.run(steps, native.lock_of(self))

    def fitting(self, request: _Request) -> str | None:
        """By the owner: what the request may take now; all who are queued are before one that is not."""
        earlier: set[str] = set()
        for other in self.queue:
            if other.number == request.number:
                break
            earlier.update(other.keys)
        return next((key for key in request.keys if key not in self.leases and key not in earlier), None)

    def take(self, request: _Request) -> str | None:
        """By the owner: what the request has from now on; None: nothing yet."""
        if (key := self.fitting(request)) is not None:
            self.leases[key] = _Lease(request.number, request.pid, request.start)
            self.withdraw(request.number)
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

    @Lockable.locked(timeout=_MOMENTS)
    def forget(self, numbers: Collection[int]) -> None:
        """Nothing of the requests is left. Raises: LockTimeout: if who has the ledger does not go on."""
        self.keep(lambda one: one.number not in numbers)

    def bury(self) -> None:
        """By the owner: what dead processes, or lost requests of this one, had or waited for is nobody's."""
        _lost.note_waits()
        lost = set(_lost.numbers)
        owners: list[_Lease | _Request] = [*self.leases.values(), *self.queue]
        lives = {(one.pid, one.start): _lives(one) for one in owners}
        self.keep(lambda one: lives[one.pid, one.start] and one.number not in lost)

    def keep(self, stays: Callable[[_Lease | _Request], bool]) -> None:
        """By the owner: the others go."""
        for key in [key for key, one in self.leases.items() if not stays(one)]:
            del self.leases[key]
        self.queue[:] = [one for one in self.queue if stays(one)]

    def steps(self, request: _Request, deadline: float) -> waiting.Steps[str]:
        """By the owner: what the request has got.  One that does not wait is not queued.

        Raises: _NotGot: nothing, by the deadline.  LockTimeout: the ledger could not be had again, and is not held.
        """
        lock, queued = native.lock_of(self), False
        depth, _, (_, _, _, method) = lock._record()
        while (key := self.take(request)) is None:
            self.bury()
            if (key := self.take(request)) is not None:
                break
            if waiting.left(deadline) <= 0:
                self.withdraw(request.number)
                raise _NotGot
            if not queued:
                self.queue.append(request)
            if lock.pending:
                lock._commit()
            yield waiting.Sleep(lock._suspend(not queued), min(deadline, monotonic() + _SLICE))
            queued = True
            nested = depth > 1  # a signal's handler waits: the call that it came in goes on with the ledger
            again = waiting.FOREVER if nested else monotonic() + _moments(deadline)
            if not (yield waiting.Take(self, method, depth, again, keep=nested)):
                raise LockTimeout
        return key


def _lives(one: _Lease | _Request) -> bool:
    """Does its process?"""
    return start_of(one.pid) == one.start


def _me() -> tuple[int, int]:
    pid = os.getpid()
    return pid, start_of(pid) or 0


class _Lost:
    """Requests of this process that nobody can end any more: their coroutine was destroyed, or its loop closed while it
    waited, or their Lease dropped.

    Whoever finds that out may be collecting garbage, in the middle of anything: the same thread may have the ledger, or
    be about to change what stands in it.  So it only notes the number, and neither waits nor looks at the ledger.

    noted       who looks for what the dead had (bury), or what is free, passes it over from here on, in this process
    forgotten   it is taken out of the ledger, and committed: nobody anywhere is kept out by it.  A thread does that, at
                once, as others wait who know nothing of the note, and nobody else of this process may ever come again.
                It begins again until that is done, so the note goes last

    Why no note stays: busy is taken by who starts the thread, after the note, and given back by the thread, which then
    looks for notes once more: either finds what the other did.  Where no thread is to be had, the next note tries.

    ledgers     of all requests that a ledger may know of, by number.  What the collector has found to be garbage may
                be used no more: its weak references are gone.  So the ledger of a request is none until that ends
    waits       the loops of those that wait
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """In this process; a child of a fork has no requests."""
        self.ledgers: dict[int, _Ledger] = {}
        self.waits: dict[int, Any] = {}
        self.numbers: dict[int, None] = {}
        self.busy = threading.Lock()

    def begin_request(self, number: int, ledger: _Ledger) -> None:
        """By the owner of the ledger, before that knows of it."""
        if (task := tasking.current_task()) is not None:
            self.waits[number] = task.get_loop()
        self.ledgers[number] = ledger

    def note_waits(self) -> None:
        """Those of closed loops. Never blocks."""
        for number, loop in list(self.waits.items()):
            if loop.is_closed():
                self.note(number)

    def note(self, number: int) -> None:
        """Nothing where it has ended. Never blocks."""
        if number in self.ledgers and not sys.is_finalizing():
            self.numbers[number] = None
            self._begin_thread()

    def end(self, number: int) -> None:
        """Nothing of it is in the ledger."""
        self.waits.pop(number, None)
        self.ledgers.pop(number, None)
        self.numbers.pop(number, None)

    def _begin_thread(self) -> None:
        if self.busy.acquire(blocking=False):
            try:
                _thread.start_new_thread(self._start, ())  # threading's own start waits, for locks and for the thread
            except RuntimeError:
                self.busy.release()

    def _start(self) -> None:
        try:
            threading.Thread(target=self._run, name="coheld pool", daemon=True).start()
        except RuntimeError:
            self.busy.release()

    def _run(self) -> None:
        while self.numbers:
            self._forget_all()
        self.busy.release()
        if self.numbers:
            self._begin_thread()

    def _forget_all(self) -> None:
        """One try for each ledger: another's owner may have been stopped."""
        by_lock: dict[Any, dict[int, _Ledger]] = {}
        for number in list(self.numbers):
            if (ledger := self.ledgers.get(number)) is None:  # it has ended meanwhile
                self.end(number)
            else:
                by_lock.setdefault(native.lock_of(ledger), {})[number] = ledger
        for ledgers in by_lock.values():
            try:
                next(iter(ledgers.values())).forget(ledgers)
            except LockTimeout:
                continue
            except (CoheldError, OSError):
                pass  # there is no such ledger any more
            for number in ledgers:
                self.end(number)


_lost = _Lost()
at_fork(child=_lost.begin)
tasking.when_closed.append(_lost.note_waits)


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
    return max(waiting.left(deadline), _MOMENTS)


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

    _ledger: Any = None

    def lease(self, timeout: float | None = None, where: Callable[[R], object] | None = None) -> Lease[R]:
        """A context manager, with or async with, whose value is the resource; for one use.

        Entering it blocks the thread, or suspends the task, for at most timeout seconds (None: for ever; zero or less:
        tries once). where: which resources will do; asked once for each, here.

        Raises: TypeError, ValueError: if timeout is no number of seconds, or where fits none.  On entry, LockTimeout:
        if none was to be had in that time.
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
        """Those that nobody has; a look without a lock, so it may be a moment old. Never blocks."""
        self._check_initialized()
        leases = snapshot(self._ledger).leases
        leased = {key for key, lease in leases.items() if lease.number not in _lost.numbers and _lives(lease)}
        return [resource for key, resource in self._resources.items() if key not in leased]

    def __repr__(self) -> str:
        if self._ledger is None:
            return f"<{type(self).__name__}, not attached>"
        return f"<{type(self).__name__} {native.lock_of(self._ledger).label}: {len(self.free())} of {len(self)} free>"

    def _check_initialized(self) -> None:
        if self._ledger is None:
            raise NotInitializedError(f"{type(self).__name__}: Pool.__init__ has not run")


Pool.__module__ = "coheld"  # as its users know it


class Lease(Generic[R]):
    """One request of a pool, and what it got: see Pool.lease."""

    _number: int | None = None
    _key: str | None = None

    def __init__(self, pool: Pool[R], keys: list[str], seconds: float) -> None:
        self._pool, self._keys, self._seconds = pool, keys, seconds

    def __enter__(self) -> R:
        ledger, deadline = self._begin()
        serve = Lockable.locked(timeout=_moments(deadline))(_Ledger.serve)  # no interrupt comes between lock and body
        try:
            self._key = serve(ledger, self._steps(deadline))
            return self._got()
        except BaseException as error:
            if not self._is_over(error):
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
            except GeneratorExit:  # it is destroyed where it waits, without the ledger, which whoever runs now may have
                raise
            except BaseException:
                if native.lock_of(ledger)._mine():
                    ledger.release()
                raise
            ledger.release()
        except GeneratorExit:
            self._lose()
            raise
        except BaseException as error:
            if not self._is_over(error):
                await self._forget_in_task()
            raise self._said(error) from None
        return self._got()

    def __exit__(self, *_exception: object) -> None:
        _surely(self._give_back)

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
        ledger: _Ledger = self._pool._ledger
        _lost.begin_request(self._number, ledger)
        key = yield from ledger.steps(_Request(self._number, *_me(), self._keys), deadline)
        _lost.waits.pop(self._number, None)
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
                    finally:
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
            if not await aio.acquire(self._pool._ledger, _MOMENTS):
                self._lose()
                return
        except BaseException:
            self._lose()
            raise
        try:
            self._forget()
        finally:
            self._pool._ledger.release()

    def _is_over(self, error: BaseException) -> bool:
        """Does the ledger know nothing of the request that has failed?"""
        assert self._number is not None
        if isinstance(error, _NotGot):
            _lost.end(self._number)
        return self._number not in _lost.ledgers

    def _lose(self) -> None:
        """Nobody else ends it. Never blocks."""
        if self._number is not None:
            _lost.note(self._number)

    def _give_back(self) -> None:
        """Raises: PermitError."""
        if self._key is None or self._number is None or not self._pool._ledger.give_back(self._key, self._number):
            raise PermitError(f"{self._pool!r}: this process does not have the lease that it gives back")
        self._key = None
        _lost.end(self._number)

    def _forget(self) -> None:
        """Nothing of the request is left, or soon nothing is: who has the ledger may have been stopped."""
        assert self._number is not None
        try:
            self._pool._ledger.forget({self._number})
        except LockTimeout:
            self._lose()
        else:
            _lost.end(self._number)

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
