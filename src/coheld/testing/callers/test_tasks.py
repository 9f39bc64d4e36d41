"""Tasks of asyncio as owners: who excludes whom, who waits how long, and what is left by who is cancelled or killed."""

import asyncio
import gc
import inspect
import os
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import coheld
from coheld import DeadlockError, Lockable, LockTimeout, NotLockedError, NotOwnerError, aio, native
from coheld.testing.contract.observe import CAPABILITIES, elsewhere
from coheld.testing.support import delays, effort, procs, states
from coheld.testing.support.exclusion import Exclusion


class Bed(Lockable):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inside = self.calls = 0
        self.order: list[int] = []

    @Lockable.locked
    async def work(self, number: int = 0) -> int:
        assert not self.inside
        self.inside = 1
        try:
            await asyncio.sleep(0)
        finally:
            self.inside = 0
        self.calls += 1
        self.order.append(number)
        return number

    @Lockable.locked
    async def twice(self) -> int:
        return await self.work(1) + self.look()

    @Lockable.locked
    def look(self) -> int:
        return self.calls

    @Lockable.locked(timeout=delays.SHORT)
    async def hurry(self) -> None:
        pass

    @Lockable.locked
    async def fail(self) -> None:
        await asyncio.sleep(0)
        raise ValueError("on purpose")

    @Lockable.locked
    async def hang(self) -> None:
        await asyncio.get_running_loop().create_future()

    @Lockable.locked(atomic=True)
    async def hang_atomically(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def hang_inside(self) -> None:
        async with self:
            await asyncio.get_running_loop().create_future()

    async def lines(self) -> AsyncIterator[int]:
        async with self:
            for number in range(3):
                yield number


def free(obj: Lockable) -> bool:
    """For another thread."""
    return native.lock_of(obj).owner() is None


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


@asynccontextmanager
async def held_by_another_task(obj: Lockable) -> AsyncIterator[asyncio.Event]:
    holding, go = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with obj:
            holding.set()
            await go.wait()

    holder = asyncio.create_task(hold(), name="holder")
    await holding.wait()
    try:
        yield go
    finally:
        go.set()
        await holder


# ---- one at a time --------------------------------------------------------------------------------------------------


def test_tasks_of_one_loop_take_turns_in_their_order() -> None:
    async def main() -> None:
        bed = Bed()
        await asyncio.gather(*(bed.work(number) for number in range(200)))
        assert bed.calls == 200 and bed.order == list(range(200)) and free(bed)

    run(main)


def test_the_task_may_take_it_again_and_its_sync_calls_are_its_own() -> None:
    async def main() -> None:
        bed = Bed()
        assert await bed.twice() == 2 and free(bed)
        async with bed, bed:
            assert await bed.twice() == 3 and not free(bed)
            with bed:
                await asyncio.sleep(0)
        assert free(bed)

    run(main)


def test_child_tasks_do_not_inherit() -> None:
    async def main() -> None:
        bed = Bed()
        async with bed:
            child = asyncio.create_task(bed.work())
            await asyncio.sleep(delays.TICK)
            assert not child.done() and bed.calls == 0
        await child

    run(main)


def test_sync_acquire_in_a_coroutine_is_the_tasks() -> None:
    async def main() -> None:
        bed = Bed()
        assert bed.acquire()
        other = asyncio.create_task(bed.work())
        await asyncio.sleep(delays.TICK)
        assert bed.calls == 0 and bed.acquire()
        bed.release()
        bed.release()
        await other

    run(main)


def test_threads_and_tasks_of_several_loops_exclude_each_other() -> None:
    bed, rounds = Bed(), 40

    async def tasks() -> None:
        await asyncio.gather(*(bed.work() for _ in range(rounds)))

    def sync() -> None:
        for _ in range(rounds):
            with bed:
                assert not bed.inside
                bed.inside = 1
                time.sleep(0)
                bed.inside = 0
                bed.calls += 1

    threads = [threading.Thread(target=sync) for _ in range(2)]
    threads += [threading.Thread(target=asyncio.run, args=[tasks()]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(delays.HANG)
    assert bed.calls == 4 * rounds and free(bed)


def count_in_tasks(link: procs.Link, bed: Bed, exclusion: Exclusion, rounds: int, number: int) -> None:
    async def one() -> None:
        for _ in range(rounds):
            async with bed:
                with exclusion.inside(number):
                    await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(one() for _ in range(4)))

    asyncio.run(main())


def count_in_calls(link: procs.Link, bed: Bed, exclusion: Exclusion, rounds: int, number: int) -> None:
    for _ in range(4 * rounds):
        with bed, exclusion.inside(number):
            pass


def ask_again_at_once(link: procs.Link, bed: Bed) -> None:
    async def main() -> None:
        async with bed:
            link.say("holding")
        while True:
            async with bed:
                await asyncio.sleep(0)

    asyncio.run(main())


def test_a_task_that_asks_again_at_once_lets_those_pass_who_wait_elsewhere() -> None:
    bed = Bed()

    async def main() -> None:
        for number in range(20):
            await asyncio.wait_for(bed.work(number), delays.LONG)
            await asyncio.to_thread(bed.look)

    with procs.start(ask_again_at_once, bed, method="fork") as hog:
        hog.expect("holding")
        asyncio.run(main())
        hog.kill()
    assert bed.acquire(timeout=delays.LONG)
    bed.release()


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_release_by_another_task_or_by_nobody_is_refused() -> None:
    async def main() -> None:
        bed = Bed()
        with pytest.raises(NotOwnerError):
            bed.release()
        async with held_by_another_task(bed):
            with pytest.raises(NotOwnerError, match=str(os.getpid())):
                bed.release()
        assert free(bed)

    run(main)


def test_a_sync_call_that_would_block_the_loop_for_ever_says_so_at_once() -> None:
    async def main() -> None:
        bed = Bed()
        async with held_by_another_task(bed):
            for call in (bed.look, bed.acquire, bed.__enter__, lambda: bed.acquire(timeout=delays.LONG)):
                with pytest.raises(DeadlockError, match=r"'holder'.*to_thread"):
                    call()
            assert not bed.acquire(blocking=False) and not bed.acquire(timeout=0)
        assert bed.look() == 0

    run(main)


async def called_back(call: Callable[[], object]) -> None:
    """By the loop, and by none of its tasks. Raises what that raises."""
    done = asyncio.get_running_loop().create_future()

    def act() -> None:
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)

    asyncio.get_running_loop().call_soon(act)
    await done


def test_so_does_one_that_a_callback_of_the_loop_makes() -> None:
    async def main() -> None:
        bed = Bed()
        async with bed:
            for call in (bed.look, bed.acquire, lambda: bed.acquire(timeout=delays.LONG)):
                with pytest.raises(DeadlockError, match="to_thread"):
                    await called_back(call)

    run(main)


def test_the_loop_cannot_wait_for_the_thread_around_it() -> None:
    bed = Bed()

    async def main() -> None:
        with pytest.raises(DeadlockError, match="around the loop"):
            await bed.work()
        assert bed.look() == 0

    with bed:
        run(main)
    assert free(bed)


def test_time_outs() -> None:
    async def main() -> None:
        bed = Bed()
        async with held_by_another_task(bed):
            with pytest.raises(LockTimeout, match=f"process {os.getpid()}"):
                await bed.hurry()
            assert not await aio.acquire(bed, timeout=delays.SHORT)
            assert not await aio.acquire(bed, timeout=0) and not await aio.acquire(bed, timeout=-1)
        assert await aio.acquire(bed, timeout=0)
        bed.release()
        for bad, error in ((float("nan"), ValueError), ("1", TypeError)):
            with pytest.raises(error):
                await aio.acquire(bed, timeout=bad)  # type: ignore[arg-type]
        assert free(bed)

    run(main)


def test_without_a_task_of_asyncio_it_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="task of a running asyncio loop"):
        Bed().work().send(None)


