"""A kill at any instruction of a call that changes shared state: what is there then is the state before or after,
whole.

Points are drawn from the walk through one call: from what the extension does, and from everything else, most of which
is Python that encodes, writes and grows. COHELD_SWEEP=full kills at thousands of them.
"""

import mmap
import os
import random
import signal
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

import coheld
from coheld import Lockable, _native, shared
from coheld.mutex import remove
from coheld.testing.support import delays, effort, states
from killsweep.stepper import MARK, Code, Tracee, Walk, build, trace_me

FULL = os.environ.get("COHELD_SWEEP") == "full"
POINTS = 2000 if FULL else 120
ROUNDS = 50


class Ledger(Lockable):
    """Five fields that fit each other only after a whole call."""

    turns: int = shared(0)
    total: int = shared(0)
    lines: list[int] = shared(default_factory=list)
    data: bytes = shared(b"")
    checksum: int = shared(0)

    def size(self) -> int:
        return 100_000

    @Lockable.locked
    def turn(self) -> None:
        self.turns += 1
        self.lines.append(self.turns * 7)
        self.total += self.turns * 7
        self.data = bytes([self.turns % 251]) * self.size()
        self.checksum = zlib.crc32(self.data)


class Growing(Ledger):
    """Each call needs a larger file."""

    def size(self) -> int:
        return 250 * 4**self.turns


class Torn(Ledger):
    """Must not pass: the first half becomes visible before the second."""

    def size(self) -> int:
        return 500

    @Lockable.locked
    def turn(self) -> None:
        self.turns += 1
        self.lines.append(self.turns * 7)
        self.__lock__._commit()
        self.total += self.turns * 7
        self.data = bytes([self.turns % 251]) * self.size()
        self.checksum = zlib.crc32(self.data)


def checked(ledger: Ledger) -> int:
    """How many turns a commit has, if its fields fit."""
    found = coheld.snapshot(ledger)
    assert len(found.lines) == found.turns and sum(found.lines) == found.total, "torn"
    assert zlib.crc32(found.data) == found.checksum or not found.turns, "torn"
    assert set(found.data[:1]) <= {found.turns % 251}, "torn"
    return int(found.turns)


class Reader:
    """A process that checks every snapshot, until it is told to end."""

    def __init__(self, ledger: Ledger) -> None:
        self.told, self.parent = mmap.mmap(-1, 1), os.getpid()
        self.pid = os.fork()
        if not self.pid:
            os._exit(self._read(ledger))

    def _read(self, ledger: Ledger) -> int:
        signal.alarm(int(delays.HANG))
        try:
            while not self.told[0] and os.getppid() == self.parent:
                checked(ledger)
        except BaseException:
            return 1
        return 0

    def end(self) -> None:
        self.told[0] = 1
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 0, "a reader saw a torn state"


class Trial:
    """A ledger of two turns, a reader, and a child that stops before its turn and after it."""

    def __init__(self, library: object, cls: type[Ledger]) -> None:
        self.ledger = cls(lock_name="ledger")
        self.ledger.turn()
        pid = os.fork()
        if not pid:
            self._be_child(library)
        self.child = Tracee(library, pid)  # type: ignore[arg-type]
        self.child.run_to_mark()
        self.reader = Reader(self.ledger)

    def _be_child(self, library: object) -> None:
        try:
            signal.alarm(int(delays.HANG))
            self.ledger.turn()  # what only the first call in a process does, it has done
            trace_me(library)  # type: ignore[arg-type]
            for _ in range(2):
                signal.raise_signal(MARK)
                self.ledger.turn()
        finally:
            os._exit(1)

    def end(self) -> int:
        """Kill it, let the next one have its turn; how many turns there were before that."""
        os.kill(self.child.pid, signal.SIGKILL)
        os.waitpid(self.child.pid, 0)
        turns = checked(self.ledger)
        with self.ledger:
            assert self.ledger.turns == turns
            self.ledger.turn()
        assert checked(self.ledger) == turns + 1
        self.reader.end()
        files = [path.name for path in Path(os.environ["COHELD_DIR"]).iterdir()]
        assert remove("ledger")
        left = [
            path.name
            for path in Path(os.environ["COHELD_DIR"]).iterdir()
            if not path.name.startswith((".new", "sweep", "waits-"))  # these go with the next start
        ]
        assert not left, (files, left)
        return turns


@pytest.fixture(scope="module")
def library() -> Iterator[object]:
    with tempfile.TemporaryDirectory(prefix="sweep-") as directory:
        yield build(Path(directory))


def recorded_walk(trial: Trial) -> Walk:
    """On one processor, where stepping is much faster."""
    processors = os.sched_getaffinity(0)
    for pid in (0, trial.child.pid):
        os.sched_setaffinity(pid, {max(processors)})
    os.kill(trial.reader.pid, signal.SIGSTOP)  # it would take half of that processor
    try:
        return trial.child.walk_to_mark()
    finally:
        os.kill(trial.reader.pid, signal.SIGCONT)
        os.sched_setaffinity(0, processors)


def walk(library: object, cls: type[Ledger]) -> Walk:
    trial = Trial(library, cls)
    try:
        return recorded_walk(trial)
    finally:
        trial.end()


def points(recorded: Walk, rng: random.Random, number: int) -> list[int]:
    """In any order. Half of what is tried is in the extension, and in what that calls. What copies or sums up a long
    value is struck in its first rounds: the way to a later one is as long as all of them."""
    early = recorded.early(ROUNDS)
    of_lock = sorted(early.intersection(Code(str(_native.__file__)).of_lock(array("Q", recorded.pointers))))
    chosen = rng.sample(of_lock, min(len(of_lock), number // 2))
    chosen += rng.choices(sorted(early), k=number - len(chosen))
    return rng.sample(chosen, number)


@pytest.mark.hang_limit(1800)
@pytest.mark.parametrize("cls", [Ledger, Growing])
def test_a_kill_at_any_instruction(library: object, cls: type[Ledger], rng: random.Random) -> None:
    recorded = walk(library, cls)
    before = after = 0
    ends = [0, len(recorded) - 1]  # there it has not begun, and is over
    for step in ends + points(recorded, rng, POINTS if FULL else effort.rounds(POINTS)):
        trial = Trial(library, cls)
        trial.child.follow(recorded.route(step))
        turns = trial.end()
        assert turns in (2, 3), step
        before, after = before + (turns == 2), after + (turns == 3)
    print(f"{len(recorded)} instructions, {before} kills before the commit, {after} after it")
    assert before and after


@pytest.mark.hang_limit(900)
def test_the_sweep_finds_a_torn_state(library: object, rng: random.Random) -> None:
    recorded = walk_torn(library)
    with pytest.raises(AssertionError, match="torn"):
        for step in points(recorded, rng, POINTS):
            trial = Trial(library, Torn)
            try:
                trial.child.follow(recorded.route(step))
                trial.end()
            finally:
                clean_up(trial)


def walk_torn(library: object) -> Walk:
    trial = Trial(library, Torn)
    try:
        return recorded_walk(trial)
    finally:
        clean_up(trial)


def clean_up(trial: Trial) -> None:
    """Whatever a failed trial has left."""
    for pid in (trial.child.pid, trial.reader.pid):
        if states.task(pid):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    remove("ledger", timeout=delays.LONG)
