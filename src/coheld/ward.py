"""The ward of an owner: a process that works on its behalf, and that the lock waits for if the owner is killed.

`coheld run` needs it: the runner holds the mutex, its command works. When the runner is killed, the kernel frees the
mutex first and kills the command afterwards (the robust list is walked in exit_mm, PR_SET_PDEATHSIG sent in
exit_notify), and a command that has gigabytes to give back is not gone for seconds. So the runner writes down who its
command is before that runs its first instruction, and whoever gets the mutex next, in whatever program, first waits
until that process is gone.

    runner                                  command
    1  takes the mutex; if the flag WARDED
       is up, waits for a dead one's ward
    2  forks                                asks to be killed when its parent dies; ends if that is dead already;
                                            waits at the gate
    3  writes the record, raises the flag
    4  opens the gate                       runs
    5  reaps it                             ends
    6  removes the record, lowers the flag
    7  releases the mutex

Why no step races. Killed before 4: the gate closes and the command never runs, whatever is in the record; so one that
was cut short is as good as none. Killed at 4 or 5: the record is whole and the flag is up, and the next owner finds
both, under the mutex. Killed at 6: the record names a process that is gone; its number alone might be somebody else's
by now, its start time tells. Killed in 1, or out of time there: flag and record are as they were, for the next.
"""

import os
import re
import select
import signal
import sys
import time
from contextlib import suppress

from .errors import InsecureError
from .process import start_of

assert sys.platform == "linux"  # type checkers for other systems stop here

_RECORD = re.compile(rb"([1-9]\d{0,8}) (\d{1,18})\n")
_SLICE = 1.0  # seconds; no sleep is longer


def path_of(file: str) -> str:
    """Where the record of a named resource is, beside the resource's own file."""
    directory, name = os.path.split(file)
    return os.path.join(directory, f"ward-{name.removeprefix('name-')}")


def write(path: str, pid: int) -> None:
    """Say that the process works in this critical section. By the owner, before the process starts to."""
    clear(path)  # what is there may be somebody else's
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        os.fchmod(descriptor, 0o600)  # the umask may have taken more away
        os.write(descriptor, b"%d %d\n" % (pid, start_of(pid) or 0))
    finally:
        os.close(descriptor)


def clear(path: str) -> None:
    """Nobody works in it besides the owner."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def settle(path: str, deadline: float) -> bool:
    """Kill the process on record, wait until it is gone, and clear the record. By the owner only.

    Blocks until the deadline (seconds of time.monotonic()). Returns False if it was still there then: the
    record stays, and the resource must not be used. Raises: InsecureError: if others could have written the record.
    """
    if (found := _read(path)) is not None and not _end(*found, deadline):
        return False
    clear(path)
    return True


def _read(path: str) -> tuple[int, int] | None:
    """Number and start time of the process on record; None where there is none, or none that got to run."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        _check_author(path, os.fstat(descriptor))
        line = os.read(descriptor, 64)
    finally:
        os.close(descriptor)
    whole = _RECORD.fullmatch(line)
    return (int(whole[1]), int(whole[2])) if whole else None


def _check_author(path: str, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise InsecureError(f"{path} says whom to kill, and others could have written it; remove it", resource=path)


def _end(pid: int, start: int, deadline: float) -> bool:
    """Kill that process and wait; True once it is gone. A zombie is: it has given back all that it had."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        # Looked at after the opening: the descriptor means who it says. None: its first thread has ended.
        if start_of(pid) not in (None, start):
            return True
        with suppress(ProcessLookupError, PermissionError):  # a set-user-ID command: wait for it nevertheless
            signal.pidfd_send_signal(process, signal.SIGKILL)
        return _wait(process, deadline)
    finally:
        os.close(process)


def _wait(process: int, deadline: float) -> bool:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        if poll.poll(1000 * max(0.0, min(left, _SLICE))):
            return True
        if left <= 0:
            return False
