"""Real processes with a bounded conversation. When the context manager is left, the process is gone.

    with procs.start(func, obj, method="spawn") as worker:      # func(link, obj) runs in a child
    with procs.program("print('ready'); input()") as worker:    # an unrelated `python -c`, line by line

In the parent: `expect`, `tell`, `result`, `kill`, `stop`, `cont`, `end`. In the child: `link.say`,
`link.hear`, `link.wait_for`.
Every wait is bounded by delays.LONG. A worker that failed fails the test: its traceback is in the error.
A worker that does not answer dumps its stacks to stderr (SIGABRT; faulthandler is on) before it dies.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any

from coheld.testing.support import delays, states

METHODS = ("fork", "spawn", "forkserver")


class WorkerFailed(AssertionError):
    """A worker raised, ended with an unexpected status, or did not answer."""


class Link:
    """The child's end of the conversation; both ends may send anything that pickles."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def say(self, message: object) -> None:
        """Send a message to the test. Does not block (unless thousands are unread)."""
        self._connection.send(message)

    def hear(self, timeout: float = delays.HANG) -> Any:
        """The next message from the test. Raises: TimeoutError; EOFError: if the test is gone."""
        if not self._connection.poll(timeout):
            raise TimeoutError(f"the test said nothing for {timeout:g} s")
        return self._connection.recv()

    def wait_for(self, message: object) -> None:
        """Wait until the test says exactly this."""
        heard = self.hear()
        assert heard == message, f"waited for {message!r}, heard {heard!r}"


class Worker(ABC):
    """A started process, as the test sees it."""

    pid: int
    _settled = False  # its end is explained: awaited, or caused by the test

    @abstractmethod
    def _read(self, timeout: float) -> Any:
        """The next message; raises TimeoutError, EOFError, WorkerFailed."""

    @abstractmethod
    def _reap(self, timeout: float) -> int | None:
        """Wait for the end: exit status, negative for a signal; None if it is still there."""

    @abstractmethod
    def _close(self) -> None:
        """Give back descriptors."""

    @abstractmethod
    def tell(self, message: Any) -> None:
        """Send a message."""

    def hear(self, timeout: float = delays.LONG) -> Any:
        """The next message of the worker."""
        try:
            return self._read(timeout)
        except TimeoutError:
            self.abort()
            raise WorkerFailed(f"{self} said nothing for {timeout:g} s; its stacks are in stderr") from None
        except EOFError:
            raise WorkerFailed(f"{self} ended with {self._reap(delays.LONG)}, and said nothing") from None

    def expect(self, message: object, timeout: float = delays.LONG) -> None:
        """Wait until the worker says exactly this."""
        heard = self.hear(timeout)
        if heard != message:
            raise WorkerFailed(f"waited for {message!r}, heard {heard!r} from {self}")

    def signal(self, number: int) -> None:
        """Send any signal."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """SIGSTOP; returns when all its threads stand still."""
        self.signal(signal.SIGSTOP)
        states.wait_until(lambda: states.stopped(self.pid), f"{self} stands still")

    def cont(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and reap it: when this returns, the process is gone. Its death is no failure."""
        self._settled = True
        if self._reap(0) is None:
            self.signal(signal.SIGKILL)
        if self._reap(delays.LONG) is None:
            raise WorkerFailed(f"{self} survived SIGKILL")

    def abort(self) -> None:
        """Let it dump every stack to stderr, and die of it."""
        self._settled = True
        if self._reap(0) is None:
            self.signal(signal.SIGABRT)
            self.signal(signal.SIGCONT)  # a stopped process takes no other signal
            self._reap(delays.LONG)
        self.kill()

    def end(self, expected: int = 0, timeout: float = delays.LONG) -> None:
        """Wait for the end; the exit status must be `expected` (minus the number for a signal)."""
        status = self._reap(timeout)
        if status is None:
            self.abort()
            raise WorkerFailed(f"{self} did not end within {timeout:g} s; its stacks are in stderr")
        if status != expected and not self._settled:
            self._explain()
            raise WorkerFailed(f"{self} ended with {status}, not {expected}")
        self._settled = True

    def _explain(self) -> None:
        """Raise what the worker reported about its failure, if it is still unread."""
        try:
            while True:
                self._read(0)
        except (EOFError, TimeoutError):
            return

    def alive(self) -> bool:
        """True until it has ended; a zombie has."""
        return self._reap(0) is None

    def wait_until_blocked(self, tid: int | None = None) -> int:
        """Return once a thread of it (or the given one) waits for a lock."""
        return states.wait_until_blocked(self.pid, tid)

    def __str__(self) -> str:
        return f"worker {self.pid}"


