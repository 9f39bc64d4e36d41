"""Processes: however a lock travels to another one, it is the same lock, and a child owns nothing of its parent's."""

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pytest

from coheld import Lockable, NotOwnerError, Owner, holder, statistics
from coheld.testing.support import delays, procs, states
from coheld.testing.support.exclusion import Exclusion

every_method = pytest.mark.parametrize("method", procs.METHODS)


class Device(Lockable):
    """Its calls are watched by two detectors of overlap, which travel with it."""

    def __init__(self, exclusion: Exclusion, lock_name: str | None = None) -> None:
        super().__init__(lock_name=lock_name)
        self.exclusion = exclusion

    @Lockable.locked
    def use(self, worker: int = 0) -> int:
        with self.exclusion.inside(worker):
            return os.getpid()

    @Lockable.locked
    def run(self, body: Callable[[], Any]) -> Any:
        return body()


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(Exclusion(tmp_path))


# ---- workers -----------------------------------------------------------------------------------------------


def try_then_wait(link: procs.Link, obj: Lockable) -> None:
    """Tell what trying once gives and who holds it; then wait for it."""
    link.say((obj.acquire(blocking=False), holder(obj)))
    with obj:
        link.say("got it")
        link.wait_for("release")
    link.say("released")


def use_often(link: procs.Link, device: Device, worker: int, calls: int) -> None:
    link.say("ready")
    link.wait_for("go")
    for _ in range(calls):
        device.use(worker)


def hear_and_hold(link: procs.Link, inbox: Any) -> None:
    obj = inbox.get(timeout=delays.LONG)
    with obj:
        link.say("holding")
        link.wait_for("release")
    link.say("released")


def make_and_send(link: procs.Link, outbox: Any, lock_name: str | None) -> None:
    obj = Lockable(lock_name=lock_name)
    with obj:
        outbox.put(obj)
        link.say("holding")
        link.wait_for("release")
    link.say("released")
    link.wait_for("end")


def excluded_while(worker: procs.Worker, obj: Lockable) -> None:
    """The worker holds the lock now; it is had here once it has been told to release, and not before."""
    assert (owner := holder(obj)) and owner.pid == worker.pid
    assert not obj.acquire(blocking=False)
    assert not obj.acquire(timeout=delays.SHORT)
    worker.tell("release")
    worker.expect("released")
    assert obj.acquire(blocking=False)
    obj.release()


def waits_while_held_here(child: procs.Worker, obj: Lockable) -> None:
    """`child` runs try_then_wait, and this thread holds the lock."""
    tried, owner = child.hear()
    assert tried is False
    assert (owner.pid, owner.tid) == (os.getpid(), threading.get_native_id())
    child.wait_until_blocked()
    obj.release()
    child.expect("got it")
    excluded_while(child, obj)


# ---- as an argument ----------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("lock_name", [None, "bed/1"])
def test_an_argument_of_a_process_is_the_same_lock(device: Device, method: str, lock_name: str | None) -> None:
    """It is made in a process that already holds it: the child owns nothing, and can wait."""
    obj = Lockable(lock_name=lock_name)
    obj.acquire()
    with procs.start(try_then_wait, obj, method=method) as child:
        waits_while_held_here(child, obj)


@every_method
def test_calls_of_processes_never_overlap(device: Device, method: str) -> None:
    with ExitStack() as stack:
        start = [procs.start(use_often, device, number, 100, method=method) for number in range(4)]
        children = [stack.enter_context(one) for one in start]
        for child in children:
            child.expect("ready")
        for child in children:
            child.tell("go")
    device.exclusion.check(calls=400)
    assert statistics(device).acquisitions == 400


@every_method
def test_a_bound_locked_method_is_a_target(device: Device, method: str) -> None:
    with device:
        child = multiprocessing.get_context(method).Process(target=device.use, args=(1,))  # type: ignore[attr-defined]
        child.start()
        states.wait_until_blocked(child.pid)
        assert device.exclusion.made == 0
    child.join(delays.LONG)
    assert child.exitcode == 0
    child.close()
    device.exclusion.check(calls=1)


@every_method
def test_several_locks_travel_together(method: str) -> None:
    locks = [Lockable() for _ in range(3)]
    locks[1].acquire()
    with procs.start(try_each, {"locks": locks, "again": locks[1]}, method=method) as child:
        assert child.result() == [True, False, True]
    locks[1].release()


