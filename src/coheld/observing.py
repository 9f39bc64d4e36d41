"""Who hears of locks that are taken and given back, in this process: counters, tracers, the check of their order.

An observer is called in the thread, and while the task runs, that has just got the first level of a lock, when it owns
it; and by whoever has given the last level back, when others may have it already: nobody waits for what an observer
does after a release, and everybody for what it does after an acquire.  Readers, and what a Semaphore is made of, are
not heard of.  A guard that is false, and wait_for, give the lock back while they wait, and are heard of as such.

    a death             a thread or task that ends with a lock has not given it back: nobody says released, and the next
                        owner's acquired may be the first news of it
    a forked child      has the observers of its parent, and owns nothing: what its parent held is never released in it.
                        What an observer knows of held locks it forgets by itself: os.register_at_fork
    start, stop         a lock that was taken before start may be released after it
    an exception        of an observer is written to the log, the first of each, and lost: the call goes on
    an interrupt        a KeyboardInterrupt (whatever is no Exception) of a signal's handler that comes in an observer
                        goes on to the caller: an acquire then does not hold the lock, and says released of it; a
                        release has given it back.  An Exception that a handler raises in there counts as the observer's
    a lock              that an observer takes itself is not heard of

Nobody observes: one look at a word, where a lock is taken.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from . import native
from .process import at_fork

if TYPE_CHECKING:
    from .backends.base import Handle


class Observer(Protocol):
    """What start takes.  Its methods must be quick, and may be called by several threads at once.

    It may have two more: ``recovered(lock)``: the caller has just taken it over from an owner that died; acquired comes
    after that, as what the dead one left is put right in between.  ``timed_out(lock)``: the caller has waited in vain,
    for as long as it was ready to; a try is no wait.
    """

    def acquired(self, lock: Handle, waited: float) -> None:
        """The caller has just got the first level of the lock, which is what ``obj.__lock__`` is.  waited: seconds from
        the first try, that failed; 0.0 if it was free."""

    def released(self, lock: Handle) -> None:
        """The caller has just given the last level back."""


class _Process:
    """Of this process.  observers: those that are told now; replaced under the guard, never changed."""

    def __init__(self) -> None:
        self.observers: tuple[Observer, ...] = ()
        self.failed: list[Observer] = []
        self.parts: weakref.WeakSet[Handle] = weakref.WeakSet()
        self.classes: weakref.WeakKeyDictionary[Handle, type] = weakref.WeakKeyDictionary()
        self.begin()

    def begin(self) -> None:
        self.guard = threading.Lock()  # a forked child must not inherit it locked


class _Telling(threading.local):
    """What this thread tells its observers now."""

    busy = once = False


_process = _Process()
_telling = _Telling()
at_fork(child=_process.begin)


def start(observer: Observer) -> None:
    """The observer is told of every lock of this process from now on; once, however often it is started.

    Raises: TypeError: if it has no methods acquired and released.
    """
    for method in ("acquired", "released"):
        if not callable(getattr(observer, method, None)):
            raise TypeError(f"{type(observer).__name__} is no observer: it has no method {method}")
    with _process.guard:
        _tell_these([*(one for one in _process.observers if one is not observer), observer])


def stop(observer: Observer) -> None:
    """It is told no more; a thread that is in it may still be when this returns.  Nothing happens if it is not told."""
    with _process.guard:
        _tell_these([one for one in _process.observers if one is not observer])
        _process.failed = [one for one in _process.failed if one is not observer]


def once() -> bool:
    """For acquired(): was it a try, which would not have waited?"""
    return _telling.once


def class_of(lock: Handle) -> type | None:
    """The class of the object by which the lock was taken last; None: by none, or before somebody observed."""
    return _process.classes.get(lock)


def leave_out(*locks: Handle) -> None:
    """They are parts of something else, and nobody hears of them."""
    _process.parts.update(locks)


def _tell_these(chosen: list[Observer]) -> None:
    _process.observers = tuple(chosen)
    native.observe(bool(chosen))


# -- by a lock ---------------------------------------------------------------------------------------------------------


def observed() -> bool:
    """Does anybody hear?"""
    return bool(_process.observers)


def taken(lock: Handle, obj: object, waited: float, tried: bool) -> None:
    """By the owner of its first level.  obj: by which it was taken, or None."""
    if obj is not None and class_of(lock) is not type(obj) and lock not in _process.parts:
        _process.classes[lock] = type(obj)
    _tell(lock, lambda observer: observer.acquired(lock, waited), tried)


def given(lock: Handle) -> None:
    """By who has given its last level back."""
    _tell(lock, lambda observer: observer.released(lock))


def recovered(lock: Handle) -> None:
    """By who has it from an owner that died."""
    _tell(lock, lambda observer: getattr(observer, "recovered", _ignore)(lock))


def timed_out(lock: Handle) -> None:
    """By who has waited for it in vain."""
    _tell(lock, lambda observer: getattr(observer, "timed_out", _ignore)(lock))


def _ignore(_lock: Handle) -> None:
    """What an observer without that method does."""


def _tell(lock: Handle, call: Callable[[Observer], None], tried: bool = False) -> None:
    """All of them.  What one takes itself meanwhile is not heard of."""
    if _telling.busy or lock in _process.parts:
        return
    try:
        _telling.busy, _telling.once = True, tried
        for one in _process.observers:
            try:
                call(one)
            except Exception:
                _complain(one)
    finally:
        _telling.busy = False


def _complain(observer: Any) -> None:
    """By who has just caught what it raised."""
    with _process.guard:
        new = all(one is not observer for one in _process.failed)
        if new:
            _process.failed.append(observer)
    if new:
        logging.getLogger("coheld").exception("the observer %r has raised; it will not be said again", observer)
