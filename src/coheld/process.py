"""What the system says of a process: does it live, since when, what does it run."""

from __future__ import annotations

import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_TASKS = "/proc/self/task"  # where there is one


def at_fork(
    *,
    before: Callable[[], object] | None = None,
    parent: Callable[[], object] | None = None,
    child: Callable[[], object] | None = None,
) -> None:
    """As os.register_at_fork, where processes fork."""
    if sys.platform != "win32":
        given = {"before": before, "after_in_parent": parent, "after_in_child": child}
        os.register_at_fork(**{when: call for when, call in given.items() if call})


def start_of(pid: int) -> int | None:
    """When a process began, in a unit of the system's own; None if there is none of that number.

    Two processes that had one number have two starts. One that has ended but was not waited for yet counts as gone.
    On Linux threads have one as well, and the unit is a clock tick since boot.
    """
    if sys.platform == "win32":
        return _start_on_windows(pid)
    if sys.platform == "darwin":
        return _start_on_mac(pid)
    return _start_on_linux(pid)


def _start_on_linux(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in b"ZX" else int(fields[19])


def command_of(pid: int) -> str:
    """The command line of a process, one line cut to 60 characters; empty if it cannot be read."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            raw = file.read(400).decode(errors="replace")
    except OSError:
        return ""
    text = " ".join(printable(raw).split())
    return text if len(text) <= 60 else text[:59] + "…"


def printable(text: str) -> str:
    """In one line, and with nothing in it that a terminal obeys; names are as programs give them."""
    return "".join(char if char.isprintable() else " " for char in text)


def thread_name(pid: int, tid: int) -> str:
    """The name of a thread: Python's own in this process, the system's elsewhere; empty if it is not known, or no more
    than that of its process."""
    if pid == os.getpid():
        return next((t.name for t in threading.enumerate() if _number_of(t) == tid), "")
    try:
        with open(f"/proc/{pid}/task/{tid}/comm") as thread, open(f"/proc/{pid}/comm") as process:
            name, common = thread.read().strip(), process.read().strip()
    except (OSError, ValueError):
        return ""
    return name if name != common else ""


def thread_runs(pid: int, tid: int) -> bool:
    """Does that thread of a living process run?  Where nobody can say, it does as long as the process lives."""
    if os.path.isdir(_TASKS):
        return os.path.exists(f"/proc/{pid}/task/{tid}")
    return pid != os.getpid() or any(_number_of(t) == tid for t in threading.enumerate())


def _number_of(thread: threading.Thread) -> int | None:
    """After os.fork the main thread says the number of the parent's, before Python 3.12."""
    return _fork.tid if _fork.tid and thread is threading.main_thread() else thread.native_id


class _Fork:
    """The last one behind this process.  tid: of the thread that it left, which is the main one since; 0: none."""

    tid = 0

    def become_child(self) -> None:
        self.tid = threading.get_native_id()


_fork = _Fork()
at_fork(child=_fork.become_child)


# ---- macOS ----------------------------------------------------------------------------------------------------------

_BSD_INFO = struct.Struct("=4xI88x20x4xQQ")  # struct proc_bsdinfo: pbi_status, pbi_start_tvsec, pbi_start_tvusec
_PIDTBSDINFO = 3  # a flavor of proc_pidinfo
_ZOMBIE = 5


def start_in_bsd_info(info: bytes) -> int | None:
    """Microseconds since 1970, in what proc_pidinfo says."""
    if len(info) < _BSD_INFO.size:
        return None
    status, seconds, micros = _BSD_INFO.unpack_from(info)
    return None if status == _ZOMBIE else int(seconds) * 1_000_000 + int(micros)


if sys.platform == "darwin":

    def _start_on_mac(pid: int) -> int | None:
        import ctypes

        buffer = ctypes.create_string_buffer(_BSD_INFO.size)
        length = ctypes.CDLL(None).proc_pidinfo(pid, _PIDTBSDINFO, ctypes.c_uint64(0), buffer, len(buffer))
        return start_in_bsd_info(buffer.raw[: max(0, length)])


# ---- Windows --------------------------------------------------------------------------------------------------------

_QUERY_LIMITED_INFORMATION = 0x1000
_STILL_ACTIVE = 259


def start_in_file_time(low: int, high: int, exit_code: int) -> int | None:
    """Tenths of microseconds since 1601, in what GetProcessTimes and GetExitCodeProcess say."""
    return high << 32 | low if exit_code == _STILL_ACTIVE else None


if sys.platform == "win32":

    def _start_on_windows(pid: int) -> int | None:
        import ctypes
        from ctypes import wintypes

        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.OpenProcess.restype = wintypes.HANDLE
        process = wintypes.HANDLE(kernel.OpenProcess(_QUERY_LIMITED_INFORMATION, False, pid))
        if not process:
            return None
        times, code = [wintypes.FILETIME() for _ in range(4)], wintypes.DWORD()
        try:
            known = kernel.GetExitCodeProcess(process, ctypes.byref(code))
            known = known and kernel.GetProcessTimes(process, *map(ctypes.byref, times))
        finally:
            kernel.CloseHandle(process)
        created = times[0]
        return start_in_file_time(created.dwLowDateTime, created.dwHighDateTime, code.value) if known else None


class _Threads:
    """Of coheld's own, in this process."""

    deaf = False


def keep_signals() -> None:
    """From now on signals are for the threads that the program has made: those of coheld that begin later have all of
    them blocked, and so has what these start."""
    _Threads.deaf = True


def start(thread: threading.Thread) -> None:
    """Of coheld's own."""
    with starting():
        thread.start()


@contextmanager
def starting() -> Iterator[None]:
    """Threads that begin in the body are coheld's own."""
    if sys.platform == "win32" or not _Threads.deaf:
        yield
        return
    import signal  # takes its time, and who switches this on has it

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield  # they begin with the mask of who starts them
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
