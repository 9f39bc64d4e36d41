"""Who holds is named, to other processes as well, without that anybody waits: the thread, the task."""

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import coheld
from coheld import Lockable, Owner, aio
from coheld.backends import files, waiters
from coheld.process import start_of
from coheld.testing.contract.observe import CAPABILITIES
from coheld.testing.support import delays, procs


class Bed(Lockable):
    @Lockable.locked
    def keep(self, link: procs.Link) -> None:
        link.say("kept")
        link.wait_for("end")

    @Lockable.locked
    async def keep_in_task(self, link: procs.Link) -> None:
        link.say("kept")
        await asyncio.to_thread(link.wait_for, "end")

    @Lockable.locked
    async def work(self) -> None:
        await asyncio.sleep(0)


def bed(number: int = 1) -> Bed:
    return Bed(lock_name=f"bed-{number}")


def shown() -> Owner:
    """As resources() has it, which is what holder() has."""
    owner = coheld.holder(bed())
    [resource] = [one for one in coheld.resources() if one.name == "bed-1"]
    assert owner is not None and resource.holder is not None and resource.waiters == 0
    assert (resource.holder.thread, resource.holder.task) == (owner.thread, owner.task)
    return owner


def seen(play: Callable[..., object], *args: Any) -> Owner:
    """Its owner, while another process plays that."""
    with procs.start(play, *args) as worker:
        assert worker.hear() == "kept"
        owner = shown()
        worker.tell("end")
        worker.result()
    return owner


def by_thread(link: procs.Link) -> None:
    thread = threading.Thread(target=lambda: bed().keep(link), name="a thread with a name that is long")
    thread.start()
    thread.join(delays.LONG)


def test_the_thread_of_another_process_is_named() -> None:
    owner = seen(by_thread)
    assert owner.thread == "a thread with a name that is long" and not owner.task
    assert f"thread {owner.thread} in Bed.keep for" in str(owner)


def by_main_thread(link: procs.Link) -> None:
    bed().keep(link)


def test_so_is_its_main_thread() -> None:
    assert seen(by_main_thread).thread == "MainThread"


async def call(link: procs.Link) -> None:
    await bed().keep_in_task(link)


async def async_with(link: procs.Link) -> None:
    async with bed():
        link.say("kept")
        await asyncio.to_thread(link.wait_for, "end")


async def with_(link: procs.Link) -> None:
    with bed():
        link.say("kept")
        await asyncio.to_thread(link.wait_for, "end")


async def after_a_wait(link: procs.Link) -> None:
    """A thread of coheld takes it in the task's stead."""
    async with bed():
        task = asyncio.create_task(call(link), name="booking")
        await asyncio.sleep(delays.TICK)
    await task


async def while_others_work(link: procs.Link) -> None:
    """They have locks of their own, and this one before and after."""
    await bed().work()
    beds = [bed(number) for number in range(2, 60)]
    task = asyncio.create_task(call(link), name="booking")
    await asyncio.sleep(0)
    for number, one in enumerate(beds):
        await asyncio.create_task(one.work(), name=f"other {number}")
    await task


WAYS = [call, async_with, with_, after_a_wait, while_others_work]


def by_task(link: procs.Link, way: Callable[[procs.Link], Any]) -> None:
    async def main() -> None:
        await asyncio.create_task(way(link), name="booking")

    asyncio.run(main())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_task_of_another_process_is_named(way: Any) -> None:
    owner = seen(by_task, way)
    assert (owner.task, owner.thread) == ("booking", "MainThread")
    assert "thread MainThread, task booking" in str(owner)


def by_one_after_another(link: procs.Link) -> None:
    async def main() -> None:
        one = bed()
        for number in range(3):
            await asyncio.create_task(one.work(), name=f"task {number}")
        await asyncio.create_task(one.keep_in_task(link), name="the last")

    asyncio.run(main())


def test_the_task_is_the_one_that_has_it_now() -> None:
    assert seen(by_one_after_another).task == "the last"


def by_a_forked_child(link: procs.Link) -> None:
    """Its parent has been known by another name, and has had tasks."""
    asyncio.run(bed().work())
    threading.current_thread().name = "child"
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        by_task(link, call)
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_has_names_of_its_own() -> None:
    owner = seen(by_a_forked_child)
    assert (owner.thread, owner.task) == ("child", "booking")


