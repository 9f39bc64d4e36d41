"""What a backend declares, asserted both ways where no other file does it: how its waiters wait, and if tasks own."""

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coheld import IncompatibleError, Lockable, Pool, Semaphore, ensure_held, lost, token
from coheld.backends.base import Capabilities
from coheld.testing.contract.observe import CAPABILITIES, URL, is_free
from coheld.testing.support import delays, procs, states


class Bed(Lockable):
    @Lockable.locked
    async def use(self) -> bool:
        return is_free(self)

    @Lockable.locked(exclusive=False)
    def look(self) -> bool:
        return is_free(self)

    @Lockable.locked(exclusive=False)
    async def look_later(self) -> bool:
        return is_free(self)


def test_they_are_declared() -> None:
    assert isinstance(CAPABILITIES, Capabilities)


def take(link: procs.Link, bed: Bed) -> None:
    link.wait_for("go")
    with bed:
        link.say("got it")


def sleeps_of(pid: int) -> int:
    """How often its main thread has gone to sleep so far."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", text, re.MULTILINE)[0])


def test_who_waits_sleeps_or_looks_again_as_declared() -> None:
    bed, few = Bed(), 5
    with procs.start(take, bed) as waiter:
        with bed:
            waiter.tell("go")
            waiter.wait_until_blocked()
            before, since = sleeps_of(waiter.pid), time.monotonic()
            if CAPABILITIES.wakes_without_polling:
                states.wait_until(lambda: time.monotonic() > since + delays.MEDIUM, "the time is over")
                assert sleeps_of(waiter.pid) <= before + few * delays.SCALE
            else:
                states.wait_until(lambda: sleeps_of(waiter.pid) > before + few, "it looks again")
        waiter.expect("got it")


LOOKS: list[Callable[[Bed], bool]] = [Bed.look, lambda bed: asyncio.run(bed.look_later())]


@pytest.mark.parametrize("look", LOOKS, ids=["a call", "a task"])
def test_there_are_reading_calls_or_they_are_refused_as_declared(look: Callable[[Bed], bool]) -> None:
    bed = Bed()
    if CAPABILITIES.readers:
        assert not look(bed)
    else:
        with pytest.raises(IncompatibleError, match="no reading calls"):
            look(bed)
    assert is_free(bed)


NAMED: list[Callable[[], object]] = [
    lambda: Semaphore(2, name="x"),
    lambda: Semaphore(2, name="x", backend=URL),
    lambda: Pool(["a", "b"], name="x"),
]


@pytest.mark.parametrize("make", NAMED, ids=["semaphore", "semaphore of a URL", "pool"])
def test_semaphores_and_pools_have_names_or_are_refused_as_declared(make: Callable[[], object]) -> None:
    if CAPABILITIES.semaphores:
        assert make()
    else:
        with pytest.raises(IncompatibleError, match=r"'x'.*local so far"):
            make()


def test_semaphores_and_pools_without_a_name_are_always_there() -> None:
    with Semaphore(2), Pool(["a", "b"]).lease() as leased:
        assert leased == "a"


def test_a_lock_has_a_token_and_may_be_lost_or_is_held_for_good_as_declared() -> None:
    bed = Bed()
    if CAPABILITIES.leases:
        tokens = []
        for _ in range(3):
            with bed:
                tokens.append(token(bed))
        assert tokens == sorted(set(tokens))
    else:
        with bed, pytest.raises(IncompatibleError, match="not a fencing token"):
            token(bed)
    with bed:
        ensure_held(bed)
        assert not lost(bed)


def take_in_turn(link: procs.Link, bed: Bed, rounds: int) -> list[int]:
    link.say("ready")
    tokens = []
    for _ in range(rounds):
        with bed:
            tokens.append(token(bed))
    return tokens


def test_a_grant_passes_among_the_processes_of_a_host_as_declared() -> None:
    """Those of one grant have all but their lowest bits in common."""
    if not CAPABILITIES.leases:
        assert not CAPABILITIES.cohorts
        return
    bed, rounds, tokens = Bed(), 50, []
    with procs.start(take_in_turn, bed, rounds) as one, procs.start(take_in_turn, bed, rounds) as other:
        with bed:
            for worker in (one, other):
                worker.expect("ready")
                worker.wait_until_blocked()
        tokens = [*one.result(), *other.result()]
    assert len(set(tokens)) == 2 * rounds
    assert (len({number >> 12 for number in tokens}) < 2 * rounds) == CAPABILITIES.cohorts
