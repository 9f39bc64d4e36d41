"""Leases of any free resource that fits: to the request that has waited longest, and back from the dead."""

import asyncio
import copy
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import coheld
from coheld import IncompatibleError, Lockable, LockTimeout, PermitError, Pool, shared
from coheld.mutex import remove
from coheld.testing.contract.observe import CAPABILITIES, where
from coheld.testing.support import delays, effort, procs, states
from coheld.testing.support.exclusion import Exclusion

pytestmark = where("semaphores")


@dataclass
class Device:
    name: str
    os: str = "iosxe"


def devices() -> list[Device]:
    return [Device("r1"), Device("r2"), Device("x1", "iosxr")]


class Bench(Lockable):
    """A resource that is known by its lock."""


class Color(Enum):
    RED = 1


def take(link: procs.Link, pool: Pool[Any], *wanted: str) -> None:
    """A lease, kept until told; of those named, if any are."""
    fits = (lambda one: getattr(one, "name", one) in wanted) if wanted else None
    with pool.lease(where=fits) as resource:
        link.say(getattr(resource, "name", resource))
        link.wait_for("give")


def give(worker: Any) -> None:
    worker.tell("give")
    worker.end()


def run(main: Callable[[], Any]) -> None:
    asyncio.run(main())


# ---- one process -----------------------------------------------------------------------------------------------------


def test_each_lease_is_of_another_resource() -> None:
    pool = Pool(devices())
    with pool.lease() as one, pool.lease() as two, pool.lease() as three:
        assert {one.name, two.name, three.name} == {"r1", "r2", "x1"} and pool.free() == [] and len(pool) == 3
        assert ("0 of 3 free" if CAPABILITIES.files else "3 resources") in repr(pool)
        with pytest.raises(LockTimeout, match=f"with process {os.getpid()}"), pool.lease(timeout=0):
            raise AssertionError
    assert len(pool.free()) == 3


def test_where_says_which_and_is_asked_once_for_each() -> None:
    pool, asked = Pool(devices()), []

    def fits(device: Device) -> bool:
        asked.append(device.name)
        return device.os == "iosxr"

    with pool.lease(where=fits) as device:
        assert device.name == "x1"
        with pytest.raises(LockTimeout), pool.lease(timeout=delays.SHORT, where=fits):
            raise AssertionError
        with pool.lease(timeout=0, where=lambda one: one.os == "iosxe"):
            pass
    assert asked == ["r1", "r2", "x1"] * 2


def test_an_exception_gives_it_back() -> None:
    pool = Pool(["a"])
    with pytest.raises(KeyError), pool.lease():
        raise KeyError
    with pytest.raises(ZeroDivisionError):
        pool.lease(where=lambda _: 1 / 0)
    assert pool.free() == ["a"]


