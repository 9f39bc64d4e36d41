"""What _native exports, in Python: for where there is no C extension.

What it cannot give: an interrupt may land between two bytecodes of ours, after a lock is taken and before the call
that it was taken for has begun. The lock then stays with its thread until that releases it, or ends.
"""

from __future__ import annotations

from operator import index
from time import monotonic
from types import MethodType
from typing import Any

from .errors import NotOwnerError
from .process import at_fork
from .waiting import FOREVER, patience, seconds_of

RECOVERING, REMOVED, CREATED, WARDED, GUARDED, READERS = 1, 2, 4, 8, 16, 64
LAYOUT_VERSION, HEADER_SIZE = 1, 4096
_MISSING: Any = object()


class _Installed:
    """What lockable.py has given."""

    handle_type: Any = ()
    not_initialized: Any = None
    reduce_locked: Any = None
    forks = 0


def install(handle_type: Any, not_initialized: Any, reduce_locked: Any, /) -> None:
    """Once, by lockable."""
    _Installed.handle_type = handle_type
    _Installed.not_initialized = staticmethod(not_initialized)
    _Installed.reduce_locked = staticmethod(reduce_locked)


def hang(obj: object, lock: object, /) -> None:
    """obj.__lock__ = lock, past any __setattr__ (frozen dataclasses, proxies)."""
    object.__setattr__(obj, "__lock__", lock)


def peek(obj: object, /) -> Any:
    """What its __lock__ is, or None; without its __getattr__."""
    try:
        return object.__getattribute__(obj, "__lock__")
    except AttributeError:
        return None


def lock_of(obj: object, /) -> Any:
    """Its lock, or NotInitializedError."""
    lock = peek(obj)
    if isinstance(lock, _Installed.handle_type):
        return lock
    return _Installed.not_initialized(obj)


def task_enter(obj: object, method: bytes, /) -> Any:
    """Its lock, which the running task has taken; None: it is not free."""
    lock = lock_of(obj)
    return lock if lock._task_take(obj, method, True) else None


def delist(_memory: object, _offset: int, /) -> None:
    """No thread waits in C here."""


def enlist(_memory: object = None, _offset: int = 0, /) -> None:
    """Of use to waits in C alone."""


def tell_after(_seconds: float, /) -> None:
    """Waits are told of where they are: backends/polled.py."""


def observe(_on: bool, /) -> None:
    """Locks of files look whether there are observers: backends/polled.py."""


def generation() -> int:
    """How many forks are behind this process."""
    return _Installed.forks


def _count_fork() -> None:
    _Installed.forks += 1


at_fork(child=_count_fork)


class LockableBase:
    """acquire, release and with of Lockable."""

    __slots__ = ()

    def acquire(self, blocking: bool = True, timeout: float | None = None, *, block: bool = _MISSING) -> bool:
        """Take the lock; True if it is held now, False if it could not be had.

        Blocks the calling thread for at most timeout seconds (None: for ever; zero or less: tries once), on the
        monotonic clock; with blocking=False it tries once and timeout is not looked at. The owner may take it again
        and must release it as often. A signal's handler runs at once; if it raises, the lock is not held.
        """
        wait = patience(blocking, timeout) if block is _MISSING else patience(block, timeout)
        return bool(lock_of(self)._take(self, "", None if wait == FOREVER else wait))

    def release(self) -> None:
        """Give one level of the lock back; never blocks.

        Raises NotOwnerError, an AssertionError and a RuntimeError, if the calling thread does not hold it.
        """
        lock_of(self).release()

    def __enter__(self) -> Any:
        lock_of(self)._take(self, "", None)
        return self

    def __exit__(self, *_exception: object) -> None:
        lock_of(self).release()


class SemaphoreBase:
    """acquire, release and with of Semaphore."""

    def acquire(self, blocking: bool = True, timeout: float | None = None, *, block: bool = _MISSING) -> bool:
        """Take a permit; True if this process has one more now, False if none was to be had.

        Blocks the calling thread for at most timeout seconds (None: for ever; zero or less: tries once), on the
        monotonic clock; with blocking=False it tries once and timeout is not looked at. Those who wait have their turn.
        A signal's handler runs at once; if it raises, no permit was taken.
        """
        wait = patience(blocking, timeout) if block is _MISSING else patience(block, timeout)
        return bool(self._take(wait))

    def release(self, n: int = 1) -> None:
        """Give n of this process's permits back; any thread or task of it may. Never waits for another's work.

        Raises PermitError, a ValueError, if this process holds fewer; nothing has changed then.
        """
        if (count := index(n)) < 1:
            raise ValueError(f"n must be one or more, not {count}")
        self._give(count)

    def __enter__(self) -> Any:
        self._take(FOREVER)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._give(1)

    def _take(self, seconds: float) -> bool:
        raise NotImplementedError

    def _give(self, count: int) -> None:
        raise NotImplementedError