def test_who_has_ended_leaves_his_slot_to_others() -> None:
    one = bed()
    table = getattr(waiters.place(""), "table", None)

    def use() -> None:
        assert one.acquire()
        one.release()

    async def use_many() -> None:
        for _ in range(3 * waiters._CHUNK):
            await Bed().work()

    for turn in range(3 * waiters._CHUNK):
        thread = threading.Thread(target=use, name=f"thread {turn}")
        thread.start()
        thread.join(delays.LONG)
    assert not any(name.startswith("thread") for _, _, name in slots())
    before = table.promised
    asyncio.run(use_many())
    assert before <= 2 * waiters._CHUNK and table.promised <= before + waiters._CHUNK and table.seats <= 1


class Nosy(asyncio.Task[None]):
    """Looks at the table as its name is asked for."""

    seen: list[tuple[int, int, str]]

    def get_name(self) -> str:
        self.seen = slots()
        return super().get_name()


def slots() -> list[tuple[int, int, str]]:
    """Of this process, those with a name: task, thread and that."""
    of_mine = files.lock_directory(), os.getpid(), start_of(os.getpid()) or 0
    return [(slot[4], slot[5], waiters._text(slot[-1])) for slot in waiters._names_in(*of_mine)]


def test_a_seat_is_nobodys_while_it_changes_hands() -> None:
    async def main() -> None:
        one = bed()
        await asyncio.create_task(one.work(), name="the last")
        nosy = Nosy(one.work(), loop=asyncio.get_running_loop())
        await nosy
        me = (0, threading.get_native_id(), "MainThread")
        seen = nosy.seen
        waits = {(id(nosy), threading.get_native_id(), nosy.get_name())}  # for a thread, that asks the store
        expected = {me} if CAPABILITIES.files else {me, *waits}
        assert (0, 0, "the last") in seen and {slot for slot in seen if slot[0] or slot[1]} <= expected

    asyncio.run(main())


@pytest.mark.parametrize("lost", ["no seat", "a damaged table", "no table"])
def test_without_a_name_it_is_a_number(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiters, "_SEATS", 0 if lost == "no seat" else waiters._SEATS)
    with procs.start(by_task, call) as worker:
        assert worker.hear() == "kept"
        for table in Path(files.lock_directory()).glob(f"waits-{worker.pid}-*"):
            if lost == "a damaged table":
                table.write_bytes(os.urandom(1 << 16))
            elif lost == "no table":
                table.unlink()
        owner = shown()
        assert owner.task_id and not owner.task and f"task {owner.task_id:#x} in Bed.keep_in_task for" in str(owner)
        worker.tell("end")
        worker.result()


def test_a_task_takes_it_after_its_file_was_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        one = bed()
        await one.work()
        os.unlink(one.__lock__.segment.path)
        one.__lock__.watch()
        async with one:
            [resource] = [found for found in coheld.resources() if found.holder]
            assert resource.holder is not None
            assert resource.holder.task == asyncio.current_task().get_name()  # type: ignore[union-attr]
            assert await aio.acquire(one)
            one.release()

    asyncio.run(main())


def test_a_task_that_takes_it_during_the_look_does_not_give_its_name_to_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = Owner(1, 1, 1, "", 0.0, 1, 0xABC)

    async def main() -> None:
        one = bed()
        async with one:
            with monkeypatch.context() as patched:
                patched.setattr(type(one.__lock__), "_owner", lambda _lock: before)
                owner = coheld.holder(one)
            assert owner == before and not owner.task

    asyncio.run(main())


SEVERAL = [lambda: coheld.Semaphore(2), lambda: coheld.Pool(["a", "b"])]


@pytest.mark.parametrize("make", SEVERAL, ids=["semaphore", "pool"])
@pytest.mark.parametrize("ask", [coheld.holder, coheld.statistics, coheld.waiters], ids=lambda ask: ask.__name__)
def test_what_several_hold_has_no_holder(ask: Any, make: Any) -> None:
    several = make()
    with pytest.raises(TypeError, match=rf"{type(several).__name__} is held by .* free\(\) .* coheld.resources\(\)"):
        ask(several)
