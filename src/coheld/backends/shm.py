"""Cells in shared memory: the arena of this process, the arenas of others, and named locks.

A resource says how to get from a description that can travel (a path and an offset, a name) to a mapped cell.

Who may remove an arena: nobody while a process maps it.  Each of them has a shared flock on the file; a forked child
shares its parent's, since a flock belongs to the open file.  The arena is published under a flock, by rename, so there
is no moment at which it has its name and no flock.  A sweeper takes the exclusive flock, and an attacher that waited
for it looks at the path again: it is gone, or it is safe.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import threading
import weakref
from contextlib import suppress
from typing import Any, NoReturn

from .. import native
from ..errors import BackendError, IncompatibleError, TooManyLocksError
from ..process import at_fork
from . import beside, files, leaving, register, sweeping, waiters
from .base import Capabilities, Gatekeeping, Handle, gate, known
from .classes import Classes

assert sys.platform == "linux"  # type checkers for other systems stop here

SCHEME = "shm"
CAPABILITIES = Capabilities(
    handoff_bound=0.25,
    wakes_without_polling=True,
    uninterruptible_entry=True,
    held_limit=native.HELD_LIMIT,
    files=True,
    leases=False,
    cohorts=False,
    handlers=True,
    readers=True,
    semaphores=True,
)
_ARENA_SPAN = 1 << 34
"""Address space that an arena reserves, bytes; where that is not to be had, half of it, and so on."""


class Segment(native.Segment):
    """A mapped file of cells, once per file and process."""

    path: str
    identity: tuple[int, int]


class Mutex(Handle, native.Mutex):
    """A lock in shared memory; acquire, release and with are C."""

    __slots__ = ()

    def _too_many(self) -> NoReturn:
        raise TooManyLocksError(
            f"{self.label}: this thread holds {native.HELD_LIMIT} locks already, and the kernel frees little more "
            "than that when a thread dies; release some first",
            resource=self.label,
        )

    def _open_register(self, value: int = 0) -> None:
        """By the owner."""
        self._keep_register(beside.opened(register.Register, self.segment, self.offset, value))

    def _held_by(self) -> list[tuple[int, int, int]]:
        found = beside.existing(register.Register, self.segment, self.offset)
        return found.living() if found else []


class Gate(Gatekeeping, Mutex):
    """What the one that waits for a permit of a semaphore holds."""

    __slots__ = ()


class _Process:
    """What belongs to this process alone: a forked child begins anew, but keeps what it inherited mapped."""

    def __init__(self) -> None:
        self.segments: weakref.WeakValueDictionary[str, Segment] = weakref.WeakValueDictionary()
        self.directories: set[str] = set()  # where it made or attached arenas
        self.begin()

    def begin(self) -> None:
        self.guard = threading.RLock()
        self.arena: Arena | None = None
        self.shared = False  # others may map its arenas: it forked, or pickled a lock
        self.signed_off: object = None

    def share(self) -> None:
        self.shared = True


_process = _Process()
at_fork(parent=_process.share, child=_process.begin)


class Arena:
    """The anonymous locks that this process makes."""

    scheme, named = SCHEME, False

    def __init__(self, segment: Segment) -> None:
        self.segment, self.path = segment, segment.path
        self.classes = Classes(memoryview(segment))  # type: ignore[arg-type]  # a buffer, from 3.12 on

    def attach(self) -> tuple[Segment, int]:
        raise BackendError("a cell of one's own arena is attached from its beginning")

    def retire(self, segment: Segment) -> None:
        raise _damaged(segment)

    def token(self, offset: int) -> tuple[object, ...]:
        _process.share()
        return ("arena", self.segment.path, offset)

    def label(self, offset: int) -> str:
        return f"anonymous lock {os.path.basename(self.segment.path)}:{offset}"


class RemoteCell:
    """An anonymous lock that another process made, or this one's before a fork."""

    scheme, named = SCHEME, False

    def __init__(self, path: str, offset: int) -> None:
        self.path, self.offset = path, offset

    def attach(self) -> tuple[Segment, int]:
        return attach_arena(self.path, self.offset), self.offset

    def retire(self, segment: Segment) -> None:
        raise _damaged(segment)

    def token(self, _offset: int) -> tuple[object, ...]:
        return ("arena", self.path, self.offset)

    def label(self, _offset: int) -> str:
        return f"anonymous lock {os.path.basename(self.path)}:{self.offset}"


class Named:
    """A lock that any process of the user finds by its name."""

    scheme, named = SCHEME, True
    kind, cell, travels_as = files.NAMED, files.NAMED_CELL, "name"

    def __init__(self, name: str, directory: str) -> None:
        self.name, self.directory = name, directory
        self.path = os.path.join(directory, files.file_name(name))

    def attach(self) -> tuple[Segment, int]:
        return _open_named(self.path, self.name, self.kind), self.cell

    def find(self) -> tuple[Segment, int]:
        """The same, and nothing is made. Raises: FileNotFoundError: if there is none."""
        return _map_named(self.path, self.name, self.kind), self.cell

    def retire(self, segment: Segment) -> None:
        """The cell is marked REMOVED.  Who did that may have been killed before it took the name off."""
        unlink_named(segment)

    def token(self, _offset: int) -> tuple[object, ...]:
        return (self.travels_as, self.name, self.directory)

    def label(self, _offset: int) -> str:
        return repr(self.name)


