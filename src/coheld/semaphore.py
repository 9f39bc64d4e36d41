"""Semaphore: a number of permits that threads, tasks and processes share."""

from __future__ import annotations

import _thread
import copy
import logging
import sys
from operator import index
from time import monotonic
from typing import Any, NoReturn, Self

from . import native, observing, waiting
from .backends import backend_of, files, permits
from .errors import BackendError, IncompatibleError, LeaseLostError, NotInitializedError, PermitError

MOST = 10_000
_SLICE = 0.02
"""How long who waits sleeps at most before it looks whether those who hold permits live, seconds."""


class Semaphore(native.SemaphoreBase):
    """So many permits, for all threads, tasks and processes that have a copy of it.

    A permit belongs to the process that took it: any thread or task of it may give it back, and a forked child holds
    none. When a process ends, however it ends, its permits are free again within 50 ms for those who wait. Without a
    name it reaches other processes by fork, spawn or pickle; with one any process of this user finds it. Those who
    wait have their turn about in the order in which they came.

    At a store (redis://…) all hosts find it. Permits are had for a lease there, which is renewed: other hosts have
    those of a dead process when it ends, and a process that was stopped for longer has lost them, see coheld.lost.
    Acquire and release ask the store, and raise BackendError if it is away; what is given back then, a thread gives
    back once it is there. Release raises LeaseLostError, once for each permit that was lost.

    ``with semaphore:``, ``async with semaphore:``, acquire and release; coheld.aio.acquire for a task, with a time-out.

    value: how many permits there are, 1 to 10,000; one by default, as in threading.  name, backend: as lock_name and
    lock_backend of Lockable.

    Raises: TypeError, ValueError: if value is no such number, or name or backend is none.  IncompatibleError: if what
    has that name has another value, or is no semaphore.  OSError: if there is no room for it.  BackendError: if a store
    cannot be asked.
    """

    def __init__(self, value: int = 1, name: str | None = None, backend: str | None = None) -> None:
        if isinstance(value, bool) or not hasattr(type(value), "__index__"):
            raise TypeError(f"value must be a number of permits, not {type(value).__name__}")
        value = index(value)
        if not 1 <= value <= MOST:
            raise ValueError(f"value must be 1 to {MOST:,} permits, not {value}")
        if name is None and backend is not None:
            raise TypeError("backend needs a name: anonymous semaphores live in this machine's memory")
        place = backend_of(backend)
        if name is not None:
            files.check_name(name)
        self._value = value
        self._have(*place.semaphore(name))
        if (found := self._found()) != value:
            raise IncompatibleError(
                f"semaphore {self._lock.label} has {found} permits, not {value}", resource=self._lock.label
            )

    _lock: Any = None
    _gate_lock: Any = None
    _permits: Any = None

    def _have(self, mutex: Any, gate: Any) -> None:
        """These are its locks.  Who counts is the C of this object where they are native, else permits.py."""
        self._lock, self._gate_lock = mutex, gate
        observing.leave_out(mutex, gate)
        if mutex.far:
            from .roll import FarPermits  # with the shared state

            self._permits = FarPermits(mutex, gate, self._value)
        elif native.missing or not isinstance(mutex, native.Mutex):
            self._permits = permits.Permits(mutex, gate, self._value)
        else:
            self._bind(mutex, gate)

    @property
    def _counts(self) -> Any:
        """Who has _try, _idle and _open."""
        return self if self._permits is None else self._permits

    def _found(self) -> int:
        """How many permits there are by what is there, which this is a part of from here on."""
        if self._lock.far:
            return int(self._permits.open())
        self._counts._open()
        return int(self._lock.readers.head.value)

    @property
    def value(self) -> int:
        """How many permits there are, free or not."""
        self._check_initialized()
        return self._value

    def free(self) -> int:
        """How many permits nobody holds; a look without a lock, so it may be a moment old. Never blocks, but for a
        question to the store where one has it, which may raise BackendError."""
        self._check_initialized()
        if self._lock.far:
            return int(self._permits.free())
        if self._lock.readers is None:
            self._counts._open()
        free: int = self._lock.readers.free()
        return free

    async def __aenter__(self) -> Self:
        """Take a permit without blocking the loop; see coheld.aio.acquire."""
        from . import aio

        await aio.acquire(self)
        return self

    async def __aexit__(self, kind: type[BaseException] | None = None, *_exception: object) -> None:
        """Give it back without blocking the loop: a thread does it where another keeps the register, or a store."""
        if self._lock is None or not self._lock.far or kind is GeneratorExit:
            self._give_soon()
            return
        from . import aio

        await aio.by_thread(self._lock, self.release)

    def __repr__(self) -> str:
        if self._lock is None or not (self._lock.attached if self._lock.far else self._lock.readers):
            return f"<{type(self).__name__}, not attached>"
        if self._lock.far:  # who looks at it may be a debugger
            return f"<{type(self).__name__} {self._lock.label}: {self._value} permits>"
        return f"<{type(self).__name__} {self._lock.label}: {self.free()} of {self._value} free>"

    def __copy__(self) -> Semaphore:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Semaphore:
        """A new one without a name, as Lockable's; whatever arguments its class takes."""
        self._check_initialized()
        made = memo[id(self)] = type(self).__new__(type(self))
        Semaphore.__init__(made, self._value)
        made.__dict__.update(copy.deepcopy(self._own(), memo))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        self._check_initialized()
        return _rebuild, (type(self), self._lock, self._gate_lock, self._value), self._own()

    def _own(self) -> dict[str, Any]:
        """Its attributes, but for those of this class."""
        return {name: value for name, value in self.__dict__.items() if name not in _BOUND}

    def _open_register(self) -> None:
        """By the owner of the mutex."""
        self._lock._open_register(self._value)

    def _patience(self) -> waiting.Patience:
        """Of one who begins to wait; in the queue for the gate he says nothing, as who has that has no permit."""
        return waiting.telling(self._lock, self._permits.why_not if self._lock.far else self._lock._why_not)

    def _steps(self, deadline: float, patience: waiting.Patience) -> waiting.Steps[bool]:
        """By who has the gate: a permit by the deadline?"""
        if self._lock.far:
            return bool((yield from self._permits.steps(deadline, patience)))
        while (epoch := (yield waiting.Attempt(self, deadline))) is not None:
            if monotonic() >= deadline:
                return False
            patience.look()
            if epoch is not False:
                yield waiting.Sleep(epoch, min(deadline, monotonic() + _SLICE), deadline < waiting.FOREVER)
        return True

    def _take(self, seconds: float) -> bool:
        """By the half in C, where this is not native: a permit within that time?"""
        self._check_initialized()
        taken: bool = self._counts.take(seconds, self._steps, self._patience)
        return taken

    def _give(self, count: int, seconds: float = waiting.FOREVER) -> bool:
        """The same; False: another has the register for longer than that."""
        if sys.is_finalizing():  # a generator that nobody has ended: modules go now, and the process gives it back
            return True
        self._check_initialized()
        held = self._counts.give(count, seconds)
        if held is not None and held < count:
            self._not_held((held, count))
        return held is not None

    def _give_soon(self) -> None:
        """A permit, by who cannot wait for the register.  Never blocks, but where no thread is to be had."""
        self._check_initialized()
        if not (self._give_at_once() if self._permits is None else self._give(1, 0)):
            try:
                _thread.start_new_thread(self._give_later, ())  # threading's own start waits for the thread
            except RuntimeError:
                self.release()

    def _give_later(self) -> None:
        """By a thread that nobody waits for."""
        try:
            self.release()
        except (LeaseLostError, BackendError) as error:
            logging.getLogger("coheld").warning("%s", error)

    def _check_initialized(self) -> None:
        if self._lock is None:
            raise NotInitializedError(f"{type(self).__name__}: Semaphore.__init__ has not run")

    def _not_held(self, counts: tuple[int, int]) -> NoReturn:
        held, count = counts
        raise PermitError(
            f"semaphore {self._lock.label}: this process holds {held or 'no'} permit{'s' * (held > 1)}, and cannot "
            f"give {count} back",
            resource=self._lock.label,
        )


_BOUND = {"_lock", "_gate_lock", "_permits", "_value"}


def _rebuild(cls: type[Semaphore], mutex: Any, gate: Any, value: int) -> Semaphore:
    """Load a pickled semaphore. Never raises: what cannot be reached raises at the first call."""
    made = cls.__new__(cls)
    made._value = value
    made._have(mutex, gate)
    return made
