"""Observers: who is told of which lock, when; and that none of them can break it."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

import coheld
from coheld import Lockable, LockTimeout, Semaphore, aio, observing
from coheld.testing.contract.observe import CAPABILITIES, elsewhere, held_elsewhere, is_free, where
from coheld.testing.support import delays, procs, states


class Bed(Lockable):
    go = False

    @Lockable.locked
    def book(self) -> int:
        return self.again()

    @Lockable.locked
    def again(self) -> int:
        return 1

    @Lockable.locked(timeout=0)
    def at_once(self) -> None:
        pass

    @Lockable.locked
    def fail(self) -> None:
        raise ValueError("on purpose")

    @Lockable.locked(when=lambda self: self.go)
    def guarded(self) -> None:
        pass

    @Lockable.locked(exclusive=False)
    def read(self) -> int:
        return 2

    @Lockable.locked
    async def work(self) -> None:
        await asyncio.sleep(0)


@contextmanager
def opened_elsewhere(bed: Bed) -> Iterator[None]:
    """Who has the lock, and waits in here for bed.go, gives it up at least once: another thread needs it for that."""
    thread = threading.Thread(target=open_it, args=(bed,))
    thread.start()
    try:
        yield
    finally:
        thread.join(delays.LONG)


def open_it(bed: Bed) -> None:
    with bed:
        bed.go = True


class Watch:
    """An observer that keeps what it hears: ("acquired", lock, who it was told by)."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any, Any]] = []
        self.waits: list[float] = []
        self.tries: list[bool] = []

    def acquired(self, lock: Any, waited: float) -> None:
        assert lock._mine()
        self.waits.append(waited)
        self.tries.append(observing.once())
        self.heard.append(("acquired", lock, caller()))

    def released(self, lock: Any) -> None:
        assert not lock._mine()
        self.heard.append(("released", lock, caller()))

    def said(self) -> list[str]:
        return [what for what, _, _ in self.heard]


def caller() -> object:
    try:
        return asyncio.current_task() or threading.get_ident()
    except RuntimeError:
        return threading.get_ident()


@contextmanager
def observed(observer: Any) -> Iterator[Any]:
    observing.start(observer)
    try:
        yield observer
    finally:
        observing.stop(observer)


@pytest.fixture
def watch() -> Iterator[Watch]:
    with observed(Watch()) as found:
        yield found


PAIR = ["acquired", "released"]


# ---- threads -------------------------------------------------------------------------------------------------------


def test_the_first_level_is_told_of_and_the_last(watch: Watch) -> None:
    bed = Bed()
    assert bed.book() == 1
    with bed, bed:
        bed.acquire()
        bed.release()
    bed.at_once()
    with bed.__lock__:
        pass
    assert watch.said() == PAIR * 4
    assert all((lock, who) == (bed.__lock__, threading.get_ident()) for _, lock, who in watch.heard)
    assert watch.waits == [0.0] * 4 or CAPABILITIES.leases  # a store was asked
    assert watch.tries == [False, False, True, False]
    assert observing.class_of(bed.__lock__) is Bed


def test_who_waits_hears_for_how_long(watch: Watch) -> None:
    bed = Bed()
    waiting = threading.Event()

    def work() -> None:
        waiting.set()
        bed.book()

    with bed:
        thread = threading.Thread(target=work)
        thread.start()
        assert waiting.wait(delays.LONG)
        states.wait_until(lambda: coheld.statistics(bed).waiters, "it waits")
    thread.join(delays.LONG)
    assert watch.said()[0] == "acquired" and sorted(watch.said()) == sorted(PAIR * 2)
    first, second = watch.waits
    assert first == 0.0 and 0.0 < second < delays.LONG
    assert [who for _, _, who in watch.heard].count(thread.ident) == 2


def test_who_does_not_get_it_hears_nothing(watch: Watch) -> None:
    bed = Bed()
    with held_elsewhere(bed):
        told = len(watch.heard)
        assert not bed.acquire(blocking=False)
        assert not bed.acquire(timeout=delays.TICK)
        with pytest.raises(LockTimeout):
            bed.at_once()
        assert len(watch.heard) == told


