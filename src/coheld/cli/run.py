"""coheld run: a command under a named lock. Who dies when, and why no step races: see ward."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import coheld
from coheld.backends.base import Handle
from coheld.cli import bond, exits, relay
from coheld.owner import Owner
from coheld.process import keep_signals, start_of

assert sys.platform == "linux"  # type checkers for other systems stop here

_EPILOG = """\
The command keeps the terminal, standard input and the process group. Signals sent to coheld are passed on. If coheld
is killed so is the command, and nobody gets the lock before it is gone; processes that the command has started are
its own affair, as they are when its end releases the lock.

With COHELD_BACKEND the lock may be on a server, and is lost if that cannot be reached for longer than the lease. The
command is ended then: by SIGTERM, and by SIGKILL if it is there 5 seconds later.

exit status:
  the command's own, or 128+N if signal N killed it
  123  the lock was lost while the command ran
  124  the lock could not be had in time
  125  coheld itself failed, or an ancestor of this process holds the lock
  126  the command cannot be run
  127  there is no such command
"""

_STOPPERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers."""
    parser = commands.add_parser(
        "run",
        help="run a command under a named lock",
        usage="coheld run [-h] [--timeout S | --no-wait] NAME [--] CMD [ARG...]",
        description="Wait for the named lock, run the command, and release the lock when the command has ended.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    waiting = parser.add_mutually_exclusive_group()
    waiting.add_argument("--timeout", type=_seconds, metavar="S", help="wait for at most S seconds")
    waiting.add_argument("--no-wait", dest="timeout", action="store_const", const=0.0, help="try once")
    # One positional that takes the rest: argparse would look for options and -- in two.
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="NAME [--] CMD", help="options end at NAME")
    parser.set_defaults(execute=execute, wrong_usage=parser.error)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if math.isnan(seconds):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def execute(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status. Blocks until the lock is had, and until the command has ended."""
    name, command = _name_and_command(options.rest)
    if not name or not command:
        options.wrong_usage("NAME and CMD are required")
    with _stoppable():
        keep_signals()
        lock, loss = coheld.Lockable(lock_name=name), _Loss()
        coheld.when_lost(lock, loss.note)
        _acquire(lock, name, options.timeout)
        try:
            status = _run(lock.__lock__, command, loss)
        finally:
            _release(lock, loss)
        return exits.LOST if loss.error is not None else status


def _name_and_command(rest: list[str]) -> tuple[str, list[str]]:
    """Split what follows the options: NAME, and CMD with its arguments; a -- may stand before each."""
    if rest[:1] == ["--"]:
        rest = rest[1:]
    return (rest[0] if rest else ""), (rest[2:] if rest[1:2] == ["--"] else rest[1:])


class _Stopped(BaseException):
    """A signal asked this process to end, before there was a command to pass it on to."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """A signal that would end this process leaves the block first, with whatever it holds released."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Stopped(number)

    for number in _STOPPERS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    except _Stopped as stopped:
        signal.signal(stopped.number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {stopped.number})
        os.kill(os.getpid(), stopped.number)  # so that our parent sees what ended us


class _Loss:
    """That the lock was lost.  Noted by the thread that finds out, which then wakes the one that attends the command:
    by a SIGCHLD, that this one waits for anyhow, or finds pending when it has looked here for the last time."""

    def __init__(self) -> None:
        self.error: coheld.LeaseLostError | None = None
        self.told = False

    def note(self, error: coheld.LeaseLostError) -> None:
        """By whichever thread."""
        self.error = error
        os.kill(os.getpid(), signal.SIGCHLD)

    def tell(self) -> bool:
        """Is it lost?  Says so, once."""
        if self.error is not None and not self.told:
            self.told = True
            _say(f"{self.error}; the command is ended")
        return self.told


# ---- the lock -------------------------------------------------------------------------------------------------------


def _acquire(lock: coheld.Lockable, name: str, timeout: float | None) -> None:
    """Raises: CoheldError: if an ancestor of this process holds it; LockTimeout: if it could not be had."""
    owner = coheld.holder(lock)
    if owner is not None and _is_ancestor(owner):
        raise coheld.CoheldError(f"{name!r} is held by an ancestor, and waiting would never end: {owner}")
    if not lock.acquire(timeout=timeout):
        raise coheld.LockTimeout(f"{name!r} is held by {coheld.holder(lock) or 'somebody else'}")


def _is_ancestor(owner: Owner) -> bool:
    pid = 0 if owner.host else os.getppid()
    while pid > 0 and pid != owner.pid:
        pid = _parent_of(pid)
    return pid > 0 and start_of(pid) == owner.start


def _parent_of(pid: int) -> int:
    """0: it has none that we may see, or is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])  # the name before it may hold anything
    except OSError:
        return 0


def _release(lock: coheld.Lockable, loss: _Loss) -> None:
    """A server that is not there any more does not spoil what the command has done: the lock ends with its lease."""
    try:
        lock.release()
    except coheld.LeaseLostError as error:
        loss.error = error
        if not loss.told:
            _say(f"{error}; the command has run to its end")
    except coheld.BackendError as error:
        _say(f"{error}; others have the lock when its lease is over")


def _say(text: str) -> None:
    print(f"coheld: {' '.join(text.split())}", file=sys.stderr)


# ---- the command ----------------------------------------------------------------------------------------------------


def _run(lock: Handle, command: list[str], loss: _Loss) -> int:
    """Run the command as the owner of the lock; returns the exit status to report."""
    child, gate = _fork(command, relay.block())
    try:
        lock.entrust(child)
        relay.pass_on_pending(child)
        with suppress(BrokenPipeError):  # it was killed at the gate
            if not loss.tell():
                os.write(gate, b"!")
    finally:
        os.close(gate)  # not opened: the child ends without having run
        status = relay.attend(child, loss.tell)
        lock.reclaim()
    return status


def _fork(command: list[str], mask: set[int]) -> tuple[int, int]:
    """Make the process that will be the command. It waits until a byte is written to the descriptor returned."""
    runner = os.getpid()
    theirs, gate = os.pipe()
    child = os.fork()
    if not child:
        os.close(gate)
        _become(command, mask, bond.die_with(runner) and os.read(theirs, 1))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would vanish without a status
    os.close(theirs)
    return child, gate


def _become(command: list[str], mask: set[int], admitted: object) -> NoReturn:
    """Turn into the command; the process ends if that cannot be done."""
    status = exits.FAILED
    try:
        if admitted:
            _restore_signals(mask)
            os.execvp(command[0], command)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        status = _cannot_run(command[0], error, exits.NOT_FOUND)
    except OSError as error:
        status = _cannot_run(command[0], error, exits.NOT_EXECUTABLE)
    finally:
        os._exit(status)


def _restore_signals(mask: set[int]) -> None:
    """What a program finds that Python did not start."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _cannot_run(command: str, error: Exception, status: int) -> int:
    os.write(2, f"coheld: cannot run {command!r}: {getattr(error, 'strerror', error)}\n".encode(errors="replace"))
    return status
