"""A look at all resources of this user, by one who uses none of them: files are read, never mapped, made or locked.

What is half made, foreign, damaged or on its way out is passed over; what is read while somebody writes it is a hint,
as every look at a cell is.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from .. import native
from ..owner import Owner
from ..process import start_of
from . import beside, files
from .record import CELL_SIZE, Cell

_NATIVE = struct.Struct("=I40xIQQ8xQQII32s8xQI")
"""The words of a cell in _lock.h that are looked at here."""
_NATIVE_SIZE, _MAGIC_AT, _MAGIC, _CELL_MAGIC = 256, 248, struct.Struct("=I"), 0x6C6C6543
_TASKED, _TID, _PID_BITS = 32, 0x3FFF_FFFF, 22
_CHUNK = re.compile(r"chunk-\d+\Z")
_MOST = 1 << 28
"""Of a file that is larger no more is read, bytes."""


@dataclass(frozen=True)
class Resource:
    """One resource, as it was a moment ago.

    name: None for an anonymous one.  kind: "lock" or "semaphore".  backend: the scheme of its URL.  place: its file and
    offset.  holder: who has it, if that lives.  waiters: how many wait, killed ones may be among them.  acquisitions,
    contended, recoveries: as in Statistics.  inside: the processes that read it or have permits of it: number and
    count.  permits: how many a semaphore has.
    """

    name: str | None
    kind: str
    backend: str
    place: str
    holder: Owner | None = None
    waiters: int = 0
    acquisitions: int = 0
    contended: int = 0
    recoveries: int = 0
    inside: dict[int, int] = field(default_factory=dict)
    permits: int | None = None

    @property
    def busy(self) -> bool:
        """Does anybody have it, or wait for it?"""
        return bool(self.holder or self.waiters or self.inside)


def survey(directory: str) -> Iterator[Resource]:
    """All that are there; blocks for nothing but the file system."""
    with suppress(OSError):
        for entry in sorted(os.listdir(directory)):
            path = os.path.join(directory, entry)
            if entry.startswith("cells-"):
                for chunk in filter(_CHUNK.match, _listed(path)):
                    yield from _in_file(os.path.join(path, chunk))
            elif entry.startswith(("name-", "arena-")) and "~" not in entry:
                yield from _in_file(path)


def _listed(directory: str) -> list[str]:
    with suppress(OSError):
        return os.listdir(directory)
    return []


def _in_file(path: str) -> Iterator[Resource]:
    with suppress(OSError, ValueError, struct.error):
        raw, inode = _read(path)
        header = files.header_of(raw)
        if header is None:
            return
        backend, name = _text(header.backend), _text(header.name) if header.kind != files.ARENA else None
        kind = "semaphore" if header.kind == files.SEMAPHORE else "lock"
        beside_it = {entry.partition("~")[2].partition(".")[0] for entry in _registers(path)}
        for offset, cell in _CELLS.get(backend, _none)(raw, name is not None):
            known = str(offset) in beside_it
            inside, permits = _register(beside.path_of(path, offset, inode)) if known else ({}, None)
            yield Resource(name, kind, backend, f"{path}:{offset}", *cell, inside, permits)


def _registers(path: str) -> list[str]:
    """To open one for each of many cells, and find that there is none, takes long."""
    directory, name = os.path.split(path)
    return [entry for entry in _listed(directory) if entry.startswith(f"{name}~") and entry.endswith(".register")]


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


def _read(path: str) -> tuple[bytes, int]:
    """Its bytes and its inode. Raises: OSError: also if it is no plain file of this user's."""
    fd = os.open(path, os.O_RDONLY | files.CAREFULLY)
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is no plain file")
        files.check_owner(path, found)
        return file.read(_MOST), found.st_ino


_Looked = tuple[Owner | None, int, int, int, int]
"""Holder, waiters, acquisitions, contended, recoveries."""


def _native_cells(raw: bytes, named: bool) -> Iterator[tuple[int, _Looked]]:
    magic = _MAGIC.pack(_CELL_MAGIC)
    for offset in [files.NAMED_CELL] if named else range(native.HEADER_SIZE, len(raw) - _NATIVE_SIZE + 1, _NATIVE_SIZE):
        if raw[offset + _MAGIC_AT : offset + _MAGIC_AT + len(magic)] == magic:
            yield offset, _native_cell(raw, offset)


def _native_cell(raw: bytes, offset: int) -> _Looked:
    word, flags, waiters, taken, since, who, tid, depth, method, contended, recoveries = _NATIVE.unpack_from(
        raw, offset
    )
    owner = None
    if depth and (word & _TID or flags & _TASKED):
        owner = _living(who & (1 << _PID_BITS) - 1, who >> _PID_BITS, tid, _text(method), since, depth)
    return owner, waiters & 0xFFFF_FFFF, taken, contended, recoveries


def _file_cells(raw: bytes, named: bool) -> Iterator[tuple[int, _Looked]]:
    for offset in [files.NAMED_CELL] if named else range(native.HEADER_SIZE, len(raw), CELL_SIZE):
        if len(raw) >= offset + CELL_SIZE and (cell := Cell(raw, offset)).sane():
            owner = _living(*cell.owner(), cell.since, cell.depth) if cell.depth else None
            yield offset, (owner, len(cell.waiters()), cell.acquisitions, cell.contended, cell.recoveries)


def _none(_raw: bytes, _named: bool) -> Iterator[tuple[int, _Looked]]:
    return iter(())


_CELLS = {"shm": _native_cells, "file": _file_cells}


def _living(pid: int, start: int, tid: int, method: str, since: int, depth: int) -> Owner | None:
    owner = Owner(pid, start, tid, method, since / 1e9, depth)
    return owner if owner.alive() else None


def _register(path: str) -> tuple[dict[int, int], int | None]:
    """Who reads, or has permits, and how many permits there are."""
    with suppress(OSError, ValueError, struct.error):
        raw, _ = _read(path)
        value, counts = beside.contents(raw)
        return {pid: count for pid, start, count in counts if start_of(pid) == start}, value or None
    return {}, None
