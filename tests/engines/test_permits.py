"""Permits of a semaphore, and leases of a pool, on a server, when hosts, the server, or what is between them fails.

A host here is a process with a COHELD_DIR of its own, so that nothing but the server connects them.
"""

import asyncio
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import coheld
from coheld import BackendError, LeaseLostError, LockTimeout, PermitError, Pool, Semaphore, aio, pool, roll, snapshot
from coheld import ledger as ledgers
from coheld.backends import engine, renewing, sessions
from coheld.mutex import remove
from coheld.testing.support import delays, effort, procs, states
from engines import hosts, servers
from engines.hosts import LEASE, Start
from engines.proxy import Proxy

HEARD: list[str] = []


class Act:
    """What a host does with its semaphore of two, or its pool."""

    def __init__(self, url: str) -> None:
        self.semaphore = Semaphore(2, "slots", url)
        os.environ["COHELD_BACKEND"] = url
        self.pool = Pool(["a", "b"], name="lab")
        self.lease: Any = None
        away = self.semaphore._lock.away
        self.at = away._store, away.lease
        coheld.when_lost(self.semaphore, lambda error: HEARD.append(type(error).__name__))

    def acquire(self, timeout: float | None = None) -> bool:
        return self.semaphore.acquire(timeout=timeout)

    def release(self, count: int = 1) -> None:
        self.semaphore.release(count)

    def free(self) -> int:
        return self.semaphore.free()

    def lost(self) -> bool:
        return coheld.lost(self.semaphore)

    def ensure(self) -> None:
        coheld.ensure_held(self.semaphore)

    def heard(self) -> list[str]:
        return HEARD

    def session(self) -> str:
        return sessions.at(*self.at).here().client.session

    def enter(self, timeout: float | None = None) -> str:
        self.lease = self.pool.lease(timeout)
        return str(self.lease.__enter__())

    def enter_after_a_stop(self) -> str:
        """It stands still between the two steps."""
        enrol = pool.enrol

        def slowly(*args: Any) -> Any:
            found = enrol(*args)
            os.kill(os.getpid(), signal.SIGSTOP)
            return found

        pool.enrol = slowly
        try:
            return str(self.pool.lease().__enter__())
        finally:
            pool.enrol = enrol

    def leave(self) -> None:
        self.lease.__exit__()

    def unleased(self) -> list[str]:
        return self.pool.free()


def host(link: procs.Link, directory: Path, url: str) -> None:
    os.environ["COHELD_DIR"] = str(directory)
    act = Act(url)
    link.say("ready")
    while True:
        what, *args = link.hear()
        try:
            link.say(getattr(act, what)(*args))
        except (coheld.CoheldError, AssertionError) as error:
            link.say(error)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with hosts.starting(tmp_path, host) as begin:
        yield begin


@pytest.fixture
def proxy(valkey: servers.Valkey) -> Iterator[Proxy]:
    with Proxy(valkey.port) as proxy:
        yield proxy


def through(proxy: Proxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}/0"


def state_of(valkey: servers.Valkey, name: str) -> bytes:
    with valkey.client() as client:
        found: Any = client.hget(f"coheld:{{{name}}}", "s")
    return found or b""


def wait_until_queued(valkey: servers.Valkey, session: str, name: str = "slots") -> None:
    """The session of a host that holds nothing stands in the state: it has a place."""
    states.wait_until(lambda: session.encode() in state_of(valkey, name), "it waits")


# ---- hosts that are well -------------------------------------------------------------------------------------


def test_hosts_share_the_permits_and_who_waits_is_woken_in_its_turn(valkey: servers.Valkey, start: Start) -> None:
    holder, first, second = (start(valkey.url(), lease=60) for _ in range(3))
    assert holder.do("acquire") and holder.do("acquire") and not first.do("acquire", 0)
    for one in (first, second):
        session = one.do("session")
        one.tell("acquire")
        wait_until_queued(valkey, session)
    begun = time.monotonic()
    holder.do("release")
    assert first.result() and time.monotonic() - begun < delays.MEDIUM
    assert not holder.do("acquire", delays.SHORT)  # the second waits before it
    holder.do("release")
    assert second.result() and time.monotonic() - begun < 2 * delays.MEDIUM
    assert holder.do("free") == 0
    with pytest.raises(PermitError, match="holds no permit"):
        holder.do("release")


