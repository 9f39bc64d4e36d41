"""A look at all resources of this user, by one who uses none of them: files are read, never mapped, made or locked.

What is half made, foreign, damaged or on its way out is passed over; what is read while somebody writes it is a hint,
as every look at a cell is.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from .. import native
from ..owner import Owner
from ..process import start_of
from . import beside, files, waiters
from .classes import name_in
from .record import CELL_SIZE, Cell
from .waiters import Waiter

_NATIVE = struct.Struct("=I40xIQQ8xQQII32s8xQI12xQQ")
"""The words of a cell in _lock.h that are looked at here."""
_NATIVE_SIZE, _MAGIC_AT, _MAGIC, _CELL_MAGIC = 256, 248, struct.Struct("=I"), 0x6C6C6543
_TASKED, _TID, _OWNER_DIED, _PID_BITS, _LEFT = 32, 0x3FFF_FFFF, 1 << 30, 22, 3
_CHUNK = re.compile(r"chunk-\d+\Z")
_MOST = 1 << 28
"""Of a file that is larger no more is read, bytes."""


@dataclass(frozen=True)
class Resource:
    """One resource, as it was a moment ago.

    name: None for an anonymous one.  kind: "lock", "semaphore" or "pool"; one that nobody has had a lease of yet is a
    "lock".  backend: the scheme of its URL.  place: its file and offset.  holder: who has it, if that lives; of a pool:
    its ledger, for a moment.  waiters: how many wait, killed ones may be among them.  acquisitions, contended,
    recoveries: as in Statistics.  inside: the processes that read it, or have permits or leases of it: number and
    count.  permits: how many a semaphore has.  waiting: who waits for it, for its guards or for its readers, the oldest
    first; those whose wait has just begun may be missing.  class_name: of the object that an anonymous one was made
    for, with its module, the last 64 bytes; empty where it is not known.  store: the URL without secrets of a store on
    another host that has it; then all this is what this host knows: its own part.  Empty: it is local.
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
    waiting: tuple[Waiter, ...] = ()
    class_name: str = ""
    store: str = ""

    @property
    def called(self) -> str:
        """As commands name it: without a name, by its place."""
        if self.name is not None:
            return f"{self.name} at {self.store}" if self.store else self.name
        directory, place = os.path.split(self.place)
        return f"{os.path.basename(directory)}/{place}" if self.backend == "file" else place

    @property
    def label(self) -> str:
        """As messages name it."""
        if self.name is not None:
            return f"{self.name!r} at {self.store}" if self.store else repr(self.name)
        return f"anonymous lock {self.called}{f' of {self.class_name}' if self.class_name else ''}"

    @property
    def busy(self) -> bool:
        """Does anybody have it, or wait for it?"""
        return bool(self.holder or self.waiters or self.inside or self.waiting)

    @property
    def part(self) -> str:
        """What a process has of it that is inside."""
        return {"semaphore": "permit", "pool": "lease"}.get(self.kind, "reading call")


def survey(directory: str) -> Iterator[Resource]:
    """All that are there; blocks for nothing but the file system."""
    waits: dict[waiters.Cell, list[Waiter]] = {}
    for wait in sorted(waiters.all_waits(directory), key=lambda wait: wait.since):
        waits.setdefault(wait.cell, []).append(wait.told())
    entries, names = sorted(_listed(directory)), waiters.Names(directory)
    registers = _registers(entries)
    for entry in entries:
        path = os.path.join(directory, entry)
        if entry.startswith("cells-"):
            chunks = _listed(path)
            beside_chunks = _registers(chunks)
            for chunk in filter(_CHUNK.match, chunks):
                yield from _in_file(os.path.join(path, chunk), beside_chunks.get(chunk, ()), waits, names)
        elif entry.startswith(("name-", "arena-")) and "~" not in entry:
            yield from _in_file(path, registers.get(entry, ()), waits, names)


def _listed(directory: str) -> list[str]:
    with suppress(OSError):
        return os.listdir(directory)
    return []


