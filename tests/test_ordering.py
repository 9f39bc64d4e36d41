"""COHELD_CHECK_ORDER: orders that contradict each other are found, with the places; what is right passes."""

import asyncio
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

import coheld
from coheld import Lockable, LockTimeout, Pool, Semaphore, aio, native, ordering
from coheld.testing.support import delays, procs, states

BACKENDS = ["file:"] if native.missing else ["shm:", "file:"]


class Bed(Lockable):
    @Lockable.locked
    def then(self, *others: "Lockable") -> None:
        if others:
            with others[0]:
                self.then(*others[1:])

    @Lockable.locked(timeout=0)
    def at_once(self) -> None:
        pass

    @Lockable.locked
    async def work(self, other: Lockable) -> None:
        async with other:
            await asyncio.sleep(0)


class Gpu(Bed):
    pass


@pytest.fixture(params=BACKENDS)
def named(request: pytest.FixtureRequest) -> Callable[[str], Bed]:
    return lambda name: Bed(lock_name=name, lock_backend=request.param)


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    ordering.stop()
    ordering.start()
    yield
    ordering.stop()


def found() -> list[tuple[str, ...]]:
    return [one.classes for one in ordering.inversions()]


def elsewhere(call: Callable[..., object], *args: object) -> None:
    thread = threading.Thread(target=call, args=args, name="other")
    thread.start()
    thread.join(delays.LONG)
    assert not thread.is_alive()


def kind(cls: type) -> str:
    return f"{__name__}.{cls.__qualname__}"


# ---- what is found ---------------------------------------------------------------------------------------------------


def test_two_orders_are_found_with_both_places(caplog: pytest.LogCaptureFixture) -> None:
    bed, gpu = Bed(), Gpu()

    def one_way() -> None:
        bed.then(gpu)

    def other_way() -> None:
        gpu.then(bed)

    one_way()
    assert found() == []
    with caplog.at_level(logging.WARNING, "coheld"):
        elsewhere(other_way)
    (inversion,) = ordering.inversions()
    assert set(inversion.classes) == {kind(Bed), kind(Gpu)}
    first, second = inversion.steps
    assert (first.who, second.who) == ("thread MainThread", "thread other")
    assert "one_way" in first.held_at and "one_way" in first.taken_at and "with others[0]" in first.taken_at
    assert "other_way" in second.held_at and "other_way" in second.taken_at
    assert first.held == second.taken and kind(Bed) in first.held
    assert second.held == first.taken and kind(Gpu) in second.held
    assert [record.getMessage() for record in caplog.records] == [str(inversion)]
    assert caplog.records[0].name == "coheld" and "other_way" in caplog.text
    for place in (first.held_at, first.taken_at, second.held_at, second.taken_at):
        assert place.rstrip().splitlines()[-2].startswith(f'  File "{__file__}"')  # none of coheld's own at the end


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        bed, gpu = Bed(), Gpu()
        bed.then(gpu)
        gpu.then(bed)
    assert len(found()) == 1
    assert len([one for one in caplog.records if one.name == "coheld"]) == 1


def test_names_that_differ_in_numbers_are_one_class(named: Callable[[str], Bed]) -> None:
    named("lab/bed-1").then(named("gpu-0"))
    named("gpu-7").then(named("lab/bed-23"))
    assert [set(one) for one in found()] == [{"'lab/bed-#'", "'gpu-#'"}]
    last = ordering.inversions()[0].steps[-1]
    assert (last.held, last.taken) == ("'gpu-7'", "'lab/bed-23'")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lab/bed-12", "lab/bed-#"),
        ("job-3f2a9c81d0", "job-#"),
        ("run 1b4e28ba-2fa1-11d2-883f-0016d3cca427 of 9", "run # of #"),
        ("feedface", "feedface"),  # a word
        ("facade99/defaced8", "#/#"),
        ("beds", "beds"),
    ],
)
def test_the_class_of_a_name(name: str, expected: str) -> None:
    Gpu().then(Bed(lock_name=name))
    with Bed(lock_name=name), Gpu():
        pass
    assert [set(one) for one in found()] == [{repr(expected), kind(Gpu)}]


