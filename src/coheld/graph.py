"""Who has what and who waits for it, as a graph: made of what resources() says, and of nothing else.

It is of one moment, as that is: hints, each a moment older than the next.  What it calls a cycle is one of waits for
locks, with a time-out or without; the search for deadlocks (backends/deadlock.py), which fails a wait, looks twice.
Waits for a guard, for readers, for one of several permits or for a store are shown, and are in no cycle: anybody may
end them, on another host as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from .backends.survey import Resource
from .backends.waiters import Waiter
from .owner import Owner
from .process import command_of

_PARTS = "permit", "lease"
_WAITS = {
    "guard": " for a guard",
    "readers": " for readers",
    "permit": " for a permit",
    "lease": " for a lease",
    "store": " for the store",
}
_TICK = 0.02
"""By how much an owner may seem to have begun too late: its clock is a coarse one, seconds."""


@dataclass(frozen=True, slots=True)
class Party:
    """A thread, or a task (task_id), or a process of which no more is known (tid 0): who reads, or has permits or
    leases."""

    pid: int
    start: int = 0
    tid: int = 0
    task_id: int = 0
    known: Owner | Waiter | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Without its command. Asks the system for what is not known."""
        what = ""
        if self.known is not None:
            task, thread = self.known.task or hex(self.task_id), self.known.thread or self.tid
            what = f", task {task}" if self.task_id else f", thread {thread}"
        return f"process {self.pid}{what}"

    @property
    def command(self) -> str:
        """The command line of its process, cut to 60 characters; empty if that has ended. Asks the system."""
        return command_of(self.pid) if self.known is None else self.known.command

    def __str__(self) -> str:
        process, comma, what = self.name.partition(",")
        command = self.command
        return f"{process}{f' ({command})' if command else ''}{comma}{what}"


@dataclass(frozen=True, slots=True)
class Edge:
    """That a party has a resource, or waits for it.

    holds: it has it.  what: "lock", "readers", "permit" or "lease", and of waits "guard" and "store" as well: see
    Waiter.  count: of reading calls, permits and leases.  since: seconds of time.monotonic(); 0 where it is not known.
    in_cycle: it is a part of one.
    """

    party: Party
    place: str
    holds: bool
    what: str
    method: str = ""
    since: float = 0.0
    count: int = 0
    timed: bool = False
    in_cycle: bool = False

    def told(self, now: float) -> str:
        """What, in which method and for how long, in words that follow the name of the party."""
        if self.holds and self.what != "lock":
            plural = "s" * (self.count != 1)
            return (
                f"has {self.count} {self.what}{plural}" if self.what in _PARTS else f"reads, {self.count} call{plural}"
            )
        what = _WAITS.get(self.what, "")
        verb = "holds" if self.holds else f"waits{what}"
        where = f" in {self.method}" if self.method else ""
        return f"{verb}{where}{f', {max(0.0, now - self.since):.3g} s' if self.since else ''}"


@dataclass(frozen=True, slots=True)
class Graph:
    """resources: those that are busy.  cycles: of each its waits in order; who has what the first one waits for is
    stopped by the second, and so on; who has what the last one waits for, by the first."""

    resources: tuple[Resource, ...]
    edges: tuple[Edge, ...]
    cycles: tuple[tuple[Edge, ...], ...]

    def parties(self) -> list[Party]:
        """Each once."""
        return list(dict.fromkeys(edge.party for edge in self.edges))

    def at_places(self) -> dict[str, list[Edge]]:
        """Of each resource, by its place, who has it and who waits for it."""
        found: dict[str, list[Edge]] = {one.place: [] for one in self.resources}
        for edge in self.edges:
            found[edge.place].append(edge)
        return found

    def labels(self) -> dict[str, str]:
        """The names of the resources, by their places."""
        return {one.place: one.label for one in self.resources}


def graph_of(resources: Iterable[Resource]) -> Graph:
    """Looks at nothing but these."""
    busy = tuple(one for one in resources if one.busy)
    edges = _named([edge for one in busy for edge in _edges(one)])
    cycles = _cycles(edges)
    waits = {edge for cycle in cycles for edge in cycle}
    held = {edge.place for edge in waits}
    marked = (
        replace(edge, in_cycle=edge in waits or (edge.holds and edge.what == "lock" and edge.place in held))
        for edge in edges
    )
    return Graph(busy, tuple(marked), cycles)


def _named(edges: list[Edge]) -> list[Edge]:
    """Each party with all that is known of it: those who wait have told their names."""
    known = {edge.party: edge.party for edge in sorted(edges, key=lambda edge: not edge.holds)}
    return [replace(edge, party=known[edge.party]) for edge in edges]


