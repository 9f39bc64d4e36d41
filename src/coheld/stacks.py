"""The Python stacks of a process that shows them, for whoever of the same user asks: `coheld ps --stack`.

A process that is switched on listens at a socket of its own in the directory of the locks, ``stacks-<pid>-<start>``,
and a daemon thread serves one connection at a time: it reads nothing, sends all stacks as JSON, and closes.  The kernel
says who asks, and who is asked: only the same user and root get an answer, and who is asked is the process in the name.
One that is not switched on gets no signal, and no connection: before one is made, /proc tells whether it is that very
process that listens there.

What is at the path, and why no step races:

    nothing, or what a program was there before exec    serve() removes that: nobody else has this pid and start
    bound, not listening yet                            who asks is refused, and takes it for one that is not on
    listening                                           who asks waits for a few seconds at most
    left: killed, exec, or its descriptors were closed  refused; a later start of any process removes the file, once
                                                        the process is gone (files.sweep_sockets)

A forked child closes what it has of its parent's and makes its own; one that calls exec then leaves its file as above.
"""

from __future__ import annotations

import fcntl
import gc
import json
import linecache
import logging
import os
import resource
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, GeneratorType
from typing import Any

from .backends import files
from .backends.base import Handle
from .backends.leaving import at_exit
from .process import at_fork, start_of, thread_runs

if sys.platform != "linux":
    raise ImportError("coheld.stacks needs Linux")

_PATIENCE = 3.0  # seconds: for an answer, and for one that does not read it
_PAUSE = 0.1  # seconds, after an accept that failed: no descriptor is free
_DEPTH, _TASKS, _MOST = 100, 1000, 1 << 26  # frames of a stack, tasks, and bytes of an answer: no more
_CREDENTIALS = struct.Struct("=iII")
_LISTENING = b"00010000"  # __SO_ACCEPTCON, in /proc/net/unix
_EXITING = 0x4  # PF_EXITING, of linux/sched.h: it has closed what it had, and is not gone yet
_Line = tuple[int, CodeType, int]
"""A frame's id, its code, its line: the frame itself is not kept, since the locals of one that returns go with it."""


@dataclass(frozen=True)
class Frame:
    """One call.  code: the line of its source, "" where that is not to be had."""

    file: str
    line: int
    function: str
    code: str


@dataclass(frozen=True)
class Stack:
    """Of a thread or a task, the outermost call first; of a very deep one the innermost 100.

    tid: of a thread; 0 for a task, and for a thread that Python did not start.  running: of a task.  holds: the locks
    that a task has, each as Resource.place says it.
    """

    name: str
    tid: int
    frames: tuple[Frame, ...]
    running: bool = False
    holds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stacks:
    """An answer.  missing: why there is none, "" if there is one.  left_out: tasks beyond the first 1,000."""

    threads: tuple[Stack, ...] = ()
    tasks: tuple[Stack, ...] = ()
    left_out: int = 0
    missing: str = ""


# ---- showing them ---------------------------------------------------------------------------------------------------


