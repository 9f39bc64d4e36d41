"""Leases are renewed for those who live, and as long as they do; a loss is told, whatever becomes of who hears it."""

import asyncio
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import coheld
from coheld import DeadlockError, LeaseLostError, Lockable, NotLockedError, aio, native
from coheld.backends import engine, renewing, server
from coheld.backends.redis import Place, RedisServer
from coheld.backends.store import Alarm
from coheld.testing.support import delays, states
from engines import servers

LEASE = 1.2 * delays.SCALE


@pytest.fixture(autouse=True)
def _end_threads() -> Iterator[None]:
    yield
    renewing.end()
    engine.close()


def bed(server: servers.Valkey, name: str = "bed") -> Lockable:
    return Lockable(lock_name=name, lock_backend=f"{server.url()}?lease={LEASE}")


def end_of(server: servers.Valkey, name: str = "bed") -> int:
    """Of its lease, microseconds of the server's clock."""
    with server.client() as client:
        found: Any = client.hget(f"coheld:{{{name}}}", "u")
    return int(found)


def is_over(server: servers.Valkey, name: str = "bed") -> bool:
    with server.client() as client:
        seconds, micros = client.time()
    return end_of(server, name) < seconds * 1_000_000 + micros


def test_it_is_renewed_while_the_holder_lives(valkey: servers.Valkey) -> None:
    with bed(valkey) as lock:
        begun = end_of(valkey)
        states.wait_until(lambda: end_of(valkey) > begun + 2 * LEASE * 1e6, "it is renewed, and again")
        assert not coheld.lost(lock)


@pytest.mark.parametrize("lease", [0.1000015, 1.0005, 3599.9999])
def test_it_is_any_part_of_a_second(valkey: servers.Valkey, lease: float) -> None:
    with Lockable(lock_name="part", lock_backend=f"{valkey.url()}?lease={lease}") as lock:
        assert coheld.token(lock)


def test_so_is_one_that_nothing_refers_to(valkey: servers.Valkey) -> None:
    taken, end = threading.Event(), threading.Event()

    def live() -> None:
        bed(valkey).acquire()
        taken.set()
        end.wait()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        taken.wait()
        begun = end_of(valkey)
        states.wait_until(lambda: end_of(valkey) > begun + 2 * LEASE * 1e6, "it is renewed, and again")
    finally:
        end.set()
        thread.join()
    states.wait_until(lambda: is_over(valkey), "with the thread it is not")


def taken_by_a_thread(lock: Lockable) -> None:
    thread = threading.Thread(target=lock.acquire)
    thread.start()
    thread.join()


def taken_by_a_task(lock: Lockable) -> None:
    async def main() -> None:
        await asyncio.create_task(aio.acquire(lock))

    asyncio.run(main())


@pytest.mark.parametrize("take", [taken_by_a_thread, taken_by_a_task])
def test_it_is_not_for_a_thread_or_task_that_has_ended(
    valkey: servers.Valkey, take: Callable[[Lockable], None], caplog: pytest.LogCaptureFixture
) -> None:
    lock = bed(valkey)
    take(lock)
    states.wait_until(lambda: is_over(valkey), "the lease is over")
    with lock:
        assert "died while it held the lock" in caplog.text


def wipe(server: servers.Valkey) -> None:
    with server.client() as client:
        client.flushall()


