"""The model of names that are removed and come back: one name is one lock; and mutants that must fail."""

import pytest

from models.removal_model import NONE, Removal, State, Thread, check
from models.search import Violation, explore


def crowd(*threads: Thread, failures: int = 0, deaths: int = 0) -> State:
    handles = (NONE,) * (1 + max(t.handle for t in threads))
    return State(threads, handles, failures_left=failures, deaths_left=deaths)


def user(handle: int, calls: int = 1) -> Thread:
    return Thread("user", handle, calls=calls)


def remover(handle: int) -> Thread:
    return Thread("remover", handle)


STARTS = {
    "two users": crowd(user(0, 2), user(1, 2), remover(2)),
    "two removers": crowd(user(0), user(1), remover(2), remover(3)),
    "one is killed": crowd(user(0, 2), user(1), remover(2), deaths=1),
    "two are killed": crowd(user(0), user(1), remover(2), deaths=2),
    "threads of one process": crowd(user(0, 2), user(0), remover(1), failures=1),
    "it fails, and one is killed": crowd(user(0), user(0), remover(1), failures=1, deaths=1),
    "it fails twice": crowd(user(0), user(0), user(1), remover(2), failures=2),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_one_name_is_one_lock(start: State) -> None:
    print(explore(start, Removal().successors, check), "states")


@pytest.mark.parametrize(
    ("mutant", "start"),
    [
        ("the flag is looked at before the lock is taken", "two users"),
        ("the name is taken off first", "one is killed"),
        ("any file of the name is taken off", "two removers"),
        ("the directory is not locked", "one is killed"),
        ("who does not hold it takes the name off", "threads of one process"),
    ],
)
def test_the_search_finds_what_a_missing_rule_breaks(mutant: str, start: str) -> None:
    with pytest.raises(Violation, match="two are inside"):
        explore(STARTS[start], Removal(mutant).successors, check)