def try_each(link: procs.Link, sent: dict[str, Any]) -> list[bool]:
    assert sent["again"] is sent["locks"][1]
    return [lock.acquire(blocking=False) for lock in sent["locks"]]


# ---- pools, queues, executors ------------------------------------------------------------------------------


@every_method
def test_through_a_pool(device: Device, method: str) -> None:
    with multiprocessing.get_context(method).Pool(2) as pool:
        calls = [pool.map_async(device.use, range(8), chunksize=1), pool.starmap_async(use_it, [(device, 9)] * 8)]
        pids = [pid for call in calls for pid in call.get(delays.LONG)]
        pool.close()
        pool.join()
    assert os.getpid() not in pids
    device.exclusion.check(calls=16)


def use_it(device: Device, worker: int) -> int:
    return device.use(worker)


@every_method
def test_through_an_initializer_of_a_pool(device: Device, method: str) -> None:
    with multiprocessing.get_context(method).Pool(2, keep, (device,)) as pool:
        pool.map_async(use_the_kept_one, range(8), chunksize=1).get(delays.LONG)
        pool.close()
        pool.join()
    device.exclusion.check(calls=8)


kept: list[Device] = []


def keep(device: Device) -> None:
    kept.append(device)


def use_the_kept_one(worker: int) -> int:
    return kept[0].use(worker)


@every_method
def test_through_an_executor(device: Device, method: str) -> None:
    context = multiprocessing.get_context(method)
    device.acquire()
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        calls = [executor.submit(device.use, number) for number in range(4)]
        calls += [executor.submit(use_it, device, number) for number in range(4)]
        states.wait_until(lambda: len(blocked_descendants()) == 2, "both workers wait for us")
        assert device.exclusion.made == 0
        device.release()
        pids = {call.result(delays.LONG) for call in calls}
    assert os.getpid() not in pids
    device.exclusion.check(calls=8)


def blocked_descendants() -> list[int]:
    return [pid for pid in states.descendants(os.getpid()) if states.blocked(pid)]


@every_method
def test_through_a_queue(method: str) -> None:
    obj, queue = Lockable(), multiprocessing.get_context(method).Queue()
    with procs.start(hear_and_hold, queue, method=method) as child:
        queue.put(obj)
        child.expect("holding")
        excluded_while(child, obj)
    close(queue)


@every_method
@pytest.mark.parametrize("lock_name", [None, "made by a child"])
def test_a_lock_that_a_child_made_reaches_its_parent(method: str, lock_name: str | None) -> None:
    queue = multiprocessing.get_context(method).Queue()
    with procs.start(make_and_send, queue, lock_name, method=method) as child:
        obj = queue.get(timeout=delays.LONG)
        child.expect("holding")
        excluded_while(child, obj)
        child.tell("end")
    close(queue)
    obj.acquire()  # its maker has ended, and yet others can get to it
    with procs.start(try_then_wait, obj, method=method) as other:
        waits_while_held_here(other, obj)


def test_a_lock_that_one_child_made_reaches_another() -> None:
    queue = multiprocessing.get_context("spawn").Queue()
    with (
        procs.start(make_and_send, queue, None, method="spawn") as maker,
        procs.start(hear_and_wait, queue, method="spawn") as waiter,
    ):
        maker.expect("holding")
        waiter.wait_until_blocked(waiter.pid)
        maker.tell("release")
        waiter.expect("got it")
        maker.tell("end")
    close(queue)


def close(queue: Any) -> None:
    """End the queue's own thread."""
    queue.close()
    queue.join_thread()


def hear_and_wait(link: procs.Link, inbox: Any) -> None:
    with inbox.get(timeout=delays.LONG):
        link.say("got it")


# ---- pickles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_a_copy_in_the_same_process_is_the_same_lock(device: Device, pickler: Any) -> None:
    copy = pickler.loads(pickler.dumps(device))
    assert copy is not device
    with device:
        assert copy.acquire(blocking=False)  # the owner: one level more
        assert (owner := holder(device)) and owner.depth == 2
        device.release()
        assert (owner := holder(copy)) and owner.depth == 1
        device.acquire()
        copy.release()
    assert holder(copy) is None