def test_an_exception_gives_it_back() -> None:
    async def main() -> None:
        bed = Bed()
        with pytest.raises(ValueError, match="on purpose"):
            await bed.fail()
        assert free(bed)

    run(main)


# ---- cancelled, gone, killed ----------------------------------------------------------------------------------------


def test_cancellation_at_every_await_leaves_no_trace() -> None:
    """A call is cancelled after so many steps of the loop, until it is through before that."""

    async def after(steps: int) -> bool:
        bed = Bed()
        async with held_by_another_task(bed) as go:
            call = asyncio.create_task(bed.twice())
            for step in range(steps):
                await asyncio.sleep(0)
                if step == steps // 2:
                    go.set()
            if steps % 2:  # give the thread that waits for it time to grant it
                await asyncio.to_thread(time.sleep, 0)
            through = call.done()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
                raise asyncio.CancelledError
        assert await asyncio.wait_for(bed.work(), delays.LONG) == 0
        while CAPABILITIES.leases and not free(bed):  # the thread that asked a store in its stead gives it back
            await asyncio.sleep(0)
        assert free(bed)
        return through

    async def main() -> None:
        for steps in range(30):
            await after(steps)

    run(main)


def test_a_task_that_ends_with_it_is_a_dead_owner(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        bed = Bed()

        async def forget() -> None:
            assert await aio.acquire(bed)

        await asyncio.create_task(forget())
        await asyncio.wait_for(bed.work(), delays.LONG)
        assert "died while it held the lock" in caplog.text and native.lock_of(bed)._counters()[2] == 1

    run(main)


def test_a_task_whose_loop_is_closed_is_a_dead_owner() -> None:
    bed = Bed()
    loop = asyncio.new_event_loop()

    async def hold() -> None:
        async with bed:
            loop.stop()
            await asyncio.Event().wait()

    task = loop.create_task(hold())
    loop.run_forever()
    assert not free(bed)
    loop.close()
    assert bed.acquire(timeout=delays.LONG)
    bed.release()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    del task
    gc.collect()
    assert free(bed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the coroutine
@pytest.mark.parametrize("call", [Bed.hang, Bed.hang_atomically, Bed.hang_inside], ids=lambda call: call.__name__)
def test_a_call_that_is_destroyed_gives_back_nothing_of_the_next_owners(call: Callable[[Bed], Any]) -> None:
    bed, loop = Bed(), asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # it tells of the task
    tasks = [loop.create_task(call(bed))]
    while native.lock_of(bed).task is None:
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()

    async def main() -> None:
        async with bed:
            tasks.clear()
            gc.collect()
            assert native.lock_of(bed).task is asyncio.current_task()
            assert not elsewhere(lambda: bed.acquire(timeout=0))
        assert free(bed)

    run(main)


def test_what_an_async_generator_has_left_open_is_given_back() -> None:
    """Which the loop closes in another task than the one that has it."""

    async def main() -> None:
        bed = Bed()
        async for _ in bed.lines():
            break
        gc.collect()
        while not free(bed):
            await asyncio.sleep(0)
        lines = bed.lines()
        await anext(lines)
        await lines.aclose()  # type: ignore[attr-defined]
        assert free(bed)
        async with bed:
            async for _ in bed.lines():
                break
            for _ in range(10):
                await asyncio.sleep(0)
            assert not free(bed) and bed.look() == 0

    run(main)


def test_a_turn_of_a_task_whose_loop_is_closed_passes_on(caplog: pytest.LogCaptureFixture) -> None:
    bed, held, go = Bed(), threading.Event(), threading.Event()

    def hold() -> None:
        with bed:
            held.set()
            go.wait(delays.HANG)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(delays.HANG)
    loop = asyncio.new_event_loop()
    task = loop.create_task(bed.work(1))
    loop.run_until_complete(asyncio.sleep(delays.TICK))
    loop.close()

    async def main() -> None:
        second = asyncio.create_task(bed.work(2))
        await asyncio.sleep(0)
        go.set()
        assert await asyncio.wait_for(second, delays.LONG) == 2

    run(main)
    thread.join()
    assert bed.order == [2] and "died" not in caplog.text
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    del task
    gc.collect()
    assert free(bed)


def hold_in_a_task(link: procs.Link, bed: Bed) -> None:
    async def main() -> None:
        async with bed:
            link.say("holding")
            await asyncio.Event().wait()

    asyncio.run(main())


def test_waiting_tasks_have_it_soon_after_its_owners_process_was_killed() -> None:
    bed = Bed()

    async def main(holder: procs.Worker) -> None:
        waiter = asyncio.create_task(bed.work())
        await asyncio.sleep(delays.TICK)
        assert not waiter.done()
        holder.kill()
        await asyncio.wait_for(waiter, delays.LONG)

    with procs.start(hold_in_a_task, bed, method="fork") as holder:
        holder.expect("holding")
        assert not bed.acquire(timeout=delays.SHORT)
        asyncio.run(main(holder))
    assert free(bed)


def test_a_thread_has_it_soon_after_a_task_was_killed_with_its_process() -> None:
    bed = Bed()
    with procs.start(hold_in_a_task, bed, method="fork") as holder:
        holder.expect("holding")
        holder.kill()
        assert bed.acquire(blocking=False)
        bed.release()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_tasks_and_calls_of_several_processes_exclude_each_other(method: str, tmp_path: Path) -> None:
    bed, rounds, exclusion = Bed(), 25, Exclusion(tmp_path)
    with ExitStack() as workers:
        for number, role in enumerate([count_in_tasks, count_in_tasks, count_in_calls]):
            workers.enter_context(procs.start(role, bed, exclusion, rounds, number, method=method))
    exclusion.check(3 * 4 * rounds)


def count_for_ever(link: procs.Link, bed: Bed, exclusion: Exclusion, number: int) -> None:
    async def one() -> None:
        while True:
            async with bed:
                with exclusion.inside(number):
                    await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def main() -> None:
        link.say("begun")
        await asyncio.gather(one(), one())

    asyncio.run(main())


@pytest.mark.hang_limit(2 * delays.HANG)
def test_processes_killed_at_any_moment_strand_nobody_and_never_overlap(tmp_path: Path, rng: random.Random) -> None:
    bed, exclusion, kills = Bed(), Exclusion(tmp_path), effort.rounds(60)
    for _ in range(kills):
        with (
            procs.start(count_for_ever, bed, exclusion, 1) as one,
            procs.start(count_for_ever, bed, exclusion, 2) as two,
        ):
            one.expect("begun")
            two.expect("begun")
            time.sleep(rng.uniform(0, 0.01))  # any moment of its calls
            one.kill()
            before = exclusion.counted
            states.wait_until(lambda before=before: exclusion.counted > before + 5, "the other goes on")
            two.kill()
        assert bed.acquire(timeout=delays.LONG)
        with exclusion.inside(3):
            pass
        bed.release()
    exclusion.check(deaths=2 * kills)


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_the_loop_goes_on_while_another_has_it() -> None:
    async def main() -> None:
        bed, ticks = Bed(), 0
        holding, go = threading.Event(), threading.Event()

        def hold() -> None:
            with bed:
                holding.set()
                go.wait(delays.HANG)

        thread = threading.Thread(target=hold)
        thread.start()
        holding.wait(delays.LONG)
        waiter = asyncio.create_task(bed.work())
        while ticks < 50:
            await asyncio.sleep(0.001)
            ticks += 1
        assert not waiter.done()
        go.set()
        await waiter
        await asyncio.to_thread(thread.join)

    run(main)


def test_where_no_thread_is_to_be_had_who_waits_is_told_and_nobody_after_that_is_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        bed = Bed()
        async with held_by_another_task(bed) as go:
            while lookouts():  # one that a store has been asked by
                await asyncio.sleep(delays.TICK)
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", refuse)
                with pytest.raises(RuntimeError, match="new thread"):
                    await bed.work()
            second = asyncio.create_task(bed.work(2))
            await asyncio.sleep(0)
            go.set()
            await asyncio.wait_for(second, delays.LONG)

    run(main)


def test_a_lock_for_which_tasks_have_waited_goes_with_its_object() -> None:
    async def main() -> None:
        bed = Bed()
        async with held_by_another_task(bed) as go:
            waits = [asyncio.create_task(bed.work()), asyncio.create_task(wait_for_calls(bed))]
            await asyncio.sleep(0)
            go.set()
            await asyncio.wait(waits)
        kept.append(weakref.ref(native.lock_of(bed)))

    async def wait_for_calls(bed: Bed) -> None:
        async with bed:
            with suppress(LockTimeout):
                await aio.wait_for(bed, lambda: False, delays.SHORT)

    kept: list[weakref.ref[Any]] = []
    run(main)

    def gone() -> bool:
        gc.collect()
        return kept[0]() is None

    states.wait_until(gone, "nobody has it any more")


def try_once(link: procs.Link, bed: Bed) -> None:
    link.wait_for("free")

    async def main() -> None:
        link.say(await aio.acquire(bed, 0))
        bed.release()

    thread = threading.Thread(target=run, args=(main,))  # this one has its parent's loop
    thread.start()
    thread.join()


def test_in_a_forked_child_no_task_of_its_parent_waits() -> None:
    async def main() -> None:
        bed = Bed()
        async with held_by_another_task(bed) as go:
            waits = asyncio.create_task(bed.work())
            await asyncio.sleep(0)
            with procs.start(try_once, bed, method="fork") as child:
                go.set()
                await asyncio.wait_for(waits, delays.LONG)
                child.tell("free")
                child.expect(True)

    run(main)


def test_ten_thousand_waiters_need_one_thread_and_are_served_in_order() -> None:
    async def main() -> None:
        bed = Bed()
        async with held_by_another_task(bed):
            waiters = [asyncio.create_task(bed.work(number)) for number in range(10_000)]
            await asyncio.sleep(delays.TICK)
            assert len(lookouts()) == 1
        await asyncio.gather(*waiters)
        assert bed.order == list(range(10_000)) and free(bed)

    run(main)
    states.wait_until(lambda: not lookouts(), "the thread has ended")


def lookouts() -> list[str]:
    """The threads that wait for tasks; a process that uses a store has two more, for good."""
    names = {thread.name for thread in threading.enumerate()} - {"coheld leases", "coheld news"}
    return [name for name in names if name.startswith("coheld ")]


# ---- guards and state -----------------------------------------------------------------------------------------------


class Belt(Lockable):
    queue: list[int] = coheld.shared(default_factory=list)
    total: int = coheld.shared(0)

    @Lockable.locked
    async def put(self, number: int) -> None:
        self.queue.append(number)
        await asyncio.sleep(0)

    @Lockable.locked(when=lambda self: self.queue)
    async def get(self) -> int:
        await asyncio.sleep(0)
        self.total += 1
        return self.queue.pop(0)

    @Lockable.locked(when=lambda self: self.queue, timeout=delays.SHORT)
    async def get_soon(self) -> int:
        return self.queue.pop(0)

    @Lockable.locked(atomic=True)
    async def fail(self) -> None:
        self.total = -1
        self.queue.append(-1)
        await asyncio.sleep(0)
        raise ValueError("on purpose")


def put_numbers(link: procs.Link, belt: Belt, count: int) -> None:
    async def main() -> None:
        for number in range(count):
            await belt.put(number)

    asyncio.run(main())


def test_guards_over_processes() -> None:
    belt, count = Belt(), 50

    async def main() -> list[int]:
        return [await belt.get() for _ in range(count)]

    with procs.start(put_numbers, belt, count, method="fork"):
        assert asyncio.run(main()) == list(range(count)) and belt.total == count


def test_a_guard_that_stays_false_times_out_and_a_cancelled_one_leaves_no_trace() -> None:
    async def main() -> None:
        belt = Belt()
        with pytest.raises(LockTimeout):
            await belt.get_soon()
        waiter = asyncio.create_task(belt.get())
        await asyncio.sleep(delays.TICK)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        await belt.put(1)
        assert await belt.get_soon() == 1 and free(belt)

    run(main)


def test_atomic_undoes_and_an_ordinary_call_commits_once_at_its_end() -> None:
    async def main() -> None:
        belt = Belt()
        with pytest.raises(ValueError, match="on purpose"):
            await belt.fail()
        assert belt.total == 0 and belt.queue == []
        async with belt:
            belt.total += 1
            await asyncio.sleep(0)
            assert belt.total == 1
            assert await asyncio.to_thread(lambda: belt.total) == 0
            with pytest.raises(NotLockedError):
                await asyncio.to_thread(setattr, belt, "total", 5)
        assert await asyncio.to_thread(lambda: belt.total) == 1

    run(main)


def test_wait_for_gives_up_all_levels_and_takes_them_back_also_when_it_is_cancelled() -> None:
    async def main() -> None:
        belt = Belt()

        async def wait() -> int:
            async with belt, belt:
                value = await aio.wait_for(belt, lambda: belt.total)
                belt.total = 0
                return value

        first, second = asyncio.create_task(wait()), asyncio.create_task(wait())
        await asyncio.sleep(delays.TICK)
        second.cancel()
        async with belt:
            belt.total = 7
        assert await first == 7 and belt.total == 0
        with pytest.raises(asyncio.CancelledError):
            await second
        with pytest.raises(NotLockedError):
            await aio.wait_for(belt, lambda: True)
        async with belt:
            with pytest.raises(DeadlockError, match=r"aio\.wait_for"):
                coheld.wait_for(belt, lambda: True)
        assert free(belt)

    run(main)


# ---- how it looks ---------------------------------------------------------------------------------------------------


def test_it_is_a_coroutine_function_with_all_that_the_function_has() -> None:
    assert inspect.iscoroutinefunction(Bed.work) and inspect.iscoroutinefunction(Bed().work)
    assert str(inspect.signature(Bed().work)) == "(number: int = 0) -> int"
    assert Bed.work.__qualname__ == "Bed.work"


def test_aio_is_there_where_it_is_used_and_not_before() -> None:
    asked = "import sys, coheld; print('asyncio' in sys.modules, coheld.aio.acquire.__name__, 'asyncio' in sys.modules)"
    assert procs.run(asked).split() == ["False", "acquire", "True"]
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        coheld.other  # noqa: B018
