"""Tasks as owners: what a lock asks of asyncio, and what it says.  The rest is in _task.h and _entrust.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import DeadlockError

if TYPE_CHECKING:
    from .._native import Mutex as _Half
else:
    _Half = object


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

    def _no_task(self) -> NoReturn:
        raise RuntimeError(f"{self.label}: only a task of a running asyncio loop can take it so")
