"""How an arena goes away, as a model: every system call of backends/files.py and shm.py on it is one step.

One file; its maker; others who attach, who are forked, who start and sweep. A process may be killed at each step, and
a user may close its descriptors, as daemons do, and still map the file. A flock belongs to an open file, which a forked
child shares. Left out: time (who waits for a flock waits), and other files.

`mutant` takes one rule away, to show that the search would notice.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Process(NamedTuple):
    role: str
    step: str
    open_file: int = -1
    """Which open file its descriptor is of; a forked child's is its parent's. -1: none."""
    flocked: bool = False
    maps: bool = False
    signed_off: bool = False
    mark: int = -1
    """The file's time, as it read it."""
    seen: frozenset[int] = frozenset()
    """Whose mappings it has read."""
    listed: frozenset[int] = frozenset()
    """Whose it has yet to read."""
    daemon: bool = False
    """May it close its descriptors?"""


class State(NamedTuple):
    processes: tuple[Process, ...]
    file: str = "none"
    """none, half (made aside), linked, gone"""
    time: int = 0
    """Of the file: each attacher sets another one."""
    exclusive: int = -1
    """Who has the exclusive flock."""
    deaths_left: int = 0
    died: bool = False


MAKER, ENDED = 0, ("done", "dead")


class Session:
    """The model. The maker is process 0."""

    def __init__(self, mutant: str = "") -> None:
        self.mutant = mutant

    def successors(self, s: State) -> Iterator[tuple[str, State]]:
        for i, p in enumerate(s.processes):
            if p.step in ("unborn", *ENDED):
                continue
            for name, successor in getattr(self, p.step)(s, i, p):
                yield f"{p.role} {i}: {name}", successor
            if s.deaths_left:
                killed = end(s, i, p, "dead")._replace(deaths_left=s.deaths_left - 1, died=True)
                yield f"{p.role} {i}: is killed at {p.step}", killed

    # -- make ---------------------------------------------------------------------------------------------------------

    def create(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        made = p._replace(step="rename", open_file=i, flocked=True, maps=True)
        yield "makes the file, locks and maps it", at(s._replace(file="half"), i, made)

    def rename(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "gives it its name", at(s._replace(file="linked"), i, p._replace(step="use"))

    # -- attach -------------------------------------------------------------------------------------------------------

    def open(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if s.file == "linked":
            yield "opens it", at(s, i, p._replace(step="flock", open_file=i))
        elif s.file == "gone":
            yield "finds nothing", at(s, i, p._replace(step="done"))

    def flock(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if s.exclusive < 0:
            yield "locks it", at(s, i, p._replace(step="touch", flocked=True))

    def touch(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "sets its time", at(s._replace(time=s.time + 1), i, p._replace(step="look"))

    def look(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if s.file == "linked" or self.mutant == "an attacher does not look at the path again":
            yield "sees that it has its name", at(s, i, p._replace(step="use", maps=True))
        else:
            yield "sees that it is gone", end(s, i, p, "done")

    # -- use ----------------------------------------------------------------------------------------------------------

    def use(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "begins to leave", at(s, i, p._replace(step="close" if self.mutant == "nobody signs off" else "sign"))
        if p.daemon and p.open_file >= 0:
            yield "closes its descriptors", at(s, i, p._replace(open_file=-1, flocked=False))
        for j, child in enumerate(s.processes):
            if child.step == "unborn" and j == i + 1:
                born = child._replace(step="use", open_file=p.open_file, flocked=p.flocked, maps=True)
                yield "forks", at(s, j, born)

    def sign(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "signs off", at(s, i, p._replace(step="close", signed_off=True))

    def close(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "closes its descriptors, to leave", at(s, i, p._replace(step="try", open_file=-1, flocked=False))

    # -- sweep, by one that starts or one that has signed off ---------------------------------------------------------

    def start(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        candidate = s.file in ("half", "linked") and s.processes[MAKER].step in ENDED
        yield "lists the files", at(s, i, p._replace(step="try" if candidate else "exit"))

    def try_(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if lockable(s):
            yield "locks it alone", at(s._replace(exclusive=i), i, p._replace(step="give_back", mark=s.time))
        else:
            yield "finds it in use", stop(s, i, p)

    def give_back(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        after = p._replace(step="survey" if self.mutant != "the flock alone decides" else "lock")
        yield "gives it back", at(s._replace(exclusive=-1), i, after)

    def survey(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        alive = {j for j, q in enumerate(s.processes) if q.step not in ("unborn", *ENDED)}
        new = frozenset(alive - p.seen - {i})
        if self.mutant == "processes are listed once" and p.seen:
            new = frozenset()
        yield "lists the processes", at(s, i, p._replace(step="read" if new else "lock", listed=new))

    def read(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        for j in p.listed:
            if s.processes[j].maps and not s.processes[j].signed_off:
                yield f"sees that {j} maps it", stop(s, i, p)
            else:
                left = p.listed - {j}
                after = p._replace(step="read" if left else "survey", listed=left, seen=p.seen | {j})
                yield f"sees nothing of {j}", at(s, i, after)

    def lock(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if self.mutant == "it is not locked again":
            yield "does not lock it", at(s, i, p._replace(step="unlink"))
        elif not lockable(s):
            yield "finds it in use again", stop(s, i, p)
        else:
            yield "locks it alone again", at(s._replace(exclusive=i), i, p._replace(step="compare"))

    def compare(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        if s.time == p.mark or self.mutant == "its time is not compared":
            yield "finds its time as it was", at(s, i, p._replace(step="unlink"))
        else:
            again = "exit" if self.mutant == "it is not looked at again" else "try"
            after = p._replace(step=again, seen=frozenset())
            yield "finds that somebody came meanwhile", at(s._replace(exclusive=-1), i, after)

    def unlink(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "removes it", stop(s._replace(file="gone"), i, p)

    def exit(self, s: State, i: int, p: Process) -> Iterator[tuple[str, State]]:
        yield "ends", end(s, i, p, "done")


setattr(Session, "try", Session.try_)


def at(s: State, i: int, p: Process) -> State:
    return s._replace(processes=(*s.processes[:i], p, *s.processes[i + 1 :]))


def stop(s: State, i: int, p: Process) -> State:
    """It does no more, and still maps what it maps."""
    freed = s._replace(exclusive=-1) if s.exclusive == i else s
    return at(freed, i, p._replace(step="exit", seen=frozenset(), listed=frozenset()))


def end(s: State, i: int, p: Process, how: str) -> State:
    """The kernel closes and unmaps everything."""
    freed = s._replace(exclusive=-1) if s.exclusive == i else s
    return at(freed, i, Process(p.role, how))


def lockable(s: State) -> bool:
    """An open file's flock ends with its last descriptor."""
    return s.exclusive < 0 and not any(p.flocked and p.open_file >= 0 for p in s.processes)


def check(s: State, stuck: bool) -> str | None:
    """Nobody's file goes while it is used; and where all have ended, it is gone, or goes with the next start."""
    if s.file == "gone" and any(p.step == "use" and p.maps for p in s.processes):
        return "it was removed while somebody used it"
    if stuck and any(p.step not in ("unborn", "open", *ENDED) for p in s.processes):
        return "somebody waits for ever"
    if stuck and s.file in ("half", "linked"):
        if not s.died:
            return "all have ended well, and it is still there"
        if not swept_by_the_next(s):
            return "the next start does not remove it"
    return None


def swept_by_the_next(s: State) -> bool:
    """One more process starts, alone."""
    processes = tuple(p._replace(step="dead") if p.step in ("unborn", "open") else p for p in s.processes)
    s = State((*processes, Process("sweeper", "start")), s.file, s.time, s.exclusive)
    while following := list(Session().successors(s)):
        _, s = following[0]
    return s.file == "gone"
