"""The register of a lock in shared memory: see beside.py, and _register.h, which says who may write what."""

from __future__ import annotations

import os
import struct
import sys
from typing import Any, ClassVar

from .. import native
from . import files
from .beside import HEAD_SIZE, ROOM_AT, Counting, Head, room

assert sys.platform == "linux"  # type checkers for other systems stop here

_MOST = 1 << 14
"""Processes that may be in at once: so much address space is mapped; the file is as long as it has to be."""


class Register(Counting, native.Register):
    """It, mapped."""

    ENTRANT: ClassVar[int] = 64
    SIZE: ClassVar[int] = 4096
    segment: Any

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


_SPAN = HEAD_SIZE + _MOST * Register.ENTRANT
