"""Waits: they end in time, a signal's handler runs at once, and who was interrupted does not hold the lock."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

import pytest

from coheld import Lockable, LockTimeout, Statistics, holder, statistics
from coheld.testing.contract import killpoints
from coheld.testing.contract.observe import CAPABILITIES, give_all_back
from coheld.testing.support import delays, procs, states


class Bed(Lockable):
    """With each way to wait."""

    @Lockable.locked
    def use(self) -> None:
        pass

    @Lockable.locked(timeout=delays.LONG)
    def use_in_time(self) -> None:
        pass

    @Lockable.locked(timeout=delays.SHORT)
    def use_soon(self, notes: list[str]) -> None:
        notes.append("the body ran")

    def enter(self) -> None:
        with self:
            pass

    def take(self) -> None:
        if self.acquire():
            self.release()

    def take_in_time(self) -> None:
        if self.acquire(timeout=delays.LONG):
            self.release()


WAITS: dict[str, Callable[[Bed], None]] = {
    "acquire": Bed.take,
    "timeout": Bed.take_in_time,
    "with": Bed.enter,
    "method": Bed.use,
    "method-timeout": Bed.use_in_time,
}


class Interrupted(Exception):
    """Raised by a signal's handler."""


def interrupt(*_: object) -> None:
    raise Interrupted


def mine(obj: Lockable) -> bool:
    """Does this thread hold it?"""
    owner = holder(obj)
    return owner is not None and (owner.pid, owner.tid) == (os.getpid(), threading.get_native_id())


@contextmanager
def held_by_a_thread(obj: Lockable) -> Iterator[threading.Event]:
    """Another thread holds it, until the event is set; at the latest at the end of the block."""
    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        with obj:
            holding.set()
            release.wait(delays.HANG)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holding.wait(delays.LONG)
    try:
        yield release
    finally:
        release.set()
        thread.join(delays.LONG)


# ---- time-outs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [delays.SHORT, delays.MEDIUM], ids=["short", "longer than one sleep"])
def test_a_wait_lasts_as_long_as_it_was_told(timeout: float) -> None:
    bed = Bed()
    with held_by_a_thread(bed):
        begin = time.monotonic()
        assert bed.acquire(timeout=timeout) is False
        waited = time.monotonic() - begin
        assert timeout <= waited < timeout + delays.LONG / 10
        assert statistics(bed).waiters == 0
    assert bed.acquire(blocking=False)
    bed.release()


@pytest.mark.parametrize("timeout", [1e9, 1e300, float("inf")])
def test_a_time_that_never_comes_is_waited_for(timeout: float) -> None:
    bed = Bed()
    with held_by_a_thread(bed) as release:
        threading.Timer(delays.SHORT, release.set).start()
        assert bed.acquire(timeout=timeout) is True
        bed.release()


def test_a_method_that_waited_too_long_names_the_owner_and_has_not_run() -> None:
    bed, notes = Bed(), list[str]()
    with procs.start(hold, bed) as owner:
        owner.expect("holding")
        with pytest.raises(LockTimeout, match=f"process {owner.pid}") as caught:
            bed.use_soon(notes)
        assert caught.value.owner and caught.value.owner.pid == owner.pid
        assert caught.value.waited == delays.SHORT
        assert isinstance(caught.value, TimeoutError)
        owner.tell("release")
    assert not notes
    bed.use_soon(notes)
    assert notes


def hold(link: procs.Link, obj: Lockable) -> None:
    with obj:
        link.say("holding")
        link.wait_for("release")