class Field:
    """A field whose value all copies of the object share: number index of a schema's."""

    def __init__(self, schema: Any, index: int, name: str, _kinds: int, /) -> None:
        self.schema, self.index, self.__name__ = schema, index, name

    def __get__(self, obj: object, _type: type | None = None) -> Any:
        return self if obj is None else self.schema._get(lock_of(obj), self.index, obj)

    def __set__(self, obj: object, value: object) -> None:
        self.schema._set(lock_of(obj), self.index, value, obj)

    def __delete__(self, _obj: object) -> None:
        raise AttributeError(f"the shared field {self.__name__!r} cannot be deleted")

    def __repr__(self) -> str:
        return f"<shared field {self.__name__}>"


def _release_after(lock: Any, error: BaseException) -> None:
    """What the call raised is what the caller sees, or the context of what the commit raises."""
    try:
        lock.release()
    except NotOwnerError:
        pass
    except BaseException as newer:
        newer.__context__ = error
        raise


class LockedMethod:
    """LockedMethod(func, timeout, label): func, called under the lock of its first argument.

    What it does not have itself, it has from the function: __code__, __annotations__, __closure__ …; but it does not
    claim to be a function: what ships functions by value would then ship the method without its lock.
    """

    __slots__ = (
        *("__dict__", "__weakref__"),
        *("_atomic", "_exclusive", "_func", "_guard", "_label", "_timeout", "_wait"),
    )

    def __init__(
        self, func: Any, timeout: Any, label: bytes, guard: Any = None, atomic: bool = False, exclusive: bool = True, /
    ) -> None:
        wait = seconds_of(timeout)
        self._guard, self._atomic, self._exclusive = guard, atomic, exclusive
        self._func, self._timeout, self._label = func, timeout, label.decode(errors="ignore")
        self._wait = None if wait == FOREVER else wait

    @property
    def timeout(self) -> Any:
        """Seconds to wait for the lock, or None."""
        return self._timeout

    @property
    def when(self) -> Any:
        """What must hold before the call, or None."""
        return self._guard

    @property
    def atomic(self) -> bool:
        """Does an exception undo what the call changed?"""
        return self._atomic

    @property
    def exclusive(self) -> bool:
        """Alone, or together with others that read?"""
        return self._exclusive

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if not args:
            raise TypeError(f"{self!r} must be called with its instance as the first argument")
        lock = lock_of(args[0])
        if not self._exclusive:
            return self._read(lock, *args, **kwargs)
        deadline = FOREVER if self._wait is None else monotonic() + self._wait
        if not lock._take(args[0], self._label, self._wait):
            lock._timed_out(self._timeout)
        try:
            if self._guard is not None:
                lock._await_guard(self._guard, args[0], deadline, self._timeout)
            call = self._call_atomically if self._atomic else self._func
            result = call(*args, **kwargs)
        except BaseException as error:
            _release_after(lock, error)
            raise
        lock.release()
        return result

    def _read(self, lock: Any, /, *args: Any, **kwargs: Any) -> Any:
        how = lock._thread_reads(args[0], self._label, self._wait)
        if how is None:
            lock._timed_out(self._timeout)
        try:
            return self._func(*args, **kwargs)
        finally:
            if how is lock:
                lock.release()
            else:
                how.leave()

    def _call_atomically(self, obj: object, /, *args: Any, **kwargs: Any) -> Any:
        lock, succeeded = lock_of(obj), False
        level = lock.atomic
        try:
            saved = lock._enter_atomic()
        except BaseException:
            lock._break_atomic(level)
            raise
        try:
            result = self._func(obj, *args, **kwargs)
            succeeded = True
        finally:
            try:
                lock._leave_atomic(saved, succeeded)
            except BaseException:
                lock._break_atomic(level)
                raise
        return result

    def __get__(self, obj: object, _type: type | None = None) -> Any:
        return self if obj is None else MethodType(self, obj)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_func"), name)

    def __repr__(self) -> str:
        return f"<locked {self._func!r}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Installed.reduce_locked(self, protocol)
