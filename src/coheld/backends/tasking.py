"""Tasks as owners and as readers: what a lock asks of asyncio, and what it says.  The rest is in _task.h, _entrust.h
and _reading.h."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import DeadlockError
from ..process import at_fork

if TYPE_CHECKING:
    from .._native import Mutex as _Half
else:
    _Half = object


Readers = weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]]
"""Tasks of this process that read a lock, and how each call of theirs is in: an InTask (called.py, _reading.h), that
is counted out once, by leave(), or when its coroutine is gone."""

reading: weakref.WeakKeyDictionary[Any, Readers] = weakref.WeakKeyDictionary()
"""Of each lock.  Changed by the loop's thread alone for the tasks of that loop."""

at_fork(child=reading.clear)

when_closed: list[Callable[[], object]] = []
"""Called where a task was found that waits, of a loop that is closed."""


def running_loop() -> Any:
    """The loop of asyncio that runs in this thread, or None."""
    running = getattr(
        sys.modules.get("asyncio"), "_get_running_loop", None
    )  # not there while another thread imports it
    return running() if running else None


def current_task() -> Any:
    """The task of asyncio that runs in this thread, or None."""
    return sys.modules["asyncio"].current_task() if running_loop() else None


class Tasking(_Half):
    """A part of Handle."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def label(self) -> str: ...

    def _task_is_gone(self) -> bool:
        """Has the task of this process that owns it ended, or its loop been closed?"""
        task = self.task
        return bool(task is None or task.done() or task.get_loop().is_closed())

    def _entrusted(self, task: Any) -> None:
        """A task has it, and nothing but the task says when that ends: the end of the task is an owner's death."""
        task.remove_done_callback(self._task_bury)  # once is enough
        task.add_done_callback(self._task_bury)

    def _stuck(self) -> NoReturn:
        if (task := self.task) is None:
            raise DeadlockError(
                f"{self.label}: this thread holds it around the loop, and no task of the loop can wait for that: "
                "take it in the coroutine, with async with",
                resource=self.label,
            )
        raise DeadlockError(
            f"{self.label}: task {task.get_name()!r} of this thread's loop holds it, and cannot go on while this call "
            "blocks the loop: use async with or an async method, or call it by asyncio.to_thread",
            resource=self.label,
        )

    def _task_reads(self) -> bool:
        """Is the running task in a reading call?  Not by a register of a file that has lost its name since."""
        if (tasks := reading.get(self)) is None or (task := current_task()) is None:
            return False
        register, ins = self.readers, tasks.get(task, ())
        return register is not None and any(one.register is register for one in ins)

    def _reads_itself(self, this_thread: bool) -> bool:
        """By who is about to wait for readers, or for one who does; this process has some. this_thread: it is in one of
        its own calls.  False: nobody who could not go on meanwhile.  Raises: DeadlockError."""
        if this_thread or self._task_reads():
            raise DeadlockError(
                f"{self.label}: an exclusive call inside of a reading one would wait for that to end: make the outer "
                "one exclusive as well",
                resource=self.label,
            )
        here, readers = running_loop(), reading.get(self)
        if readers is None:
            return False
        tasks = [reference() for reference in readers.keyrefs()]  # in one step: those of other loops come and go
        for closed in (task for task in tasks if task is not None and task.get_loop().is_closed()):
            ins: Iterable[Any] = readers.pop(closed, ())  # as an owner's, its call has come to its end
            for one in list(ins):
                one.leave()
        if here is None:
            return False
        mine = (task for task in tasks if task is not None and task.get_loop() is here)
        stuck = next((task for task in mine if readers.get(task)), None)
        if stuck is not None:
            raise DeadlockError(
                f"{self.label}: task {stuck.get_name()!r} of this thread's loop is in a reading call, and cannot "
                "go on while this call blocks the loop: use an async method, or call it by asyncio.to_thread",
                resource=self.label,
            )
        return False

    def _no_task(self) -> NoReturn:
        raise RuntimeError(f"{self.label}: only a task of a running asyncio loop can take it so")
