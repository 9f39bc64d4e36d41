"""The model of recovery: nobody meets half-done work, whoever dies where; and mutants that must fail."""

import pytest

from models.recovery_model import Process, Recovery, State, check
from models.search import Violation, explore


def crowd(*processes: Process, deaths: int = 0, unmarked: int = 0, raises: int = 0) -> State:
    return State(processes, deaths_left=deaths, unmarked_left=unmarked, raises_left=raises)


A, B, C = Process(1, calls=2), Process(2, calls=2), Process(3)
PLAIN = Process(4, knows=False)
SAME_NUMBER, SAME_NUMBER_IDLE = Process(1), Process(1, step="idle")

STARTS = {
    "two deaths": crowd(A, B, C, deaths=2),
    "three deaths": crowd(A, Process(2), C, deaths=3),
    "a hook that raises": crowd(A, B, deaths=1, raises=2),
    "one that does not know the class": crowd(A, PLAIN, C, deaths=2),
    "unmarked": crowd(A, B, C, deaths=1, unmarked=1),
    "a number used again": crowd(A, B, SAME_NUMBER, deaths=1, unmarked=1),
    "a number used again by one that does not call": crowd(A, B, SAME_NUMBER_IDLE, unmarked=1),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_nobody_meets_half_done_work(start: State) -> None:
    print(explore(start, Recovery().successors, check), "states")


@pytest.mark.parametrize(
    ("mutant", "start", "found"),
    [
        ("the flag is not raised", "two deaths", "half done"),
        ("the flag is lowered before the hook", "two deaths", "half done|another one's"),
        ("the last death is the one to recover", "two deaths", "another one's death"),
        ("an exception is a recovery", "a hook that raises", "half done"),
        ("the name is not taken off", "two deaths", "one who lives"),
        ("nobody looks at the owner", "unmarked", "waits for ever"),
        ("a thread number is an identity", "a number used again", "half done|inside"),
        ("the owner's number is looked for", "a number used again by one that does not call", "waits for ever"),
    ],
)
def test_the_search_finds_what_a_missing_rule_breaks(mutant: str, start: str, found: str) -> None:
    with pytest.raises(Violation, match=found):
        explore(STARTS[start], Recovery(mutant).successors, check)
