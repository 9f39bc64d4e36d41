"""Rules of the native mutex that reach below the public surface: the words of a cell, looked at and forged.

A word is forged only to make a state that a death at the wrong moment leaves behind, or a number used again.
"""

import ctypes
import gc
import mmap
import os
import pickle
import platform
import shutil
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from coheld import Lockable, NotOwnerError, Owner, _native, holder, statistics
from coheld.backends import files, shm
from coheld.testing.support import delays, procs, states

WAITERS, OWNER_DIED, TID = 0x80000000, 0x40000000, 0x3FFFFFFF
SLICE = 1.0  # s, the longest sleep of a waiter
SYS_SET_ROBUST_LIST = {"x86_64": 273, "aarch64": 99}
FUTEX_WAIT_BITSET = 9  # without a flag: shared by processes, and absolute on the monotonic clock


class Bed(Lockable):
    """Notes whose death its __recover__ was told of."""

    def __init__(self, lock_name: str | None = None) -> None:
        super().__init__(lock_name=lock_name)
        self.recovered: list[Owner] = []

    def __recover__(self, dead: Owner) -> None:
        self.recovered.append(dead)


class Words:
    """The words of a lock's cell, through a mapping of our own."""

    def __init__(self, obj: Lockable) -> None:
        lock = obj.__lock__
        with open(lock.segment.path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), lock.offset + _native.CELL_SIZE)
        cell = memoryview(self._map)[lock.offset :]
        self._narrow, self._wide = cell.cast("I"), cell.cast("Q")

    @property
    def word(self) -> int:
        return self._narrow[0]

    @word.setter
    def word(self, value: int) -> None:
        self._narrow[0] = value

    @property
    def levels(self) -> int:
        return self._narrow[1]

    @levels.setter
    def levels(self, value: int) -> None:
        self._narrow[1] = value

    @property
    def handoff(self) -> int:
        return self._narrow[10]

    @handoff.setter
    def handoff(self, value: int) -> None:
        self._narrow[10] = value

    @property
    def flags(self) -> int:
        return self._narrow[11]

    @property
    def waiters(self) -> int:
        return self._wide[6] & 0xFFFFFFFF

    @property
    def epoch(self) -> int:
        return self._wide[6] >> 32

    def begin_epoch(self) -> None:
        self._wide[6] = self.epoch + 1 << 32

    @property
    def waiting_since(self) -> int:
        return self._wide[16]

    @waiting_since.setter
    def waiting_since(self, value: int) -> None:
        self._wide[16] = value

    @property
    def nonce(self) -> int:
        return self._wide[8]

    @property
    def depth(self) -> int:
        return self._narrow[23]

    @depth.setter
    def depth(self, value: int) -> None:
        self._narrow[23] = value


def hold(link: procs.Link, obj: Lockable) -> None:
    with obj:
        link.say("holding")
        link.wait_for("release")


def wait(link: procs.Link, obj: Lockable, timeout: float | None = None) -> None:
    """Wait for it once; say so when it is had, and keep it until told."""
    got = obj.acquire(timeout=timeout)
    link.say(got)
    if got:
        link.wait_for("release")
        obj.release()


@contextmanager
def waiting_thread(obj: Lockable, timeout: float | None = None) -> Iterator[Future[bool]]:
    """A thread that sleeps for the lock, and gives it back as soon as it has it."""

    def take() -> bool:
        got = obj.acquire(timeout=timeout)
        if got:
            obj.release()
        return got

    with ThreadPoolExecutor(1) as pool:
        tid = pool.submit(threading.get_native_id).result()
        result = pool.submit(take)
        states.wait_until_blocked(os.getpid(), tid)
        yield result


def pause(seconds: float) -> None:
    """Let so much time pass, where time is what the rule is about."""
    end = time.monotonic() + seconds
    states.wait_until(lambda: time.monotonic() >= end, "time passes")


