"""Killed, or interrupted, between any two lines of a call that changes shared state: what is there then is the state
before or after, whole, and the next call goes on from it.  (At any instruction: tests/killsweep/test_state_sweep.py.)
"""

import zlib
from collections.abc import Callable
from functools import partial

import pytest

import coheld
from coheld import Lockable, shared
from coheld.mutex import remove
from coheld.testing.contract import killpoints, observe
from coheld.testing.state.things import Shelf
from coheld.testing.support import delays, effort, procs


class Ledger(Lockable):
    """Five fields that fit each other only after a whole call."""

    turns: int = shared(0)
    total: int = shared(0)
    lines: list[int] = shared(default_factory=list)
    data: bytes = shared(b"")
    checksum: int = shared(0)

    def size(self) -> int:
        return 100

    @Lockable.locked(atomic=True)
    def turn(self) -> None:
        self.turns += 1
        self.lines.append(self.turns * 7)
        self.total += self.turns * 7
        self.data = bytes([self.turns % 251]) * self.size()
        self.checksum = zlib.adler32(self.data)


class Growing(Ledger):
    """Each call needs a larger file."""

    def size(self) -> int:
        return 1000 * 4**self.turns


class Torn(Ledger):
    """Must not pass: the first half becomes visible before the second."""

    @Lockable.locked
    def turn(self) -> None:
        self.turns += 1
        self.__lock__._commit()
        self.lines.append(self.turns * 7)


def checked(ledger: Ledger) -> int:
    """How many turns the last commit has, if its fields fit."""
    found = coheld.snapshot(ledger)
    assert len(found.lines) == found.turns and sum(found.lines) == found.total, "torn"
    assert zlib.adler32(found.data) == found.checksum or not found.turns, "torn"
    return int(found.turns)


def turn(cls: type[Ledger]) -> None:
    cls(lock_name="ledger").turn()


def begin_anew(cls: type[Ledger], turns: int) -> None:
    remove("ledger")
    for _ in range(turns):
        turn(cls)


def go_on(cls: type[Ledger], turns: int) -> None:
    ledger = cls(lock_name="ledger")
    with ledger:
        assert ledger.turns == turns
    ledger.turn()
    assert checked(ledger) == turns + 1 and coheld.holder(ledger) is None


@pytest.mark.hang_limit(900)
@pytest.mark.parametrize(("cls", "before"), [(Ledger, 2), (Growing, 0)])
def test_a_kill_at_each_line(cls: type[Ledger], before: int) -> None:
    seen = []
    begin_anew(cls, before)
    for _ in killpoints.killed_at_each_line(partial(turn, cls)):
        turns = checked(cls(lock_name="ledger"))
        seen.append(turns - before)
        go_on(cls, turns)
        begin_anew(cls, before)
    assert effort.are_met(seen, {0, 1})


def test_a_torn_state_is_found() -> None:
    begin_anew(Torn, 0)
    with pytest.raises(AssertionError, match="torn"):
        for _ in killpoints.killed_at_each_line(partial(turn, Torn)):
            checked(Torn(lock_name="ledger"))


@pytest.mark.hang_limit(900)
@pytest.mark.parametrize("cls", [Ledger, Growing])
def test_an_interrupt_at_each_line(cls: type[Ledger]) -> None:
    begin_anew(cls, 1)

    def afterwards(_line: int) -> None:
        ledger = cls(lock_name="ledger")
        if not observe.CAPABILITIES.uninterruptible_entry:
            observe.give_all_back(ledger)
        assert coheld.holder(ledger) is None
        go_on(cls, checked(ledger))

    for _ in killpoints.interrupted_at_each_line(partial(turn, cls), afterwards):
        go_on(cls, checked(cls(lock_name="ledger")))
        begin_anew(cls, 1)


def put_one(shelf: Shelf) -> None:
    shelf.put("a")


def wait_a_moment(shelf: Shelf) -> None:
    with shelf, pytest.raises(coheld.LockTimeout):
        coheld.wait_for(shelf, lambda: shelf.items, timeout=delays.SHORT / 5)


def take(link: procs.Link, shelf: Shelf) -> list[str]:
    return [shelf.take(), shelf.take()]


@pytest.mark.hang_limit(900)
@pytest.mark.parametrize("action", [put_one, wait_a_moment])
def test_no_kill_strands_who_waits_for_a_guard(action: Callable[[Shelf], object]) -> None:
    """Of one who makes it true, or of another one who waits."""
    shelf = Shelf()
    for _ in killpoints.killed_at_each_line(partial(action, shelf)):
        with procs.start(take, shelf) as taker:
            taker.wait_until_blocked()
            shelf.put("b")
            shelf.put("c")
            assert len(taker.result()) == 2
        with shelf:
            shelf.items.clear()
