"""Trace a forked child, instruction by instruction: the Python side of stepper.c.

All calls about one child come from the thread that forked it: that is the kernel's rule for tracers.
"""

import ctypes
import mmap
import os
import shlex
import signal
import subprocess
import sysconfig
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

MARK = signal.SIGUSR1  # a traced child raises it to say that it has come to the next place
LONGEST = 2_000_000  # steps between two marks; more is a child that loops


DEAR = 2  # so many steps are as dear as a hop


class Lost(AssertionError):
    """The traced child stopped for a reason of its own: it hangs (SIGALRM), crashed, or ended."""


@dataclass(frozen=True)
class Route:
    """How to bring a child to a step of a walk: at full speed to one address after the other, then by steps."""

    addresses: tuple[int, ...]
    steps: int


class Walk:
    """The instructions from one mark to the next, in their order."""

    def __init__(self, pointers: "array[int]", seen: "array[int]") -> None:
        self.pointers = pointers
        self.seen = seen  # what a Watched showed before each; empty: nothing was
        self._visits: dict[int, list[int]] = {}
        for step, pointer in enumerate(pointers):
            self._visits.setdefault(pointer, []).append(step)

    def __len__(self) -> int:
        return len(self.pointers)

    def early(self, visits: int) -> set[int]:
        """The steps that are among the first so many of their address."""
        return {step for steps in self._visits.values() for step in steps[:visits]}

    def route(self, step: int) -> Route:
        """The way to a step. Each hop leads as far as an address leads that is not met before."""
        addresses, at = [], 0
        while step - at > DEAR and (hop := self._hop(at, step)) - at > DEAR:
            addresses.append(self.pointers[hop])
            at = hop
        return Route(tuple(addresses), step - at)

    def straight_to(self, step: int) -> Route:
        """The way to where the step's address is met next, however many steps that takes."""
        route = self.route(step)
        return Route((*route.addresses, self.pointers[step]), 0) if route.steps else route

    def _hop(self, at: int, step: int) -> int:
        """The last step up to this one whose address comes for the first time after `at`."""
        return next(one for one in range(step, at, -1) if self._next_visit(self.pointers[one], at) == one)

    def _next_visit(self, pointer: int, at: int) -> int:
        visits = self._visits[pointer]
        return visits[bisect_right(visits, at)]


class Watched:
    """Two words in a file that a child maps, too: one number, of the second above the first."""

    def __init__(self, path: str, *offsets: int) -> None:
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._words = [ctypes.c_uint32.from_buffer(self._memory, offset) for offset in offsets]
        self.addresses = [ctypes.addressof(word) for word in self._words]

    def look(self) -> int:
        """What they are now."""
        low, high = (word.value for word in self._words)
        return low | high << 32


def build(directory: Path) -> ctypes.CDLL:
    """Compile stepper.c into a directory and load it."""
    library = directory / "stepper.so"
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    source = Path(__file__).with_name("stepper.c")
    subprocess.run([*compiler, "-O2", "-Wall", "-shared", "-fPIC", "-o", library, source], check=True)
    return _typed(ctypes.CDLL(str(library), use_errno=True))


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    library.stepper_pointer.restype = ctypes.c_uint64
    library.stepper_run_to.argtypes = [ctypes.c_int, ctypes.c_uint64]
    library.stepper_walk.restype = ctypes.c_long
    library.stepper_walk.argtypes = [ctypes.c_int, ctypes.c_long, *[ctypes.c_void_p] * 5]
    return library


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot trace a child: {os.strerror(number)}")
    return result