def test_a_wait_ends_in_time_while_others_hand_the_lock_around() -> None:
    """It is never free for long: every look of the waiter finds another owner."""
    bed, end = Bed(), threading.Event()

    def hold_again_and_again() -> None:
        while not end.is_set():
            with bed:
                end.wait(0.001)

    threads = [threading.Thread(target=hold_again_and_again) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            begin = time.monotonic()
            if bed.acquire(timeout=delays.SHORT / 20):
                bed.release()
            assert time.monotonic() - begin < delays.LONG / 10
    finally:
        end.set()
        for thread in threads:
            thread.join(delays.LONG)
    assert statistics(bed).waiters == 0


# ---- Ctrl-C ------------------------------------------------------------------------------------------------


def wait_and_tell(link: procs.Link, bed: Bed, wait: str) -> None:
    """Wait in the main thread; say when and how the wait ended, and wait again, until it is told to end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            WAITS[wait](bed)
            ended = "served"
        except KeyboardInterrupt:
            ended = "interrupted"
        link.say((ended, time.monotonic(), mine(bed), statistics(bed).waiters))
        if ended == "served":
            return


@pytest.mark.parametrize("wait", WAITS)
def test_ctrl_c_ends_a_wait_at_once_and_the_lock_is_not_held(wait: str) -> None:
    bed, taken = Bed(), []
    bed.acquire()
    with procs.start(wait_and_tell, bed, wait) as waiter:
        for _ in range(5):
            waiter.wait_until_blocked()
            sent = time.monotonic()
            waiter.signal(signal.SIGINT)
            how, when, held, waiters = waiter.hear()
            assert (how, held, waiters) == ("interrupted", False, 0)
            assert mine(bed)
            taken.append(when - sent)
        waiter.wait_until_blocked()
        bed.release()
        assert waiter.hear()[0] == "served"
    assert median(taken) < delays.SHORT, taken
    assert holder(bed) is None


def test_ctrl_c_ends_a_wait_for_a_thread_of_the_same_process() -> None:
    def wait_for_own_thread(link: procs.Link) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        bed = Bed()
        with held_by_a_thread(bed):
            link.say("ready")
            with pytest.raises(KeyboardInterrupt):
                bed.acquire()
            assert not mine(bed)
        bed.use()

    with procs.start(wait_for_own_thread) as waiter:
        waiter.expect("ready")
        waiter.wait_until_blocked(waiter.pid)
        waiter.signal(signal.SIGINT)


def test_a_signal_that_comes_just_as_the_wait_begins_is_not_lost(rng: random.Random) -> None:
    """The kernel does not interrupt a sleep that has not begun yet: the next look must find the signal."""

    def be_interrupted(link: procs.Link, bed: Bed, seed: float) -> float:
        rng, longest = random.Random(seed), 0.0
        signal.signal(signal.SIGALRM, interrupt)
        for _ in range(400):
            begin = time.monotonic()
            with pytest.raises(Interrupted):
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 60e-6))
                bed.acquire(timeout=delays.LONG)
            longest = max(longest, time.monotonic() - begin)
            assert not mine(bed)
        return longest

    bed = Bed()
    with bed, procs.start(be_interrupted, bed, rng.random()) as waiter:
        assert waiter.result() < 2 * delays.SCALE  # sleeps are bounded by 1 s


# ---- other signals -----------------------------------------------------------------------------------------


def wait_with_handler(link: procs.Link, bed: Bed, timeout: float | None) -> None:
    """Wait, and let the handler of SIGUSR1 tell that it runs; say how the wait ended, and how long it took."""

    def handle(*_: object) -> None:
        other = Bed()
        other.use()
        link.say(("handled", time.monotonic(), bed.acquire(blocking=False), bed.acquire(timeout=0.001)))

    signal.signal(signal.SIGUSR1, handle)
    begin = time.monotonic()
    got = bed.acquire(timeout=timeout)
    link.say((got, time.monotonic() - begin))
    if got:
        bed.release()


@pytest.mark.parametrize("timeout", [None, delays.LONG])
def test_a_handler_runs_at_once_and_the_wait_goes_on(timeout: float | None) -> None:
    bed, taken = Bed(), []
    bed.acquire()
    with procs.start(wait_with_handler, bed, timeout) as waiter:
        for _ in range(5):
            waiter.wait_until_blocked()
            sent = time.monotonic()
            waiter.signal(signal.SIGUSR1)
            name, when, *tries = waiter.hear()
            assert (name, tries) == ("handled", [False, False])
            taken.append(when - sent)
        waiter.wait_until_blocked()
        assert statistics(bed).waiters == 1
        bed.release()
        assert waiter.hear()[0] is True
    assert median(taken) < delays.SHORT, taken
    assert statistics(bed).waiters == 0


def test_signals_do_not_put_the_deadline_off() -> None:
    bed, handled = Bed(), 0
    with bed, procs.start(wait_with_handler, bed, delays.MEDIUM) as waiter:
        waiter.wait_until_blocked()
        while True:
            waiter.signal(signal.SIGUSR1)
            message = waiter.hear()
            if message[0] != "handled":
                break
            handled += 1
    got, waited = message
    assert got is False
    assert handled > 1
    assert delays.MEDIUM <= waited < delays.MEDIUM + delays.LONG / 10


def test_a_handler_that_raises_ends_the_wait() -> None:
    def wait_until_interrupted(link: procs.Link, bed: Bed) -> None:
        signal.signal(signal.SIGUSR1, interrupt)
        with pytest.raises(Interrupted):
            bed.use()
        assert not mine(bed)
        link.say("interrupted")
        bed.use()

    bed = Bed()
    bed.acquire()
    with procs.start(wait_until_interrupted, bed) as waiter:
        waiter.wait_until_blocked()
        waiter.signal(signal.SIGUSR1)
        waiter.expect("interrupted")
        waiter.wait_until_blocked()
        bed.release()


def test_a_handler_of_the_main_thread_leaves_the_waits_of_others_alone() -> None:
    def wait_in_a_thread(link: procs.Link, bed: Bed) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: link.say("handled"))
        thread = threading.Thread(target=bed.use)
        thread.start()
        link.say(thread.native_id)
        link.wait_for("end")
        thread.join()

    bed = Bed()
    bed.acquire()
    with procs.start(wait_in_a_thread, bed) as waiter:
        waiter.wait_until_blocked(waiter.hear())
        waiter.signal(signal.SIGUSR1)
        waiter.expect("handled")
        assert statistics(bed).waiters == 1
        bed.release()
        waiter.tell("end")


# ---- a storm of interrupts ---------------------------------------------------------------------------------


def enter_for_ever(bed: Bed) -> None:
    while True:
        with bed:
            pass


def call_for_ever(bed: Bed) -> None:
    while True:
        bed.use()


def enter_the_lock_for_ever(bed: Bed) -> None:
    lock = bed.__lock__
    while True:
        with lock:
            pass


def survive_a_storm(link: procs.Link, bed: Bed, loop: Callable[[Bed], None], seed: float) -> int:
    """Interrupt the loop at a random point, again and again; the lock must never be left held."""
    rng, interrupts = random.Random(seed), 0
    signal.signal(signal.SIGALRM, interrupt)
    end = time.monotonic() + delays.MEDIUM
    while time.monotonic() < end:
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 50e-6))
            loop(bed)
        except Interrupted:
            interrupts += 1
        if not CAPABILITIES.uninterruptible_entry:
            give_all_back(bed)
        assert not mine(bed), f"left held by interrupt {interrupts}"
    return interrupts


@pytest.mark.parametrize("loop", [enter_for_ever, call_for_ever, enter_the_lock_for_ever])
@pytest.mark.parametrize("rival", [False, True], ids=["alone", "contended"])
def test_no_interrupt_leaves_the_lock_held(rng: random.Random, loop: Callable[[Bed], None], rival: bool) -> None:
    bed = Bed()
    with procs.start(survive_a_storm, bed, loop, rng.random()) as one:
        if rival:
            with procs.start(survive_a_storm, bed, loop, rng.random()) as other:
                assert other.result() > 100
        assert one.result() > 100
    assert holder(bed) is None
    bed.use()


# ---- an interrupt at each step -----------------------------------------------------------------------------


def try_and_give(link: procs.Link, bed: Bed) -> None:
    """As told: take it if it is free, and give it back."""
    while (word := link.hear()) != "end":
        link.say(bed.acquire(blocking=False) if word == "try" else bed.release())


@pytest.mark.parametrize("way", WAITS.values(), ids=WAITS)
def test_an_interrupt_at_any_step_lets_no_second_one_in(way: Callable[[Bed], None]) -> None:
    """At each line that Python runs; a backend in C has none, and is for the storm."""
    bed = Bed()
    bed.use()

    def one_at_a_time(line: int) -> None:
        if ask("try"):
            assert not bed.acquire(blocking=False), f"two are in, after an interrupt before line {line}"
            owner = holder(bed)
            assert owner is not None and (owner.pid, owner.depth) == (other.pid, 1)
            ask("give")
        give_all_back(bed)
        assert ask("try"), f"nobody gets it, after an interrupt before line {line}"
        ask("give")

    def ask(word: str) -> object:
        other.tell(word)
        return other.hear()

    with procs.start(try_and_give, bed) as other:
        for _ in killpoints.interrupted_at_each_line(partial(way, bed), one_at_a_time):
            pass
        other.tell("end")
    assert statistics(bed).recoveries == 0


# ---- stopped waiters ---------------------------------------------------------------------------------------


def wait_for(link: procs.Link, bed: Bed, timeout: float | None) -> None:
    got = bed.acquire(timeout=timeout)
    link.say(got)
    if got:
        bed.release()


def test_a_stopped_waiter_goes_on_where_it_was() -> None:
    bed = Bed()
    bed.acquire()
    with procs.start(wait_for, bed, None) as waiter:
        waiter.wait_until_blocked()
        waiter.stop()
        waiter.cont()
        waiter.wait_until_blocked()
        bed.release()
        waiter.expect(True)


def test_a_stopped_waiter_keeps_nobody_from_the_lock_and_gets_it_later() -> None:
    bed = Bed()
    bed.acquire()
    with procs.start(wait_for, bed, None) as waiter:
        waiter.wait_until_blocked()
        waiter.stop()
        bed.release()
        for _ in range(100):
            bed.use()
        bed.acquire()
        waiter.cont()
        waiter.wait_until_blocked()
        bed.release()
        waiter.expect(True)


def test_a_waiter_that_was_stopped_past_its_deadline_gives_up() -> None:
    bed = Bed()
    with bed, procs.start(wait_for, bed, delays.MEDIUM) as waiter:
        waiter.wait_until_blocked()
        waiter.stop()
        pause = time.monotonic() + delays.MEDIUM
        states.wait_until(lambda: time.monotonic() > pause, "its deadline is over")
        waiter.cont()
        waiter.expect(False)
    assert statistics(bed).waiters == 0


# ---- giving up leaves nothing ------------------------------------------------------------------------------


def give_up_often(link: procs.Link, bed: Bed, times: int) -> None:
    for _ in range(times):
        assert not bed.acquire(timeout=0.0005)
    link.say("gave up")


def test_who_gave_up_is_not_counted_any_more() -> None:
    bed = Bed()
    with bed:
        with procs.start(give_up_often, bed, 50) as one, procs.start(give_up_often, bed, 50) as other:
            one.expect("gave up")
            other.expect("gave up")
        assert statistics(bed).waiters == 0
    assert statistics(bed) == Statistics(acquisitions=1, contended=0, recoveries=0, waiters=0)
