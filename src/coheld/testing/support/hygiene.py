"""What a test may not leave behind: processes, threads, locks, and files outside of its own directory."""

import contextlib
import ctypes
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from coheld.testing.support import delays, states

PR_SET_CHILD_SUBREAPER = 36
SYS_GET_ROBUST_LIST = {"x86_64": 274, "aarch64": 100}
PREFIX = "coheld-test-"  # of the private directories in /dev/shm; then the process that made it
OWN = f"coheld-{os.geteuid()}"
OURS = ("arena-", "cells-", "name-", "waits-", ".new-", "core.")
"""How the names begin."""


def adopt_orphans() -> None:
    """Make this process the parent of every orphan below it, so that nothing gets out of sight."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def stop_ignoring_signals() -> None:
    """A run in the background (nohup, `&`) begins with some ignored, and whatever it starts would inherit that. A
    handler is not inherited; this one keeps such a run alive."""
    for number in (signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A new directory in shared memory, for COHELD_DIR. Removed at the end with all that is in it."""
    directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir="/dev/shm"))
    try:
        yield directory
    finally:
        with contextlib.suppress(FileNotFoundError):  # the test has removed it
            shutil.rmtree(directory)


def remove_private_directories(pid: int) -> None:
    """Remove what a test process that was killed could not remove."""
    for directory in Path("/dev/shm").glob(f"{PREFIX}{pid}-*"):
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def nothing_left(directories: Sequence[Path] | None = None) -> Iterator[None]:
    """The body leaves behind no process, thread, file (in directories, else `places()`), or lock of this thread.

    What it leaves is reported; processes are ended, too.
    """
    directories = places() if directories is None else directories
    processes = set(states.descendants(os.getpid()))
    threads, files, locks = set(threading.enumerate()), _segments(directories), _robust_locks()
    yield
    _stop_forkserver()
    left = [f"process {one}" for one in _end(processes | _resource_tracker())]
    left += [f"thread {thread.name}" for thread in _threads_left(threads)]
    left += [f"file {path}" for path in _files_left(directories, files)]
    left += [f"{_robust_locks() - locks} locks that this thread holds"] if _robust_locks() > locks else []
    assert not left, "the test left behind: " + ", ".join(left)


# ---- processes ---------------------------------------------------------------------------------------------


def _stop_forkserver() -> None:
    """It would hand the environment of this test on to those after it."""
    if (loaded := sys.modules.get("multiprocessing.forkserver")) is not None:
        loaded._forkserver._stop()  # what CPython's own tests use


def _resource_tracker() -> set[int]:
    """multiprocessing's helper, which ends with us. Stopped earlier it would remove what is still in use."""
    loaded = sys.modules.get("multiprocessing.resource_tracker")
    return set() if loaded is None else {loaded._resource_tracker._pid} - {None}


def _end(before: set[int]) -> list[str]:
    """Reap what has ended; kill what has not, and say what it was."""

    def still_running() -> set[int]:
        multiprocessing.active_children()  # reaps
        found = set(states.descendants(os.getpid())) - before
        _reap_orphans(found)
        return {pid for pid in found if not states.gone(pid)}

    with contextlib.suppress(AssertionError):
        states.wait_until(lambda: not still_running(), "all processes of the test have ended", delays.MEDIUM)
        return []
    left = sorted(still_running())
    descriptions = [_describe(pid) for pid in left]
    for pid in left:
        _kill(pid)
    states.wait_until(lambda: not still_running(), "the killed processes have ended")
    return descriptions


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _reap_orphans(descendants: set[int]) -> None:
    for pid in descendants:
        if (one := states.task(pid)) is not None and one.parent == os.getpid() and one.dying:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _describe(pid: int) -> str:
    with contextlib.suppress(OSError):
        arguments = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        return f"{pid} ({' '.join(arguments)})"
    return str(pid)


def _threads_left(before: set[threading.Thread]) -> set[threading.Thread]:
    def left() -> set[threading.Thread]:
        return set(threading.enumerate()) - before

    with contextlib.suppress(AssertionError):
        states.wait_until(lambda: not left(), "all threads of the test have ended", delays.MEDIUM)
    return left()


# ---- locks ------------------------------------------------------------------------------------------------


class _RobustList(ctypes.Structure):
    """struct robust_list_head of linux/futex.h; its first word begins a ring through all robust mutexes held."""

    _fields_ = (("next", ctypes.c_size_t), ("offset", ctypes.c_long), ("pending", ctypes.c_size_t))


def _robust_locks() -> int:
    """How many robust mutexes this thread holds, as the kernel would find them at its death."""
    head, size = ctypes.POINTER(_RobustList)(), ctypes.c_size_t()
    number = SYS_GET_ROBUST_LIST[platform.machine()]
    ctypes.CDLL(None).syscall(number, 0, ctypes.byref(head), ctypes.byref(size))
    end, count = ctypes.addressof(head.contents), 0
    address = head.contents.next & ~1  # the lowest bit marks priority inheritance
    while address != end:
        count += 1
        address = ctypes.c_size_t.from_address(address).value & ~1
    return count


# ---- files ------------------------------------------------------------------------------------------------


def places() -> list[Path]:
    """Where a process without COHELD_DIR would write to. Empty while another run of these tests shares them."""
    return [] if _other_runs() else [Path("/dev/shm"), Path(tempfile.gettempdir()), Path.cwd()]


def _other_runs() -> set[int]:
    runs = {int(path.name.split("-")[2]) for path in Path("/dev/shm").glob(f"{PREFIX}*-*")}
    family = {os.getpid(), *states.ancestors(os.getpid()), *states.descendants(os.getpid())}
    return {pid for pid in runs - family if not states.gone(pid)}


def _segments(directories: Iterable[Path]) -> set[Path]:
    """Everything of ours in these directories, and core dumps."""
    found = set()
    for one in directories:
        if PREFIX not in str(one):
            found |= {one / name for name in _names(one) if name.startswith(OURS)}
            found |= {one / OWN / name for name in _names(one / OWN)}
    return found


def _names(directory: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(directory)
    return []


def _files_left(directories: Iterable[Path], before: set[Path]) -> list[Path]:
    """Other programs of this user may run beside the tests, and theirs are not ours: nothing is removed here."""

    def left() -> list[Path]:
        return sorted(path for path in _segments(directories) - before if not _used_elsewhere(path))

    with contextlib.suppress(AssertionError):
        states.wait_until(lambda: not left(), "no file is left", delays.MEDIUM)
    return left()


def _used_elsewhere(path: Path) -> bool:
    mine = {os.getpid(), *states.descendants(os.getpid())}
    others = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return any(str(path) in _maps(pid) for pid in others if pid not in mine)


def _maps(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/maps").read_text()
    return ""
