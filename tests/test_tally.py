"""The register of a lock of files, where a signal's handler comes in the middle of it."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coheld import Lockable, PermitError, Semaphore
from coheld.backends.tally import Tally
from coheld.testing.support import delays

Interrupt = Callable[[str, Callable[[], Any]], None]


@pytest.fixture
def semaphore(coheld_dir: Path) -> Semaphore:
    return Semaphore(1, "licence", "file:")


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """The next call of that method of a register is followed, or (give) preceded, by a handler."""

    def interrupt(name: str, handler: Callable[[], Any]) -> None:
        method = getattr(Tally, name)

        def interrupted(self: Tally, *args: Any) -> Any:
            monkeypatch.setattr(Tally, name, method)
            if name == "give":
                handler()
            found = method(self, *args)
            if name != "give":
                handler()
            return found

        monkeypatch.setattr(Tally, name, interrupted)

    return interrupt


def test_a_handler_that_takes_the_last_permit_in_the_middle_of_a_try(
    semaphore: Semaphore, interrupt: Interrupt
) -> None:
    interrupt("free", lambda: semaphore.acquire(blocking=False))
    assert not semaphore.acquire(blocking=False)
    semaphore.release()
    with pytest.raises(PermitError):
        semaphore.release()


@pytest.mark.parametrize("name", ["free", "give"])
def test_a_handler_that_tries_in_vain_in_the_middle_of_another_try_or_a_release(
    semaphore: Semaphore, interrupt: Interrupt, name: str
) -> None:
    assert semaphore.acquire(blocking=False)
    got = []
    interrupt(name, lambda: got.append(semaphore.acquire(blocking=False)))
    if name == "free":
        assert not semaphore.acquire(blocking=False)
    else:
        semaphore.release()
    assert got == [False] and semaphore.free() == (name == "give")


def test_a_reading_call_that_two_threads_end_at_once_is_counted_out_once(
    coheld_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own, and one that has found its loop closed."""
    bed, both, leave = Lockable(lock_name="bed", lock_backend="file:"), threading.Barrier(2), Tally.leave
    with bed:
        one, other = bed.__lock__._read_on(), bed.__lock__._read_on()

    def leave_together(self: Tally, mark: Any) -> None:
        both.wait(delays.LONG)
        leave(self, mark)

    with monkeypatch.context() as patched:
        patched.setattr(Tally, "leave", leave_together)
        threads = [threading.Thread(target=one.leave) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(delays.LONG)
    assert [count for _, _, count in bed.__lock__.readers.counts()] == [1]
    other.leave()
    assert not bed.__lock__.readers.counts()
