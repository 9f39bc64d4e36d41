"""The search for cycles of waits, as a model; see backends/deadlock.py and _table.h.

Callers take and give locks by a program; each has a slot in the table of waiters, and each lock a record that says who
owns it.  Both are hints: written beside the truth, one step each.  A caller that waits may search, and a watcher that
waits for nothing may search from anybody's wait; both read one word a step.  A task is granted a lock by a thread that
waits in its stead.  A handler of a signal runs in the middle of a wait, and has a lock meanwhile.  Who waits with a
time-out may give up at any moment.

Rules: who is told is in a cycle of waits at that moment, and so is exactly one of it, as who was told waits no more.
What a watcher finds was a cycle at some moment of its look.  And everybody can come to an end.

`mutant` takes one rule away, to show that the search would notice.
"""

from collections.abc import Iterator
from typing import NamedTuple

NONE, HELPER = -1, -2


class Wait(NamedTuple):
    """As it was read."""

    who: int
    number: int
    lock: int
    since: int


class Look(NamedTuple):
    """Of somebody who searches.  mine: from whose wait."""

    mine: int
    step: str = "slot"
    who: int = NONE
    """Whose slot it reads now."""
    at: int = 0
    seen: tuple[int, int, bool, int] = (0, NONE, False, 0)
    """Of that slot: number, lock, timed, since."""
    chain: tuple[Wait, ...] = ()
    owners: tuple[int, ...] = ()


class Caller(NamedTuple):
    """program: "take", "hurry" (with a time-out), or "give", and which lock.  handler: the lock that a signal's handler
    has once, in the middle of a wait."""

    program: tuple[tuple[str, int], ...]
    task: bool = False
    handler: int = NONE
    searches: bool = True
    step: str = "next"
    number: int = 0
    lock: int = NONE
    timed: bool = False
    since: int = 0
    look: Look | None = None


class State(NamedTuple):
    callers: tuple[Caller, ...]
    truth: tuple[int, ...]
    """Who has each lock."""
    records: tuple[int, ...]
    """Who is said to."""
    clock: int = 0
    watched: Look | None = None
    """A watcher's look."""
    was_real: bool = False
    """Was there a cycle with that wait since the watcher's look began?"""
    wrong: str = ""


