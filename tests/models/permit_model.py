"""The permits of a semaphore, as a model: the mutex, the gate, GUARDED and the epoch; see the heads of _permits.h and
_register.h.

A permit is in the record of its process or free; both change under the mutex, by the short way or the long one. One
waits, in the gate, and the others queue behind it. Every store and look that another process can see is one step, and a
process may be killed at each. Waiters of the mutex and of the gate are lock_model's: here they simply try again.

A sleep on the epoch ends by itself only where no wake is owed: where a death, or who cleaned up after one, has made a
permit free. So a wake that a living process owes and does not give is found, though the code's sleeps are bounded.

`mutant` takes one rule away, to show that the search would notice.
"""

from collections.abc import Iterator
from typing import NamedTuple

NONE, FREE, DIED = -1, -1, -2


class Caller(NamedTuple):
    """One process each."""

    role: str
    """user: waits for a permit, and gives it back.  hasty: gives up where it would sleep.  trier: tries once."""
    step: str = "begin"
    calls: int = 1
    slot: int = NONE
    """Its record."""
    at: int = 0
    """The record that it looks at next."""
    seen: int = 0
    """The epoch that it has read."""
    has: int = 0
    """Permits that it has been told it has."""
    gives: bool = False
    """What it has the mutex for."""
    gated: bool = False
    tells: bool = False


class Entrant(NamedTuple):
    who: int
    count: int = 0


class State(NamedTuple):
    callers: tuple[Caller, ...]
    value: int
    free: int
    entrants: tuple[Entrant, ...] = ()
    word: int = FREE
    recovering: bool = False
    gate: int = FREE
    guarded: bool = False
    epoch: int = 0
    untold: bool = False
    """A permit may be free, by a death, since the waiter began to look."""
    deaths_left: int = 0