# ---- the lock word -----------------------------------------------------------------------------------------


def test_the_word_says_who_holds_it_and_that_somebody_waits() -> None:
    obj = Lockable()
    words, tid = Words(obj), threading.get_native_id()
    assert words.word == 0
    obj.acquire()
    assert words.word == tid and words.depth == 1
    obj.acquire()
    assert words.word == tid and words.depth == 2
    obj.release()
    with waiting_thread(obj):
        assert words.word == tid | WAITERS
        assert words.waiters == 1
        obj.release()
    assert (words.word & TID, words.depth, words.waiters) == (0, 0, 0)


def test_the_kernel_marks_a_death_in_the_word() -> None:
    bed = Bed()
    words = Words(bed)
    with procs.start(hold, bed) as owner:
        owner.expect("holding")
        owner.kill()
    assert words.word == OWNER_DIED
    assert words.depth == 1  # a body was running
    assert bed.__lock__.acquire(blocking=False)
    assert words.word == threading.get_native_id()
    assert words.flags & _native.RECOVERING
    bed.release()
    with bed:
        assert not words.flags & _native.RECOVERING
    assert words.word == 0


@pytest.mark.parametrize("forgotten", [False, True])
def test_whoever_takes_the_lock_keeps_the_bit_for_those_who_sleep_behind_it(forgotten: bool) -> None:
    """The unlock that woke one has consumed it; without it the next unlock would wake nobody.

    Forgotten: a new epoch began just before both went to sleep.  One who has slept does not trust the count.
    """
    obj = Lockable()
    words = Words(obj)
    obj.acquire()
    with procs.start(wait, obj) as first, procs.start(wait, obj) as second:
        first.wait_until_blocked()
        second.wait_until_blocked()
        if forgotten:
            words.begin_epoch()
        obj.release()
        waiters = {states.wait_until(lambda: (found := holder(obj)) and found.pid, "one has it")}
        assert words.word & WAITERS
        one, other = (first, second) if first.pid in waiters else (second, first)
        one.expect(True)
        one.tell("release")
        other.expect(True)
        other.tell("release")
    assert words.waiters == 0


def test_who_takes_it_without_waiting_keeps_the_bit_as_well() -> None:
    obj = Lockable()
    words = Words(obj)
    obj.acquire()
    with procs.start(wait, obj) as waiter:
        waiter.wait_until_blocked()
        waiter.stop()
        obj.release()
        assert obj.acquire(blocking=False)
        assert words.word == threading.get_native_id() | WAITERS
        waiter.cont()
        waiter.wait_until_blocked()
        obj.release()
        waiter.expect(True)
        waiter.tell("release")


def test_a_level_too_many_is_an_error_and_changes_nothing() -> None:
    """pthread counts them in a word of 32 bits."""
    obj = Lockable()
    words = Words(obj)
    with obj:
        words.levels = 2**32 - 1
        for attempt in (obj.acquire, obj.__enter__, lambda: obj.acquire(blocking=False)):
            with pytest.raises(OverflowError, match="too many times"):
                attempt()
        assert (words.levels, words.depth) == (2**32 - 1, 1)
        words.levels = 1
    assert holder(obj) is None


# ---- no sleep without an end -------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, delays.HANG])
def test_a_wait_sleeps_on_the_monotonic_clock_and_never_without_an_end(timeout: float | None) -> None:
    obj = Lockable()
    obj.acquire()
    with procs.start(wait, obj, timeout) as waiter:
        waiter.wait_until_blocked()
        call = Path(f"/proc/{waiter.pid}/syscall").read_text().split()
        assert int(call[2], 16) == FUTEX_WAIT_BITSET
        assert int(call[4], 16), "there is no time-out"
        obj.release()
        waiter.expect(True)
        waiter.tell("release")


