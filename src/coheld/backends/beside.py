"""The file of a register: which processes are in, and how many times each; of a lock's readers, or of permits.

    <resource's file>~<offset of its cell>.<inode of the file>.register

The inode, so that who still has a file that has lost its name does not put its register in the place of another's.  A
head, written before the file gets its name, which is checked before anything in it is used; then a record for each
process: see register.py and tally.py.  It is made and opened by the owner of the lock, and goes with the resource's
file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .. import native
from ..errors import IncompatibleError
from ..process import start_of
from . import files

MAGIC = b"\x93coheldR"
_HEAD = struct.Struct("=8sIIQQ36s12xQQIIII16x")
HEAD_SIZE = _HEAD.size
ROOM_AT = 100


@dataclass(frozen=True)
class Head:
    """What stands first.  entrant: bytes of a record. device, inode: of the resource's file. value: permits, or 0: of
    readers. room: for how many records."""

    entrant: int
    device: int
    inode: int
    boot: bytes
    value: int
    room: int

    def pack(self) -> bytes:
        who = self.device, self.inode, self.boot
        return _HEAD.pack(MAGIC, native.LAYOUT_VERSION, self.entrant, *who, self.value, self.value, 0, self.room, 0, 0)


class Counting:
    """What every register says: Register and Tally have counts(), path and head, and this."""

    path: str
    head: Head

    if TYPE_CHECKING:

        def counts(self) -> list[tuple[int, int, int]]: ...

    def living(self) -> list[tuple[int, int, int]]:
        """As counts(), of the processes that live."""
        return [one for one in self.counts() if start_of(one[0]) == one[1]]

    def free(self) -> int:
        """Permits that no living process has, as far as can be seen without the lock."""
        return max(0, self.head.value - sum(count for _, _, count in self.living()))

    def unlink(self) -> None:
        """What cannot be removed, as on Windows while others map it, stays for the next sweep."""
        with suppress(OSError):
            os.unlink(self.path)


K = TypeVar("K")
"""What records look like, and how they are reached: Register or Tally, with ENTRANT, SIZE, mapped() and head."""


def room(entrant: int, size: int) -> int:
    """Records in a file of so many bytes."""
    return (size - HEAD_SIZE) // entrant


def opened(kind: type[K], segment: Any, offset: int, value: int) -> K:
    """By the owner of the lock: the register of the cell at that place, made if it is missing.

    Raises: IncompatibleError: if it is damaged, or of another value.  OSError: if there is no room for it.
    """
    path, here = _place(kind, segment, offset, value)
    with suppress(FileNotFoundError):
        found = _checked(kind, path, here)
        if found.head.value != value:
            raise IncompatibleError(f"{path}: {_meant(found.head.value)}, here {_meant(value)}", resource=path)
        there: K = found
        return there
    made: K = _made(kind, path, here)
    return made


def existing(kind: type[K], segment: Any, offset: int) -> K | None:
    """The same, whatever its value; None: there is none."""
    with suppress(FileNotFoundError):
        found: K = _checked(kind, *_place(kind, segment, offset, 0))
        return found
    return None


def _made(kind: Any, path: str, here: Head) -> Any:
    with files.new_file(os.path.dirname(path), kind.SIZE, here) as (aside, fd):
        register = kind.mapped(path, fd, here)
        os.replace(aside, path)
    return register


def _place(kind: Any, segment: Any, offset: int, value: int) -> tuple[str, Head]:
    device, inode = segment.identity
    here = Head(kind.ENTRANT, device, inode, files.boot_id(), value, room(kind.ENTRANT, kind.SIZE))
    return path_of(segment.path, offset, inode), here


def path_of(resource: str, offset: int, inode: int) -> str:
    return f"{resource}~{offset}.{inode:x}.register"


def contents(raw: bytes) -> tuple[int, list[tuple[int, int, int]]]:
    """By one who does not use it: its value, and number, start and count of those that are in.

    Raises: ValueError, struct.error: if it is damaged.
    """
    magic, layout, entrant, _, _, _, value, *_ = _HEAD.unpack_from(raw)
    if magic != MAGIC or layout != native.LAYOUT_VERSION or entrant not in _RECORDS:
        raise ValueError("no register")
    counts = []
    for at in range(HEAD_SIZE, len(raw) - entrant + 1, entrant):
        who, start, count = _RECORDS[entrant](raw, at)
        if not who:
            break
        if count:
            counts.append((who, start, count))
    return value, counts


def _packed(raw: bytes, at: int) -> tuple[int, int, int]:
    """Of register.py: number and start in one word, as in _lock.h."""
    who, count = _PACKED.unpack_from(raw, at)
    return who & (1 << 22) - 1, who >> 22, count


_PACKED, _PLAIN = struct.Struct("=QI"), struct.Struct("=QQQ")
_RECORDS: dict[int, Callable[[bytes, int], tuple[int, int, int]]] = {64: _packed, 32: _PLAIN.unpack_from}


def _checked(kind: Any, path: str, here: Head) -> Any:
    """Raises: FileNotFoundError: if there is none, or one of a resource that is no more."""
    fd = files.open_checked(path)
    try:
        raw, size = os.read(fd, HEAD_SIZE), os.fstat(fd).st_size
        if len(raw) < HEAD_SIZE or raw[:8] != MAGIC:
            raise _damaged(path)
        _, layout, entrant, device, inode, boot, value, _, used, there, *_ = _HEAD.unpack(raw)
        if (layout, entrant) != (native.LAYOUT_VERSION, here.entrant):
            raise IncompatibleError(f"{path} has layout {layout}, here {native.LAYOUT_VERSION}", resource=path)
        if (device, inode, boot) != (here.device, here.inode, here.boot):
            raise FileNotFoundError
        if not used <= there <= room(entrant, size):
            raise _damaged(path)
    except BaseException:
        os.close(fd)
        raise
    return kind.mapped(path, fd, Head(entrant, device, inode, boot, value, there))


def _damaged(path: str) -> IncompatibleError:
    return IncompatibleError(f"{path} is damaged; if nobody uses it, remove the file", resource=path)


def _meant(value: int) -> str:
    return f"a semaphore of {value} permits" if value else "an object whose methods read"
