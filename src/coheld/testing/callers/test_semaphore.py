"""Permits: as many as there are, to whom has waited longest, and back from the dead."""

import asyncio
import copy
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import coheld
from coheld import IncompatibleError, Lockable, LockTimeout, PermitError, Semaphore, aio, waiting
from coheld.backends import waiters
from coheld.mutex import remove
from coheld.testing.contract.observe import CAPABILITIES, where
from coheld.testing.contract.places import all_in
from coheld.testing.support import delays, effort, procs, states

pytestmark = where("semaphores")


class Tally:
    """How many are inside, by files that tell of their makers."""

    def __init__(self, directory: Path, most: int) -> None:
        self.directory, self.most = directory, most

    @contextmanager
    def inside(self, number: int = 0) -> Iterator[None]:
        path = self.directory / f"in-{os.getpid()}-{threading.get_native_id()}-{number}"
        path.touch(exist_ok=False)
        assert self.count() <= self.most
        yield
        assert self.count() <= self.most
        path.unlink()

    def count(self) -> int:
        return sum(not states.gone(*map(int, path.name.split("-")[1:3])) for path in self.directory.glob("in-*"))


def keep(link: procs.Link, semaphore: Semaphore, count: int = 1) -> None:
    for _ in range(count):
        semaphore.acquire()
    link.say("have")
    link.wait_for("give")
    semaphore.release(count)
    link.say("gave")
    link.wait_for("end")


def queue(link: procs.Link, semaphore: Semaphore) -> None:
    semaphore.acquire()
    link.say("got")
    link.wait_for("give")
    semaphore.release()


def give(worker: Any) -> None:
    worker.tell("give")
    worker.end()


def run(main: Callable[[], Any]) -> None:
    asyncio.run(main())


# ---- take and give ---------------------------------------------------------------------------------------------------


def test_as_many_as_there_are() -> None:
    semaphore = Semaphore(3)
    assert semaphore.value == 3 and semaphore.free() == 3
    assert semaphore.acquire() and semaphore.acquire(timeout=1) and semaphore.acquire(blocking=False)
    assert not semaphore.acquire(False) and not semaphore.acquire(timeout=0) and not semaphore.acquire(timeout=-1)
    began = time.monotonic()
    assert not semaphore.acquire(timeout=delays.SHORT)
    assert time.monotonic() - began >= delays.SHORT
    assert ("0 of 3 free" if CAPABILITIES.files else "3 permits") in repr(semaphore)
    semaphore.release(2)
    assert semaphore.free() == 2 and semaphore.acquire(blocking=False)
    semaphore.release()
    semaphore.release()
    assert semaphore.free() == 3


def test_with_gives_it_back_whatever_comes() -> None:
    semaphore = Semaphore(1)
    with pytest.raises(KeyError), semaphore as same:
        assert same is semaphore and semaphore.free() == 0
        raise KeyError
    assert semaphore.free() == 1


@pytest.mark.parametrize("held", [0, 1, 2])
def test_more_given_back_than_held_is_refused_and_changes_nothing(held: int) -> None:
    semaphore = Semaphore(3)
    for _ in range(held):
        semaphore.acquire()
    with pytest.raises(PermitError, match="cannot give 3 back") as caught:
        semaphore.release(3)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, coheld.CoheldError)
    assert semaphore.free() == 3 - held
    with pytest.raises(PermitError):
        semaphore.release(2**31)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="n must be one or more"):
            semaphore.release(wrong)
    with pytest.raises(TypeError):
        semaphore.release("1")  # type: ignore[arg-type]


def test_it_is_the_process_that_holds() -> None:
    semaphore = Semaphore(2)
    thread = threading.Thread(target=semaphore.acquire)
    thread.start()
    thread.join(delays.LONG)
    semaphore.release()
    with procs.start(keep, semaphore) as other:
        other.expect("have")
        with pytest.raises(PermitError, match="holds no permit"):
            semaphore.release()
        other.tell("give")
        other.expect("gave")
        other.tell("end")


