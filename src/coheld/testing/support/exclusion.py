"""Two independent detectors of overlap for workers in any number of processes and threads.

1. A marker that only one can make: a symbolic link, made exclusively (else EEXIST), which names its maker.
2. A counter in shared memory that is read on entry and written, plus one, on exit, with no protection.

Either alone would tell of an overlap. A worker that is killed inside leaves its marker behind; the next one
may remove it only if the kernel says that its maker is dead or dying.
"""

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coheld.testing.support import states


class Overlap(AssertionError):
    """Somebody else was inside."""


class Exclusion:
    """Make it in the parent, inside a directory of the test; give it to the workers (fork, or pickled).

    Every worker has a number below `workers`, which no two that run at once share.
    """

    def __init__(self, directory: str | os.PathLike[str], workers: int = 16) -> None:
        self._directory = str(directory)
        self._workers = workers
        with open(self._path("counter"), "xb") as file:
            file.truncate(8 * (2 + workers))
        self._attach()

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return _attached, (self._directory, self._workers)

    def _path(self, name: str) -> str:
        return str(Path(self._directory) / f"exclusion-{name}")

    def _attach(self) -> None:
        with open(self._path("counter"), "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        # Calls counted, markers of dead workers found, then the calls made by each worker.
        self._words = memoryview(self._map).cast("Q")

    @contextmanager
    def inside(self, worker: int = 0) -> Iterator[None]:
        """The body of a critical section. Raises: Overlap: if anybody else is in it."""
        assert 0 <= worker < self._workers
        self._enter()
        seen = self._words[0]
        yield
        if self._words[0] != seen:
            raise Overlap(f"counter moved from {seen} to {self._words[0]} inside the critical section")
        self._words[0] = seen + 1
        self._words[2 + worker] += 1
        os.unlink(self._path("marker"))

    def _enter(self) -> None:
        me = f"{os.getpid()}:{threading.get_native_id()}"
        try:
            os.symlink(me, self._path("marker"))
        except FileExistsError:
            self._bury(me)
            os.symlink(me, self._path("marker"))

    def _bury(self, me: str) -> None:
        """Remove the marker of a worker that died inside; only one who owns the lock gets here."""
        try:
            maker = os.readlink(self._path("marker"))
        except FileNotFoundError:
            raise Overlap("somebody left while we entered") from None
        pid, tid = map(int, maker.split(":"))
        if maker == me or not states.gone(pid, tid):
            raise Overlap(f"{maker} is inside, and alive, while {me} enters")
        os.unlink(self._path("marker"))
        self._words[1] += 1

    @property
    def counted(self) -> int:
        """Calls, by the unprotected counter."""
        return int(self._words[0])

    @property
    def made(self) -> int:
        """Calls, by the workers' own numbers."""
        return sum(self._words[2 : 2 + self._workers])

    @property
    def found_dead(self) -> int:
        """Markers found of workers that died inside."""
        return int(self._words[1])

    def check(self, calls: int | None = None, deaths: int = 0) -> None:
        """Nobody is inside, no increment was lost, and `calls` were made.

        Each of `deaths` killed workers may have counted a call without noting it as made.
        """
        assert not os.path.lexists(self._path("marker")) or deaths, "somebody is still inside"
        assert self.made <= self.counted <= self.made + deaths, f"{self.made} made, {self.counted} counted"
        assert calls is None or self.made == calls, f"{calls} calls wanted, {self.made} made"


def _attached(directory: str, workers: int) -> Exclusion:
    self = Exclusion.__new__(Exclusion)
    self._directory, self._workers = directory, workers
    self._attach()
    return self
