"""Files that are damaged, or that somebody else made: refused with the reason, and never a crash.

What touches them runs in a child of its own, so that a crash is seen as one.
"""

import os
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coheld import CoheldError, IncompatibleError, Lockable, statistics
from coheld._native import CELL_SIZE, CREATED, HEADER_SIZE, LAYOUT_VERSION, RECOVERING, REMOVED, TASKED, WARDED
from coheld.backends import files, shm, sweeping
from coheld.backends.base import handle
from coheld.mutex import remove
from coheld.testing.contract import killpoints
from coheld.testing.contract.places import all_in, had, inode_of, place_of, took
from coheld.testing.support import delays, procs
from fuzz import segments
from shm import spoil


class Victim:
    """A lock that this process does not know: where its file and its cell are, and how another process gets it."""

    def __init__(self, path: str, offset: int, pickled: bytes, name: str) -> None:
        self.path, self.offset = Path(path), offset
        self._pickled, self.name = pickled, name

    def attach(self) -> Lockable:
        obj: Lockable = Lockable(lock_name=self.name) if self.name else pickle.loads(self._pickled)
        return obj

    def outcome(self) -> str:
        """Of an attempt in a new process: "took", "busy", or the error."""
        with procs.start(use, self.attach) as worker:
            return str(worker.result())


def use(link: procs.Link, attach: Callable[[], Lockable]) -> str:
    try:
        return "took" if had(attach()) else "busy"
    except CoheldError as error:
        return f"{type(error).__name__}: {error}"


def make(link: procs.Link, name: str) -> None:
    obj = Lockable(lock_name=name) if name else Lockable()
    assert took(obj)
    link.say((*place_of(obj), pickle.dumps(obj), name))
    link.wait_for("end")


@pytest.fixture(params=["x", ""], ids=["named", "anonymous"])
def victim(request: pytest.FixtureRequest, coheld_dir: Path) -> Iterator[Victim]:
    """A lock that was used, and is free; its maker lives."""
    with procs.start(make, request.param) as maker:
        yield Victim(*maker.hear())
        maker.kill()  # the memory that it would give back may be gone


@pytest.fixture
def named(coheld_dir: Path) -> Victim:
    """One with a name, that nobody uses now."""
    with procs.start(make, "x") as maker:
        victim = Victim(*maker.hear())
        maker.tell("end")
    return victim


# ---- the header --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, 8, spoil.HEADER - 1, spoil.HEADER, 1024, 1279, 1280, HEADER_SIZE - 1])
def test_a_file_that_is_cut_off_is_refused(victim: Victim, size: int) -> None:
    os.truncate(victim.path, size)
    outcome = victim.outcome()
    assert outcome.startswith("IncompatibleError: ") and str(victim.path) in outcome


def test_an_arena_that_is_cut_off_before_the_cell_is_refused(coheld_dir: Path) -> None:
    with procs.start(make_many) as maker:
        victim = Victim(*maker.hear())
        assert victim.outcome() == "took"
        for size in (HEADER_SIZE, victim.offset, victim.offset + CELL_SIZE - 1):
            os.truncate(victim.path, size)
            assert f"{victim.path} has no lock at {victim.offset}" in victim.outcome()
        maker.kill()  # to end well, it would need what is gone


def make_many(link: procs.Link) -> None:
    objs = [Lockable() for _ in range(1_000)]
    link.say((*place_of(objs[-1]), pickle.dumps(objs[-1]), ""))
    link.wait_for("end")


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", bytes(HEADER_SIZE), b"x" * HEADER_SIZE, b"\xff" * 65536, files.MAGIC * 512, b"#!/bin/sh\n" * 500],
    ids=["empty", "newline", "zeros", "text", "ones", "magic", "script"],
)
def test_a_file_of_another_kind_is_refused(victim: Victim, content: bytes) -> None:
    victim.path.write_bytes(content)
    outcome = victim.outcome()
    assert outcome.startswith(f"IncompatibleError: {victim.path} is") and "remove the file" in outcome