@pytest.mark.parametrize("value", [True, "1", 1.0, None])
def test_a_value_of_another_type(value: Any) -> None:
    with pytest.raises(TypeError, match="value must be a number of permits"):
        Semaphore(value)


class Three:
    def __index__(self) -> int:
        return 3


def test_a_value_may_be_whatever_is_a_whole_number() -> None:
    assert Semaphore(Three()).value == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, 10_001])
def test_a_value_out_of_bounds(value: int) -> None:
    with pytest.raises(ValueError, match="value must be 1 to 10,000 permits"):
        Semaphore(value)


def test_other_bad_arguments() -> None:
    with pytest.raises(TypeError):
        Semaphore(1, name=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lock_name"):
        Semaphore(1, name="")
    with pytest.raises(TypeError, match="backend needs a name"):
        Semaphore(1, backend="shm:")
    with pytest.raises(ValueError, match="no backend"):
        Semaphore(1, name="x", backend="moon:")
    semaphore = Semaphore(1)
    with pytest.raises(TypeError):
        semaphore.acquire(timeout="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN"):
        semaphore.acquire(timeout=float("nan"))
    assert semaphore.free() == 1


def test_without_init_it_says_so() -> None:
    class Hasty(Semaphore):
        def __init__(self) -> None:
            pass

    with pytest.raises(coheld.NotInitializedError, match="__init__ has not run"):
        Hasty().acquire()
    with pytest.raises(coheld.NotInitializedError):
        Hasty().release()
    calls = Hasty().free, lambda: Hasty().value, lambda: copy.deepcopy(Hasty()), lambda: pickle.dumps(Hasty())
    for call in calls:
        with pytest.raises(coheld.NotInitializedError):
            call()
    assert repr(Hasty()) == "<Hasty, not attached>"

    async def main() -> None:
        for timeout in (None, 0):
            with pytest.raises(coheld.NotInitializedError):
                await aio.acquire(Hasty(), timeout)

    run(main)


def test_ten_thousand_permits() -> None:
    semaphore = Semaphore(10_000)
    for _ in range(10_000):
        assert semaphore.acquire(blocking=False)
    assert not semaphore.acquire(blocking=False)
    semaphore.release(10_000)
    assert semaphore.free() == 10_000


# ---- names, pickles, copies ------------------------------------------------------------------------------------------


def test_by_name_any_process_finds_it() -> None:
    semaphore = Semaphore(2, "gpu")
    source = "import coheld; s = coheld.Semaphore(2, 'gpu'); s.acquire(); print(s.free())"
    with procs.program(f"{source}; input(); s.release(); print(s.free())") as other:
        other.expect("1")
        assert semaphore.free() == 1
        other.tell("go on")
        other.expect("2")
    assert remove("gpu")


def test_a_later_opener_with_another_value_is_refused() -> None:
    first = Semaphore(2, "gpu")
    with pytest.raises(IncompatibleError, match="2 permits, not 3"):
        Semaphore(3, "gpu")
    source = "import coheld\ntry: coheld.Semaphore(3, 'gpu')\nexcept coheld.IncompatibleError as error: print(error)"
    with procs.program(source) as other:
        assert "2 permits" in other.hear()
    with first, Semaphore(2, "gpu"):
        assert first.free() == 0


def test_a_lock_and_a_semaphore_are_not_of_one_name(coheld_dir: Path) -> None:
    semaphore, lock = Semaphore(1, "one"), Lockable(lock_name="other")
    for make, what in (
        (lambda: Lockable(lock_name="one"), "a semaphore, not a lock"),
        (lambda: Semaphore(1, "other"), "a lock, not a"),
    ):
        with pytest.raises(IncompatibleError, match=what):
            make()
    for source in ("Lockable(lock_name='one')", "Semaphore(1, 'other')"):
        program = f"import coheld\ntry: coheld.{source}\nexcept coheld.IncompatibleError: print('refused')"
        assert procs.run(program).strip() == "refused"
    with semaphore, lock:
        pass


def test_removal_waits_for_no_permit_and_takes_all_of_it(coheld_dir: Path) -> None:
    semaphore = Semaphore(2, "gpu")
    with semaphore, pytest.raises(LockTimeout, match=f"process {os.getpid()} has permits"):
        remove("gpu")
    assert remove("gpu") and not any("gpu" in name for name in all_in(coheld_dir)) and not remove("gpu")
    with semaphore:  # a new one of that name
        assert semaphore.free() == 1 and Semaphore(2, "gpu").free() == 1
    assert remove("gpu")


@pytest.mark.parametrize("method", procs.METHODS)
def test_it_travels(method: str) -> None:
    semaphore = Semaphore(2)
    with procs.start(keep, semaphore, method=method) as other:
        other.expect("have")
        assert semaphore.free() == 1
        other.tell("give")
        other.expect("gave")
        assert semaphore.free() == 2
        other.tell("end")


def test_copies() -> None:
    semaphore = Slots(2)
    semaphore.label = "there"
    loaded = pickle.loads(pickle.dumps(semaphore))
    assert loaded.label == "there" and type(loaded) is Slots and loaded.value == 2
    with loaded:
        assert semaphore.free() == 1
    assert copy.copy(semaphore) is semaphore
    other = copy.deepcopy(semaphore)
    with other:
        assert semaphore.free() == 2 and other.free() == 1


class Slots(Semaphore):
    label = "here"


class Licences(Semaphore):
    def __init__(self, product: str, *, count: int) -> None:
        super().__init__(count)
        self.product, self.users = product, [self]


def test_a_deep_copy_of_a_class_with_arguments_of_its_own_has_its_attributes() -> None:
    licences = Licences("simulator", count=3)
    with licences:
        other = copy.deepcopy(licences)
        assert type(other) is Licences and other.value == other.free() == 3
        assert other.product == "simulator" and other.users == [other]


@where("files")
def test_its_files_go_with_it(coheld_dir: Path) -> None:
    semaphore = Semaphore(2)
    with semaphore:
        assert list(coheld_dir.rglob("*.register"))
    del semaphore
    assert not list(coheld_dir.rglob("*.register"))


# ---- order, death, fork ----------------------------------------------------------------------------------------------


def test_all_who_wait_have_their_turn_one_at_a_time() -> None:
    semaphore = Semaphore(1)
    semaphore.acquire()
    with ExitStack() as running:
        workers = []
        for _ in range(5):
            workers.append(running.enter_context(procs.start(take_a_turn, semaphore)))
            workers[-1].wait_until_blocked()
        semaphore.release()
        for worker in workers:
            assert worker.result() == 0
    assert semaphore.free() == 1


def test_who_asks_again_at_once_does_not_pass_the_one_who_waits() -> None:
    semaphore = Semaphore(1)
    semaphore.acquire()
    for _ in range(effort.rounds(20)):
        with procs.start(queue, semaphore) as waiter:
            waiter.wait_until_blocked()
            semaphore.release()
            assert not semaphore.acquire(timeout=delays.SHORT)  # the waiter keeps it until it is told
            waiter.expect("got")
            give(waiter)
        assert semaphore.acquire(timeout=delays.LONG)
    semaphore.release()


def take_a_turn(link: procs.Link, semaphore: Semaphore) -> int:
    """How many permits were free meanwhile."""
    with semaphore:
        return semaphore.free()


def test_permits_of_the_dead_come_back_to_who_waits() -> None:
    semaphore = Semaphore(3)
    for _ in range(5):
        with procs.start(keep, semaphore, 3) as dead:
            dead.expect("have")
            with procs.start(queue, semaphore) as waiter:
                waiter.wait_until_blocked()
                dead.kill()
                waiter.expect("got")
                assert semaphore.acquire(blocking=False) and semaphore.acquire(blocking=False)
                semaphore.release(2)
                give(waiter)
    assert semaphore.free() == 3


def test_permits_of_the_dead_come_back_to_who_tries_once() -> None:
    semaphore = Semaphore(1)
    with procs.start(keep, semaphore) as dead:
        dead.expect("have")
        assert not semaphore.acquire(blocking=False)
        dead.kill()
    assert semaphore.acquire(blocking=False)
    semaphore.release()


def test_permits_of_the_dead_are_free_also_before_anybody_asks_for_one() -> None:
    semaphore = Semaphore(3)
    with procs.start(keep, semaphore, 2) as dead:
        dead.expect("have")
        assert semaphore.free() == 1
        dead.kill()
    assert semaphore.free() == 3


def test_a_killed_waiter_strands_nobody() -> None:
    semaphore = Semaphore(1)
    semaphore.acquire()
    with procs.start(queue, semaphore) as first:
        first.wait_until_blocked()
        with procs.start(queue, semaphore) as second:
            second.wait_until_blocked()
            first.kill()
            semaphore.release()
            second.expect("got")
            give(second)


def test_a_forked_child_holds_none() -> None:
    semaphore = Semaphore(2)
    with semaphore:
        if not (pid := os.fork()):
            with suppress(PermitError):
                semaphore.release()
                os._exit(1)
            os._exit(0 if semaphore.acquire(blocking=False) and not semaphore.acquire(blocking=False) else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert semaphore.acquire(blocking=False)
        semaphore.release()


def take_turns(link: procs.Link, semaphore: Semaphore, tally: Tally, rounds: int) -> int:
    for number in range(rounds):
        with semaphore, tally.inside(number):
            pass
    return rounds


@pytest.mark.parametrize("method", procs.METHODS)
def test_never_more_than_there_are(method: str, tmp_path: Path) -> None:
    semaphore, tally, rounds = Semaphore(2), Tally(tmp_path, 2), effort.rounds(300)
    with ExitStack() as running:
        workers = [
            running.enter_context(procs.start(take_turns, semaphore, tally, rounds, method=method)) for _ in range(4)
        ]
        threads = [threading.Thread(target=take_turns, args=(None, semaphore, tally, rounds)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(delays.LONG)
        for worker in workers:
            worker.result()
    assert semaphore.free() == 2 and tally.count() == 0


def churn(link: procs.Link, semaphore: Semaphore, tally: Tally) -> None:
    link.say("go")
    while True:
        take_turns(link, semaphore, tally, 50)


def test_processes_killed_at_any_moment_lose_no_permit(tmp_path: Path, rng: random.Random) -> None:
    semaphore, tally = Semaphore(2), Tally(tmp_path, 2)
    for _ in range(effort.rounds(30)):
        with ExitStack() as running:
            workers = [running.enter_context(procs.start(churn, semaphore, tally)) for _ in range(4)]
            for worker in workers:
                worker.expect("go")
            time.sleep(rng.random() * 0.02)
            for worker in workers:
                worker.kill()
        assert semaphore.acquire(timeout=delays.LONG) and semaphore.acquire(timeout=delays.LONG)
        assert not semaphore.acquire(blocking=False)
        semaphore.release(2)


def test_more_holders_than_the_first_page_has_room_for() -> None:
    semaphore, count = Semaphore(100), 70 if CAPABILITIES.files else 20  # a server has so many connections
    with ExitStack() as running:
        workers = [running.enter_context(procs.start(keep, semaphore)) for _ in range(count)]
        for worker in workers:
            worker.expect("have")
        assert semaphore.free() == 100 - count
        for worker in workers:
            worker.kill()
    for _ in range(100):
        assert semaphore.acquire(blocking=False)
    semaphore.release(100)


def test_a_signal_interrupts_who_waits() -> None:
    semaphore = Semaphore(1)

    def interrupt(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGUSR1, interrupt)
    tid = threading.get_native_id()
    try:
        with procs.start(keep, semaphore) as other:
            other.expect("have")

            def strike() -> None:
                states.wait_until_blocked(os.getpid(), tid)
                os.kill(os.getpid(), signal.SIGUSR1)

            thread = threading.Thread(target=strike)
            thread.start()
            with pytest.raises(InterruptedError):
                semaphore.acquire()
            thread.join(delays.LONG)
            other.kill()
        assert semaphore.acquire(timeout=delays.LONG)
        semaphore.release()
    finally:
        signal.signal(signal.SIGUSR1, before)


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_tasks_take_permits_in_their_order() -> None:
    async def main() -> None:
        semaphore, order, inside = Semaphore(3), [], [0]

        async def one(number: int) -> None:
            async with semaphore:
                inside[0] += 1
                assert inside[0] <= 3
                order.append(number)
                await asyncio.sleep(0)
                inside[0] -= 1

        await asyncio.gather(*(one(number) for number in range(200)))
        assert order == sorted(order) and semaphore.free() == 3

    run(main)


def test_without_a_task_of_asyncio_it_is_an_error_also_where_a_permit_is_free() -> None:
    semaphore = Semaphore(1)
    with pytest.raises(RuntimeError, match="task of a running asyncio loop"):
        aio.acquire(semaphore).send(None)
    assert semaphore.free() == 1


def test_a_task_waits_without_blocking_the_loop() -> None:
    async def main() -> None:
        semaphore = Semaphore(1)
        with procs.start(keep, semaphore) as other:
            await asyncio.to_thread(other.expect, "have")
            assert not await aio.acquire(semaphore, timeout=0) and not await aio.acquire(
                semaphore, timeout=delays.SHORT
            )
            waiter = asyncio.create_task(aio.acquire(semaphore))
            await asyncio.sleep(delays.SHORT)
            assert not waiter.done()
            other.kill()
            assert await waiter
        semaphore.release()
        assert semaphore.free() == 1

    run(main)


def have_the_register(link: procs.Link, semaphore: Semaphore) -> None:
    with semaphore._lock:
        link.say("have")
        link.wait_for("go on")


@contextmanager
def stopped_in_the_register(semaphore: Semaphore) -> Iterator[None]:
    """Another process, which has stopped where everybody is for moments only; in the end it goes on."""
    with procs.start(have_the_register, semaphore) as other:
        other.expect("have")
        other.stop()
        yield
        other.cont()
        other.tell("go on")
        other.end()


async def turns_meanwhile(act: Awaitable[object]) -> int:
    """How often the loop lets a task go on that sleeps for a millisecond each time, until that has come to its end."""
    task, count = asyncio.ensure_future(act), 0
    while not task.done():
        await asyncio.sleep(0.001)
        count += 1
    await task
    return count


def test_who_wants_a_permit_asks_for_nobodys_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is in a file, which would be read again by each who comes."""
    semaphore, names = Semaphore(1), list[object]()
    assert semaphore.acquire()
    thread = threading.Thread(target=semaphore.acquire)
    thread.start()
    states.wait_until(lambda: semaphore._gate_lock.attached and semaphore._gate_lock._owner(), "it waits in the gate")
    monkeypatch.setattr(waiters.Names, "tell", lambda _names, owner, _cell: names.append(owner) or owner)
    assert not semaphore.acquire(timeout=delays.TICK)
    semaphore.release()
    thread.join(delays.LONG)
    semaphore.release()
    assert not names


async def try_once(semaphore: Semaphore) -> None:
    assert not await aio.acquire(semaphore, timeout=0)


async def give_and_go_on(semaphore: Semaphore) -> None:
    await asyncio.gather(asyncio.sleep(waiting.MOMENTS), semaphore.__aexit__())


def test_the_loop_goes_on_where_one_was_stopped_in_the_register() -> None:
    async def main() -> None:
        semaphore = Semaphore(3)
        await aio.acquire(semaphore)
        with stopped_in_the_register(semaphore):
            alone = await turns_meanwhile(asyncio.sleep(waiting.MOMENTS))
            tries = await turns_meanwhile(try_once(semaphore))
            waiters = [asyncio.create_task(aio.acquire(semaphore)) for _ in range(3)]  # type: ignore[arg-type]
            waits = await turns_meanwhile(asyncio.sleep(waiting.MOMENTS))
            gives = await turns_meanwhile(give_and_go_on(semaphore))
            again = await turns_meanwhile(asyncio.sleep(waiting.MOMENTS))
            few = min(alone, again) / 8  # whoever blocks the loop leaves it one or two; others may want the processor
            assert min(tries, waits, gives) > min(few, 3), (alone, again, tries, waits, gives)
            waiters.pop(0).cancel()
            assert not any(waiter.done() for waiter in waiters)
        assert all(await asyncio.gather(*waiters))
        await asyncio.to_thread(states.wait_until, lambda: semaphore.free() == 1, "what was given is free")
        semaphore.release(2)

    run(main)


def test_a_task_that_is_cancelled_as_the_register_is_given_back_leaves_no_trace() -> None:
    async def main() -> None:
        semaphore = Semaphore(1)
        for steps in range(effort.rounds(40)):
            having, go = threading.Event(), threading.Event()

            def have(having: threading.Event = having, go: threading.Event = go) -> None:
                with semaphore._lock:
                    having.set()
                    go.wait(delays.LONG)

            thread = threading.Thread(target=have)
            thread.start()
            having.wait(delays.LONG)
            task = asyncio.create_task(aio.acquire(semaphore, delays.LONG))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            go.set()
            if steps % 2:
                thread.join(delays.LONG)
            for _ in range(steps // 2):
                await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
                semaphore.release()
            thread.join(delays.LONG)
            await asyncio.to_thread(states.wait_until, lambda: semaphore.free() == 1, "the permit is free")

    run(main)


def test_any_task_may_give_it_back() -> None:
    async def main() -> None:
        semaphore = Semaphore(1)
        await asyncio.create_task(aio.acquire(semaphore))  # type: ignore[arg-type]
        waiter = asyncio.create_task(aio.acquire(semaphore))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        semaphore.release()
        assert await waiter
        semaphore.release()

    run(main)


def test_a_cancelled_task_leaves_no_trace() -> None:
    async def main() -> None:
        for awaits in range(12):
            semaphore = Semaphore(1)
            await aio.acquire(semaphore)
            first, second = (asyncio.create_task(aio.acquire(semaphore)) for _ in range(2))  # type: ignore[arg-type]
            for _ in range(awaits):
                await asyncio.sleep(delays.TICK if awaits % 2 else 0)
            if awaits > 5:
                semaphore.release()
            first.cancel()
            got = 0
            with suppress(asyncio.CancelledError):
                got = await first
            if awaits <= 5:
                semaphore.release()
            if got:
                semaphore.release()
            assert await asyncio.wait_for(second, delays.LONG)
            semaphore.release()
            assert semaphore.free() == 1

    run(main)


def test_threads_tasks_and_processes_share_them(tmp_path: Path) -> None:
    semaphore, tally, rounds = Semaphore(2), Tally(tmp_path, 2), effort.rounds(60)

    async def one(number: int) -> None:
        for turn in range(rounds):
            async with semaphore:
                with tally.inside(1000 * (number + 1) + turn):
                    await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(4)))

    with procs.start(take_turns, semaphore, tally, rounds) as other:
        thread = threading.Thread(target=take_turns, args=(None, semaphore, tally, rounds))
        thread.start()
        run(main)
        thread.join(delays.LONG)
        other.result()
    assert semaphore.free() == 2
