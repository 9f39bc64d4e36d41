"""The shared state beside a lock of files, of CheckedFile in state/slots.py, as a model, on a machine without order.

A commit issues its stores one by one; each becomes visible at any time after that, in any order but for two to one
place. A reader loads in any order too, and may have loaded from a slot before it has seen the word that names it. What
is left is that an owner's stores are visible to the next one: the kernel gives and takes the lock of a file, also of an
owner that is killed. A checksum is its content: the model leaves the one mixture in 2**32 out.

Fields and heap are as in state_model.py. `mutant` takes one rule away, to show that the search would notice.
"""

from collections.abc import Iterator
from typing import NamedTuple

NOTHING = -1
PLACES = 3
LATE = 1
"""How many stores of a commit, at most, may still be invisible when the next one of the same owner begins: to keep the
search small."""
ORDER = ("heap", "short", "entry", "sum", "word")


class Slot(NamedTuple):
    short: int = 0
    entry: tuple[int, int] = (0, 0)
    """The place of the other value, and its checksum."""
    sum: tuple[object, ...] = ()
    """The checksum of these two, and of the number of the commit."""


class Memory(NamedTuple):
    number: int = 0
    slots: tuple[Slot, Slot] = (Slot(sum=(0, 0, (0, 0))), Slot())
    heap: tuple[int, ...] = (0, NOTHING, NOTHING)


class Store(NamedTuple):
    what: str
    where: int
    value: object


class Writer(NamedTuple):
    step: str = "idle"
    commits: int = 1
    """How many are left."""
    pending: tuple[Store, ...] = ()
    """Stores that nobody else sees yet."""


class Reader(NamedTuple):
    step: str = "idle"
    slot: int = 0
    loads: frozenset[str] = frozenset()
    number: int = NOTHING
    seen: Slot = Slot()
    long: int = NOTHING


class State(NamedTuple):
    writers: tuple[Writer, ...]
    memory: Memory = Memory()
    reader: Reader = Reader()
    owner: int = NOTHING
    deaths: int = 0


class Protocol:
    def __init__(self, mutant: str = "") -> None:
        self.mutant = mutant

    def successors(self, s: State) -> Iterator[tuple[str, State]]:
        for i, w in enumerate(s.writers):
            for name, after in self.writer(s, i, w):
                yield f"writer {i} {name}", after
            for store in visible_next(w.pending):
                rest = tuple(one for one in w.pending if one is not store)
                seen = put(s, i, w._replace(pending=rest))._replace(memory=stored(s.memory, store))
                yield f"writer {i}'s {store.what} becomes visible", seen
        for name, reader in self.reader(s, s.reader):
            yield f"the reader {name}", s._replace(reader=reader)

    # -- an owner ------------------------------------------------------------------------------------------------------

    def writer(self, s: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        drained = not w.pending or self.mutant == "owners are not ordered"
        if w.step == "idle" and w.commits and s.owner == NOTHING:
            yield "locks", put(s, i, w._replace(step="begin"))._replace(owner=i)
        if w.step == "begin" and w.commits and len(w.pending) <= LATE:
            stores = self.commit(s, w)
            yield "commits", put(s, i, w._replace(pending=w.pending + stores, commits=w.commits - 1))
            for done in range(len(stores)) if s.deaths else ():
                killed = w._replace(step="killed", pending=w.pending + stores[:done])
                yield f"is killed after {done} stores", put(s, i, killed)._replace(deaths=s.deaths - 1)
        if w.step in ("begin", "killed") and drained:
            step = "idle" if w.step == "begin" else "dead"
            yield "gives the lock back", put(s, i, w._replace(step=step))._replace(owner=NOTHING)

    def commit(self, s: State, w: Writer) -> tuple[Store, ...]:
        """What the owner stores; it sees its own stores at once."""
        memory = s.memory
        for store in w.pending:
            memory = stored(memory, store)
        number = memory.number + 1
        slot, live = number % 2, memory.slots[memory.number % 2].entry[0]
        spare = memory.slots[slot].entry[0]
        place = spare if spare != live else (live + 1) % PLACES
        entry = place, number
        covered = self.covered(number, number, entry)
        values = {"heap": number, "short": number, "entry": entry, "sum": covered, "word": number}
        where = {"heap": place, "word": 0}
        return tuple(Store(what, where.get(what, slot), values[what]) for what in ORDER)

    def covered(self, number: int, short: int, entry: tuple[int, int]) -> tuple[object, ...]:
        return 0 if self.mutant == "the checksum does not cover the word" else number, short, entry

    # -- a reader ------------------------------------------------------------------------------------------------------

    def reader(self, s: State, r: Reader) -> Iterator[tuple[str, Reader]]:
        """One look: what is refused is looked at again, from the beginning."""
        if r.step == "idle":
            for slot in (0, 1):
                yield f"looks at slot {slot}", Reader("look", slot, frozenset({"word", "short", "entry", "sum"}))
        for load in r.loads:
            yield f"loads {load}", self.loaded(s.memory, r, load)
        if r.step == "look" and not r.loads:
            yield "compares", r._replace(step="seen") if self.accepts(r) else Reader("refused")

    def loaded(self, memory: Memory, r: Reader, load: str) -> Reader:
        slot, rest = memory.slots[r.slot], r.loads - {load}
        if load == "word":
            return r._replace(number=memory.number, loads=rest)
        if load == "long":
            return r._replace(long=memory.heap[r.seen.entry[0]], loads=rest)
        if load == "entry":
            rest |= {"long"}
        return r._replace(seen=r.seen._replace(**{load: getattr(slot, load)}), loads=rest)

    def accepts(self, r: Reader) -> bool:
        fits = self.covered(r.number, r.seen.short, r.seen.entry) == r.seen.sum
        slot = r.number % 2 == r.slot and (fits or self.mutant == "slots are not checked")
        return slot and (r.long == r.seen.entry[1] or self.mutant == "values are not checked")


def visible_next(pending: tuple[Store, ...]) -> Iterator[Store]:
    """Any, but for the later one of two to one place."""
    for n, store in enumerate(pending):
        if not any((one.what, one.where) == (store.what, store.where) for one in pending[:n]):
            yield store


def stored(memory: Memory, store: Store) -> Memory:
    what, where, value = store
    if what == "word":
        return memory._replace(number=value)
    if what == "heap":
        return memory._replace(heap=(*memory.heap[:where], value, *memory.heap[where + 1 :]))
    slot = memory.slots[where]._replace(**{what: value})
    return memory._replace(slots=(slot, memory.slots[1]) if where == 0 else (memory.slots[0], slot))


def put(s: State, i: int, w: Writer) -> State:
    return s._replace(writers=(*s.writers[:i], w, *s.writers[i + 1 :]))


def check(s: State, _stuck: bool) -> str | None:
    """What a reader accepts is one commit, whole, and that of the word; so is what the next owner finds."""
    r = s.reader
    if r.step == "seen" and not r.seen.short == r.long == r.number:
        return f"torn: {r.seen.short} and {r.long} in commit {r.number}"
    if s.owner == NOTHING:
        live = s.memory.slots[s.memory.number % 2]
        if not live.short == s.memory.heap[live.entry[0]] == s.memory.number:
            return f"torn: an owner finds no commit {s.memory.number}"
    return None