def serve() -> None:
    """Show the stacks of this process to `coheld ps --stack` from now on; those of its forked children as well.

    Costs a thread that sleeps, and while it answers some 0.1 s of the interpreter for each million objects, where tasks
    are used. Done twice, nothing happens.

    Raises: OSError: if the socket cannot be made.  InsecureError: if the directory of the locks is not safe.
    RuntimeError: if no thread can be started, or this Python has no GIL: there it may not look at running frames.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise RuntimeError("stacks cannot be shown without the GIL: frames of running threads must not be looked at")
    with _process.guard:
        if _process.server is not None:
            return
        server = _process.server = _Server(files.lock_directory())
        try:
            server.open()
        except BaseException:
            _process.server = None
            server.close()
            raise
    at_exit(_leave)


def serve_or_tell() -> None:
    """The same where nobody could do anything about an error: a log line says it."""
    try:
        serve()
    except (OSError, RuntimeError) as error:
        logging.getLogger("coheld").warning("no stacks are shown to coheld ps --stack: %s", error)


class _Server:
    def __init__(self, directory: str) -> None:
        self.directory, self.name = directory, _name_of(os.getpid(), start_of(os.getpid()))
        self.listener = _listener()
        self.inode = os.fstat(self.listener.fileno()).st_ino
        self.connection: socket.socket | None = None

    def open(self) -> None:
        files.sweep_sockets(self.directory)
        try:
            with _reached(self.directory) as directory:
                path = f"{directory}/{self.name}"
                with suppress(FileNotFoundError):
                    os.unlink(path)
                self.listener.bind(path)
                os.chmod(path, 0o600)
            self.listener.listen(16)
        except OSError as error:
            path = os.path.join(self.directory, self.name)
            raise OSError(error.errno, f"no socket can be made: {error.strerror}", path) from error
        self.start()

    def start(self) -> None:
        """A thread that takes no signal: who waits for some by sigwait has blocked them in all that he knows."""
        faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}  # of the thread itself
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - faults)
        try:
            threading.Thread(target=self.run, name="coheld stacks", daemon=True).start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        while self.is_ours():
            try:
                self.connection, _ = self.listener.accept()
            except OSError:
                time.sleep(_PAUSE)
                continue
            with self.connection, suppress(Exception):  # whatever it is, the next is served
                _answer(self.connection)
            self.connection = None

    def is_ours(self) -> bool:
        """A daemon may have closed its descriptors, and its number be another's by now."""
        with suppress(OSError):
            return os.fstat(self.listener.fileno()).st_ino == self.inode
        return False

    def close(self) -> None:
        """This process has it no more."""
        if not self.is_ours():
            self.listener.detach()
        self.listener.close()
        if self.connection is not None:
            self.connection.close()

    def leave(self) -> None:
        """At the end of this process; its thread ends with that."""
        with suppress(OSError):
            os.unlink(os.path.join(self.directory, self.name))


def _listener() -> socket.socket:
    """With a high number: where a daemon closes all, the thread may be just about to accept, and low ones are taken by
    what the program opens next."""
    with socket.socket(socket.AF_UNIX) as low:
        least = min(500, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        return socket.socket(socket.AF_UNIX, fileno=fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, least))


class _Process:
    """What belongs to this process alone."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.guard = threading.Lock()
        self.server: _Server | None = None

    def become_child(self) -> None:
        server = self.server
        self.begin()
        if server is not None:
            server.close()
            serve_or_tell()


_process = _Process()
at_fork(child=_process.become_child)


def _leave() -> None:
    if _process.server is not None:
        _process.server.leave()


def _answer(connection: socket.socket) -> None:
    connection.settimeout(_PATIENCE)
    if _peer(connection)[1] in (0, os.geteuid()):
        try:
            answer = _look()
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        connection.sendall(json.dumps(answer).encode())
    connection.shutdown(socket.SHUT_WR)  # a child that was forked meanwhile has the descriptor too


def _look() -> dict[str, Any]:
    """All stacks, but for this thread's: first the lines, in as little time as can be, then what is read of files."""
    lines = {ident: _lines_of(frame) for ident, frame in sys._current_frames().items()}
    lines.pop(threading.get_ident(), None)
    tasks = sorted(_tasks(lines.values()), key=lambda task: not task["holds"])
    threads = {thread.ident: thread for thread in threading.enumerate()}
    answers = [_thread(threads.get(ident), found) for ident, found in lines.items()]
    kept = tasks[:_TASKS]
    for filename in {code.co_filename for one in [*answers, *kept] for _, code, _ in one["frames"]}:
        linecache.checkcache(filename)
    for one in [*answers, *kept]:
        one["frames"] = [_shown(code, line) for _, code, line in one["frames"]]
    return {"threads": answers, "tasks": kept, "left_out": len(tasks) - len(kept)}


