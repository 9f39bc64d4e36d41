"""The register of a lock in shared memory: see beside.py, and _register.h, which says who may write what."""

from __future__ import annotations

import os
import struct
import sys
from contextlib import suppress
from typing import Any, ClassVar

from .. import native
from ..process import start_of
from . import files
from .beside import HEAD_SIZE, ROOM_AT, Head, room

assert sys.platform == "linux"  # type checkers for other systems stop here

_MOST = 1 << 14
"""Processes that may be in at once: so much address space is mapped; the file is as long as it has to be."""


class Register(native.Register):
    """It, mapped."""

    ENTRANT: ClassVar[int] = 64
    SIZE: ClassVar[int] = 4096
    path: str
    segment: Any
    head: Head

    @classmethod
    def mapped(cls, path: str, fd: int, head: Head) -> Register:
        """It, of that open file, which it takes."""
        segment = native.Segment(fd, _SPAN, _SPAN)
        segment.close()
        made = cls(segment)
        made.path, made.segment, made.head = path, segment, head
        return made

    def grow(self) -> None:
        """By the owner of the mutex: room for twice as many. Raises: OSError: if there is none; nothing has changed."""
        size = os.stat(self.path).st_size
        if size >= _SPAN:
            raise OSError(f"{self.path}: more than {_MOST} processes at once")
        fd = files.open_checked(self.path)
        try:
            os.posix_fallocate(fd, size, min(size, _SPAN - size))
            struct.pack_into("=I", memoryview(self.segment), ROOM_AT, room(self.ENTRANT, os.fstat(fd).st_size))
        finally:
            os.close(fd)

    def unlink(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def living(self) -> list[tuple[int, int, int]]:
        """As counts(), of the processes that live."""
        return [one for one in self.counts() if start_of(one[0]) == one[1]]

    def free(self) -> int:
        """Permits that no living process has, as far as can be seen without the lock."""
        return max(0, self.head.value - sum(count for _, _, count in self.living()))


_SPAN = HEAD_SIZE + _MOST * Register.ENTRANT