def _registers(entries: list[str]) -> dict[str, set[str]]:
    """Of the files of a directory, by their names: the cells that have one.  To open one for each of many cells, and
    find that there is none, takes long; so does a look at the directory for each file."""
    found: dict[str, set[str]] = {}
    for entry in entries:
        file, beside_it, rest = entry.partition("~")
        if beside_it and rest.endswith(".register"):
            found.setdefault(file, set()).add(rest.partition(".")[0])
    return found


def _in_file(
    path: str, beside_it: Collection[str], waits: dict[waiters.Cell, list[Waiter]], names: waiters.Names
) -> Iterator[Resource]:
    """beside_it: the cells of it that have a register."""
    with suppress(OSError, ValueError, struct.error):
        raw, inode = _read(path)
        header = files.header_of(raw)
        if header is None:
            return
        backend = _BACKENDS.get(_text(header.backend), _NOWHERE)
        first, size = native.HEADER_SIZE, backend.cell_size
        for offset in [files.NAMED_CELL] if header.kind != files.ARENA else range(first, len(raw) - size + 1, size):
            if (found := backend.look(raw, offset)) is not None:
                register = beside.path_of(path, offset, inode) if str(offset) in beside_it else None
                cells = [(inode, offset), *(_gates(path, inode) if header.kind == files.SEMAPHORE else ())]
                waiting = [waiter for cell in cells for waiter in waits.get(cell, ())]
                holder = None if found[0] is None else names.tell(found[0], (inode, offset))
                if holder is not None and _is_elsewhere(header, path, inode):
                    waiting.insert(0, waiters.asking(holder))
                    holder = None
                one = _resource(header, path, offset, (holder, *found[1:]), register, waiting)
                number = backend.class_number(raw, offset) if one.name is None else 0
                yield replace(one, class_name=name_in(raw, number)) if number else one


def _is_elsewhere(header: files.Header, path: str, inode: int) -> bool:
    """Is it the local lock of one that a store has, and not this host's?"""
    if header.kind != files.NAMED or not files.where_and_name(_text(header.name))[0]:
        return False
    from . import memo  # few resources are in a store

    return not memo.is_here(memo.path_beside(path, inode))


def _gates(path: str, inode: int) -> Iterator[waiters.Cell]:
    """Where those wait who are not the first to get a permit: in the same file, or in one beside it."""
    yield inode, files.GATE_CELL
    with suppress(OSError):
        yield os.stat(f"{path}~gate").st_ino, files.NAMED_CELL


def cell_at(path: str, inode: int, offset: int) -> Resource | None:
    """One alone, and not who reads it or has permits; None: that file has no such cell, or is another by now."""
    with suppress(OSError, ValueError, struct.error), files.open_to_look(path) as file:
        header = files.header_of(file.read(files.HEADER_LENGTH))
        if header is None or os.fstat(file.fileno()).st_ino != inode:
            return None
        backend = _BACKENDS.get(_text(header.backend), _NOWHERE)
        file.seek(offset)
        found = backend.look(file.read(backend.cell_size), 0)
        return None if found is None else _resource(header, path, offset, found, None, [])
    return None


class _Paths:
    """Of files of cells, by their inodes; put there whole, as several threads look."""

    known: Mapping[int, str] = {}


def path_of(directory: str, inode: int) -> str | None:
    """Of the file of cells that has it; None: there is none (any more). One that was read a while ago may be another's
    by now, which cell_at finds out."""
    if (path := _Paths.known.get(inode)) is not None and os.path.exists(path):
        return path
    found: dict[int, str] = {}
    with suppress(OSError):
        for entry in os.scandir(directory):
            if entry.name.startswith("cells-"):
                chunks = [os.path.join(entry.path, chunk) for chunk in filter(_CHUNK.match, _listed(entry.path))]
            else:
                chunks = [entry.path] if entry.name.startswith(("name-", "arena-")) and "~" not in entry.name else []
            for chunk in chunks:
                with suppress(OSError):
                    found[entry.inode() if chunk == entry.path else os.stat(chunk).st_ino] = chunk
    _Paths.known = found
    return found.get(inode)


