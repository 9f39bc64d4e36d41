"""A fuzzer for segment files: whatever is in them, using them never crashes, hangs or raises something unexpected.

    PYTHONPATH=tests python tests/fuzz/segments.py --seconds 600
    PYTHONPATH=tests python tests/fuzz/segments.py --seed 1 --case 4711      # one case again

Each case damages the file of a lock in a way that its seed and number decide, before or after a process has mapped
it, and lets a child use it in all ways. A finding is a child that dies of a signal, takes too long, or meets an
exception that is neither a CoheldError nor an OSError. Ends with 1 if there was one.
"""

import argparse
import logging
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from coheld import CoheldError, Lockable, holder, statistics
from coheld.mutex import remove
from coheld.testing.contract.places import place_of
from coheld.testing.support import delays, seeds
from shm import spoil

PATIENCE = 0.02  # s; of an attempt to get a lock, which may well be held
LONGEST = round(delays.LONG)  # s; a child that takes longer hangs
ENOUGH = 10  # findings end a run
OWNER_DIED = 1 << 30


class Probe(Lockable):
    """Runs hooks, too."""

    def __recover__(self, dead: Any) -> None:
        str(dead)


@dataclass
class Report:
    """What came of the cases: how many ended how, and what must not be."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Subject:
    """An undamaged file, and the lock in it as it travels in a pickle."""

    path: Path
    cell: int
    content: bytes
    pickled: bytes

    def in_state(self, word: int) -> bytearray:
        """Its content with another lock word."""
        data = bytearray(self.content)
        data[self.cell : self.cell + 4] = word.to_bytes(4, "little")
        return data


def made(name: str) -> Subject:
    """Make a lock in a child that ends at once, so that this process knows nothing of it."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        obj = Probe(lock_name=name) if name else Probe()
        with obj, open(write, "wb") as pipe:
            pipe.write(pickle.dumps((*place_of(obj), pickle.dumps(obj))))
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        path, cell, pickled = pickle.loads(pipe.read())
    os.waitpid(pid, 0)
    return Subject(Path(path), cell, Path(path).read_bytes(), pickled)


class Fuzzer:
    """Forks, and sets COHELD_DIR: use it in a process with one thread."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory, self._seed = directory, seed
        self.report = Report()
        with self._empty_directory():
            self._subjects = [made("x"), made("")]

    @contextmanager
    def _empty_directory(self) -> Iterator[None]:
        before = os.environ.get("COHELD_DIR")
        os.environ["COHELD_DIR"] = str(self._directory)
        self._directory.mkdir(mode=0o700)
        try:
            yield
        finally:
            shutil.rmtree(self._directory)
            os.environ.pop("COHELD_DIR")
            os.environ.update({"COHELD_DIR": before} if before else {})

    def run(self, seconds: float) -> Report:
        """Try one case after the other."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and len(self.report.findings) < ENOUGH:
            self.case(self.report.cases)
        return self.report

    def case(self, number: int) -> str:
        """Try the case of that number, and say how it ended; always the same for one seed."""
        rng = random.Random(f"{self._seed}:{number}")
        subject, mapped = rng.choice(self._subjects), rng.random() < 0.2
        ways = rng.sample(spoil.WAYS_IN_PLACE if mapped else spoil.WAYS, rng.randint(1, 2))
        data = subject.in_state(rng.choice([0, 0, os.getpid(), OWNER_DIED, OWNER_DIED | 1 << 31]))
        for way in sorted(ways, key=spoil.WAYS.index):
            way(rng, data, subject.cell)
        if mapped:  # what pthread goes by is checked when a lock is attached, and then no more
            kind = slice(subject.cell + spoil.MUTEX_KIND, subject.cell + spoil.MUTEX_KIND + 4)
            data[kind] = subject.content[kind]
        with self._empty_directory():
            outcome, status = in_child(subject, bytes(data), mapped)
        self._note(outcome, status, f"--seed {self._seed} --case {number} ({[way.__name__ for way in ways]})")
        return outcome

    def _note(self, outcome: str, status: int, case: str) -> None:
        self.report.cases += 1
        self.report.outcomes.update(outcome.split() if not status else [])
        if status:
            self.report.findings.append(f"{case}: {outcome}, ended with {status}")


def in_child(subject: Subject, data: bytes, mapped: bool) -> tuple[str, int]:
    """What a child says of the damaged file, and how it ended."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(LONGEST)
        os.close(read)
        status = 1
        try:
            os.write(write, meet(subject, data, mapped).encode())
            status = 0
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(status)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    return said, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def meet(subject: Subject, data: bytes, mapped: bool) -> str:
    """Use the lock in all ways; if `mapped`, the file was whole when this process began to."""
    subject.path.write_bytes(subject.content if mapped else data)
    subject.path.chmod(0o600)
    if mapped:
        known = pickle.loads(subject.pickled)
        use(known)
        spoil.overwrite(subject.path, 0, data)
    obj = pickle.loads(subject.pickled)  # never raises
    actions = [lambda: use(obj), lambda: use(obj)]
    if subject.path.name == "name-x":
        by_name = partial(Probe, lock_name="x")
        actions += [lambda: use(by_name()), lambda: str(remove("x", PATIENCE)), lambda: use(by_name())]
    return " ".join(outcome_of(action) for action in actions)


def outcome_of(action: Callable[[], str]) -> str:
    """What it returns, or the kind of its error, where that may be."""
    try:
        return action()
    except (CoheldError, OSError) as error:
        str(error)
        return type(error).__name__


def use(obj: Lockable) -> str:
    """Everything that one can ask of a lock."""
    str(holder(obj)), str(statistics(obj)), repr(obj.__lock__)
    if not obj.acquire(timeout=PATIENCE):
        return "busy"
    with obj:
        str(holder(obj)), str(statistics(obj)), repr(obj.__lock__)
    obj.release()
    return "took"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=seeds.SEED)
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    logging.basicConfig(filename=os.devnull)  # messages about the dead are composed, and not shown
    with tempfile.TemporaryDirectory(prefix="coheld-fuzz-", dir="/dev/shm") as directory:
        fuzzer = Fuzzer(Path(directory) / "locks", options.seed)
        if options.case is not None:
            print(fuzzer.case(options.case))
        report = fuzzer.report if options.case is not None else fuzzer.run(options.seconds)
    print(f"seed {options.seed}: {report.cases} cases, {dict(report.outcomes.most_common())}")
    print("\n".join(report.findings) or "no findings")
    return bool(report.findings)


if __name__ == "__main__":
    sys.exit(main())