def test_every_bit_of_the_header_counts(victim: Victim, rng: random.Random) -> None:
    def look(link: procs.Link) -> list[int]:
        accepted = []
        for offset in range(spoil.HEADER):
            bit = rng.randrange(8)
            spoil.flip(victim.path, offset, bit)
            if not use(link, victim.attach).startswith("IncompatibleError: "):
                accepted.append(offset)
            spoil.flip(victim.path, offset, bit)
        return accepted

    with procs.start(look) as worker:
        assert worker.result() == []
    assert victim.outcome() == "took"


OTHERS: dict[str, Any] = {
    "layout": LAYOUT_VERSION + 1,
    "backend": b"file".ljust(8, b"\0"),
    "cell_size": CELL_SIZE * 2,
    "libc": b"musl".ljust(16, b"\0"),
    "machine": b"riscv64".ljust(16, b"\0"),
    "pid_namespace": 1,
    "kind": 3,
    "name": b"y".ljust(255, b"\0"),
}


@pytest.mark.parametrize("field", OTHERS)
def test_one_of_another_making_is_refused_and_the_difference_named(victim: Victim, field: str) -> None:
    spoil.change_header(victim.path, **{field: OTHERS[field]})
    outcome = victim.outcome()
    assert outcome.startswith(f"IncompatibleError: {victim.path} was made with another {field.replace('_', ' ')}: ")
    theirs = b"a semaphore" if field == "kind" else OTHERS[field]
    assert (str(theirs) if isinstance(theirs, int) else theirs.rstrip(b"\0").decode()) in outcome


def test_a_field_is_not_lost(named: Victim) -> None:
    """Every field is compared; the magic is looked at before, and the boot means something else."""
    assert set(files.Header.__dataclass_fields__) == {"magic", "boot", *OTHERS}


def test_a_named_file_under_another_name_is_refused(coheld_dir: Path, named: Victim) -> None:
    (coheld_dir / "name-y").write_bytes(named.path.read_bytes())
    (coheld_dir / "name-y").chmod(0o600)
    named.name = "y"
    assert "was made with another name: 'x', here 'y'" in named.outcome()


def test_an_arena_is_no_named_lock_and_the_other_way_round(coheld_dir: Path, named: Victim) -> None:
    with procs.start(make, "") as maker:
        arena = Victim(*maker.hear())
        ours, theirs = named.path.read_bytes(), arena.path.read_bytes()
        spoil.overwrite(arena.path, 0, ours)
        named.path.write_bytes(theirs)
        for victim in (named, arena):
            assert "was made with another kind" in victim.outcome()
        maker.kill()


def test_a_refused_file_is_left_as_it_is_and_in_nobodys_way(coheld_dir: Path, named: Victim) -> None:
    named.path.write_bytes(b"what somebody wrote")
    with pytest.raises(IncompatibleError, match="remove the file"):
        Lockable(lock_name="x")
    with pytest.raises(IncompatibleError, match="remove the file"):
        remove("x")
    assert named.path.read_bytes() == b"what somebody wrote"
    assert took(Lockable()) and took(Lockable(lock_name="y"))
    named.path.unlink()
    assert took(Lockable(lock_name="x"))


def test_an_object_keeps_its_lock_when_another_is_refused(named: Victim) -> None:
    obj = Lockable(lock_name="y")
    spoil.change_header(named.path, layout=LAYOUT_VERSION + 1)
    lock = obj.__lock__
    with obj, pytest.raises(IncompatibleError):
        obj.__init__(lock_name="x")  # type: ignore[misc]
    assert obj.__lock__ is lock and took(obj)


# ---- another PID namespace ---------------------------------------------------------------------------------

ELSEWHERE = """\
import os, pickle, sys
from coheld import CoheldError, Lockable
def outcome(attach):
    try:
        return attach().acquire(timeout=1)
    except CoheldError as error:
        return f"{type(error).__name__}: {error}"
print(os.getpid())
print(outcome(lambda: Lockable(lock_name="x")))
print(outcome(lambda: pickle.loads(bytes.fromhex(sys.argv[1]))))
print(outcome(lambda: Lockable(lock_name="y")))
print(outcome(Lockable))
input()
"""


