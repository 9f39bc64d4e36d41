"""What dead processes left of shared memory, and how it is removed while others live.

Who uses an arena has a shared flock on it, so one that can be locked exclusively is in nobody's use, but for two: a
daemon that closed its descriptors, and a process that is just leaving.  Both still map it.  The second has signed off
before it closed its own: of several that leave at once, the last to look finds that all the others have.  The look
takes a while, in which neither may be missed: a process that is forked by one not looked at yet, which then ends (the
processes are listed again until there is no new one); and one that attaches and closes its descriptors (it has set
the time of the file).  The flock is not kept meanwhile, since who leaves and does not get it trusts that whoever has
it has not begun to look yet.  tests/models searches all of this.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from ..errors import BackendError, InsecureError
from ..process import start_of
from .files import open_checked, sweep_sockets, unlink_whole

assert sys.platform == "linux"  # type checkers for other systems stop here

_MADE_BY = re.compile(r"(?:arena|\.new)-(\d+)-(\d+)-[0-9a-f]+\Z")


@contextmanager
def directory_locked(directory: str) -> Iterator[None]:
    """Names are taken away by one process at a time: blocks while another does (for moments); a killed one's turn
    ends with it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flock_soon(fd, fcntl.LOCK_EX, directory)
        yield
    finally:
        _unlock_and_close(fd)


def flock_soon(fd: int, operation: int, path: str) -> None:
    """Take a flock that others have for moments only; blocks for a second at most.

    Raises: BackendError: if it is not to be had: who has it was stopped.
    """
    deadline = time.monotonic() + 1.0
    while True:
        try:
            return fcntl.flock(fd, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BackendError(f"{path} is kept locked by a process that does not go on", resource=path) from None
            time.sleep(0.001)


def _unlock_and_close(fd: int) -> None:
    """A child that another thread forks meanwhile has the descriptor too: closing ours would leave the flock there."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def sweep(directory: str) -> None:
    """Remove what dead processes left; never blocks on a live one, never raises for what others remove meanwhile."""
    sweep_sockets(directory)
    _remove_unused(directory, [path for path, pid, start in _made_in(directory) if start_of(pid) != start])


def leave(directory: str, used: set[str], shared: bool) -> None:
    """The same by a process that has signed off and closed its descriptors, and for what it made or used as well.

    shared: others may map what it made; if not, the look at all processes is spared.
    """
    candidates = []
    me = os.getpid(), start_of(os.getpid())
    for path, pid, start in _made_in(directory):
        mine = (pid, start) == me
        if mine and not shared:
            _unlink_unused(path)
        elif mine or path in used or start_of(pid) != start:
            candidates.append(path)
    _remove_unused(directory, candidates)


def sign_off() -> object:
    """Tell, in this process's list of mappings, that it is leaving; true as long as the result lives."""
    fd = os.memfd_create(_SIGNED_OFF)
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        told = mmap.mmap(fd, mmap.PAGESIZE)
    finally:
        os.close(fd)
    told.madvise(mmap.MADV_DONTFORK)
    return told


_SIGNED_OFF = "coheld-left"


def _made_in(directory: str) -> Iterator[tuple[str, int, int]]:
    """Path, and number and start of its maker, of each arena and half-made file."""
    for entry in os.listdir(directory):
        if maker := _MADE_BY.match(entry):
            yield os.path.join(directory, entry), int(maker[1]), int(maker[2])


def _remove_unused(directory: str, paths: list[str]) -> None:
    times = {path: _time_if_unused(path) for path in paths}
    while times := {path: time for path, time in times.items() if time is not None}:
        mapped = _mapped_files(directory)
        free = {path: time for path, time in times.items() if os.path.basename(path) not in mapped}
        changed = [path for path, time in free.items() if _unlink_unless_touched(path, time)]
        times = {path: _time_if_unused(path) for path in changed}


def _time_if_unused(path: str) -> int | None:
    """The time of the file, which each who attaches sets; None if a process has a flock on it, or it is gone."""
    with _exclusively(path) as fd:
        return None if fd is None else os.fstat(fd).st_mtime_ns


def _unlink_unless_touched(path: str, time: int) -> bool:
    """Remove the file if no process has a flock on it; has somebody attached since that time instead?"""
    with _exclusively(path) as fd:
        if fd is None:
            return False
        touched = os.fstat(fd).st_mtime_ns != time
        if not touched:
            unlink_whole(path)
        return touched


def touch(fd: int) -> None:
    """By one who attaches and has its flock: a look at all processes that has begun before does not count."""
    now = time.time_ns()  # the clock of the file system is too coarse to tell two apart
    os.utime(fd, ns=(now, now))


def _unlink_unused(path: str) -> None:
    with _exclusively(path) as fd:
        if fd is not None:
            unlink_whole(path)


@contextmanager
def _exclusively(path: str) -> Iterator[int | None]:
    """The open file, if it is there and no process has a flock on it; nobody gets one meanwhile.  An attacher that gets
    its own only after that finds that the path is gone (shm.attach_arena)."""
    fd = _open_if_unused(path)
    try:
        yield fd
    finally:
        if fd is not None:
            _unlock_and_close(fd)


def _open_if_unused(path: str) -> int | None:
    with suppress(FileNotFoundError, BlockingIOError, InsecureError), ExitStack() as opened:
        fd = open_checked(path)
        opened.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened.pop_all()
        return fd
    return None


def _mapped_files(directory: str) -> set[str]:
    """The files that any process maps, but for those that have signed off."""
    needle = b" " + os.fsencode(os.path.realpath(directory)) + b"/"  # as the kernel spells it
    gone = f"/memfd:{_SIGNED_OFF} ".encode()
    found: set[str] = set()
    for pid in _processes():
        with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
            maps = file.read()
            if needle in maps and gone not in maps:
                found.update(_path_of(line) for line in maps.splitlines() if needle in line)
    return found


def _processes() -> Iterator[str]:
    """All processes, and those that they have forked by the time that one has looked at each."""
    seen: set[str] = set()
    while new := set(filter(str.isdigit, os.listdir("/proc"))) - seen:
        yield from new
        seen |= new


def _path_of(line: bytes) -> str:
    return os.path.basename(os.fsdecode(line[line.index(b"/") :]))
