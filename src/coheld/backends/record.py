"""The cell of a lock that a file guards: what its owner writes for others to see, in mapped memory.

flags           RECOVERING, REMOVED, CREATED, WARDED, GUARDED, as in _lock.h.  Written by the owner only.
owner record    since, pid, start, tid, method, task, depth: written by the owner only.  task is that one's address;
                0: a thread.  depth is the last written at entry and the first cleared at exit: where it is 0 no body is
                running.  So whoever takes the file's lock and finds it above 0 has found an owner that died: it would
                have cleared it before it let go.
counters        written by the owner only.
class_number    of an anonymous lock, see classes.py.  Written by its maker.
epoch           counts the releases that found GUARDED: who waits for a guard looks at it.  Written by the owner only.
version         the word of the shared state, see _state.h and state/slots.py.  Written by the owner only.
waiters         a slot for each waiting thread, which it claims by itself.  Two may claim one at once, and the
                first finds that out at its next look: hints, like everything else here, to all but the owner.
                Who waits for a guard, and not for the lock, has one that says since 0.

A word is read and written as a whole, by an item of a memoryview: that is one load or store of its size.  (struct
zeroes what it packs into first: others would see that.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from ..process import start_of

CELL_SIZE = 1024
_MAGIC = 0x6C6C6543
_SLOTS, _FIRST_SLOT = 24, 256
_LABEL_SIZE = 32

Who = tuple[int, int, int]
"""Process, its start, thread."""
Record = tuple[int, int, int, str]
"""The same, and the method."""


class _Word32:
    """A word of a cell, at that offset of it."""

    def __init__(self, offset: int) -> None:
        self.index = offset // 4

    def __get__(self, cell: Cell, _owner: Any = None) -> Any:
        return cell.words32[self.index]

    def __set__(self, cell: Cell, value: int) -> None:
        cell.words32[self.index] = value


class _Word64:
    """A longer one."""

    def __init__(self, offset: int) -> None:
        self.index = offset // 8

    def __get__(self, cell: Cell, _owner: Any = None) -> Any:
        return cell.words64[self.index]

    def __set__(self, cell: Cell, value: int) -> None:
        cell.words64[self.index] = value


_RECORD = struct.Struct(f"QQQ{_LABEL_SIZE}s")
_SLOT = struct.Struct("QQQQ")
_NO_SLOTS = bytes(_SLOTS * _SLOT.size)
_OWNER, _DEAD = 32, 128


class Cell:
    """One cell of a map."""

    magic = _Word32(0)
    flags = _Word32(4)
    depth = _Word32(8)
    epoch = _Word32(12)
    since = _Word64(16)
    version = _Word64(24)
    task = _Word64(88)
    acquisitions = _Word64(96)
    contended = _Word64(104)
    recoveries = _Word64(112)
    class_number = _Word32(120)

    def __init__(self, where: Any, offset: int) -> None:
        self.map, self.offset = where, offset
        part = memoryview(where)[offset : offset + CELL_SIZE]
        self.words32, self.words64 = part.cast("I"), part.cast("Q")

    def make(self) -> None:
        """Begin anew: nobody has it."""
        self.map[self.offset : self.offset + CELL_SIZE] = bytes(CELL_SIZE)
        self.magic = _MAGIC

    def renew(self) -> None:
        """By the owner: it has no past any more, and others go on with it.  Its state is as if never committed, but by
        a word that none of them has seen."""
        self.version = (self.version + 1) & (1 << 48) - 1
        self.flags = 0
        self.acquisitions = self.contended = self.recoveries = 0

    def sane(self) -> bool:
        """Is this what make() made?"""
        return bool(self.magic == _MAGIC)

    def owner(self) -> Record:
        return self._record(_OWNER)

    def dead(self) -> Record:
        return self._record(_DEAD)

    def _record(self, offset: int) -> Record:
        pid, start, tid, method = _RECORD.unpack_from(self.map, self.offset + offset)
        return pid, start, tid, method.rstrip(b"\0").decode(errors="ignore")

    def write_owner(self, who: Who, method: bytes, task: int) -> None:
        self.task = task
        _RECORD.pack_into(self.map, self.offset + _OWNER, *who, method)

    def bury(self) -> None:
        """The owner on record is dead: it is remembered."""
        at = self.offset + _OWNER
        record = self.map[at : at + _RECORD.size]
        self.map[self.offset + _DEAD : self.offset + _DEAD + _RECORD.size] = record

    # -- waiters -------------------------------------------------------------------------------------------------------

    def enrol(self, who: Who, since: int) -> None:
        """Have a slot: a free one, or a dead process's; who waits for the lock can have that of one who waits for a
        guard."""
        slots = list(self._slots())
        if any(found[:3] == who for _, found in slots):
            return
        places = [at for at, found in slots if not found[0]] or [
            at for at, found in slots if (since and not found[3]) or start_of(found[0]) != found[1]
        ]
        if places:
            _SLOT.pack_into(self.map, places[0], *who, since)

    def leave(self, who: Who) -> None:
        """Give it back."""
        for at, found in self._slots():
            if found[:3] == who:
                _SLOT.pack_into(self.map, at, 0, 0, 0, 0)

    def waiters(self) -> list[tuple[int, int, int, int]]:
        """Who waits for the lock and since when, ns; dead ones are left out."""
        return [found for found in self._living() if found[3]]

    def watchers(self) -> list[tuple[int, int, int, int]]:
        """The same for a guard, without a time."""
        return [found for found in self._living() if not found[3]]

    def _living(self) -> list[tuple[int, int, int, int]]:
        return [found for _, found in self._slots() if found[0] and start_of(found[0]) == found[1]]

    def waiting_since(self) -> int:
        """When the oldest wait on record began, ns; 0: none."""
        begin = self.offset + _FIRST_SLOT
        if self.map[begin : begin + len(_NO_SLOTS)] == _NO_SLOTS:
            return 0
        return min((found[3] for _, found in self._slots() if found[3]), default=0)

    def forget_waiters(self) -> None:
        """Those that live have a slot again at their next look."""
        begin = self.offset + _FIRST_SLOT
        self.map[begin : begin + len(_NO_SLOTS)] = _NO_SLOTS

    def forget_watchers(self) -> None:
        """The same of those who wait for a guard: killed ones have left theirs."""
        for at, found in self._slots():
            if found[0] and not found[3]:
                _SLOT.pack_into(self.map, at, 0, 0, 0, 0)

    def _slots(self) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
        begin = self.offset + _FIRST_SLOT
        slots = self.map[begin : begin + len(_NO_SLOTS)]
        for number, found in enumerate(_SLOT.iter_unpack(slots)):
            yield begin + number * _SLOT.size, found
