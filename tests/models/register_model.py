"""Readers and writers of one lock, as a model: the counts of a register, `wanted`, `news`; see the head of _register.h.

A reader counts itself in and looks at the lock after that; a writer has the mutex before it looks at the counts. Every
store and look that another process can see is one step, and a process may be killed at each. Waiters of the mutex are
lock_model's, and those behind a task task_model's: here they simply try again.

A sleep on `news` ends by itself only where the protocol owes no wake: where a dead process is counted in, or died
between its count and its wake. So a wake that is lost otherwise is found, though the code's sleeps are bounded.

`mutant` takes one rule away, to show that the search would notice.
"""

from collections.abc import Iterator
from typing import NamedTuple

NONE, FREE, DIED = -1, -1, -2
LEAVING = ("look_wanted", "bump", "wake")


class Caller(NamedTuple):
    """One process each."""

    role: str
    """reader, nester (reads inside of reading), writer, hasty (a writer that gives up), task (that writes)."""
    step: str = "begin"
    calls: int = 1
    slot: int = NONE
    """Its record."""
    at: int = 0
    """The record that it looks at next."""
    seen: int = 0
    """Of news, before it looked."""
    then: str = ""
    """What comes after it has counted itself out."""


class Entrant(NamedTuple):
    who: int
    count: int = 0


class State(NamedTuple):
    callers: tuple[Caller, ...]
    entrants: tuple[Entrant, ...] = ()
    word: int = FREE
    tasked: int = NONE
    """The task that owns."""
    recovering: bool = False
    readers: bool = False
    """READERS is up."""
    wanted: bool = False
    news: int = 0
    inside: frozenset[int] = frozenset()
    dirty: bool = False
    """A writer died inside, and nobody has put that right."""
    unwoken: bool = False
    """Who died owed the sleeper a wake."""
    deaths_left: int = 0


