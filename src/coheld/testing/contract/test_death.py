"""Owners that die while they hold the lock: the next one has it soon, is told who died, and recovers."""

import gc
import logging
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from coheld import Lockable, Owner, TooManyLocksError, holder, statistics
from coheld.testing.contract.observe import CAPABILITIES, in_a_thread_of_its_own
from coheld.testing.support import delays, procs, states

LIMIT = 2000  # locks that one thread may hold

Lines = Callable[[], list[str]]


class Bed(Lockable):
    """Notes what its __recover__ is told, and then does what `obstacle` is."""

    def __init__(self, lock_name: str | None = None, obstacle: Callable[[], object] = bool) -> None:
        super().__init__(lock_name=lock_name)
        self.recovered: list[Owner] = []
        self.obstacle = obstacle

    def __recover__(self, dead: Owner) -> None:
        self.recovered.append(dead)
        self.obstacle()

    @Lockable.locked
    def run(self, body: Callable[[], Any] = bool) -> Any:
        return body()


class Made(Lockable):
    """Its __create__ does what `create` is."""

    def __init__(self, create: Callable[[], object], lock_name: str | None = None) -> None:
        self.create = create
        super().__init__(lock_name=lock_name)

    def __create__(self) -> None:
        self.create()

    def __recover__(self, dead: Owner) -> None:
        raise AssertionError("nothing was there to recover")


class Plain(Lockable):
    """Has no hook."""


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Lines:
    """What this process has logged since it was asked last; all must be warnings of coheld."""

    def lines() -> list[str]:
        assert all((one.name, one.levelname) == ("coheld", "WARNING") for one in caplog.records)
        found = [one.getMessage() for one in caplog.records]
        caplog.clear()
        return found

    return lines


def hold(link: procs.Link, obj: Lockable, end: Callable[[], object] = bool, depth: int = 1) -> None:
    """Take it so many times, and end so when told."""
    for _ in range(depth):
        obj.acquire()
    link.say("holding")
    link.wait_for("end")
    end()


def killed_holder(obj: Lockable, depth: int = 1) -> int:
    """The number of a process that was killed while it held the lock, and is gone."""
    with procs.start(hold, obj, bool, depth) as worker:
        worker.expect("holding")
        worker.kill()
        return worker.pid


def can_be_had(obj: Lockable) -> bool:
    """Try it once, and give it back."""
    if not obj.acquire(blocking=False):
        return False
    obj.release()
    return True


@contextmanager
def waiting(obj: Lockable, call: Callable[[], Any]) -> Iterator[Future[Any]]:
    """A thread whose call sleeps for the lock; it is served before the block is left."""
    with ThreadPoolExecutor(1) as pool:
        tid = pool.submit(threading.get_native_id).result()
        result = pool.submit(call)
        states.wait_until_blocked(os.getpid(), tid)
        yield result
        result.result(delays.LONG)


# ---- ways to die -------------------------------------------------------------------------------------------


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_at_once() -> None:
    os._exit(3)


def exit_normally() -> None:
    sys.exit("while it holds the lock")


def run_another_program() -> None:
    os.execv(sys.executable, [sys.executable, "-c", "raise SystemExit(3)"])