BY_VALUE = """
import cloudpickle, os, sys
from coheld import Lockable

class Tool(Lockable):
    @Lockable.locked
    def use(self):
        return os.getpid()

tool = Tool(**eval(sys.argv[1]))
print(cloudpickle.dumps([tool.use, lambda: tool.use(), lambda: Tool.use(tool)]).hex())
with tool:
    print("holding")
    input()
print("released")
input()
"""


@pytest.mark.parametrize("arguments", [{}, {"lock_name": "tool"}])
def test_cloudpickle_ships_a_class_of_main_with_its_lock(arguments: dict[str, str]) -> None:
    with procs.program(BY_VALUE, repr(arguments)) as maker, ThreadPoolExecutor(3) as pool:
        calls = pickle.loads(bytes.fromhex(maker.hear()))
        maker.expect("holding")
        results = [pool.submit(call) for call in calls]
        tool = calls[0].__self__
        states.wait_until(lambda: statistics(tool).waiters == 3, "every call waits for the program")
        maker.tell("release")
        maker.expect("released")
        assert [result.result(delays.LONG) for result in results] == [os.getpid()] * 3
        assert statistics(tool).acquisitions == 4
        maker.tell("end")


LOADED = """
import pickle, sys
obj = pickle.load(open(sys.argv[1], "rb"))
print(obj.acquire(blocking=False))
with obj:
    print("holding")
    input()
print("released")
"""


@pytest.mark.parametrize("lock_name", [None, "bed"])
def test_a_pickle_in_a_file_reaches_an_unrelated_program(tmp_path: Path, lock_name: str | None) -> None:
    obj = Lockable(lock_name=lock_name)
    (tmp_path / "obj").write_bytes(pickle.dumps(obj))
    obj.acquire()
    with procs.program(LOADED, str(tmp_path / "obj")) as other:
        other.expect("False")
        other.wait_until_blocked()
        obj.release()
        other.expect("holding")
        excluded_while(other, obj)


# ---- unrelated programs ------------------------------------------------------------------------------------

NAMED = """
import sys
from coheld import Lockable
with Lockable(lock_name=sys.argv[1]):
    print("holding")
    input()
print("released")
"""


@pytest.mark.parametrize("name", ["gpu-0", "lab/bed-1", "../" * 3 + "x", "Prüfstand 7", "x" * 255])
def test_a_name_is_one_lock_for_all_programs_of_the_user(name: str) -> None:
    with procs.program(NAMED, name) as other:
        other.expect("holding")
        with Lockable(lock_name=name + "!" if len(name) < 255 else "y"):
            pass  # another name is another lock
        excluded_while(other, Lockable(lock_name=name))


COUNTED = """
import pickle, sys
exclusion, worker = pickle.loads(bytes.fromhex(sys.argv[1]))
from coheld import Lockable

class Own(Lockable):
    @Lockable.locked
    def use(self):
        with exclusion.inside(worker):
            pass

print("ready")
input()
own = Own(lock_name="counted")
for _ in range(200):
    own.use()
"""


def test_calls_of_unrelated_programs_never_overlap(tmp_path: Path) -> None:
    """None of them has the lock before they all begin: making it is a race as well."""
    exclusion = Exclusion(tmp_path)
    with ExitStack() as stack:
        arguments = [pickle.dumps((exclusion, worker)).hex() for worker in range(4)]
        programs = [stack.enter_context(procs.program(COUNTED, one)) for one in arguments]
        for program in programs:
            program.expect("ready")
        for program in programs:
            program.tell("go")
    exclusion.check(calls=800)
    assert statistics(Lockable(lock_name="counted")).acquisitions == 800


# ---- fork --------------------------------------------------------------------------------------------------


def fork_and_wait_for_its_end() -> int:
    """os.fork; the parent returns, with the child's number, once the child has ended."""
    if pid := os.fork():
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


def in_the_child(call: Callable[[], int]) -> Any:
    """What call() gives or raises in the child that it forks; in the parent it returns the child's number."""
    parent = os.getpid()
    reading, writing = os.pipe()
    try:
        outcome: Any = call()
    except BaseException as error:
        outcome = error
    if os.getpid() != parent:
        os.write(writing, cloudpickle.dumps(outcome))
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        report = file.read()
    assert isinstance(outcome, int), outcome
    assert os.waitpid(outcome, 0)[1] == 0
    return pickle.loads(report)


