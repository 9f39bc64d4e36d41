"""Wait for what can be observed. The only place of the tests that sleeps, and only between two looks."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from coheld.backends.files import NAMED_CELL
from coheld.backends.record import CELL_SIZE, Cell
from coheld.native import HEADER_SIZE
from coheld.testing.support import delays

T = TypeVar("T")

PF_EXITING = 0x4  # a flag of linux/sched.h: the task is in do_exit
SYS_FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
FUTEX_PRIVATE = 0x80
FUTEX_WAITS = (0, 9)  # FUTEX_WAIT, FUTEX_WAIT_BITSET


def wait_until(predicate: Callable[[], T], what: str, timeout: float = delays.LONG) -> T:
    """Look until `predicate()` is true, and return its value; after `timeout` s fail, saying `what`."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(delays.TICK)
    return value


@dataclass(frozen=True)
class Task:
    """One line of /proc/<pid>/stat or /proc/<pid>/task/<tid>/stat, as far as the tests need it."""

    state: str  # R S D T t Z X
    parent: int
    flags: int
    start: int  # clock ticks since boot

    @property
    def dying(self) -> bool:
        return self.state in "ZX" or bool(self.flags & PF_EXITING)


def task(pid: int, tid: int | None = None) -> Task | None:
    """The process, or its thread `tid`; None if it is gone."""
    try:
        fd = os.open(f"/proc/{pid}/task/{tid}/stat" if tid else f"/proc/{pid}/stat", os.O_RDONLY)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        text = os.read(fd, 4096).decode(errors="replace")
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return Task(state=fields[0], parent=int(fields[1]), flags=int(fields[6]), start=int(fields[19]))


def gone(pid: int, tid: int | None = None) -> bool:
    """True if the process (or its thread) has ended, is a zombie, or is on its way out in the kernel."""
    found = task(pid, tid)
    return found is None or found.dying


def stopped(pid: int) -> bool:
    """True if every thread of the process stands still after SIGSTOP."""
    found = [task(pid, tid) for tid in threads_of(pid)]
    return bool(found) and all(one is not None and one.state == "T" for one in found)


def threads_of(pid: int) -> list[int]:
    """The thread numbers of a process, its main thread first; empty if it is gone."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        return []


@dataclass(frozen=True)
class FutexWait:
    """A thread that sleeps in the kernel on a futex that processes share."""

    tid: int
    address: int  # of the word, in that process


def _futex_wait(pid: int, tid: int) -> FutexWait | None:
    try:
        fields = Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] != str(SYS_FUTEX):  # also "running", and -1 outside of a call
        return None
    operation = int(fields[2], 16)
    shared = not operation & FUTEX_PRIVATE  # a wait for the GIL or a threading.Lock is private
    return FutexWait(tid, int(fields[1], 16)) if shared and operation & 0x7F in FUTEX_WAITS else None


def blocked_in_futex(pid: int, tid: int | None = None) -> FutexWait | None:
    """How thread `tid` (None: any thread) of a process sleeps on a shared futex; None if it does not."""
    tids = threads_of(pid) if tid is None else [tid]
    return next((wait for wait in (_futex_wait(pid, one) for one in tids) if wait), None)


def blocked(pid: int, tid: int | None = None) -> int | None:
    """The thread of that process (None: any) that waits for a lock or a guard: in the kernel, or by looking again and
    again.

    Use with `wait_until`: it tells that somebody truly waits for a lock, not only that he is about to.
    """
    if (found := blocked_in_futex(pid, tid)) is not None:
        return found.tid
    waiting = (who for who in _enrolled() if who[0] == pid and tid in (None, who[1]))
    return next((number for _, number in waiting), None)


def _enrolled() -> Iterator[tuple[int, int]]:
    """Process and thread of each waiter on record in the cells that files of COHELD_DIR guard."""
    directory = Path(os.environ.get("COHELD_DIR", os.devnull))  # a default directory is not looked at
    for path in [*directory.glob("name-*"), *directory.glob("cells-*/chunk-?")]:
        with suppress(OSError):
            data = path.read_bytes()
            first = NAMED_CELL if path.name.startswith("name-") else HEADER_SIZE
            for offset in range(first, len(data) - CELL_SIZE + 1, CELL_SIZE):
                cell = Cell(data, offset)
                found = [*cell.waiters(), *cell.watchers()] if cell.sane() else []
                yield from ((one[0], one[2]) for one in found)


def wait_until_blocked(pid: int, tid: int | None = None) -> int:
    """Return once thread `tid` (None: any thread) of the process waits for a lock; its number."""
    found = wait_until(lambda: blocked(pid, tid), f"thread {tid or '(any)'} of process {pid} waits for a lock")
    assert found is not None
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """Of each process there is, its number and its parent's."""
    for number in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        if (one := task(number)) is not None:
            yield number, one.parent


def children(pid: int) -> list[int]:
    """The direct children of a process, zombies among them."""
    return [number for number, parent in _parents() if parent == pid]


def ancestors(pid: int) -> list[int]:
    """The parent of a process, its parent, and so on."""
    found: list[int] = []
    while (one := task(pid)) is not None and (pid := one.parent):
        found.append(pid)
    return found


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents before their children, zombies among them."""
    families: dict[int, list[int]] = {}
    for number, parent in _parents():
        families.setdefault(parent, []).append(number)
    found, todo = [], [pid]
    while todo:
        below = families.get(todo.pop(), [])
        found += below
        todo += below
    return found
