"""What the workers of the demo share, and what they do with it.

A device counts its calls as a careless program would: it reads a number, works, and writes the number plus one. If
two calls ever overlapped, one of them would be lost. In the same call, later, the worker's own number is raised. A
worker that is killed between the two leaves a call that the device has counted and nobody has made; the device's
journal says so to the next owner, whose `__recover__` takes it back. So in the end both numbers are the same.

The numbers lie in anonymous shared memory, apart from all that the lock knows. The kernel keeps what a killed worker
has written, in the order in which it wrote it.
"""

import math
import mmap
import random
import time
from collections.abc import Sequence

from coheld import Lockable, Owner

NOBODY = -1  # the place of the main process, which may recover but makes no calls

_NAMES = ("router", "switch", "firewall", "radio", "console", "power", "probe", "camera")

_OPEN, _WORKER, _COUNTED, _MADE = range(4)  # the columns of a journal


def device_names(count: int) -> list[str]:
    """As many different names of devices."""
    return [*_NAMES, *(f"device-{number}" for number in range(len(_NAMES) + 1, count + 1))][:count]


def _numbers(*shape: int) -> memoryview:
    """Zeros that forked processes share, indexed like a table."""
    return memoryview(mmap.mmap(-1, 8 * math.prod(shape))).cast("q", shape)


class Board:
    """The numbers, and who writes them when."""

    def __init__(self, devices: int, workers: int) -> None:
        self.stop = _numbers(1)  # by the demo, once
        self.counted = _numbers(devices)  # calls; under the device's lock
        self.made = _numbers(workers, devices)  # calls; by the worker, under the device's lock
        self.journal = _numbers(devices, 4)  # is a call half done, whose, and both numbers before; under the lock
        self.recovered = _numbers(devices, 3)  # the last __recover__: which worker, when, and since when it had waited
        self.waited = _numbers(workers)  # longest wait, ns; by the worker


class Worker:
    """One caller, in a process of its own. Its place on the board outlives it: a killed worker has a successor."""

    def __init__(self, place: int, board: Board) -> None:
        self.place = place
        self.board = board
        self.asked = 0  # when it asked for the device, monotonic ns

    def call(self, device: "Device", method: str) -> None:
        """Ask for the device and call it. Blocks while others hold it."""
        self.asked = time.monotonic_ns()
        getattr(device, method)(self)

    def admitted(self) -> None:
        """The device is ours."""
        waited = time.monotonic_ns() - self.asked
        self.board.waited[self.place] = max(waited, self.board.waited[self.place])


class Device(Lockable):
    """A device of the testbed: one caller at a time, whatever process he is in."""

    def __init__(self, name: str, row: int, board: Board, worker: Worker) -> None:
        super().__init__(lock_name=name)
        self.row = row
        self.board = board
        self.worker = worker  # who uses this object

    @Lockable.locked
    def ping(self, worker: Worker) -> None:
        """A short call."""
        self._serve(worker, 0.001)

    @Lockable.locked
    def configure(self, worker: Worker) -> None:
        """A call of some length."""
        self._serve(worker, 0.008)

    @Lockable.locked
    def reboot(self, worker: Worker) -> None:
        """A long call."""
        self._serve(worker, 0.025)

    def _serve(self, worker: Worker, seconds: float) -> None:
        worker.admitted()
        board, row, mine = self.board, self.row, (worker.place, self.row)
        counted = board.counted[row]
        board.journal[row, _WORKER] = worker.place
        board.journal[row, _COUNTED] = counted
        board.journal[row, _MADE] = board.made[mine]
        board.journal[row, _OPEN] = True  # last: what it vouches for is there
        time.sleep(seconds / 2)
        board.counted[row] = counted + 1
        time.sleep(seconds / 2)
        board.made[mine] += 1
        board.journal[row, _OPEN] = False

    def __recover__(self, dead: Owner) -> None:
        """Take back the call that the dead owner left half done. Killed in here, it is done again by the next."""
        board, row = self.board, self.row
        if board.journal[row, _OPEN]:
            board.counted[row] = board.journal[row, _COUNTED]
            board.made[board.journal[row, _WORKER], row] = board.journal[row, _MADE]
            board.journal[row, _OPEN] = False
        board.recovered[row, 0] = self.worker.place
        board.recovered[row, 2] = self.worker.asked
        board.recovered[row, 1] = time.monotonic_ns()  # last: it says that the others are there


def work(worker: Worker, names: Sequence[str], seed: str) -> None:
    """Call devices at random until the board says stop. The main function of a worker's process."""
    chance, board = random.Random(seed), worker.board
    devices = [Device(name, row, board, worker) for row, name in enumerate(names)]
    while not board.stop[0]:
        worker.call(chance.choice(devices), chance.choice(("ping", "ping", "configure", "reboot")))
        time.sleep(chance.uniform(0, 0.004))
