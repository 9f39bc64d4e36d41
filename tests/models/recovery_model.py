"""What comes after an owner's death, as a model: who notices, who recovers, and with which record of the dead.

Beside lock_model, which has the waiting: here a waiter simply tries again. Every store of _lock.h and _native.c between
the trylock and the body is a step, and a process may die at each, also inside `__recover__`. The kernel marks a death,
or does not (an exec, a robust list that is too long); then those who wait look at the owner themselves. Thread numbers
are used again: the last process may have the number of the first, once that is dead.

`mutant` takes one rule away, to show that the search would notice.
"""

from collections.abc import Iterator
from typing import NamedTuple

FREE, DIED, NOBODY = 0, -1, -1


class Process(NamedTuple):
    tid: int
    knows: bool = True
    """Does it know the class, and so can recover? A plain Lockable does not."""
    step: str = "call"
    calls: int = 1


class State(NamedTuple):
    processes: tuple[Process, ...]
    word: int = FREE
    nonce: int = NOBODY
    """Which process wrote its nonce last."""
    who: int = NOBODY
    """The owner record."""
    recovering: bool = False
    dead: int = NOBODY
    """What `__recover__` is told."""
    deaths_left: int = 0
    unmarked_left: int = 0
    raises_left: int = 0
    """How often `__recover__` may yet raise."""
    culprit: int = NOBODY
    """Truth, which nobody sees: whose death in its body has not been put right yet."""


class Recovery:
    """The model."""

    def __init__(self, mutant: str = "") -> None:
        self.mutant = mutant

    def successors(self, s: State) -> Iterator[tuple[str, State]]:
        for i, p in enumerate(s.processes):
            if p.step in ("done", "dead") or not self.exists(s, i):
                continue
            for name, successor in getattr(self, p.step)(s, i, p):
                yield f"process {i}: {name}", successor
            if s.deaths_left and p.step not in ("call", "idle"):
                yield f"process {i}: dies at {p.step}", self.die(s, i, p, marked=True)
            if s.unmarked_left and p.step not in ("call", "idle"):
                yield f"process {i}: dies at {p.step}, unmarked", self.die(s, i, p, marked=False)

    def exists(self, s: State, i: int) -> bool:
        """One number is one living process's."""
        return all(q.step in ("done", "dead") for q in s.processes[:i] if q.tid == s.processes[i].tid)

    # -- acquire ------------------------------------------------------------------------------------------------------

    def call(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "calls", at(s, i, p._replace(step="mine"))

    def idle(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        """It lives, and does not call."""
        return iter(())

    def mine(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if s.word != p.tid:
            yield "does not hold it", at(s, i, p._replace(step="try"))
        elif s.nonce == i or self.mutant == "a thread number is an identity":
            yield "holds it already", at(s, i, p._replace(step="body"))
        else:
            yield "buries one of its number", at(s._replace(word=DIED), i, p._replace(step="try"))

    def try_(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if s.word == FREE:
            yield "takes it", at(s._replace(word=p.tid), i, p._replace(step="write_nonce"))
        elif s.word == DIED:
            yield "takes it from a dead owner", at(s._replace(word=p.tid), i, p._replace(step="note"))
        elif self.gone(s):
            yield "buries the owner", at(s._replace(word=DIED), i, p)

    def gone(self, s: State) -> bool:
        """Has the owner ended? A wait of 200 ms is between; by then it has written its nonce, or is dead."""
        if self.mutant == "nobody looks at the owner":
            return False
        alive = [q for j, q in enumerate(s.processes) if q.tid == s.word and q.step not in ("done", "dead")]
        if self.mutant == "the owner's number is looked for":
            return not any(self.exists(s, s.processes.index(q)) for q in alive)
        return not any(q.step in OWNS for q in alive)

    def note(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        keeps = s.recovering and self.mutant != "the last death is the one to recover"
        yield "notes who is dead", at(s if keeps else s._replace(dead=s.who), i, p._replace(step="raise_flag"))

    def raise_flag(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        raised = s if self.mutant == "the flag is not raised" else s._replace(recovering=True)
        yield "raises the flag", at(raised, i, p._replace(step="write_nonce"))

    def write_nonce(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "writes its nonce", at(s._replace(nonce=i), i, p._replace(step="write_name"))

    def write_name(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "writes its name", at(s._replace(who=i), i, p._replace(step="settle"))

    def settle(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if not s.recovering or not p.knows:
            yield "has nothing to recover", at(s, i, p._replace(step="body"))
        elif self.mutant == "the flag is lowered before the hook":
            yield "lowers the flag", at(s._replace(recovering=False), i, p._replace(step="recover"))
        else:
            yield "begins to recover", at(s, i, p._replace(step="recover"))

    def recover(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "has recovered", at(s._replace(culprit=NOBODY), i, p._replace(step="lower_flag"))
        if s.raises_left:
            after = s if self.mutant != "an exception is a recovery" else s._replace(recovering=False)
            yield "fails to recover", at(after._replace(raises_left=s.raises_left - 1), i, p._replace(step="clear"))

    def lower_flag(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "lowers the flag", at(s._replace(recovering=False), i, p._replace(step="body"))

    # -- release ------------------------------------------------------------------------------------------------------

    def body(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "ends its body", at(s, i, p._replace(step="clear"))

    def clear(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        cleared = s if self.mutant == "the name is not taken off" else s._replace(who=NOBODY)
        yield "takes its name off", at(cleared, i, p._replace(step="unlock"))

    def unlock(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        after = p._replace(step="call", calls=p.calls - 1) if p.calls > 1 else p._replace(step="done")
        yield "unlocks", at(s._replace(word=FREE), i, after)

    # -- death --------------------------------------------------------------------------------------------------------

    def die(self, s: State, i: int, p: Process, marked: bool) -> State:
        owns = p.step in OWNS
        s = s._replace(deaths_left=s.deaths_left - marked, unmarked_left=s.unmarked_left - (not marked))
        if p.step == "body" and p.knows and s.culprit == NOBODY:
            s = s._replace(culprit=i)
        if owns and marked:
            s = s._replace(word=DIED)
        return at(s, i, p._replace(step="dead"))


setattr(Recovery, "try", Recovery.try_)

OWNS = {
    "note",
    "raise_flag",
    "write_nonce",
    "write_name",
    "settle",
    "recover",
    "lower_flag",
    "body",
    "clear",
    "unlock",
}


def at(s: State, i: int, p: Process) -> State:
    return s._replace(processes=(*s.processes[:i], p, *s.processes[i + 1 :]))


def check(s: State, stuck: bool) -> str | None:
    """Exclusion; no body of the class over a dead one's half-done work; the hook is told whose; nobody is stuck."""
    if sum(p.step in OWNS for p in s.processes) > 1:
        return "two are inside"
    for p in s.processes:
        if p.step == "body" and p.knows and s.culprit != NOBODY:
            return "a body runs over what a dead one left half done"
        if p.step == "recover" and s.culprit != NOBODY and s.dead != s.culprit:
            return "the hook is told of another one's death"
        if p.step == "recover" and s.culprit == NOBODY and s.dead != NOBODY and s.processes[s.dead].step != "dead":
            return "the hook is told of a death of one who lives"
    waiting = any(p.step not in ("done", "dead", "idle") for p in s.processes)
    return "somebody waits for ever" if stuck and waiting else None
