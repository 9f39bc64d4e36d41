"""The model of tasks that own: one at a time, nobody stuck, whoever is killed; and mutants that must fail."""

import pytest

from models.search import Violation, explore
from models.task_model import Caller, State, Tasks, check


def crowd(*callers: Caller, deaths: int = 0) -> State:
    return State(callers, deaths_left=deaths)


def task(calls: int = 1) -> Caller:
    return Caller("task", calls=calls)


def thread(calls: int = 1) -> Caller:
    return Caller("thread", calls=calls)


STARTS = {
    "tasks": crowd(task(2), task(2)),
    "three tasks": crowd(task(), task(), task()),
    "a task and threads": crowd(task(2), thread(), thread()),
    "a task is killed": crowd(task(2), thread(2), deaths=1),
    "two are killed": crowd(task(), task(), thread(), deaths=2),
    "three tasks, two are killed": crowd(task(), task(), task(), deaths=2),
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_one_at_a_time_and_nobody_is_stuck(start: State) -> None:
    print(explore(start, Tasks().successors, check), "states")


@pytest.mark.parametrize(
    ("mutant", "start", "what"),
    [
        ("TASKED is not looked at", "tasks", "two are inside"),
        ("the futex moves first", "tasks", "waits for ever"),
        ("a sleep has no end", "a task is killed", "waits for ever"),
        ("it is buried without a look at the nonce", "three tasks, two are killed", "two are inside"),
        ("a nonce is used again", "three tasks, two are killed", "two are inside"),
    ],
)
def test_the_search_finds_what_a_missing_rule_breaks(mutant: str, start: str, what: str) -> None:
    with pytest.raises(Violation, match=what):
        explore(STARTS[start], Tasks(mutant).successors, check)