@pytest.mark.parametrize("proc", [["--mount-proc"], []], ids=["own proc", "their proc"])
def test_a_container_that_shares_the_directory_is_refused(coheld_dir: Path, proc: list[str]) -> None:
    """Process numbers mean nothing across PID namespaces."""
    objs = [Lockable(lock_name="x"), Lockable()]
    user = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
    command = ["unshare", *user, "--pid", "--fork", "--kill-child", *proc]
    with procs.command([*command, sys.executable, "-u", "-c", ELSEWHERE, pickle.dumps(objs[1]).hex()]) as other:
        other.expect("1")
        for obj in objs:
            refusal = other.hear()
            assert refusal.startswith("IncompatibleError: ") and "another pid namespace" in refusal
            assert place_of(obj)[0] in refusal
        other.expect("True")
        other.expect("True")
        assert all(map(took, objs))
        with pytest.raises(IncompatibleError, match="pid namespace"):
            Lockable(lock_name="y")
        check_that_nothing_is_swept(coheld_dir)
        other.tell("end")
    assert all(map(took, objs))


def check_that_nothing_is_swept(directory: Path) -> None:
    """What lives in the other namespace is no number that we know."""
    there = all_in(directory)
    with procs.start(make, "") as worker:
        worker.hear()
        worker.tell("end")
    assert all_in(directory) == there


# ---- another boot ------------------------------------------------------------------------------------------

LAST_BOOT = b"01234567-89ab-cdef-0123-456789abcdef"


def test_a_named_lock_of_the_last_boot_is_used_again(named: Victim) -> None:
    spoil.change_header(named.path, boot=LAST_BOOT)
    assert named.outcome() == "took"
    assert spoil.read_header(named.path).boot == shm.header_here(files.NAMED, "x").boot
    assert named.outcome() == "took"


def hold_for_ever(link: procs.Link) -> None:
    obj = Lockable(lock_name="x")
    obj.acquire()
    link.say("inside")
    link.wait_for("never")


class Watched(Lockable):
    """Remembers whose death it had to look at."""

    def __init__(self) -> None:
        super().__init__(lock_name="x")
        self.dead: list[int] = []

    def __recover__(self, dead: Any) -> None:
        self.dead.append(dead.pid)


def test_who_held_it_then_is_dead(named: Victim, tmp_path: Path) -> None:
    """Though a process of that number may run now: here it does."""
    with procs.start(hold_for_ever) as other:
        other.expect("inside")
        spoil.change_header(named.path, boot=LAST_BOOT)
        with procs.start(recover) as worker:
            assert worker.result() == ([other.pid], 1)
        other.kill()


def recover(link: procs.Link) -> tuple[list[int], int]:
    obj = Watched()
    with obj:
        return obj.dead, statistics(obj).recoveries


def recover_at_once(link: procs.Link) -> tuple[list[int], int]:
    obj = Watched()
    assert obj.acquire(blocking=False)
    obj.release()
    return obj.dead, statistics(obj).recoveries


def attach_at_once(link: procs.Link) -> int:
    link.say("ready")
    link.wait_for("go")
    obj = Lockable(lock_name="x")
    for _ in range(20):
        with obj:
            pass
    return inode_of(obj)


def test_those_who_find_it_at_once_agree_on_it(named: Victim) -> None:
    for _ in range(20):
        spoil.put_word(named.path, named.offset + spoil.LOCK_WORD, os.getpid())
        spoil.change_header(named.path, boot=LAST_BOOT)
        with procs.start(attach_at_once) as first, procs.start(attach_at_once) as second:
            for worker in (first, second):
                worker.expect("ready")
            for worker in (first, second):
                worker.tell("go")
            assert first.result() == second.result() == named.path.stat().st_ino


