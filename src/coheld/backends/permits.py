"""A semaphore's permits where files guard its locks; _permits.h is its twin in C, and says why it is so."""

from __future__ import annotations

from contextlib import suppress
from time import monotonic
from typing import Any

from .. import waiting
from ..errors import LockTimeout
from .base import Handle
from .polled import Polled

_MOMENTS = 0.1
"""Who tries once waits so long for the lock of the register, which all have for moments, seconds."""


class Permits:
    """Of one semaphore.  mutex: guards the register.  gate: held by the one that waits for a permit."""

    def __init__(self, mutex: Polled, gate: Handle, value: int) -> None:
        self._mutex, self._gate, self._value = mutex, gate, value

    def _enter(self, deadline: float) -> Any:
        """Take the lock, for a moment; the register. Raises: LockTimeout."""
        if not self._mutex.acquire(timeout=max(waiting.left(deadline), _MOMENTS)):
            self._mutex._timed_out(_MOMENTS)
        try:
            if self._mutex.readers is None:
                self._mutex._open_register(self._value)
            return self._mutex.readers
        except BaseException:
            self._mutex.release()
            raise

    def _open(self) -> None:
        """Its register is mapped from here on."""
        self._enter(waiting.FOREVER)
        self._mutex.release()

    def _idle(self) -> bool:
        """Does nobody wait?"""
        return self._gate.owner() is None if self._gate.attached else True

    def _try(self, deadline: float = 0) -> int | None:
        """None: a permit is taken; or the epoch that the next release moves on: none was free."""
        register = self._enter(deadline)
        try:
            if register.take():
                return None
            if self._mutex._record()[0] > 1:  # in a signal's handler, which came in the middle of one of these
                return int(self._mutex._place().epoch)
            return self._mutex._suspend(False)
        finally:
            if self._mutex._mine():
                self._mutex.release()

    def take(self, seconds: float, steps: Any) -> bool:
        """By a thread: a permit within that time? steps: of who has the gate, until a deadline."""
        deadline = waiting.FOREVER if seconds == waiting.FOREVER else monotonic() + seconds
        if (not seconds or self._idle()) and self._took(deadline):
            return True
        if not seconds or not self._gate.acquire(timeout=None if seconds == waiting.FOREVER else seconds):
            return False
        try:
            return bool(waiting.run(steps(deadline), self._mutex))
        finally:
            self._gate.release()

    def _took(self, deadline: float) -> bool:
        with suppress(LockTimeout):
            return self._try(deadline) is None
        return False

    def give(self, count: int) -> int:
        """So many back, if this process has them. How many it had."""
        register = self._enter(waiting.FOREVER)
        try:
            held: int = register.give(count)
            return held
        finally:
            self._mutex.release()
