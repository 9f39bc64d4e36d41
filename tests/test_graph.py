"""The graph of who has what and who waits for it: a function of resources, which finds the cycles in them."""

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from coheld import Resource
from coheld.cli import graph as drawn
from coheld.cli import picture
from coheld.graph import Graph, graph_of
from scene import Scene, lab, resource

AT = Scene(1000.0)


def ring(size: int) -> list[Resource]:
    """Each has the lock of its number, and waits for the next one's."""
    return [resource(f"r{n}", AT.holder(1 + n, held=9), AT.waiter(1 + (n - 1) % size, waited=5)) for n in range(size)]


def cycles(resources: Sequence[Resource]) -> list[set[str]]:
    graph = graph_of(resources)
    return [{graph.labels()[edge.place].strip("'") for edge in cycle} for cycle in graph.cycles]


def red(graph: Graph) -> set[tuple[int, str, bool]]:
    return {(edge.party.pid, graph.labels()[edge.place], edge.holds) for edge in graph.edges if edge.in_cycle}


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_ring_is_one_cycle_in_its_order(size: int) -> None:
    (cycle,) = graph_of(ring(size)).cycles
    assert len(cycle) == size
    for wait, after in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        (held,) = [one.holder for one in ring(size) if one.place == wait.place]
        assert held is not None and held.pid == after.party.pid


def test_a_chain_has_none() -> None:
    assert cycles(ring(5)[1:]) == []


def test_two_rings_are_two_cycles_and_one_who_waits_for_them_is_in_none() -> None:
    other = [
        resource("a", AT.holder(21, held=9), AT.waiter(22, waited=1), AT.waiter(1, waited=5, tid=77)),
        resource("b", AT.holder(22, held=9), AT.waiter(21, waited=2)),
    ]
    graph = graph_of(ring(3) + other)
    assert cycles(ring(3) + other) == [{"r0", "r1", "r2"}, {"a", "b"}]
    assert {entry for entry in red(graph) if entry[1] in ("'a'", "'b'")} == {
        (21, "'a'", True),
        (22, "'a'", False),
        (22, "'b'", True),
        (21, "'b'", False),
    }


def test_a_thread_of_the_same_process_is_somebody_else() -> None:
    one = [
        resource("a", AT.holder(1, held=9, tid=11), AT.waiter(2, waited=5)),
        resource("b", AT.holder(2, held=9), AT.waiter(1, waited=5, tid=12)),
    ]
    assert cycles(one) == []


def test_a_task_waits_for_itself_alone_and_its_thread_for_all_its_tasks() -> None:
    def beds(waits: object) -> list[Resource]:
        return [
            resource("a", AT.holder(1, held=9, task_id=5), AT.waiter(2, waited=5)),
            resource("b", AT.holder(2, held=9), waits),  # type: ignore[arg-type]
        ]

    assert cycles(beds(AT.waiter(1, waited=5, task_id=5))) == [{"a", "b"}]
    assert cycles(beds(AT.waiter(1, waited=5, task_id=6))) == []
    assert cycles(beds(AT.waiter(1, waited=5))) == [{"a", "b"}]
    assert cycles(beds(AT.waiter(1, waited=5, tid=99))) == []


def test_a_process_number_that_was_used_again_is_somebody_else() -> None:
    one, other = ring(2)
    old = Scene(AT.now).holder(2, held=9)
    object.__setattr__(old, "start", 7)
    assert cycles([one, resource("r1", old, *other.waiting)]) == []


def test_a_wait_that_is_older_than_what_its_thread_holds_stops_nobody() -> None:
    """A signal's handler took it, in the middle of the wait."""
    late = resource("r1", AT.holder(2, held=1), AT.waiter(1, waited=5))
    assert cycles([ring(2)[0], late]) == []


@pytest.mark.parametrize("what", ["guard", "readers", "permit"])
def test_other_waits_are_in_no_cycle(what: str) -> None:
    one, _ = ring(2)
    other = resource("r1", AT.holder(2, held=9), AT.waiter(1, waited=5, waits_for=what))
    assert cycles([one, other]) == [] and len(graph_of([one, other]).edges) == 4