def test_a_forked_child_cannot_release(device: Device) -> None:
    def fork_and_release() -> int:
        if not (pid := fork_and_wait_for_its_end()):
            device.release()
        return pid

    with device:
        error = in_the_child(fork_and_release)
        assert isinstance(error, NotOwnerError) and isinstance(error, AssertionError)
        assert error.owner and error.owner.pid == os.getpid()
        assert str(os.getpid()) in str(error)
        assert (owner := holder(device)) and owner.depth == 1
    assert holder(device) is None


@pytest.mark.parametrize("depth", [1, 3])
def test_a_forked_child_does_not_hold_what_its_parent_holds(device: Device, depth: int) -> None:
    def fork_and_try() -> Any:
        if pid := fork_and_wait_for_its_end():
            return pid
        return device.acquire(blocking=False), device.acquire(timeout=delays.SHORT), holder(device)

    for _ in range(depth):
        device.acquire()
    at_once, in_time, owner = in_the_child(fork_and_try)
    assert (at_once, in_time) == (False, False)
    assert (owner.pid, owner.tid, owner.depth) == (os.getpid(), threading.get_native_id(), depth)
    for _ in range(depth):
        device.release()
    assert holder(device) is None


def test_a_child_that_returns_from_its_parents_call_is_told(device: Device) -> None:
    error = in_the_child(lambda: device.run(fork_and_wait_for_its_end))
    assert isinstance(error, NotOwnerError)
    assert error.owner and (error.owner.pid, error.owner.method) == (os.getpid(), "Device.run")
    assert holder(device) is None
    assert device.use() == os.getpid()


def test_a_child_that_returns_after_its_parent_is_told_too(device: Device) -> None:
    """The lock is free by then; nobody may take the child's silence for a release."""
    reading, writing = os.pipe()

    def fork_and_return_late() -> int:
        if not (pid := os.fork()):
            os.read(reading, 1)
        return pid

    def call() -> int:
        pid: int = device.run(fork_and_return_late)
        if pid:
            os.write(writing, b"!")
        return pid

    error = in_the_child(call)
    assert isinstance(error, NotOwnerError) and error.owner is None
    os.close(reading)
    os.close(writing)


def test_an_exception_of_the_child_in_its_parents_call_is_kept(device: Device) -> None:
    def fork_and_fail() -> int:
        if not (pid := fork_and_wait_for_its_end()):
            raise LookupError("the child's own")
        return pid

    error = in_the_child(lambda: device.run(fork_and_fail))
    assert isinstance(error, LookupError) and error.args == ("the child's own",)
    assert holder(device) is None
    assert device.use() == os.getpid()


def test_a_child_that_leaves_its_parents_with_is_told(device: Device) -> None:
    def fork_in_with() -> int:
        with device:
            return fork_and_wait_for_its_end()

    assert isinstance(in_the_child(fork_in_with), NotOwnerError)
    assert holder(device) is None


def test_a_child_that_leaves_its_parents_call_can_use_the_lock_from_then_on(device: Device) -> None:
    """Its own calls wait as anybody's, and exclude its parent."""

    def leave(link: procs.Link, device: Device) -> None:
        with pytest.raises(NotOwnerError):
            device.release()
        try_then_wait(link, device)

    device.acquire()
    with procs.start(leave, device) as child:
        waits_while_held_here(child, device)


@pytest.mark.parametrize("forks", [1, 2])
def test_a_child_forked_while_another_thread_holds_it(device: Device, forks: int) -> None:
    """The other thread does not exist in the child; its lock does."""
    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        with device:
            holding.set()
            release.wait(delays.LONG)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holding.wait(delays.LONG)
    with procs.start(try_below, device, forks) as child:
        tried, owner = child.hear()
        assert tried is False
        assert (owner.pid, owner.tid) == (os.getpid(), thread.native_id)
        pid = child.hear()
        states.wait_until_blocked(pid)
        release.set()
        child.expect("got it")
    thread.join(delays.LONG)


