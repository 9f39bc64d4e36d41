"""A semaphore's permits where files guard its locks; _permits.h is its twin in C, and says why it is so."""

from __future__ import annotations

from time import monotonic
from typing import Any

from .. import waiting


class Permits:
    """Of one semaphore.  mutex: guards the register.  gate: held by the one that waits for a permit."""

    def __init__(self, mutex: Any, gate: Any, value: int) -> None:
        self._mutex, self._gate, self._value = mutex, gate, value

    def _enter(self, seconds: float) -> Any:
        """Take the lock, for a moment; the register, or None: not within that time."""
        if not self._mutex.acquire(timeout=seconds):
            return None
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
        return self._gate._owner() is None if self._gate.attached else True

    def _try(self, seconds: float = 0) -> int | None:
        """None: a permit is taken; the epoch that the next release moves on: none was free; False: another has the lock
        for longer than that."""
        register = self._enter(seconds)
        if register is None:
            return False
        try:
            if register.take():
                return None
            if self._mutex._record()[0] > 1:  # whose caller has it already, and a signal's handler: look again soon
                return int(self._mutex._place().epoch)
            return int(self._mutex._suspend(False))
        finally:
            if self._mutex._mine():
                self._mutex.release()

    def take(self, seconds: float, steps: Any, patience: Any) -> bool:
        """By a thread: a permit within that time? steps: of who has the gate, until a deadline, with that patience."""
        deadline = waiting.FOREVER if seconds == waiting.FOREVER else monotonic() + seconds
        if (not seconds or self._idle()) and self._try(waiting.moments(deadline)) is None:
            return True
        begun = patience()
        if not seconds or not self._gate.acquire(timeout=None if seconds == waiting.FOREVER else seconds):
            return False
        try:
            return bool(waiting.run(steps(deadline, begun), self._mutex))
        finally:
            self._gate.release()

    def give(self, count: int, seconds: float) -> int | None:
        """So many back, if this process has them. How many it had; None: another has the lock for longer than that."""
        register = self._enter(seconds)
        if register is None:
            return None
        try:
            held: int = register.give(count)
            return held
        finally:
            self._mutex.release()
