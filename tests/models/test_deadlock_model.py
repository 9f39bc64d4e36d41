"""The model of the search for cycles: who is told is in one, and one is; and mutants that must fail."""

import pytest

from models.deadlock_model import NONE, Caller, Search, State, check, ended
from models.search import Violation, explore, explore_to_the_end


def crowd(*callers: Caller, locks: int = 3) -> State:
    return State(callers, truth=(NONE,) * locks, records=(NONE,) * locks)


def takes(*locks: int) -> tuple[tuple[str, int], ...]:
    """One inside of the other; given back in turn."""
    return (*(("take", lock) for lock in locks), *(("give", lock) for lock in reversed(locks)))


def caller(*locks: int, task: bool = False, handler: int = NONE, searches: bool = True) -> Caller:
    return Caller(takes(*locks), task=task, handler=handler, searches=searches)


HASTY = Caller((("take", 1), ("hurry", 0), ("give", 0), ("give", 1)))
TWICE = Caller((*takes(1), *takes(1, 2)), searches=False)
HURRIES = Caller((("take", 0), *takes(1), ("hurry", 1), ("give", 1), ("give", 0)), searches=False)
STARTS = {
    "two": crowd(caller(0, 1), caller(1, 0), locks=2),
    "tasks": crowd(caller(0, 1, task=True), caller(1, 0, task=True), locks=2),
    "in order": crowd(caller(0, 1), caller(0, 1), locks=2),
    "tasks in order": crowd(caller(0, 1, task=True), caller(0, 1, task=True), locks=2),
    "one is hasty": crowd(caller(0, 1), HASTY, locks=2),
    "one goes on": crowd(Caller((*takes(0), *takes(1))), caller(1, 0), locks=2),
    "a handler": crowd(caller(1, 0, searches=False, handler=2), caller(0, 2)),
    "one comes again in a hurry": crowd(TWICE, HURRIES, caller(2, 0)),
    "one comes again": crowd(TWICE, caller(0, 1, searches=False), caller(2, 0)),
}


@pytest.mark.parametrize("start", STARTS)
def test_who_is_told_is_in_a_cycle_and_every_cycle_ends(start: str) -> None:
    all_search = all(c.searches for c in STARTS[start].callers)
    end = ended if all_search else lambda _: True
    print(explore_to_the_end(STARTS[start], Search(ticks=all_search).successors, check, end), "states")


def test_a_cycle_of_three_ends_by_the_one_to_give_up() -> None:
    """Where time stands still it is always the same, so the others need not search."""
    start = crowd(caller(0, 1, searches=False), caller(1, 2, searches=False), caller(2, 0))
    print(explore_to_the_end(start, Search(ticks=0).successors, check, ended), "states")


@pytest.mark.parametrize("start", ["two", "tasks", "in order", "tasks in order", "one is hasty"])
def test_what_a_watcher_finds_was_a_cycle(start: str) -> None:
    still = STARTS[start]._replace(callers=tuple(c._replace(searches=False) for c in STARTS[start].callers))
    for watched in range(len(still.callers)):
        print(explore_to_the_end(still, Search(ticks=0, watcher=watched).successors, check, lambda _: True), "states")


@pytest.mark.parametrize(
    ("mutant", "start", "watcher"),
    [
        ("numbers are not read again", "one comes again", NONE),
        ("the number of the last wait", "one comes again in a hurry", NONE),
        ("owners are not read again", "one goes on", NONE),
        ("a handler has a lock in a wait", "a handler", NONE),
        ("no tie is broken", "two", NONE),
        ("a timed wait is an edge", "one is hasty", NONE),
        ("it waits and has it", "in order", 0),
        ("it waits and has it", "tasks in order", 1),
    ],
)
def test_the_search_finds_what_a_missing_rule_breaks(mutant: str, start: str, watcher: int) -> None:
    with pytest.raises(Violation, match=r"told, and is in no cycle|where there was none"):
        explore(STARTS[start], Search(mutant, watcher=watcher).successors, check)