def test_one_renewal_is_for_all_that_a_process_has(valkey: servers.Valkey, start: Start) -> None:
    holder = start(valkey.url())
    assert holder.do("acquire") and holder.do("acquire") and holder.do("enter")
    with valkey.client() as client:
        [key] = client.keys("coheld:{session/*")
        until = client.hget(key, "u")
        states.wait_until(lambda: client.hget(key, "u") != until, "it is renewed", 2 * LEASE)
    assert not start(valkey.url()).do("acquire", 2 * LEASE)
    assert not holder.do("lost")
    holder.do("ensure")
    holder.do("release", 2)


def by_two_leases(link: procs.Link, url: str) -> list[int]:
    """How many are free, as one object and then the other takes and gives."""
    one, other = Semaphore(2, "slots", f"{url}?lease={LEASE}"), Semaphore(2, "slots", f"{url}?lease=7")
    free = []
    for act in (one.acquire, other.acquire, one.release, other.release):
        act()
        free.append(other.free())
    return free


def test_one_process_may_have_permits_by_two_leases(valkey: servers.Valkey) -> None:
    with procs.start(by_two_leases, valkey.url()) as process:
        assert process.result() == [1, 0, 1, 2]


def a_wait_by_another_lease(link: procs.Link, url: str) -> list[int]:
    one, other = Semaphore(1, "slots", f"{url}?lease={LEASE}"), Semaphore(1, "slots", f"{url}?lease=7")
    with one:  # it has a session by now
        pass
    other.acquire()
    assert not one.acquire(timeout=delays.SHORT)
    states.wait_until(lambda: not roll._process.janitor.runs, "the roll is made right")
    free = [one.free()]
    other.release()
    return [*free, one.free()]


def test_a_wait_by_another_lease_that_is_given_up_takes_no_permit(valkey: servers.Valkey) -> None:
    with procs.start(a_wait_by_another_lease, valkey.url()) as process:
        assert process.result() == [0, 1]


def shared_by(kind: str) -> Any:
    """Something that one at a time may have: by `with` and by `async with`."""
    if kind == "lock":
        return coheld.Lockable(lock_name="bed")
    return Semaphore(1, "slots") if kind == "semaphore" else Pool(["a"], name="lab").lease


