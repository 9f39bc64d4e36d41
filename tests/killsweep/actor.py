"""A forked process that makes one call, and cannot hang for ever."""

import contextlib
import faulthandler
import os
import platform
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

from coheld.testing.support import states

SYS_RESTART = {"x86_64": 219, "aarch64": 128}[platform.machine()]  # a sleep that SIGSTOP broke goes on under this


class Actor:
    """A forked process that calls once, and is ended by SIGALRM if it hangs."""

    def __init__(self, play: Callable[[], None], bound: float) -> None:
        self._gate, self._gate_in = os.pipe()
        self._open = False
        self.status: int | None = None
        self.pid = os.fork()
        if not self.pid:
            _play(play, self._gate, bound)
        os.close(self._gate)

    def open_gate(self) -> None:
        """Let it begin, if it has not."""
        if not self._open:
            os.write(self._gate_in, b"1")
        self._open = True

    def end(self) -> str | None:
        """Wait for its end, and say what was wrong."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._gate_in)
        if self.status == -signal.SIGALRM:
            return "hangs"
        return f"ended with {self.status}" if self.status else None

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.end()

    def settle(self) -> None:
        """Wait until it sleeps for the lock, or is done."""
        states.wait_until(lambda: states.gone(self.pid) or _asleep(self.pid), "an actor settles")

    def stop(self) -> None:
        """SIGSTOP, and wait until it stands."""
        os.kill(self.pid, signal.SIGSTOP)
        states.wait_until(lambda: states.stopped(self.pid), "an actor stands still")

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)


def _asleep(pid: int) -> bool:
    """Does it sleep for the lock, perhaps once more after SIGCONT?"""
    if states.blocked_in_futex(pid):
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/syscall").read_text().split()[0] == str(SYS_RESTART)
    return False


def _play(play: Callable[[], None], gate: int, bound: float) -> None:
    """The life of a forked process."""
    status = 1
    try:
        _limit(bound)
        os.read(gate, 1)
        play()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _limit(bound: float) -> None:
    """In a child: run on any processor; after so many seconds show where it hangs, and die."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.setitimer(signal.ITIMER_REAL, bound)