def test_a_header_that_is_half_written_is_read_again(named: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes it anew after a boot, under the flock."""
    spoil.flip(named.path, 50, 1)
    flock = sweeping.flock_soon

    def flock_after_the_writer(fd: int, operation: int, path: str) -> None:
        spoil.flip(named.path, 50, 1)
        flock(fd, operation, path)

    monkeypatch.setattr(sweeping, "flock_soon", flock_after_the_writer)
    assert named.outcome() == "took"


def test_an_arena_of_the_last_boot_is_gone(coheld_dir: Path) -> None:
    with procs.start(make, "") as maker:
        arena = Victim(*maker.hear())
        spoil.change_header(arena.path, boot=LAST_BOOT)
        assert arena.outcome().startswith("BackendError: the lock is gone")
        maker.tell("end")


def revive() -> None:
    assert took(Lockable(lock_name="x"))


@pytest.mark.hang_limit(180)
def test_one_who_is_killed_at_any_step_of_using_it_again_is_in_nobodys_way(named: Victim) -> None:
    def of_last_boot() -> None:
        spoil.put_word(named.path, named.offset + spoil.LOCK_WORD, 1)  # a number that lives
        spoil.change_header(named.path, boot=LAST_BOOT)

    of_last_boot()
    for _ in killpoints.killed_at_each_line(revive):
        assert named.outcome() == "took"
        of_last_boot()


# ---- cells -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["MAGIC", "KIND", "MUTEX_KIND"])
@pytest.mark.parametrize("value", [0, 1, 2, 17, 2**31, 2**32 - 1])
def test_what_is_no_lock_is_refused(victim: Victim, where: str, value: int) -> None:
    spoil.put_word(victim.path, victim.offset + getattr(spoil, where), value)
    outcome = victim.outcome()
    assert outcome.startswith("IncompatibleError: ") and str(victim.path) in outcome and "damaged" in outcome


def test_every_bit_that_says_what_it_is_counts(victim: Victim) -> None:
    def look(link: procs.Link) -> list[tuple[int, int]]:
        accepted = []
        for word in (spoil.MAGIC, spoil.KIND, spoil.MUTEX_KIND):
            for offset in range(victim.offset + word, victim.offset + word + 4):
                for bit in range(8):
                    spoil.flip(victim.path, offset, bit)
                    if not use(link, victim.attach).startswith("IncompatibleError: "):
                        accepted.append((offset, bit))
                    spoil.flip(victim.path, offset, bit)
        return accepted

    with procs.start(look) as worker:
        assert worker.result() == []
    assert victim.outcome() == "took"


NO_CELLS = [0, 1, HEADER_SIZE - 1, HEADER_SIZE + 1, HEADER_SIZE + 8, CELL_SIZE, 2**20, 2**34, 2**40, 2**63 - 1, 2**63]


@pytest.mark.parametrize("offset", NO_CELLS)
def test_a_place_where_no_lock_is_is_refused(coheld_dir: Path, offset: int) -> None:
    """A pickle may say anything."""
    with procs.start(make, "") as maker:
        arena = Victim(*maker.hear())
        with procs.start(acquire_handle, str(arena.path), offset) as worker:
            assert worker.result().startswith(f"IncompatibleError: {arena.path}")
        maker.tell("end")


def acquire_handle(link: procs.Link, path: str, offset: int) -> str:
    mutex = handle("shm", "arena", path, offset)  # loading never raises
    try:
        return str(mutex.acquire(timeout=delays.SHORT))
    except IncompatibleError as error:
        return f"IncompatibleError: {error}"


def test_a_lock_that_pthread_gave_up_is_refused(named: Victim) -> None:
    """ENOTRECOVERABLE: somebody else's program unlocked what its dead owner had left, without marking it consistent."""
    spoil.put_word(named.path, named.offset + spoil.OWNER, 2**31 - 2)
    assert named.outcome() == (f"IncompatibleError: 'x': its memory is damaged; if nobody uses it, remove {named.path}")
    named.path.unlink()
    assert named.outcome() == "took"


def test_a_name_that_is_marked_as_removed_and_still_there_begins_anew(named: Victim) -> None:
    inode = named.path.stat().st_ino
    spoil.put_word(named.path, named.offset + spoil.FLAGS, REMOVED)
    assert named.outcome() == "took"
    assert named.path.stat().st_ino != inode


def test_an_anonymous_lock_that_is_marked_as_removed_is_refused(coheld_dir: Path) -> None:
    with procs.start(make_and_try) as maker:
        arena = Victim(*maker.hear())
        spoil.put_word(arena.path, arena.offset + spoil.FLAGS, REMOVED)
        refusal = f"IncompatibleError: {arena.path} is damaged"
        assert arena.outcome().startswith(refusal)
        maker.tell("try")
        assert maker.hear().startswith(refusal)


def make_and_try(link: procs.Link) -> None:
    obj = Lockable()
    link.say((*place_of(obj), pickle.dumps(obj), ""))
    link.wait_for("try")
    link.say(use(link, lambda: obj))


def test_odd_flags_are_taken_at_their_word(named: Victim) -> None:
    spoil.put_word(named.path, named.offset + spoil.FLAGS, 2**32 - 1 & ~REMOVED)
    with procs.start(recover) as worker:
        dead, _ = worker.result()
    assert dead and spoil.word_at(named.path, named.offset + spoil.FLAGS) & RECOVERING == 0


@pytest.mark.parametrize("flags", [0, TASKED], ids=["nobody's", "of a task of nobody"])
def test_a_word_that_names_nobody_is_that_of_a_dead_owner(named: Victim, flags: int) -> None:
    """pthread takes it for held, for ever: whoever waited did so at full speed, and past his deadline."""
    for how in (recover, recover_at_once):
        spoil.put_word(named.path, named.offset + spoil.LOCK_WORD, spoil.WAITERS)
        spoil.put_word(named.path, named.offset + spoil.FLAGS, CREATED | flags)
        with procs.start(how) as worker:
            assert worker.result()[0] == [0]
        assert spoil.word_at(named.path, named.offset + spoil.LOCK_WORD) == 0


def test_an_anonymous_lock_has_no_ward(coheld_dir: Path) -> None:
    with procs.start(make, "") as maker:
        arena = Victim(*maker.hear())
        spoil.put_word(arena.path, arena.offset + spoil.FLAGS, WARDED)
        assert "its memory is damaged" in arena.outcome()
        maker.tell("end")


# ---- a damaged record of who works on behalf of an owner ---------------------------------------------------

RECORDS = [
    b"",
    b"\n",
    b"x y\n",
    b"1\n",
    b"1 2 3\n",
    b"-1 5\n",
    b"0 0\n",
    b"1 x\n",
    b"1e3 1\n",
    b"99999999999999999999 1\n",
    b"\xff\xfe\n",
    b"\xd9\xa1 \xd9\xa1\n",
    bytes(64),
    b"\n" * 64,
    b"1" * 100 + b"\n",
]


@pytest.mark.parametrize("record", RECORDS)
def test_a_damaged_ward_is_none(coheld_dir: Path, named: Victim, record: bytes) -> None:
    (coheld_dir / "ward-x").write_bytes(record)
    (coheld_dir / "ward-x").chmod(0o600)
    spoil.put_word(named.path, named.offset + spoil.FLAGS, WARDED)
    assert named.outcome() == "took"


# ---- anything at all ---------------------------------------------------------------------------------------


@pytest.mark.hang_limit(180)
def test_no_damage_makes_it_crash_or_hang(coheld_dir: Path, rng: random.Random) -> None:
    """A short run of tests/fuzz/segments.py; that runs for as long as one likes."""
    fuzzer = segments.Fuzzer(coheld_dir / "fuzz", rng.randrange(2**32))
    report = fuzzer.run(seconds=5 * delays.SCALE)
    assert report.findings == []
    assert report.cases > 50 and set(report.outcomes) >= {"took", "IncompatibleError"}
