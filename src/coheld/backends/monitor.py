"""Guards, waits and atomic calls of a lock: what makes a monitor of it.  Written once, over a few methods of each
backend."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from .. import native, waiting
from ..errors import DeadlockError, LockTimeout

if TYPE_CHECKING:
    from .._native import Mutex as _Half
else:
    _Half = object

T = TypeVar("T")


class Monitor(_Half):
    """A part of Handle.  Its half has _mine, _suspend, _sleep, _resume, _commit, _discard, _put and view, pending,
    atomic, guarding, creating, version."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def label(self) -> str: ...

    def _is_created(self) -> bool:
        """The flag says so, or there is a commit: its maker was killed between that and the flag, or it is of a class
        that had no __create__ yet."""
        return bool(self.flags & native.CREATED or self.version)

    def _run_creation(self, hook: Callable[[Any], object], obj: object) -> None:
        """One that raises has made nothing, and is begun anew by the next."""
        outermost = self._record()[0] == 1
        try:
            saved = self._enter_atomic()
            succeeded, self.creating = False, True
            try:
                hook(obj)
                succeeded = True
            finally:
                self.creating = False
                self._leave_atomic(saved, succeeded)
            self._commit_creation()
        except BaseException:
            if outermost:  # a signal's handler may have raised between the steps: no part of it may be committed as if
                self._discard()  # it were an ordinary change
            raise

    def _commit_creation(self) -> None:
        """What __create__ has assigned, and that it has: one step, so that it is never done twice."""
        if self.pending:
            try:
                self.view._commit(made=True)
                self._commit()  # what a signal's handler has changed meanwhile
            finally:
                self._discard()  # nothing, where that has not raised

    def _await_guard(self, guard: Callable[[Any], object], obj: object, deadline: float, timeout: float) -> None:
        """By the owner, before the call: wait until the guard holds, without the lock.  Where this raises, the lock may
        be held or not."""
        waiting.run(self._guard_steps(guard, obj, deadline, timeout), self)

    def _guard_steps(
        self, guard: Callable[[Any], object], obj: object, deadline: float, timeout: float | None
    ) -> waiting.Steps[None]:
        if self._record()[0] > 1:
            if not self._look_at(guard, obj):
                raise DeadlockError(
                    f"{self.label}: the guard of a nested call is false, and who could make it true waits for us: "
                    "call it without the lock, or use coheld.wait_for",
                    resource=self.label,
                )
            return
        try:
            yield from waiting.until(self, obj, lambda: self._look_at(guard, obj), deadline, keep=False)
        except waiting.NotSo:
            raise self._not_so("its guard was false", timeout or 0) from None

    def wait_for(self, obj: object, predicate: Callable[[], T], timeout: float | None) -> T:
        """See coheld.wait_for."""
        return waiting.run(self._wait_steps(obj, predicate, timeout), self)

    def _wait_steps(self, obj: object, predicate: Callable[[], T], timeout: float | None) -> waiting.Steps[T]:
        deadline = monotonic() + waiting.seconds_of(timeout)
        atomic = self.atomic  # others begin at 0 meanwhile, and so does who takes the lock back
        destroyed = False
        try:
            return (yield from waiting.until(self, obj, lambda: self._look_or_commit(predicate), deadline, keep=True))
        except waiting.NotSo:
            raise self._not_so("what was waited for did not come", timeout or 0) from None
        except GeneratorExit:  # the collector may run in a call of another, who owns the lock now
            destroyed = True
            raise
        finally:
            if not destroyed and self._mine():
                self.atomic = atomic

    def _look_at(self, predicate: Callable[..., T], *args: object) -> T:
        before = self.guarding
        try:
            self.guarding = True
            return predicate(*args)
        finally:
            self.guarding = before

    def _look_or_commit(self, predicate: Callable[[], T]) -> T:
        """Before the lock is given up, what was changed so far becomes visible: whoever is waited for needs it."""
        value = self._look_at(predicate)
        if not value and self.creating:
            raise DeadlockError(
                f"{self.label}: wait_for inside of __create__: nobody else may have it before it has its first state",
                resource=self.label,
            )
        if not value and self.pending:
            if self.atomic and self.view._has_changed():
                raise DeadlockError(
                    f"{self.label}: wait_for inside of an atomic call that has changed something: others would see "
                    "what may have to be undone",
                    resource=self.label,
                )
            self._commit()
        return value

    def _enter_atomic(self) -> Any:
        self.atomic += 1
        return self.view._save() if self.pending else None

    def _leave_atomic(self, saved: Any, succeeded: bool) -> None:
        self.atomic -= 1
        if succeeded:
            return
        if saved is None:
            self._discard()
            return
        try:
            self.view._undo(saved)
        except BaseException:
            self._discard()  # half undone is worse than undone too much
            raise

    def _break_atomic(self, level: int) -> None:
        """An exception (of a signal's handler) has come where an atomic call was about to begin, or to be undone:
        undone too much is better than half of it committed."""
        if self._mine():
            self.atomic = level
            self._discard()

    def _not_so(self, what: str, timeout: float) -> LockTimeout:
        return LockTimeout(f"{self.label}: {what} for {float(timeout):g} s", resource=self.label, waited=float(timeout))
