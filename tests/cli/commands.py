"""What the tests of the command share: how it is started, and a terminal with a shell to start it in."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from coheld import Lockable
from coheld.testing.support import delays, states

COHELD = [sys.executable, "-m", "coheld"]
PYTHON = [sys.executable, "-ISc"]  # a command that starts fast


def coheld(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, without a terminal."""
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "timeout": delays.LONG, **options}
    return subprocess.run([*COHELD, *arguments], check=False, capture_output=True, text=True, **settings)


def really_gone(pid: int) -> bool:
    """True if the process has given everything back: it is a zombie, or has been reaped."""
    found = states.task(pid)
    return found is None or found.state in "ZX"


def wait_for_line(path: Path) -> str:
    """The first line of a file that another process writes, once it is there."""
    states.wait_until(lambda: path.exists() and path.read_text().endswith("\n"), f"a line in {path.name}")
    return path.read_text().splitlines()[0]


# A job-control shell of one job: leads a session on its terminal, puts the job in a group of its own in the
# foreground, and tells on descriptor 3 what becomes of it; a byte on descriptor 4 continues it, there or not.
# It leaves a job alone that is stopped by SIGSTOP: that is the test itself.
_SHELL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = os.fork()
if not job:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execvp(sys.argv[1], sys.argv[1:])
tell = lambda text: os.write(3, text.encode() + b"\\n")
tell(f"job {job}")
while True:
    _, status = os.waitpid(job, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        break
    if os.WSTOPSIG(status) == signal.SIGSTOP:
        continue
    tell(f"stopped {signal.Signals(os.WSTOPSIG(status)).name}")
    os.tcsetpgrp(0, os.getpgrp())
    if os.read(4, 1) == b"f":
        os.tcsetpgrp(0, job)
    os.kill(-job, signal.SIGCONT)
tell(f"ended {os.waitstatus_to_exitcode(status)}")
"""


class Terminal:
    """A terminal, a shell on it, and a job in its foreground. Leaving the block ends what is left of them."""

    def __init__(self, job: Sequence[str], **environment: str) -> None:
        self._master, slave = os.openpty()
        self._news, news = os.pipe()
        orders, self._orders = os.pipe()
        shell = f"import os; os.dup2({news}, 3); os.dup2({orders}, 4); os.closerange(5, 100)\n{_SHELL}"
        self._shell = subprocess.Popen(
            [*PYTHON, shell, *job],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            pass_fds=(news, orders),
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120", **environment},
        )
        for descriptor in (slave, news, orders):
            os.close(descriptor)
        self.screen = ""  # what has not been expected yet
        self.before = ""  # what stood before that which was expected last
        self._unread_news = ""
        self._sources = [self._news, self._master]
        self.job = int(self.news().removeprefix("job "))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for pid in [*states.descendants(self._shell.pid), self._shell.pid]:
            if not really_gone(pid):
                os.kill(pid, 9)
        self._shell.wait(delays.LONG)
        for descriptor in (self._master, self._news, self._orders):
            os.close(descriptor)

    def type(self, keys: str) -> None:
        """What a user types; control characters are what the terminal makes of them."""
        os.write(self._master, keys.encode())

    def resize(self, rows: int, columns: int) -> None:
        """A window that changes its size: the terminal sends SIGWINCH to its foreground."""
        import termios

        termios.tcsetwinsize(self._master, (rows, columns))

    def foreground(self) -> None:
        """The shell's `fg`."""
        os.write(self._orders, b"f")

    def background(self) -> None:
        """The shell's `bg`."""
        os.write(self._orders, b"b")

    def expect(self, text: str) -> None:
        """Wait until the text has appeared on the screen since the last time."""
        deadline = time.monotonic() + delays.LONG
        while text not in self.screen:
            assert self._look(deadline), f"{text!r} is not on the screen: {self.screen!r}"
        self.before, _, self.screen = self.screen.partition(text)

    def news(self) -> str:
        """The next thing that the shell has seen of its job. Reads the screen meanwhile, so that nobody blocks."""
        deadline = time.monotonic() + delays.LONG
        while "\n" not in self._unread_news:
            assert self._look(deadline), f"no news of the job; on the screen: {self.screen!r}; {self._signals()}"
        line, _, self._unread_news = self._unread_news.partition("\n")
        return line

    def _signals(self) -> str:
        """What every process of the terminal does, and which signals it has pending and blocked."""
        told = ("State:", "SigPnd:", "ShdPnd:", "SigBlk:")
        pids = [self._shell.pid, *states.descendants(self._shell.pid)]
        lines = {pid: Path(f"/proc/{pid}/status").read_text().splitlines() for pid in pids}
        return "; ".join(f"{pid}: {[line for line in lines[pid] if line.startswith(told)]}" for pid in pids)

    def _look(self, deadline: float) -> bool:
        """Read what is there; False if nothing comes any more."""
        ready = select.select(self._sources, [], [], max(0, deadline - time.monotonic()))[0]
        for source in ready:
            text = _read(source)
            if not text:
                self._sources.remove(source)
            elif source == self._master:
                self.screen += text
            else:
                self._unread_news += text
        return bool(ready)


def _read(descriptor: int) -> str:
    """Empty at the end: a terminal that nobody has open raises EIO. A letter may be cut in two by the end of a read."""
    try:
        return os.read(descriptor, 65536).decode(errors="replace")
    except OSError:
        return ""


def can_be_had(lock: Lockable) -> bool:
    """Is it free by now? Takes it and gives it back; blocks for delays.LONG at most."""
    if got := lock.acquire(timeout=delays.LONG):
        lock.release()
    return got
