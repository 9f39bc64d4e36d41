"""Hand-off: who waits is served in turn, and who has given up, been stopped or killed costs nothing."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import NamedTuple

import pytest

from coheld import Lockable, holder, statistics
from coheld.testing.contract.observe import CAPABILITIES
from coheld.testing.support import delays, procs, states

RUN = delays.MEDIUM  # how long they compete


class Device(Lockable):
    """Somebody uses it for a while."""

    @Lockable.locked
    def use(self, seconds: float) -> float:
        """When the body began."""
        began = time.monotonic()
        if seconds:
            time.sleep(seconds)
        return began


class Report(NamedTuple):
    """What one competitor got."""

    calls: int
    longest: float  # wait, s


def compete(device: Device, seconds: float, end: float) -> Report:
    """Use it and ask again at once."""
    calls, longest = 0, 0.0
    while (asked := time.monotonic()) < end:
        longest = max(longest, device.use(seconds) - asked)
        calls += 1
    return Report(calls, longest)


def compete_in_threads(link: procs.Link, device: Device, seconds: float, threads: int) -> list[Report]:
    link.say("ready")
    end = link.hear()
    with ThreadPoolExecutor(threads) as pool:
        return [one.result() for one in [pool.submit(compete, device, seconds, end) for _ in range(threads)]]


def competition(processes: int, threads: int, seconds: float, device: Device) -> list[Report]:
    """What each thread of each process got when all compete."""
    with ExitStack() as stack:
        start = [procs.start(compete_in_threads, device, seconds, threads) for _ in range(processes)]
        workers = [stack.enter_context(one) for one in start]
        for worker in workers:
            worker.expect("ready")
        end = time.monotonic() + RUN
        for worker in workers:
            worker.tell(end)
        return [report for worker in workers for report in worker.result()]


@pytest.mark.parametrize(
    ("processes", "threads", "seconds"),
    [(2, 1, 0.001), (8, 1, 0.002), (1, 2, 0.001), (1, 8, 0.002), (3, 3, 0.002), (2, 1, 0.01), (4, 1, 0.0003)],
)
def test_all_who_ask_again_at_once_get_their_share(processes: int, threads: int, seconds: float) -> None:
    """Without hand-off one of them keeps the lock for about a second at a time."""
    runs = [competition(processes, threads, seconds, Device()) for _ in range(3)]
    fair = [sum(report.calls for report in run) / len(run) for run in runs]
    shares = [min(report.calls for report in run) / share for run, share in zip(runs, fair, strict=True)]
    waits = [max(report.longest for report in run) for run in runs]
    assert median(shares) > 0.0, runs
    if CAPABILITIES.handoff_bound is not None:
        assert median(shares) > 0.5, runs
        assert median(waits) < CAPABILITIES.handoff_bound * delays.SCALE, runs


def test_a_long_queue_keeps_its_order() -> None:
    """Also where a turn takes longer to come than a waiter sleeps before it looks at the owner."""
    device, end = Device(), time.monotonic() + 4 * RUN
    with ThreadPoolExecutor(6) as pool:
        reports = [one.result() for one in [pool.submit(compete, device, 0.06, end) for _ in range(6)]]
    calls = [report.calls for report in reports]
    assert min(calls) > 0, reports
    if CAPABILITIES.handoff_bound is not None:
        assert max(report.longest for report in reports) < 0.75 * delays.SCALE, reports  # a round takes 0.36
        assert max(calls) - min(calls) <= 2, reports


def test_who_waits_is_served_in_the_order_of_coming() -> None:
    device, order = Device(), list[int]()
    device.acquire()
    with ExitStack() as stack:
        for number in range(4):
            stack.enter_context(noting_waiter(device, order, number))
        device.release()
    assert sorted(order) == [0, 1, 2, 3]
    assert order == [0, 1, 2, 3] or CAPABILITIES.handoff_bound is None


@contextmanager
def noting_waiter(device: Device, order: list[int], number: int) -> Iterator[None]:
    """A thread that sleeps for the lock, and notes its number when it has it."""

    def take() -> None:
        with device:
            order.append(number)

    thread = threading.Thread(target=take)
    thread.start()
    states.wait_until_blocked(os.getpid(), thread.native_id)
    yield
    thread.join(delays.LONG)


# ---- waiters that do not take what they are handed ---------------------------------------------------------


def wait(link: procs.Link, device: Device, timeout: float | None = None) -> None:
    """Wait once, and say how it ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        got = device.acquire(timeout=timeout)
    except KeyboardInterrupt:
        got = False
    link.say(got)
    if got:
        device.release()