def test_a_circle_of_three_is_found() -> None:
    a, b, c = Bed(lock_name="a"), Bed(lock_name="b"), Bed(lock_name="c")
    a.then(b)
    b.then(c)
    assert found() == []
    c.then(a)
    assert found() == [("'a'", "'b'", "'c'")]
    assert len(ordering.inversions()[0].steps) == 3


def test_within_one_class_the_locks_are_compared(named: Callable[[str], Bed]) -> None:
    beds = [named(f"bed-{number}") for number in range(3)]
    beds[0].then(beds[1], beds[2])
    beds[1].then(beds[2])
    assert found() == []
    beds[2].then(beds[0])
    assert found() == [("'bed-#'",)]


def test_without_names_too() -> None:
    beds = [Bed(), Bed(), Bed()]
    beds[0].then(beds[1], beds[2])
    Bed().then(Bed())
    assert found() == []
    beds[2].then(beds[0])
    assert found() == [(kind(Bed),)]


def test_a_named_lock_is_the_same_after_its_object_has_gone(named: Callable[[str], Bed]) -> None:
    with named("bed-1"), named("bed-2"):
        pass
    with named("bed-2"), named("bed-1"):
        pass
    assert found() == [("'bed-#'",)]


def test_locks_that_have_gone_leave_nothing() -> None:
    check = ordering._process.check
    assert check is not None
    for _ in range(50):
        Bed().then(Bed())
    assert len(check.after) <= 1 and len(check.anonymous) <= 1


def test_a_lock_taken_by_itself_is_a_lock_too() -> None:
    one, other = Bed().__lock__, Gpu().__lock__
    with one, other:
        pass
    with other, one:
        pass
    assert len(found()) == 1


def test_a_wait_with_a_time_out_counts() -> None:
    bed, gpu = Bed(), Gpu()
    with bed:
        assert gpu.acquire(timeout=delays.LONG)
        gpu.release()
    gpu.then(bed)
    assert len(found()) == 1


def test_a_lock_that_was_tried_for_is_held() -> None:
    bed, gpu = Bed(), Gpu()
    assert bed.acquire(blocking=False)
    with gpu:
        pass
    bed.release()
    gpu.then(bed)
    assert len(found()) == 1


# ---- what is right ---------------------------------------------------------------------------------------------------


def test_a_try_does_not_count() -> None:
    bed, gpu = Bed(), Gpu()
    with bed:
        assert gpu.acquire(blocking=False)
        gpu.release()
        gpu.at_once()
    gpu.then(bed)
    assert found() == []


def test_a_level_more_does_not_count() -> None:
    bed, gpu = Bed(), Gpu()
    with bed, gpu, bed:
        pass
    assert found() == []


def test_what_was_given_back_is_not_held() -> None:
    bed, gpu = Bed(), Gpu()
    bed.then()
    gpu.then(bed)
    bed.acquire()
    gpu.acquire(blocking=False)
    bed.release()  # not in the order in which they were taken
    bed.acquire(blocking=False)
    gpu.release()
    bed.release()
    assert found() == []
    bed.then()
    gpu.then()
    assert found() == []


def test_another_threads_are_not_ours() -> None:
    bed, gpu = Bed(), Gpu()
    bed.then(gpu)
    with gpu:
        elsewhere(bed.then)
    assert found() == []


def test_what_is_waited_for_is_not_held() -> None:
    bed, gpu = Bed(), Gpu()
    gpu.then(bed)  # so the other way round would be found

    class Waiting(Bed):
        ready = False

        @Lockable.locked(when=lambda self: self.look())
        def guarded(self) -> None:
            pass

        def look(self) -> bool:
            return self.ready

    waiting = Waiting()
    thread = threading.Thread(target=waiting.guarded)
    thread.start()
    states.wait_until(lambda: coheld.statistics(waiting).acquisitions, "it waits for its guard")
    with waiting:
        waiting.ready = True
    thread.join(delays.LONG)
    with bed, pytest.raises(LockTimeout):
        coheld.wait_for(bed, lambda: False, timeout=delays.SHORT)
    assert found() == []


def test_who_waits_takes_it_again_after_what_it_holds() -> None:
    bed, gpu, opened = Bed(), Gpu(), []

    def open_it() -> None:
        with bed:
            opened.append(True)

    thread = threading.Thread(target=open_it)
    with bed, gpu:
        thread.start()
        coheld.wait_for(bed, lambda: opened)  # without bed, with gpu: and then bed
    thread.join(delays.LONG)
    assert len(found()) == 1


