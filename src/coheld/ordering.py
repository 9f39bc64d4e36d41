"""COHELD_CHECK_ORDER=1: in which order this process takes its locks, and whether some the other way round as well.

Two callers, of which one takes A and then B, and the other B and then A, wait for each other for ever on the day on
which both have taken the first. This says so on any other day, when each of the two orders has been seen once, as
lockdep does in the Linux kernel: a warning in the log with both places, and an Inversion for programs.

What is compared are classes of locks. A named lock's class is its name, with # for numbers and for ids in hexadecimal:
``lab/bed-1`` and ``lab/bed-2`` are both ``lab/bed-#``. That of a lock without a name is the class of its object. Within
one class it is the locks themselves that are compared: who takes bed 1 and then bed 2, and never the other way round,
is right.

Not seen are: what other processes do, each of which checks itself; readers, semaphores and pools' leases, of which any
will do; a try that would not have waited (it counts as held by what is taken after it). A wait with a time-out is seen.

What was seen long ago is forgotten where there is too much: of names, and of pairs of which one was taken after the
other, the last 10,000 are known.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
import weakref
from collections import deque
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any

from . import observing
from .backends.tasking import current_task
from .process import at_fork

if TYPE_CHECKING:
    from .backends.base import Handle

_ID = re.compile(
    r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
    r"|(?<![0-9a-zA-Z])(?=[a-fA-F]*[0-9])[0-9a-fA-F]{8,}(?![0-9a-zA-Z])"
    r"|[0-9]+"
)
_DEEPEST = 60
"""Frames that are kept of a stack, the innermost."""
_MOST = 10_000
"""Of what has a name, and of pairs of which one was taken after the other: the oldest are forgotten."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thread or task that took a lock while it held another: who, and where it took the one and the other."""

    who: str
    held: str
    held_at: str
    taken: str
    taken_at: str

    def __str__(self) -> str:
        return f"{self.who} took {self.held}:\n{self.held_at}and then {self.taken}:\n{self.taken_at}"


@dataclass(frozen=True, slots=True)
class Inversion:
    """Classes of locks, each of which was taken while the one before was held, and the first while the last was; a
    single one, if locks of that class were.  steps: the first time that each was seen, the last of all at the end."""

    classes: tuple[str, ...]
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        what = f"locks of {self.classes[0]}" if len(self.classes) == 1 else ", ".join(self.classes)
        head = (
            f"{what} are taken in orders that contradict each other: callers that meet may wait for each other for ever"
        )
        return "\n".join([head, *(f"{number}. {step}" for number, step in enumerate(self.steps, 1))])


def start() -> bool:
    """Check from now on; knows nothing of before.  False: it was on, and nothing has happened."""
    if _process.check is not None:
        return False
    _process.check = _process.last = _Check()
    observing.start(_process.check)
    return True


def stop() -> None:
    """Check no more; what was found stays until the next start.  Nothing happens if it is off."""
    if _process.check is not None:
        observing.stop(_process.check)
        _process.check = None


def inversions() -> list[Inversion]:
    """What was found since the last start, once for each pair of classes; the oldest first."""
    return list(_process.last.found) if _process.last is not None else []


# -- where locks are taken ---------------------------------------------------------------------------------------------

Trace = tuple[tuple[CodeType, int], ...]


