"""The model of the mutex: exclusion and no lost wake-up over all interleavings, and mutants that must fail."""

import pytest

from models.lock_model import Lock, Process, State, check
from models.search import Violation, explore


def crowd(*calls: int, deaths: int = 0) -> State:
    return State(processes=tuple(Process(calls=n) for n in calls), deaths_left=deaths)


@pytest.mark.parametrize(
    "start",
    [crowd(2, 2), crowd(1, 1, 1), crowd(2, 1, deaths=1), crowd(1, 1, 1, deaths=1), crowd(1, 1, deaths=2)],
    ids=["two", "three", "two, one dies", "three, one dies", "two, both die"],
)
def test_no_overlap_and_nobody_stuck(start: State) -> None:
    print(explore(start, Lock().successors, check), "states")


@pytest.mark.parametrize(
    ("mutant", "start"),
    [
        ("an acquirer does not set the bit again", crowd(2, 1, 1, deaths=1)),
        ("a woken acquirer trusts the count", crowd(1, 1, 1)),
        ("the kernel does not compare again", crowd(2, 1)),
        ("a new epoch wakes nobody", crowd(2, 1, 1, deaths=1)),
    ],
)
def test_the_search_finds_what_a_missing_rule_breaks(mutant: str, start: State) -> None:
    with pytest.raises(Violation, match="sleeps for ever"):
        explore(start, Lock(mutant).successors, check)
