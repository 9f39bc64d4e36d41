"""The promise of the reference, ``pyats.async_.synchronize.Lockable``: what its users rely on, line by line."""

import multiprocessing
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from coheld import Lockable, NotOwnerError, holder
from coheld.testing.contract.observe import elsewhere, held_elsewhere, is_free
from coheld.testing.support import delays, procs, states
from coheld.testing.support.exclusion import Exclusion

EXAMPLE = """
from coheld import Lockable

class MySharableClass(Lockable):

    def __init__(self):
        super().__init__()

    @Lockable.locked
    def do_work_one(self):
        return "one"

    @Lockable.locked
    def do_work_two(self):
        return self.do_work_one() + " and two"
"""

USE = """
import multiprocessing, threading
shared = MySharableClass()
worker = multiprocessing.get_context("fork").Process(target=shared.do_work_two)
worker.start()
worker.join()
thread = threading.Thread(target=shared.do_work_two)
thread.start()
thread.join()
print(shared.do_work_two(), worker.exitcode)
"""


class Shared(Lockable):
    """The reference's example with a critical section in it."""

    def __init__(self, exclusion: Exclusion | None = None) -> None:
        super().__init__()
        self.exclusion = exclusion

    @Lockable.locked
    def do_work_one(self, worker: int) -> None:
        assert self.exclusion is not None
        with self.exclusion.inside(worker):
            pass

    @Lockable.locked
    def do_work_two(self, worker: int) -> None:
        self.do_work_one(worker)

    @Lockable.locked
    def depth(self) -> int:
        return depth(self)

    @Lockable.locked
    def nested(self, levels: int) -> int:
        return self.nested(levels - 1) if levels > 1 else depth(self)

    @Lockable.locked
    def fail(self) -> None:
        raise KeyError("from inside")

    @Lockable.locked
    def give_away(self) -> str:
        self.release()
        return "given away"

    @Lockable.locked
    def give_away_and_fail(self) -> None:
        self.release()
        raise KeyError("from inside")


def depth(obj: object) -> int:
    """How many times the lock is held, by whomever."""
    return owner.depth if (owner := holder(obj)) else 0


def test_the_example_runs_but_for_its_import_line() -> None:
    assert procs.run(EXAMPLE + USE) == "one and two 0\n"


# ---- locked methods ----------------------------------------------------------------------------------------


def test_a_locked_method_holds_the_lock_while_it_runs_and_not_after() -> None:
    shared = Shared()
    assert shared.depth() == 1
    assert depth(shared) == 0 and is_free(shared)


def test_a_locked_method_may_call_another() -> None:
    shared = Shared()
    assert shared.nested(5) == 5
    assert depth(shared) == 0 and is_free(shared)


def test_an_exception_passes_and_the_lock_is_free() -> None:
    shared = Shared()
    with pytest.raises(KeyError, match="from inside"):
        shared.fail()
    assert is_free(shared)


def test_an_exception_inside_a_nested_call_gives_back_one_level() -> None:
    shared = Shared()
    with shared:
        with pytest.raises(KeyError, match="from inside"):
            shared.fail()
        assert depth(shared) == 1 and not is_free(shared)
    assert is_free(shared)


def test_a_locked_call_waits_for_the_holder() -> None:
    shared, tids = Shared(), []

    def call() -> int:
        tids.append(threading.get_native_id())
        return shared.depth()

    with ThreadPoolExecutor(1) as pool, shared:
        answer = pool.submit(call)
        states.wait_until(lambda: tids, "the thread runs")
        states.wait_until_blocked(os.getpid(), tids[0])
        assert not answer.done()
        shared.release()
        assert answer.result(delays.LONG) == 1
        assert shared.acquire(timeout=delays.LONG)


def test_methods_that_are_not_locked_do_not_wait() -> None:
    class Half(Lockable):
        def open(self) -> str:
            return "open"

    half = Half()
    with held_elsewhere(half):
        assert half.open() == "open"


