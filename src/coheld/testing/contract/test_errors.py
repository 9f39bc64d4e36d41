"""Every error: its bases, its fields, that it travels, and that its message says what, who, and what to do."""

import copy
import inspect
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

import coheld
from coheld import (
    BackendError,
    CoheldError,
    DeadlockError,
    IncompatibleError,
    InsecureError,
    LeaseLostError,
    Lockable,
    LockTimeout,
    NotInitializedError,
    NotLockedError,
    NotOwnerError,
    Owner,
    PermitError,
    StateError,
    TooManyLocksError,
)
from coheld.testing.contract.observe import CAPABILITIES, elsewhere, held_elsewhere, is_free, label_of
from coheld.testing.support import delays, procs

BASES: dict[type[CoheldError], tuple[type[BaseException], ...]] = {
    CoheldError: (Exception,),
    NotOwnerError: (AssertionError, RuntimeError),
    NotInitializedError: (RuntimeError,),
    TooManyLocksError: (RuntimeError,),
    DeadlockError: (RuntimeError,),
    PermitError: (ValueError,),
    NotLockedError: (RuntimeError,),
    StateError: (ValueError,),
    LeaseLostError: (RuntimeError,),
    LockTimeout: (TimeoutError, OSError),
    IncompatibleError: (RuntimeError,),
    InsecureError: (PermissionError, OSError),
    BackendError: (ConnectionError, OSError),
}
PUBLIC = [thing for name in coheld.__all__ if inspect.isclass(thing := getattr(coheld, name))]
ERRORS = [thing for thing in PUBLIC if issubclass(thing, BaseException)]
OWNER = Owner(pid=7, start=11, tid=8, method="Bed.book", since=1.5, depth=2)

every_error = pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: str(kind.__name__))


def fields(error: CoheldError) -> tuple[object, ...]:
    return type(error), error.args, str(error), error.resource, error.owner, error.waited


# ---- what they are -----------------------------------------------------------------------------------------


@every_error
def test_it_is_a_coheld_error_and_the_builtin_that_fits(kind: type[CoheldError]) -> None:
    assert issubclass(kind, CoheldError)
    for base in BASES[kind]:
        assert issubclass(kind, base)


@every_error
def test_only_what_it_says_catches_it(kind: type[CoheldError]) -> None:
    others = {AssertionError, RuntimeError, OSError, ValueError, AttributeError, TypeError, LookupError}
    assert {base for base in others if issubclass(kind, base)} == others.intersection(BASES[kind])


@every_error
def test_it_is_shown_under_its_public_name(kind: type[CoheldError]) -> None:
    assert f"{kind.__module__}.{kind.__qualname__}" == f"coheld.{kind.__name__}"
    assert inspect.getdoc(kind)


@every_error
def test_its_fields_are_optional_keywords(kind: type[CoheldError]) -> None:
    assert fields(kind("text")) == (kind, ("text",), "text", None, None, None)
    full = kind("text", resource="it", owner=OWNER, waited=0.5)
    assert fields(full) == (kind, ("text",), "text", "it", OWNER, 0.5)
    positional: Any = kind
    with pytest.raises(TypeError):
        positional("text", "it")


# ---- they travel -------------------------------------------------------------------------------------------


@every_error
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_pickles_with_its_fields(kind: type[CoheldError], protocol: int) -> None:
    error = kind("text", resource="it", owner=OWNER, waited=0.5)
    error.add_note("a note")
    loaded = pickle.loads(pickle.dumps(error, protocol))
    assert fields(loaded) == fields(error) and loaded.__notes__ == ["a note"]


@every_error
def test_it_copies_with_its_fields(kind: type[CoheldError]) -> None:
    error = kind("text", resource="it", owner=OWNER, waited=0.5)
    assert fields(copy.copy(error)) == fields(copy.deepcopy(error)) == fields(error)


def fail_to_release(bed: Lockable) -> None:
    bed.release()


def test_a_real_one_comes_back_from_a_pool() -> None:
    bed = Lockable()
    with bed, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        failed = pool.submit(fail_to_release, bed)
        with pytest.raises(NotOwnerError) as caught:
            failed.result(delays.LONG)
    assert caught.value.owner is not None and caught.value.owner.pid == os.getpid()
    assert caught.value.resource is not None


# ---- what they say -----------------------------------------------------------------------------------------


class Bed(Lockable):
    @Lockable.locked
    def hold(self, then: Callable[[], object]) -> object:
        return then()

    @Lockable.locked(timeout=delays.SHORT)
    def hurry(self) -> None: ...