def _thread(thread: threading.Thread | None, lines: list[_Line]) -> dict[str, Any]:
    """Its number is another process's in a child that was forked by it: there it is the first."""
    tid = (thread and thread.native_id) or 0
    if tid and not thread_runs(os.getpid(), tid):
        tid = os.getpid()
    return {"name": thread.name if thread else "", "tid": tid, "frames": lines}


def _shown(code: CodeType, line: int) -> dict[str, Any]:
    source = linecache.getline(code.co_filename, line).strip()
    return {"file": code.co_filename, "line": line, "function": code.co_qualname, "code": source}


def _lines_of(frame: FrameType | None) -> list[_Line]:
    found: list[_Line] = []
    while frame is not None and len(found) < _DEPTH:
        found.append((id(frame), frame.f_code, frame.f_lineno or 0))
        frame = frame.f_back
    return found[::-1]


def _tasks(threads: Iterable[list[_Line]]) -> Iterator[dict[str, Any]]:
    """Of all loops that run: those that the garbage collector knows (none of which gc.freeze hides), and those of tasks
    that hold something (one in C is not known to it)."""
    asyncio: Any = sys.modules.get("asyncio")
    if not hasattr(asyncio, "all_tasks"):  # or another thread is importing it
        return
    holds = dict(_tasks_that_hold())
    loops = {*_instances_of(asyncio.AbstractEventLoop), *(task.get_loop() for task in holds)}
    for loop in filter(lambda one: one.is_running(), loops):
        now = asyncio.current_task(loop)
        for task in asyncio.all_tasks(loop):
            coroutine = task.get_coro()
            lines = _within(coroutine, threads) if task is now else _suspended(coroutine)
            yield {"name": task.get_name(), "running": task is now, "frames": lines, "holds": holds.get(task, [])}


def _tasks_that_hold() -> Iterator[tuple[Any, list[str]]]:
    found: dict[Any, list[str]] = {}
    for lock in _instances_of(Handle):
        if lock.attached and (task := lock.task) is not None:
            found.setdefault(task, []).append(_place(f"{lock.segment.path}:{lock.offset}"))
    yield from found.items()


def _instances_of(base: type) -> list[Any]:
    """Only they are touched: an object that another thread lets go meanwhile must not end in this one."""
    kinds: set[type] = set()
    more: set[type] = {base}
    while more:
        kinds |= more
        more = set().union(*map(type.__subclasses__, more)) - kinds
    return [one for one in gc.get_referrers(*kinds) if type(one) in kinds]


def _within(coroutine: Any, threads: Iterable[list[_Line]]) -> list[_Line]:
    """Of the thread that runs it: what is inside of the coroutine."""
    outermost = id(getattr(coroutine, "cr_frame", None))
    for lines in threads:
        for number, (frame, _, _) in enumerate(lines):
            if frame == outermost:
                return lines[number:]
    return []


_AWAITING: dict[type, tuple[str, str]] = {
    CoroutineType: ("cr_frame", "cr_await"),
    GeneratorType: ("gi_frame", "gi_yieldfrom"),
    AsyncGeneratorType: ("ag_frame", "ag_await"),
}


def _suspended(awaited: Any) -> list[_Line]:
    """From a coroutine down to what it waits for."""
    found: list[_Line] = []
    while (names := _AWAITING.get(type(awaited))) is not None:
        frame, awaited = getattr(awaited, names[0]), getattr(awaited, names[1])
        if frame is not None:
            found.append((id(frame), frame.f_code, frame.f_lineno or 0))
    return found[-_DEPTH:]


# ---- asking ---------------------------------------------------------------------------------------------------------


