"""The program of one fresh process: make many anonymous locks, keep them all, lock each; answer as JSON.

`python -m bench.crowd PEER COUNT`. It imports little, since all of its memory is counted.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench import peers

SLICES = 200


def main(peer: str, count: int) -> dict[str, Any]:
    """How many were made, seconds in all and pace of each slice of them, bytes of memory when each was used.

    A pace is the slice's time over that of a fixed piece of work right after it: machines change their speed.
    """
    gc.disable()
    make = peers.device_class(peer)
    kept: list[peers.Device] = []
    slices, paces = [], []
    for _ in range(SLICES):
        slices.append(_seconds(lambda: _make(kept, make, count // SLICES)))
        paces.append(slices[-1] / _seconds(_fixed_work))
    _lock_each(kept)
    return {"made": len(kept), "seconds": sum(slices), "paces": paces, "bytes": _memory()}


def _make(kept: list[peers.Device], make: Callable[[], peers.Device], count: int) -> None:
    """Append up to `count` more; stop where the system gives no more."""
    with suppress(OSError, MemoryError):
        kept.extend(make() for _ in range(count))


def _fixed_work() -> None:
    for number in range(20_000):
        {"number": number}.copy()


def _lock_each(kept: list[peers.Device]) -> None:
    for device in kept:
        device.locked()


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _memory() -> int:
    """Bytes of its own, plus its shared memory: what is mapped, or what its lock files take if more."""
    return _pss("Pss_Anon") + _pss("Pss_File") + max(_pss("Pss_Shmem"), _lock_files())


def _pss(field: str) -> int:
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def _lock_files() -> int:
    """Bytes that the files of $COHELD_DIR occupy, written to or only reserved."""
    files = filter(Path.is_file, Path(os.environ["COHELD_DIR"]).rglob("*"))
    return sum(file.stat().st_blocks * 512 for file in files)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
