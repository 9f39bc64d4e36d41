"""Where a lock lives: its file and cell, as the tests of segments look at them."""

import os
from pathlib import Path

from coheld import Lockable
from coheld.testing.contract.observe import BACKEND, CAPABILITIES, LOCAL
from coheld.testing.support import delays

Place = tuple[str, int]


def place_of(obj: Lockable) -> Place:
    """The path of the file, and the offset of the cell in it."""
    lock = obj.__lock__
    return lock.segment.path, lock.offset


def file_of(obj: Lockable) -> Path:
    """The file that the object's cell is in, as this process found it."""
    return Path(obj.__lock__.segment.path)


def inode_of(obj: Lockable) -> int:
    """Which file it is: two processes with one inode have one lock."""
    return int(obj.__lock__.segment.identity[1])


def all_in(directory: str | os.PathLike[str]) -> list[str]:
    """The name of every file that is there, half-made ones too; but of the tables of who waits, which go with their
    processes, and of what this host knows of a store's grant, which goes with the local lock."""
    names = [name for name in os.listdir(directory) if not name.startswith("waits-")]
    return sorted(name for name in names if "~grant." not in name or name.partition("~")[0] not in names)


def file_called(name: str) -> str:
    """What the file of a short name is called; of one in a store, that of the local lock."""
    return f"name-{name}" if CAPABILITIES.files else os.path.basename(BACKEND.named(name).path)


def arenas_of(directory: str | os.PathLike[str], pid: int) -> list[str]:
    """The arena files that a process made."""
    return [name for name in all_in(directory) if name.startswith(f"arena-{pid}-")]


def live_once() -> None:
    """A process that starts, and so sweeps, and ends."""
    with LOCAL.anonymous():
        pass
    LOCAL._leave()


def took(obj: Lockable) -> bool:
    """Could the lock be had, without waiting?  It is free again."""
    if got := obj.acquire(blocking=False):
        obj.release()
    return got


def had(obj: Lockable) -> bool:
    """Could the lock be had within delays.LONG?  It is free again."""
    if got := obj.acquire(timeout=delays.LONG):
        obj.release()
    return got
