"""Permits, leases and reading calls at their edges: handles that are dropped, tasks that are destroyed, interrupts that
come at any moment, files that lose their names."""

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

import coheld
from coheld import Lockable, Pool, Semaphore
from coheld.ledger import Ledger
from coheld.pool import Lease
from coheld.testing.contract.observe import CAPABILITIES, elsewhere, give_all_back, where
from coheld.testing.support import delays, effort, procs


@where("semaphores")
def test_permits_of_a_handle_that_was_dropped_are_still_the_processs() -> None:
    first = Semaphore(2, "slots")
    first.acquire()
    del first
    gc.collect()
    again = Semaphore(2, "slots")
    again.release()
    assert again.free() == 2


class Bed(Lockable):
    @Lockable.locked(exclusive=False)
    async def hang(self) -> None:
        await asyncio.get_running_loop().create_future()

    @Lockable.locked(exclusive=False)
    def read(self, link: procs.Link | None = None) -> None:
        if link:
            link.say("in")
            link.hear()

    @Lockable.locked(exclusive=False)
    async def look(self) -> None:
        pass

    @Lockable.locked(exclusive=False)
    def read_around(self, act: Callable[[], None]) -> None:
        act()
        self.read()

    @staticmethod
    def read_for(link: procs.Link, bed: "Bed") -> None:
        bed.read(link)

    @Lockable.locked(timeout=delays.MEDIUM)
    def write(self) -> None:
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the coroutine
def test_a_reading_task_that_is_destroyed_reads_no_more() -> None:
    bed, loop = Bed(), asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # it tells of the task
    task = loop.create_task(bed.hang())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    del task
    gc.collect()
    bed.write()


@where("readers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the coroutine
def test_a_reading_task_of_a_closed_loop_reads_no_more_though_somebody_refers_to_it() -> None:
    bed, loop = Bed(), asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    tasks = [loop.create_task(bed.hang()) for _ in range(3)]
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    bed.write()
    with ExitStack() as running:
        reader = running.enter_context(procs.start(Bed.read_for, bed))
        reader.expect("in")
        tasks.clear()
        gc.collect()  # which counts nobody out once more
        with pytest.raises(coheld.LockTimeout):
            bed.write()
        reader.tell("end")
    bed.write()


class Interrupt(BaseException):
    pass


class Storm:
    armed = False


def interrupt(*_: Any) -> None:
    if Storm.armed:  # else it comes late, by a thread that has not run since
        raise Interrupt


def interrupted(act: Callable[[], object], delay: float) -> None:
    """A signal comes at about that time."""
    try:
        Storm.armed = True
        signal.setitimer(signal.ITIMER_REAL, delay)
        act()
        signal.setitimer(signal.ITIMER_REAL, 0)
        Storm.armed = False
    except Interrupt:
        Storm.armed = False


def enter(lease: Lease[str], delay: float) -> bool:
    """Is it entered?"""
    entered: list[str] = []
    interrupted(lambda: entered.append(lease.__enter__()), delay)
    return bool(entered)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an open file of /proc, interrupted
def test_to_enter_a_lease_comes_to_all_or_nothing_wherever_a_signal_comes(rng: random.Random) -> None:
    pool, before, entered = Pool(["one"]), signal.signal(signal.SIGALRM, interrupt), 0
    try:
        for _ in range(effort.rounds(3000)):
            if enter(lease := pool.lease(), rng.uniform(1e-6, 2e-4)):
                entered += 1
                lease.__exit__()
            assert pool.free() == ["one"]
            assert not coheld.snapshot(pool._ledger).queue
            if not CAPABILITIES.uninterruptible_entry:
                give_all_back(pool._ledger)
            assert coheld.holder(pool._ledger) is None
    finally:
        signal.signal(signal.SIGALRM, before)


@where("readers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an open file of /proc, interrupted
def test_an_interrupted_reading_call_is_counted_out_wherever_a_signal_comes(rng: random.Random) -> None:
    bed, before = Bed(), signal.signal(signal.SIGALRM, interrupt)
    bed.read()
    try:
        for _ in range(effort.rounds(3000)):
            interrupted(bed.read, rng.uniform(1e-6, 2e-4))
            assert not bed.__lock__.readers.counts()
            if not CAPABILITIES.uninterruptible_entry:
                give_all_back(bed)
    finally:
        signal.signal(signal.SIGALRM, before)


@where("readers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an open file of /proc, interrupted
def test_an_interrupted_reading_task_is_counted_out_wherever_a_signal_comes(rng: random.Random) -> None:
    bed, before = Bed(), signal.signal(signal.SIGALRM, interrupt)
    bed.read()

    async def look(delay: float) -> None:
        try:
            Storm.armed = True
            signal.setitimer(signal.ITIMER_REAL, delay)
            await bed.look()
            signal.setitimer(signal.ITIMER_REAL, 0)
            Storm.armed = False
        except Interrupt:
            Storm.armed = False

    async def main() -> None:
        for _ in range(effort.rounds(3000)):
            await look(rng.uniform(1e-6, 2e-4))
            assert not bed.__lock__.readers.counts()
            if not CAPABILITIES.uninterruptible_entry:
                give_all_back(bed)

    try:
        asyncio.run(main())
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_interrupt_right_after_it_was_given_back_is_no_misuse(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(["one"])
    give_back = Ledger.give_back

    def interrupted(self: Ledger, key: str, number: int) -> bool:
        monkeypatch.setattr(Ledger, "give_back", give_back)
        give_back(self, key, number)
        raise Interrupt

    monkeypatch.setattr(Ledger, "give_back", interrupted)
    with pytest.raises(Interrupt), pool.lease():
        pass
    assert pool.free() == ["one"]


LEFT_OPEN = """
import coheld
def use(what):
    with what:
        yield
left = [use(coheld.Pool(["one"]).lease()), use(coheld.Semaphore(2)), use(coheld.Lockable())]
for generator in left:
    next(generator)
left.append(left)  # which lives to the very end
"""


def test_what_a_generator_has_at_the_end_of_the_interpreter_goes_in_silence() -> None:
    command = [sys.executable, "-c", LEFT_OPEN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=delays.HANG, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("running without the C extension")]
    assert (done.returncode, done.stdout, said) == (0, "", [])


def read(link: procs.Link) -> None:
    Bed(lock_name="bed").read(link)


def write(_: procs.Link) -> bool:
    try:
        Bed(lock_name="bed").write()
    except coheld.LockTimeout:
        return False
    return True


@where("readers")
def test_who_still_has_a_file_without_its_name_does_not_replace_the_register_of_the_next() -> None:
    late = Bed(lock_name="bed")
    late.write()
    os.unlink(late.__lock__.segment.path)
    with procs.start(read, method="spawn") as reader:
        reader.expect("in")
        late.__lock__._open_register()  # as its first reading call does
        with procs.start(write, method="spawn") as writer:
            assert writer.result() is False
        reader.tell("end")
        reader.end()


@where("readers")
def test_a_reading_call_inside_of_one_whose_file_has_lost_its_name() -> None:
    bed = Bed(lock_name="bed")

    def lose_it() -> None:
        os.unlink(bed.__lock__.segment.path)
        bed.__lock__.watch()
        elsewhere(bed.write)  # of the next file

    bed.read_around(lose_it)
    assert not bed.__lock__.readers.counts()
    bed.write()
