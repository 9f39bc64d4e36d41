"""Locks that files guard, for where there is no native mutex.

    name-<escaped name>            one named lock: its header and its cell; it is its own guard
    cells-<pid>-<start>-<random>/  the anonymous locks that one process made:
        chunk-<n>                      a header and cells, mapped; each is twice as large as the one before
        chunk-<n>.<offset>             the guard of one cell
        member-<pid>-<start>           a process that uses them
        gate                           locked for moments, by who joins or looks whether all have gone
    <the file of a cell>~<offset>.<generation>  the shared state of that lock, see state/store.py

The lock of a name's file is taken on a descriptor of its own each time, opened by the name: who finds that this leads
to another file than the mapped one has found a lock that was removed.

Why no directory goes that somebody uses: it goes only where every member is dead, seen under the gate.  Who joins has
the gate as well, and then finds the chunk, or that it is gone.  A forked child joins before anything else runs in it.
What Windows does not let go (a file that is open, or mapped) stays for the next sweep.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from .. import native
from ..errors import BackendError, CoheldError
from ..process import at_fork, start_of
from . import claims, files, leaving, waiters
from .base import Capabilities, Gatekeeping, Handle, gate, known
from .classes import Classes
from .polled import Polled
from .record import CELL_SIZE, Cell

SCHEME = "file"
CAPABILITIES = Capabilities(
    handoff_bound=None,
    wakes_without_polling=False,
    uninterruptible_entry=False,
    held_limit=None,
    files=True,
    leases=False,
    cohorts=False,
    handlers=True,
    readers=True,
    semaphores=True,
)
_FIRST_CHUNK = 1 << 16
_NAMED_SIZE = native.HEADER_SIZE
_MADE_BY = re.compile(r"(cells|\.new)-(\d+)-(\d+)-[0-9a-f]+\Z")
_MEMBER = re.compile(r"member-(\d+)-(\d+)\Z")


class Segment:
    """A mapped file of cells, once per file and process."""

    def __init__(self, path: str, fd: int) -> None:
        found = os.fstat(fd)
        self.path, self.identity = path, (found.st_dev, found.st_ino)
        self.map = mmap.mmap(fd, found.st_size)
        self.classes = Classes(self.map)


class Mutex(Polled):
    """A lock that a file guards."""

    __slots__ = ()


class Gate(Gatekeeping, Mutex):
    """What the one that waits for a permit of a semaphore holds."""

    __slots__ = ()


class _Process:
    """What belongs to this process alone."""

    def __init__(self) -> None:
        self.segments: weakref.WeakValueDictionary[str, Segment] = weakref.WeakValueDictionary()
        self.joined: set[str] = set()  # directories of cells that it uses
        self.begin()

    def begin(self) -> None:
        self.guard = threading.RLock()  # a forked child must not inherit it locked
        self.arena: Arena | None = None

    def become_child(self) -> None:
        self.begin()
        for directory in self.joined:
            with suppress(OSError):
                _touch(_member(directory))


_process = _Process()
at_fork(child=_process.become_child)


def header_here(kind: int, name: str = "") -> files.Header:
    return files.header_here(kind, name, backend=SCHEME, cell_size=CELL_SIZE, libc="", machine=sys.byteorder)


def _checked(path: str, fd: int, kind: int, name: str = "") -> tuple[Segment, bool]:
    """Map an open file; False: it was made before the last boot. It is read as mapped: Windows lets nobody else read
    what is locked. Raises: IncompatibleError: if it cannot be used."""
    size = os.fstat(fd).st_size
    if size < native.HEADER_SIZE:
        files.check_header(path, b"", size, header_here(kind, name))
    segment = Segment(path, fd)
    return segment, files.check_header(path, segment.map[: files.HEADER_LENGTH], size, header_here(kind, name))


# -- anonymous --------------------------------------------------------------------------------------------------------


class _Cells:
    """What the anonymous locks of this process and of others have in common."""

    scheme, named = SCHEME, False

    def retire(self, segment: Segment) -> None:
        """The guard was not there: somebody has removed the directory, and those who use it make it anew."""
        _establish(os.path.dirname(segment.path))
        raise BackendError(f"{segment.path} is gone: somebody has removed it", resource=segment.path)

    def open_guard(self, segment: Segment, offset: int) -> int:
        path = f"{segment.path}.{offset}"
        try:
            return files.open_or_create(path)
        except FileNotFoundError:  # all that this user has in shared memory was removed, as at a logout
            _establish(os.path.dirname(path))
            return files.open_or_create(path)

    def guards(self, _segment: Segment, _fd: int) -> bool:
        return True


class Arena(_Cells):
    """The anonymous locks that this process makes."""

    def __init__(self, directory: str) -> None:
        self.path, self.forks = directory, claims.forks()
        self.chunks: list[Segment] = []
        self.free: deque[tuple[Segment, int]] = deque()

    def take(self, kind: type[Mutex] = Mutex, cls: type | None = None) -> Mutex:
        """A lock that nobody else has, of an object of that class. Raises: OSError: if there is no room for it."""
        try:
            segment, offset = self.free.popleft()
        except IndexError:
            with _process.guard:
                if not self.free:
                    self._grow()
                segment, offset = self.free.popleft()
        cell = Cell(segment.map, offset)
        cell.make()
        if cls is not None:
            cell.class_number = segment.classes.number(cls)
        return kind(Own(self, segment), segment, offset)

    def _grow(self) -> None:
        number = len(self.chunks)
        size = _FIRST_CHUNK << number
        with files.new_file(self.path, size, header_here(files.ARENA)) as (made, fd):
            path = os.path.join(self.path, f"chunk-{number}")
            try:
                segment = Segment(path, fd)
            finally:
                os.close(fd)
            os.rename(made, path)
        self.chunks.append(segment)
        _process.segments[path] = segment
        self.free.extend((segment, offset) for offset in range(native.HEADER_SIZE, size, CELL_SIZE))


class Own(_Cells):
    """A lock of this process's arena."""

    def __init__(self, arena: Arena, segment: Segment) -> None:
        self.arena, self.segment, self.path = arena, segment, segment.path

    def attach(self) -> tuple[Segment, int]:
        raise BackendError("a cell of one's own arena is attached from its beginning")

    def token(self, offset: int) -> tuple[object, ...]:
        return ("arena", self.path, offset)

    def label(self, offset: int) -> str:
        return _label(self.path, offset)

    def give_back(self, offset: int) -> None:
        """Nobody can know it any more."""
        if self.arena.forks == claims.forks():
            self.arena.free.append((self.segment, offset))


