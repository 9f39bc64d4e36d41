"""The register of a lock that a file guards: see beside.py.

    count      of readers: the threads of the process, one at a time; with the lock of the file, or, once it is not 0,
               without; of permits: the owner of the lock
    the rest   the owner of the lock; of a dead process: all

A reader counts itself in with the lock, so no writer has it then; a writer looks at the counts with the lock, so nobody
comes in meanwhile, but for who is in already.  A dead process's count does not count: who looks asks the system.

A word is read and written as a whole, by an item of a memoryview.
"""

from __future__ import annotations

import mmap
import os
import threading
from typing import Any, ClassVar

from ..process import start_of
from . import claims
from .beside import HEAD_SIZE, Counting, Head

_WORDS = 4  # of a record: process, start, count, and one to spare


class Tally(Counting):
    """It, mapped."""

    ENTRANT: ClassVar[int] = 8 * _WORDS
    SIZE: ClassVar[int] = 5 * 4096

    @classmethod
    def mapped(cls, path: str, fd: int, head: Head) -> Tally:
        """It, of that open file, which it takes."""
        made = cls()
        try:
            made.map = mmap.mmap(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        made.path, made.head = path, head
        made.words = memoryview(made.map)[HEAD_SIZE : HEAD_SIZE + head.room * cls.ENTRANT].cast("Q")
        made._begin()
        return made

    map: Any
    words: memoryview[int]

    def _begin(self) -> None:
        """In this process."""
        self._forks, self._mine = claims.forks(), -1
        self._guard = threading.RLock()

    def _own(self) -> int:
        """Where this process's record is; below 0: it has none."""
        if self._forks != claims.forks():
            self._begin()
        return self._mine

    def _claim(self) -> int:
        """By the owner of the lock: a record for this process. Raises: OSError: if all are somebody's."""
        if (at := self._own()) >= 0:
            return at
        used, at = self._used(), self._find()
        if at < 0:
            at = next((at for at in used if not self._lives(at)), len(used) * _WORDS)
            if at >= len(self.words):
                raise OSError(f"{self.path}: more than {self.head.room} processes at once")
            self.words[at + 2] = 0
            pid, self.words[at + 1] = claims.this_thread().who[:2]
            self.words[at] = pid
        self._mine = at
        return at

    def _find(self) -> int:
        """This process's record, also one that it claimed by a handle that it has dropped; below 0: it has none."""
        me = claims.this_thread().who[:2]
        return next((at for at in self._used() if (self.words[at], self.words[at + 1]) == me), -1)

    def _used(self) -> range:
        """Where the records are that have ever been somebody's."""
        count, words = 0, self.words
        while count < len(words) and words[count]:
            count += _WORDS
        return range(0, count, _WORDS)

    def _lives(self, at: int) -> bool:
        pid = self.words[at]
        return bool(pid) and start_of(pid) == self.words[at + 1]

    # -- readers -------------------------------------------------------------------------------------------------------

    # A mark is set beside the count, without a call between, so that no signal's handler sees one without the other.

    def enter(self, mark: Any) -> None:
        """By the owner of the lock, or one who is in: this process has one reader more, which mark.counted says."""
        at = self._claim()
        with self._guard:
            self.words[at + 2] = self.words[at + 2] + 1
            mark.counted = True

    def leave(self, mark: Any) -> None:
        """One less, if the mark says that it is in: two threads may say so at once of a task whose loop is closed. In a
        child of a fork, which is not in: nothing."""
        at = self._own()
        with self._guard:
            if mark.counted and at >= 0 and self.words[at + 2]:
                self.words[at + 2] = self.words[at + 2] - 1
            mark.counted = False

    def here(self) -> bool:
        """Is this process in?"""
        return (at := self._own()) >= 0 and self.words[at + 2] > 0

    def busy(self) -> bool:
        """By the owner of the lock: is anybody in?"""
        return any(self.words[at + 2] and self._lives(at) for at in self._used())

    def counts(self) -> list[tuple[int, int, int]]:
        """Number, start and count of those that are in, as far as can be seen without the lock."""
        words = self.words
        return [(words[at], words[at + 1], words[at + 2]) for at in self._used() if words[at + 2]]

    # -- permits -------------------------------------------------------------------------------------------------------

    # A signal's handler may take one, or give one back, in the middle of these: but not between a last look and the
    # store after it, see stateful.py.

    def take(self) -> bool:
        """By the owner of the lock: a permit for this process, if one is free."""
        at, words = self._claim(), self.words
        while True:
            held = words[at + 2]
            if not self.free():
                return False
            if words[at + 2] == held:
                words[at + 2] = held + 1
                return True

    def give(self, count: int) -> int:
        """By the owner of the lock: so many back, if it has them. How many it had."""
        at, words = self._mine if self._own() >= 0 else self._find(), self.words
        held = words[at + 2] if at >= 0 else 0
        if held >= count:
            words[at + 2] = held - count
        return held
