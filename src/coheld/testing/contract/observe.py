"""What the contract tests ask of a lock, from outside: by another thread, which owns nothing."""

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

import pytest

from coheld import NotOwnerError, native
from coheld.backends import backend_of, default, of_scheme
from coheld.testing.support import delays

T = TypeVar("T")

URL = default()
"""The backend that these tests run on, and what it can."""
BACKEND = backend_of(None)
CAPABILITIES = BACKEND.CAPABILITIES
LOCAL = BACKEND if CAPABILITIES.files else of_scheme("file" if native.missing else "shm")
"""That of its files on this machine: of its locks, or of those by which the processes of a host agree first."""


def where(capability: str) -> pytest.MarkDecorator:
    """For tests of what a backend either has or refuses, which test_capabilities.py sees to."""
    return pytest.mark.skipif(not getattr(CAPABILITIES, capability), reason=f"{URL} declares {capability}=False")


def label_of(name: str) -> str:
    """What messages call the lock of that name."""
    return repr(name) if CAPABILITIES.files else f"{name!r} at {BACKEND.named(name).where}"


OTHER_URL = "shm:" if URL == "file:" else "file:"


class Lock(Protocol):
    """A Lockable, or its ``__lock__``."""

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool: ...

    def release(self) -> None: ...


def elsewhere(call: Callable[[], T]) -> T:
    """What `call()` returns or raises in another thread; it has delays.LONG for it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(delays.LONG)


def _attempt(lock: Lock) -> bool:
    if got := lock.acquire(blocking=False):
        lock.release()
    return got


def is_free(lock: Lock) -> bool:
    """Can another thread have it now?"""
    return elsewhere(lambda: _attempt(lock))


def give_all_back(lock: Lock) -> None:
    """What an interrupt may have left with this thread, which has it, and releases it until it has it no more."""
    assert lock.acquire(timeout=delays.LONG)
    with suppress(NotOwnerError):
        while True:
            lock.release()


@contextmanager
def held_elsewhere(lock: Lock) -> Iterator[int]:
    """Another thread of this process holds it meanwhile; gives that thread's number."""
    holding, let_go, tids = threading.Event(), threading.Event(), []

    def hold() -> None:
        assert lock.acquire(timeout=delays.LONG)
        tids.append(threading.get_native_id())
        holding.set()
        let_go.wait(delays.HANG)
        lock.release()

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        try:
            assert holding.wait(delays.LONG), "the other thread has the lock"
            yield tids[0]
        finally:
            let_go.set()
            held.result(delays.LONG)


def in_a_thread_of_its_own(test: Callable[[], None]) -> Callable[[], None]:
    """Run a test in a thread that holds nothing yet: objects that earlier tests dropped while they were held count."""

    @functools.wraps(test)
    def run() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(test).result()

    return run