def test_threads_are_inside_one_at_a_time(tmp_path: Path) -> None:
    shared = Shared(Exclusion(tmp_path))

    def work(worker: int) -> None:
        for _ in range(200):
            shared.do_work_two(worker)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert shared.exclusion is not None
    shared.exclusion.check(calls=800)


def call_often(link: procs.Link, shared: Shared, worker: int) -> None:
    for _ in range(200):
        shared.do_work_two(worker)


@pytest.mark.parametrize("method", procs.METHODS)
def test_processes_are_inside_one_at_a_time(tmp_path: Path, method: str) -> None:
    shared = Shared(Exclusion(tmp_path))
    with (
        procs.start(call_often, shared, 0, method=method),
        procs.start(call_often, shared, 1, method=method),
    ):
        pass
    assert shared.exclusion is not None
    shared.exclusion.check(calls=400)


def test_a_bound_locked_method_is_a_thread_target(tmp_path: Path) -> None:
    shared = Shared(Exclusion(tmp_path))
    thread = threading.Thread(target=shared.do_work_two, args=(3,))
    thread.start()
    thread.join(delays.LONG)
    assert shared.exclusion is not None
    shared.exclusion.check(calls=1)


@pytest.mark.parametrize("method", procs.METHODS)
def test_a_bound_locked_method_is_a_process_target(tmp_path: Path, method: str) -> None:
    shared = Shared(Exclusion(tmp_path))
    context: Any = multiprocessing.get_context(method)
    with shared:
        process = context.Process(target=shared.do_work_two, args=(3,))
        process.start()
        states.wait_until_blocked(process.pid)
    process.join(delays.LONG)
    assert process.exitcode == 0
    process.close()
    assert shared.exclusion is not None
    shared.exclusion.check(calls=1)


# ---- acquire, release, with --------------------------------------------------------------------------------


def test_acquire_and_release() -> None:
    shared = Shared()
    assert shared.acquire() is True
    assert not is_free(shared)
    shared.release()
    assert is_free(shared)


def test_release_returns_nothing() -> None:
    shared = Shared()
    shared.acquire()
    assert getattr(shared, "release")() is None  # noqa: B009  # typed as returning nothing


def test_acquire_is_false_while_another_has_it() -> None:
    shared = Shared()
    with held_elsewhere(shared):
        assert shared.acquire(blocking=False) is False
        assert shared.acquire(timeout=delays.SHORT) is False
    assert shared.acquire(blocking=False) is True
    shared.release()


def test_it_is_released_as_often_as_it_was_acquired() -> None:
    shared = Shared()
    for level in (1, 2, 3):
        assert shared.acquire()
        assert depth(shared) == level
    for left in (2, 1):
        shared.release()
        assert depth(shared) == left and not is_free(shared)
    shared.release()
    assert is_free(shared)
    with pytest.raises(NotOwnerError):
        shared.release()


def test_acquire_with_and_locked_calls_are_levels_of_one_lock() -> None:
    shared = Shared()
    assert shared.acquire()
    with shared:
        assert shared.depth() == 3
    shared.release()
    assert is_free(shared)


def test_with_gives_the_object_and_lets_exceptions_pass() -> None:
    shared = Shared()
    with pytest.raises(KeyError), shared as same:
        assert same is shared
        assert not is_free(shared)
        raise KeyError
    assert is_free(shared)


def test_a_bare_named_lock_is_one_lock() -> None:
    with Lockable(lock_name="gpu-0"):
        assert not is_free(Lockable(lock_name="gpu-0"))
        assert is_free(Lockable(lock_name="gpu-1"))
    assert is_free(Lockable(lock_name="gpu-0"))


def test_objects_without_a_name_have_locks_of_their_own() -> None:
    one, other = Shared(), Shared()
    with one:
        assert is_free(other)


def test_a_hidden_lock_answers_as_the_references_does() -> None:
    lock = Shared().__lock__
    assert lock.acquire(block=True, timeout=None) is True
    assert lock.acquire(block=False) is True
    lock.release()
    lock.release()
    with lock as same:
        assert same is lock and not is_free(lock)
    assert is_free(lock)


