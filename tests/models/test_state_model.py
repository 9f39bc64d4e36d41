"""The model of shared state: no torn state over all interleavings, and mutants that must fail."""

import pytest

from models.search import Violation, explore
from models.state_model import Protocol, State, Writer, check


def shelf(*calls: int, deaths: int = 0) -> State:
    return State(writers=tuple(Writer(calls=n) for n in calls), deaths=deaths)


@pytest.mark.parametrize(
    "start",
    [shelf(4), shelf(2, 2), shelf(3, 1, deaths=1), shelf(2, 2, deaths=2)],
    ids=["one", "two", "two, one dies", "two, both die"],
)
def test_no_state_is_torn(start: State) -> None:
    states = explore(start, Protocol().successors, check)
    print(states, "states")
    assert states > 1000


@pytest.mark.parametrize(
    ("mutant", "start"),
    [
        ("no second look", shelf(4)),
        ("the word is not ordered", shelf(3)),
        ("live places are not spared", shelf(4)),
        ("the spare slot is trusted", shelf(4)),
        ("index and number apart", shelf(3, deaths=1)),
        ("a new file is written in its place", shelf(2)),
        ("the old file goes first", shelf(2, 1, deaths=1)),
    ],
)
def test_the_search_finds_what_a_missing_rule_breaks(mutant: str, start: State) -> None:
    with pytest.raises(Violation, match=r"torn|gone|not there"):
        explore(start, Protocol(mutant).successors, check)