def test_bad_arguments() -> None:
    pool = Pool(["a"])
    with pytest.raises(TypeError):
        pool.lease(timeout="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN"):
        pool.lease(timeout=float("nan"))
    with pytest.raises(TypeError, match="where must be a function"):
        pool.lease(where="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="where fits none of the 1"):
        pool.lease(where=lambda _: False)
    with pytest.raises(TypeError, match="at least one"):
        Pool([])
    with pytest.raises(TypeError, match="as a list"):
        Pool("gpu-0")
    with pytest.raises(ValueError, match="two resources of a pool are named"):
        Pool(["a", "a"])
    with pytest.raises(TypeError, match="what names"):
        Pool([object()])
    with pytest.raises(ValueError, match="lock_name"):
        Pool(["a"], name="")
    assert pool.free() == ["a"]


def test_without_init_it_says_so() -> None:
    class Hasty(Pool[str]):
        def __init__(self) -> None:
            pass

    for call in (Hasty().lease, Hasty().free, lambda: len(Hasty())):
        with pytest.raises(coheld.NotInitializedError, match="Hasty: Pool"):
            call()
    assert repr(Hasty()) == "<Hasty, not attached>"


def test_a_lease_is_for_one_use() -> None:
    pool = Pool(["a"])
    lease = pool.lease()
    with lease:
        pass
    with pytest.raises(RuntimeError, match="for one use"):
        lease.__enter__()
    with pytest.raises(PermitError):
        lease.__exit__()


def test_what_names_a_resource() -> None:
    named, anonymous = Bench(lock_name="bench"), Bench()
    resources = [named, anonymous, Device("r1"), "text", 5, b"bytes", Path("/dev/null"), Color.RED, UUID(int=1)]
    pool = Pool(resources)
    again = Pool([pickle.loads(pickle.dumps(one)) for one in reversed(resources)], name="again")
    assert set(pool._resources) == set(again._resources)
    assert remove("again") and remove("bench")


# ---- several ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", procs.METHODS)
def test_it_travels(method: str) -> None:
    pool = Pool(devices())
    with procs.start(take, pool, "r2", method=method) as other:
        other.expect("r2")
        assert [one.name for one in pool.free()] == ["r1", "x1"]
        give(other)
    assert len(pool.free()) == 3


def test_by_name_each_brings_its_own_objects_in_any_order() -> None:
    pool = Pool(devices(), name="lab")
    source = (
        "from coheld import Pool\n"
        "class D:\n  def __init__(self, name): self.name = name\n"
        "pool = Pool([D('x1'), D('r3'), D('r1')], name='lab')\n"
        "with pool.lease(where=lambda d: d.name == 'r1') as d, pool.lease(where=lambda d: d.name == 'r3'):\n"
        "    print(d.name); input()\n"
    )
    with procs.program(source) as other:
        other.expect("r1")
        assert [one.name for one in pool.free()] == ["r2", "x1"]
        other.tell("go on")
    assert len(pool.free()) == 3 and remove("lab")


def test_a_pool_of_which_a_living_process_has_a_lease_is_not_removed() -> None:
    pool = Pool(devices(), "lab")
    with procs.start(take, pool, "r1") as lessee:
        lessee.expect("r1")
        with pytest.raises(LockTimeout, match=f"process {lessee.pid} has .*leases"):
            remove("lab", timeout=0)
        with pytest.raises(LockTimeout):
            pool.lease(timeout=0, where=lambda one: one.name == "r1").__enter__()
        lessee.kill()
    assert remove("lab")


def test_what_has_that_name_and_is_no_pool_is_refused() -> None:
    class Thing(Lockable):
        count: int = shared(0)

    thing = Thing(lock_name="lab")
    with thing:
        thing.count = 1
    with pytest.raises(IncompatibleError), Pool(["a"], name="lab").lease():
        raise AssertionError
    assert remove("lab")


def test_the_longest_waiting_request_that_fits_goes_first() -> None:
    pool = Pool(devices())
    with ExitStack() as running:
        keepers = {name: running.enter_context(procs.start(take, pool, name)) for name in ("r1", "r2", "x1")}
        for name, keeper in keepers.items():
            keeper.expect(name)
        first = running.enter_context(procs.start(take, pool, "r1", "r2"))
        _until_queued(pool, 1)
        second = running.enter_context(procs.start(take, pool))
        _until_queued(pool, 2)
        third = running.enter_context(procs.start(take, pool, "r1"))
        _until_queued(pool, 3)
        give(keepers["x1"])
        second.expect("x1")  # the first does not want it
        give(keepers["r1"])
        first.expect("r1")
        give(first)
        third.expect("r1")
        for worker in (second, third, keepers["r2"]):
            give(worker)
    assert len(pool.free()) == 3


def _until_queued(pool: Pool[Any], count: int) -> None:
    states.wait_until(lambda: len(coheld.snapshot(pool._ledger).queue) == count, f"{count} wait")


def test_leases_of_the_dead_come_back_to_who_waits() -> None:
    pool = Pool(["a", "b"])
    for _ in range(5):
        with procs.start(take, pool, "a") as dead:
            dead.expect("a")
            with procs.start(take, pool, "a") as waiter:
                _until_queued(pool, 1)
                dead.kill()
                waiter.expect("a")
                give(waiter)
    with procs.start(take, pool, "a") as dead:
        dead.expect("a")
        dead.kill()
    assert pool.free() == ["a", "b"]
    with pool.lease(timeout=0, where=lambda one: one == "a"):
        pass


def test_a_killed_waiter_strands_nobody() -> None:
    pool = Pool(["a"])
    with ExitStack() as running:
        with pool.lease():
            first = running.enter_context(procs.start(take, pool))
            _until_queued(pool, 1)
            second = running.enter_context(procs.start(take, pool))
            _until_queued(pool, 2)
            first.kill()
        second.expect("a")
        give(second)
    assert pool.free() == ["a"]


def test_a_forked_child_has_no_lease() -> None:
    pool = Pool(["a"])
    lease = pool.lease()
    with lease:
        if not (pid := os.fork()):
            with suppress(PermitError):
                lease.__exit__()
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert pool.free() == []


def use(link: procs.Link, pool: Pool[Any], exclusions: dict[str, Exclusion], rounds: int, worker: int) -> int:
    for _ in range(rounds):
        with pool.lease() as resource, exclusions[resource].inside(worker):
            pass
    return rounds


@pytest.mark.parametrize("method", procs.METHODS)
def test_no_resource_is_ever_two_processes(method: str, tmp_path: Path) -> None:
    exclusions = {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        exclusions[name] = Exclusion(tmp_path / name)
    pool, rounds = Pool(list(exclusions)), effort.rounds(60)
    with ExitStack() as running:
        workers = [
            running.enter_context(procs.start(use, pool, exclusions, rounds, number, method=method))
            for number in range(3)
        ]
        use(procs.Link, pool, exclusions, rounds, 3)  # type: ignore[arg-type]
        for worker in workers:
            worker.result()
    assert sum(one.made for one in exclusions.values()) == 4 * rounds and len(pool.free()) == 2


def churn(link: procs.Link, pool: Pool[Any], exclusions: dict[str, Exclusion], worker: int) -> None:
    link.say("go")
    while True:
        use(link, pool, exclusions, 50, worker)


def test_processes_killed_at_any_moment_lose_no_resource(tmp_path: Path, rng: random.Random) -> None:
    exclusions = {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        exclusions[name] = Exclusion(tmp_path / name)
    pool = Pool(list(exclusions))
    for _ in range(effort.rounds(20)):
        with ExitStack() as running:
            workers = [running.enter_context(procs.start(churn, pool, exclusions, number)) for number in range(3)]
            for worker in workers:
                worker.expect("go")
            time.sleep(rng.random() * 0.05)
            for worker in workers:
                worker.kill()
        with pool.lease(timeout=delays.LONG), pool.lease(timeout=delays.LONG):
            assert pool.free() == []
    assert len(pool.free()) == 2 and not coheld.snapshot(pool._ledger).queue


def test_a_signal_interrupts_who_waits_and_nothing_is_left() -> None:
    pool = Pool(["a"])

    def interrupt(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pool.lease():

            def strike() -> None:
                _until_queued(pool, 1)
                os.kill(os.getpid(), signal.SIGUSR1)

            thread = threading.Thread(target=strike)
            thread.start()
            with pytest.raises(InterruptedError), pool.lease():
                raise AssertionError
            thread.join(delays.LONG)
            assert not coheld.snapshot(pool._ledger).queue
        assert pool.free() == ["a"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_copies_share_it() -> None:
    pool = Pool(["a"])
    with copy.copy(pool).lease():
        assert pool.free() == []


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_tasks_lease_in_their_order() -> None:
    async def main() -> None:
        pool, order, out = Pool(["a", "b"]), [], set()

        async def one(number: int) -> None:
            async with pool.lease() as resource:
                assert resource not in out
                out.add(resource)
                order.append(number)
                await asyncio.sleep(0)
                out.remove(resource)

        await asyncio.gather(*(one(number) for number in range(60)))
        assert len(order) == 60 and len(pool.free()) == 2 and not coheld.snapshot(pool._ledger).queue

    run(main)


def test_a_task_waits_for_the_death_of_another_process() -> None:
    async def main() -> None:
        pool = Pool(["a"])
        with procs.start(take, pool) as other:
            await asyncio.to_thread(other.expect, "a")
            with pytest.raises(LockTimeout):
                async with pool.lease(timeout=delays.SHORT):
                    raise AssertionError
            waiter = asyncio.create_task(_leased(pool))
            await asyncio.to_thread(_until_queued, pool, 1)
            other.kill()
            assert await waiter == "a"

    run(main)


async def _leased(pool: Pool[Any]) -> Any:
    async with pool.lease() as resource:
        return resource


def test_a_cancelled_task_leaves_no_trace() -> None:
    async def main() -> None:
        for awaits in range(14):
            pool = Pool(["a"])
            holder = pool.lease()
            await holder.__aenter__()
            first, second = asyncio.create_task(_leased(pool)), asyncio.create_task(_leased(pool))
            for _ in range(awaits):
                await asyncio.sleep(delays.TICK if awaits % 2 else 0)
            if awaits > 6:
                await holder.__aexit__()
            first.cancel()
            with suppress(asyncio.CancelledError):
                await first
            if awaits <= 6:
                await holder.__aexit__()
            assert await asyncio.wait_for(second, delays.LONG) == "a"
            assert pool.free() == ["a"] and not coheld.snapshot(pool._ledger).queue

    run(main)


def test_who_is_cancelled_while_it_gives_back_has_given_back() -> None:
    async def main() -> None:
        pool = Pool(["a"])
        inside, go = asyncio.Event(), asyncio.Event()

        async def one() -> None:
            async with pool.lease():
                inside.set()
                await go.wait()

        task = asyncio.create_task(one())
        await inside.wait()
        async with pool._ledger:
            go.set()
            for _ in range(5):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(delays.TICK)
            assert not task.done()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.free() == ["a"]

    run(main)