def test_semaphores_are_left_out_and_pools_are_no_trouble() -> None:
    bed, permits, pool = Bed(), Semaphore(1), Pool(["a", "b"])
    with bed, permits, pool.lease(), pool.lease():
        pass
    with permits, bed:
        pass
    with pool.lease(), bed:
        pass
    assert found() == []


def test_a_thread_that_ended_with_it_holds_nothing() -> None:
    bed, gpu = Bed(), Gpu()
    elsewhere(bed.acquire)
    assert bed.acquire(timeout=delays.LONG)
    bed.release()
    bed.then(gpu)
    with gpu:
        pass
    assert found() == []


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_tasks_hold_their_own() -> None:
    bed, gpu = Bed(), Gpu()

    async def main() -> None:
        await bed.work(gpu)
        assert found() == []
        async with gpu:
            await asyncio.create_task(other())
            assert found() == []
            await aio.acquire(bed)
            bed.release()

    async def other() -> None:
        async with bed:
            pass

    asyncio.run(main())
    (inversion,) = ordering.inversions()
    assert all(step.who.startswith("task Task-") for step in inversion.steps)
    assert "in work" in inversion.steps[0].taken_at and "in main" in inversion.steps[1].taken_at


def test_a_task_waits_with_what_its_thread_holds() -> None:
    bed, gpu = Bed(), Gpu()

    async def main() -> None:
        async with gpu:
            pass

    with bed:
        asyncio.run(main())
    gpu.then(bed)
    assert len(found()) == 1


def test_tasks_that_take_turns_are_not_mixed_up() -> None:
    bed, gpu = Bed(), Gpu()

    async def alone(one: Bed) -> None:
        for _ in range(20):
            async with one:
                await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(alone(one) for one in (bed, gpu) * 3))

    asyncio.run(main())
    assert found() == []


# ---- processes -------------------------------------------------------------------------------------------------------


def in_child(link: procs.Link, bed: Bed, gpu: Gpu) -> int:
    """Its parent holds gpu, and it does not."""
    bed.then()
    assert found() == []
    Gpu().then(Bed())
    return len(found())


def test_a_forked_child_goes_on_with_what_is_known_and_holds_nothing() -> None:
    bed, gpu = Bed(), Gpu()
    bed.then(gpu)
    with gpu, procs.start(in_child, bed, gpu, method="fork") as child:
        assert child.result() == 1
    assert found() == []


SWITCHED = """
import coheld, sys
a, b = coheld.Lockable(lock_name="a"), coheld.Lockable(lock_name="b")
with a, b: pass
with b, a: pass
print("coheld.ordering" in sys.modules)
"""


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_it_is_switched_on_by_the_environment(value: str | None, on: bool) -> None:
    env = {name: text for name, text in os.environ.items() if name != "COHELD_CHECK_ORDER"}
    env |= {} if value is None else {"COHELD_CHECK_ORDER": value}
    printed = procs.run(SWITCHED, env=env, stderr=subprocess.STDOUT).splitlines()
    assert printed[-1] == str(on)
    assert ("'a', 'b' are taken in orders that contradict each other" in printed[0]) == on


# ---- what it keeps ---------------------------------------------------------------------------------------------------


def test_of_ever_new_names_and_pairs_only_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordering, "_MOST", 50)
    check = ordering._process.check
    assert check is not None
    outer, letters = Bed(lock_name="outer"), "abcdefghijklmnopqrst"
    for number in range(300):
        word = f"x{letters[number % 20]}{letters[number // 20]}"
        bed, gpu = Bed(lock_name=f"{word}-{number}"), Gpu(lock_name=f"{word}-{number + 1}")
        outer.then(bed, gpu)
        if number > 100:
            assert len(check.named) <= 50 and len(check.edges) <= 50
            assert sum(len(after) for after in list(check.after.values())) <= 50
    assert not found()
    gpu.then(outer)
    assert len(found()) == 1, "the last are still known"


def test_pairs_of_locks_that_are_gone_forget_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordering, "_MOST", 50)
    first, second = Bed(lock_name="first"), Gpu(lock_name="second")
    first.then(second)
    for _ in range(300):
        Bed().then(Bed())
    second.then(first)
    assert len(found()) == 1