@where("readers")
def test_a_writer_that_waits_for_readers_hears_for_how_long(watch: Watch) -> None:
    bed = Bed()
    reading, go = threading.Event(), threading.Event()

    class Slow(Bed):
        @Lockable.locked(exclusive=False)
        def read(self) -> int:
            reading.set()
            assert go.wait(delays.LONG)
            return 2

    bed = Slow()
    reader = threading.Thread(target=bed.read)
    reader.start()
    assert reading.wait(delays.LONG)
    assert watch.heard == []  # readers are not told of
    assert not bed.acquire(timeout=0)
    writer = threading.Thread(target=bed.book)
    writer.start()
    states.wait_until(lambda: bed.__lock__.owner() is not None, "the writer has it, and waits for the reader")
    go.set()
    writer.join(delays.LONG)
    reader.join(delays.LONG)
    assert watch.said() == PAIR and watch.waits[0] > 0.0
    bed.book()
    assert watch.waits[1] == 0.0


def test_an_exception_of_the_call_is_kept(watch: Watch) -> None:
    with pytest.raises(ValueError, match="on purpose"):
        Bed().fail()
    assert watch.said() == PAIR


def test_a_guard_gives_it_back_while_it_waits(watch: Watch) -> None:
    bed = Bed()
    thread = threading.Thread(target=bed.guarded)
    thread.start()
    states.wait_until(lambda: watch.said() == PAIR, "it waits for its guard")
    with bed:
        bed.go = True
    thread.join(delays.LONG)
    theirs = [what for what, _, who in watch.heard if who == thread.ident]
    assert theirs[:2] == PAIR and theirs == PAIR * (len(theirs) // 2) and len(theirs) >= 4


def test_wait_for_gives_all_levels_back(watch: Watch) -> None:
    bed = Bed()
    bed.acquire()
    with bed, opened_elsewhere(bed):
        coheld.wait_for(bed, lambda: bed.go)
        assert bed.__lock__.owner().depth == 2  # type: ignore[union-attr]
    bed.release()
    mine = [what for what, _, who in watch.heard if who == threading.get_ident()]
    assert mine == PAIR * (len(mine) // 2) and len(mine) >= 4


def test_parts_of_semaphores_are_left_out(watch: Watch) -> None:
    permits = Semaphore(1)
    with permits:
        assert not permits.acquire(timeout=delays.TICK)

    async def main() -> None:
        async with permits:
            assert not await aio.acquire(permits, timeout=delays.TICK)

    asyncio.run(main())
    assert watch.heard == []


def test_stopped_it_hears_no_more(watch: Watch) -> None:
    bed = Bed()
    observing.start(watch)  # once, however often
    with bed:
        observing.stop(watch)
    bed.book()
    assert watch.said() == ["acquired"]
    observing.start(watch)
    bed.book()
    assert watch.said() == ["acquired", *PAIR]


# ---- what an observer does ------------------------------------------------------------------------------------------


class Broken(Watch):
    def acquired(self, lock: Any, waited: float) -> None:
        super().acquired(lock, waited)
        raise ValueError("in acquired")

    def released(self, lock: Any) -> None:
        super().released(lock)
        raise ValueError("in released")


def test_its_exception_is_said_once_and_the_call_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    bed = Bed()
    with observed(Broken()) as broken, observed(Watch()) as other, caplog.at_level(logging.ERROR, "coheld"):
        for _ in range(3):
            assert bed.book() == 1
        with pytest.raises(ValueError, match="on purpose"):
            bed.fail()
    assert broken.said() == other.said() == PAIR * 4
    assert len(caplog.records) == 1 and "in acquired" in caplog.text
    assert is_free(bed)


class Interrupted(Watch):
    """Is interrupted by a signal's handler that raises KeyboardInterrupt."""

    def __init__(self, where: str, times: int = 2) -> None:
        super().__init__()
        self.where, self.times = where, times

    def acquired(self, lock: Any, waited: float) -> None:
        super().acquired(lock, waited)
        self.interrupt("acquired")

    def released(self, lock: Any) -> None:
        super().released(lock)
        self.interrupt("released")

    def interrupt(self, where: str) -> None:
        if where == self.where and self.times and threading.current_thread() is threading.main_thread():
            self.times -= 1
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("take", [Bed.book, Bed.acquire, Bed.__enter__, Bed.at_once])
def test_interrupted_in_acquired_it_is_not_held(take: Any) -> None:
    bed = Bed()
    with observed(Interrupted("acquired")) as observer:
        with pytest.raises(KeyboardInterrupt):
            take(bed)
        assert observer.said() == PAIR
    assert is_free(bed)
    assert bed.book() == 1


def test_interrupted_in_released_it_is_given_back() -> None:
    bed = Bed()
    with observed(Interrupted("released")) as observer:
        with pytest.raises(KeyboardInterrupt):
            bed.book()
        with pytest.raises(KeyboardInterrupt) as raised:
            bed.fail()
        assert observer.said() == PAIR * 2
    assert isinstance(raised.value.__context__, ValueError)
    assert is_free(bed)


@pytest.mark.parametrize("where", ["acquired", "released"])
def test_interrupted_while_it_waits_for_another_the_lock_is_held_at_the_end(where: str) -> None:
    bed = Bed()
    with observed(Interrupted(where, times=0)) as observer:
        bed.acquire()
        observer.times = 1
        thread = threading.Thread(target=open_it, args=(bed,))
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            coheld.wait_for(bed, lambda: bed.go)
        observer.times = 0
        assert bed.__lock__._mine()
        bed.release()
        thread.join(delays.LONG)
    assert is_free(bed)


def test_a_lock_that_it_takes_itself_is_not_told_of() -> None:
    own, bed = Bed(), Bed()

    class Counting(Watch):
        def acquired(self, lock: Any, waited: float) -> None:
            own.book()
            super().acquired(lock, waited)

    with observed(Counting()) as observer:
        bed.book()
    assert {lock for _, lock, _ in observer.heard} == {bed.__lock__} and observer.said() == PAIR


# ---- deaths and forks ----------------------------------------------------------------------------------------------


def test_nobody_releases_for_a_thread_that_ended(watch: Watch) -> None:
    bed = Bed()
    elsewhere(bed.acquire)
    states.wait_until(lambda: bed.acquire(timeout=delays.LONG), "its death is seen")
    bed.release()
    assert watch.said() == ["acquired", "acquired", "released"]


def count_in_child(link: procs.Link, bed: Bed, watch: Watch) -> list[str]:
    before = len(watch.heard)
    with suppress(coheld.NotOwnerError):
        bed.release()  # is its parent's
    link.say("tried")
    link.wait_for("go")
    bed.book()
    return watch.said()[before:]


def test_a_forked_child_hears_of_its_own(watch: Watch) -> None:
    bed = Bed()
    bed.acquire()
    with procs.start(count_in_child, bed, watch, method="fork") as child:
        child.expect("tried")
        bed.release()
        child.tell("go")
        assert child.result() == PAIR
    assert watch.said() == PAIR


class Forking(Watch):
    child: int | None = None

    def acquired(self, lock: Any, waited: float) -> None:
        if self.child is None:
            self.child = os.fork()


@pytest.mark.parametrize("take", [Bed.book, Bed.acquire])
def test_a_child_that_an_observer_forks_owns_nothing(take: Any) -> None:
    bed = Bed()
    with observed(Forking()) as observer:
        try:
            take(bed)
        except coheld.NotOwnerError:
            assert not observer.child
            os._exit(7)
        finally:
            if not observer.child:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(observer.child, 0)[1]) == 7
    with suppress(coheld.NotOwnerError):
        bed.release()
    assert is_free(bed)


class Pausing(Watch):
    """Tells the test where it is, and goes no further."""

    def __init__(self, link: procs.Link, where: str) -> None:
        super().__init__()
        self.link, self.where = link, where

    def acquired(self, lock: Any, waited: float) -> None:
        self.pause("acquired")

    def released(self, lock: Any) -> None:
        self.pause("released")

    def pause(self, where: str) -> None:
        if where == self.where:
            self.link.say(where)
            self.link.wait_for("go")


def pause_in(link: procs.Link, bed: Bed, where: str) -> None:
    observing.start(Pausing(link, where))
    bed.book()


def test_who_is_killed_in_acquired_has_died_with_the_lock() -> None:
    bed = Bed()
    with procs.start(pause_in, bed, "acquired", method="fork") as child:
        child.expect("acquired")
        assert not bed.acquire(blocking=False)
        child.kill()
        assert bed.acquire(timeout=delays.LONG)
    assert coheld.statistics(bed).recoveries == 1
    bed.release()


def test_nobody_waits_for_who_is_in_released() -> None:
    bed = Bed()
    with procs.start(pause_in, bed, "released", method="fork") as child:
        child.expect("released")
        assert bed.acquire(blocking=False)
        bed.release()
        child.kill()
    assert bed.acquire(blocking=False)
    assert coheld.statistics(bed).recoveries == 0
    bed.release()


# ---- tasks ---------------------------------------------------------------------------------------------------------


def test_a_task_is_told_of_its_own(watch: Watch) -> None:
    bed = Bed()

    async def main() -> asyncio.Task[None]:
        await bed.work()
        async with bed:
            await bed.work()
            assert bed.book() == 1
        assert await aio.acquire(bed, timeout=0)
        bed.release()
        with bed:
            pass
        task = asyncio.current_task()
        assert task is not None
        return task

    task = asyncio.run(main())
    assert watch.said() == PAIR * 4
    assert {who for _, _, who in watch.heard} == {task}
    assert watch.waits == [0.0] * 4 or CAPABILITIES.leases  # a store was asked
    assert watch.tries == [False, False, True, False]
    assert observing.class_of(bed.__lock__) is Bed


def test_a_task_that_waits_is_told_in_its_own_turn(watch: Watch) -> None:
    bed = Bed()

    async def main() -> asyncio.Task[None]:
        async with bed:
            waiter = asyncio.create_task(bed.work())
            while not bed.__lock__.queued:
                await asyncio.sleep(0)
        await waiter
        return waiter

    waiter = asyncio.run(main())
    assert watch.said() == PAIR * 2
    assert [who is waiter for _, _, who in watch.heard] == [False, False, True, True]
    assert (watch.waits[0] == 0.0 or CAPABILITIES.leases) and watch.waits[1] > 0.0


def test_a_cancelled_task_leaves_no_news(watch: Watch) -> None:
    bed = Bed()

    async def main() -> None:
        async with bed:
            waiter = asyncio.create_task(bed.work())
            while not bed.__lock__.queued:
                await asyncio.sleep(0)
            waiter.cancel()
            with suppress(asyncio.CancelledError):
                await waiter

    asyncio.run(main())
    assert watch.said() == PAIR
    assert is_free(bed)


def test_a_task_that_waits_for_another_gives_it_back(watch: Watch) -> None:
    bed = Bed()

    async def main() -> None:
        async with bed:
            thread = threading.Thread(target=open_it, args=(bed,))
            thread.start()
            await aio.wait_for(bed, lambda: bed.go)
        thread.join(delays.LONG)

    asyncio.run(main())
    theirs = [what for what, _, who in watch.heard if isinstance(who, asyncio.Task)]
    assert theirs == PAIR * (len(theirs) // 2) and len(theirs) >= 4


@pytest.mark.parametrize("where", ["acquired", "released"])
def test_a_task_interrupted_in_an_observer_holds_nothing(where: str) -> None:
    bed = Bed()

    async def main() -> None:
        with pytest.raises(KeyboardInterrupt):
            await bed.work()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # not asyncio's, which would only cancel
    try:
        with observed(Interrupted(where)), asyncio.Runner() as runner:
            runner.get_loop().run_until_complete(main())
    finally:
        signal.signal(signal.SIGINT, before)
    assert is_free(bed)


class Half:
    def acquired(self, lock: object, waited: float) -> None:
        pass


@pytest.mark.parametrize("what", [3, None, Half()])
def test_what_is_no_observer_is_refused(what: Any) -> None:
    with pytest.raises(TypeError, match=r"is no observer: it has no method (acquired|released)"):
        observing.start(what)
    assert not observing.observed()
