"""Tasks as owners, as a model: TASKED, the nonce, and who sleeps where; see the head of _lock.h.

A task takes the mutex by its thread, entrusts the lock to itself, gives the mutex back, and releases without it. Others
take the mutex, see TASKED and sleep on task_futex, or have the lock. Every store and look that another process can see
is one step; a process may be killed at each. Waiters of the mutex itself are lock_model's: here they simply try again.

`mutant` takes one rule away, to show that the search would notice.
"""

from collections.abc import Iterator
from typing import NamedTuple

NONE = -1


class Caller(NamedTuple):
    """One process each; a task, or a thread."""

    role: str
    step: str = "trylock"
    calls: int = 1
    mine: int = 0
    """Nonce of its own ownership."""
    seen: int = 0
    """Of task_futex, before it looked."""
    sight: int = 0
    """The nonce of which it has found that its process is gone."""


class State(NamedTuple):
    callers: tuple[Caller, ...]
    mutex: int = NONE
    """Who has it."""
    tasked: bool = False
    nonce: int = 0
    """Number * 4, + 1: gone, + 2: being released."""
    who: int = NONE
    futex: int = 0
    taken: int = 0
    inside: tuple[int, ...] = ()
    deaths_left: int = 0


class Tasks:
    """The model."""

    def __init__(self, mutant: str = "") -> None:
        self.mutant = mutant

    def successors(self, s: State) -> Iterator[tuple[str, State]]:
        for i, c in enumerate(s.callers):
            if c.step in ("done", "dead"):
                continue
            for name, successor in getattr(self, c.step)(s, i, c):
                yield f"{c.role} {i}: {name}", successor
            if s.deaths_left:
                yield f"{c.role} {i}: is killed at {c.step}", die(s, i)

    def trylock(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.mutex == NONE:
            yield "has the mutex", at(s._replace(mutex=i), i, c, step="look")

    def look(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.tasked and not s.nonce & 1 and self.mutant != "TASKED is not looked at":
            yield "sees TASKED, gives the mutex back", at(s._replace(mutex=NONE), i, c, step="read_futex")
        elif s.tasked:
            yield "inherits", at(s._replace(tasked=False), i, c, step="own")
        else:
            yield "sees that it is free", at(s, i, c, step="own")

    def own(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        taken = s.taken + 1
        s = s._replace(taken=taken)
        if c.role == "thread":
            yield "is inside", at(enter(s, i), i, c, step="body")
        else:
            nonce = taken * 4 if self.mutant != "a nonce is used again" else 4
            yield "writes who", at(s._replace(who=i), i, c, step="write_nonce", mine=nonce)

    def write_nonce(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "writes its nonce", at(s._replace(nonce=c.mine), i, c, step="entrust")

    def entrust(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "sets TASKED", at(enter(s._replace(tasked=True), i), i, c, step="give_mutex")

    def give_mutex(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "gives the mutex back", at(s._replace(mutex=NONE), i, c, step="body")

    def body(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if c.role == "thread":
            yield "releases", at(leave(s._replace(mutex=NONE), i), i, c, step="again")
        else:
            yield "ends its body", at(leave(s, i), i, c, step="claim")

    def claim(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.nonce == c.mine:
            yield "claims the release", at(s._replace(nonce=c.mine | 2), i, c, step="take_off")
        else:
            yield "is no owner any more", at(s, i, c, step="again")

    def take_off(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if self.mutant == "the futex moves first":
            yield "moves the futex", at(woken(s._replace(futex=s.futex + 1)), i, c, step="take_off_last")
        else:
            yield "takes TASKED off", at(s._replace(tasked=False), i, c, step="move")

    def take_off_last(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "takes TASKED off", at(s._replace(tasked=False), i, c, step="again")

    def move(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "moves the futex, wakes", at(woken(s._replace(futex=s.futex + 1)), i, c, step="again")

    def again(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        more = c.calls > 1
        yield "goes on", at(s, i, c, step="trylock" if more else "done", calls=c.calls - 1, mine=0)

    # -- behind a task ------------------------------------------------------------------------------------------------

    def read_futex(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "reads the futex", at(s, i, c, step="look_again", seen=s.futex)

    def look_again(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.tasked:
            yield "still sees TASKED", at(s, i, c, step="examine", sight=s.nonce)
        else:
            yield "sees that it is free", at(s, i, c, step="trylock")

    def examine(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.who != NONE and s.callers[s.who].step == "dead":
            yield "finds its process gone", at(s, i, c, step="bury")
        else:
            yield "finds it alive", at(s, i, c, step="sleep")

    def bury(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.nonce == c.sight or self.mutant == "it is buried without a look at the nonce":
            s = woken(s._replace(nonce=s.nonce | 1, futex=s.futex + 1))
        yield "says so", at(s, i, c, step="trylock", sight=0)

    def sleep(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        step = "asleep" if s.futex == c.seen else "trylock"
        yield "sleeps unless it has moved", at(s, i, c, step=step)

    def asleep(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        """Its slice ends; only a death needs that."""
        if any(other.step == "dead" for other in s.callers) and self.mutant != "a sleep has no end":
            yield "has slept", at(s, i, c, step="trylock")


def at(s: State, i: int, c: Caller, **changes: object) -> State:
    return s._replace(callers=(*s.callers[:i], c._replace(**changes), *s.callers[i + 1 :]))


def enter(s: State, i: int) -> State:
    return s._replace(inside=(*s.inside, i))


def leave(s: State, i: int) -> State:
    return s._replace(inside=tuple(one for one in s.inside if one != i))


def woken(s: State) -> State:
    """All: that one is woken and the others are moved is lock_model's."""
    return s._replace(callers=tuple(c._replace(step="trylock") if c.step == "asleep" else c for c in s.callers))


def die(s: State, i: int) -> State:
    """The kernel gives the mutex of the dead to whoever comes next."""
    s = leave(s._replace(deaths_left=s.deaths_left - 1, mutex=NONE if s.mutex == i else s.mutex), i)
    return at(s, i, s.callers[i], step="dead")


def check(s: State, stuck: bool) -> str | None:
    if len(s.inside) > 1:
        return "two are inside"
    if stuck and any(c.step not in ("done", "dead") for c in s.callers):
        return "somebody waits for ever"
    return None