def test_not_owner_says_what_who_and_by_whom_it_is_held() -> None:
    bed = Bed(lock_name="lab/bed-1")
    with held_elsewhere(bed) as tid, pytest.raises(NotOwnerError) as caught:
        bed.release()
    error, message = caught.value, str(caught.value)
    label = label_of("lab/bed-1")
    assert error.resource == label and error.owner is not None
    assert (error.owner.pid, error.owner.tid) == (os.getpid(), tid)
    assert label in message and str(threading.get_native_id()) in message
    assert f"held by process {os.getpid()}" in message


def test_not_owner_names_the_thread_of_this_process() -> None:
    bed, free = Bed(), threading.Event()
    started = threading.Event()

    def hold() -> None:
        with bed:
            started.set()
            free.wait(delays.HANG)

    thread = threading.Thread(target=hold, name="night-shift")
    thread.start()
    assert started.wait(delays.LONG)
    with pytest.raises(NotOwnerError, match="night-shift"):
        bed.release()
    free.set()
    thread.join()


def test_a_timeout_says_what_who_how_long_and_in_which_method() -> None:
    bed = Bed(lock_name="lab/bed-1")

    def late() -> LockTimeout:
        with pytest.raises(LockTimeout) as caught:
            elsewhere(bed.hurry)
        return caught.value

    error: Any = bed.hold(late)
    assert (error.resource, error.waited, error.owner.method) == (label_of("lab/bed-1"), delays.SHORT, "Bed.hold")
    assert error.owner.pid == os.getpid() and error.owner.tid == threading.get_native_id()
    for word in (label_of("lab/bed-1"), f"{delays.SHORT:g} s", f"process {os.getpid()}", "Bed.hold"):
        assert word in str(error)


def test_an_anonymous_lock_has_a_name_too() -> None:
    bed = copy.deepcopy(Bed())  # which this machine's memory or files have
    with pytest.raises(NotOwnerError, match=r"anonymous lock (arena|cells)-.*: nobody holds it") as caught:
        bed.release()
    assert caught.value.resource is not None and caught.value.resource in str(caught.value)


def test_not_initialized_says_which_class_and_what_to_call() -> None:
    class Forgetful(Lockable):
        def __init__(self) -> None:
            pass

    with pytest.raises(NotInitializedError, match=r"Forgetful has no lock.*must call super\(\).__init__\(\)"):
        Forgetful().acquire()


def test_too_many_locks_says_how_many_and_changes_nothing() -> None:
    """Of a backend that has a limit; another holds as many."""
    most = CAPABILITIES.held_limit

    def exhaust() -> str:
        held: list[Lockable] = []
        with pytest.raises(TooManyLocksError) if most else nullcontext() as caught:
            for _ in range(2100 if most else 700):  # that many have a descriptor each
                one = Lockable()
                one.acquire()
                held.append(one)
        assert len(held) == (most or 700) and is_free(one) is bool(most)
        held[0].acquire()
        for lock in [held[0], *held]:
            lock.release()
        assert one.acquire(blocking=False)
        one.release()
        return str(caught.value) if caught else "no limit: 2000 locks; release some"

    message = elsewhere(exhaust)
    assert "2000 locks" in message and "release some" in message


def test_backend_error_says_that_the_lock_is_gone(gone: bytes) -> None:
    bed: Lockable = pickle.loads(gone)
    with pytest.raises(BackendError, match=r"the lock is gone: .*/(arena|cells)-.* was removed") as caught:
        bed.acquire()
    assert caught.value.resource is not None and caught.value.resource in str(caught.value)


@pytest.fixture
def gone() -> bytes:
    """A pickled lock whose process has ended."""
    return bytes.fromhex(procs.run("import coheld, pickle; print(pickle.dumps(coheld.Lockable()).hex())"))


def test_incompatible_says_what_is_damaged(coheld_dir: Path) -> None:
    Lockable(lock_name="it")
    (file,) = coheld_dir.glob("name-*")
    file.write_bytes(b"\0" * 4096)
    other = "import coheld, sys\ntry: coheld.Lockable(lock_name='it')\nexcept coheld.IncompatibleError as e: print(e)"
    assert str(file) in procs.run(other)


def test_insecure_says_what_is_wrong_with_the_place(coheld_dir: Path) -> None:
    procs.run("import coheld; coheld.Lockable(lock_name='it')")
    (file,) = coheld_dir.glob("name-*")
    file.chmod(0o666)
    with pytest.raises(InsecureError, match="can be written by other users") as caught:
        Lockable(lock_name="it")
    assert str(file) in str(caught.value) and caught.value.resource == str(file)
