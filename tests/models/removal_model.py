"""How a name is taken away and comes back, as a model: one name never becomes two locks.

Files have numbers; the name leads to one of them, or to none. Threads of one process share a handle. Each system call,
and each look at a flag, is one step; a process may be killed at each, and taking the name off may fail.
Left out: files that others than coheld remove, which the owner notices about a second later.

`mutant` takes one rule away, to show that the search would notice.
"""

from collections.abc import Iterator
from typing import NamedTuple

NONE = -1


class Thread(NamedTuple):
    role: str
    """user, or remover"""
    handle: int
    step: str = "find"
    cell: int = NONE
    """The file whose lock it is about to take, or holds."""
    calls: int = 1


class State(NamedTuple):
    threads: tuple[Thread, ...]
    handles: tuple[int, ...]
    """Which file each is attached to."""
    name: int = NONE
    """Where it leads."""
    removed: tuple[bool, ...] = ()
    """Of each file that was ever made."""
    holder: tuple[int, ...] = ()
    directory: int = NONE
    """Who has the directory's lock."""
    failures_left: int = 0
    deaths_left: int = 0


class Removal:
    """The model."""

    def __init__(self, mutant: str = "") -> None:
        self.mutant = mutant

    def successors(self, s: State) -> Iterator[tuple[str, State]]:
        for i, t in enumerate(s.threads):
            if t.step in ("done", "dead"):
                continue
            for name, successor in getattr(self, t.step)(s, i, t):
                yield f"{t.role} {i}: {name}", successor
            if s.deaths_left:
                yield f"{t.role} {i}: is killed at {t.step}", die(s, i, t)

    # -- attach -------------------------------------------------------------------------------------------------------

    def find(self, s: State, i: int, t: Thread) -> Iterator[tuple[str, State]]:
        """mutex.named"""
        known = s.handles[t.handle]
        if known == NONE:
            yield "has no handle yet", at(s, i, t._replace(step="attach"))
        elif s.removed[known] and self.mutant == "who does not hold it takes the name off":
            yield "finds its handle removed", at(s, i, t._replace(step="lock_directory", cell=known))
        else:
            yield "has a handle", at(s, i, t._replace(step="acquire"))

    def attach(self, s: State, i: int, t: Thread) -> Iterator[tuple[str, State]]:
        """Under the guard of the process; the link into the directory is atomic."""
        if s.name != NONE:
            yield "attaches", at(bound(s, t.handle, s.name), i, t._replace(step="acquire"))
        else:
            new = len(s.removed)
            made = s._replace(name=new, removed=(*s.removed, False), holder=(*s.holder, NONE))
            yield "makes it", at(bound(made, t.handle, new), i, t._replace(step="acquire"))

    def acquire(self, s: State, i: int, t: Thread) -> Iterator[tuple[str, State]]:
        cell = s.handles[t.handle]
        if s.holder[cell] != NONE:
            return
        held = s._replace(holder=put(s.holder, cell, i))
        if self.mutant == "the flag is looked at before the lock is taken":
            yield "takes it", at(held, i, t._replace(step="inside", cell=cell))
        else:
            yield "takes it", at(held, i, t._replace(step="check", cell=cell))

    def check(self, s: State, i: int, t: Thread) -> Iterator[tuple[str, State]]:
        if s.removed[t.cell]:
            yield "sees that it is removed, leaves", at(freed(s, t), i, t._replace(step="rebind"))
        else:
            yield "may go on", at(s, i, t._replace(step="inside"))

    def rebind(self, s: State, i: int, t: Thread) -> Iterator[tuple[str, State]]:
        """Handle._attach, for the cell that was left"""
        if s.handles[t.handle] != t.cell:
            yield "another thread has attached anew", at(s, i, t._replace(step="acquire"))
        else:
            yield "takes the name off first", at(s, i, t._replace(step="lock_directory"))

    # -- inside -------------------------------------------------------------------------------------------------------

    def inside(self, s: State, i: int, t: Thread) -> Iterator[tuple[str, State]]:
        if t.role == "user":
            yield "ends its body", at(s, i, t._replace(step="release"))
        elif self.mutant == "the name is taken off first":
            yield "begins to remove it", at(s, i, t._replace(step="lock_directory"))
        else:
            marked = s._replace(removed=put(s.removed, t.cell, True))
            yield "marks it removed", at(marked, i, t._replace(step="lock_directory"))

    def lock_directory(self, s: State, i: int, t: Thread) -> Iterator[tuple[str, State]]:
        if self.mutant == "the directory is not locked":
            yield "does not lock the directory", at(s, i, t._replace(step="look"))
        elif s.directory == NONE:
            yield "locks the directory", at(s._replace(directory=i), i, t._replace(step="look"))
        if s.failures_left:
            yield "cannot lock the directory", self.failed(s, i, t)

    def look(self, s: State, i: int, t: Thread) -> Iterator[tuple[str, State]]:
        if s.name == t.cell or (self.mutant == "any file of the name is taken off" and s.name != NONE):
            yield "sees the file under its name", at(s, i, t._replace(step="unlink"))
        else:
            yield "sees that it is off", self.off(s, i, t)

    def unlink(self, s: State, i: int, t: Thread) -> Iterator[tuple[str, State]]:
        yield "takes the name off", self.off(s._replace(name=NONE), i, t)
        if s.failures_left:
            yield "cannot take the name off", self.failed(unlocked(s, i), i, t)

    def off(self, s: State, i: int, t: Thread) -> State:
        holds = s.holder[t.cell] == i
        return at(unlocked(s, i), i, t._replace(step="settle" if holds else "attach"))

    def failed(self, s: State, i: int, t: Thread) -> State:
        holds = s.holder[t.cell] == i
        return at(s._replace(failures_left=s.failures_left - 1), i, t._replace(step="settle" if holds else "done"))

    def settle(self, s: State, i: int, t: Thread) -> Iterator[tuple[str, State]]:
        """It is removed if the name does not lead to it; a look, and then a store."""
        yield "looks at the name", at(s, i, t._replace(step="flag_up" if s.name != t.cell else "flag_down"))

    def flag_up(self, s: State, i: int, t: Thread) -> Iterator[tuple[str, State]]:
        yield "keeps the mark", at(s._replace(removed=put(s.removed, t.cell, True)), i, t._replace(step="release"))

    def flag_down(self, s: State, i: int, t: Thread) -> Iterator[tuple[str, State]]:
        yield (
            "takes the mark back",
            at(s._replace(removed=put(s.removed, t.cell, False)), i, t._replace(step="release")),
        )

    def release(self, s: State, i: int, t: Thread) -> Iterator[tuple[str, State]]:
        again = t._replace(step="find", calls=t.calls - 1) if t.calls > 1 else t._replace(step="done")
        yield "releases it", at(freed(s, t), i, again)