def _trace() -> Trace:
    """Code and line of each frame of the caller's, the innermost first, without those of coheld."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    found: list[tuple[CodeType, int]] = []
    here: Any = frame
    while here is not None and len(found) < _DEEPEST:
        found.append((here.f_code, here.f_lineno))
        here = here.f_back
    return tuple(found)


def _is_ours(module: str) -> bool:
    package, _, rest = module.partition(".")
    return package == "coheld" and not rest.startswith("testing.")


def _as_text(trace: Trace) -> str:
    frames = [traceback.FrameSummary(code.co_filename, line, code.co_name) for code, line in reversed(trace)]
    return "".join(traceback.StackSummary.from_list(frames).format())


@dataclass(frozen=True, slots=True)
class _Hold:
    """A lock that is held, by whom, and where it was taken."""

    lock: Handle
    who: str
    trace: Trace

    @property
    def kind(self) -> str | None:
        """The class of the lock; None: nobody knows."""
        if self.lock.resource.named:
            return _ID.sub("#", self.lock.label)
        cls = observing.class_of(self.lock)
        return None if cls is None else f"{cls.__module__}.{cls.__qualname__}"

    @property
    def label(self) -> str:
        kind = self.kind
        return self.lock.label if self.lock.resource.named or kind is None else f"{kind} ({self.lock.label})"


class _Here(threading.local):
    """What this thread holds, outside of tasks."""

    def __init__(self) -> None:
        self.holds: list[_Hold] = []


# -- the graph ---------------------------------------------------------------------------------------------------------


class _Node:
    """A class of locks, or a lock."""

    __slots__ = ("__weakref__", "kind")

    def __init__(self, kind: str) -> None:
        self.kind = kind


@dataclass(frozen=True, slots=True)
class _Edge:
    """The first time that one was taken while the other was held."""

    who: str
    kind: str  # of the one that was held
    held: str
    held_trace: Trace
    taken: str
    taken_trace: Trace

    def as_step(self) -> Step:
        return Step(self.who, self.held, _as_text(self.held_trace), self.taken, _as_text(self.taken_trace))


class _Check:
    """An observer: what was taken while what was held.  Nodes of locks without a name go with them; others when there
    are too many."""

    def __init__(self) -> None:
        self.found: list[Inversion] = []
        self.pairs: set[frozenset[str]] = set()
        self.named: dict[str, _Node] = {}  # classes, and locks that have a name
        self.anonymous: weakref.WeakKeyDictionary[Handle, _Node] = weakref.WeakKeyDictionary()
        self.after: weakref.WeakKeyDictionary[_Node, weakref.WeakKeyDictionary[_Node, _Edge]]
        self.after = weakref.WeakKeyDictionary()
        self.edges: deque[tuple[weakref.ref[_Node], weakref.ref[_Node]]] = deque()  # the oldest first
        self.begin()

    def begin(self) -> None:
        """In this process nobody holds anything."""
        self.guard = threading.Lock()  # of the graph; what a signal's handler takes meanwhile is not heard of
        self.here = _Here()
        self.tasks: weakref.WeakKeyDictionary[Any, list[_Hold]] = weakref.WeakKeyDictionary()

    # -- by observing.py -----------------------------------------------------------------------------------------------

    def acquired(self, lock: Handle, _waited: float) -> None:
        """One more is held."""
        *around, mine = self._holds()
        taken = _Hold(lock, _caller(), _trace())
        mine[:] = [one for one in mine if one.lock is not lock and one.lock._mine()]  # else it was lost, untold
        if not observing.once():
            for one in [*(one for holds in around for one in holds if one.lock._mine()), *mine]:
                self._note(one, taken)
        mine.append(taken)

    def released(self, lock: Handle) -> None:
        """One less; what another has held is forgotten with that."""
        for holds in self._holds():
            holds[:] = [one for one in holds if one.lock is not lock]

    def _holds(self) -> list[list[_Hold]]:
        """Those of the thread, and of the task that it runs: a task waits with all of them."""
        task = current_task()
        return [self.here.holds] if task is None else [self.here.holds, self.tasks.setdefault(task, [])]

    # -- the graph -----------------------------------------------------------------------------------------------------

    def _note(self, held: _Hold, taken: _Hold) -> None:
        inversion = None
        with self.guard:
            first, second = self._nodes(held, taken)
            after = self.after.setdefault(first, weakref.WeakKeyDictionary())
            if second not in after:
                edge = _Edge(taken.who, first.kind, held.label, held.trace, taken.label, taken.trace)
                way = self._way(second, first)
                after[second] = edge
                self._bound(first, second)
                if way:
                    inversion = self._inversion(frozenset([first.kind, second.kind]), [*way, edge])
        if inversion is not None:
            logging.getLogger("coheld").warning("%s", inversion)

    def _bound(self, first: _Node, second: _Node) -> None:
        """An edge is new: the oldest tenth goes, where that makes too many.  Those of locks that are gone went with
        them, and are passed over first."""
        self.edges.append((weakref.ref(first), weakref.ref(second)))
        if len(self.edges) > _MOST:
            self.edges = deque(edge for edge in self.edges if edge[0]() is not None and edge[1]() is not None)
            while len(self.edges) > _MOST * 9 // 10:
                one, other = (reference() for reference in self.edges.popleft())
                if one is not None and other is not None:
                    self.after[one].pop(other, None)
        while len(self.named) > _MOST:
            del self.named[next(iter(self.named))]

    def _nodes(self, held: _Hold, taken: _Hold) -> tuple[_Node, _Node]:
        """Of the locks, where both are of one class; else of the classes, where they are known."""
        kinds = held.kind, taken.kind
        one, other = (
            self._named(kind) if kind is not None and kinds[0] != kinds[1] else self._single(hold, kind)
            for hold, kind in zip((held, taken), kinds, strict=True)
        )
        return one, other

    def _named(self, kind: str, name: str | None = None) -> _Node:
        return self.named.setdefault(name or kind, _Node(kind))

    def _single(self, hold: _Hold, kind: str | None) -> _Node:
        label = hold.lock.label
        if hold.lock.resource.named:
            return self._named(kind or label, f"one {label}")
        return self.anonymous.setdefault(hold.lock, _Node(kind or label))

    def _way(self, begin: _Node, end: _Node) -> list[_Edge] | None:
        """The shortest, of those that were taken after each other."""
        ways: dict[_Node, list[_Edge]] = {begin: []}
        for node in (queue := [begin]):
            for following, edge in list(self.after.get(node, {}).items()):
                if following not in ways:
                    ways[following] = [*ways[node], edge]
                    queue.append(following)
        return ways.get(end)

    def _inversion(self, pair: frozenset[str], circle: list[_Edge]) -> Inversion | None:
        """None: it has been said of that pair."""
        if pair in self.pairs:
            return None
        self.pairs.add(pair)
        classes = tuple(dict.fromkeys(edge.kind for edge in circle))
        self.found.append(Inversion(classes, tuple(edge.as_step() for edge in circle)))
        return self.found[-1]


def _caller() -> str:
    task = current_task()
    return f"thread {threading.current_thread().name}" if task is None else f"task {task.get_name()}"


class _Process:
    """Of this process."""

    check: _Check | None = None
    last: _Check | None = None

    def become_child(self) -> None:
        if self.check is not None:
            self.check.begin()


_process = _Process()
at_fork(child=_process.become_child)
