"""Who waits is named: threads, tasks, for what, in which method, since when; and nobody who does not."""

import asyncio
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import coheld
from coheld import Lockable, Semaphore, Waiter, aio
from coheld.backends import files, waiters
from coheld.testing.contract import killpoints
from coheld.testing.contract.observe import where
from coheld.testing.support import delays, effort, procs, states


class Bed(Lockable):
    def __init__(self) -> None:
        super().__init__(lock_name="bed")
        self.ready = False

    @Lockable.locked
    def book(self) -> None:
        pass

    @Lockable.locked(exclusive=False)
    def look(self, meet: Callable[[], object]) -> None:
        meet()

    @Lockable.locked(when=lambda self: self.ready)
    def collect(self) -> None:
        pass

    @Lockable.locked
    async def book_later(self) -> None:
        pass


@contextmanager
def working(name: str, work: Callable[[], object]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=work, name=name)
    thread.start()
    yield thread
    thread.join(delays.LONG)
    assert not thread.is_alive()


def waiting(obj: Any, number: int = 1) -> list[Waiter]:
    return states.wait_until(lambda: len(found := coheld.waiters(obj)) == number and found, f"{number} wait")


def test_a_thread_that_waits_is_named() -> None:
    bed, before = Bed(), time.monotonic()
    with bed, working("booker", bed.book) as thread:
        [waiter] = waiting(bed)
        assert (waiter.pid, waiter.tid, waiter.thread, waiter.task) == (os.getpid(), thread.native_id, "booker", "")
        assert (waiter.method, waiter.waits_for, waiter.timed) == ("Bed.book", "lock", False)
        assert waiter.task_id == 0
        assert before < waiter.since < time.monotonic()
        assert f"process {os.getpid()} (" in str(waiter) and "thread booker in Bed.book, for" in str(waiter)
        bed.release()
        thread.join(delays.LONG)
        assert not coheld.waiters(bed)
        bed.acquire()


def take_in_time(link: procs.Link) -> bool:
    return Bed().acquire(timeout=delays.MEDIUM)


def test_one_of_another_process_and_one_with_a_time_out() -> None:
    bed = Bed()
    with bed, procs.start(take_in_time) as worker:
        [waiter] = waiting(bed)
        assert (waiter.pid, waiter.timed, waiter.method) == (worker.pid, True, "")
        assert waiter.thread == "MainThread"
        assert worker.result() is False
    assert not coheld.waiters(bed)


def wait_for_ever(link: procs.Link) -> None:
    Bed().book()


def test_the_dead_do_not_wait() -> None:
    bed = Bed()
    with bed, procs.start(wait_for_ever) as worker:
        waiting(bed)
        worker.kill()
        assert not coheld.waiters(bed)


@where("readers")
def test_who_waits_for_a_guard_or_for_readers_is_named_as_such() -> None:
    bed, go = Bed(), threading.Event()
    with working("collector", bed.collect):
        [waiter] = waiting(bed)
        assert (waiter.thread, waiter.waits_for, waiter.method) == ("collector", "guard", "Bed.collect")
        with bed:
            bed.ready = True
    with working("reader", lambda: bed.look(lambda: go.wait(delays.LONG))):
        states.wait_until(lambda: coheld.resources()[0].inside, "somebody reads")
        with working("booker", bed.book):
            [waiter] = waiting(bed)
            assert (waiter.thread, waiter.waits_for, waiter.method) == ("booker", "readers", "Bed.book")
            go.set()


