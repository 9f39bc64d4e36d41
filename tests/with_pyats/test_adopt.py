"""coheld.pyats.adopt() with Cisco's own classes: their lock survives a killed holder, and nothing else changes."""

import copy
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from benches import CiscosCounter, CiscosFirst, Counter, Minimal, OurCounter, OursFirst, depth
from pyats.async_ import pcall
from pyats.async_ import synchronize as reference
from pyats.topology import Device

import coheld
from coheld.backends.base import Handle
from coheld.pyats import adopt
from coheld.testing.contract.observe import held_elsewhere, is_free
from coheld.testing.support import delays, procs, states
from coheld.testing.support.exclusion import Exclusion

Cisco = reference.Lockable


def router() -> Any:
    return Device("router", os="none", type="router", connections={"cli": {"class": Minimal}})


def connection(kind: Any = Minimal, **more: Any) -> Any:
    device = router()
    made = kind(device=device, alias="cli", via="cli", **more)
    made.keep = device  # which the connection itself refers to weakly
    return made


class Free:
    """Cisco's acquire knows no `blocking`: what contract.observe asks of a lock, asked of `__lock__`."""

    def __init__(self, obj: Any) -> None:
        self.acquire, self.release = obj.__lock__.acquire, obj.__lock__.release


def hold(link: procs.Link, obj: Any) -> None:
    obj.acquire()
    link.say("holding")
    link.wait_for("never said")


def hold_in_a_call(link: procs.Link, obj: Any) -> None:
    obj.execute(lambda: hold(link, obj))


# ---- a killed holder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("holding", [hold, hold_in_a_call])
def test_the_lock_of_a_connection_survives_a_killed_holder(adopted: None, holding: Any) -> None:
    conn = connection()
    with procs.start(holding, conn) as holder:
        holder.expect("holding")
        assert not conn.acquire(timeout=delays.SHORT)
        holder.kill()
        assert conn.acquire(timeout=delays.LONG)
        conn.release()
    assert conn.execute("show version") == "show version" and is_free(Free(conn))


def test_without_adopt_nobody_gets_it() -> None:
    conn = connection()
    with procs.start(hold, conn) as holder:
        holder.expect("holding")
        holder.kill()
        assert not conn.acquire(timeout=delays.MEDIUM)


def test_a_waiter_inside_ciscos_decorator_gets_the_lock_of_a_killed_holder(adopted: None) -> None:
    conn = connection()
    with procs.start(hold, conn) as holder, procs.start(call, conn) as waiter:
        holder.expect("holding")
        waiter.tell("go")
        waiter.wait_until_blocked()
        holder.kill()
        assert waiter.result() == "got in"


def call(link: procs.Link, conn: Any) -> Any:
    link.wait_for("go")
    return conn.execute("got in")


def test_the_connection_that_a_device_makes_has_our_lock(adopted: None) -> None:
    device = router()
    device.connect(via="cli", alias="cli")
    with procs.start(hold, device.connectionmgr.connections["cli"]) as holder:
        holder.expect("holding")
        holder.kill()
    assert device.connectionmgr.connections["cli"].acquire(timeout=delays.LONG)
    device.connectionmgr.connections["cli"].release()


# ---- what stays as it was ----------------------------------------------------------------------------------


def test_adopting_again_changes_nothing(adopted: None) -> None:
    before = dict(vars(Cisco))
    adopt()
    assert dict(vars(Cisco)) == before


