"""The mutex of _lock.h as a model: every step that another process can see is one step here.

Time is left out, so the search covers every speed of every process: standing back may end at any moment, and a sleep
on the word never ends by itself. That is harder than the code, whose sleeps are bounded; it shows which wake-ups are
owed. Two cases are left to the end of a bounded sleep: after a death a sleeper may have to wait for the next caller,
whose call then wakes it; and where a waiter stalls just before its sleep for so long that a new epoch forgets it, and
an unlocker dies before its wake, both together, the next caller may not know of it.

A death may come at any step, and the kernel's part is modelled as it is: the word is marked and one sleeper woken if
the dead process is its owner; in the middle of an unlock (glibc's pending entry) a sleeper is woken only if the word is
still 0. Step names follow _lock.h. `mutant` takes one rule away, to show that the search would notice.
"""

from collections.abc import Iterator
from typing import NamedTuple

FREE, DIED = 0, -1


class Process(NamedTuple):
    step: str = "look"
    epoch: int = -1
    """The epoch that it is enrolled in; -1: it is not."""
    seen: int = 0
    """The word that it read."""
    slept: bool = False
    """Has it slept on the word in this call?"""
    calls: int = 1
    stalled: bool = False
    """Did it fall asleep after a new epoch had forgotten it?"""
    late: bool = False
    """Did this call begin after a death that still may keep somebody asleep?"""


class State(NamedTuple):
    processes: tuple[Process, ...]
    word: int = FREE
    bit: bool = False
    handoff: bool = False
    epoch: int = 0
    count: int = 0
    asleep: tuple[int, ...] = ()
    """On the word, in the order in which the kernel wakes them."""
    back: frozenset[int] = frozenset()
    """Standing back: asleep on the hand-off word."""
    deaths_left: int = 0
    owed: bool = True
    """Must everybody get on by now? False from a death until a call that began after it has ended."""