@contextmanager
def unlocker_killed_before_its_wake(obj: Lockable) -> Iterator[procs.Worker]:
    """A waiter that sleeps on a lock that is free: the owner died after it had freed the word.

    The waiter has looked at the owner before, so that its sleep is one of the long ones.
    """
    words = Words(obj)
    with procs.start(hold, obj) as owner, ExitStack() as stack:
        owner.expect("holding")
        waiter = stack.enter_context(procs.start(wait, obj))
        waiter.wait_until_blocked()
        pause(0.3)
        waiter.wait_until_blocked()
        words.depth = 0
        words.word = 0
        owner.kill()
        assert words.word == 0, "the kernel has seen that the word is not the dead one's"
        assert states.blocked_in_futex(waiter.pid)
        yield waiter
        waiter.tell("release")


def test_a_waiter_asleep_on_a_free_lock_finds_out_by_itself() -> None:
    obj = Lockable()
    with unlocker_killed_before_its_wake(obj) as waiter:
        begin = time.monotonic()
        waiter.expect(True)
        assert time.monotonic() - begin < (SLICE + 1) * delays.SCALE
    assert statistics(obj).recoveries == 0


def test_a_waiter_asleep_on_a_free_lock_is_woken_by_the_next_owner() -> None:
    """Whoever takes the lock sees that somebody is enrolled, and so its release wakes."""
    obj, taken = Lockable(), []
    for _ in range(3):
        with unlocker_killed_before_its_wake(obj) as waiter:
            assert obj.acquire(blocking=False)
            begin = time.monotonic()
            obj.release()
            waiter.expect(True)
            taken.append(time.monotonic() - begin)
    assert sorted(taken)[1] < 2 * delays.SHORT, taken


def test_a_waiter_asleep_on_a_free_lock_is_woken_by_one_who_lets_it_pass_in_vain() -> None:
    """Whoever begins a new epoch forgets it, and so its release would wake nobody."""
    obj, taken = Lockable(), []
    for _ in range(3):
        with unlocker_killed_before_its_wake(obj) as waiter:
            Words(obj).handoff = 1
            begin = time.monotonic()
            if obj.acquire(timeout=delays.SHORT):  # else the waiter was faster
                obj.release()
            waiter.expect(True)
            taken.append(time.monotonic() - begin)
    assert sorted(taken)[1] < 4 * delays.SHORT, taken


# ---- deaths that the kernel does not mark ------------------------------------------------------------------


def ended_process() -> int:
    """A process number that nobody has any more."""
    done = subprocess.Popen(["true"])
    done.wait()
    return done.pid


def take_in_a_thread(bed: Bed) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(bed.acquire).result()
        pool.submit(bed.release).result()


def test_a_number_of_mine_in_the_word_is_not_enough_to_own_it() -> None:
    """An earlier thread of my number died, and nobody marked it."""
    bed = Bed()
    take_in_a_thread(bed)
    words = Words(bed)
    words.depth, words.word = 1, threading.get_native_id()
    with pytest.raises(NotOwnerError):
        bed.release()
    words.depth, words.word = 1, threading.get_native_id()
    with bed:
        assert (owner := holder(bed)) and owner.depth == 1
    assert len(bed.recovered) == statistics(bed).recoveries == 1
    assert holder(bed) is None


@pytest.mark.parametrize("bits", [0, WAITERS], ids=["", "waiters"])
def test_a_waiter_finds_an_owner_that_is_gone(bits: int) -> None:
    bed = Bed()
    take_in_a_thread(bed)
    words = Words(bed)
    words.depth, words.word = 1, ended_process() | bits
    assert not bed.acquire(blocking=False)
    begin = time.monotonic()
    assert bed.acquire(timeout=delays.LONG)
    assert 0.1 < time.monotonic() - begin < (SLICE + 1) * delays.SCALE
    bed.release()
    assert len(bed.recovered) == statistics(bed).recoveries == 1


