"""What acquire, Lockable and its decorator take as arguments, and what they refuse."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from coheld import Lockable, LockTimeout, holder
from coheld.testing.contract.observe import URL, held_elsewhere, is_free
from coheld.testing.support import delays, states

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["the object", "its __lock__"])
def lock(request: pytest.FixtureRequest) -> Any:
    lockable = Lockable()
    return lockable if request.param == "the object" else lockable.__lock__


# ---- acquire -----------------------------------------------------------------------------------------------

TRIES_ONCE = {
    "acquire(False)": lambda lock: lock.acquire(False),
    "acquire(blocking=False)": lambda lock: lock.acquire(blocking=False),
    "acquire(block=False)": lambda lock: lock.acquire(block=False),
    "acquire(0)": lambda lock: lock.acquire(0),
    "acquire([])": lambda lock: lock.acquire([]),
    "acquire(None)": lambda lock: lock.acquire(None),
    "acquire(True, 0)": lambda lock: lock.acquire(True, 0),
    "acquire(True, -1)": lambda lock: lock.acquire(True, -1),
    "acquire(timeout=0)": lambda lock: lock.acquire(timeout=0),
    "acquire(timeout=-0.0)": lambda lock: lock.acquire(timeout=-0.0),
    "acquire(timeout=-0.5)": lambda lock: lock.acquire(timeout=-0.5),
    "acquire(timeout=-inf)": lambda lock: lock.acquire(timeout=-INF),
    "acquire(timeout=1e-12)": lambda lock: lock.acquire(timeout=1e-12),
    "acquire(False, None)": lambda lock: lock.acquire(False, None),
    "acquire(False, 3600)": lambda lock: lock.acquire(False, 3600),
    "acquire(blocking=False, timeout=inf)": lambda lock: lock.acquire(blocking=False, timeout=INF),
    "acquire(block=False, timeout=3600)": lambda lock: lock.acquire(block=False, timeout=3600),
}


@pytest.mark.parametrize("call", TRIES_ONCE.values(), ids=TRIES_ONCE)
def test_it_tries_once(lock: Any, call: Callable[[Any], object]) -> None:
    with held_elsewhere(lock):
        assert call(lock) is False
    assert call(lock) is True
    lock.release()
    assert is_free(lock)


GIVES_UP = {
    "acquire(True, SHORT)": lambda lock: lock.acquire(True, delays.SHORT),
    "acquire(timeout=SHORT)": lambda lock: lock.acquire(timeout=delays.SHORT),
    "acquire(1, SHORT)": lambda lock: lock.acquire(1, delays.SHORT),
    "acquire('yes', SHORT)": lambda lock: lock.acquire("yes", delays.SHORT),
    "acquire(block=True, timeout=SHORT)": lambda lock: lock.acquire(block=True, timeout=delays.SHORT),
    "acquire(timeout=Fraction)": lambda lock: lock.acquire(timeout=Fraction(delays.SHORT)),
    "acquire(timeout=Decimal)": lambda lock: lock.acquire(timeout=Decimal(delays.SHORT)),
}


@pytest.mark.parametrize("call", GIVES_UP.values(), ids=GIVES_UP)
def test_it_waits_for_the_time_and_gives_up(lock: Any, call: Callable[[Any], object]) -> None:
    with held_elsewhere(lock):
        begun = time.monotonic()
        assert call(lock) is False
        assert time.monotonic() - begun >= delays.SHORT
    assert call(lock) is True
    lock.release()
    assert is_free(lock)


WAITS = {
    "acquire()": lambda lock: lock.acquire(),
    "acquire(True)": lambda lock: lock.acquire(True),
    "acquire(block=True)": lambda lock: lock.acquire(block=True),
    "acquire(True, None)": lambda lock: lock.acquire(True, None),
    "acquire(timeout=None)": lambda lock: lock.acquire(timeout=None),
    "acquire(timeout=inf)": lambda lock: lock.acquire(timeout=INF),
    "acquire(timeout=1e300)": lambda lock: lock.acquire(timeout=1e300),
    "acquire(timeout=10**12)": lambda lock: lock.acquire(timeout=10**12),
    "acquire(timeout=LONG)": lambda lock: lock.acquire(timeout=delays.LONG),
    "acquire(timeout=int)": lambda lock: lock.acquire(timeout=int(delays.LONG)),
}


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS)
def test_it_waits_until_it_has_the_lock(lock: Any, call: Callable[[Any], object]) -> None:
    tids = []

    def take() -> object:
        tids.append(threading.get_native_id())
        got = call(lock)
        lock.release()
        return got

    with ThreadPoolExecutor(1) as pool:
        with held_elsewhere(lock):
            waiting = pool.submit(take)
            states.wait_until(lambda: tids, "the thread runs")
            states.wait_until_blocked(os.getpid(), tids[0])
        assert waiting.result(delays.LONG) is True


WRONG_TYPES = {
    "timeout='1'": lambda lock: lock.acquire(timeout="1"),
    "timeout=b'1'": lambda lock: lock.acquire(timeout=b"1"),
    "timeout=[]": lambda lock: lock.acquire(timeout=[]),
    "timeout=1j": lambda lock: lock.acquire(timeout=1j),
    "timeout=object()": lambda lock: lock.acquire(timeout=object()),
    "positional '1'": lambda lock: lock.acquire(True, "1"),
    "a third positional": lambda lock: lock.acquire(True, 1, True),
    "an unknown keyword": lambda lock: lock.acquire(wait=True),
    "blocking twice": lambda lock: lock.acquire(True, blocking=True),
    "release with an argument": lambda lock: lock.release(1),
}


@pytest.mark.parametrize("call", WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_wrong_arguments_are_a_type_error_and_take_nothing(lock: Any, call: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError):
        call(lock)
    assert is_free(lock)
    with lock:
        with pytest.raises(TypeError):
            call(lock)
        owner = lock.owner() if hasattr(lock, "owner") else holder(lock)
        assert owner is not None and owner.depth == 1


def test_nan_is_a_value_error(lock: Any) -> None:
    with pytest.raises(ValueError, match="NaN"):
        lock.acquire(timeout=NAN)
    with pytest.raises(ValueError, match="NaN"):
        lock.acquire(True, NAN)
    assert is_free(lock)


def test_what_is_too_large_for_a_number_of_seconds_is_a_value_error(lock: Any) -> None:
    with pytest.raises(ValueError, match="too large"):
        lock.acquire(timeout=10**400)
    with pytest.raises(ValueError, match="too large"):
        locked(timeout=-(10**400))
    assert is_free(lock)


class Broken:
    """A number that cannot be had."""

    def __float__(self) -> float:
        raise ZeroDivisionError

    def __bool__(self) -> bool:
        raise ZeroDivisionError


def test_what_an_argument_raises_passes_and_takes_nothing(lock: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        lock.acquire(timeout=Broken())
    with pytest.raises(ZeroDivisionError):
        lock.acquire(Broken())
    assert is_free(lock)


# ---- Lockable(…) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["gpu-0", "lab/bed-1", "..", ".", "/", "a b\tc\n", "%2e", "ß", "日本語", "🦊", "~", "x" * 255, "ü" * 127],
    ids=repr,
)
def test_any_text_up_to_255_bytes_is_a_name(name: str) -> None:
    one, other = Lockable(lock_name=name), Lockable(lock_name=name)
    with one:
        assert not is_free(other)
        assert is_free(Lockable(lock_name="another"))
    assert is_free(other)


def test_names_that_differ_are_locks_that_differ() -> None:
    names = ["a/b", "a_b", "a%2fb", "a%2Fb", "A/b", "a//b", "a/b/", " a/b", "é", "e\u0301"]
    locks = [Lockable(lock_name=name) for name in names]
    for lock in locks:
        with lock:
            assert [other for other in locks if not is_free(other)] == [lock]


@pytest.mark.parametrize("name", ["", "x" * 256, "ü" * 128, "\ud800", "a\0b"], ids=ascii)
def test_other_text_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Lockable(lock_name=name)


@pytest.mark.parametrize(
    "name", [b"gpu-0", 7, 1.5, ["gpu-0"], object()], ids=["bytes", "int", "float", "list", "object"]
)
def test_what_is_no_text_is_no_name(name: Any) -> None:
    with pytest.raises(TypeError):
        Lockable(lock_name=name)


def test_both_arguments_are_keywords() -> None:
    with pytest.raises(TypeError):
        Lockable("gpu-0")
    with pytest.raises(TypeError):
        Lockable(name="gpu-0")


def test_the_local_backend_can_be_named() -> None:
    with Lockable(lock_name="gpu-0", lock_backend=URL):
        assert not is_free(Lockable(lock_name="gpu-0"))


@pytest.mark.parametrize("url", ["", "nonsense", "nonsense:", "nonsense://host/0", "shm"])
def test_an_unknown_backend_is_a_value_error(url: str) -> None:
    with pytest.raises(ValueError, match="backend"):
        Lockable(lock_name="gpu-0", lock_backend=url)


def test_a_backend_that_is_no_text_is_a_type_error() -> None:
    wrong: Any = 7
    with pytest.raises(TypeError):
        Lockable(lock_name="gpu-0", lock_backend=wrong)


def test_a_backend_needs_a_name() -> None:
    with pytest.raises(TypeError, match="lock_name"):
        Lockable(lock_backend=URL)


# ---- @Lockable.locked(…) -----------------------------------------------------------------------------------

locked: Any = Lockable.locked


def test_locked_without_arguments_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="without parentheses"):
        locked()


@pytest.mark.parametrize("timeout", ["1", b"1", [], 1j, object()], ids=["str", "bytes", "list", "complex", "object"])
def test_a_timeout_of_the_wrong_type_shows_at_decoration(timeout: Any) -> None:
    with pytest.raises(TypeError, match="timeout"):
        locked(timeout=timeout)


def test_a_timeout_that_is_no_number_shows_at_decoration() -> None:
    with pytest.raises(ValueError, match="NaN"):
        locked(timeout=NAN)


@pytest.mark.parametrize("fn", [None, 7, "book", [], {}], ids=repr)
def test_what_cannot_be_called_cannot_be_locked(fn: Any) -> None:
    with pytest.raises(TypeError):
        locked(fn)
    with pytest.raises(TypeError):
        locked(timeout=1)(fn)


def test_options_are_keywords_and_known() -> None:
    with pytest.raises(TypeError):
        locked(len, 1)
    with pytest.raises(TypeError):
        locked(len, timeout=1)
    with pytest.raises(TypeError):
        locked(wait=1)


@pytest.mark.parametrize("timeout", [0, -1, -INF, delays.SHORT, Fraction(delays.SHORT)], ids=repr)
def test_a_call_that_does_not_get_the_lock_in_time_does_not_run(timeout: Any) -> None:
    calls = []

    class Bed(Lockable):
        @Lockable.locked(timeout=timeout)
        def book(self, who: str) -> str:
            calls.append(who)
            return who

    bed = Bed()
    with held_elsewhere(bed), pytest.raises(LockTimeout):
        bed.book("ann")
    assert calls == []
    assert bed.book("bob") == "bob" and calls == ["bob"]
    assert is_free(bed)


@pytest.mark.parametrize("timeout", [None, INF, 1e300, delays.LONG], ids=["None", "inf", "1e300", "LONG"])
def test_a_call_with_time_enough_waits(timeout: float | None) -> None:
    tids = []

    class Bed(Lockable):
        @Lockable.locked(timeout=timeout)
        def book(self) -> str:
            return "booked"

    bed = Bed()

    def call() -> str:
        tids.append(threading.get_native_id())
        return bed.book()

    with ThreadPoolExecutor(1) as pool:
        with held_elsewhere(bed):
            waiting = pool.submit(call)
            states.wait_until(lambda: tids, "the thread runs")
            states.wait_until_blocked(os.getpid(), tids[0])
        assert waiting.result(delays.LONG) == "booked"


def test_a_nested_call_does_not_wait_for_itself() -> None:
    class Bed(Lockable):
        @Lockable.locked(timeout=0)
        def book(self, times: int) -> int:
            return 1 + self.book(times - 1) if times else 0

    assert Bed().book(5) == 5
