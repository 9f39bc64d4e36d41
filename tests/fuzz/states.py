"""A fuzzer for the files of shared state: whatever is in them, using them never crashes, hangs, or runs anything.

    PYTHONPATH=tests python tests/fuzz/states.py --seconds 600
    PYTHONPATH=tests python tests/fuzz/states.py --seed 1 --case 4711      # one case again

Each case damages the state of a named resource, before or after a process has looked at it, and lets a child use it in
all ways. Half of them get checksums that are right, so that what comes behind them is reached. A finding is a child
that dies of a signal, or meets an exception that is neither a CoheldError nor an OSError.
"""

import argparse
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import coheld
from coheld import CoheldError, Lockable, shared
from coheld.mutex import remove
from coheld.state import slots, store
from coheld.state.looking import look

NAME = "fuzzed"
LONGEST = 20
ENOUGH = 10


class Probe(Lockable, max_state=1 << 20):
    number: int = shared(0)
    real: float = shared(0.0)
    text: str = shared("")
    raw: bytes = shared(b"")
    maybe: int | None = shared(None)
    items: list[str] = shared(default_factory=list)
    table: dict[str, list[int]] = shared(default_factory=dict)
    marks: set[int] = shared(default_factory=set)


@dataclass
class Report:
    """What came of the cases."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def fill(probe: Probe) -> None:
    with probe:
        probe.number, probe.real, probe.text, probe.raw, probe.maybe = 5, 0.5, "text", b"raw", 300
        probe.items, probe.table, probe.marks = ["x" * 30] * 9, {"key": [1, 2, 3]}, {1, 2, 3}


def path_of(probe: Probe) -> Path:
    lock = probe.__lock__
    return Path(store.path_of(lock.segment.path, lock.offset, store.generation_of(lock.version)))


def damaged(content: bytes, word: int, rng: random.Random, cut: bool) -> bytes:
    """Some bytes are others, mostly where structure is."""
    data = bytearray(content)
    used = len(data.rstrip(b"\0"))
    for _ in range(rng.choice([1, 1, 2, 5, 40])):
        place = rng.choice([rng.randrange(used), rng.randrange(min(used, 900)), rng.randrange(len(data))])
        how = rng.random()
        if how < 0.4:
            data[place] = rng.randrange(256)
        elif how < 0.6:
            data[place] ^= 1 << rng.randrange(8)
        elif how < 0.8:
            odd = struct.pack("<Q", rng.choice([0, 1, 20, 21, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data), used]))
            data[place : place + 8] = odd[: len(data) - place]
        else:
            data[place : place + 16] = rng.randbytes(min(16, len(data) - place))
    if rng.random() < 0.5:
        mend(data, word)
    return bytes(data[: rng.randrange(len(data))]) if cut and rng.random() < 0.1 else bytes(data)


def mend(data: bytearray, word: int) -> None:
    """Give the header a checksum that is right, and the slots, where they have one."""
    size = slots.HEAD.size
    head = slots.Head(*slots.HEAD.unpack_from(data))
    begins = bytes(data[:size])
    record = bytes(data[slots.BEGIN : slots.BEGIN + min(head.schema, len(data))])
    begins += struct.pack("=I", zlib.crc32(begins + record)) + record
    data[: len(begins)] = begins
    if head.magic == slots.CHECKED:
        mend_slot(data, (head.first, head.second)[word & 1], head.count, word, zlib.crc32(begins))


def mend_slot(data: bytearray, begin: int, count: int, word: int, seed: int) -> None:
    """Give the live slot and its values checksums that are right, as far as they lie in the file."""
    end = begin + count * slots.ENTRY.size
    if end + 8 > len(data):
        return
    for place in range(begin, end, slots.ENTRY.size):
        _, length, low = struct.unpack_from("=QIQ", data, place)
        if length > slots.SHORT and low + length <= len(data):
            struct.pack_into("=I", data, place + 20, zlib.crc32(data[low : low + length]))
    struct.pack_into("=Q", data, end, zlib.crc32(data[begin:end], zlib.crc32(struct.pack("=Q", word), seed)))


def change(probe: Probe) -> None:
    with probe:
        for name in Probe.number.schema.names:  # type: ignore[attr-defined]
            try:
                value = getattr(probe, name)
                if isinstance(value, list):
                    value.append("x")
                elif isinstance(value, int | float):
                    setattr(probe, name, value / 2 if isinstance(value, float) else value // 2)
            except CoheldError:
                pass


USES: list[Callable[[Probe], object]] = [
    lambda probe: [getattr(probe, name) for name in Probe.number.schema.names],  # type: ignore[attr-defined]
    coheld.snapshot,
    lambda probe: look(NAME),
    change,
    coheld.snapshot,
    fill,
    lambda probe: [getattr(probe, name) for name in Probe.number.schema.names],  # type: ignore[attr-defined]
]


def use(probe: Probe) -> int:
    """In the child. 0: all went well; 1: refused; 2: something that must not be."""
    status = 0
    for one in USES:
        try:
            one(probe)
        except (CoheldError, OSError):
            status = 1
        except BaseException:
            traceback.print_exc()
            return 2
        if coheld.holder(probe) is not None:
            print("the lock is held", file=sys.stderr)
            return 2
    return status


class Fuzzer:
    """Forks: use it in a process with one thread."""

    def __init__(self, seed: int) -> None:
        self.seed, self.report = seed, Report()

    def run(self, seconds: float) -> Report:
        """Try one case after the other."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and len(self.report.findings) < ENOUGH:
            self.case(self.report.cases)
        return self.report

    def case(self, number: int) -> str:
        """Try the case of that number, and say how it ended; always the same for one seed."""
        rng = random.Random(f"{self.seed}:{number}")
        probe = Probe(lock_name=NAME)
        fill(probe)
        path = path_of(probe)
        word = probe.__lock__.version
        content = damaged(path.read_bytes(), word, rng, cut=not (mapped := rng.random() < 0.3))
        del probe
        outcome = self._in_child(path, content, mapped)
        self.report.cases += 1
        self.report.outcomes[outcome] += 1
        if outcome not in ("went well", "was refused"):
            self.report.findings.append(f"--seed {self.seed} --case {number}: {outcome}")
        assert remove(NAME)
        return outcome

    def _in_child(self, path: Path, content: bytes, mapped: bool) -> str:
        pid = os.fork()
        if not pid:
            signal.alarm(LONGEST)
            probe = Probe(lock_name=NAME)
            if mapped:
                coheld.snapshot(probe)
                with probe:
                    _ = probe.number
                write(path, content, 0)
            else:
                path.unlink()
                write(path, content, os.O_CREAT)
            os._exit(use(probe))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        named = {0: "went well", 1: "was refused", 2: "met an exception", -signal.SIGALRM: "hung"}
        return named.get(status, f"ended with {status}")


def write(path: Path, content: bytes, flags: int) -> None:
    fd = os.open(path, os.O_WRONLY | flags, 0o600)
    os.pwrite(fd, content, 0)
    os.close(fd)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        os.environ["COHELD_DIR"] = directory
        fuzzer = Fuzzer(options.seed)
        if options.case is not None:
            print(fuzzer.case(options.case))
        else:
            fuzzer.run(options.seconds)
    print(f"seed {options.seed}: {fuzzer.report.cases} cases, {dict(fuzzer.report.outcomes)}")
    print(*fuzzer.report.findings, sep="\n")
    return bool(fuzzer.report.findings)


if __name__ == "__main__":
    sys.exit(main())
