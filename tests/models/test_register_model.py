"""The models of readers and of permits: no reader meets a writer, no permit is lost, nobody is stuck, whoever is
killed; and mutants that must fail."""

import pytest

from models import permit_model, register_model
from models.permit_model import Permits
from models.register_model import Readers
from models.search import Violation, explore_to_the_end


def reading(*callers: tuple[str, int, bool], deaths: int = 0) -> register_model.State:
    """Role, calls, and whether it has a record."""
    made, entrants = [], []
    for number, (role, calls, known) in enumerate(callers):
        made.append(register_model.Caller(role, calls=calls, slot=len(entrants) if known else register_model.NONE))
        entrants += [register_model.Entrant(number)] * known
    return register_model.State(tuple(made), tuple(entrants), readers=bool(entrants), deaths_left=deaths)


def having(value: int, *callers: tuple[str, int, bool], deaths: int = 0) -> permit_model.State:
    made, entrants = [], []
    for number, (role, calls, known) in enumerate(callers):
        made.append(permit_model.Caller(role, calls=calls, slot=len(entrants) if known else permit_model.NONE))
        entrants += [permit_model.Entrant(number)] * known
    return permit_model.State(tuple(made), value, value, tuple(entrants), deaths_left=deaths)


READING = {
    "readers and a writer": reading(("reader", 2, True), ("reader", 1, True), ("writer", 1, False)),
    "the first readers": reading(("reader", 2, False), ("reader", 1, False), ("writer", 2, False)),
    "a reader and writers": reading(("reader", 2, True), ("writer", 2, False), ("writer", 1, False)),
    "a task writes": reading(("reader", 2, True), ("reader", 1, False), ("task", 2, False)),
    "reading inside of reading": reading(("nester", 1, True), ("reader", 1, True), ("writer", 2, False)),
    "a writer gives up": reading(("reader", 2, True), ("hasty", 2, False), ("writer", 1, False)),
    "one is killed": reading(("reader", 1, True), ("reader", 1, False), ("writer", 2, False), deaths=1),
    "a writer is killed, or two": reading(("reader", 2, True), ("writer", 1, False), ("writer", 1, False), deaths=2),
    "a task is killed": reading(("reader", 2, True), ("task", 1, False), ("writer", 1, False), deaths=1),
    "a nester is killed": reading(("nester", 1, True), ("reader", 1, True), ("writer", 1, False), deaths=2),
    "a newcomer, two are killed": reading(("reader", 1, True), ("reader", 1, False), ("writer", 1, False), deaths=2),
}

HAVING = {
    "one permit": having(1, ("user", 2, True), ("user", 2, True), ("user", 1, False)),
    "two permits": having(2, ("user", 2, True), ("user", 2, False), ("user", 1, True)),
    "some try once, or give up": having(1, ("user", 2, True), ("hasty", 1, False), ("trier", 1, True)),
    "one is killed": having(1, ("user", 2, True), ("user", 1, False), ("user", 1, True), deaths=1),
    "two permits, one is killed": having(2, ("user", 1, True), ("user", 2, False), ("user", 1, True), deaths=1),
    "a trier, two are killed": having(1, ("user", 1, True), ("trier", 1, True), ("user", 1, False), deaths=2),
    "two are killed": having(1, ("user", 1, True), ("user", 1, False), ("user", 1, True), deaths=2),
    "four, two are killed": having(
        1, ("trier", 1, True), ("trier", 1, True), ("trier", 1, True), ("trier", 1, False), deaths=2
    ),
}


def search_readers(mutant: str, start: str) -> int:
    return explore_to_the_end(READING[start], Readers(mutant).successors, register_model.check, register_model.ended)


def search_permits(mutant: str, start: str) -> int:
    return explore_to_the_end(HAVING[start], Permits(mutant).successors, permit_model.check, permit_model.ended)


@pytest.mark.parametrize("start", READING)
def test_no_reader_meets_a_writer_and_nobody_is_stuck(start: str) -> None:
    print(search_readers("", start), "states")


@pytest.mark.parametrize("start", HAVING)
def test_no_permit_is_lost_or_made_and_nobody_is_stuck(start: str) -> None:
    print(search_permits("", start), "states")


MEETS, EVER, NEVER = "a writer is inside with another", "somebody waits for ever", "somebody can never end"


@pytest.mark.parametrize(
    ("mutant", "start", "what"),
    [
        ("a reader looks before it counts", "readers and a writer", MEETS),
        ("a writer looks before it has the mutex", "readers and a writer", MEETS),
        ("the flags are looked at before the word", "a task writes", MEETS),
        ("READERS goes up after the mutex is given back", "the first readers", MEETS),
        ("reap does not ask whether the process is gone", "readers and a writer", MEETS),
        ("who inherits does not look for readers", "a writer is killed, or two", MEETS),
        ("a reader passes what a dead writer left", "a writer is killed, or two", "before a dead writer's work"),
        ("wanted is set after the look", "readers and a writer", EVER),
        ("news is read after the look", "readers and a writer", EVER),
        ("wanted is looked at before the count goes down", "readers and a writer", EVER),
        ("who backs out does not look for wanted", "readers and a writer", EVER),
        ("the kernel does not compare again", "readers and a writer", EVER),
        ("who reads inside of reading queues", "reading inside of reading", EVER),
        ("the dead are not reaped", "one is killed", NEVER),
        ("a dead one's count stays with its record", "one is killed", EVER),
    ],
)
def test_the_search_finds_what_a_missing_rule_of_readers_breaks(mutant: str, start: str, what: str) -> None:
    with pytest.raises(Violation, match=what):
        search_readers(mutant, start)


@pytest.mark.parametrize(
    ("mutant", "start", "what"),
    [
        ("free is not recounted", "one is killed", "a permit is lost"),
        ("a dead one's permits go with its record", "two permits, one is killed", "a permit is lost"),
        ("a permit is counted after the mutex is given back", "one is killed", "a permit is lost"),
        ("reap does not ask whether the process is gone", "one permit", "more permits are held"),
        ("the short way passes what a dead owner left", "four, two are killed", "a permit is made"),
        ("the dead are not reaped", "one is killed", EVER),
        ("GUARDED is set after the mutex is given back", "one permit", EVER),
        ("a release tells nobody", "one permit", EVER),
        ("the epoch does not move", "one permit", EVER),
        ("the kernel does not compare again", "one permit", EVER),
    ],
)
def test_the_search_finds_what_a_missing_rule_of_permits_breaks(mutant: str, start: str, what: str) -> None:
    with pytest.raises(Violation, match=what):
        search_permits(mutant, start)
