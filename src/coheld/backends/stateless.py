"""The monitor of a lock that has no state beside it: it excludes and recovers; what needs a state, or a wake, it
refuses by name instead of doing half of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from .. import native
from ..errors import IncompatibleError

T = TypeVar("T")


class Stateless:
    """A part of a Handle, before Handle itself.  Nothing can be pending here, so there is nothing to commit, to undo or
    to drop, and an atomic call is one like any other."""

    __slots__ = ()
    view: Any = None
    pending: bool = False
    version: int = 0
    task: None = None
    readers: None = None

    def _refuse_stateless(self, what: str) -> NoReturn:
        label: str = self.label  # type: ignore[attr-defined]  # Handle's
        remedy = f"which does not run here: {native.missing}" if native.missing else "which is the backend shm:"
        raise IncompatibleError(f"{label} is a lock of files: {what} needs the native mutex, {remedy}", resource=label)

    def _task_take(self, _obj: object, _method: bytes, _patient: bool) -> NoReturn:
        self._refuse_stateless("a task that is to own it")

    def _thread_reads(self, _obj: object, _method: str, _timeout: float | None) -> NoReturn:
        self._refuse_stateless("exclusive=False")

    def _commit(self) -> None:
        pass

    def _discard(self) -> None:
        pass

    def _enter_atomic(self) -> None:
        pass

    def _leave_atomic(self, _saved: Any, _succeeded: bool) -> None:
        pass

    def _await_guard(self, _guard: Callable[[Any], object], _obj: object, _deadline: float, _timeout: float) -> None:
        self._refuse_stateless("when=")

    def wait_for(self, _obj: object, _predicate: Callable[[], T], _timeout: float | None) -> T:
        self._refuse_stateless("wait_for")