# ---- release by somebody else ------------------------------------------------------------------------------


def release_it(link: procs.Link, shared: Shared) -> None:
    with pytest.raises(NotOwnerError) as caught:
        shared.release()
    assert caught.value.owner is not None
    link.say(caught.value.owner.pid)


def test_a_free_lock_cannot_be_released() -> None:
    with pytest.raises(NotOwnerError, match="nobody holds it") as caught:
        Shared().release()
    assert caught.value.owner is None


@pytest.mark.parametrize("kind", [NotOwnerError, AssertionError, RuntimeError])
def test_another_thread_cannot_release(kind: type[Exception]) -> None:
    shared = Shared()
    with held_elsewhere(shared) as tid:
        with pytest.raises(kind) as caught:
            shared.release()
        assert isinstance(caught.value, NotOwnerError) and caught.value.owner is not None
        assert (caught.value.owner.pid, caught.value.owner.tid) == (os.getpid(), tid)
        assert str(caught.value.owner.pid) in str(caught.value)
        assert not is_free(shared)
    assert is_free(shared)


@pytest.mark.parametrize("method", procs.METHODS)
def test_another_process_cannot_release(method: str) -> None:
    shared = Shared()
    with shared, procs.start(release_it, shared, method=method) as worker:
        assert worker.hear() == os.getpid()
        assert depth(shared) == 1
    assert is_free(shared)


def test_the_message_names_the_method_that_holds_it() -> None:
    class Bed(Lockable):
        @Lockable.locked
        def book(self) -> str:
            with pytest.raises(NotOwnerError) as caught:
                elsewhere(self.release)
            return str(caught.value)

    message = Bed().book()
    assert "Bed.book" in message and str(os.getpid()) in message


def test_a_method_that_gave_its_lock_away_is_told_so() -> None:
    shared = Shared()
    with pytest.raises(NotOwnerError):
        shared.give_away()
    assert is_free(shared)


def test_what_a_method_raised_is_not_hidden_by_a_failing_release() -> None:
    shared = Shared()
    with pytest.raises(KeyError, match="from inside"):
        shared.give_away_and_fail()
    assert is_free(shared)


def test_leaving_with_fails_where_the_lock_was_given_away() -> None:
    shared = Shared()
    with pytest.raises(NotOwnerError) as caught, shared:
        shared.release()
        raise KeyError("from inside")
    assert isinstance(caught.value.__context__, KeyError)
    assert is_free(shared)


# ---- the same answers as multiprocessing.RLock, which the reference wraps -----------------------------------


OPERATIONS: dict[str, Callable[[Any], object]] = {
    "acquire(block=False)": lambda lock: lock.acquire(block=False),
    "acquire(False)": lambda lock: lock.acquire(False),
    "acquire(True, 0)": lambda lock: lock.acquire(True, 0),
    "acquire(True, -1)": lambda lock: lock.acquire(True, -1),
    "acquire(timeout=0)": lambda lock: lock.acquire(timeout=0),
    "release()": lambda lock: lock.release(),
    "release() again": lambda lock: lock.release(),
}


def outcome(operation: Callable[[Any], object], lock: object) -> str:
    try:
        return repr(operation(lock))
    except AssertionError:
        return "AssertionError"


def test_three_threads_see_what_they_see_on_a_multiprocessing_rlock(rng: random.Random) -> None:
    ours, theirs = Shared(), multiprocessing.RLock()
    threads = [ThreadPoolExecutor(1) for _ in range(3)]
    history = []
    for _ in range(2000):
        who, name = rng.randrange(3), rng.choice(list(OPERATIONS))
        operation = OPERATIONS[name]
        answers = [threads[who].submit(outcome, operation, lock).result(delays.LONG) for lock in (ours, theirs)]
        history.append(f"thread {who}: {name} -> {answers[0]}")
        assert answers[0] == answers[1], "\n".join(history[-20:])
    for thread in threads:
        thread.shutdown()
