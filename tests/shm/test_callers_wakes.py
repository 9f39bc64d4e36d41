"""Who waits for readers, or for a permit, is woken: bounded sleeps are for deaths alone, and would hide a wake that is
lost."""

import statistics
import time
from collections.abc import Callable

import pytest

from coheld import Lockable, Semaphore
from coheld.testing.support import procs

SLICE = 0.012  # s; no sleep of theirs is longer; who has just fallen asleep and is not woken sleeps for most of it
TIMES = 31
AGAIN = 8  # where a busy machine may have been slow


class Bed(Lockable):
    @Lockable.locked(exclusive=False)
    def read(self, inside: Callable[[], None]) -> None:
        inside()

    @Lockable.locked
    def write(self) -> float:
        return time.monotonic()


def write(link: procs.Link, bed: Bed) -> None:
    while link.hear() == "go":
        link.say(bed.write())


def take(link: procs.Link, semaphore: Semaphore) -> None:
    while link.hear() == "go":
        with semaphore:
            link.say(time.monotonic())


def reading(bed: Bed, inside: Callable[[], None]) -> None:
    bed.read(inside)


def having(semaphore: Semaphore, inside: Callable[[], None]) -> None:
    with semaphore:
        inside()


@pytest.mark.parametrize(
    ("make", "wait", "have"), [(Bed, write, reading), (lambda: Semaphore(1), take, having)], ids=["readers", "permits"]
)
def test_who_waits_is_woken(
    make: Callable[[], object], wait: Callable[..., None], have: Callable[[object, Callable[[], None]], None]
) -> None:
    thing = make()
    left = 0.0

    def until_it_sleeps() -> None:
        nonlocal left
        worker.tell("go")
        worker.wait_until_blocked()
        left = time.monotonic()

    def one() -> float:
        have(thing, until_it_sleeps)
        entered: float = worker.hear()
        return entered - left

    with procs.start(wait, thing) as worker:
        assert any(statistics.median(one() for _ in range(TIMES)) < SLICE / 4 for _ in range(AGAIN))
        worker.tell("end")