def word_of(one: Resource) -> int:
    """Of the cell of one that is there: which commit of its state is the last. Raises: OSError."""
    path, _, offset = one.place.rpartition(":")
    with files.open_to_look(path) as file:
        file.seek(int(offset) + _BACKENDS[one.backend].version_at)
        return int.from_bytes(file.read(8), sys.byteorder)


def _resource(
    header: files.Header, path: str, offset: int, found: _Looked, register: str | None, waiting: list[Waiter]
) -> Resource:
    store, name = files.where_and_name(_text(header.name))
    kind = "semaphore" if header.kind == files.SEMAPHORE else "lock"
    inside, permits = ({}, None) if register is None else _register(register)
    owner, counted, taken, contended, deaths = found
    named = sum(kind == "semaphore" or waiter.waits_for != "guard" for waiter in waiting)  # tasks: each
    return Resource(
        name=None if header.kind == files.ARENA else name,
        kind=kind,
        backend=store.partition(":")[0] or _text(header.backend),
        place=f"{path}:{offset}",
        holder=owner,
        waiters=max(counted, named),
        acquisitions=taken,
        contended=contended,
        recoveries=deaths,
        inside=inside,
        permits=permits,
        waiting=tuple(waiting),
        store=store,
    )


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


def _read(path: str) -> tuple[bytes, int]:
    """Its bytes and its inode. Raises: OSError: also if it is no plain file of this user's."""
    with files.open_to_look(path) as file:
        found = os.fstat(file.fileno())
        return file.read(min(found.st_size, _MOST)), found.st_ino  # room for _MOST is not asked for each time


_Looked = tuple[Owner | None, int, int, int, int]
"""Holder, waiters, acquisitions, contended, recoveries."""


def _native_cell(raw: bytes, offset: int) -> _Looked | None:
    if raw[offset + _MAGIC_AT : offset + _MAGIC_AT + _MAGIC.size] != _MAGIC.pack(_CELL_MAGIC):
        return None
    word, flags, waiting, taken, since, who, tid, depth, method, contended, recoveries, nonce, task = (
        _NATIVE.unpack_from(raw, offset)
    )
    owner, tasked = None, flags & _TASKED
    if depth and (not nonce & _LEFT if tasked else word & _TID == tid and not word & _OWNER_DIED):
        process = who & (1 << _PID_BITS) - 1, who >> _PID_BITS
        owner = _living(*process, tid, _text(method), since, depth, task if tasked else 0)
    return owner, waiting & 0xFFFF_FFFF, taken, contended, recoveries


def _file_cell(raw: bytes, offset: int) -> _Looked | None:
    if len(raw) < offset + CELL_SIZE or not (cell := Cell(raw, offset)).sane():
        return None
    owner = _living(*cell.owner(), cell.since, cell.depth, cell.task) if cell.depth else None
    return owner, len(cell.waiters()), cell.acquisitions, cell.contended, cell.recoveries


@dataclass(frozen=True)
class _Backend:
    cell_size: int
    look: Callable[[bytes, int], _Looked | None]
    class_at: int
    version_at: int

    def class_number(self, raw: bytes, offset: int) -> int:
        """Of the class of an anonymous lock, see classes.py."""
        return int.from_bytes(raw[offset + self.class_at : offset + self.class_at + 4], sys.byteorder)


_NOWHERE = _Backend(_NATIVE_SIZE, lambda _raw, _offset: None, 0, 0)
_BACKENDS = {
    "shm": _Backend(_NATIVE_SIZE, _native_cell, 176, 240),
    "file": _Backend(CELL_SIZE, _file_cell, 120, 24),
}


def _living(pid: int, start: int, tid: int, method: str, since: int, depth: int, task: int) -> Owner | None:
    owner = Owner(pid, start, tid, method, since / 1e9, depth, task)
    return owner if owner.alive() else None


def _register(path: str) -> tuple[dict[int, int], int | None]:
    """Who reads, or has permits, and how many permits there are."""
    with suppress(OSError, ValueError, struct.error):
        raw, _ = _read(path)
        value, counts = beside.contents(raw)
        return {pid: count for pid, start, count in counts if start_of(pid) == start}, value or None
    return {}, None