def ask(pid: int, start: int | None, timeout: float = _PATIENCE) -> Stacks:
    """The stacks of that process of this user now, or why they are missing.  Blocks for timeout seconds at most."""
    directory, name = files.lock_directory(), _name_of(pid, start)
    try:
        if why := _unable(pid, start, b"T"):
            return Stacks(missing=why)
        if not _listens(directory, name, pid):
            return Stacks(missing=_unable(pid, start) or _OFF)
        answer = _read(directory, name, pid, time.monotonic() + timeout)
        return _parsed(json.loads(answer))
    except (TimeoutError, BlockingIOError):
        return Stacks(missing=_unable(pid, start) or f"it does not answer within {timeout:g} s: {_BUSY}")
    except OSError as error:
        return Stacks(missing=_unable(pid, start) or f"it cannot be asked: {error.strerror}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Stacks(missing=_unable(pid, start) or "its answer is not whole, or another version's")


_OFF = "it does not show them: COHELD_STACKS=1 in its environment, or coheld.stacks.serve()"
_BUSY = "busy in C code that keeps the interpreter, or short of time"


def _unable(pid: int, start: int | None, stopped: bytes = b"Tt") -> str:
    """Why that process cannot answer whatever it is asked; "" if it could."""
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
        if int(fields[19]) == start and fields[0] not in b"ZX" and not int(fields[6]) & _EXITING:
            return "it is stopped, by SIGSTOP or a debugger" if fields[0] in stopped else ""
    return "it has ended"


def _listens(directory: str, name: str, pid: int) -> bool:
    """Is there a socket at which that very process listens?"""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(os.path.join(directory, name)).st_mode):
            return False
        with open(f"/proc/{pid}/net/unix", "rb") as file:
            sockets = [line.split(maxsplit=7) for line in file]
        path = f"/{name}\n".encode()
        there = {f"socket:[{int(one[6])}]" for one in sockets[1:] if one[3] == _LISTENING and one[-1].endswith(path)}
        return bool(there) and not there.isdisjoint(_descriptors(pid))
    return False


def _descriptors(pid: int) -> Iterator[str]:
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            yield os.readlink(f"/proc/{pid}/fd/{number}")


def _read(directory: str, name: str, pid: int, deadline: float) -> bytes:
    """Raises: OSError: TimeoutError at the deadline, BlockingIOError if too many others ask."""
    answer = bytearray()
    with _reached(directory) as reached, socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(max(0.001, deadline - time.monotonic()))
        asking.connect(f"{reached}/{name}")
        if _peer(asking)[0] != pid:
            raise ConnectionRefusedError(None, "another process listens in its place")
        while len(answer) < _MOST and (part := asking.recv(1 << 16)):
            answer += part
            asking.settimeout(max(0.001, deadline - time.monotonic()))
    return bytes(answer)


def _parsed(answer: dict[str, Any]) -> Stacks:
    if failed := answer.get("failed"):
        return Stacks(missing=f"it could not look: {_printable(failed)}")
    threads, tasks = (tuple(map(_stack, answer[which])) for which in ("threads", "tasks"))
    return Stacks(threads, tasks, int(answer["left_out"]))


def _stack(one: dict[str, Any]) -> Stack:
    frames = tuple(
        Frame(_printable(frame["file"]), int(frame["line"]), _printable(frame["function"]), _printable(frame["code"]))
        for frame in one["frames"]
    )
    holds = tuple(map(str, one.get("holds", ())))
    return Stack(_printable(one["name"]), int(one.get("tid", 0)), frames, bool(one.get("running")), holds)


def _printable(text: str) -> str:
    """What goes to a terminal, which must not take it for anything but text."""
    return "".join(char if char.isprintable() else " " for char in text)


def holding_task(stacks: Stacks, place: str) -> Stack | None:
    """The task that has the lock at that Resource.place."""
    return next((task for task in stacks.tasks if _place(place) in task.holds), None)


# ---- both -----------------------------------------------------------------------------------------------------------


def _name_of(pid: int, start: int | None) -> str:
    return f"{files.SOCKET}{pid}-{start or 0}"


def _place(place: str) -> str:
    """As both sides spell it, whatever links lead to it."""
    path, _, offset = place.rpartition(":")
    return f"{os.path.realpath(path)}:{offset}"


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end; of a listener those that it had then."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, group = _CREDENTIALS.unpack(raw)
    return pid, user, group


@contextmanager
def _reached(directory: str) -> Iterator[str]:
    """A path to it that is short enough for a socket's, which has 108 bytes."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