class RemoteCell(_Cells):
    """An anonymous lock that another process made, or this one's before a fork."""

    def __init__(self, path: str, offset: int) -> None:
        self.path, self.offset = path, offset

    def attach(self) -> tuple[Segment, int]:
        return _attach_chunk(self.path), self.offset

    def token(self, _offset: int) -> tuple[object, ...]:
        return ("arena", self.path, self.offset)

    def label(self, _offset: int) -> str:
        return _label(self.path, self.offset)


def _label(path: str, offset: int) -> str:
    directory, chunk = os.path.split(path)
    return f"anonymous lock {os.path.basename(directory)}/{chunk}:{offset}"


def anonymous(cls: type | None = None) -> Mutex:
    """A new lock that others reach by fork, spawn or pickle, of an object of that class. Raises: OSError: if there is
    no room for it."""
    return _current_arena().take(cls=cls)


def _current_arena() -> Arena:
    with _process.guard:
        if _process.arena is None:
            _process.arena = _new_arena()
        return _process.arena


def _new_arena() -> Arena:
    directory = files.lock_directory()
    sweep(directory)
    path = os.path.join(directory, f"cells-{os.getpid()}-{start_of(os.getpid())}-{os.urandom(4).hex()}")
    half = path.replace("cells-", ".new-")
    _establish(half)
    os.rename(half, path)
    _join(path)
    return Arena(path)


def _join(directory: str) -> None:
    _process.joined.add(directory)
    leaving.at_exit(_leave)
    leaving.at_exit(waiters.leave)


def _establish(directory: str) -> None:
    files.make_directory(os.path.dirname(directory))
    with suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    _touch(os.path.join(directory, "gate"))
    _touch(os.path.join(directory, os.path.basename(_member(directory))))


def _member(directory: str) -> str:
    pid = os.getpid()
    return os.path.join(directory, f"member-{pid}-{start_of(pid)}")