class NamedSemaphore(Named):
    """A semaphore's lock in its file, which has another for its gate."""

    kind, travels_as = files.SEMAPHORE, "semaphore"


class NamedGate(NamedSemaphore):
    """The other one."""

    cell, travels_as = files.GATE_CELL, "gate"


_TRAVELLERS = {resource.travels_as: resource for resource in (Named, NamedSemaphore, NamedGate)}


def anonymous(cls: type | None = None) -> Mutex:
    """A new lock that others reach by fork, spawn or pickle, of an object of that class. Raises: OSError: if there is
    no room for it."""
    arena, offset = new_cell()
    return Mutex(arena, arena.segment, offset, 0 if cls is None else arena.classes.number(cls))


def named(name: str) -> Named:
    """The resource of that name. Raises: as files.lock_directory."""
    return Named(name, files.lock_directory())


def resource(kind: str, *where: Any) -> RemoteCell | Named:
    """What travelled as that token."""
    return RemoteCell(*where) if kind == "arena" else _TRAVELLERS[kind](*where)


def existing(name: str) -> Named:
    """The resource of that name, whatever it is; a lock, if there is none."""
    found = named(name)
    return NamedSemaphore(name, found.directory) if files.kind_of(found.path) == files.SEMAPHORE else found


def semaphore(name: str | None) -> tuple[Handle, Handle]:
    """The locks of a semaphore: the one that guards its register, and its gate.  New ones without a name."""
    if name is None:
        arena, offset = new_cell()
        return anonymous(), Gate(arena, arena.segment, offset)
    directory = files.lock_directory()
    inner = NamedSemaphore(name, directory)
    return known((SCHEME, *inner.token(0)), lambda: Mutex(inner)), gate(SCHEME, *NamedGate(name, directory).token(0))


def _damaged(segment: Segment) -> IncompatibleError:
    return IncompatibleError(
        f"{segment.path} is damaged: an anonymous lock is marked as removed", resource=segment.path
    )


def header_here(kind: int, name: str = "") -> files.Header:
    machine = os.uname().machine
    return files.header_here(kind, name, backend=SCHEME, cell_size=native.CELL_SIZE, libc=native.LIBC, machine=machine)


def _check_header(path: str, fd: int, kind: int, name: str = "") -> bool:
    raw = os.pread(fd, files.HEADER_LENGTH, 0)
    return files.check_header(path, raw, os.fstat(fd).st_size, header_here(kind, name))


def _mapped(path: str, fd: int, length: int, least: int) -> Segment:
    """Map an open file and take its descriptor; one mapping per file and process."""
    found = os.fstat(fd)
    try:
        segment = Segment(fd, length, least)
    except OSError as error:
        raise OSError(error.errno, f"the memory of a lock cannot be mapped: {error.strerror}", path) from error
    segment.path, segment.identity = path, (found.st_dev, found.st_ino)
    return segment


# -- anonymous --------------------------------------------------------------------------------------------------------


def new_cell() -> tuple[Arena, int]:
    """A cell for an anonymous lock.

    Raises: OSError: if /dev/shm is full.  InsecureError: if the directory is not safe.
    """
    arena = _current_arena()
    try:
        return arena, arena.segment.take()
    except OSError as error:
        if error.errno not in (errno.ENOMEM, errno.EBADF):  # used up, or a daemon has closed its descriptors
            raise OSError(error.errno, f"no lock can be made: {error.strerror}", arena.segment.path) from error
    with _process.guard:
        if _process.arena is arena:
            _process.arena = None
    arena = _current_arena()
    return arena, arena.segment.take()


def _current_arena() -> Arena:
    arena = _process.arena
    if arena is not None and arena.segment.generation == native.generation():
        return arena
    with _process.guard:
        if _process.arena is arena:
            _process.arena = _new_arena()
        return _process.arena or _current_arena()


def _new_arena() -> Arena:
    directory = files.lock_directory()
    sweeping.sweep(directory)
    _process.directories.add(directory)
    leaving.at_exit(_leave)
    leaving.at_exit(waiters.leave)
    with files.new_file(directory, native.HEADER_SIZE, header_here(files.ARENA)) as (made, fd):
        fcntl.flock(fd, fcntl.LOCK_SH)
        path = os.path.join(directory, os.path.basename(made).replace(".new-", "arena-"))
        segment = _mapped(path, fd, _ARENA_SPAN, 1 << 20)
        os.rename(made, path)
    if _process.signed_off:  # made by one of the last exit handlers: nobody would remove it any more
        os.unlink(path)
    _process.segments[path] = segment
    return Arena(segment)