def test_a_loss_is_told_and_what_that_raises_is_logged(
    valkey: servers.Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    lock, other, told = bed(valkey), bed(valkey, "other"), []

    def hear(error: LeaseLostError) -> None:
        told.append(error)
        raise RuntimeError("whatever it is")

    coheld.when_lost(lock, hear)
    with other:
        lock.acquire()
        wipe(valkey)
        other_is_new = bed(valkey, "new")
        states.wait_until(lambda: told, "the thread that renews finds out")
        assert coheld.lost(lock)
        with pytest.raises(LeaseLostError):
            coheld.ensure_held(lock)
        with pytest.raises(LeaseLostError):
            lock.release()
        with other_is_new:  # the thread that renews has survived what was raised in it
            begun = end_of(valkey, "new")
            states.wait_until(lambda: end_of(valkey, "new") > begun, "it is renewed")
        with pytest.raises(LeaseLostError):
            other.release()
        other.acquire()  # which the block gives back
    assert len(told) == 1
    assert "whatever it is" in caplog.text
    with lock:
        assert not coheld.lost(lock)


def held_elsewhere(server: servers.Valkey, name: str = "bed") -> None:
    """For half a minute, by a host that is not there."""
    with server.client() as client:
        seconds: Any = client.time()[0]
        client.hset(f"coheld:{{{name}}}", mapping={"g": "another", "u": (seconds + 30) * 1_000_000, "t": 1, "i": 1})


def test_a_handler_of_a_signal_does_not_own_what_its_thread_waits_for(valkey: servers.Valkey) -> None:
    lock, got = bed(valkey), []

    def handle(*_signal: object) -> None:
        got.append(lock.acquire(timeout=0))
        with pytest.raises(DeadlockError, match="signal's handler"):
            lock.acquire()

    held_elsewhere(valkey)
    former = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert not lock.acquire(timeout=0.6)
    finally:
        signal.signal(signal.SIGALRM, former)
    assert got == [False]


def test_one_thread_has_it_by_one_lease_only(valkey: servers.Valkey) -> None:
    lock, other = bed(valkey, "two"), Lockable(lock_name="two", lock_backend=f"{valkey.url()}?lease=7")
    with lock:
        assert not other.acquire(timeout=0)
        with pytest.raises(DeadlockError, match="the same URL"):
            other.acquire()
        assert coheld.token(lock)
    with other:
        assert coheld.token(other)


def test_questions_are_for_who_holds_it(valkey: servers.Valkey) -> None:
    lock = bed(valkey)
    for question in (coheld.token, coheld.lost, coheld.ensure_held):
        with pytest.raises(NotLockedError):
            question(lock)
    with pytest.raises(TypeError, match="when_lost needs a function"):
        coheld.when_lost(lock, "call me")  # type: ignore[arg-type]


# ---- news ----------------------------------------------------------------------------------------------------


def test_who_brings_news_does_not_wait_for_a_lock_that_somebody_has(valkey: servers.Valkey) -> None:
    taken, end = threading.Event(), threading.Event()

    def hold() -> None:
        with bed(valkey):
            taken.set()
            end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        taken.wait()
        lock = native.lock_of(bed(valkey))
        begun = time.monotonic()
        assert not any(lock._stir() for _ in range(200))
        assert time.monotonic() - begun < delays.MEDIUM
    finally:
        end.set()
        thread.join()
    assert lock._stir()


class Deaf(server.Listener):
    """It hears nothing."""

    def stir(self) -> None: ...
    def _hear(self) -> None: ...
    def _cut(self) -> None: ...


class Busy:
    """Somebody has its lock until the clock says that."""

    def __init__(self, until: float) -> None:
        self.until, self.rung = until, list[float]()

    def ring(self) -> bool:
        self.rung.append(time.monotonic())
        return time.monotonic() >= self.until

    def is_wanted(self) -> bool:
        return True


def test_who_cannot_be_rung_is_rung_again_soon_and_then_seldom(
    valkey: servers.Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisServer(Place(valkey.url()))
    listener, busy, soon, now = Deaf(store), Busy(1010.0), Busy(1000.001), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    store._bells = {"busy": weakref.WeakSet([busy]), "soon": weakref.WeakSet([soon])}
    listener._ring(["busy", "soon"])
    while listener._late:
        assert now[0] < 1011.0
        now[0] += max(1e-6, listener._patience())
        listener._ring_late()
    assert len(soon.rung) == 2 and soon.rung[-1] < 1000.01
    assert busy.rung[1] < 1000.01 and len(busy.rung) < 80 and busy.rung[-1] < 1010.3
    assert listener._patience() == server.HEALTHY
    store.close()


class Unreached(Deaf):
    """By it the server is not reached."""

    tries = 0

    def _hear(self) -> None:
        self.tries += 1
        raise OSError("away")


def test_a_server_that_is_away_is_tried_only_while_somebody_wants_to_hear(
    valkey: servers.Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    store, alarm = RedisServer(Place(valkey.url())), Alarm()
    listener = Unreached(store)
    listener.start()
    try:
        states.wait_until(lambda: listener.idles, "nobody wants it")
        assert listener.tries == 1 and not caplog.text
        store._alarms["bed"] = weakref.WeakSet([alarm])
        listener.resume()
        states.wait_until(lambda: listener.tries > 3, "it tries")
        assert caplog.text.count("not heard") == 1
        del alarm
        states.wait_until(lambda: listener.idles, "nobody wants it any more")
    finally:
        listener.end()
        store.close()
    assert not listener.is_alive()


def test_a_lock_that_is_given_back_in_order_is_not_said_to_be_lost(
    valkey: servers.Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who renews asks while the answer of the release is on its way."""
    release, renew = RedisServer.release, RedisServer.renew
    asked: list[bool] = []

    def renews(self: RedisServer, *args: Any) -> bool:
        asked.append(kept := renew(self, *args))
        return kept

    def releases(self: RedisServer, *args: Any) -> int | None:
        version = release(self, *args)
        states.wait_until(lambda: False in asked, "it is asked for")
        time.sleep(delays.SHORT)  # nothing is to come of that
        return version

    mine, heard = bed(valkey), list[LeaseLostError]()
    coheld.when_lost(mine, heard.append)
    monkeypatch.setattr(RedisServer, "renew", renews)
    monkeypatch.setattr(RedisServer, "release", releases)
    with mine:
        pass
    assert not heard