class Search:
    """The model.  ticks: how often time passes."""

    def __init__(self, mutant: str = "", ticks: int = 1, watcher: int = NONE) -> None:
        self.mutant, self.ticks, self.watcher = mutant, ticks, watcher

    def successors(self, s: State) -> Iterator[tuple[str, State]]:
        for i, c in enumerate(s.callers):
            for name, successor in getattr(self, c.step)(s, i, c):
                yield f"{i}: {name}", self.noting(successor)
            if c.step in WAITING and c.look:
                for name, look, end in self.looking(s, c.look, i):
                    yield f"{i} searches: {name}", self.noting(self.concluded(s, i, look, end))
        if s.clock < self.ticks:
            yield "time passes", s._replace(clock=s.clock + 1)
        if self.watcher != NONE:
            yield from self.watch(s)

    def noting(self, s: State) -> State:
        return s._replace(was_real=s.watched is not None and (s.was_real or real(s, s.watched.mine)))

    # -- callers -------------------------------------------------------------------------------------------------------

    def next(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if not c.program:
            return
        what, lock = c.program[0]
        if what == "give":
            records = put(s.records, lock, NONE)
            yield f"clears the record of {lock}", at(s._replace(records=records), i, c, step="free")
        elif s.truth[lock] == NONE:
            yield f"takes {lock}", at(s._replace(truth=put(s.truth, lock, i)), i, c, step="record")
        else:
            number = c.number if self.mutant == "the number of the last wait" else even(c.number)
            yield "says that it says nothing", at(s, i, c, step="write", number=number)

    def free(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        lock = c.program[0][1]
        yield f"gives {lock}", at(s._replace(truth=put(s.truth, lock, NONE)), i, c, step="next", program=c.program[1:])

    def record(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        lock = c.program[0][1]
        step = "late_hide" if c.number % 2 else "next"
        s = s._replace(records=put(s.records, lock, i))
        yield f"writes that it has {lock}", at(s, i, c, step=step, program=c.program[1:])

    def late_hide(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        """Of mutants only."""
        number = c.number - 1 if self.mutant == "the number of the last wait" else c.number + 1
        yield "says too late that it waits no more", at(s, i, c, step="next", number=number)

    def write(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        what, lock = c.program[0]
        yield (
            f"writes that it waits for {lock}",
            at(s, i, c, step="publish", lock=lock, timed=what == "hurry", since=s.clock),
        )

    def publish(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "says that it waits", at(s, i, c, step="wait", number=c.number | 1)

    def wait(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.truth[c.lock] == NONE and (c.task or c.look is None):  # a task's thread does not know that it searches
            step = ("hide" if self.mutant != "it waits and has it" else "record") if not c.task else "granted"
            who = HELPER if c.task else i
            records = put(s.records, c.lock, HELPER) if c.task else s.records
            taken = s._replace(truth=put(s.truth, c.lock, who), records=records)
            yield f"{'its thread ' * c.task}takes {c.lock}", at(taken, i, c, step=step)
        elif c.timed:
            yield "gives up", at(s, i, c, step="give_up")
        if c.look is None and c.searches and not c.timed:
            yield "begins to search", at(s, i, c, look=Look(i, who=i))
        if c.look is None and c.handler != NONE and s.truth[c.handler] == NONE:
            step, number = "handler", c.number + 1
            if self.mutant == "a handler has a lock in a wait":
                number = c.number
            yield "a handler begins", at(s, i, c, step=step, number=number)

    def handler(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.truth[c.handler] == NONE:
            s = s._replace(truth=put(s.truth, c.handler, i), records=put(s.records, c.handler, i))
            yield f"its handler takes {c.handler}", at(s, i, c, step="handled")
        else:
            yield "its handler does not get it", at(s, i, c, step="publish", handler=NONE)

    def handled(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        s = s._replace(truth=put(s.truth, c.handler, NONE), records=put(s.records, c.handler, NONE))
        yield f"its handler gives {c.handler}", at(s, i, c, step="publish", handler=NONE)

    def hide(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        number = c.number - 1 if self.mutant == "the number of the last wait" else c.number + 1
        yield "says that it waits no more", at(s, i, c, step="record", number=number)

    def granted(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        """A task: its thread has it, and settles the turn under a guard."""
        if c.step == "granted":
            step = "record" if self.mutant == "it waits and has it" else "hide"
            yield "is granted", at(s._replace(truth=put(s.truth, c.lock, i)), i, c, step=step, look=c.look)

    def give_up(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        """Told, or too late: it gives all that it has, and ends."""
        gives = tuple(("give", lock) for lock, who in enumerate(s.truth) if who == i)
        yield "says that it waits no more", at(s, i, c, step="next", number=even(c.number), program=gives, look=None)

    # -- a search ------------------------------------------------------------------------------------------------------

    def looking(self, s: State, k: Look, searcher: int) -> Iterator[tuple[str, Look, str]]:
        """What it does, how it is afterwards, and "", "none" or "cycle"."""
        if k.step == "slot":
            c = s.callers[k.who]
            if not c.number % 2:
                yield "no wait", k, "none"
            else:
                yield f"reads the number of {k.who}", k._replace(step="body", seen=(c.number, NONE, False, 0)), ""
        elif k.step == "body":
            c = s.callers[k.who]
            seen = (k.seen[0], c.lock, c.timed, c.since)
            yield f"reads the wait of {k.who}", k._replace(step="same", seen=seen), ""
        elif k.step == "same":
            yield from self.same(s, k)
        elif k.step == "owner":
            yield from self.owner(s, k)
        elif k.at == len(k.chain):
            following = {"numbers": "owners", "owners": "numbers again", "numbers again": ""}[k.step]
            yield "has looked at all", k._replace(step=following or k.step, at=0), "" if following else "cycle"
        elif self.stands(s, k):
            yield f"{k.step}: {k.chain[k.at].who} is the same", k._replace(at=k.at + 1), ""
        else:
            yield f"{k.step}: {k.chain[k.at].who} is another", k, "none"

    def same(self, s: State, k: Look) -> Iterator[tuple[str, Look, str]]:
        number, lock, timed, since = k.seen
        if s.callers[k.who].number != number or (timed and self.mutant != "a timed wait is an edge"):
            yield "not one wait, or one that ends", k, "none"
        elif any(wait.who == k.who for wait in k.chain):
            yield "was there before", k, "none"
        else:
            wait = Wait(k.who, number, lock, since)
            yield "has read a wait", k._replace(step="owner", chain=(*k.chain, wait)), ""

    def owner(self, s: State, k: Look) -> Iterator[tuple[str, Look, str]]:
        found = s.records[k.chain[-1].lock]
        if found < 0:
            yield "nobody has it", k, "none"
        elif found == k.mine:
            yield "is back", k._replace(step="numbers", owners=(*k.owners, found)), ""
        else:
            yield f"{found} has it", k._replace(step="slot", who=found, owners=(*k.owners, found)), ""

    def stands(self, s: State, k: Look) -> bool:
        wait = k.chain[k.at]
        if k.step == "owners":
            return self.mutant == "owners are not read again" or s.records[wait.lock] == k.owners[k.at]
        return self.mutant == "numbers are not read again" or s.callers[wait.who].number == wait.number

    def concluded(self, s: State, i: int, k: Look, end: str) -> State:
        c = s.callers[i]
        if not end:
            return at(s, i, c, look=k)
        if end == "none" or self.victim(k) != i:
            return at(s, i, c, look=None)
        if c.step != "wait":
            return at(s, i, c, look=None)  # a task, and its turn is settled
        if not real(s, i):
            return s._replace(wrong=f"{i} is told, and is in no cycle")
        return at(s, i, c, step="give_up", look=None)

    def victim(self, k: Look) -> int:
        def age(wait: Wait) -> tuple[int, ...]:
            return (wait.since,) if self.mutant == "no tie is broken" else (wait.since, wait.who)

        return max(k.chain, key=age).who

    def watch(self, s: State) -> Iterator[tuple[str, State]]:
        """By one who waits for nothing."""
        if s.watched is None:
            look = Look(self.watcher, who=self.watcher)
            yield "the watcher begins", self.noting(s._replace(watched=look, was_real=False))
            return
        for name, look, end in self.looking(s, s.watched, NONE):
            if end == "cycle" and not s.was_real:
                yield f"the watcher: {name}", s._replace(wrong="the watcher has found a cycle where there was none")
            else:
                yield f"the watcher: {name}", self.noting(s._replace(watched=None if end else look))


WAITING = ("wait", "granted", "hide")
"""Where one may be in the middle of a search of its own."""


def even(number: int) -> int:
    return (number | 1) + 1


def put(values: tuple[int, ...], where: int, value: int) -> tuple[int, ...]:
    return (*values[:where], value, *values[where + 1 :])


def at(s: State, i: int, c: Caller, **changes: object) -> State:
    return s._replace(callers=(*s.callers[:i], c._replace(**changes), *s.callers[i + 1 :]))


def real(s: State, first: int) -> bool:
    """Is it in a cycle of waits without an end, in truth?"""
    who = first
    for _ in s.callers:
        c = s.callers[who]
        if c.step != "wait" or c.timed:
            return False
        who = s.truth[c.lock]
        if who < 0:
            return False
        if who == first:
            return True
    return False


def check(s: State, stuck: bool) -> str | None:
    return s.wrong or None


def ended(s: State) -> bool:
    return all(c.step == "next" and not c.program for c in s.callers)