class Permits:
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
        straight = c.role == "trier" or s.gate == FREE
        yield "asks for one", at(s, i, c, step="slip_in" if straight else "pass_gate", gives=False)

    def again(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "goes on", at(s, i, c, step="begin" if c.calls > 1 else "done", calls=c.calls - 1)

    # -- the short way ------------------------------------------------------------------------------------------------

    def slip_in(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if c.slot == NONE or s.word not in (FREE, DIED):
            yield "goes the long way", at(s, i, c, step="enter")
        else:
            held = s._replace(word=i, recovering=s.recovering or s.word == DIED)
            yield "slips in", at(held, i, c, step="slip_look")

    def slip_look(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.recovering and self.mutant != "the short way passes what a dead owner left":
            yield "slips out: there are duties", at(s._replace(word=FREE), i, c, step="enter")
        elif c.gives:
            yield "gives", at(s, i, c, step="lower")
        elif s.free > 0:
            yield "finds one", at(s, i, c, step="take_free")
        else:
            yield "slips out: none is free", at(s._replace(word=FREE), i, c, step="enter")

    # -- the long way -------------------------------------------------------------------------------------------------

    def enter(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.word in (FREE, DIED):
            held = s._replace(word=i, recovering=s.recovering or s.word == DIED)
            yield "has the mutex", at(held, i, c, step="settle")

    def settle(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.recovering and self.mutant != "free is not recounted":
            free = max(0, s.value - sum(one.count for one in s.entrants))
            yield "counts again", at(s._replace(free=free, untold=True), i, c, step="recovered")
        elif s.recovering:
            yield "does not count again", at(s, i, c, step="recovered")
        else:
            looks = s._replace(untold=False) if c.gated and not c.gives else s
            yield "has no duties", at(looks, i, c, step="lower" if c.gives else "grab")

    def recovered(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "takes RECOVERING down", at(s._replace(recovering=False), i, c, step="settle")

    def grab(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        """None is free: take those of the dead, one after the other; then it is as it is."""
        if s.free > 0:
            yield "finds one", at(s, i, c, step="claim" if c.slot == NONE else "take_free", at=0)
        elif c.at == len(s.entrants):
            yield "finds none", at(s, i, c, step="none", at=0)
        else:
            yield "looks at a record", at(s, i, c, step="reap")

    def reap(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        who, count = s.entrants[c.at]
        asks = self.mutant != "reap does not ask whether the process is gone"
        dead = who != i and (s.callers[who].step == "dead" or not asks)
        if count and dead and self.mutant != "the dead are not reaped":
            more = s._replace(free=s.free + count, untold=True)
            yield "frees a dead one's", at(more, i, c, step="reap_count")
        else:
            yield "goes on to the next", at(s, i, c, step="reap_next")

    def reap_count(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "takes its count off", at(put(s, c.at, count=0), i, c, step="reap_next")

    def reap_next(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        """All of them, though one is free by now."""
        last = c.at + 1 == len(s.entrants)
        yield "looks on", at(s, i, c, step="grab" if last else "reap", at=c.at + 1)

    def claim(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        dead = next((at for at, one in enumerate(s.entrants) if s.callers[one.who].step == "dead"), None)
        if dead is None:
            new = s._replace(entrants=(*s.entrants, Entrant(i)))
            yield "has a new record", at(new, i, c, step="take_free", slot=len(s.entrants))
        elif self.mutant == "a dead one's permits go with its record":
            yield "has a dead one's", at(put(s, dead, who=i, count=0), i, c, step="take_free", slot=dead)
        else:
            more = s._replace(free=s.free + s.entrants[dead].count, untold=True)
            yield "frees a dead one's", at(more, i, c, step="claim_count", at=dead)

    def claim_count(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "takes its count off", at(put(s, c.at, count=0), i, c, step="claim_name")

    def claim_name(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "has its record", at(put(s, c.at, who=i), i, c, step="take_free", slot=c.at)

    def take_free(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        late = self.mutant == "a permit is counted after the mutex is given back"
        yield "one less is free", at(s._replace(free=s.free - 1), i, c, step="got" if late else "take_count", at=0)

    def take_count(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        counted = put(s, c.slot, count=s.entrants[c.slot].count + 1)
        done = self.mutant == "a permit is counted after the mutex is given back"
        yield "counts it", at(counted, i, c, step="hold" if done else "got")

    def got(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        late = self.mutant == "a permit is counted after the mutex is given back"
        step = "leave_gate" if c.gated else "take_count" if late else "hold"
        yield "has one, gives the mutex back", at(s._replace(word=FREE), i, c, step=step, has=c.has + 1)

    # -- wait ---------------------------------------------------------------------------------------------------------

    def pass_gate(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.gate in (FREE, DIED):
            yield "has the gate", at(s._replace(gate=i), i, c, step="enter", gated=True)

    def none(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if c.gated:
            late = self.mutant == "GUARDED is set after the mutex is given back"
            yield "reads the epoch", at(s, i, c, step="leave_mutex" if late else "guard", seen=s.epoch)
        else:
            yield "gives the mutex back", at(s._replace(word=FREE), i, c, step=self.or_wait(c))

    @staticmethod
    def or_wait(c: Caller) -> str:
        return "again" if c.role == "trier" else "pass_gate"

    def guard(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        step = "leave_mutex" if s.word == i else "sleep"
        yield "sets GUARDED", at(s._replace(guarded=True), i, c, step=step)

    def leave_mutex(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        late = self.mutant == "GUARDED is set after the mutex is given back"
        step = "leave_gate" if c.role == "hasty" else "guard" if late else "look_epoch"
        yield "gives the mutex back", at(s._replace(word=FREE), i, c, step=step)

    def look_epoch(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        old = s.epoch != c.seen or s.word == DIED
        yield "looks at the epoch", at(s, i, c, step="enter" if old else "look_guarded")

    def look_guarded(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "looks at GUARDED", at(s, i, c, step="sleep" if s.guarded else "enter")

    def sleep(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        same = s.epoch == c.seen or self.mutant == "the kernel does not compare again"
        yield "sleeps unless it has moved", at(s, i, c, step="asleep" if same else "enter")

    def asleep(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        if s.untold:
            yield "has slept", at(s, i, c, step="enter")

    def leave_gate(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "gives the gate back", at(s._replace(gate=FREE), i, c, step="hold" if c.has else "again", gated=False)

    # -- give back ----------------------------------------------------------------------------------------------------

    def hold(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "uses it", at(s, i, c, step="slip_in", gives=True)

    def lower(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        less = put(s, c.slot, count=s.entrants[c.slot].count - 1)
        yield "counts it no more", at(less, i, c, step="raise_free", has=c.has - 1)

    def raise_free(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        silent = self.mutant == "a release tells nobody"
        tells = s.guarded and not silent
        step = "take_guarded" if tells else "give_mutex"
        yield "one more is free", at(s._replace(free=s.free + 1), i, c, step=step, tells=tells)

    def take_guarded(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "takes GUARDED down", at(s._replace(guarded=False), i, c, step="move")

    def move(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        stays = self.mutant == "the epoch does not move"
        yield "moves the epoch", at(s if stays else s._replace(epoch=s.epoch + 1), i, c, step="give_mutex")

    def give_mutex(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "gives the mutex back", at(s._replace(word=FREE), i, c, step="wake" if c.tells else "again")

    def wake(self, s: State, i: int, c: Caller) -> Iterator[tuple[str, State]]:
        yield "wakes", at(woken(s), i, c, step="again", tells=False)


def at(s: State, i: int, c: Caller, **changes: object) -> State:
    return s._replace(callers=(*s.callers[:i], c._replace(**changes), *s.callers[i + 1 :]))


def put(s: State, slot: int, **changes: int) -> State:
    changed = s.entrants[slot]._replace(**changes)
    return s._replace(entrants=(*s.entrants[:slot], changed, *s.entrants[slot + 1 :]))


def woken(s: State) -> State:
    return s._replace(callers=tuple(c._replace(step="enter") if c.step == "asleep" else c for c in s.callers))


def die(s: State, i: int) -> State:
    c = s.callers[i]
    counted = any(one.who == i and one.count for one in s.entrants)
    s = s._replace(
        deaths_left=s.deaths_left - 1,
        untold=s.untold or counted or s.word == i or c.step == "wake",
        word=DIED if s.word == i else s.word,
        gate=DIED if s.gate == i else s.gate,
    )
    return at(s, i, Caller(c.role, step="dead"))


def check(s: State, stuck: bool) -> str | None:
    if sum(c.has for c in s.callers) > s.value:
        return "more permits are held than there are"
    if s.word == FREE and not s.recovering and (total := s.free + sum(one.count for one in s.entrants)) != s.value:
        return "a permit is lost" if total < s.value else "a permit is made"
    if stuck and not ended(s):
        return "somebody waits for ever"
    return None


def ended(s: State) -> bool:
    return all(c.step in ("done", "dead") for c in s.callers)