def hold_unseen(link: procs.Link, obj: Lockable) -> None:
    """Hold it, and hide that from the kernel, as where the out-of-memory reaper was quicker: its list is empty."""
    obj.acquire()
    head = (ctypes.c_size_t * 3)()
    head[0] = ctypes.addressof(head)
    assert not ctypes.CDLL(None).syscall(SYS_SET_ROBUST_LIST[platform.machine()], head, ctypes.sizeof(head))
    link.say("holding")
    link.wait_for("never")


@pytest.mark.parametrize("reaped", [True, False])
def test_a_waiter_finds_an_owner_whose_death_the_kernel_did_not_see(reaped: bool) -> None:
    """Also one that nobody has waited for: its parent may be the waiter, as here."""
    bed = Bed()
    with procs.start(hold_unseen, bed) as owner:
        owner.expect("holding")
        if reaped:
            owner.kill()
        else:
            owner.signal(signal.SIGKILL)
            states.wait_until(lambda: (task := states.task(owner.pid)) and task.state == "Z", "it is a zombie")
        assert Words(bed).word == owner.pid
        assert bed.acquire(timeout=delays.LONG)
        bed.release()
        owner.kill()
    assert [dead.pid for dead in bed.recovered] == [owner.pid]


def test_a_waiter_leaves_an_owner_alone_that_lives() -> None:
    bed = Bed()
    with procs.start(hold, bed) as owner:
        owner.expect("holding")
        assert not bed.acquire(timeout=delays.MEDIUM)
        owner.tell("release")
    assert statistics(bed).recoveries == 0


def had_while_its_number_was_given_away(bed: Bed, number: int) -> bool | None:
    """Wait for a lock whose word names a process that was not there yet; meanwhile one of that number begins.

    Was the lock had?  None: that process is none of ours, and may have begun before the wait.
    """
    take_in_a_thread(bed)
    words = Words(bed)
    with ThreadPoolExecutor(1) as pool, ExitStack() as children:
        tid = pool.submit(threading.get_native_id).result()
        words.depth, words.word = 1, number
        result = pool.submit(bed.acquire, timeout=(SLICE + 1) * delays.SCALE)
        states.wait_until(lambda: result.done() or states.blocked_in_futex(os.getpid(), tid), "it waits")
        pause(0.05)  # starts are counted in ticks of 1/100 s
        begun = (children.enter_context(idle_child()) for _ in range(300))
        reached = next((pid for pid in begun if pid >= number), None)
        if got := result.result():
            pool.submit(bed.release).result()
    return got if reached == number else None


def test_a_waiter_finds_that_the_owners_number_has_been_given_to_another() -> None:
    """The one who has it now began after the wait did: it is not the owner."""
    for _ in range(20):
        bed = Bed()
        if (got := had_while_its_number_was_given_away(bed, ended_process() + 40)) is not None:
            assert got
            assert len(bed.recovered) == 1
            return
    raise AssertionError("the number was never given to a child of ours, but each time to another process")


@contextmanager
def idle_child() -> Iterator[int]:
    """A process that does nothing, and its number."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    try:
        yield pid
    finally:
        os.close(writing)
        os.waitpid(pid, 0)


def test_one_who_died_before_its_name_was_written_is_not_taken_for_the_owner_before(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The record is still that of this thread, which lives and has given the lock back."""
    bed = Bed()
    with bed:
        pass
    words = Words(bed)
    assert words.depth == 0
    words.word = OWNER_DIED
    with bed:
        assert statistics(bed).recoveries == 1
    assert os.getpid() not in [dead.pid for dead in bed.recovered]
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"process {os.getpid()}" not in line


# ---- a file that outlives a reboot -------------------------------------------------------------------------


def copy_over_a_reboot(name: str, old: Path, new: Path) -> None:
    """Copy a lock's file as it is now; to who opens the copy it was made before the last boot."""
    shutil.copyfile(old / files.file_name(name), new / files.file_name(name))
    os.chmod(new / files.file_name(name), 0o600)
    before = replace(shm.header_here(files.NAMED, name), boot=b"of an earlier boot".ljust(36, b"\0"))
    with open(new / files.file_name(name), "r+b") as file:
        file.write(before.pack())