def _edges(one: Resource) -> Iterator[Edge]:
    if owner := one.holder:
        party = Party(owner.pid, owner.start, 0 if owner.task_id else owner.tid, owner.task_id, owner)
        yield Edge(party, one.place, True, "lock", owner.method, owner.since)
    for pid, count in one.inside.items():
        yield Edge(Party(pid), one.place, True, one.part if one.part in _PARTS else "readers", count=count)
    for waiter in one.waiting:
        party = Party(waiter.pid, waiter.start, 0 if waiter.task_id else waiter.tid, waiter.task_id, waiter)
        whole = one.kind == "lock" or (one.kind == "pool" and waiter.waits_for == "lock")  # its ledger, for a moment
        what = waiter.waits_for if whole else one.part
        yield Edge(party, one.place, False, what, waiter.method, waiter.since, timed=waiter.timed)


# -- cycles: from what somebody has to what that one waits for, and so on, until it comes back -------------------------


def _cycles(edges: list[Edge]) -> tuple[tuple[Edge, ...], ...]:
    """Of each place that is in one, the shortest; each cycle once.

    Places from which there is a way to each other are looked at by themselves.  Most are a plain ring: then it takes as
    many steps as there are edges.
    """
    ahead = _ahead(edges)
    group = _groups(ahead)
    inside = {
        place: [wait for wait in waits if group.get(wait.place) == group[place]] for place, waits in ahead.items()
    }
    branching = {group[place] for place, waits in inside.items() if len(waits) > 1}
    found: dict[frozenset[str], tuple[Edge, ...]] = {}
    rings: set[int] = set()
    for place, waits in inside.items():
        if waits and group[place] not in rings and (cycle := _cycle_through(place, inside)):
            found.setdefault(frozenset(edge.place for edge in cycle), cycle)
            if group[place] not in branching:
                rings.add(group[place])
    return tuple(found.values())


def _groups(ahead: dict[str, list[Edge]]) -> dict[str, int]:
    """For each place that is held a number, which it shares with those that it leads to and that lead back to it: the
    strongly connected components, by Tarjan's algorithm (1972), without recursion."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    group: dict[str, int] = {}
    open_places: list[str] = []
    for root in ahead:
        way = [(root, iter(ahead[root]))] if root not in order else []
        while way:
            place, waits = way[-1]
            if place not in order:
                order[place] = lowest[place] = len(order)
                open_places.append(place)
            following = next((wait.place for wait in waits if wait.place in ahead and wait.place not in group), None)
            if following is None:
                way.pop()
                if lowest[place] == order[place]:
                    while place not in group:
                        group[open_places.pop()] = order[place]
                elif way:
                    lowest[way[-1][0]] = min(lowest[way[-1][0]], lowest[place])
            elif following in order:
                lowest[place] = min(lowest[place], order[following])
            else:
                way.append((following, iter(ahead[following])))
    return group


def _ahead(edges: list[Edge]) -> dict[str, list[Edge]]:
    """For each place that is held, the waits that must end before its holder goes on."""
    waits: dict[tuple[int, int, int, int], list[Edge]] = {}
    for edge in edges:
        if not edge.holds and edge.what == "lock":
            waits.setdefault(_whose(edge.party), []).append(edge)
    held = [edge for edge in edges if edge.holds and edge.what == "lock"]
    return {
        edge.place: [wait for whose in _stopped_by(edge.party) for wait in waits.get(whose, ()) if _stops(wait, edge)]
        for edge in held
    }


def _whose(party: Party) -> tuple[int, int, int, int]:
    return party.pid, party.start, 0 if party.task_id else party.tid, party.task_id


def _stopped_by(party: Party) -> Iterator[tuple[int, int, int, int]]:
    """Whose waits a holder cannot go on in: its own, and of a task also its thread's."""
    if party.task_id:
        yield party.pid, party.start, 0, party.task_id
    if party.known is not None:
        yield party.pid, party.start, party.known.tid, 0


def _stops(wait: Edge, held: Edge) -> bool:
    """Did the holder have it when this wait of its own began?"""
    return wait.since + _TICK > held.since


def _cycle_through(place: str, ahead: dict[str, list[Edge]]) -> tuple[Edge, ...]:
    """The waits on the shortest way from that place back to it; none if there is no way."""
    before: dict[str, tuple[str, Edge]] = {}
    places = deque([place])
    while places and place not in before:
        here = places.popleft()
        for wait in ahead.get(here, ()):
            if wait.place not in before:
                before[wait.place] = here, wait
                places.append(wait.place)
    return _back(place, before) if place in before else ()


def _back(place: str, before: dict[str, tuple[str, Edge]]) -> tuple[Edge, ...]:
    here, wait = before[place]
    way = [wait]
    while here != place:
        here, wait = before[here]
        way.append(wait)
    return tuple(reversed(way))
