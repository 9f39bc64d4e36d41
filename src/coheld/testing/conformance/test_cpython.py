"""CPython's own tests of recursive locks, run against a Lockable: a definition of behaviour that others wrote.

They come with the running Python, in its package `test`. Where that is missing, collecting this file fails, and says
so. COHELD_BACKEND chooses the backend, as everywhere.
"""

import functools
import itertools
import unittest
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from coheld import Lockable, Semaphore
from coheld.testing.contract.observe import CAPABILITIES, where
from coheld.testing.support import delays

try:
    from test import _test_multiprocessing, lock_tests
except ImportError as error:
    raise ImportError("this Python comes without CPython's tests (Debian: libpython3-testsuite)") from error

_numbers = itertools.count()


def named() -> Lockable:
    """A lock with a name of its own."""
    return Lockable(lock_name=f"conformance-{next(_numbers)}")


MAKERS: dict[str, Callable[[], object]] = {
    "anonymous": Lockable,
    "named": named,
    "__lock__": lambda: Lockable().__lock__,
}


def permits(value: int = 1, name: str | None = None) -> Semaphore:
    """A semaphore whose threads, which it has where a store has it, run before the suite counts threads."""
    semaphore = Semaphore(value, name)
    if not CAPABILITIES.files:
        for _ in range(value):
            semaphore.acquire()
        assert not semaphore.acquire(timeout=delays.TICK)
        semaphore.release(value)
    return semaphore


PERMITS: dict[str, Callable[..., object]] = {
    "anonymous": permits,
    "named": lambda value=1: permits(value, f"conformance-{next(_numbers)}"),
}

SUITES: dict[str, type] = {
    "threading": lock_tests.RLockTests,
    "multiprocessing": _test_multiprocessing._TestLock,
    "semaphore": lock_tests.BoundedSemaphoreTests,
}

RECURSIVE = ("threading", "multiprocessing")

DISPLAY = "what repr says is each class's own; ours names the resource and the holder"
TIMEOUT = "another rule: a timeout of zero or less tries once, and one beside blocking=False is not looked at"
PRIVATE = "a private helper of threading.Condition, which a Lockable does not put into the user's namespace"
LOCKED = "a Lockable puts acquire and release into the user's namespace, and no more: coheld.holder answers it"
PLAIN = "about a lock that is not recursive"

EXCEPTED = {
    "threading.test_repr": DISPLAY,
    "threading.test_locked_repr": DISPLAY,
    "threading.test__is_owned": PRIVATE,
    "threading.test_recursion_count": PRIVATE,
    "threading.test_release_save_unacquired": PRIVATE,
    "threading.test_timeout": TIMEOUT,
    "threading.test_locked": LOCKED,
    "threading.test_locked_with_2threads": LOCKED,
    "semaphore.test_repr": DISPLAY,
    "semaphore.test_acquire_timeout": TIMEOUT,
    "multiprocessing.test_lock": PLAIN,
    "multiprocessing.test_repr_lock": DISPLAY,
    "multiprocessing.test_repr_rlock": DISPLAY,
    "multiprocessing.test_lock_locked_2processes": LOCKED,
    "multiprocessing.test_rlock_locked_2processes": LOCKED,
}
"""What does not apply, and why. Some exist in some versions of Python only. One that passes after all is a failure."""


def bound(suite: type, make: Callable[..., object]) -> type[unittest.TestCase]:
    """The suite, asking for its locks and semaphores here."""
    members = dict.fromkeys(("locktype", "semtype", "Lock", "RLock"), staticmethod(make))
    bases = (suite,) if issubclass(suite, unittest.TestCase) else (suite, unittest.TestCase)  # some are mixins
    return type(suite.__name__, bases, {**members, "TYPE": "processes"})


def names_of(suite: str) -> list[str]:
    return [f"{suite}.{name}" for name in unittest.TestLoader().getTestCaseNames(SUITES[suite])]


def marked(name: str) -> object:
    marks = [pytest.mark.xfail(reason=EXCEPTED[name], raises=AssertionError)] if name in EXCEPTED else []
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("name", [marked(name) for suite in RECURSIVE for name in names_of(suite)])
def test_what_cpython_asks_of_a_recursive_lock(name: str, make: Callable[[], object]) -> None:
    suite, _, method = name.partition(".")
    with Lockable():  # a store has a thread of this process from now on, and no test waits for its end
        pass
    case = bound(SUITES[suite], make)(method)
    with ThreadPoolExecutor(1) as pool:  # some of them end with a lock held: an owner's death, in a thread that ends
        pool.submit(functools.partial(succeed, case)).result(delays.HANG)


def succeed(case: unittest.TestCase) -> None:
    """Run it; fail with its own traceback."""
    result = unittest.TestResult()
    case.run(result)
    assert not result.skipped, result.skipped
    assert result.wasSuccessful(), "\n".join(text for _, text in result.errors + result.failures)
    assert result.testsRun == 1


@pytest.mark.parametrize(
    "make",
    [PERMITS["anonymous"], pytest.param(PERMITS["named"], marks=where("semaphores"))],
    ids=PERMITS,
)
@pytest.mark.parametrize("name", [marked(name) for name in names_of("semaphore")])
def test_what_cpython_asks_of_a_bounded_semaphore(name: str, make: Callable[[int], object]) -> None:
    succeed(bound(SUITES["semaphore"], make)(name.partition(".")[2]))


@pytest.mark.parametrize("suite", SUITES)
def test_there_is_something_to_run(suite: str) -> None:
    assert len(set(names_of(suite)) - set(EXCEPTED)) >= {"threading": 10, "multiprocessing": 2, "semaphore": 10}[suite]


class Unfair:
    """Not recursive and not exclusive: what CPython's tests must complain of."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        return True

    def release(self) -> None:
        pass


@pytest.mark.parametrize(
    "name", ["threading.test_try_acquire_contended", "threading.test_release_unacquired", "multiprocessing.test_rlock"]
)
def test_the_binding_sees_what_is_wrong(name: str) -> None:
    with pytest.raises(AssertionError):
        test_what_cpython_asks_of_a_recursive_lock(name, Unfair)
