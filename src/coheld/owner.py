"""Who: a process and thread, known by number and start time, since numbers are used again."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass


def start_of(pid: int) -> int | None:
    """Start of a process or thread in clock ticks since boot; None if there is none of that number.

    A process that has ended but was not waited for yet counts as gone.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in b"ZX" else int(fields[19])


def command_of(pid: int) -> str:
    """The command line of a process, cut to 60 characters; empty if it cannot be read."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            text = file.read(400).replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
    return text if len(text) <= 60 else text[:59] + "…"


def thread_name(pid: int, tid: int) -> str:
    """The name of a thread of this process; empty for every other."""
    if pid != os.getpid():
        return ""
    return next((t.name for t in threading.enumerate() if t.native_id == tid), "")


@dataclass(frozen=True, slots=True)
class Owner:
    """The thread that holds a lock, or did when it died.

    pid, tid: process and thread number; 0 for one that died before it had written them down, or after.  start: when the
    process started, clock ticks since boot.  method: the locked method, "" for acquire and with.  since: when it took
    the lock, seconds of time.monotonic(), to 1/100 s; 0 where that is not known.  depth: how many times it holds it.
    """

    pid: int
    start: int
    tid: int
    method: str = ""
    since: float = 0.0
    depth: int = 0

    def alive(self) -> bool:
        """Do the process and the thread still run?  Asks the kernel now; never blocks."""
        return start_of(self.pid) == self.start and os.path.exists(f"/proc/{self.pid}/task/{self.tid}")

    def __str__(self) -> str:
        if not self.pid:
            return "a process that had not written its name down yet, or had taken it off"
        name = thread_name(self.pid, self.tid) or f"{self.tid}"
        command = command_of(self.pid) if self.alive() else ""
        where = f" in {self.method}" if self.method else ""
        held = f" for {max(0.0, time.monotonic() - self.since):.3g} s" if self.depth else ""
        return f"process {self.pid}{f' ({command})' if command else ''}, thread {name}{where}{held}"