def test_who_waits_has_told_the_name_of_its_thread() -> None:
    holds, waits = graph_of(
        [resource("a", AT.holder(1, held=9, tid=11)), resource("b", None, AT.waiter(1, tid=11))]
    ).edges
    assert holds.party == waits.party and holds.party.name == waits.party.name == "process 1, thread t-11"


def test_readers_and_permits_are_of_processes() -> None:
    graph = graph_of(lab(AT.now))
    gpus = [edge for edge in graph.edges if graph.labels()[edge.place] == "'gpus'"]
    assert [(edge.party.name, edge.told(AT.now)) for edge in gpus] == [
        ("process 4711", "has 1 permit"),
        ("process 4802", "has 1 permit"),
        ("process 4855, thread MainThread", "waits for a permit, 102 s"),
    ]


def test_what_is_not_busy_is_left_out() -> None:
    assert graph_of([resource("idle", acquisitions=3)]).resources == ()
    assert [one.name for one in graph_of(lab(AT.now)).resources] == ["lab/r1", "lab/bed-1", "lab/bed-2", "gpus"]


def test_it_finds_a_cycle_where_there_is_one_by_trying_all_ways(rng: random.Random) -> None:
    for _ in range(300):
        size = rng.randint(1, 6)
        waits = {n: rng.randrange(size) for n in range(size) if rng.random() < 0.8}
        resources = [
            resource(f"r{n}", AT.holder(n + 1, held=9), *(AT.waiter(m + 1, waited=5) for m in waits if waits[m] == n))
            for n in range(size)
        ]
        assert sorted(map(sorted, cycles(resources))) == sorted(map(sorted, rings_of(waits)))


def rings_of(waits: dict[int, int]) -> list[set[str]]:
    """By following each for as long as there can be a ring."""
    found: list[set[str]] = []
    for first in waits:
        way = list(itertools.islice(followed(first, waits), len(waits) + 1))
        if first in way[1:]:
            ring_of_it = {f"r{n}" for n in way[: way[1:].index(first) + 1]}
            found += [] if ring_of_it in found else [ring_of_it]
    return found


def followed(first: int, waits: dict[int, int]) -> Iterator[int]:
    here: int | None = first
    while here is not None:
        yield here
        here = waits.get(here)


# ---- how long it takes -----------------------------------------------------------------------------------------------


def apart(size: int) -> list[Resource]:
    """Each with a holder and one who waits, that are nobody else's."""
    return [resource(f"r{n}", AT.holder(1 + 2 * n, held=9), AT.waiter(2 + 2 * n, waited=5)) for n in range(size)]


def chain(size: int) -> list[Resource]:
    return ring(size)[1:]


def threads(size: int) -> list[Resource]:
    """All of one process."""
    return [resource(f"r{n}", AT.holder(1, held=9, tid=10 + n), AT.waiter(1, tid=9 + n, waited=5)) for n in range(size)]


def tasks(size: int) -> list[Resource]:
    """All of one thread."""
    return [
        resource(f"r{n}", AT.holder(1, held=9, task_id=10 + n), AT.waiter(1, task_id=9 + n, waited=5))
        for n in range(size)
    ]


def crowd(size: int) -> list[Resource]:
    """All wait for one, and that has all."""
    return [
        resource("r", AT.holder(1, held=9), *(AT.waiter(2 + n, waited=5) for n in range(size))),
        *(resource(f"r{n}", AT.holder(1, held=9)) for n in range(size)),
    ]


def steps_of(call: Callable[[], object]) -> int:
    """How many instructions of Python it takes."""
    steps = 0

    def trace(frame: Any, event: str, _argument: object) -> Any:
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return steps


@pytest.mark.parametrize("draw", [drawn.text, drawn.mermaid, picture.svg], ids=["text", "mermaid", "svg"])
@pytest.mark.parametrize("scene", [apart, chain, ring, threads, tasks, crowd], ids=lambda scene: scene.__name__)
def test_four_times_as_many_take_four_times_as_long(
    scene: Callable[[int], list[Resource]], draw: Callable[[Graph, float], object]
) -> None:
    few, many = scene(20), scene(80)
    one, four = (steps_of(lambda resources=one: draw(graph_of(resources), AT.now)) for one in (few, many))  # type: ignore[misc]
    assert one > 1_000 and four < 5.5 * one
