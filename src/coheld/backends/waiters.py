"""The table of a process's waiters, which others read: who waits for which cell, and what those are called who hold
one.  _table.h is its twin in C, and says what a slot means and why no look at it races.

One file per process, waits-<pid>-<start>, made when one of its threads first takes a lock.
It goes when the process ends; of one that is killed, when another one ends, or makes its own.  Nothing depends on it:
where there is no room for it, waiters are counted and not named, and deadlocks are not found.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from .. import native
from ..errors import CoheldError
from ..owner import Owner
from ..process import at_fork, command_of, start_of, thread_name
from ..waiting import FOREVER, TOLD_AFTER, Patience
from . import files, leaving

if TYPE_CHECKING:
    from .base import Handle

SEARCH_AFTER, SEARCH_AGAIN = 0.2, 1.0
"""Who waits looks for a cycle of waits after so long, and again whenever so much more has passed, seconds."""

FOR_LOCK, FOR_GUARD, FOR_READERS, FOR_PERMIT = 1, 2, 3, 4
TIMED, KEEPS = 8, 16
_WHAT_FOR = 7
_SLOT = struct.Struct("=QQQQQII32s48s")
_BODY = struct.Struct("=QQQQII32s")
"""A slot without its number and its name."""
_NAME_AT, _NAME_SIZE = 8 + _BODY.size, 48
_WHO = struct.Struct("=Q24xQI84x")
"""Number, task and thread of a slot."""
_FIRST, _MOST, _CHUNK, _MANY = 4096, 1 << 16, 32, 512
"""Where the slots begin, how many there are at most, how many are promised, and how many are read at once."""
_SEATS = 4096
"""How many locks of a process have a seat at most: a table that is larger takes longer to read."""
_MADE_BY = re.compile(r"waits-(\d+)-(\d+)\Z")
_KIND = 4
"""Of its header; see files.py for the others."""

_ARTICLES = {"readers": "", "store": "the "}
_NAMES = {FOR_LOCK: "lock", FOR_GUARD: "guard", FOR_READERS: "readers", FOR_PERMIT: "permit"}

T = TypeVar("T")
Cell = tuple[int, int]
"""Inode of its file, and its place there."""


@dataclass(frozen=True, slots=True)
class Waiter:
    """A thread or task that waits.

    pid, tid: process and thread number; of a task it is its loop's thread.  start: when the process started, in the
    system's own unit.  thread: the thread's name, or task: the task's; the other one is empty.  method: the locked
    method, "" for acquire and with.  since: when the wait began, seconds of time.monotonic().  waits_for: "lock";
    "guard": until a condition holds; "readers": it has the lock, and waits for those who read; "permit"; "store": it is
    next of this host, and waits for other hosts, or the store's answer.  timed: it ends by itself, where that is known.
    task_id: of a task, the number that it has as an Owner; 0: the thread waits.
    """

    pid: int
    start: int
    tid: int
    thread: str
    task: str
    method: str
    since: float
    waits_for: str
    timed: bool
    task_id: int = 0

    @property
    def command(self) -> str:
        """The command line of its process, cut to 60 characters; empty if that has ended."""
        return command_of(self.pid) if start_of(self.pid) == self.start else ""

    def __str__(self) -> str:
        who = f"task {self.task}" if self.task else f"thread {self.thread or self.tid}"
        where = f" in {self.method}" if self.method else ""
        what = "" if self.waits_for == "lock" else f", for {_ARTICLES.get(self.waits_for, 'a ')}{self.waits_for}"
        waited = max(0.0, time.monotonic() - self.since)
        return f"process {self.pid}{f' ({self.command})' * bool(self.command)}, {who}{where}{what}, for {waited:.3g} s"


@dataclass(frozen=True, slots=True)
class Wait:
    """One that lasts, as it was read.  since: ns, monotonic.  number: of the wait, not of its slot."""

    pid: int
    start: int
    tid: int
    task: int
    cell: Cell
    kind: int
    since: int
    method: str
    name: str
    number: int
    slot: int

    @property
    def what_for(self) -> int:
        return self.kind & _WHAT_FOR

    def told(self) -> Waiter:
        """As users see it."""
        names = ("", self.name) if self.task else (self.name, "")
        what_for = _NAMES.get(self.what_for, "lock")
        timed = bool(self.kind & TIMED)
        return Waiter(self.pid, self.start, self.tid, *names, self.method, self.since / 1e9, what_for, timed, self.task)


class _Table:
    """This process's."""

    def __init__(self, directory: str) -> None:
        self.pid, self.start = os.getpid(), start_of(os.getpid()) or 0
        self.path = os.path.join(directory, f"waits-{self.pid}-{self.start}")
        header = files.header_here(_KIND, backend="", cell_size=_SLOT.size, libc="", machine="")
        with files.new_file(directory, _FIRST, header) as (made, fd):
            try:
                os.ftruncate(fd, _FIRST + _MOST * _SLOT.size)  # a hole: see _promise
                self.map = mmap.mmap(fd, 0)
            finally:
                os.close(fd)
            os.replace(made, self.path)  # of a program before this one in the same process, if there is one
            self.identity = _identity_of(self.path)
        self.words = memoryview(self.map).cast("Q")
        self.free: list[int] = []
        self.promised = self.seats = 0

    def take(self) -> int | None:
        """A slot that nobody has; its offset.  None: the file system is full."""
        while True:
            with suppress(IndexError):
                return self.free.pop()
            if not self._promise():
                return None

    def _promise(self) -> bool:
        with _process.guard:
            if self.free:  # another thread has: one part is begun after the other, and who reads stops at an empty one
                return True
            first = _FIRST + self.promised * _SLOT.size
            if self.promised >= _MOST:
                return False
            if sys.platform == "linux":  # memory that is not there would be a SIGBUS
                fd = files.open_checked(self.path)
                try:
                    os.posix_fallocate(fd, first, _CHUNK * _SLOT.size)
                finally:
                    os.close(fd)
            self.promised += _CHUNK
            self.free.extend(first + number * _SLOT.size for number in reversed(range(_CHUNK)))
            return True

    def name(self, slot: int, name: str) -> None:
        text = name.encode(errors="replace")[:_NAME_SIZE].ljust(_NAME_SIZE, b"\0")
        self.map[slot + _NAME_AT : slot + _NAME_AT + _NAME_SIZE] = text

    def forget_name(self, slot: int, name_at: int = _NAME_AT) -> None:
        """Also at the very end of the process, when this module has no names any more."""
        self.map[slot + name_at] = 0

    def body(self, slot: int) -> bytes | None:
        """Of the wait that is in it."""
        return self.map[slot + 8 : slot + 8 + _BODY.size] if self.words[slot // 8] & 1 else None

    def write(self, slot: int, body: bytes | None) -> None:
        """That wait, or none."""
        at = slot // 8
        even = (self.words[at] | 1) + 1
        self.words[at] = even
        if body is not None:
            self.map[slot + 8 : slot + 8 + len(body)] = body
            self.words[at] = even + 1

    def is_lost(self) -> bool:
        """Does nobody find it any more?"""
        with suppress(OSError):
            return not files.same_file(self.path, self.identity)
        return True

    def remove(self) -> None:
        with suppress(OSError):
            os.unlink(self.path)


class Place:
    """A slot of a thread, as long as that runs, or of a task's wait."""

    cell: Cell = (0, 0)

    def __init__(self, table: _Table, slot: int, name: str) -> None:
        self.table, self.slot = table, slot
        table.name(slot, name)

    def begin(self, cell: Cell, kind: int, method: bytes, tid: int, task: int = 0) -> bytes | None:
        """Who has it waits, from now on; for what it did before, if this is in the middle of another wait."""
        before, self.cell = self.table.body(self.slot), cell
        self.table.write(self.slot, _BODY.pack(*cell, time.monotonic_ns(), task, tid, kind, method))
        return before

    def wait(self) -> Wait | None:
        """What is in it now."""
        raw = self.table.map[self.slot : self.slot + _SLOT.size]
        return _wait_in(raw, os.getpid(), self.table.start, self.slot) if raw[0] & 1 else None

    def end(self, before: bytes | None = None) -> None:
        """Again, if it was interrupted: the same."""
        if self.table.pid == os.getpid():  # else a handler has forked: this is the child, the slot its parent's
            self.table.write(self.slot, before)

    def stand_for(self, cell: Cell, tid: int, task: int = 0) -> None:
        """Who is called so, where nobody waits: that thread, or with a seat the task that is about to own the cell."""
        at = self.slot + 8
        self.table.map[at : at + _BODY.size] = _BODY.pack(*cell, 0, task, tid, 0, b"")

    def seat_task(self, cell: Cell, task: Any) -> None:
        """As seat_write of _table.h: meanwhile, and without a name, it is nobody's."""
        self.stand_for((0, 0), 0)
        with suppress(AttributeError):  # it is nobody's Task
            self.table.name(self.slot, task.get_name())
            self.stand_for(cell, 0, id(task))

    def __del__(self) -> None:
        if self.table.pid == os.getpid():
            native.delist(self.table.map, self.slot)  # what runs in its thread from here on is shown to nobody
            self.end()
            self.table.forget_name(self.slot)
            self.table.free.append(self.slot)


class _Seat(Place):
    """Of a lock that tasks own."""

    def __init__(self, table: _Table, slot: int) -> None:
        super().__init__(table, slot, "")
        table.seats += 1

    def __del__(self) -> None:
        self.table.seats -= 1
        super().__del__()


def begin_patience(lock: Handle, quiet: bool, searches: bool) -> Patience:
    """Of a thread that waits.  quiet: in another's stead, which says it itself.  searches: for a cycle of waits that it
    is part of."""
    first = FOREVER if quiet else min(TOLD_AFTER, SEARCH_AFTER if searches else FOREVER)
    return Patience(lambda waited, told: lock._waits_on(waited, told, searches), first)


class _Process:
    """What belongs to this process alone."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.guard = threading.RLock()
        self.table: _Table | None = None
        self.asked: object = None  # what COHELD_DIR said when it was made, or could not be
        self.local = threading.local()


_process = _Process()
_all: list[_Table] = []
"""Of this process; one for each directory that it has used, and kept for ever: a thread may be in a wait there."""


def _become_child() -> None:
    _all.clear()  # the slots are the parent's
    _process.begin()


at_fork(child=_become_child)


def _table() -> _Table | None:
    """None: there is no room for one.  Another one, where its directory is another, or was taken away: then who waits
    is shown by his next wait."""
    asked, table = (os.environ.get("COHELD_DIR"),), _process.table
    if _process.asked != asked or (table is not None and table.is_lost()):
        with _process.guard:
            if _process.asked != asked or _process.table is table:
                _process.table = _new_table()
                _process.asked = asked
    return _process.table


def _new_table() -> _Table | None:
    with suppress(OSError, CoheldError):
        directory = files.lock_directory()
        sweep(directory)
        leaving.at_exit(leave)
        _all.append(_Table(directory))
        return _all[-1]
    return None


def place(name: str) -> Place | None:
    """A slot of one's own, for one who has that name, given back when nobody refers to it."""
    with suppress(OSError):
        table = _table()
        slot = None if table is None else table.take()
        return None if table is None or slot is None else Place(table, slot, name)
    return None


def seat() -> Place | None:
    """One for the names of the tasks that own a lock, as place; None also where many locks have one."""
    with suppress(OSError):
        table = _table()
        slot = None if table is None or table.seats >= _SEATS else table.take()
        return None if table is None or slot is None else _Seat(table, slot)
    return None


def of_this_thread() -> Place | None:
    """That of the calling thread; None: it has none, and is shown to nobody."""
    local, table = _process.local, _table()
    if getattr(local, "table", local) is not table:
        _sit(place(_own_name()), table)
    return local.place  # type: ignore[no-any-return]


def _own_name() -> str:
    """Of a thread that threading has not made there is none, and asking for its Thread would make one."""
    return thread_name(os.getpid(), threading.get_native_id())


def _sit(mine: Place | None, table: _Table | None) -> None:
    """That is the calling thread's place from now on, for its waits in C as well, until there is another table."""
    if mine is not None:
        mine.stand_for((0, 0), threading.get_native_id())
    native.enlist(*((mine.table.map, mine.slot) if mine is not None else ()))
    _process.local.place, _process.local.table = mine, table


def listed(lock: Any, kind: int, method: str, wait: Callable[[], T]) -> T:
    """What wait() returns; the calling thread waits meanwhile, and the table says so.  Not a moment longer, also where
    a signal's handler raises in the middle of this: who is shown as one that waits, and does not, is taken for a part
    of a cycle."""
    mine, before = of_this_thread(), None
    try:
        try:
            if mine is not None:
                before = mine.begin(cell_of(lock), kind, method.encode(errors="replace"), threading.get_native_id())
            return wait()
        finally:
            if mine is not None:
                mine.end(before)
    except BaseException:
        if mine is not None:
            mine.end(before)  # again, as that may be what was interrupted
        raise


def _identity_of(path: str) -> tuple[int, int]:
    found = os.stat(path, follow_symlinks=False)
    return found.st_dev, found.st_ino


def kind_of(what_for: int, timed: bool, keep: bool) -> int:
    return what_for | (TIMED if timed else 0) | (KEEPS if keep else 0)


def asking(owner: Owner) -> Waiter:
    """Who has the local lock of one that a store has, and not that one."""
    who = owner.pid, owner.start, owner.tid, "" if owner.task else owner.thread, owner.task
    return Waiter(*who, owner.method, owner.since, "store", False, owner.task_id)


def cell_of(lock: Any) -> Cell:
    return lock.segment.identity[1], lock.offset


def deadlock() -> ModuleType:
    """For who has waited for long; it imports what looks at all resources."""
    return import_module("coheld.backends.deadlock")


def stay_out() -> None:
    """The calling thread waits in the stead of others, who are shown."""
    _sit(None, _table())


def leave() -> None:
    """At the end of a process that has used locks."""
    for table in _all:
        table.remove()
    sweep(files.directory_here())


def sweep(directory: str) -> None:
    """Remove those of dead processes, and never raise for what others remove meanwhile."""
    here = files.header_here(_KIND, backend="", cell_size=_SLOT.size, libc="", machine="")
    for path, pid, start in list(_made_in(directory)):
        if start_of(pid) != start:
            with suppress(OSError, CoheldError), files.open_to_look(path) as file:
                header = files.header_of(file.read(files.HEADER_LENGTH))
                if header is None or header.pid_namespace == here.pid_namespace:
                    os.unlink(path)


# -- read --------------------------------------------------------------------------------------------------------------


def _made_in(directory: str) -> Iterator[tuple[str, int, int]]:
    with suppress(OSError):
        for entry in os.listdir(directory):
            if maker := _MADE_BY.match(entry):
                yield os.path.join(directory, entry), int(maker[1]), int(maker[2])


def all_waits(directory: str) -> Iterator[Wait]:
    """Of all living processes; nothing is changed."""
    for _, pid, start in _made_in(directory):
        if start_of(pid) == start:
            yield from waits_of(directory, pid, start)


def waits_of(directory: str, pid: int, start: int, tid: int | None = None, task: int = 0) -> Iterator[Wait]:
    """Of that process; one that is being written is not there.  tid, task: only of that thread, and of that task."""
    with suppress(OSError, CoheldError), _opened(directory, pid, start) as file:
        if files.header_of(file.read(files.HEADER_LENGTH)) is None:
            return
        for at, many in _parts():
            raw = _read_at(file, at, many * _SLOT.size)
            if not raw.strip(b"\0"):
                return
            for slot, (number, its_task, its_tid) in enumerate(_WHO.iter_unpack(raw[: len(raw) & -_SLOT.size])):
                if number & 1 and (tid is None or (its_task == task if its_task else its_tid == tid)):
                    place = at + slot * _SLOT.size
                    first, again = (_wait_in(_read_at(file, place, _SLOT.size), pid, start, place) for _ in range(2))
                    if first == again and first.number & 1:
                        yield first


def _parts() -> Iterator[tuple[int, int]]:
    """Where each part of a table begins, and how many slots it has: few at first, as most processes have few."""
    at, many = _FIRST, _CHUNK
    while at < _FIRST + _MOST * _SLOT.size:
        yield at, many
        at, many = at + many * _SLOT.size, min(2 * many, _MANY)


class Names:
    """Of the threads and tasks of processes: those that have a slot there.  Each table is read once."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._of: dict[tuple[int, int], _NamesOfOne] = {}

    def tell(self, owner: Owner, cell: Cell) -> Owner:
        """The same, who holds that cell, with what is known of its names."""
        process = owner.pid, owner.start
        if (names := self._of.get(process)) is None:
            names = self._of[process] = _NamesOfOne(self._directory, *process)
        return replace(owner, thread=names.of_thread(owner.tid), task=names.tasks.get((owner.task_id, cell), ""))


class _NamesOfOne:
    """Of one process: by tid, and by the address of a task and the cell that it holds."""

    def __init__(self, directory: str, pid: int, start: int) -> None:
        self.pid, self.threads, self.tasks = pid, dict[int, str](), dict[tuple[int, Cell], str]()
        for _, inode, offset, _, task, tid, _, _, name in _names_in(directory, pid, start):
            if task:
                self.tasks[task, (inode, offset)] = _text(name)
            else:
                self.threads[tid] = _text(name)
        if pid == os.getpid():
            self.threads = {}  # asked for as they are now

    def of_thread(self, tid: int) -> str:
        if (name := self.threads.get(tid)) is None:
            name = self.threads[tid] = thread_name(self.pid, tid)
        return name


def _names_in(directory: str, pid: int, start: int) -> Iterator[tuple[Any, ...]]:
    """All slots of that process that have a name, as they are."""
    with suppress(OSError, CoheldError), _opened(directory, pid, start) as file:
        if files.header_of(file.read(files.HEADER_LENGTH)) is None:
            return
        for at, many in _parts():
            raw = _read_at(file, at, many * _SLOT.size)
            if not raw.strip(b"\0"):
                return
            yield from (slot for slot in _SLOT.iter_unpack(raw[: len(raw) & -_SLOT.size]) if slot[-1][0])


def goes_on(directory: str, wait: Wait) -> bool:
    """Is it the same still?"""
    with suppress(OSError, CoheldError), _opened(directory, wait.pid, wait.start) as file:
        return _wait_in(_read_at(file, wait.slot, _SLOT.size), wait.pid, wait.start, wait.slot) == wait
    return False


def _opened(directory: str, pid: int, start: int) -> BinaryIO:
    """Raises: OSError: also if it is no plain file of this user's."""
    return files.open_to_look(os.path.join(directory, f"waits-{pid}-{start}"))


def _read_at(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def _wait_in(raw: bytes, pid: int, start: int, slot: int) -> Wait:
    number, inode, offset, since, task, tid, kind, method, name = _SLOT.unpack(raw.ljust(_SLOT.size, b"\0"))
    return Wait(pid, start, tid, task, (inode, offset), kind, since, _text(method), _text(name), number, slot)


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="ignore")