@pytest.mark.parametrize("kind", ["lock", "semaphore", "pool"])
def test_its_end_in_a_task_does_not_wait_for_the_loops_threads(
    kind: str, valkey: servers.Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which all wait for that end."""
    monkeypatch.setenv("COHELD_BACKEND", valkey.url())

    def use(one: Any) -> bool:
        with one() if kind == "pool" else one:
            return True

    async def main() -> bool:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        one = shared_by(kind)
        async with one() if kind == "pool" else one:
            waits = asyncio.ensure_future(asyncio.to_thread(use, one))
            await asyncio.sleep(0)  # it has the loop's one thread
        return await waits

    try:
        assert asyncio.run(asyncio.wait_for(main(), delays.LONG))
    finally:
        end_threads()


def test_a_name_is_not_removed_while_another_host_has_a_permit(
    valkey: servers.Valkey, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = start(valkey.url())
    assert holder.do("acquire")
    monkeypatch.setenv("COHELD_BACKEND", valkey.url())
    try:
        with pytest.raises(LockTimeout, match=f"process {holder.worker.pid} has permits"):
            remove("slots")
        assert holder.do("free") == 1
        holder.do("release")
        assert remove("slots") and not remove("slots")
        assert holder.do("acquire") and holder.do("free") == 1
    finally:
        end_threads()


def test_a_process_that_ends_leaves_no_session(valkey: servers.Valkey, tmp_path: Path) -> None:
    source = f"import coheld; s = coheld.Semaphore(2, 'slots', {valkey.url()!r}); s.acquire()"
    procs.run(source)
    with valkey.client() as client:
        assert not client.keys("coheld:{session/*") and client.keys("coheld:{slots}")


def test_each_process_is_looked_at_once_however_many_of_its_tasks_wait(
    valkey: servers.Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one's own not at all."""
    looks: list[int] = []
    monkeypatch.setattr(sessions, "start_of", lambda pid: looks.append(pid) or 0)
    monkeypatch.setenv("COHELD_BACKEND", valkey.url())
    ledger = ledgers.Ledger(lock_name="lab")
    try:
        peers = ledgers.peers_of(ledger)
        assert peers is not None
        mine = peers.here().client
        beside = [replace(mine, session=f"{number:032x}", pid=number, start=0) for number in (1, 2)]
        with ledger:
            for client in [mine, *beside] * 100:
                ledger.queue.append(ledgers.Request(len(ledger.queue), client.pid, client.start, ["a"], client))
            looks.clear()
            ledger.bury()
            assert len(ledger.queue) == 300 and sorted(looks) == [1, 2]
            assert ledger._clients() == [mine, *beside]
            del ledger.queue[:]
    finally:
        end_threads()


ENDS = """
import os, sys
import coheld
from coheld import roll

class Late:
    def __init__(self):
        self.call, self.permits = roll._process.janitor.call, semaphore._permits
        self.write, self.is_finalizing = os.write, sys.is_finalizing

    def __del__(self):
        self.write(1, b"at the end " if self.is_finalizing() else b"too soon ")
        self.call(self.permits)
        self.write(1, b"it goes on")

semaphore = coheld.Semaphore(2, "slots", sys.argv[1])
late = Late()
"""


def test_what_the_collector_finds_while_the_interpreter_ends_does_not_keep_it(valkey: servers.Valkey) -> None:
    assert procs.run(ENDS, valkey.url()) == "at the end it goes on"


# ---- hosts that die, or stand still --------------------------------------------------------------------------


def test_what_a_killed_host_had_comes_back_within_its_lease(valkey: servers.Valkey, start: Start) -> None:
    holder, waiter, leaser = (start(valkey.url()) for _ in range(3))
    assert holder.do("acquire") and holder.do("acquire")
    session = waiter.do("session")
    waiter.tell("acquire")
    wait_until_queued(valkey, session)
    holder.worker.kill()
    begun = time.monotonic()
    assert waiter.result() and time.monotonic() - begun < LEASE + delays.MEDIUM
    states.wait_until(lambda: leaser.do("free") == 1, "the other permit is free as well")


def test_what_a_killed_lessee_had_comes_back_within_its_lease(valkey: servers.Valkey, start: Start) -> None:
    holder, other, waiter = (start(valkey.url()) for _ in range(3))
    assert {holder.do("enter"), other.do("enter")} == {"a", "b"}
    session = waiter.do("session")
    waiter.tell("enter")
    wait_until_queued(valkey, session, "lab")
    holder.worker.kill()
    begun = time.monotonic()
    assert waiter.result() and time.monotonic() - begun < LEASE + delays.MEDIUM


def test_who_comes_when_the_lease_of_the_dead_is_over_needs_not_wait(valkey: servers.Valkey, start: Start) -> None:
    holder, other = start(valkey.url()), start(valkey.url())
    assert holder.do("acquire") and holder.do("acquire") and holder.do("enter") and other.do("enter")
    holder.worker.kill()
    with valkey.client() as client:
        for key in client.keys("coheld:{session/*"):
            until = client.hget(key, "u")
            states.wait_until(lambda key=key, until=until: is_over(client, key, until), "it is over, or renewed")
    for act in ("acquire", "enter"):
        assert start(valkey.url()).do(act, 0)


def is_over(client: Any, key: bytes, until: bytes) -> bool:
    seconds, micro = client.time()
    return client.hget(key, "u") != until or int(until) < seconds * 1_000_000 + micro


def test_a_waiter_that_is_killed_keeps_nobody_out_beyond_its_lease(valkey: servers.Valkey, start: Start) -> None:
    holder, dead, waiter = (start(valkey.url()) for _ in range(3))
    assert holder.do("acquire") and holder.do("acquire")
    for one in (dead, waiter):
        session = one.do("session")
        one.tell("acquire")
        wait_until_queued(valkey, session)
    dead.worker.kill()
    holder.do("release")
    begun = time.monotonic()
    assert waiter.result() and time.monotonic() - begun < LEASE + delays.MEDIUM


def test_a_holder_that_was_stopped_beyond_its_lease_finds_out(valkey: servers.Valkey, start: Start) -> None:
    holder, other = start(valkey.url()), start(valkey.url())
    assert holder.do("acquire") and holder.do("acquire")
    holder.worker.stop()
    assert other.do("acquire") and other.do("acquire")
    holder.worker.cont()
    for _ in range(2):
        with pytest.raises(LeaseLostError):
            holder.do("release")
    assert holder.do("heard") == ["LeaseLostError"]
    with pytest.raises(PermitError):
        holder.do("release")
    assert holder.do("free") == 0 and not holder.do("acquire", 0)
    other.do("release", 2)
    assert holder.do("acquire") and not holder.do("lost")


def test_so_it_does_before_it_gives_back(valkey: servers.Valkey, start: Start) -> None:
    holder, other = start(valkey.url()), start(valkey.url())
    assert holder.do("acquire") and holder.do("acquire")
    holder.worker.stop()
    assert other.do("acquire")
    holder.worker.cont()
    assert holder.do("lost")
    with pytest.raises(LeaseLostError):
        holder.do("ensure")


def test_a_lessee_that_was_stopped_beyond_its_lease_is_told(valkey: servers.Valkey, start: Start) -> None:
    holder, other, third = (start(valkey.url()) for _ in range(3))
    had = {holder.do("enter"), other.do("enter")}
    assert had == {"a", "b"}
    holder.worker.stop()
    got = third.do("enter")
    holder.worker.cont()
    with pytest.raises(LeaseLostError):
        holder.do("leave")
    third.do("leave")
    assert third.do("unleased") == [got]


def test_a_lessee_that_was_stopped_before_it_had_anything_is_told(valkey: servers.Valkey, start: Start) -> None:
    holder, other, third = (start(valkey.url()) for _ in range(3))
    had, also = holder.do("enter"), other.do("enter")
    holder.tell("enter_after_a_stop")
    states.wait_until(lambda: states.stopped(holder.worker.pid), "it stands still")
    assert third.do("enter") == had
    other.do("leave")
    holder.worker.cont()
    with pytest.raises(LeaseLostError):
        holder.result()
    assert other.do("enter", delays.LONG) == also


# ---- one process, and what comes in between ------------------------------------------------------------------


@pytest.fixture
def slots(valkey: servers.Valkey) -> Iterator[Semaphore]:
    """Of this process."""
    yield Semaphore(2, "slots", valkey.url())
    states.wait_until(lambda: not roll._process.janitor.runs, "nothing is to be made right")
    end_threads()


def all_are_free(slots: Semaphore) -> bool:
    return slots.free() == 2


STEPS = 200
"""More than a call has."""


def interrupted(act: Callable[[], object], step: int) -> bool:
    """An interrupt comes where that many functions of the roll have begun or ended. False: it was over before, or who
    asked was told."""
    count = 0

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != roll.__file__:
            return None
        if frame.f_code.co_name == "keeps":
            count = STEPS
        if event != "line":
            count += 1
            if count == step:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("timeout", [0, delays.LONG])
def test_an_interrupt_takes_no_permit(slots: Semaphore, timeout: float) -> None:
    for step in range(1, STEPS):
        if not interrupted(lambda: slots.acquire(timeout=timeout), step):
            break
        states.wait_until(lambda: all_are_free(slots), f"all are free after an interrupt at {step}")
    assert 10 < step < STEPS - 1
    slots.release()


def test_an_interrupt_keeps_no_permit(slots: Semaphore) -> None:
    for step in range(1, STEPS):
        slots.acquire()
        if not interrupted(slots.release, step):
            break
        with suppress(PermitError):  # it may have been given back before
            slots.release()
        states.wait_until(lambda: all_are_free(slots), f"all are free after an interrupt at {step}")
    assert 5 < step < STEPS - 1


def test_a_handler_gives_back_in_the_middle(slots: Semaphore, monkeypatch: pytest.MonkeyPatch) -> None:
    slots.acquire()
    grab = roll.FarPermits._grab

    def grab_after_a_signal(permits: Any, *args: Any) -> bool:
        slots.release()
        return grab(permits, *args)

    monkeypatch.setattr(roll.FarPermits, "_grab", grab_after_a_signal)
    slots.acquire()
    monkeypatch.setattr(roll.FarPermits, "_grab", grab)
    states.wait_until(lambda: slots.free() == 1, "it is given back")
    slots.release()


def test_a_permit_that_is_lost_before_it_is_told_of_is_nobodys(
    slots: Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeps = roll.Has.keeps

    def keeps_too_late(has: roll.Has, number: int) -> bool:
        monkeypatch.setattr(roll.Has, "keeps", keeps)
        assert has.session is not None and has.session.grant is not None
        has.session.lose(has.session.grant, "test")
        return keeps(has, number)

    monkeypatch.setattr(roll.Has, "keeps", keeps_too_late)
    assert slots.acquire() and not coheld.lost(slots) and slots.free() == 1
    slots.release()
    states.wait_until(lambda: all_are_free(slots), "all are free")


def test_a_task_that_is_destroyed_while_a_thread_asks_leaves_no_place(
    slots: Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots.acquire()
    slots.acquire()
    asks, goes_on, attempt = threading.Event(), threading.Event(), roll.FarPermits.attempt

    def slowly(*args: Any) -> Any:
        asks.set()
        assert goes_on.wait(delays.LONG)
        return attempt(*args)

    monkeypatch.setattr(roll.FarPermits, "attempt", slowly)
    loop = asyncio.new_event_loop()
    task = loop.create_task(aio.acquire(slots))
    loop.call_later(delays.TICK, loop.stop)
    loop.run_forever()
    while not asks.is_set():
        loop.call_later(delays.TICK, loop.stop)
        loop.run_forever()
    loop.close()
    task.get_coro().close()
    del task
    gc.collect()
    goes_on.set()
    monkeypatch.setattr(roll.FarPermits, "attempt", attempt)
    slots._permits.attempt(1, delays.LONG, True, False)
    slots._permits._drop(1)
    states.wait_until(lambda: not snapshot(slots._permits._roll).queue, "nobody has a place")
    slots.release(2)


# ---- the server, and what is between -------------------------------------------------------------------------


def test_a_durable_server_that_is_killed_goes_on(start: Start) -> None:
    with servers.valkey(durable=True) as server:
        holder, other = start(server.url(), lease=4 * LEASE), start(server.url(), lease=4 * LEASE)
        assert holder.do("acquire") and holder.do("acquire")
        server.restart()
        assert not other.do("acquire", 0) and not holder.do("lost")
        holder.do("release", 2)
        assert other.do("acquire", delays.LONG) and other.do("acquire", delays.LONG)


def test_a_server_that_has_lost_all_begins_anew_and_who_held_finds_out(start: Start) -> None:
    with servers.valkey() as server:
        holder, other = start(server.url()), start(server.url())
        assert holder.do("acquire") and holder.do("enter")
        server.restart()
        assert other.do("acquire") and other.do("acquire") and {other.do("enter")} < {"a", "b"}
        with pytest.raises(LeaseLostError):
            holder.do("release")
        assert not holder.do("acquire", 0)
        with suppress(LeaseLostError):  # its resource may be what the other has, or not
            holder.do("leave")


ANSWERS = range(4)
"""Which of them is lost: of the roll's lock, of the change, and of what is beyond."""


@pytest.mark.parametrize("act", ["acquire", "release"])
def test_a_reply_that_is_lost_makes_no_permit_and_loses_none(
    act: str, valkey: servers.Valkey, proxy: Proxy, start: Start
) -> None:
    one, other = start(through(proxy)), start(valkey.url())
    for _ in ANSWERS:
        held = 0
        if act == "release":
            assert one.do("acquire")
            held = 1
        proxy.lose_reply()
        with suppress(BackendError):
            one.do(act)
            held += 1 if act == "acquire" else -1
        if act == "release":
            held = 0  # whatever was said
        states.wait_until(lambda held=held: other.do("free") == 2 - held, "all agree on who has what")
        if held:
            one.do("release")
    states.wait_until(lambda: other.do("free") == 2, "all are free")
    assert other.do("acquire", delays.LONG) and other.do("acquire", delays.LONG) and not other.do("acquire", 0)


def test_what_is_given_back_while_the_server_is_away_is_free_once_it_is_there(
    valkey: servers.Valkey, proxy: Proxy, start: Start
) -> None:
    one, other = start(through(proxy), lease=4 * LEASE), start(valkey.url(), lease=4 * LEASE)
    assert one.do("acquire") and one.do("enter")
    proxy.refuse()
    with pytest.raises(BackendError):
        one.do("release")
    with pytest.raises(BackendError):
        one.do("leave")
    with pytest.raises(BackendError):
        one.do("acquire")
    proxy.forward()
    states.wait_until(lambda: other.do("free") == 2, "it was given back")
    states.wait_until(lambda: other.do("unleased") == ["a", "b"], "so was that")
    with pytest.raises(PermitError):
        one.do("release")


# ---- histories -----------------------------------------------------------------------------------------------


def use(link: procs.Link, directory: Path, url: str, number: int) -> list[tuple[float, float]]:
    """Take and give until told; from when to when a permit was held, by those that were not lost."""
    os.environ["COHELD_DIR"] = str(directory)
    rng, held = random.Random(number), []
    semaphore = None
    while not link._connection.poll(0):
        try:
            semaphore = semaphore or Semaphore(2, "slots", url)
            if not semaphore.acquire(timeout=LEASE):
                continue
            begun = time.monotonic()
            time.sleep(rng.choice([0, rng.uniform(0, LEASE / 10)]))
            ended = time.monotonic()
            semaphore.release()
            held.append((begun, ended))
        except (LeaseLostError, BackendError, LockTimeout):
            time.sleep(LEASE / 50)
    return held


def test_never_more_than_there_are_whatever_fails(tmp_path: Path, rng: random.Random) -> None:
    for run in range(effort.rounds(3)):
        with ExitStack() as life:
            server = life.enter_context(servers.valkey(durable=True))
            proxy = life.enter_context(Proxy(server.port))
            url = f"{through(proxy)}?lease={LEASE}"
            workers = []
            for number in range(4):
                directory = tmp_path / f"{run}-{number // 2}"
                directory.mkdir(0o700, exist_ok=True)
                workers.append(life.enter_context(procs.start(use, directory, url, number)))
            for _ in range(4):
                time.sleep(rng.uniform(0, LEASE / 3))
                FAULTS[rng.randrange(len(FAULTS))](rng, server, proxy, workers)
            for worker in workers:
                worker.tell("end")
            intervals = [one for worker in workers for one in worker.result()]
            assert len(intervals) > 4
            assert most_at_once(intervals) <= 2
            last = Semaphore(2, "slots", server.url())
            assert last.acquire(timeout=delays.LONG) and last.acquire(timeout=delays.LONG)
            end_threads()


def end_threads() -> None:
    """Of this process."""
    roll.end()
    sessions.end()
    renewing.end()
    engine.close()


def most_at_once(intervals: list[tuple[float, float]]) -> int:
    """Of times during which somebody had one for sure."""
    changes = sorted([(begun, 1) for begun, _ in intervals] + [(ended, -1) for _, ended in intervals])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def test_the_check_sees_one_too_many() -> None:
    assert most_at_once([(0, 2), (1, 3), (2.5, 4)]) == 2 and most_at_once([(0, 3), (1, 3), (2.5, 4)]) == 3


def stop_one(rng: random.Random, _server: servers.Valkey, _proxy: Proxy, workers: list[Any]) -> None:
    victim = rng.choice(workers)
    victim.stop()
    time.sleep(rng.uniform(0.5, 1.5) * LEASE)
    victim.cont()


def restart(_rng: random.Random, server: servers.Valkey, _proxy: Proxy, _workers: list[Any]) -> None:
    server.restart()


def wipe(_rng: random.Random, server: servers.Valkey, _proxy: Proxy, _workers: list[Any]) -> None:
    server.wipe()


def cut(rng: random.Random, _server: servers.Valkey, proxy: Proxy, _workers: list[Any]) -> None:
    proxy.cut(reset=rng.choice([False, True]))


def lose_reply(_rng: random.Random, _server: servers.Valkey, proxy: Proxy, _workers: list[Any]) -> None:
    proxy.lose_reply()


def refuse(rng: random.Random, _server: servers.Valkey, proxy: Proxy, _workers: list[Any]) -> None:
    proxy.refuse()
    time.sleep(rng.uniform(0.5, 1.5) * LEASE)
    proxy.forward()


FAULTS: list[Callable[[random.Random, servers.Valkey, Proxy, list[Any]], None]] = [
    stop_one,
    restart,
    wipe,
    cut,
    lose_reply,
    refuse,
]
