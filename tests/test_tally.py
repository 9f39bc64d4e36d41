"""The register of a lock of files, where a signal's handler comes in the middle of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coheld import PermitError, Semaphore
from coheld.backends.tally import Tally

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