def test_tasks_that_wait_are_named_and_are_no_more_when_they_are_cancelled() -> None:
    bed = Bed()

    async def main() -> None:
        tasks = [asyncio.create_task(bed.book_later(), name=f"task-{number}") for number in range(3)]
        while len(found := coheld.waiters(bed)) < len(tasks):
            await asyncio.sleep(delays.TICK)
        assert [waiter.task for waiter in found] == ["task-0", "task-1", "task-2"]
        assert {(waiter.thread, waiter.method, waiter.waits_for) for waiter in found} == {
            ("", "Bed.book_later", "lock")
        }
        assert coheld.resources()[0].waiters == len(tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not coheld.waiters(bed)
        assert not await aio.acquire(bed, 0)

    with bed, working("loop", lambda: asyncio.run(main())):
        pass


def test_a_task_that_waits_has_the_number_that_it_has_as_an_owner() -> None:
    bed, other = Bed(), Lockable(lock_name="other")

    async def owns_one_and_waits_for_the_other() -> None:
        async with other:
            await bed.book_later()

    async def main() -> None:
        async with bed:
            task = asyncio.create_task(owns_one_and_waits_for_the_other())
            while not (found := coheld.waiters(bed)):
                await asyncio.sleep(delays.TICK)
            owner = coheld.holder(other)
        await task
        assert owner is not None and owner.task_id and found[0].task_id == owner.task_id

    asyncio.run(main())


@where("semaphores")
def test_who_waits_for_a_permit_is_named() -> None:
    semaphore = Semaphore(1, name="gpu")
    semaphore.acquire()
    with working("first", semaphore.acquire), working("second", semaphore.acquire):
        [resource] = states.wait_until(
            lambda: [one for one in coheld.resources() if len(one.waiting) == 2], "both wait for a permit"
        )
        assert {waiter.thread for waiter in resource.waiting} == {"first", "second"} and resource.waiters == 2
        semaphore.release()
        states.wait_until(lambda: len(coheld.resources()[0].waiting) == 1, "one has it")
        semaphore.release()
    semaphore.release()


def test_a_wait_in_the_middle_of_another_one_is_shown_and_then_that_again() -> None:
    """As in a signal's handler."""
    bed = Bed()

    def shown() -> Waiter:
        [waiter] = coheld.waiters(bed)
        return waiter

    def middle() -> tuple[Waiter, Waiter, Waiter]:
        return (
            shown(),
            waiters.listed(bed.__lock__, waiters.kind_of(waiters.FOR_GUARD, True, False), "inner", shown),
            shown(),
        )

    outer, inner, again = waiters.listed(bed.__lock__, waiters.FOR_LOCK, "outer", middle)
    assert (outer.method, inner.method, again.method) == ("outer", "inner", "outer")
    assert (outer.waits_for, inner.waits_for, inner.timed) == ("lock", "guard", True)
    assert outer.since == again.since and not coheld.waiters(bed)


def test_interrupted_at_any_step_it_is_not_shown_as_one_that_waits() -> None:
    bed = Bed()
    waiters.of_this_thread()

    def not_shown(line: int) -> None:
        assert not coheld.waiters(bed), line

    def wait() -> None:
        waiters.listed(bed.__lock__, waiters.FOR_LOCK, "wait", lambda: None)

    assert len(list(killpoints.interrupted_at_each_line(wait, not_shown))) >= effort.rounds(10)


def test_a_thread_that_waits_at_its_end_has_no_slot_of_anothers() -> None:
    """Thread-local things go at the end of a thread, its place among the waiters as well, and may wait themselves."""
    bed, ended = Bed(), threading.Event()
    shown: list[list[str]] = []

    class WaitsAtTheEnd:
        def __del__(self) -> None:
            assert not bed.__lock__.acquire(timeout=delays.SHORT)

    def first(local: Any) -> None:
        local.last = WaitsAtTheEnd()
        assert not bed.__lock__.acquire(timeout=delays.TICK)

    def second() -> None:
        """Has the slot of the first, and looks whether that one changes it."""
        place = waiters.of_this_thread()
        assert place is not None
        while not ended.is_set():
            shown.append([waiter.thread for waiter in coheld.waiters(bed)])

    local = threading.local()  # younger than the table's, as that goes first
    with bed:
        waiting_thread = threading.Thread(target=first, args=(local,), name="first")
        waiting_thread.start()
        with working("second", second):
            waiting_thread.join(delays.LONG)
            ended.set()
    assert shown and not any("second" in names for names in shown)


def test_waiters_are_named_again_after_their_directory_was_taken_away() -> None:
    """As session managers do at logout."""
    bed = Bed()
    with bed, working("first", lambda: bed.__lock__.acquire(timeout=delays.MEDIUM)):
        waiting(bed)
    for path in Path(files.lock_directory()).glob("waits-*"):
        path.unlink()
    assert bed.__lock__.acquire()
    with working("second", bed.book):
        assert waiting(bed)[0].thread == "second"
        bed.__lock__.release()


def test_of_two_threads_that_need_room_at_once_one_makes_it() -> None:
    """Else the first part of the table may stay empty, at which those who read it stop."""
    place = waiters.place("one")
    assert place is not None and place.table.free
    before = place.table.promised
    assert place.table._promise() and place.table.promised == before


FULL = ["no more slots", *["no more memory"] * (sys.platform == "linux")]  # elsewhere none is promised


@pytest.mark.parametrize("full", FULL)
def test_who_finds_no_slot_waits_all_the_same(full: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bed, places = Bed(), [waiters.place("one")]
    if full == "no more slots":
        monkeypatch.setattr(waiters, "_MOST", 2 * waiters._CHUNK)
    else:
        monkeypatch.setattr(os, "posix_fallocate", no_room)
    while places[-1] is not None:
        places.append(waiters.place("more"))
    assert len(places) > 1

    async def take() -> None:
        await bed.book_later()

    assert bed.__lock__.acquire()
    with working("thread", bed.book), working("loop", lambda: asyncio.run(take())):
        states.wait_until(lambda: coheld.statistics(bed).waiters, "they wait")
        assert not coheld.waiters(bed)
        bed.__lock__.release()


FORKED = """
import os, coheld
bed = coheld.Lockable()
if not (pid := os.fork()):
    with bed:
        print(coheld.holder(bed).thread, coheld.holder(bed).alive(), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""


def test_the_thread_of_a_forked_child_is_named() -> None:
    assert procs.run(FORKED).split() == ["MainThread", "True"]