def _touch(path: str) -> None:
    os.close(files.open_or_create(path))


def _attach_chunk(path: str) -> Segment:
    """Map another process's cells; blocks only for moments. Raises: BackendError: if they are gone."""
    with _process.guard:
        segment = _process.segments.get(path)
        if segment is None:
            segment = _process.segments[path] = _join_and_map(path)
        return segment


def _join_and_map(path: str) -> Segment:
    directory = os.path.dirname(path)
    gate = os.path.join(directory, "gate")
    try:
        with claims.briefly(lambda: files.open_checked(gate), gate):
            fd = files.open_checked(path)
            try:
                segment, of_this_boot = _checked(path, fd, files.ARENA)
                if not of_this_boot:
                    raise FileNotFoundError
            finally:
                os.close(fd)
            _touch(_member(directory))
    except (FileNotFoundError, NotADirectoryError):
        raise BackendError(
            f"the lock is gone: {path} was removed when the last process that used it had ended", resource=path
        ) from None
    _join(directory)
    return segment


# -- named ------------------------------------------------------------------------------------------------------------


class Named:
    """A lock that any process of the user finds by its name."""

    scheme, named = SCHEME, True
    kind, travels_as, suffix = files.NAMED, "name", ""

    def __init__(self, name: str, directory: str) -> None:
        self.name, self.directory = name, directory
        self.path = os.path.join(directory, files.file_name(name)) + self.suffix

    def attach(self) -> tuple[Segment, int]:
        return _open_named(self.path, self.name, self.kind), files.NAMED_CELL

    def find(self) -> tuple[Segment, int]:
        """The same, and nothing is made. Raises: FileNotFoundError: if there is none."""
        return _map_named(self.path, self.name, self.kind), files.NAMED_CELL

    def retire(self, segment: Segment) -> None:
        """The cell is marked REMOVED.  Who did that may have been killed before it took the name off.

        By one at a time: between the look at the name and its end nobody can make it anew, with a state of its own.
        """
        with suppress(FileNotFoundError), _alone_in(self.directory):
            if not files.same_file(segment.path, segment.identity):
                return
            try:
                files.unlink_whole(segment.path)
            except PermissionError:
                if not files.IN_USE_STAYS:
                    raise
                Cell(segment.map, files.NAMED_CELL).renew()  # the file stays, and is the new lock of that name

    def open_guard(self, segment: Segment, _offset: int) -> int:
        return files.open_checked(segment.path)

    def guards(self, segment: Segment, fd: int) -> bool:
        found = os.fstat(fd)
        return (found.st_dev, found.st_ino) == segment.identity

    def token(self, _offset: int) -> tuple[object, ...]:
        return (self.travels_as, self.name, self.directory)

    def label(self, _offset: int) -> str:
        return repr(self.name)


def _alone_in(directory: str) -> AbstractContextManager[object]:
    """For moments, among all who take names off there.  Where a file in use stays, nobody can: who would, uses it."""
    if files.IN_USE_STAYS:
        return nullcontext()
    return claims.briefly(lambda: os.open(directory, os.O_RDONLY), directory)


def named(name: str) -> Named:
    """The resource of that name. Raises: as files.lock_directory."""
    return Named(name, files.lock_directory())


class NamedSemaphore(Named):
    """A semaphore's lock, in its file."""

    kind, travels_as = files.SEMAPHORE, "semaphore"


class NamedGate(NamedSemaphore):
    """Its gate, in a file beside it."""

    travels_as, suffix = "gate", "~gate"


_TRAVELLERS = {resource.travels_as: resource for resource in (Named, NamedSemaphore, NamedGate)}


def existing(name: str) -> Named:
    """The resource of that name, whatever it is; a lock, if there is none."""
    found = named(name)
    return NamedSemaphore(name, found.directory) if files.kind_of(found.path) == files.SEMAPHORE else found


def semaphore(name: str | None) -> tuple[Handle, Handle]:
    """The locks of a semaphore: the one that guards its register, and its gate.  New ones without a name."""
    if name is None:
        arena = _current_arena()
        return arena.take(), arena.take(Gate)
    directory = files.lock_directory()
    inner = NamedSemaphore(name, directory)
    return known((SCHEME, *inner.token(0)), lambda: Mutex(inner)), gate(SCHEME, *NamedGate(name, directory).token(0))