def at(s: State, i: int, t: Thread) -> State:
    return s._replace(threads=put(s.threads, i, t))


def put(values: tuple, i: int, value: object) -> tuple:
    return (*values[:i], value, *values[i + 1 :])


def bound(s: State, handle: int, cell: int) -> State:
    return s._replace(handles=put(s.handles, handle, cell))


def freed(s: State, t: Thread) -> State:
    return s._replace(holder=put(s.holder, t.cell, NONE))


def unlocked(s: State, i: int) -> State:
    return s._replace(directory=NONE) if s.directory == i else s


def die(s: State, i: int, t: Thread) -> State:
    """The whole process; its lock is marked by the kernel, the directory's ends."""
    s = s._replace(deaths_left=s.deaths_left - 1)
    for j, other in enumerate(s.threads):
        if other.handle == t.handle and other.step != "done":
            s = unlocked(s, j)
            s = s._replace(holder=tuple(NONE if h == j else h for h in s.holder))
            s = at(s, j, other._replace(step="dead"))
    return s


def check(s: State, stuck: bool) -> str | None:
    """One user is inside, whichever file its lock is in; and everybody comes to an end."""
    if sum(t.step == "inside" and t.role == "user" for t in s.threads) > 1:
        return "two are inside under one name"
    if stuck and any(t.step not in ("done", "dead") for t in s.threads):
        return "somebody waits for ever"
    return None