def try_below(link: procs.Link, device: Device, forks: int) -> None:
    """In a child of a child …: try, and wait."""
    if forks > 1:
        with procs.start(try_below, device, forks - 1) as child:
            for _ in range(3):
                link.say(child.hear())
        return
    link.say((device.acquire(blocking=False), holder(device)))
    link.say(os.getpid())
    with device:
        link.say("got it")


def test_a_child_forked_while_another_thread_waits(device: Device) -> None:
    """The wait stays its parent's: the child neither waits nor is served in its place."""
    device.acquire()
    thread = threading.Thread(target=device.use)
    thread.start()
    states.wait_until_blocked(os.getpid(), thread.native_id)
    with procs.start(try_then_wait, device) as child:
        tried, _ = child.hear()
        assert tried is False
        child.wait_until_blocked()
        states.wait_until(lambda: statistics(device).waiters == 2, "both wait")
        device.release()
        child.expect("got it")
        child.tell("release")
        child.expect("released")
    thread.join(delays.LONG)
    assert device.exclusion.made == 1
    assert statistics(device).waiters == 0


def test_what_a_child_and_its_parent_make_after_the_fork_are_different_locks() -> None:
    """Both have inherited the same list of free cells."""
    Lockable()  # gone at once: a cell to be used again
    before = Lockable()
    with procs.start(make_and_hold, 8) as child:
        child.expect("holding")
        here = [before, *(Lockable() for _ in range(8))]
        assert [one.acquire(blocking=False) for one in here] == [True] * 9
        child.tell("release")
        for one in here:
            one.release()


def make_and_hold(link: procs.Link, count: int) -> None:
    locks = [Lockable() for _ in range(count)]
    assert [one.acquire(blocking=False) for one in locks] == [True] * count
    link.say("holding")
    link.wait_for("release")
    for one in locks:
        one.release()


def test_a_lock_that_a_child_inherited_is_not_given_to_another_object_here() -> None:
    """Its object here is gone, the child's is not."""
    inherited = [Lockable() for _ in range(8)]
    with procs.start(hold_all_when_told, inherited) as child:
        child.expect("ready")
        del inherited
        fresh = [Lockable() for _ in range(8)]
        child.tell("hold")
        child.expect("holding")
        assert [one.acquire(blocking=False) for one in fresh] == [True] * 8
        child.tell("release")
        for one in fresh:
            one.release()


def hold_all_when_told(link: procs.Link, locks: list[Lockable]) -> None:
    link.say("ready")
    link.wait_for("hold")
    for one in locks:
        one.acquire()
    link.say("holding")
    link.wait_for("release")
    for one in locks:
        one.release()


class Forking(Lockable):
    """Its recovery forks, as a hook that starts a program may do."""

    def __init__(self, in_child: Callable[[], object]) -> None:
        super().__init__()
        self.in_child = in_child
        self.forked = 0

    def __recover__(self, dead: Owner) -> None:
        self.forked = fork_and_wait_for_its_end()
        if not self.forked:
            self.in_child()

    @Lockable.locked
    def run(self) -> int:
        if not self.forked:
            raise RuntimeError("the body runs in the child")
        return self.forked


def test_a_child_that_returns_from_its_parents_recovery_does_not_go_on_to_the_body() -> None:
    obj = Forking(bool)
    die_holding(obj)
    assert type(in_the_child(obj.run)) is NotOwnerError
    assert holder(obj) is None


def test_a_child_that_failed_in_its_parents_recovery_leaves_the_parent_its_lock() -> None:
    """Its failure takes no level off its parent's hold, and the child is fit to lock what is its own."""
    obj, owners = Forking(fail), []

    def look() -> int:
        try:
            with obj:
                owners.append(holder(obj))
                return obj.forked
        except LookupError:
            with Lockable():
                raise

    die_holding(obj)
    assert type(in_the_child(look)) is LookupError
    assert owners[0] and owners[0].depth == 1


def fail() -> None:
    raise LookupError("the child's own")


def die_holding(obj: Lockable) -> None:
    """Let a process be killed while it holds the lock."""
    with procs.start(hold_until_killed, obj) as worker:
        worker.expect("holding")
        worker.kill()


def hold_until_killed(link: procs.Link, obj: Lockable) -> None:
    obj.acquire()
    link.say("holding")
    link.wait_for("never")