def resource(kind: str, *where: Any) -> RemoteCell | Named:
    """What travelled as that token."""
    return RemoteCell(*where) if kind == "arena" else _TRAVELLERS[kind](*where)


def _open_named(path: str, name: str, kind: int) -> Segment:
    """Map a named lock's file, made if it is missing."""
    with _process.guard:
        segment = _process.segments.get(path)
        if segment is not None and files.same_file(path, segment.identity):
            files.check_kind(path, segment.map[: files.HEADER_LENGTH], kind)
            return segment
        while True:  # until it is there: others may make and remove it meanwhile
            with suppress(FileNotFoundError):
                segment = _map_named(path, name, kind)
                break
            with suppress(FileExistsError):
                _create_named(path, name, kind)
        _process.segments[path] = segment
        return segment


def _map_named(path: str, name: str, kind: int) -> Segment:
    fd = files.open_checked(path)
    try:
        segment, of_this_boot = _checked(path, fd, kind, name)
    finally:
        os.close(fd)
    if not of_this_boot:
        _revive(segment, name, kind)
    return segment


def _revive(segment: Segment, name: str, kind: int) -> None:
    """It outlived a reboot, on a disk: nobody of then lives.  Who held it is found dead by the next to take it; who
    worked on behalf of that is gone, and must not be looked for by its number."""
    here = header_here(kind, name).pack()
    with claims.briefly(lambda: files.open_checked(segment.path), segment.path):
        if segment.map[: files.HEADER_LENGTH] != here:
            cell = Cell(segment.map, files.NAMED_CELL)
            cell.flags &= ~native.WARDED
            cell.forget_waiters()
            segment.map[: files.HEADER_LENGTH] = here


def _create_named(path: str, name: str, kind: int) -> None:
    """Made aside, then linked: one name is one file, whole from its first moment.  Raises: FileExistsError."""
    directory = os.path.dirname(path)
    files.make_directory(directory)
    if files.is_sweep_due(directory):
        sweep(directory)
    with files.new_file(directory, _NAMED_SIZE, header_here(kind, name)) as (made, fd):
        try:
            Cell(Segment(made, fd).map, files.NAMED_CELL).make()
        finally:
            os.close(fd)
        files.publish(made, path)


# -- leaving ----------------------------------------------------------------------------------------------------------


def sweep(directory: str) -> None:
    """Remove what dead processes left; never blocks on a live one, never raises for what others remove meanwhile."""
    files.sweep_sockets(directory)
    for path, kind, pid, start in _made_in(directory):
        if kind == "cells":
            _remove_unused(path)
        elif start_of(pid) != start:
            _remove(path)


def _made_in(directory: str) -> Iterator[tuple[str, str, int, int]]:
    for entry in os.listdir(directory):
        if made := _MADE_BY.match(entry):
            yield os.path.join(directory, entry), made[1], int(made[2]), int(made[3])


def _remove_unused(directory: str) -> None:
    """Its chunks go first, under the gate: without them nobody joins."""
    if any(_members(directory)):
        return
    gate = os.path.join(directory, "gate")
    with suppress(OSError, CoheldError):
        with claims.briefly(lambda: files.open_checked(gate), gate):
            if any(_members(directory)):
                return
            for name in _listed(directory):
                if name != "gate":
                    _remove(os.path.join(directory, name))
        _remove(gate)
        os.rmdir(directory)


def _members(directory: str) -> Iterator[str]:
    """The living ones."""
    for name in _listed(directory):
        if (member := _MEMBER.match(name)) and start_of(int(member[1])) == int(member[2]):
            yield name


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(path: str) -> None:
    """A file, or a directory with what is in it; what cannot be removed stays for the next sweep."""
    with suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):
            for name in os.listdir(path):
                _remove(os.path.join(path, name))
            os.rmdir(path)
        else:
            os.unlink(path)


def _leave() -> None:
    """This process uses its locks no more; what nobody else uses goes."""
    joined, _process.joined, _process.arena = _process.joined, set(), None
    for directory in joined:
        _remove(_member(directory))
        _remove_unused(directory)
