"""The register beside a cell in shared memory: which processes are in, and how many times each; see _register.h.

    <resource's file>~<offset of its cell>.<inode of the file>.register

The inode, so that who still has a file that has lost its name does not put its register in the place of another's.  A
head, written before the file gets its name, which is checked before anything in it is used; then a record for each
process.  It is made, opened and enlarged by the owner of the mutex, and goes with the resource's file.
"""

from __future__ import annotations

import os
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .. import native
from ..errors import IncompatibleError
from . import files

assert sys.platform == "linux"  # type checkers for other systems stop here

MAGIC = b"\x93coheldR"
_HEAD = struct.Struct("=8sIIQQ36s12xQQIIII16x")
_ENTRANT = 64
_PAGE = 4096
_MOST = 1 << 14
"""Processes that may be in at once: so much address space is mapped; the file is as long as it has to be."""
_SPAN = _HEAD.size + _MOST * _ENTRANT


@dataclass(frozen=True)
class Head:
    """What stands first in a register.  device, inode: of the resource's file.  value: permits, or 0: of readers."""

    device: int
    inode: int
    boot: bytes
    value: int

    def pack(self) -> bytes:
        room = _room(_PAGE)
        who = self.device, self.inode, self.boot
        return _HEAD.pack(MAGIC, native.LAYOUT_VERSION, _ENTRANT, *who, self.value, self.value, 0, room, 0, 0)


def _room(size: int) -> int:
    """Records in a file of so many bytes."""
    return min(_MOST, (size - _HEAD.size) // _ENTRANT)


class Register(native.Register):
    """A register, mapped."""

    path: str
    segment: Any
    head: Head

    def grow(self) -> None:
        """By the owner of the mutex: room for twice as many. Raises: OSError: if there is none; nothing has changed."""
        memory = memoryview(self.segment)
        size = os.stat(self.path).st_size
        if size >= _SPAN:
            raise OSError(f"{self.path}: more than {_MOST} processes at once")
        fd = files.open_checked(self.path)
        try:
            os.posix_fallocate(fd, size, min(size, _SPAN - size))
            struct.pack_into("=I", memory, _ROOM_AT, _room(os.fstat(fd).st_size))
        finally:
            os.close(fd)

    def unlink(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def free(self) -> int:
        """Permits that nobody has, as far as can be seen without the lock."""
        found: int = struct.unpack_from("=Q", self.segment, _FREE_AT)[0]
        return found


_VALUE_AT = 80
_FREE_AT = _VALUE_AT + 8
_ROOM_AT = _FREE_AT + 12


def opened(segment: Any, offset: int, value: int = 0) -> Register:
    """By the owner of the mutex: the register of the cell at that place, made if it is missing.

    Raises: IncompatibleError: if it is damaged, or of another value.  OSError: if there is no room for it.
    """
    path, here = _place(segment, offset, value)
    with suppress(FileNotFoundError):
        register = _checked(path, here)
        if register.head.value != value:
            raise IncompatibleError(f"{path}: {_meant(register.head.value)}, here {_meant(value)}", resource=path)
        return register
    with files.new_file(os.path.dirname(path), _PAGE, here) as (made, fd):
        register = _mapped(path, fd, here)
        os.rename(made, path)
    return register


def existing(segment: Any, offset: int) -> Register | None:
    """The same, whatever its value; None: there is none."""
    with suppress(FileNotFoundError):
        return _checked(*_place(segment, offset, 0))
    return None


def _place(segment: Any, offset: int, value: int) -> tuple[str, Head]:
    device, inode = segment.identity
    return f"{segment.path}~{offset}.{inode:x}.register", Head(device, inode, files.boot_id(), value)


def _checked(path: str, here: Head) -> Register:
    """Raises: FileNotFoundError: if there is none, or one of a resource that is no more."""
    fd = files.open_checked(path)
    try:
        raw, size = os.pread(fd, _HEAD.size, 0), os.fstat(fd).st_size
        if len(raw) < _HEAD.size or raw[:8] != MAGIC:
            raise IncompatibleError(f"{path} is damaged; if nobody uses it, remove the file", resource=path)
        _, layout, entrant, device, inode, boot, value, _, used, room, *_ = _HEAD.unpack(raw)
        if (layout, entrant) != (native.LAYOUT_VERSION, _ENTRANT):
            raise IncompatibleError(f"{path} has layout {layout}, here {native.LAYOUT_VERSION}", resource=path)
        if (device, inode, boot) != (here.device, here.inode, here.boot):
            raise FileNotFoundError
        if not used <= room <= _room(size):
            raise IncompatibleError(f"{path} is damaged; if nobody uses it, remove the file", resource=path)
    except BaseException:
        os.close(fd)
        raise
    return _mapped(path, fd, Head(device, inode, boot, value))


def _meant(value: int) -> str:
    return f"a semaphore of {value} permits" if value else "an object whose methods read"


def _mapped(path: str, fd: int, head: Head) -> Register:
    segment = native.Segment(fd, _SPAN, _SPAN)
    segment.close()
    register = Register(segment)
    register.path, register.segment, register.head = path, segment, head
    return register
