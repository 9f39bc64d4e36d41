"""Threads of one process: one caller at a time, re-entry, and what only the owner may do."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from ctypes import c_uint64
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from coheld import Lockable, NotOwnerError, holder, statistics
from coheld.testing.contract.observe import CAPABILITIES
from coheld.testing.support import delays, procs, states
from coheld.testing.support.exclusion import Exclusion


class Device(Lockable):
    """Its calls are watched by two detectors of overlap."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.exclusion = Exclusion(directory)

    @Lockable.locked
    def use(self, worker: int) -> None:
        with self.exclusion.inside(worker):
            pass

    @Lockable.locked
    def use_through(self, worker: int, levels: int) -> None:
        if levels:
            self.use_through(worker, levels - 1)
        else:
            self.use(worker)

    @Lockable.locked
    def run(self, body: Callable[[], object]) -> object:
        return body()


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def at_once(count: int, work: Callable[[int], object]) -> list[Any]:
    """Run work(0) … work(count - 1), each in a thread of its own that begins with the others."""
    begin = threading.Barrier(count)

    def run(number: int) -> object:
        begin.wait(delays.LONG)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return [one.result(delays.LONG) for one in [pool.submit(run, number) for number in range(count)]]


def elsewhere(work: Callable[[], Any]) -> Any:
    """What work() returns or raises in another thread."""
    return at_once(1, lambda _: work())[0]


def can_be_had(obj: Lockable) -> bool:
    """Try it once, and give it back."""
    if not obj.acquire(blocking=False):
        return False
    obj.release()
    return True


@contextmanager
def waiting(obj: Lockable, count: int = 1) -> Iterator[list[int]]:
    """So many threads that sleep for the lock. The list gets the number of each that is served; at the end all are."""
    served: list[int] = []

    def wait_for_it() -> None:
        with obj:
            served.append(threading.get_native_id())

    threads = [threading.Thread(target=wait_for_it) for _ in range(count)]
    for thread in threads:
        thread.start()
        assert thread.native_id
        states.wait_until_blocked(os.getpid(), thread.native_id)
    yield served
    for thread in threads:
        thread.join(delays.LONG)
    assert sorted(served) == sorted(thread.native_id or 0 for thread in threads)


