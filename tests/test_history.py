"""What coheld top shows, without a screen: rates, the last minute, order and filter; and resources in words."""

from dataclasses import replace

import pytest

from coheld import Resource
from coheld.history import COLUMNS, SECONDS, History
from coheld.sight import Sight, see
from scene import Scene, lab, resource


def at(when: float, *resources: Resource) -> list[Sight]:
    """A look at that time."""
    return [replace(see(one), when=when) for one in resources]


def used(taken: int, contended: int, name: str = "r1") -> Resource:
    return resource(name, acquisitions=taken, contended=contended)


def names(history: History, *order: object) -> list[str]:
    return [row.sight.name for row in history.rows(*order)]  # type: ignore[arg-type]


def test_rates_are_per_second_between_the_last_two_looks() -> None:
    history = History()
    history.add(at(100.0, used(1000, 10)))
    (row,) = history.rows()
    assert (row.taken, row.contended) == (0, 0) and history.contended(row.sight.resource.place) == []
    history.add(at(102.0, used(1300, 11)))
    history.add(at(102.5, used(1301, 15)))
    (row,) = history.rows()
    assert (row.taken, row.contended) == (2, 8) and history.contended(row.sight.resource.place) == [0.5, 8]


def test_a_counter_that_goes_back_has_begun_again() -> None:
    history = History()
    history.add(at(1.0, used(1000, 500)))
    history.add(at(2.0, used(30, 7)))
    (row,) = history.rows()
    assert (row.taken, row.contended) == (30, 7)


def test_two_looks_at_one_time_are_no_rate() -> None:
    history = History()
    for _ in range(2):
        history.add(at(1.0, used(1000, 500)))
    assert history.contended(used(0, 0).place) == [0]


def test_a_minute_is_kept_and_what_is_gone_is_forgotten() -> None:
    history, place = History(), used(0, 0).place
    for second in range(200):
        history.add(at(float(second), used(second, second * second), used(1, 1, "other")))
    rates = history.contended(place)
    assert len(rates) == SECONDS and rates[-1] == 199**2 - 198**2
    history.add(at(200.0, used(1, 1, "other")))
    assert history.contended(place) == [] and names(history) == ["other"]


def test_columns_sort_the_largest_first_and_words_by_the_alphabet() -> None:
    history = History()
    history.add(at(1.0, *lab()))
    assert names(history, "waiters") == ["lab/r1", "lab/bed-1", "gpus", "lab/bed-2", "lab/report"]
    assert names(history, "waiters", True) == ["lab/bed-2", "lab/report", "lab/bed-1", "gpus", "lab/r1"]
    assert names(history, "resource") == ["gpus", "lab/bed-1", "lab/bed-2", "lab/r1", "lab/report"]
    assert names(history, "for") == ["lab/r1", "lab/bed-1", "lab/bed-2", "gpus", "lab/report"]
    assert names(history, "in")[:3] == ["lab/bed-1", "lab/bed-2", "lab/r1"]
    assert names(history, "deaths")[0] == "lab/r1"
    assert names(history, "holder")[-1] == "lab/report"


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_can_be_sorted_by_both_ways(column: str) -> None:
    history = History()
    for when in (1.0, 2.0):
        history.add(at(when, *lab()))
    assert len(names(history, column)) == len(names(history, column, True)) == len(lab())


def test_words_are_looked_for_in_names_commands_methods_and_waiters() -> None:
    history = History()
    history.add(at(1.0, *lab()))
    found = {words: names(history, "resource", False, words) for words in ("BED", "nightly", "ping", "soak", "nope")}
    assert found["BED"] == ["lab/bed-1", "lab/bed-2", "lab/r1"]  # whose waiter is in Bed.flash
    assert found["nightly"] == ["lab/bed-1", "lab/r1"]
    assert (found["ping"], found["soak"], found["nope"]) == (["lab/r1"], ["gpus"], [])


def test_a_resource_in_words() -> None:
    first, *_, gpus, report = [see(one).lines() for one in lab()]
    assert first == [
        "'lab/r1', a lock on shm:",
        "  taken 5712 times, 318 had to wait, 1 deaths",
        "  held by process 4711 (python -m nightly), thread MainThread in Router.configure for 184 s",
        "  waits: process 4802 (pytest tests/lab), thread MainThread in Router.ping, for 131 s",
        "  waits: process 4840 (python -m lab.flash), thread MainThread in Bed.flash, for 118 s",
    ]
    assert gpus[2].startswith("  1 permits: process 4711 (") and gpus[4].startswith("  waits: process 4855 (")
    assert len(report) == 2


def test_not_all_of_many_are_named_and_nothing_reaches_the_terminal() -> None:
    scene = Scene(1000.0)
    many = resource("r1", scene.holder(1, "\x1b[31m"), *(scene.waiter(2 + n, "\n") for n in range(150)))
    sight = see(many)
    assert sight.lines()[-1] == "  waits: 50 more, not named" and len(sight.who) == 102
    assert all(line.isprintable() for line in [*sight.lines(), sight.method, sight.holder])