class Lock:
    """The model. owner numbers in the word are process index + 1."""

    def __init__(self, mutant: str = "") -> None:
        self.mutant = mutant

    def successors(self, s: State) -> Iterator[tuple[str, State]]:
        for i, p in enumerate(s.processes):
            if p.step == "done" or p.step == "dead":
                continue
            for name, successor in self.steps(s, i, p):
                yield f"process {i}: {name}", successor
            if s.deaths_left and p.step != "look":
                yield f"process {i}: dies at {p.step}", self.die(s, i, p)

    def steps(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if i in s.asleep:
            return
        if i in s.back:
            yield "stood back in vain", at(s._replace(back=s.back - {i}), i, p._replace(step="reset"))
            return
        yield from getattr(self, p.step)(s, i, p)

    # -- acquire ------------------------------------------------------------------------------------------------------

    def look(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        after = "stand_back" if s.handoff else "try"
        yield "looks for a hand-off", at(s, i, p._replace(step=after, late=not s.owed))

    def stand_back(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if s.handoff:
            yield "stands back", at(s._replace(back=s.back | {i}), i, p._replace(step="try"))
        else:
            yield "need not stand back", at(s, i, p._replace(step="try"))

    def reset(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if not s.handoff:
            yield "the hand-off was taken", at(s, i, p._replace(step="try"))
            return
        forgotten = s._replace(handoff=False, epoch=s.epoch + 1, count=0)
        woken = forgotten if self.mutant == "a new epoch wakes nobody" else forgotten._replace(asleep=())
        yield "begins a new epoch", at(woken._replace(back=frozenset()), i, p._replace(step="try"))

    def try_(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if s.word not in (FREE, DIED):
            yield "finds it busy", at(s, i, p._replace(step="enrol"))
            return
        taken = s._replace(word=i + 1, bit=False)  # trylock drops the bit: why the next step is there
        yield "takes it", at(taken, i, p._replace(step="count"))

    def count(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        others = s.count - (p.epoch == s.epoch)
        forgets = self.mutant == "an acquirer does not set the bit again"
        keeps = (others > 0 and not forgets) or (p.slept and self.mutant != "a woken acquirer trusts the count")
        yield "counts the waiters", at(s, i, p._replace(step="set_bit" if keeps else "end_handoff"))

    def set_bit(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "sets the bit", at(s._replace(bit=True), i, p._replace(step="end_handoff"))

    def end_handoff(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        ended = s._replace(handoff=False, back=frozenset()) if s.handoff else s
        yield "ends the hand-off", at(ended, i, p._replace(step="leave"))

    def leave(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        left = s._replace(count=s.count - 1) if p.epoch == s.epoch and s.count else s
        yield "leaves the waiters", at(left, i, p._replace(step="body", epoch=-1, slept=False))

    # -- wait ---------------------------------------------------------------------------------------------------------

    def enrol(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if p.epoch == s.epoch:
            yield "is enrolled", at(s, i, p._replace(step="read"))
        else:
            enrolled = s._replace(count=s.count + 1)
            yield "enrols", at(enrolled, i, p._replace(step="read", epoch=s.epoch))

    def read(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if s.word in (FREE, DIED):
            yield "reads that it is free", at(s, i, p._replace(step="try"))
        else:
            yield "reads the word", at(s, i, p._replace(step="sleep" if s.bit else "mark", seen=s.word))

    def mark(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if s.word == p.seen and not s.bit:
            yield "sets the bit", at(s._replace(bit=True), i, p._replace(step="sleep"))
        else:
            yield "finds the word changed", at(s, i, p._replace(step="try"))

    def sleep(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        same = s.word == p.seen and s.bit
        if same or self.mutant == "the kernel does not compare again":
            yield (
                "sleeps",
                at(
                    s._replace(asleep=(*s.asleep, i)), i, p._replace(step="try", slept=True, stalled=p.epoch != s.epoch)
                ),
            )
        else:
            yield "must not sleep", at(s, i, p._replace(step="try"))

    # -- release ------------------------------------------------------------------------------------------------------

    def body(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "ends its body", at(s, i, p._replace(step="store"))
        if s.count:  # the wait is old enough
            yield "ends its body, offers", at(s._replace(handoff=True), i, p._replace(step="store"))

    def store(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        after = "wake" if s.bit else "next"
        yield "unlocks", at(s._replace(word=FREE, bit=False), i, p._replace(step=after))

    def wake(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "wakes one", at(wake_one(s), i, p._replace(step="next"))

    def next(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        again = Process(calls=p.calls - 1) if p.calls > 1 else Process(step="done")
        yield "goes on", at(s._replace(owed=s.owed or p.late), i, again)

    # -- death --------------------------------------------------------------------------------------------------------

    def die(self, s: State, i: int, p: Process) -> State:
        s = remove(s, i)._replace(back=s.back - {i}, deaths_left=s.deaths_left - 1, owed=False)
        s = s._replace(processes=tuple(q._replace(late=False) for q in s.processes))
        if s.word == i + 1:
            s = s._replace(word=DIED)
            s = wake_one(s) if s.bit else s
        elif p.step == "wake" and s.word == FREE:
            s = wake_one(s)
        return at(s, i, Process(step="dead"))


setattr(Lock, "try", Lock.try_)


def at(s: State, i: int, p: Process) -> State:
    return s._replace(processes=(*s.processes[:i], p, *s.processes[i + 1 :]))


def remove(s: State, i: int) -> State:
    return s._replace(asleep=tuple(j for j in s.asleep if j != i))


def wake_one(s: State) -> State:
    return s._replace(asleep=s.asleep[1:])


INSIDE = {"count", "set_bit", "end_handoff", "leave", "body", "store"}


def check(s: State, stuck: bool) -> str | None:
    """Exclusion, always; and where nobody can go on, everybody has ended."""
    if sum(p.step in INSIDE for p in s.processes) > 1:
        return "two are inside"
    if stuck and s.owed:
        somebody_died = any(p.step == "dead" for p in s.processes)
        if any(p.step not in ("done", "dead") and not (p.stalled and somebody_died) for p in s.processes):
            return "somebody sleeps for ever"
    return None
