"""Requests of a pool that nobody can end any more, ledgers whose owner does not go on, and waits whose coroutine is
destroyed, or that handlers interrupt more than once."""

import asyncio
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any

import pytest

import coheld
from coheld import Lockable, LockTimeout, Pool, native
from coheld.backends import lookout
from coheld.ledger import lost
from coheld.mutex import remove
from coheld.pool import Lease
from coheld.testing.contract.observe import CAPABILITIES, where
from coheld.testing.support import delays, procs, states

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what is destroyed


def take(link: procs.Link, pool: Pool[str]) -> None:
    link.say("asks")
    with pool.lease() as resource:
        link.say(resource)
        link.wait_for("give")


def take_by_name(link: procs.Link) -> None:
    take(link, Pool(["a"], name="lost"))


def queued(pool: Pool[Any]) -> int:
    return len(coheld.snapshot(pool._ledger).queue)


INSIDE: list[None] = []


def requests(pool: Pool[Any]) -> int:
    """Those that were served, and those that wait."""
    return len(INSIDE) + queued(pool)


async def use(pool: Pool[str]) -> None:
    async with pool.lease():
        INSIDE.append(None)
        await asyncio.get_running_loop().create_future()


def begun(pool: Pool[str]) -> "asyncio.Task[None]":
    """A task that has a lease, or waits for one; its loop is closed."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(use(pool))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    before = requests(pool)
    loop.run_until_complete(asyncio.sleep(0))
    while requests(pool) == before:  # a store is asked by a thread
        loop.run_until_complete(asyncio.sleep(delays.TICK))
    if not pool.free() and task._fut_waiter is None:  # type: ignore[attr-defined]
        loop.run_until_complete(asyncio.sleep(delays.TICK))
    loop.close()
    return task


def wait_until_forgotten() -> None:
    states.wait_until(lambda: not lost.numbers and not lost.ledgers, "all lost requests are forgotten")


# ---- a pool ----------------------------------------------------------------------------------------------------------


def test_the_lease_of_a_coroutine_that_is_destroyed_is_free_at_once() -> None:
    pool = Pool(["a"])
    task = begun(pool)
    assert pool.free() == []
    del task
    gc.collect()
    assert pool.free() == ["a"]
    with pool.lease(timeout=0):
        pass
    wait_until_forgotten()


@pytest.mark.parametrize("kept", [False, True])
def test_a_waiting_request_of_a_closed_loop_keeps_nobody_out(kept: bool) -> None:
    pool = Pool(["a"])
    with ExitStack() as running:
        with pool.lease():
            task: Any = begun(pool)
            assert queued(pool) == 1 or not CAPABILITIES.files  # news of a store may have come since, and found it
            if not kept:
                task = None
                gc.collect()
            other = running.enter_context(procs.start(take, pool))
            other.expect("asks")
            states.wait_until(lambda: not lost.waits and queued(pool) == 1, "it is forgotten, and the other waits")
        other.expect("a")
        other.tell("give")
    del task
    gc.collect()
    wait_until_forgotten()


@where("semaphores")
def test_another_process_gets_what_was_lost_though_nobody_here_ever_comes_again() -> None:
    pool = Pool(["a"])
    task = begun(pool)
    with procs.start(take, pool) as other:
        other.expect("asks")
        states.wait_until(lambda: queued(pool) == 1, "the other waits")
        del task
        gc.collect()
        other.expect("a")
        other.tell("give")
        other.end()
    wait_until_forgotten()


@where("semaphores")
def test_also_where_the_pool_is_garbage_with_it() -> None:
    task = begun(Pool(["a"], name="lost"))
    with procs.start(take_by_name, method="spawn") as other:
        other.expect("asks")
        del task
        gc.collect()
        other.expect("a")
        other.tell("give")
        other.end()
    wait_until_forgotten()
    assert remove("lost")


def test_a_collector_that_runs_in_the_ledgers_owner_changes_nothing_there() -> None:
    pool = Pool(["a", "b"])
    task = begun(pool)
    with pool._ledger:
        leases = dict(pool._ledger.leases)
        del task
        gc.collect()
        assert dict(pool._ledger.leases) == leases and coheld.holder(pool._ledger) is not None
        assert len(pool.free()) == 2
    wait_until_forgotten()
    assert not coheld.snapshot(pool._ledger).leases


def test_many_lost_at_once() -> None:
    pool = Pool(["a"])
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    tasks = [loop.create_task(use(pool)) for _ in range(100)]
    loop.run_until_complete(asyncio.sleep(delays.SHORT))
    loop.close()
    assert queued(pool) > 0
    tasks.clear()
    gc.collect()
    with pool.lease(timeout=delays.LONG):
        pass
    wait_until_forgotten()
    assert queued(pool) == 0 and pool.free() == ["a"]


def test_a_forked_child_loses_none_of_its_parents() -> None:
    pool = Pool(["a"])
    lease = pool.lease()
    lease.__enter__()
    if not (pid := os.fork()):
        del lease
        gc.collect()
        os._exit(len(pool.free()) + len(lost.numbers))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert pool.free() == []
    lease.__exit__()
    assert pool.free() == ["a"]


class Interrupt(BaseException):
    pass


def test_an_interrupt_as_its_end_begins_does_not_lose_a_lease() -> None:
    pool = Pool(["a"])

    def trace(frame: FrameType, *_: object) -> None:
        if frame.f_code is Lease.__exit__.__code__:
            sys.settrace(None)
            raise Interrupt

    before = sys.gettrace()
    try:
        with pytest.raises(Interrupt), pool.lease():
            sys.settrace(trace)
    finally:
        sys.settrace(before)
    gc.collect()  # what pytest has kept of the exception
    assert pool.free() == ["a"]
    wait_until_forgotten()


# ---- whose ledger's owner does not go on -----------------------------------------------------------------------------


def have(link: procs.Link, pool: Pool[str]) -> None:
    link.wait_for("take")
    with pool._ledger:
        link.say("have")
        link.wait_for("go")


@contextmanager
def stopped_with_it(pool: Pool[str]) -> Iterator[Callable[[], None]]:
    """Another process, which can be made to take the ledger and stand still; until the end of this."""
    with procs.start(have, pool) as other:

        def stop() -> None:
            other.tell("take")
            other.expect("have")
            other.stop()

        yield stop
        other.cont()
        other.tell("go")
        other.end()


async def lease_in_task(pool: Pool[str], timeout: float) -> None:
    async with pool.lease(timeout):
        raise AssertionError


def lease_in_thread(pool: Pool[str], timeout: float) -> None:
    with pool.lease(timeout):
        raise AssertionError


def ask(pool: Pool[str], timeout: float, as_task: bool) -> None:
    with pytest.raises(LockTimeout):
        if as_task:
            asyncio.run(lease_in_task(pool, timeout))
        else:
            lease_in_thread(pool, timeout)


@pytest.mark.parametrize("as_task", [False, True])
def test_it_times_out_where_the_owner_of_the_ledger_was_stopped(as_task: bool) -> None:
    pool = Pool(["a"])
    with stopped_with_it(pool) as stop:
        stop()
        for timeout in (0, delays.SHORT):
            ask(pool, timeout, as_task)
    with pool.lease(timeout=delays.LONG):
        pass
    assert queued(pool) == 0


@pytest.mark.parametrize("as_task", [False, True])
def test_it_times_out_where_that_was_stopped_while_it_waits(as_task: bool) -> None:
    pool = Pool(["a"])
    with pool.lease():
        with stopped_with_it(pool) as stop:
            waiter = threading.Thread(target=ask, args=(pool, delays.MEDIUM, as_task))
            waiter.start()
            states.wait_until(lambda: queued(pool) == 1, "it waits")
            stop()
            waiter.join(delays.LONG)
            assert not waiter.is_alive()
        states.wait_until(lambda: queued(pool) == 0, "it is forgotten once the ledger can be had")
    assert pool.free() == ["a"]


def test_who_tries_once_is_not_queued() -> None:
    pool = Pool(["a"])
    with pool.lease():
        version = native.lock_of(pool._ledger).version
        with pytest.raises(LockTimeout), pool.lease(timeout=0):
            raise AssertionError
        assert native.lock_of(pool._ledger).version == version


# ---- locks -----------------------------------------------------------------------------------------------------------


class Bed(Lockable):
    @Lockable.locked
    async def work(self) -> None:
        pass


def hold(link: procs.Link, bed: Bed) -> None:
    with bed:
        link.say("held")
        link.wait_for("go")


def test_a_waiting_coroutine_that_is_destroyed_under_the_guard_of_those_who_wait() -> None:
    async def main(bed: Bed) -> None:
        task = asyncio.create_task(bed.work())
        await asyncio.sleep(0)
        those = lookout._process.locks[native.lock_of(bed)]
        assert those.waiting == 1
        with those.guard():  # as the collector does it, in the middle of anything
            task.get_coro().close()  # type: ignore[union-attr]
            assert those.waiting == 1
        states.wait_until(lambda: not those.waiting, "it is withdrawn by who has the guard next")
        task.cancel()
        with suppress(asyncio.CancelledError, RuntimeError):
            await task

    bed = Bed()
    with procs.start(hold, bed) as other:
        other.expect("held")
        asyncio.run(main(bed))
        other.tell("go")
        other.end()
    assert bed.acquire(timeout=delays.LONG)
    bed.release()


@pytest.mark.parametrize("times", [1, 2, 4])
def test_wait_for_has_the_lock_in_the_end_however_often_it_is_interrupted(times: int) -> None:
    came = 0

    def interrupt(*_: object) -> None:
        nonlocal came
        came += 1
        raise Interrupt

    def strike(other: procs.Worker) -> None:
        states.wait_until_blocked(os.getpid(), tid)
        other.expect("held")
        for number in range(times):
            states.wait_until(lambda number=number: came == number, "the one before came")  # type: ignore[misc]
            states.wait_until_blocked(os.getpid(), tid)
            os.kill(os.getpid(), signal.SIGUSR1)
        states.wait_until(lambda: came == times, "the last came")
        states.wait_until_blocked(os.getpid(), tid)
        other.tell("go")

    bed, tid = Bed(), threading.get_native_id()
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with bed, procs.start(hold, bed) as other:
            thread = threading.Thread(target=strike, args=(other,))
            thread.start()
            with pytest.raises(Interrupt):
                coheld.wait_for(bed, lambda: False)
            assert native.lock_of(bed)._mine()
            thread.join(delays.LONG)
            other.end()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == times and coheld.holder(bed) is None
