"""The worker processes of the demo."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from coheld.cli import bond

assert sys.platform == "linux"  # type checkers for other systems stop here

_PATIENCE = 10.0  # seconds for the workers to end their last calls
_TICK = 0.005


class Crew:
    """Processes in numbered places. They die with this one; a place whose process is gone can be filled again."""

    def __init__(self, work: Callable[[int, int], None]) -> None:
        self.work = work  # (place, how many were hired before): what a worker does, until it is told to end
        self.places: dict[int, int] = {}  # by process number, of those not reaped yet
        self.hired = 0

    def hire(self, place: int) -> None:
        """Start a process in that place."""
        boss = os.getpid()
        if pid := os.fork():
            self.places[pid] = place
            self.hired += 1
        else:
            self._be_worker(boss, place)

    def _be_worker(self, boss: int, place: int) -> NoReturn:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal asks everybody; the boss decides
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            logging.getLogger("coheld").addHandler(logging.NullHandler())  # the display tells of deaths
            if bond.die_with(boss):
                self.work(place, self.hired)
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)

    def reap(self) -> list[tuple[int, int]]:
        """Those who have ended since: place, and exit status (minus the signal's number). Does not block."""
        ended = []
        for pid, place in list(self.places.items()):
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if reaped:
                del self.places[pid]
                ended.append((place, os.waitstatus_to_exitcode(status)))
        return ended

    def kill_if(self, pid: int, guilty: Callable[[], bool]) -> int | None:
        """Stop the process, look, and kill it or let it go on: what was seen is true at the moment of its death.

        Returns when it was killed (monotonic ns; it is reaped then), or None. Blocks for the moment of the stop.
        """
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if guilty():
            return self._kill(pid)
        os.kill(pid, signal.SIGCONT)
        return None

    def _kill(self, pid: int) -> int:
        now = time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        del self.places[pid]
        return now

    def await_end(self) -> list[tuple[int, int]]:
        """Wait, for some seconds at most, for those who were told to end; as reap()."""
        ended, deadline = self.reap(), time.monotonic() + _PATIENCE
        while self.places and time.monotonic() < deadline:
            time.sleep(_TICK)
            ended += self.reap()
        return ended

    def kill_all(self) -> list[int]:
        """End every process that is left; returns their places."""
        left = list(self.places.items())
        for pid, _ in left:
            self._kill(pid)
        return [place for _, place in left]