def test_only_two_names_change(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    before = dict(vars(Cisco))
    request.getfixturevalue("adopted")
    after = dict(vars(Cisco))
    assert {name for name in after if after[name] is not before.get(name)} == {"__init__", "acquire"}


def test_half_of_it_is_completed(adopted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cisco, "acquire", vars(Cisco)["acquire"].original)  # forked between the two
    adopt()
    assert isinstance(connection().__lock__, Handle)
    both = connection(CiscosFirst)
    assert both.acquire(blocking=False)
    both.release()
    assert Cisco(lock=multiprocessing.Lock).acquire() is True


def test_a_lock_made_before_stays_and_goes_on_to_exclude(request: pytest.FixtureRequest) -> None:
    conn = connection()
    lock = conn.__lock__
    with held_elsewhere(Plain(lock)):
        request.getfixturevalue("adopted")
        assert conn.__lock__ is lock
        assert conn.acquire(block=False) is False
    assert conn.acquire(block=False) is True
    conn.release()


class Plain:
    """A lock of multiprocessing, as contract.observe asks for it."""

    def __init__(self, lock: Any) -> None:
        self.lock, self.release = lock, lock.release

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> Any:
        return self.lock.acquire(blocking, timeout)


def test_who_passes_a_lock_gets_that_one(adopted: None) -> None:
    assert type(Cisco(lock=multiprocessing.Lock).__lock__) is type(multiprocessing.Lock())
    made: list[Any] = []
    lock = Cisco(lock=lambda: made.append(threading.Lock()) or made[0]).__lock__
    assert [lock] == made


@pytest.mark.parametrize("bad", [{"lock": None}, {"lock": 5}, {"unknown": 1}])
def test_wrong_arguments_are_refused_as_before(adopted: None, bad: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Cisco(**bad)


def test_acquire_and_release_answer_as_before(adopted: None) -> None:
    conn = connection()
    assert conn.acquire(True, 1) is True and conn.acquire(block=False) is True and conn.acquire(timeout=0) is True
    for _ in range(3):
        conn.release()
    with pytest.raises(AssertionError):
        conn.release()
    assert Cisco.acquire(conn, block=False) is True
    conn.release()


def test_a_connection_is_made_anew_on_its_lock(adopted: None) -> None:
    conn = connection()
    lock = conn.__lock__
    conn.__init__(device=conn.keep, alias="again", via="cli")
    assert conn.__lock__ is lock


def test_the_modules_other_decorator_takes_the_same_lock(adopted: None) -> None:
    class Third(Cisco):
        @reference.locked
        def depth(self) -> int:
            return depth(self)

    assert Third().depth() == 1


# ---- travelling --------------------------------------------------------------------------------------------


class Bench(Cisco):
    """No connection: those refer to their device weakly, and never pickled."""


def test_without_adopt_an_object_does_not_pickle() -> None:
    with pytest.raises(RuntimeError, match="through inheritance"):
        pickle.dumps(Bench())


def test_a_pickled_object_arrives_on_the_same_lock_where_nothing_was_adopted(adopted: None) -> None:
    bench = Bench()
    with procs.start(hold, bench, method="spawn") as holder:
        holder.expect("holding")
        assert not bench.acquire(block=False)
        holder.kill()
        assert bench.acquire(timeout=delays.LONG)
        bench.release()


def test_a_connection_still_does_not_pickle(adopted: None) -> None:
    with pytest.raises(TypeError, match="weakref"):
        pickle.dumps(connection())


def test_copies_share_the_lock_and_deep_copies_do_not(adopted: None) -> None:
    bench = Bench()
    same, other = copy.copy(bench), copy.deepcopy(bench)
    with bench.__lock__:
        assert not is_free(Free(same)) and is_free(Free(other))


# ---- pcall -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OurCounter, CiscosCounter])
def test_pcall_counts_exactly(adopted: None, tmp_path: Path, kind: type[Counter]) -> None:
    counter = kind()
    counter.exclusion = Exclusion(tmp_path)
    assert list(pcall(counter.often, worker=[0, 1, 2, 3])) == [0, 1, 2, 3]
    counter.exclusion.check(calls=800)
    assert is_free(Free(counter))


# ---- a class over both -------------------------------------------------------------------------------------

ORDERS = pytest.mark.parametrize("kind", [OursFirst, CiscosFirst])


@ORDERS
def test_both_decorators_are_levels_of_one_lock(adopted: None, kind: Any) -> None:
    both = connection(kind)
    assert both.by_us() == 2 and both.by_cisco() == 1
    with both:
        assert both.by_us() == 3 and not is_free(both)
    assert is_free(both)


@ORDERS
def test_acquire_takes_the_words_of_both(adopted: None, kind: Any) -> None:
    both = connection(kind)
    with held_elsewhere(both):
        assert both.acquire(blocking=False) is False
        assert both.acquire(block=False) is False
        assert both.acquire(timeout=delays.SHORT) is False
        assert both.acquire(True, delays.SHORT) is False
    assert is_free(both)


@ORDERS
def test_the_hooks_run(adopted: None, kind: Any) -> None:
    both = connection(kind)
    assert both.created
    with procs.start(hold, both) as holder:
        holder.expect("holding")
        holder.kill()
    assert both.acquire(timeout=delays.LONG)
    both.release()
    assert both.recovered == [holder.pid]


@ORDERS
def test_the_decorator_of_cisco_leaves_recovery_to_the_next_call_of_ours(adopted: None, kind: Any) -> None:
    both = connection(kind)
    with procs.start(hold, both) as holder:
        holder.expect("holding")
        holder.kill()
    assert both.by_cisco() == 1 and not hasattr(both, "recovered")
    assert both.by_us() == 2 and both.recovered == [holder.pid]


def test_a_name_in_front_goes_to_our_constructor(adopted: None) -> None:
    both = connection(OursFirst, lock_name="bed")
    with both:
        assert not is_free(coheld.Lockable(lock_name="bed"))


@ORDERS
@pytest.mark.parametrize("first", ["ours", "Cisco's"])
def test_a_name_given_by_hand_stays_whichever_constructor_is_first(adopted: None, kind: Any, first: str) -> None:
    class Named(kind):
        def __init__(self, device: Any) -> None:
            inits = [
                lambda: (
                    coheld.Lockable.__init__(self, lock_name="bed", device=device, alias="a", via="cli")
                    if kind is OursFirst
                    else coheld.Lockable.__init__(self, lock_name="bed")
                ),
                lambda: Minimal.__init__(self, device=device, alias="a", via="cli"),
            ]
            for init in inits if first == "ours" else reversed(inits):
                init()

    device = router()
    with Named(device):
        assert not is_free(coheld.Lockable(lock_name="bed"))


def test_a_lock_of_somebody_else_is_named_and_not_mixed(adopted: None) -> None:
    class Mixed(Cisco, coheld.Lockable):
        @coheld.Lockable.locked
        def call(self) -> None:
            raise AssertionError("unlocked")

    mixed = Mixed(lock=multiprocessing.RLock)
    for refused in (mixed.call, mixed.acquire):
        with pytest.raises(coheld.NotInitializedError, match="RLock"):
            refused()


def test_threads_contend_through_ciscos_decorator(adopted: None, tmp_path: Path) -> None:
    counter = CiscosCounter()
    counter.exclusion = Exclusion(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(counter.often, range(4))) == [0, 1, 2, 3]
    counter.exclusion.check(calls=800)


def test_a_thread_that_waits_for_a_connection_sleeps(adopted: None) -> None:
    conn, tids = connection(), []

    def wait() -> Any:
        tids.append(threading.get_native_id())
        return conn.execute("done")

    with ThreadPoolExecutor(1) as pool, conn.__lock__:
        answer = pool.submit(wait)
        states.wait_until(lambda: tids, "the thread runs")
        states.wait_until_blocked(os.getpid(), tids[0])
        conn.release()
        assert answer.result(delays.LONG) == "done"
        assert conn.acquire(timeout=delays.LONG)