class Readers:
    """The model."""

    def __init__(self, mutant: str = "") -> None:
        self.mutant = mutant

    def successors(self, s: State) -> Iterator[tuple[str, State]]:
        for i, c in enumerate(s.callers):
            if c.step in ("done", "dead"):
                continue
            for name, successor in getattr(self, c.step)(s, i, c):
                yield f"{c.role} {i}: {name}", successor
            if s.deaths_left and c.step != "begin":
                yield f"{c.role} {i}: is killed at {c.step}", die(s, i)

    def begin(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        reads = c.role in ("reader", "nester") and c.slot != NONE
        first = "peek_word" if self.mutant == "a reader looks before it counts" else "count_in"
        yield "calls", at(s, i, c, step=first if reads else "trylock")

    def again(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "goes on", at(s, i, c, step="begin" if c.calls > 1 else "done", calls=c.calls - 1)

    # -- a reader, without the mutex ----------------------------------------------------------------------------------

    def count_in(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        flags_first = self.mutant == "the flags are looked at before the word"
        yield "counts itself in", at(counted(s, c.slot, 1), i, c, step="look_flags" if flags_first else "look_word")

    def look_word(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        last = self.mutant == "the flags are looked at before the word"
        if s.word != FREE and not (s.word == DIED and self.mutant == "a reader passes what a dead writer left"):
            yield "sees that it is taken", at(s, i, c, step="back_out")
        elif last:
            yield "is in", at(enter(s, i), i, c, step="body")
        else:
            yield "sees that it is free", at(s, i, c, step="look_flags")

    def look_flags(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        passes = not s.recovering or self.mutant == "a reader passes what a dead writer left"
        if s.tasked != NONE or not passes:
            yield "sees a flag", at(s, i, c, step="back_out")
        elif self.mutant == "the flags are looked at before the word":
            yield "sees no flag", at(s, i, c, step="look_word")
        else:
            yield "is in", at(enter(s, i), i, c, step="body")

    def peek_word(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        free = s.word == FREE and s.tasked == NONE and not s.recovering
        yield "looks", at(s, i, c, step="count_late" if free else "trylock")

    def count_late(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "counts itself in, is in", at(enter(counted(s, c.slot, 1), i), i, c, step="body")

    def back_out(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        silent = self.mutant == "who backs out does not look for wanted"
        after = "trylock" if silent else "look_wanted"
        yield "counts itself out again", at(counted(s, c.slot, -1), i, c, step=after, then="trylock")

    def leave(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if self.mutant == "wanted is looked at before the count goes down":
            yield "looks for wanted", at(s, i, c, step="out_late", then="bump" if s.wanted else c.then)
        else:
            yield "counts itself out", at(counted(s, c.slot, -1), i, c, step="look_wanted")

    def out_late(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        after = c._replace(then="again") if c.then == "bump" else c
        yield "counts itself out", at(counted(s, c.slot, -1), i, after, step=c.then)

    def look_wanted(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "looks for wanted", at(s, i, c, step="bump" if s.wanted else c.then)

    def bump(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "has news", at(s._replace(news=s.news + 1), i, c, step="wake")

    def wake(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "wakes", at(woken(s), i, c, step=c.then)

    # -- the mutex ----------------------------------------------------------------------------------------------------

    def trylock(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        gone = s.tasked != NONE and s.callers[s.tasked].step == "dead"
        if s.word not in (FREE, DIED) or (s.tasked != NONE and not gone):
            return
        died = s.word == DIED or gone
        if self.mutant == "a writer looks before it has the mutex" and c.role == "writer":
            busy = any(one.count for one in s.entrants)
            yield "looks", at(s, i, c, step="settle" if busy else "lock_late")
            return
        held = s._replace(word=i, recovering=s.recovering or died, tasked=NONE if gone else s.tasked)
        yield "inherits the mutex" if died else "has the mutex", at(held, i, c, step="settle")

    def lock_late(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.word == FREE and s.tasked == NONE:
            yield "has the mutex, is in", at(enter(s._replace(word=i), i), i, c, step="body")

    def settle(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.word != i:  # of a mutant that looks first
            if s.word == FREE:
                yield "has the mutex", at(s._replace(word=i), i, c)
            return
        together = c.role in ("reader", "nester") and not s.recovering
        trusts = s.recovering and self.mutant == "who inherits does not look for readers"
        looks = s.readers and not together and not trusts
        yield "looks at the flags", at(s, i, c, step="scan" if looks else "has_waited", at=0)

    def has_waited(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        """Nobody reads; or others may."""
        if s.recovering:
            yield "recovers", at(s._replace(recovering=False, dirty=False), i, c)
        elif c.role in ("reader", "nester"):
            yield "has a record" if c.slot != NONE else "needs a record", at(s, i, c, step="claim")
        elif c.role == "task":
            yield "sets TASKED", at(enter(s._replace(tasked=i), i), i, c, step="give_mutex")
        else:
            yield "is in", at(enter(s, i), i, c, step="body")

    # -- a writer waits for readers, with the mutex -------------------------------------------------------------------

    def scan(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        late = self.mutant == "wanted is set after the look"
        yield self.look(s, i, c, busy="read_news" if late else "want")

    def look(self, s: State, i: int, c: Caller, busy: str) -> tuple[str, State]:
        """At the next count."""
        if c.at == len(s.entrants):
            return "finds nobody", at(s, i, c, step="not_wanted")
        if s.entrants[c.at].count:
            return "finds a reader", at(s, i, c, step=busy, at=0)
        return "looks at a count", at(s, i, c, at=c.at + 1)

    def want(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        late = self.mutant in ("wanted is set after the look", "news is read after the look")
        yield "sets wanted", at(s._replace(wanted=True), i, c, step="reap" if late else "read_news", at=0)

    def read_news(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        after = "sleep" if self.mutant == "news is read after the look" else "reap"
        yield "reads the news", at(s._replace(unwoken=False), i, c, step=after, at=0, seen=s.news)

    def reap(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if c.at == len(s.entrants):
            yield "has looked for the dead", at(s, i, c, step="look_again", at=0)
            return
        who, count = s.entrants[c.at]
        dead = s.callers[who].step == "dead" or self.mutant == "reap does not ask whether the process is gone"
        if count and dead and self.mutant != "the dead are not reaped":
            yield "takes a dead one off", at(counted(s, c.at, -count), i, c, at=c.at + 1)
        else:
            yield "asks whether it lives", at(s, i, c, at=c.at + 1)

    def look_again(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        late = {"wanted is set after the look": "want_late", "news is read after the look": "read_news"}
        waits = "give_up" if c.role == "hasty" else late.get(self.mutant, "sleep")
        yield self.look(s, i, c, busy=waits)

    def want_late(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "sets wanted", at(s._replace(wanted=True), i, c, step="sleep")

    def sleep(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        same = s.news == c.seen or self.mutant == "the kernel does not compare again"
        yield "sleeps unless there is news", at(s, i, c, step="asleep" if same else "scan", at=0)

    def asleep(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.unwoken or any(one.count and s.callers[one.who].step == "dead" for one in s.entrants):
            yield "has slept", at(s, i, c, step="scan")

    def not_wanted(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "takes wanted down", at(s._replace(wanted=False), i, c, step="has_waited")

    def give_up(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "takes wanted down", at(s._replace(wanted=False), i, c, step="unlock", then="again")

    # -- a reader, with the mutex -------------------------------------------------------------------------------------

    def claim(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        dead = next((at for at, one in enumerate(s.entrants) if s.callers[one.who].step == "dead"), None)
        if c.slot != NONE:
            yield "has one", at(s, i, c, step="count_under")
        elif dead is None:
            new = s._replace(entrants=(*s.entrants, Entrant(i)))
            yield "has a new one", at(new, i, c, step="count_under", slot=len(s.entrants))
        else:
            step = "name" if self.mutant == "a dead one's count stays with its record" else "zero"
            yield "finds a dead one's", at(s, i, c, step=step, at=dead)

    def zero(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "takes its count off", at(counted(s, c.at, -s.entrants[c.at].count), i, c, step="name")

    def name(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        ours = put(s, c.at, s.entrants[c.at]._replace(who=i))
        yield "has it", at(ours, i, c, step="count_under", slot=c.at)

    def count_under(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        late = self.mutant == "READERS goes up after the mutex is given back"
        yield "counts itself in", at(counted(s, c.slot, 1), i, c, step="unlock_early" if late else "flag")

    def unlock_early(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "gives the mutex back", at(enter(s._replace(word=FREE), i), i, c, step="flag")

    def flag(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        step = "unlock" if s.word == i else "body"
        yield "sets READERS", at(s._replace(readers=True), i, c, step=step, then="body")

    def unlock(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        free = s._replace(word=FREE)
        yield "gives the mutex back", at(enter(free, i) if c.then == "body" else free, i, c, step=c.then)

    # -- bodies -------------------------------------------------------------------------------------------------------

    def body(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if c.role == "nester":
            if s.word == FREE or self.mutant != "who reads inside of reading queues":
                yield "reads inside of that", at(counted(s, c.slot, 1), i, c, step="inner")
            return
        s = s._replace(inside=s.inside - {i})
        if c.role == "reader":
            yield "ends its body", at(s, i, c, step="leave", then="again")
        else:
            yield "ends its body", at(s, i, c, step="take_off" if c.role == "task" else "unlock", then="again")

    def inner(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "counts the inner one out", at(counted(s, c.slot, -1), i, c, step="look_wanted", then="outer")

    def outer(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "ends its body", at(s._replace(inside=s.inside - {i}), i, c, step="leave", then="again")

    def give_mutex(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "gives the mutex back", at(s._replace(word=FREE), i, c, step="body")

    def take_off(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "takes TASKED off", at(s._replace(tasked=NONE), i, c, step="again")


def at(s: State, i: int, c: Caller, **changes: object) -> State:
    return s._replace(callers=(*s.callers[:i], c._replace(**changes), *s.callers[i + 1 :]))


def put(s: State, slot: int, entrant: Entrant) -> State:
    return s._replace(entrants=(*s.entrants[:slot], entrant, *s.entrants[slot + 1 :]))


def counted(s: State, slot: int, change: int) -> State:
    return put(s, slot, s.entrants[slot]._replace(count=max(0, s.entrants[slot].count + change)))


def enter(s: State, i: int) -> State:
    return s._replace(inside=s.inside | {i})


def woken(s: State) -> State:
    return s._replace(callers=tuple(c._replace(step="scan", at=0) if c.step == "asleep" else c for c in s.callers))


def die(s: State, i: int) -> State:
    c = s.callers[i]
    wrote = i in s.inside and c.role not in ("reader", "nester")
    s = s._replace(
        deaths_left=s.deaths_left - 1,
        word=DIED if s.word == i else s.word,
        inside=s.inside - {i},
        dirty=s.dirty or wrote,
        unwoken=s.unwoken or c.step in LEAVING,
    )
    return at(s, i, Caller(c.role, step="dead"))


def check(s: State, stuck: bool) -> str | None:
    if len(s.inside) > 1 and any(s.callers[i].role not in ("reader", "nester") for i in s.inside):
        return "a writer is inside with another"
    if s.inside and s.dirty:
        return "somebody is inside before a dead writer's work is put right"
    if stuck and not ended(s):
        return "somebody waits for ever"
    return None


def ended(s: State) -> bool:
    return all(c.step in ("done", "dead") for c in s.callers)