@pytest.fixture
def disk(tmp_path: Path, coheld_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to reboot with the lock "bed" as it is: its file is on a disk."""

    def reboot() -> None:
        copy_over_a_reboot("bed", coheld_dir, tmp_path)
        monkeypatch.setenv("COHELD_DIR", str(tmp_path))

    return reboot


@pytest.mark.parametrize("waits", [False, True], ids=["nobody-waits", "one-waits"])
def test_a_lock_that_was_held_at_a_reboot_is_an_owners_death(disk: Callable[[], None], waits: bool) -> None:
    old = Bed("bed")
    with procs.start(hold, old) as owner, ExitStack() as stack:
        owner.expect("holding")
        if waits:
            waiter = stack.enter_context(procs.start(wait, old))
            waiter.wait_until_blocked()
        disk()
        bed = Bed("bed")
        words = Words(bed)
        assert (words.word & OWNER_DIED, words.waiters, words.handoff) == (OWNER_DIED, 0, 0)
        assert bed.acquire(blocking=False)
        bed.release()
        assert [dead.pid for dead in bed.recovered] == [owner.pid]
        assert (found := holder(old)) and found.pid == owner.pid  # another boot's lock is another lock
        owner.tell("release")
        if waits:
            waiter.expect(True)
            waiter.tell("release")
    assert statistics(bed).recoveries == 1


def test_a_lock_that_was_free_at_a_reboot_is_free(disk: Callable[[], None]) -> None:
    with Bed("bed"):
        pass
    disk()
    bed = Bed("bed")
    assert bed.acquire(blocking=False)
    bed.release()
    assert not bed.recovered and statistics(bed).recoveries == 0


def open_and_take(link: procs.Link) -> list[int]:
    link.say("ready")
    link.wait_for("go")
    bed = Bed("bed")
    for _ in range(50):
        with bed:
            pass
    return [dead.pid for dead in bed.recovered]


def test_of_many_who_open_it_after_a_reboot_one_recovers(disk: Callable[[], None]) -> None:
    old = Bed("bed")
    with procs.start(hold, old) as owner:
        owner.expect("holding")
        disk()
        with ExitStack() as stack:
            workers = [stack.enter_context(procs.start(open_and_take)) for _ in range(6)]
            for worker in workers:
                worker.expect("ready")
            for worker in workers:
                worker.tell("go")
            assert [pid for worker in workers for pid in worker.result()] == [owner.pid]
        owner.tell("release")
    assert statistics(Bed("bed")).acquisitions == 6 * 50 + statistics(old).acquisitions


# ---- hand-off ----------------------------------------------------------------------------------------------


def calls_until_settled(obj: Lockable, words: Words) -> int:
    """How many calls it takes until nobody is counted as waiting, and nobody is to be let pass."""
    for calls in range(1, 100):
        with obj:
            pass
        if not words.waiters and not words.handoff:
            return calls
    raise AssertionError("the dead one is still counted")


@contextmanager
def waiter_enrolled_for_long(obj: Lockable) -> Iterator[procs.Worker]:
    """Another process waits for longer than a hand-off takes to begin; the lock is held here, and free at the end."""
    obj.acquire()
    with procs.start(wait, obj) as waiter:
        waiter.wait_until_blocked()
        pause(delays.TICK)
        yield waiter
    assert holder(obj) is None


def test_a_release_after_a_long_wait_offers_the_lock() -> None:
    obj = Lockable()
    words = Words(obj)
    with waiter_enrolled_for_long(obj) as waiter:
        assert words.waiting_since
        waiter.stop()
        obj.release()
        assert words.handoff == 1
        waiter.cont()
        waiter.expect(True)
        assert words.handoff == 0  # cleared by who has it now
        assert words.waiting_since == 0
        waiter.tell("release")


def test_a_killed_waiter_costs_a_few_calls_and_is_forgotten() -> None:
    obj = Lockable()
    words = Words(obj)
    with waiter_enrolled_for_long(obj) as waiter:
        waiter.kill()
        assert words.waiters == 1
        epoch = words.epoch
        obj.release()
        assert calls_until_settled(obj, words) <= 3
        assert words.epoch == epoch + 1
    for _ in range(100):
        with obj:
            assert (words.handoff, words.waiters) == (0, 0)
    assert words.epoch == epoch + 1


def test_many_killed_waiters_cost_no_more_than_one() -> None:
    obj = Lockable()
    words = Words(obj)
    obj.acquire()
    with ExitStack() as stack:
        waiters = [stack.enter_context(procs.start(wait, obj)) for _ in range(5)]
        for waiter in waiters:
            waiter.wait_until_blocked()
        pause(delays.TICK)
        for waiter in waiters:
            waiter.kill()
        assert words.waiters == 5
        obj.release()
        assert calls_until_settled(obj, words) <= 3


def test_a_stopped_waiter_is_forgotten_and_enrols_again() -> None:
    obj = Lockable()
    words = Words(obj)
    with waiter_enrolled_for_long(obj) as waiter:
        waiter.stop()
        epoch = words.epoch
        obj.release()
        assert calls_until_settled(obj, words) <= 3
        assert words.epoch == epoch + 1
        obj.acquire()
        waiter.cont()
        states.wait_until(lambda: words.waiters == 1, "it has enrolled in the new epoch")
        waiter.wait_until_blocked()
        obj.release()
        waiter.expect(True)
        waiter.tell("release")
    assert words.waiters == 0


def test_who_gives_up_takes_itself_off() -> None:
    obj = Lockable()
    words = Words(obj)
    with obj, procs.start(wait, obj, delays.MEDIUM) as waiter:
        waiter.wait_until_blocked()
        assert words.waiters == 1
        waiter.expect(False)
        assert words.waiters == 0
    assert calls_until_settled(obj, words) <= 3


def test_who_is_interrupted_takes_itself_off() -> None:
    def be_interrupted(link: procs.Link, obj: Lockable) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            obj.acquire()
        link.say("interrupted")

    obj = Lockable()
    words = Words(obj)
    with obj, procs.start(be_interrupted, obj) as waiter:
        waiter.wait_until_blocked()
        assert words.waiters == 1
        waiter.signal(signal.SIGINT)
        waiter.expect("interrupted")
        assert words.waiters == 0


def call_beside_a_burner(link: procs.Link, obj: Lockable, end: float) -> None:
    """Ask again and again, while another thread wants the GIL all the time."""
    done = threading.Event()

    def burn() -> None:
        while not done.is_set():
            sum(range(200))

    thread = threading.Thread(target=burn)
    thread.start()
    while time.monotonic() < end:
        with obj:
            pass
    done.set()
    thread.join()


def call_without_a_pause(link: procs.Link, obj: Lockable, end: float) -> None:
    """Hold it for 1 ms, computing, and ask again at once."""
    while time.monotonic() < end:
        with obj:
            until = time.monotonic() + 0.001
            while time.monotonic() < until:
                pass


def test_a_waiter_that_has_to_queue_for_the_gil_is_not_taken_for_dead() -> None:
    """It is woken in time, but gets the GIL only after a switch interval of 5 ms. A newcomer that lets it pass for no
    longer than that forgets it each time, and keeps the lock for seconds. A busy machine may keep it from running for
    as long, so one good round of several is enough: without the rule there is none."""
    assert any(forgotten_waits_of_a_round() < 0.25 for _ in range(6))


def forgotten_waits_of_a_round() -> float:
    """Which part of the waits ended with a new epoch."""
    obj = Lockable()
    end = time.monotonic() + delays.MEDIUM
    with procs.start(call_without_a_pause, obj, end), procs.start(call_beside_a_burner, obj, end):
        pass
    return Words(obj).epoch / max(1, statistics(obj).contended)


def test_trying_once_does_not_let_others_pass() -> None:
    obj = Lockable()
    words = Words(obj)
    words.handoff = 1
    epoch = words.epoch
    assert obj.acquire(blocking=False)
    assert (words.handoff, words.epoch) == (0, epoch)
    obj.release()


def test_the_owner_does_not_let_others_pass_when_it_takes_it_again() -> None:
    """It would wait for itself."""
    obj = Lockable()
    words = Words(obj)
    with obj:
        words.handoff, epoch = 1, words.epoch
        with obj:
            assert (words.handoff, words.epoch, words.depth) == (1, epoch, 2)
    words.handoff = 0


def test_a_newcomer_that_let_nobody_pass_forgets_them() -> None:
    obj = Lockable()
    words = Words(obj)
    words.handoff, epoch = 1, words.epoch
    with obj:
        assert (words.handoff, words.epoch, words.waiters) == (0, epoch + 1, 0)


def test_a_newcomer_lets_others_pass_no_longer_than_it_may_wait() -> None:
    """It has not waited for all of that time, so it cannot tell that they are dead."""
    obj = Lockable()
    words = Words(obj)
    words.handoff, epoch = 1, words.epoch
    assert obj.acquire(timeout=0.0001)
    assert (words.handoff, words.epoch) == (0, epoch)
    obj.release()


def test_a_wait_that_was_counted_but_never_timed_is_timed_by_the_next_release() -> None:
    """Who leaves clears the time: one who enrols at that very moment, or dies in it, would never be handed the lock."""
    obj = Lockable()
    words = Words(obj)
    with waiter_enrolled_for_long(obj) as waiter:
        waiter.stop()
        words.waiting_since = 0
        obj.release()
        assert words.waiting_since and not words.handoff
        obj.acquire()
        pause(delays.TICK)
        obj.release()
        assert words.handoff
        waiter.cont()
        waiter.expect(True)
        waiter.tell("release")


# ---- memory ------------------------------------------------------------------------------------------------


def test_the_cell_of_a_free_lock_that_never_left_is_used_again() -> None:
    obj = Lockable()
    with obj:
        offset = obj.__lock__.offset
    del obj
    again = Lockable()
    assert again.__lock__.offset == offset
    assert statistics(again).acquisitions == 0
    with again:
        assert Words(again).depth == 1


def fork(_: Lockable) -> None:
    with idle_child():
        pass


LEAVE: dict[str, Callable[[Lockable], object]] = {
    "held": Lockable.acquire,
    "pickled": pickle.dumps,
    "forked": fork,
}


@pytest.mark.parametrize("way", LEAVE)
def test_the_cell_of_one_that_is_held_or_that_others_may_have_is_not(way: str) -> None:
    obj = Lockable()
    offset, handle = obj.__lock__.offset, weakref.ref(obj.__lock__)
    with ThreadPoolExecutor(1) as keeper:  # lives until the end, and so does what it holds
        keeper.submit(LEAVE[way], obj).result()
        del obj
        gc.collect()
        assert handle() is None
        assert offset not in [one.__lock__.offset for one in [Lockable() for _ in range(8)]]


def test_another_program_inherits_no_descriptor_of_ours(coheld_dir: Path) -> None:
    kept = [Lockable(), Lockable(lock_name="bed")]
    found = subprocess.run(
        ["ls", "-l", "/proc/self/fd"], close_fds=False, stdout=subprocess.PIPE, check=True, timeout=delays.LONG
    )
    assert kept
    assert str(coheld_dir) not in found.stdout.decode()


def test_the_mutex_of_this_libc_has_passed_the_check() -> None:
    assert _native.SUPPORTED