# ---- functions, by multiprocessing -------------------------------------------------------------------------


class _Result:
    def __init__(self, value: object) -> None:
        self.value = value


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _main(connection: Connection, func: Callable[..., object], args: Sequence[object]) -> None:
    try:
        connection.send(_Result(func(Link(connection), *args)))
    except BaseException:
        connection.send(_Failure(traceback.format_exc()))
        sys.exit(1)


class FunctionWorker(Worker):
    """A function in a process made by multiprocessing; `result()` returns what it returned."""

    def __init__(self, context: BaseContext, func: Callable[..., object], args: Sequence[object]) -> None:
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, func, args))  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()
        self.pid = self._process.pid
        self._name = func.__name__

    def __str__(self) -> str:
        return f"worker {self._name} (process {self.pid})"

    def _read(self, timeout: float) -> Any:
        message = self._receive(timeout)
        if isinstance(message, _Failure):
            self._settled = True  # its status is explained by what we raise
            raise WorkerFailed(f"{self} failed:\n{message.text}")
        return message

    def _receive(self, timeout: float) -> Any:
        # Its sentinel too: another child may have inherited the other end of the pipe, and hold it open.
        if not wait([self._connection, self._process.sentinel], timeout):
            raise TimeoutError
        try:
            if self._connection.poll():
                return self._connection.recv()
        except OSError:
            pass
        raise EOFError

    def _reap(self, timeout: float) -> int | None:
        self._process.join(timeout)
        status: int | None = self._process.exitcode
        return status

    def _close(self) -> None:
        self._connection.close()
        self._process.close()

    def tell(self, message: Any) -> None:
        self._connection.send(message)

    def result(self, timeout: float = delays.LONG) -> Any:
        """What the function returned; messages that nobody asked for are dropped."""
        deadline = time.monotonic() + timeout
        while not isinstance(message := self.hear(max(0, deadline - time.monotonic())), _Result):
            pass
        return message.value


# ---- unrelated programs ------------------------------------------------------------------------------------


class ProgramWorker(Worker):
    """A command that talks in lines: `expect("ready")` reads one, `tell("go")` writes one."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, **options)
        self.pid = self.process.pid
        self._name = command[0]
        self._unread = b""

    def __str__(self) -> str:
        return f"program {self._name} (process {self.pid})"

    def _read(self, timeout: float) -> str:
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            if not wait([self.process.stdout], max(0, deadline - time.monotonic())):  # type: ignore[list-item]
                raise TimeoutError
            if not (data := os.read(self.process.stdout.fileno(), 65536)):
                raise EOFError
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def _reap(self, timeout: float) -> int | None:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def _close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def tell(self, message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{message}\n".encode())


# ---- the ways in -------------------------------------------------------------------------------------------


@contextmanager
def _running(worker: Any) -> Iterator[Any]:
    try:
        yield worker
        worker.end()
    except BaseException:
        worker.kill()
        raise
    finally:
        worker._close()


@contextmanager
def start(func: Callable[..., object], *args: object, method: str = "fork") -> Iterator[FunctionWorker]:
    """Run `func(link, *args)` in a child made by `method` (one of METHODS); leaving waits for its end.

    With spawn and forkserver the function stands at module level, and the arguments are pickled.
    """
    with _running(FunctionWorker(multiprocessing.get_context(method), func, args)) as worker:
        yield worker


@contextmanager
def program(source: str, *args: str, python: str = sys.executable, **options: Any) -> Iterator[ProgramWorker]:
    """Run `python -c source args…`, an unrelated process of this user; leaving waits for its end.

    `options` go to subprocess.Popen. What it prints arrives at once: Python runs unbuffered here.
    """
    with command([python, "-u", "-c", source, *args], **options) as worker:
        yield worker


@contextmanager
def command(arguments: Sequence[str], **options: Any) -> Iterator[ProgramWorker]:
    """Run any command, with pipes for standard input and output. Leaving the block waits for its end."""
    with _running(ProgramWorker(arguments, **options)) as worker:
        yield worker


def run(source: str, *args: str, timeout: float = delays.LONG, **options: Any) -> str:
    """Run `python -c source args…` to its end, which must be a good one, and return what it printed."""
    arguments = [sys.executable, "-c", source, *args]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, timeout=timeout, check=True, **options)
    return str(done.stdout.decode())
