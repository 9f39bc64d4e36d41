"""The model of how an arena goes away: never while it is used, always in the end; and mutants that must fail."""

import pytest

from models.search import Violation, explore
from models.session_model import Process, Session, State, check

MAKER, CHILD = Process("maker", "create"), Process("child", "unborn")
ATTACHER, SWEEPER = Process("attacher", "open"), Process("sweeper", "start")


def crowd(*processes: Process, deaths: int = 0, daemon: str = "") -> State:
    """Those of the role `daemon` may close their descriptors."""
    return State(tuple(p._replace(daemon=p.role == daemon) for p in processes), deaths_left=deaths)


STARTS = {
    "two leave at once": crowd(MAKER, ATTACHER),
    "three leave at once": crowd(MAKER, CHILD, ATTACHER),
    "one is killed": crowd(MAKER, ATTACHER, SWEEPER, deaths=1),
    "a child, one is killed": crowd(MAKER, CHILD, SWEEPER, deaths=1),
    "two are killed": crowd(MAKER, ATTACHER, deaths=2),
    "the maker is a daemon": crowd(MAKER, CHILD, SWEEPER, daemon="maker"),
    "the maker is a daemon and killed": crowd(MAKER, CHILD, SWEEPER, deaths=1, daemon="maker"),
    "an attacher is a daemon": crowd(MAKER, ATTACHER, SWEEPER, deaths=1, daemon="attacher"),
    "children of daemons": crowd(MAKER, CHILD, CHILD, SWEEPER, daemon="maker"),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_it_goes_in_the_end_and_not_before(start: State) -> None:
    print(explore(start, Session().successors, check), "states")


@pytest.mark.parametrize(
    ("mutant", "start", "found"),
    [
        ("an attacher does not look at the path again", "one is killed", "while somebody used it"),
        ("the flock alone decides", "the maker is a daemon", "while somebody used it"),
        ("it is not locked again", "one is killed", "while somebody used it"),
        ("its time is not compared", "an attacher is a daemon", "while somebody used it"),
        ("processes are listed once", "children of daemons", "while somebody used it"),
        ("it is not looked at again", "two leave at once", "still there"),
        ("nobody signs off", "two leave at once", "still there"),
    ],
)
def test_the_search_finds_what_a_missing_rule_breaks(mutant: str, start: str, found: str) -> None:
    with pytest.raises(Violation, match=found):
        explore(STARTS[start], Session(mutant).successors, check)
