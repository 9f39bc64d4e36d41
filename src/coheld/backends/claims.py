"""Who in this process has a lock that a file guards: claims of its threads and tasks, and the descriptors of its
guards.

A thread's claim, or that of a task of asyncio, stands in the lock's table from its first try to its release;
dict.setdefault puts it there in one step, so one of the process tries for the file at a time.  A claim is given up by

    release                     the thread, or task, itself
    the end of the thread       its Thread goes with its thread-local variables, and says so to each lock that it held:
                                the guard is let go with the record still saying that it is held, so whoever comes next,
                                here or in another process, finds an owner that died
    the end of the task, or of  the task says so when it is done, and who waits in this process looks whether its loop
    its loop                    is closed; the same as of a thread
    an interrupt                that came between two steps of a try: the next try of the same thread inherits the claim

and whoever may follow a claim that is dead is settled by setdefault again, in its heir.

A forked child owns nothing.  It has its parent's descriptors, and a file's lock belongs to the open file: closed, they
leave the parent's lock as it is; kept, they would keep it locked when the parent dies; unlocked, they would unlock it.
So the child closes them first of all, and none is opened while a thread forks.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from filelock import lock_descriptor, unlock_descriptor

from ..errors import BackendError
from ..process import at_fork, start_of
from . import waiters
from .tasking import current_task


class _Process:
    """What belongs to this process alone."""

    def __init__(self) -> None:
        self.forks = self.copies = 0
        self.descriptors: set[int] = set()
        self.opening = threading.RLock()
        self.begin()

    def begin(self) -> None:
        self.pid = os.getpid()
        self.start = start_of(self.pid) or 0
        self.local = threading.local()
        self.tasks: weakref.WeakKeyDictionary[Any, Caller] = weakref.WeakKeyDictionary()

    def prepare(self) -> None:
        self.opening.acquire()
        self.copies += 1

    def stay(self) -> None:
        self.opening.release()

    def become_child(self) -> None:
        inherited, self.descriptors = self.descriptors, set()
        for fd in inherited:
            os.close(fd)
        self.forks += 1
        self.opening = threading.RLock()
        self.begin()


_process = _Process()
at_fork(before=_process.prepare, parent=_process.stay, child=_process.become_child)


def forks() -> int:
    """How many forks are behind this process."""
    return _process.forks


def copies() -> int:
    """The same, and how many this process has made since: what is older than the last one, a child has too."""
    return _process.copies


class Caller:
    """A thread, as long as it runs: nothing but its thread-local variables refers to it.  Or a task."""

    def __init__(self, task: Any = None) -> None:
        self.task = None if task is None else weakref.ref(task)
        self.address = 0 if task is None else id(task)
        self.pid = _process.pid
        self.who = self.pid, _process.start, threading.get_native_id()
        self.mark = object()
        self.held: dict[Any, Claim] = {}  # and keeps locks that it holds from being forgotten

    def __del__(self) -> None:
        self.end()

    def end(self, *_: object) -> None:
        """It has ended."""
        if self.held and self.pid == os.getpid():  # in a forked child those of its parent have not ended
            for claim in list(self.held.values()):
                claim.die()


def this_thread() -> Caller:
    """The thread that calls."""
    try:
        return _process.local.thread  # type: ignore[no-any-return]
    except AttributeError:
        made = _process.local.thread = Caller()
        waiters.of_this_thread()  # others are to know its name
        return made


def this_caller() -> Caller:
    """The task that calls, or where none runs the thread."""
    task = current_task()
    return this_thread() if task is None else of_task(task)


def of_task(task: Any) -> Caller:
    """A task as a caller; for the first time by itself."""
    if (caller := _process.tasks.get(task)) is None:
        caller = _process.tasks[task] = Caller(task)
        task.add_done_callback(caller.end)
    return caller


class Claim:
    """One caller's hold of a lock, or its try for it.  It does not refer to the caller, whose end is to be seen."""

    __slots__ = ("cell", "dead", "depth", "fd", "heir", "held", "leaving", "locked", "mark", "segment", "task", "told")

    def __init__(self, caller: Caller, segment: Any, cell: Any) -> None:
        self.mark, self.held, self.task = caller.mark, caller.held, caller.task
        self.segment, self.cell = segment, cell
        self.depth = 0
        self.fd: int | None = None
        self.locked = self.dead = self.leaving = False
        self.told = False  # observers have heard that it has the lock
        self.heir: dict[int, Claim] = {}

    def over(self, mark: object) -> bool:
        """May the thread of that mark follow it?"""
        return self.dead or (self.mark is mark and (self.leaving or not self.depth))

    def inherit(self, other: Claim) -> None:
        """Have the guard of a claim that an interrupt has left."""
        if not other.dead:
            self.fd, self.locked, other.fd = other.fd, other.locked, None
            if other.leaving and other.locked:  # else it had cleared it, and the record may be another process's
                self.cell.depth = 0

    def guard(self, open_it: Callable[[], int]) -> bool:
        """Lock the guard's file; False: another process has it. Never blocks. Raises: OSError: as open_it."""
        if not self.locked:
            if self.fd is None:
                self.fd = open_guard(open_it)
            try:
                got = lock_descriptor(self.fd, blocking=False)
            except OSError:
                if not self._was_inherited():
                    raise
                got = False
            self.locked = got and not self._was_inherited()
        return self.locked

    def _was_inherited(self) -> bool:
        """Has a signal's handler had the guard meanwhile?  It is through with it then, and has closed it."""
        return self.fd is None

    def let_go(self) -> None:
        """Give the guard back: unlocked while it is still known, so that an interrupt leaves no lock to nobody."""
        self.locked = False  # first: who inherits it from here on does not rely on it
        if self.fd is not None:
            try:
                unlock_descriptor(self.fd)
            except OSError:
                if not self._was_inherited():
                    raise
            fd, self.fd = self.fd, None
            if fd is not None:
                close_guard(fd)

    def owner_task(self) -> Any:
        """The task that has it, if one has and lives; one that is gone has died."""
        if self.is_abandoned():
            self.die()
            return None
        return self.task() if self.task is not None else None

    def is_abandoned(self) -> bool:
        """Has a task had it to its end, or to that of its loop?"""
        if self.task is None:
            return False
        task = self.task()
        return task is None or task.done() or task.get_loop().is_closed()

    def die(self) -> None:
        """Its thread or task has ended."""
        self.let_go()
        self.dead = True


def open_guard(open_it: Callable[[], int]) -> int:
    """A descriptor that no forked child keeps."""
    with _process.opening:
        fd = open_it()
        _process.descriptors.add(fd)
    return fd


def close_guard(fd: int) -> None:
    """It is unlocked already: a child may be closing its own only now."""
    _process.descriptors.discard(fd)
    os.close(fd)


@contextmanager
def briefly(open_it: Callable[[], int], path: str) -> Iterator[int]:
    """A file's lock that all have for moments only; blocks for a second at most.

    Raises: BackendError: if it is not to be had: who has it was stopped.  OSError: as open_it.
    """
    fd = open_guard(open_it)
    deadline = time.monotonic() + 1.0
    try:
        while not lock_descriptor(fd, blocking=False):
            if time.monotonic() > deadline:
                raise BackendError(f"{path} is kept locked by a process that does not go on", resource=path)
            time.sleep(0.001)
        yield fd
    finally:
        unlock_descriptor(fd)
        close_guard(fd)