class Tracee:
    """A child that called `trace_me` and stopped itself; killed, at the latest, when its tracer ends."""

    def __init__(self, library: ctypes.CDLL, pid: int) -> None:
        self.pid = pid
        self._library = library
        self._expect(_checked(library.stepper_adopt(pid)), signal.SIGSTOP)

    def _expect(self, status: int, wanted: int) -> None:
        if not (os.WIFSTOPPED(status) and os.WSTOPSIG(status) == wanted):
            raise Lost(f"the traced child {_told(status)}, instead of stopping with {signal.Signals(wanted).name}")

    def run_to_mark(self) -> None:
        """Let it run until it raises MARK."""
        self._expect(_checked(self._library.stepper_resume(self.pid)), MARK)

    def follow(self, route: Route) -> bool:
        """Bring it to a step; False if it came to its next mark before."""
        arrived = all(self._run_to(address) for address in route.addresses)
        return arrived and self._walk(route.steps) == route.steps

    def _run_to(self, address: int) -> bool:
        status = _checked(self._library.stepper_run_to(self.pid, address))
        if os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGTRAP:
            return True
        self._expect(status, MARK)
        return False

    def let_go(self) -> None:
        """Let it run, and do not wait for it; all that can be done with it then is to kill it."""
        _checked(self._library.stepper_release(self.pid))

    def pointer(self) -> int:
        """The address of the instruction that it executes next."""
        return int(self._library.stepper_pointer(self.pid))

    def glance(self, watched: Watched | None = None) -> Walk:
        """Let it run until it raises MARK; of its steps only the first is noted."""
        first = array("Q", [self.pointer()]), array("Q", [watched.look()] if watched else [])
        self.run_to_mark()
        return Walk(*first)

    def walk_to_mark(self, watched: Watched | None = None) -> Walk:
        """Step it until it raises MARK."""
        pointers, seen = array("Q", bytes(8 * LONGEST)), array("Q", bytes(8 * LONGEST) if watched else b"")
        notes = (*watched.addresses, seen.buffer_info()[0]) if watched else (None, None, None)
        made = self._walk(LONGEST, pointers.buffer_info()[0], *notes)
        if made == LONGEST:
            raise Lost(f"the traced child made {LONGEST} steps without coming to a mark")
        return Walk(pointers[:made], seen[:made])

    def _walk(self, steps: int, *notes: int | None) -> int:
        status = ctypes.c_int()
        where = notes or (None,) * 4
        made = _checked(self._library.stepper_walk(self.pid, steps, *where, ctypes.byref(status)))
        if made < steps:
            self._expect(status.value, MARK)
        return made


def trace_me(library: ctypes.CDLL) -> None:
    """In the child: be traced by the parent, and stop until it adopts us."""
    _checked(library.stepper_trace_me())
    signal.raise_signal(signal.SIGSTOP)


def _told(status: int) -> str:
    if os.WIFSTOPPED(status):
        return f"stopped with {signal.Signals(os.WSTOPSIG(status)).name}"
    code = os.waitstatus_to_exitcode(status)
    return f"ended with {code}"


@dataclass(frozen=True)
class Mapping:
    """Executable memory of this process, and of every child that it forks."""

    first: int
    last: int  # exclusive
    offset: int  # in its file
    path: str

    def __contains__(self, pointer: int) -> bool:
        return self.first <= pointer < self.last


def executable_memory() -> list[Mapping]:
    """Everything executable that is mapped now."""
    lines = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    found = []
    for span, rights, offset, _, _, *path in lines:
        if "x" in rights:
            first, last = (int(number, 16) for number in span.split("-"))
            found.append(Mapping(first, last, int(offset, 16), "".join(path).removesuffix(" (deleted)")))
    return found


class Code:
    """Which instructions belong to a lock: its extension, and what the extension calls in libc."""

    def __init__(self, extension: str) -> None:
        self._memory = executable_memory()
        self._extension = [one for one in self._memory if one.path == os.path.realpath(extension)]
        self._libc = [one for one in self._memory if Path(one.path).name.startswith(("libc.so", "libc-"))]
        self._vdso = [one for one in self._memory if one.path == "[vdso]"]
        assert self._extension and self._libc, "the extension and libc are mapped"

    def of_lock(self, pointers: "array[int]") -> list[int]:
        """Which steps of a walk are inside: an index each."""
        called = self._libc + self._vdso  # libc asks the vdso for the time, how often is chance: not counted
        found, inside = [], False
        for index, pointer in enumerate(pointers):
            inside = _within(pointer, self._extension) or (inside and _within(pointer, called))
            if inside and not _within(pointer, self._vdso):
                found.append(index)
        return found

    def name(self, pointer: int) -> str:
        """A pointer as file+offset, as objdump and addr2line understand it."""
        for one in self._memory:
            if pointer in one:
                return f"{Path(one.path).name}+{pointer - one.first + one.offset:#x}"
        return f"{pointer:#x}"


def _within(pointer: int, mappings: list[Mapping]) -> bool:
    return any(pointer in one for one in mappings)