# ---- one at a time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("levels", [0, 3])
def test_calls_of_threads_never_overlap(device: Device, threads: int, levels: int) -> None:
    def use_often(number: int) -> None:
        for _ in range(800 // threads):
            device.use_through(number, levels)

    at_once(threads, use_often)
    device.exclusion.check(calls=800)
    assert statistics(device).acquisitions == 800
    assert holder(device) is None


def test_try_once_does_not_wait_for_another_thread(device: Device) -> None:
    with device:
        assert elsewhere(lambda: device.acquire(blocking=False)) is False
        assert elsewhere(lambda: device.acquire(timeout=0)) is False
    assert elsewhere(lambda: can_be_had(device))


def test_a_waiting_thread_is_served_at_the_release(device: Device) -> None:
    device.acquire()
    with waiting(device) as served:
        assert not served
        assert statistics(device).waiters == 1
        device.release()
    assert statistics(device).waiters == 0
    assert statistics(device).contended == 1


def test_all_waiting_threads_are_served(device: Device) -> None:
    device.acquire()
    with waiting(device, 8):
        if not CAPABILITIES.wakes_without_polling:  # who looks again and again is on record but now and then
            states.wait_until(lambda: statistics(device).waiters == 8, "all are on record")
        else:
            assert statistics(device).waiters == 8
        device.release()
    assert statistics(device).waiters == 0
    assert holder(device) is None


def test_an_exception_of_the_body_gives_the_lock_to_who_waits(device: Device) -> None:
    with ExitStack() as stack, pytest.raises(LookupError, match="of the body"):

        def fail_while_one_waits() -> None:
            stack.enter_context(waiting(device))
            raise LookupError("of the body")

        device.run(fail_while_one_waits)
    assert holder(device) is None


# ---- re-entry ----------------------------------------------------------------------------------------------


def test_the_owner_may_take_it_again_and_gives_it_back_as_often(device: Device) -> None:
    for depth in (1, 2, 3):
        assert device.acquire()
        assert (found := holder(device)) and found.depth == depth
    for _ in range(3):
        assert not elsewhere(lambda: can_be_had(device))
        device.release()
    assert holder(device) is None
    assert elsewhere(lambda: can_be_had(device))


def test_every_way_in_is_one_lock(device: Device) -> None:
    with device, device.__lock__:
        device.acquire()
        device.use(0)
        assert not elsewhere(lambda: can_be_had(device))
        device.release()
    device.exclusion.check(calls=1)
    assert holder(device) is None


def test_a_level_taken_without_waiting_counts_as_any_other(device: Device) -> None:
    assert device.acquire(blocking=False) and device.acquire(timeout=0) and device.acquire(timeout=delays.SHORT)
    device.release()
    device.release()
    assert not elsewhere(lambda: can_be_had(device))
    device.release()
    assert holder(device) is None


# ---- the owner's right -------------------------------------------------------------------------------------


def test_another_thread_cannot_release_and_is_told_who_can(device: Device) -> None:
    device.acquire()
    with pytest.raises(NotOwnerError) as caught:
        elsewhere(device.release)
    owner = caught.value.owner
    assert owner and (owner.pid, owner.tid) == (os.getpid(), threading.get_native_id())
    assert str(os.getpid()) in str(caught.value)
    assert isinstance(caught.value, AssertionError) and isinstance(caught.value, RuntimeError)
    assert holder(device) == owner
    device.release()


def test_a_free_lock_cannot_be_released(device: Device) -> None:
    with pytest.raises(NotOwnerError, match="nobody holds it") as caught:
        device.release()
    assert caught.value.owner is None


def test_a_release_too_many_changes_nothing(device: Device) -> None:
    with device:
        pass
    with pytest.raises(NotOwnerError):
        device.release()
    with device:
        assert not elsewhere(lambda: can_be_had(device))
    assert elsewhere(lambda: can_be_had(device))


def test_one_who_waits_cannot_release_either(device: Device) -> None:
    device.acquire()
    with waiting(device):
        with pytest.raises(NotOwnerError):
            elsewhere(device.release)
        device.release()


def test_the_holder_is_named_with_thread_and_method(device: Device) -> None:
    class Watched(Lockable):
        @Lockable.locked
        def look(self) -> object:
            return holder(self)

    tid, owner = elsewhere(lambda: (threading.get_native_id(), Watched().look()))
    assert (owner.pid, owner.tid, owner.depth) == (os.getpid(), tid, 1)
    assert owner.method.endswith("Watched.look")
    states.wait_until(lambda: not owner.alive(), "its thread is known to have ended")
    assert time.monotonic() - delays.LONG < owner.since <= time.monotonic()


# ---- the GIL -----------------------------------------------------------------------------------------------


def call_beside_burners(link: procs.Link, obj: Lockable, served: Any, rounds: int, burners: int) -> None:
    """A process whose other threads burn the processor, so that a woken thread has to queue for the GIL."""
    done = threading.Event()

    def burn() -> None:
        while not done.is_set():
            sum(range(200))

    threads = [threading.Thread(target=burn) for _ in range(burners)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(rounds):
            link.wait_for("wait")
            with obj:
                served.value += 1
    finally:
        done.set()
        for thread in threads:
            thread.join()


def longest_busy_stretch(obj: Lockable, served: Any, before: int) -> float:
    """Try until the other one has been served; the longest time, s, for which the lock could not be had."""
    longest, last = 0.0, time.monotonic()
    deadline = last + delays.LONG
    while served.value == before:
        if obj.acquire(blocking=False):
            obj.release()
            last = time.monotonic()
        longest = max(longest, time.monotonic() - last)
        assert last < deadline, "the waiter was never served"
        time.sleep(0)
    return longest


def test_a_woken_thread_does_not_own_the_lock_while_it_queues_for_the_gil() -> None:
    """A thread that were given the lock first would keep it for some switch intervals of 5 ms in each round: it does so
    for each of the two or three questions that it asks of a store meanwhile, where that has to be asked."""
    asks = CAPABILITIES.leases and not CAPABILITIES.cohorts
    obj, served, rounds = Lockable(), multiprocessing.RawValue(c_uint64), 15
    stretches = []
    with procs.start(call_beside_burners, obj, served, rounds, 2) as child:
        for before in range(rounds):
            obj.acquire()
            child.tell("wait")
            child.wait_until_blocked(child.pid)
            obj.release()
            stretches.append(longest_busy_stretch(obj, served, before))
    assert median(stretches) < (0.06 if asks else 0.002) * delays.SCALE, stretches


def test_a_thread_that_waits_leaves_the_gil_to_the_others(device: Device) -> None:
    device.acquire()
    with waiting(device, 2):
        others = at_once(4, lambda number: sum(range(number * 1000)))
        device.release()
    assert others == [sum(range(number * 1000)) for number in range(4)]
