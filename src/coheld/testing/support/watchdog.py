"""The hang limit: a process beside the tests. When a test takes too long, it lets every process below the
tests dump its stacks (SIGABRT; faulthandler is on in all of them) and die, and then the test process too.

It is a process of its own, so that it works however the tests hang, and adds no thread to a test process that
forks. It lives as long as the test process, and no longer.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from coheld.testing.support import delays, hygiene, states


class Watchdog:
    """The test process's side: arm it before a test, disarm it after."""

    def __init__(self) -> None:
        os.environ["PYTHONFAULTHANDLER"] = "1"  # every Python process below dumps its stacks on SIGABRT
        self._process = subprocess.Popen(
            [sys.executable, "-m", "coheld.testing.support.watchdog", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the tests
        )

    def arm(self, seconds: float, name: str) -> None:
        """From now on the test `name` has `seconds`."""
        self._tell(f"{seconds} {name}")

    def disarm(self) -> None:
        """Between tests."""
        self._tell("inf -")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    def close(self) -> None:
        """After the last test.  It stays until the process has ended: a thread that a failed test left waiting, which
        the interpreter would join for ever, gets no more than this."""
        self.arm(delays.LONG, "the end of the run")


def main(target: int) -> None:
    """Watch until the target has ended, however it does, and remove what it could not."""
    with os.fdopen(os.pidfd_open(target)) as ended:
        watch(target, ended.fileno())
    hygiene.remove_private_directories(target)


def watch(target: int, ended: int) -> None:
    """Read "<seconds> <name>" lines from standard input until the target has ended; the last one stays in force."""
    told, deadline, name = [sys.stdin.fileno()], float("inf"), "-"
    while True:
        left = max(0, deadline - time.monotonic())
        ready, _, _ = select.select([*told, ended], [], [], None if left == float("inf") else left)
        if not ready:
            report_and_kill(target, name)
        if ended in ready or not ready:
            return
        if text := os.read(told[0], 65536).decode():
            seconds, name = text.splitlines()[-1].split(" ", 1)
            deadline = time.monotonic() + float(seconds)
        else:
            told = []


def report_and_kill(target: int, name: str) -> None:
    """Dump the stacks of all processes of the tests, one after the other, and end them.

    All are stopped first: none goes on because another has ended, and what two write does not mix.
    """
    below = [pid for pid in states.descendants(target) if pid != os.getpid()]
    try:
        sleeps_in = {pid: _sleeps_in(pid) for pid in [*below, target]}
        for pid in sleeps_in:
            _kill(pid, signal.SIGSTOP)
        _say(f"\n\n=== HANG in {name}: the stacks of all its processes follow ===")
        for pid in below:
            _abort(pid, sleeps_in[pid])
        _show_captured(target)
        _say(f"=== the test process {target} ===")
        _abort(target, sleeps_in[target])
        _say(f"=== that was the HANG in {name} ===")  # again, for who sees the end of a log
    finally:  # whatever happens to our output, nobody stays
        for pid in [*below, target]:
            _kill(pid, signal.SIGKILL)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _sleeps_in(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/wchan").read_text()
    return ""


def _abort(pid: int, sleeps_in: str) -> None:
    """It dumps its stacks, and is gone."""
    _say(f"process {pid}: {sleeps_in}")
    _kill(pid, signal.SIGABRT)
    _kill(pid, signal.SIGCONT)
    with contextlib.suppress(AssertionError):
        states.wait_until(lambda: states.gone(pid), "it has dumped", delays.LONG)


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _show_captured(target: int) -> None:
    """What pytest has captured from standard error: spawned processes dumped their stacks there."""
    captured = Path(f"/proc/{target}/fd/2")
    if captured.is_file():
        _say(captured.read_text(errors="replace"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
