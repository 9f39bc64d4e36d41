"""Who: a process and thread, known by number and start time, since numbers are used again."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from .process import command_of, start_of, thread_runs


@dataclass(frozen=True, slots=True)
class Owner:
    """The thread that holds a lock, or did when it died.

    pid, tid: process and thread number; 0 for one that died before it had written them down, or after.  start: when the
    process started, in the system's own unit (on Linux clock ticks since boot).  method: the locked method, "" for
    acquire and with.  since: when it took the lock, seconds of time.monotonic(), to 1/100 s; 0 where that is not known.
    depth: how many times it holds it.  task_id: of a task that holds it, a number that no other living task of its
    process has; 0: the thread does.  task, thread: the names of that task, and of the thread; empty where they are not
    known.  Of another process they are what it has last said of them.  host: on which it runs; empty: this one.
    """

    pid: int
    start: int
    tid: int
    method: str = ""
    since: float = 0.0
    depth: int = 0
    task_id: int = 0
    task: str = field(default="", compare=False)
    thread: str = field(default="", compare=False)
    host: str = ""

    @property
    def command(self) -> str:
        """The command line of its process, cut to 60 characters; empty if that has ended."""
        return command_of(self.pid) if not self.host and self.alive() else ""

    def alive(self) -> bool:
        """Do the process and the thread still run?  Asks the kernel now; never blocks.  On another host: as far as is
        known."""
        return bool(self.host) or (start_of(self.pid) == self.start and thread_runs(self.pid, self.tid))

    def __str__(self) -> str:
        if not self.pid:
            return "a process that had not written its name down yet, or had taken it off"
        command, thread = self.command, f", thread {self.thread or self.tid}"
        task = f", task {self.task or hex(self.task_id)}" if self.task_id else ""
        where = f" in {self.method}" if self.method else ""
        held = f" for {max(0.0, time.monotonic() - self.since):.3g} s" if self.depth else ""
        host = f" on {self.host}" if self.host else ""
        return f"process {self.pid}{host}{f' ({command})' if command else ''}{thread}{task}{where}{held}"
