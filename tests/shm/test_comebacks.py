"""What comes back where nobody expects it: a forked child from a handler or hook, a name that was removed, a number
that was used before the boot, a directory by another path."""

import dataclasses
import os
import pickle
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from coheld import Lockable, NotOwnerError, holder, statistics
from coheld.backends import files, shm
from coheld.mutex import remove
from coheld.testing.support import delays, procs, states


class Plain(Lockable):
    pass


def hold(link: procs.Link, obj: Lockable) -> None:
    with obj:
        link.say("holding")
        link.wait_for("go")


def in_a_forked_child(body: Callable[[], object]) -> int:
    """The exit status of a child that runs it: 0, or 1 if it raised."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        body()
        status = 0
    finally:
        os._exit(status)


class Nested(Lockable):
    """Its body runs in the child that a signal's handler forked while its parent waited."""

    parent = 0

    @Lockable.locked
    def inner(self) -> int:
        owner = holder(self)
        assert owner is not None and (owner.pid, owner.depth) == (os.getpid(), 2)
        return owner.pid

    @Lockable.locked
    def outer(self) -> int:
        if os.getpid() == self.parent:
            return 0
        assert in_a_forked_child(self.is_taken) == 0
        return self.inner()

    def is_taken(self) -> None:
        assert not self.acquire(timeout=delays.SHORT)


def wait_and_fork(link: procs.Link, obj: Nested) -> None:
    children: list[int] = []
    obj.parent = os.getpid()
    signal.signal(signal.SIGUSR1, lambda *_: children.append(os.fork()))
    link.say("waiting")
    try:
        pid = obj.outer()
        assert pid == 0 or pid == os.getpid()
    except BaseException:
        if os.getpid() != obj.parent:
            os._exit(1)
        raise
    if os.getpid() != obj.parent:
        os._exit(0)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0]


def test_a_child_that_a_handler_forks_while_waiting_waits_and_owns_for_itself() -> None:
    obj = Nested()
    with procs.start(hold, obj) as owner, procs.start(wait_and_fork, obj) as waiter:
        owner.expect("holding")
        waiter.expect("waiting")
        states.wait_until_blocked(waiter.pid)
        os.kill(waiter.pid, signal.SIGUSR1)
        (child,) = states.wait_until(lambda: states.children(waiter.pid), "the handler has forked")
        states.wait_until_blocked(child)
        states.wait_until(lambda: statistics(obj).waiters == 2, "both count")
        owner.tell("go")
    assert statistics(obj).recoveries == 0 and obj.acquire(blocking=False)
    obj.release()


class Forking(Lockable):
    """Its ``__recover__`` forks; the child returns from it as soon as `late` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.late: tuple[int, int] | None = None
        self.child = 0
        self.fails = False
        self.calls = 0

    def __recover__(self, dead: object) -> None:
        self.calls += 1
        if self.late is None:
            return
        (gate, opener), self.late = self.late, None
        self.child = os.fork()
        if self.child == 0:
            os.close(opener)
            os.read(gate, 1)
        elif self.fails:
            raise LookupError("not recovered")


def leave_it_dead(obj: Lockable) -> None:
    def die() -> None:
        obj.acquire()
        os._exit(0)

    assert in_a_forked_child(die) == 0


def acquire_in(parent: int, obj: Forking) -> None:
    """The child that came out of the hook must be told that it holds nothing, and ends here."""
    try:
        obj.acquire()
    except NotOwnerError:
        if os.getpid() != parent:
            os._exit(0)
        raise
    if os.getpid() != parent:
        os._exit(1)


@pytest.mark.parametrize("fails", [False, True], ids=["it returns", "it raises"])
def test_a_child_that_comes_back_from_a_hook_changes_nothing(fails: bool) -> None:
    obj = Forking()
    leave_it_dead(obj)
    gate, opener = os.pipe()
    obj.late, obj.fails = (gate, opener), fails
    try:
        acquire_in(os.getpid(), obj)
        obj.release()
    except LookupError:
        assert fails
    os.close(opener)  # the child returns only now: the lock is free
    os.close(gate)
    assert os.waitstatus_to_exitcode(os.waitpid(obj.child, 0)[1]) == 0
    with obj:
        assert obj.calls == (2 if fails else 1)
    assert statistics(obj).recoveries == 1


class Made(Lockable):
    made: ClassVar[list[int]] = []

    def __create__(self) -> None:
        self.made.append(os.getpid())


def test_after_a_removal_the_next_to_come_makes_the_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Made, "made", [])
    obj = Made(lock_name="bed")
    assert remove("bed") and len(obj.made) == 1
    with obj:
        assert len(obj.made) == 2
    Made(lock_name="bed")
    assert len(obj.made) == 2


def hold_named(link: procs.Link, name: str) -> None:
    hold(link, Lockable(lock_name=name))


def test_after_a_removal_the_holder_is_that_of_the_new_lock() -> None:
    obj = Lockable(lock_name="bed")
    assert in_a_forked_child(lambda: remove("bed")) == 0
    with procs.start(hold_named, "bed") as worker:
        worker.expect("holding")
        owner = holder(obj)
        assert owner is not None and owner.pid == worker.pid
        worker.tell("go")


def test_an_arena_stays_while_a_daemon_has_it_also_by_another_path(coheld_dir: Path) -> None:
    """The daemon has closed its descriptors; its parent, which made the lock, is killed; the next one sweeps."""
    link = coheld_dir / "by-another-path"
    real = coheld_dir / "real"
    real.mkdir()
    link.symlink_to(real)
    script = """
