"""Forked workers that start together, and are gone when their block ends."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
Tell = Callable[[Any], None]

PATIENCE = 60.0
"""Seconds after which a silent worker is taken for hung."""

# Forked, because a multiprocessing.RLock reaches a running process in no other way that is as cheap.
_context = multiprocessing.get_context("fork")


class Worker:
    """One forked process that runs `work(tell)`; what it tells arrives at `hear()` here."""

    def __init__(self, work: Callable[[Tell], None]) -> None:
        self._ear, mouth = _context.Pipe(duplex=False)
        self._process = _context.Process(target=work, args=(mouth.send,), daemon=True)
        self._process.start()
        mouth.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def hear(self, timeout: float = PATIENCE) -> Any:
        """The next thing told; blocks.

        Raises: TimeoutError: if nothing came for `timeout` seconds. EOFError: if the process ended without a
        word; what it raised is on standard error.
        """
        if not self._ear.poll(timeout):
            raise TimeoutError(f"worker {self.pid} said nothing for {timeout} s")
        return self._ear.recv()

    def end(self) -> None:
        """Kill the process if it still runs, and reap it."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._ear.close()


@contextmanager
def worker(work: Callable[[Tell], None]) -> Iterator[Worker]:
    """A worker that is gone at the end of the block, however that ends."""
    started = Worker(work)
    try:
        yield started
    finally:
        started.end()


def together(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Run every job in a process of its own, from one barrier on; answers their results in order. Blocks."""
    barrier = _context.Barrier(len(jobs))

    def perform(job: Callable[[], T], tell: Tell) -> None:
        barrier.wait(PATIENCE)
        tell(job())

    with ExitStack() as stack:
        started = [stack.enter_context(worker(partial(perform, job))) for job in jobs]
        return [each.hear() for each in started]


def alone(job: Callable[[], T]) -> T:
    """Run one job in a new process, where nothing of an earlier one is reused; its result. Blocks."""
    return together([job])[0]


def wait_until_asleep(pid: int, timeout: float = 5.0) -> None:
    """Block until a process sleeps in the kernel. Raises: TimeoutError: if it does not in `timeout` s."""
    deadline = time.monotonic() + timeout
    while _state(pid) != "S":
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} did not fall asleep within {timeout} s")
        time.sleep(0.0005)


def _state(pid: int) -> str:
    """One letter as in proc(5). The command name before it may hold brackets; its own is the last."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