def attach_arena(path: str, offset: int) -> Segment:
    """Map another process's arena; blocks only for the moment that a sweeper looks at it.

    Raises: BackendError: if it is gone.  IncompatibleError, InsecureError: if it cannot be used.
    """
    with _process.guard:
        segment = _process.segments.get(path)
        if segment is None:
            _process.directories.add(os.path.dirname(path))
            leaving.at_exit(_leave)
            segment = _process.segments[path] = _attach_file(path)
        elif not segment.holds(offset):  # a daemon has closed its descriptor
            segment = _process.segments[path] = _attach_file(path)
    if not segment.holds(offset):
        raise IncompatibleError(f"{path} has no lock at {offset}", resource=path)
    return segment


def _attach_file(path: str) -> Segment:
    try:
        fd = files.open_checked(path)
    except FileNotFoundError:
        raise _gone(path) from None
    try:
        sweeping.flock_soon(fd, fcntl.LOCK_SH, path)
        sweeping.touch(fd)
        found = os.fstat(fd)
        if not files.same_file(path, (found.st_dev, found.st_ino)):
            raise _gone(path)
        if not _check_header(path, fd, files.ARENA):
            raise _gone(path)
    except BaseException:
        os.close(fd)
        raise
    return _mapped(path, fd, _ARENA_SPAN, found.st_size)


def _gone(path: str) -> BackendError:
    return BackendError(
        f"the lock is gone: {path} was removed when the last process that used it had ended", resource=path
    )


# -- named ------------------------------------------------------------------------------------------------------------


def _open_named(path: str, name: str, kind: int) -> Segment:
    """Map a named lock's file, made if it is missing."""
    with _process.guard:
        segment = _process.segments.get(path)
        if segment is not None and files.same_file(path, segment.identity):
            raw = bytes(memoryview(segment)[: files.HEADER_LENGTH])  # type: ignore[arg-type]  # a buffer, from 3.12 on
            files.check_kind(path, raw, kind)
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
        if not _is_of_this_boot(path, fd, name, kind):
            _revive(path, fd, name, kind)
    except BaseException:
        os.close(fd)
        raise
    segment = _mapped(path, fd, native.HEADER_SIZE, native.HEADER_SIZE)
    segment.close()
    return segment


def _is_of_this_boot(path: str, fd: int, name: str, kind: int) -> bool:
    """A header that is wrong may be half written: _revive does that, under the flock.  Then it is right after that."""
    with suppress(IncompatibleError):
        return _check_header(path, fd, kind, name)
    sweeping.flock_soon(fd, fcntl.LOCK_SH, path)
    return _check_header(path, fd, kind, name)


def _create_named(path: str, name: str, kind: int) -> None:
    """Made aside, then linked: one name is one file, whole from its first moment.  Raises: FileExistsError."""
    directory = os.path.dirname(path)
    files.make_directory(directory)
    if files.is_sweep_due(directory):
        sweeping.sweep(directory)
    with files.new_file(directory, native.HEADER_SIZE, header_here(kind, name)) as (made, fd):
        _make_cells(path, fd, kind)  # and unmapped: the traceback of a failure below must not keep the file's inode
        os.link(made, path)
        os.unlink(made)


_CELLS = {files.NAMED: [files.NAMED_CELL], files.SEMAPHORE: [files.NAMED_CELL, files.GATE_CELL]}


def _make_cells(path: str, fd: int, kind: int) -> None:
    segment = _mapped(path, fd, native.HEADER_SIZE, native.HEADER_SIZE)
    for cell in _CELLS[kind]:
        segment.make(cell)


def _revive(path: str, fd: int, name: str, kind: int) -> None:
    """The file outlived a reboot, on a disk: nobody of then lives.  Whoever comes while it is made anew waits for the
    flock and finds it done."""
    sweeping.flock_soon(fd, fcntl.LOCK_EX, path)
    if not _check_header(path, fd, kind, name):
        segment = _mapped(path, os.dup(fd), native.HEADER_SIZE, native.HEADER_SIZE)
        for cell in _CELLS[kind]:
            segment.revive(cell)
        os.pwrite(fd, header_here(kind, name).pack(), 0)
    fcntl.flock(fd, fcntl.LOCK_UN)


def unlink_named(segment: Segment) -> None:
    """Take the name off a lock that is marked REMOVED; nothing happens if it has none."""
    with suppress(FileNotFoundError), sweeping.directory_locked(os.path.dirname(segment.path)):
        if files.same_file(segment.path, segment.identity):
            files.unlink_whole(segment.path)


# -- leaving ----------------------------------------------------------------------------------------------------------


def _leave() -> None:
    """Remove what only this process uses."""
    if not _process.directories:
        return
    with suppress(OSError):
        _process.signed_off = sweeping.sign_off()
        segments = _own_segments()
        for segment in segments:
            segment.close()
        _process.arena = None
        used = {segment.path for segment in segments}
        for directory in _process.directories.copy():
            with suppress(OSError):
                sweeping.leave(directory, used, _process.shared)


def _own_segments() -> list[Segment]:
    """All that are mapped, though other threads may still map more; one that keeps the guard is not waited for long."""
    got = _process.guard.acquire(timeout=1)
    try:
        return list(_process.segments.values())
    finally:
        if got:
            _process.guard.release()


native.hasten(Mutex)