import os, sys
from coheld import Lockable
lock = Lockable()
if os.fork() == 0:
    os.closerange(3, 100)
    print(os.getpid(), lock.__lock__.segment.path, flush=True)
    sys.stdin.read()
    os._exit(0)
os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "COHELD_DIR": str(link)}
    with procs.command([sys.executable, "-c", script], env=environment) as maker:
        pid, path = maker.hear().split()
        maker.end(expected=-signal.SIGKILL)
        swept = "from coheld import Lockable; Lockable()"
        with procs.command([sys.executable, "-c", swept], env=environment):
            pass
        assert os.path.exists(path)
        os.kill(int(pid), signal.SIGKILL)


def attach_later(link: procs.Link, first: Lockable) -> bool:
    """A daemon closes what it does not know; then it is sent another lock of the arena that it maps."""
    segment = os.path.realpath(first.__lock__.segment.path)
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == segment:
                os.close(int(name))
        except OSError:
            pass
    link.say("closed")
    second: Any = pickle.loads(bytes.fromhex(link.hear()))
    with second:
        return bool(first.acquire(blocking=False))


def test_a_daemon_that_closed_its_descriptors_can_attach_more() -> None:
    first = Plain()
    with procs.start(attach_later, first, method="spawn") as worker:
        worker.expect("closed")
        second = Plain()
        worker.tell(pickle.dumps(second).hex())
        assert worker.result()


def words(obj: Lockable) -> tuple[str, int]:
    lock: Any = obj.__lock__
    return lock.segment.path, lock.offset


def test_who_works_for_an_owner_of_before_the_boot_is_not_killed(coheld_dir: Path) -> None:
    """A number and start time may come again after a boot: a segment on a disk must not speak of them then."""
    obj = Lockable(lock_name="bed")
    lock: Any = obj.__lock__
    path, _ = words(obj)
    with procs.start(hold, Plain()) as bystander:
        bystander.expect("holding")
        with obj:
            lock.entrust(bystander.pid)  # and not reclaimed: the boot came first
        header = Path(path).read_bytes()
        del obj, lock
        forged = forge_boot(header)
        with open(path, "r+b") as file:
            file.write(forged)
        with Lockable(lock_name="bed"):
            assert not states.gone(bystander.pid)
        bystander.tell("go")


def forge_boot(raw: bytes) -> bytes:
    """The same header, of another boot."""
    forged = dataclasses.replace(shm.header_here(files.NAMED, "bed"), boot=b"x" * 36).pack()
    assert forged != raw[: len(forged)]
    return forged


def test_a_waiter_that_was_killed_before_it_wrote_since_when_is_forgotten() -> None:
    """Counted, without a time: the state that is left by a kill between the two stores."""
    obj = Lockable(lock_name="bed")
    path, offset = words(obj)
    with open(path, "r+b") as file:
        file.seek(offset + 48)
        file.write(struct.pack("<Q", 1))
    assert statistics(obj).waiters == 1

    def forgotten() -> bool:
        with obj:
            pass
        return statistics(obj).waiters == 0

    states.wait_until(forgotten, "nobody is counted any more")
