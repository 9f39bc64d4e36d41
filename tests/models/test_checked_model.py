"""The model of the state beside a lock of files: no torn state on a machine without order, and mutants that fail."""

import pytest

from models.checked_model import Protocol, State, Writer, check
from models.search import Violation, explore


def shelf(*commits: int, deaths: int = 0) -> State:
    return State(writers=tuple(Writer(commits=n) for n in commits), deaths=deaths)


@pytest.mark.parametrize(
    "start",
    [shelf(2), shelf(1, 1), shelf(1, 1, deaths=1)],
    ids=["one", "two", "two, one dies"],
)
def test_no_state_is_torn(start: State) -> None:
    states = explore(start, Protocol().successors, check)
    print(states, "states")
    assert states > 1000


@pytest.mark.parametrize(
    ("mutant", "start"),
    [
        ("slots are not checked", shelf(1)),
        ("values are not checked", shelf(2)),
        ("the checksum does not cover the word", shelf(2)),
        ("owners are not ordered", shelf(1, 1)),
    ],
)
def test_the_search_finds_what_a_missing_rule_breaks(mutant: str, start: State) -> None:
    with pytest.raises(Violation, match="torn"):
        explore(start, Protocol(mutant).successors, check)