WAYS = {
    "SIGKILL": (kill_myself, -signal.SIGKILL),
    "os._exit": (exit_at_once, 3),
    "sys.exit": (exit_normally, 1),
    "return": (bool, 0),
    "exec": (run_another_program, 3),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("waits", [False, True], ids=["nobody-waits", "one-waits"])
def test_any_end_of_the_owner_frees_the_lock(logged: Lines, way: str, waits: bool) -> None:
    bed, (end, status) = Bed(), WAYS[way]
    with procs.start(hold, bed, end) as owner, ExitStack() as waiters:
        owner.expect("holding")
        if waits:
            waiters.enter_context(waiting(bed, bed.run))
        owner.tell("end")
        owner.end(status)
    assert can_be_had(bed)
    assert [dead.pid for dead in bed.recovered] == [owner.pid]
    assert statistics(bed).recoveries == 1
    (line,) = logged()
    assert f"process {owner.pid}" in line and str(bed.__lock__.label) in line


@pytest.mark.parametrize("waits", [False, True], ids=["nobody-waits", "one-waits"])
def test_a_thread_that_ends_while_it_holds_it_is_an_owners_death(logged: Lines, waits: bool) -> None:
    bed, end = Bed(), threading.Event()

    def hold_until_told() -> None:
        bed.acquire()
        end.wait(delays.LONG)

    thread = threading.Thread(target=hold_until_told)
    thread.start()
    states.wait_until(lambda: holder(bed), "it holds the lock")
    with ExitStack() as waiters:
        if waits:
            waiters.enter_context(waiting(bed, bed.run))
        end.set()
    thread.join(delays.LONG)
    bed.run()
    assert [(dead.pid, dead.tid) for dead in bed.recovered] == [(os.getpid(), thread.native_id)]
    assert len(logged()) == statistics(bed).recoveries == 1


def test_one_who_is_not_reaped_yet_is_dead_too() -> None:
    bed = Bed()
    with procs.start(hold, bed) as owner:
        owner.expect("holding")
        owner.signal(signal.SIGKILL)
        assert bed.acquire(timeout=delays.LONG)
        bed.release()
        owner.kill()
    assert [dead.pid for dead in bed.recovered] == [owner.pid]


def test_one_who_stands_still_is_not_dead() -> None:
    """It is looked at after 200 ms, and lives."""
    bed = Bed()
    with procs.start(hold, bed, bed.release) as owner:
        owner.expect("holding")
        owner.stop()
        assert not bed.acquire(timeout=delays.MEDIUM)
        assert (found := holder(bed)) and found.pid == owner.pid
        owner.cont()
        owner.tell("end")
        bed.run()
    assert not bed.recovered and statistics(bed).recoveries == 0


# ---- what the next owner gets ------------------------------------------------------------------------------

ENTRIES: dict[str, Callable[[Bed], object]] = {
    "acquire": lambda bed: bed.acquire(),
    "try-once": lambda bed: bed.acquire(blocking=False),
    "timeout-0": lambda bed: bed.acquire(timeout=0),
    "timeout": lambda bed: bed.acquire(timeout=delays.LONG),
    "with": lambda bed: bed.__enter__(),
    "lock-try-once": lambda bed: bed.__lock__.acquire(blocking=False),
    "lock-with": lambda bed: bed.__lock__.__enter__(),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("depth", [1, 3])
def test_every_way_in_finds_the_death(logged: Lines, entry: str, depth: int) -> None:
    bed = Bed()
    pid = killed_holder(bed, depth=depth)
    assert ENTRIES[entry](bed)
    assert (owner := holder(bed)) and (owner.pid, owner.depth) == (os.getpid(), 1)
    (line,) = logged()
    assert f"process {pid}" in line
    assert statistics(bed).recoveries == 1
    bed.release()
    bed.run()  # whoever took the bare lock has left the recovery to this one
    assert [dead.pid for dead in bed.recovered] == [pid]
    assert holder(bed) is None


def test_the_dead_one_is_described_as_it_was(logged: Lines) -> None:
    bed = Bed()

    def tell_who_holds_it(link: procs.Link) -> None:
        link.say(holder(bed))
        link.wait_for("never")

    with procs.start(lambda link: bed.run(partial(tell_who_holds_it, link))) as owner:
        was = owner.hear()
        owner.kill()
    bed.run()
    (dead,) = bed.recovered
    assert (dead.pid, dead.tid, dead.start, dead.method) == (was.pid, was.tid, was.start, "Bed.run")
    assert not dead.alive()
    assert "in Bed.run" in logged()[0]


def test_every_death_is_counted_and_logged_once(logged: Lines) -> None:
    bed, pids = Bed(), []
    for _ in range(4):
        pids.append(killed_holder(bed))
        bed.run()
        bed.run()
    assert [dead.pid for dead in bed.recovered] == pids
    assert statistics(bed).recoveries == 4
    lines = logged()
    assert [f"process {pid}," in line for pid, line in zip(pids, lines, strict=True)] == [True] * 4


def test_the_recovery_runs_under_the_lock_and_before_the_body() -> None:
    bed = Bed()
    seen: list[object] = []

    def look() -> None:
        seen.append(holder(bed))
        bed.run(lambda: seen.append("a locked method of the hook"))

    bed.obstacle = look
    killed_holder(bed)
    bed.run(lambda: seen.append("body"))
    owner, *rest = seen
    assert isinstance(owner, Owner) and (owner.pid, owner.method) == (os.getpid(), "Bed.run")
    assert rest == ["a locked method of the hook", "body"]


def wait_and_report(link: procs.Link, bed: Bed) -> None:
    """Wait for it, and say what this process has logged and recovered."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("coheld").addHandler(handler)
    bed.recovered = []
    bed.run()
    link.say((lines, [dead.pid for dead in bed.recovered]))


@pytest.mark.parametrize("method", procs.METHODS)
def test_of_several_who_wait_one_recovers_and_all_are_served(method: str) -> None:
    bed = Bed()
    with procs.start(hold, bed) as owner, ExitStack() as stack:
        owner.expect("holding")
        waiters = [stack.enter_context(procs.start(wait_and_report, bed, method=method)) for _ in range(3)]
        for waiter in waiters:
            waiter.wait_until_blocked(waiter.pid)
        owner.kill()
        reports = [waiter.hear() for waiter in waiters]
    assert [pid for _, recovered in reports for pid in recovered] == [owner.pid]
    (line,) = [line for lines, _ in reports for line in lines]
    assert f"process {owner.pid}" in line
    assert statistics(bed).recoveries == 1
    assert statistics(bed).waiters == 0


def wait_often(link: procs.Link, obj: Lockable, rounds: int) -> None:
    for _ in range(rounds):
        link.wait_for("wait")
        with obj:
            link.say(time.monotonic())


def test_a_waiter_is_woken_by_the_death_itself() -> None:
    """It would look by itself only some 200 ms after it began to wait."""
    obj, taken = Plain(), []
    with procs.start(wait_often, obj, 7) as waiter:
        for _ in range(7):
            with procs.start(hold, obj) as owner:
                owner.expect("holding")
                waiter.tell("wait")
                waiter.wait_until_blocked()
                killed = time.monotonic()
                owner.signal(signal.SIGKILL)
                taken.append(waiter.hear() - killed)
                owner.kill()
    assert median(taken) < delays.SHORT, taken


# ---- deaths inside of the hooks ----------------------------------------------------------------------------


def recover_until_killed(link: procs.Link, bed: Bed) -> None:
    def say_and_wait() -> None:
        link.say([dead.pid for dead in bed.recovered])
        link.wait_for("never")

    bed.obstacle = say_and_wait
    bed.run()


def test_a_death_inside_recover_runs_it_again_for_the_first_one(logged: Lines) -> None:
    bed = Bed()
    first = killed_holder(bed)
    deaths = [first]
    for _ in range(2):
        with procs.start(recover_until_killed, bed) as successor:
            assert successor.hear() == [first]
            successor.kill()
            deaths.append(successor.pid)
    bed.run()
    bed.run()
    assert [dead.pid for dead in bed.recovered] == [first]
    assert statistics(bed).recoveries == len(deaths)
    (line,) = logged()
    assert f"process {deaths[-1]}" in line  # the others are in the logs of those who came after them


@pytest.mark.parametrize("entry", ["acquire", "try-once", "timeout", "with"])
def test_an_exception_inside_recover_frees_the_lock_and_runs_it_again(logged: Lines, entry: str) -> None:
    bed = Bed()
    pid = killed_holder(bed)
    bed.obstacle = fail
    for _ in range(2):
        with pytest.raises(LookupError, match="of the hook"):
            ENTRIES[entry](bed)
        assert holder(bed) is None
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(bed.__lock__.acquire, blocking=False).result()
            pool.submit(bed.release).result()
    bed.obstacle = bool
    bed.run()
    bed.run()
    assert [dead.pid for dead in bed.recovered] == [pid] * 3
    assert len(logged()) == 1


def fail() -> None:
    raise LookupError("of the hook")


def test_the_body_does_not_run_after_a_failed_recovery() -> None:
    bed, ran = Bed(), []
    killed_holder(bed)
    bed.obstacle = fail
    with pytest.raises(LookupError):
        bed.run(lambda: ran.append(1))
    assert not ran


def test_a_death_after_a_recovery_is_a_new_one() -> None:
    bed = Bed()
    first = killed_holder(bed)
    bed.run()
    second = killed_holder(bed)
    bed.run()
    assert [dead.pid for dead in bed.recovered] == [first, second]


def test_who_does_not_know_the_class_leaves_the_recovery_to_those_who_do(logged: Lines) -> None:
    pid = killed_holder(Lockable(lock_name="bed"))
    for _ in range(2):
        with Lockable(lock_name="bed"):
            pass
        with Bed(lock_name="bed").__lock__:
            pass
    assert len(logged()) == 1
    bed = Bed(lock_name="bed")
    bed.run()
    bed.run()
    assert [dead.pid for dead in bed.recovered] == [pid]


def test_a_class_without_the_hook_has_nothing_to_recover() -> None:
    killed_holder(Bed(lock_name="bed"))
    with Plain(lock_name="bed"):
        pass
    bed = Bed(lock_name="bed")
    bed.run()
    assert not bed.recovered


# ---- __create__ --------------------------------------------------------------------------------------------


def create_until_killed(link: procs.Link, name: str) -> None:
    def say_and_wait() -> None:
        link.say("creating")
        link.wait_for("never")

    Made(say_and_wait, name)


def test_a_death_inside_create_runs_it_again_and_then_never(logged: Lines) -> None:
    made: list[int] = []
    for _ in range(2):
        with procs.start(create_until_killed, "bed") as maker:
            maker.expect("creating")
            maker.kill()
    for number in range(3):
        with Made(lambda number=number: made.append(number), "bed"):  # type: ignore[misc]
            pass
    assert made == [0]
    assert f"process {maker.pid}" in logged()[0]


@pytest.mark.parametrize("name", ["bed", None])
def test_an_exception_inside_create_runs_it_again(name: str | None) -> None:
    made: list[int] = []
    with pytest.raises(LookupError, match="of the hook"):
        Made(fail, name)
    one = Made(lambda: made.append(1), name)
    assert made == [1]
    assert holder(one) is None


def test_create_runs_under_the_lock() -> None:
    seen: list[Owner | None] = []

    class Looking(Lockable):
        def __create__(self) -> None:
            seen.append(holder(self))

    assert holder(Looking()) is None
    assert seen[0] and seen[0].pid == os.getpid()


def create_in_a_race(link: procs.Link, mark: Path) -> int:
    made: list[int] = []
    link.say("ready")
    link.wait_for("go")

    def create() -> None:
        mark.touch(exist_ok=False)
        made.append(1)

    Made(create, "bed")
    assert mark.exists()  # whoever did not create it has waited
    return len(made)


def test_of_many_creators_one_creates(tmp_path: Path) -> None:
    with ExitStack() as stack:
        workers = [stack.enter_context(procs.start(create_in_a_race, tmp_path / "mark")) for _ in range(8)]
        for worker in workers:
            worker.expect("ready")
        for worker in workers:
            worker.tell("go")
        assert sum(worker.result() for worker in workers) == 1


def test_a_copy_creates_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "created"
    made = Made(partial(mark.touch, exist_ok=False))
    for method in procs.METHODS:
        with procs.start(hold, made, made.release, method=method) as child:
            child.expect("holding")
            child.tell("end")
    assert pickle.loads(pickle.dumps(made)).acquire(blocking=False)
    made.release()


# ---- many locks at once ------------------------------------------------------------------------------------


@in_a_thread_of_its_own
def test_a_thread_may_hold_so_many_locks_and_no_more() -> None:
    *locks, one_more = [Plain() for _ in range((CAPABILITIES.held_limit or 300) + 1)]
    for lock in locks:
        lock.acquire()
    if CAPABILITIES.held_limit is None:
        return give_back(one_more, *locks)
    for attempt in (one_more.acquire, one_more.__enter__, lambda: one_more.acquire(blocking=False)):
        with pytest.raises(TooManyLocksError, match="2000") as caught:
            attempt()
        assert isinstance(caught.value, RuntimeError)
    assert holder(one_more) is None
    with locks[0], ThreadPoolExecutor(1) as pool:  # what is held may be taken again, and others are not concerned
        assert pool.submit(can_be_had, one_more).result()
    locks.pop().release()
    with one_more, pytest.raises(TooManyLocksError):
        Plain().acquire()
    return give_back(*locks)


FILES, MORE = 40, 60  # that a process may still open, and locks


def take_with_few_files(link: procs.Link, locks: list[Plain]) -> None:
    used = {int(number) for number in os.listdir("/proc/self/fd")}
    most = list(islice((number for number in count() if number not in used), FILES + 1))[-1]  # a limit is of numbers
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    held: list[Plain] = []
    takes_files = CAPABILITIES.held_limit is None
    with pytest.raises(TooManyLocksError, match="open files") if takes_files else nullcontext():
        for lock in locks:
            assert lock.acquire(timeout=delays.LONG)
            held.append(lock)
    assert (0 < len(held) < MORE) is takes_files
    if takes_files:
        one_more = locks[len(held)]
        assert holder(one_more) is None
        held.pop().release()
        held[0].acquire()  # what is held may be taken again
        held[0].release()
        assert one_more.acquire(blocking=False)
        one_more.release()
    give_back(*held)


@pytest.mark.parametrize("named", [False, True], ids=["anonymous", "named"])
def test_open_files_limit_how_many_locks_are_held_only_as_declared(named: bool) -> None:
    locks = [Plain(lock_name=f"bed-{number}" if named else None) for number in range(MORE)]
    with procs.start(take_with_few_files, locks) as worker:
        worker.result()
    assert all(lock.acquire(blocking=False) for lock in locks)
    for lock in locks:
        lock.release()


def give_back(*locks: Plain) -> None:
    """All are held, or can be."""
    for lock in locks:
        assert lock.acquire(blocking=False)
        lock.release()
        if holder(lock) is not None:
            lock.release()


@in_a_thread_of_its_own
def test_calls_that_failed_do_not_count_as_held() -> None:
    bed = Bed()
    killed_holder(bed)
    bed.obstacle = fail
    for _ in range(LIMIT + 1):
        with pytest.raises(LookupError):
            bed.acquire()
    bed.obstacle = bool
    bed.run()
    assert len(bed.recovered) == LIMIT + 2


def hold_all(link: procs.Link, locks: list[Lockable]) -> None:
    for lock in locks:
        lock.acquire()
    link.say("holding")
    link.wait_for("never")


def test_all_locks_of_a_killed_thread_are_recovered(logged: Lines) -> None:
    locks: list[Lockable] = [Plain() for _ in range(LIMIT)]
    with procs.start(hold_all, locks) as owner:
        owner.expect("holding")
        owner.kill()
    for lock in locks:
        assert lock.acquire(blocking=False)
        lock.release()
    assert {statistics(lock).recoveries for lock in locks} == {1}
    assert all(f"process {owner.pid}," in line for line in logged())


# ---- objects that are dropped while they are held ----------------------------------------------------------


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_an_object_dropped_while_held_does_not_break_the_threads_other_locks(logged: Lines, dropped: int) -> None:
    """The thread's list of held locks leads through the memory of the one that was dropped."""
    beds = [Bed() for _ in range(3)]

    def hold_and_drop() -> None:
        for bed in beds:
            bed.acquire()
        del beds[dropped], bed
        gc.collect()
        others.extend(Plain() for _ in range(8))  # none of them may be given its memory
        for other in others:
            other.acquire()

    others: list[Lockable] = []
    thread = threading.Thread(target=hold_and_drop)
    thread.start()
    thread.join(delays.LONG)
    states.wait_until(lambda: states.task(os.getpid(), thread.native_id) is None, "the kernel has ended it")
    assert len(beds) == 2 and len(others) == 8
    for obj in [*beds, *others]:
        assert obj.acquire(blocking=False)
        assert statistics(obj).recoveries == 1
        obj.release()
    assert len(logged()) == 10


def drop_what_was_sent(link: procs.Link, sent: list[bytes]) -> None:
    """Each object is the only one here of its process's memory; drop the first while it is held."""
    first, *others = sent
    own, dropped = Plain(), pickle.loads(first)
    own.acquire()
    dropped.acquire()
    del dropped
    gc.collect()
    for other in others:
        pickle.loads(other).acquire()
    gc.collect()
    link.say(pickle.dumps(own))
    link.wait_for("never")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_object_of_another_process_dropped_while_held_is_recovered_all_the_same(method: str, count: int) -> None:
    """And those that its thread took before: the kernel's list leads to them through the dropped one's memory."""
    beds = [Bed() for _ in range(count)]
    with procs.start(drop_what_was_sent, [pickle.dumps(bed) for bed in beds], method=method) as owner:
        theirs = pickle.loads(owner.hear())
        assert not any(obj.acquire(blocking=False) for obj in [theirs, *beds])
        owner.kill()
    assert can_be_had(theirs) and all(map(can_be_had, beds))  # at once: nobody had to look for the owner
    for bed in beds:
        assert [dead.pid for dead in bed.recovered] == [owner.pid]


# ---- deaths that are none, and one that the kernel does not mark -------------------------------------------


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_a_forked_child_of_the_owner_dies_without_consequence(logged: Lines, end: str) -> None:
    beds = [Bed(), Bed()]
    for bed in beds:
        bed.acquire()
    with procs.start(wait_for_end, beds) as child:
        child.expect("ready")
        if end == "killed":
            child.kill()
        else:
            child.tell("end")
    for bed in beds:
        assert (owner := holder(bed)) and (owner.pid, owner.depth) == (os.getpid(), 1)
        bed.release()
        bed.run()
        assert not bed.recovered and statistics(bed).recoveries == 0
    assert not logged()


def wait_for_end(link: procs.Link, beds: list[Bed]) -> None:
    link.say("ready")
    link.wait_for("end")


EXEC = """
import os, sys, threading
from coheld import Lockable

def become_another_program():
    Lockable(lock_name="bed").acquire()
    print("holding")
    os.read(0, 1)
    os.execv(sys.executable, [sys.executable, "-u", "-c", "print('another program'); input(); input()"])

threading.Thread(target=become_another_program).start()
threading.Event().wait()
"""


def test_exec_from_a_thread_that_is_not_the_main_one_is_an_owners_death(logged: Lines) -> None:
    """The process lives on under its number, and the kernel leaves the lock as it was: a waiter has to find out."""
    bed = Bed(lock_name="bed")
    with procs.program(EXEC) as owner:
        owner.expect("holding")
        owner.tell("go on")
        owner.expect("another program")
        begin = time.monotonic()
        assert bed.acquire(timeout=delays.LONG)
        assert time.monotonic() - begin < 2 * delays.SCALE  # the design says: about a second
        bed.release()
        owner.tell("end")
    assert [dead.pid for dead in bed.recovered] == [owner.pid]
    assert len(logged()) == statistics(bed).recoveries == 1


def test_all_who_wait_are_served_after_a_death_that_the_kernel_did_not_mark() -> None:
    bed = Bed(lock_name="bed")
    with procs.program(EXEC) as owner, ExitStack() as stack:
        owner.expect("holding")
        waiters = [stack.enter_context(procs.start(wait_and_report, bed)) for _ in range(3)]
        for waiter in waiters:
            waiter.wait_until_blocked()
        owner.tell("go on")
        owner.expect("another program")
        assert [pid for waiter in waiters for pid in waiter.hear()[1]] == [owner.pid]
        owner.tell("end")
    assert statistics(bed).recoveries == 1
    assert statistics(bed).waiters == 0