def be_killed(waiter: procs.Worker) -> None:
    waiter.kill()


def stand_still(waiter: procs.Worker) -> None:
    waiter.stop()


def give_up(waiter: procs.Worker) -> None:
    waiter.expect(False)


def be_interrupted(waiter: procs.Worker) -> None:
    waiter.signal(signal.SIGINT)
    waiter.expect(False)


LEAVE: dict[str, Callable[[procs.Worker], None]] = {
    "killed": be_killed,
    "stopped": stand_still,
    "timed-out": give_up,
    "interrupted": be_interrupted,
}


@contextmanager
def waiters_that_leave(device: Device, leave: Callable[[procs.Worker], None], count: int = 3) -> Iterator[None]:
    """Some have waited for long behind this thread, and do not any more; it has given its lock back since."""
    timeout = delays.MEDIUM if leave is give_up else None
    device.acquire()
    with ExitStack() as stack:
        waiters = [stack.enter_context(procs.start(wait, device, timeout)) for _ in range(count)]
        for waiter in waiters:
            waiter.wait_until_blocked()
        for waiter in waiters:
            leave(waiter)
        device.release()
        yield
        for waiter in waiters:
            if leave is stand_still:
                waiter.cont()
                waiter.expect(True)


def time_of_a_call(device: Device, calls: int) -> float:
    """The usual time, s, of one of so many calls without a body."""
    taken = []
    for _ in range(calls):
        begin = time.monotonic()
        device.use(0)
        taken.append(time.monotonic() - begin)
    return median(taken)


FULL_SPEED = 0.001 * delays.SCALE  # s; letting the dead pass would cost 5 ms and more, each time


@pytest.mark.parametrize("leave", LEAVE)
def test_calls_return_to_full_speed(leave: str) -> None:
    device = Device()
    with waiters_that_leave(device, LEAVE[leave]):
        time_of_a_call(device, 3)
        assert time_of_a_call(device, 50) < FULL_SPEED
    assert time_of_a_call(device, 50) < FULL_SPEED
    assert statistics(device).waiters == 0


@pytest.mark.parametrize("leave", LEAVE)
def test_others_who_wait_are_served_all_the_same(leave: str) -> None:
    """They came before and after the ones who do not take it."""
    device = Device()
    device.acquire()
    with procs.start(wait, device) as first:
        first.wait_until_blocked()
        with waiters_that_leave(device, LEAVE[leave]), procs.start(wait, device) as last:
            last.wait_until_blocked()
            device.release()
            first.expect(True)
            last.expect(True)
    assert holder(device) is None


@pytest.mark.parametrize("leave", LEAVE)
def test_competitors_are_served_all_the_same(leave: str) -> None:
    device = Device()
    with waiters_that_leave(device, LEAVE[leave]):
        reports = competition(2, 1, 0.001, device)
    calls = [report.calls for report in reports]
    assert min(calls) > (sum(calls) / 4 if CAPABILITIES.handoff_bound is not None else 0), reports
    assert sum(calls) > RUN / 0.02, reports  # one in 20 ms: standing back for the dead each time were slower


def test_full_speed_after_the_holder_and_all_who_wait_were_killed() -> None:
    device = Device()
    with procs.start(hold, device) as owner, ExitStack() as stack:
        owner.expect("holding")
        waiters = [stack.enter_context(procs.start(wait, device)) for _ in range(4)]
        for waiter in waiters:
            waiter.wait_until_blocked()
        for worker in [*waiters, owner]:
            worker.kill()
    assert device.acquire(timeout=delays.LONG)
    device.release()
    time_of_a_call(device, 3)
    assert time_of_a_call(device, 50) < FULL_SPEED
    assert (statistics(device).waiters, statistics(device).recoveries) == (0, 1)


def hold(link: procs.Link, device: Device) -> None:
    with device:
        link.say("holding")
        link.wait_for("never")
