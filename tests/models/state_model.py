"""The protocol of shared state, of _state.h, as a model: every step that another process can see is one step here.

A state has two fields that must agree: `short` lies in the entry, `long` in the heap, where the entry says. Between the
two fences of a commit its stores may become visible in any order, and between the two looks of a reader its loads may
happen in any order, so each is a set of steps out of which any is next. A commit may go into a new file. A writer may
die at any step; the lock is then the next one's. `mutant` takes one rule away, to show that the search would notice.
"""

from collections.abc import Iterator
from typing import NamedTuple

NOTHING = -1
PLACES = 3


class Entry(NamedTuple):
    short: int = 0
    place: int = NOTHING


class File(NamedTuple):
    slots: tuple[Entry, Entry] = (Entry(), Entry())
    heap: tuple[int, ...] = (NOTHING,) * PLACES


class Writer(NamedTuple):
    step: str = "idle"
    calls: int = 1
    place: int = NOTHING
    stores: frozenset[str] = frozenset()
    """Those of its commit that nobody sees yet."""
    grows: bool = False


class Reader(NamedTuple):
    step: str = "look"
    number: int = 0
    generation: int = 0
    loads: frozenset[str] = frozenset()
    entry: Entry = Entry()
    long: int = NOTHING
    short: int = NOTHING
    looks: int = 2


class State(NamedTuple):
    writers: tuple[Writer, ...]
    reader: Reader = Reader()
    number: int = 0
    generation: int = 0
    index: int = 0
    """The live slot, where a mutant keeps it in a word of its own."""
    files: tuple[tuple[int, File], ...] = ()
    owner: int = NOTHING
    deaths: int = 0
    grown: int = 0


class Protocol:
    def __init__(self, mutant: str = "") -> None:
        self.mutant = mutant

    def successors(self, s: State) -> Iterator[tuple[str, State]]:
        for i, w in enumerate(s.writers):
            for name, after in getattr(self, f"writer_{w.step}", self.none)(s, i, w):
                yield f"writer {i} {name}", after
            if s.owner == i and s.deaths:
                dead = put(s, i, Writer(step="dead"))._replace(owner=NOTHING, deaths=s.deaths - 1)
                yield f"writer {i} dies at {w.step}", dead
        for name, after in getattr(self, f"reader_{s.reader.step}", self.none)(s, s.reader):
            yield f"the reader {name}", after

    def none(self, *_: object) -> Iterator[tuple[str, State]]:
        return iter(())

    # -- a commit ------------------------------------------------------------------------------------------------------

    def writer_idle(self, s: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        if s.owner == NOTHING and w.calls:
            yield "locks", put(s, i, w._replace(step="begin"))._replace(owner=i)

    def writer_begin(self, s: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        """Choose where to write: a place of the heap that nothing live refers to."""
        stores = {"short", "entry", "heap"} if self.mutant != "the spare slot is trusted" else {"short", "heap"}
        if self.mutant == "the word is not ordered":
            stores.add("word")
        if s.generation:
            file = file_of(s, s.generation)
            begun = w._replace(step="store", place=self.place(s, file), stores=frozenset(stores), grows=False)
            yield "begins", put(s, i, begun)
        if s.grown < 2:
            yield "begins a new file", put(s, i, w._replace(step="make", grows=True))._replace(grown=s.grown + 1)

    def place(self, s: State, file: File) -> int:
        live = file.slots[s.number % 2].place
        if self.mutant == "live places are not spared":
            live = NOTHING
        spare = file.slots[(s.number + 1) % 2].place  # it may be used again: nobody needs it
        return spare if spare not in (NOTHING, live) else (live + 1) % PLACES

    def writer_store(self, s: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        for store in w.stores:
            yield f"stores {store}", put(self.stored(s, w, store), i, w._replace(stores=w.stores - {store}))
        if not w.stores:
            done = self.mutant == "the word is not ordered"
            yield "is through", put(s, i, w._replace(step="unlock" if done else "flip"))

    def stored(self, s: State, w: Writer, store: str) -> State:
        if store == "word":
            return s._replace(number=s.number + 1)
        number = s.number + 1 if "word" in w.stores or self.mutant != "the word is not ordered" else s.number
        file, slot = file_of(s, s.generation), number % 2
        if store == "heap":
            heap = (*file.heap[: w.place], number, *file.heap[w.place + 1 :])
            return put_file(s, s.generation, file._replace(heap=heap))
        old = file.slots[slot]
        new = old._replace(short=number) if store == "short" else old._replace(place=w.place)
        return put_file(s, s.generation, file._replace(slots=with_slot(file, slot, new)))

    def writer_make(self, s: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        """The new file, aside, whole; then it gets its name, in one step. A dead one's is replaced."""
        number = s.number + 1
        whole = File(with_slot(File(), number % 2, Entry(number, 0)), (number, NOTHING, NOTHING))
        if self.mutant == "a new file is written in its place":
            yield "names an empty file", put(put_file(s, s.generation + 1, File()), i, w._replace(step="flip"))
        elif self.mutant == "the old file goes first":
            without = s._replace(files=tuple(one for one in s.files if one[0] != s.generation))
            yield "removes the old file", put(without, i, w._replace(step="name"))
        else:
            yield "names the new file", put(put_file(s, s.generation + 1, whole), i, w._replace(step="flip"))

    def writer_name(self, s: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        number = s.number + 1
        whole = File(with_slot(File(), number % 2, Entry(number, 0)), (number, NOTHING, NOTHING))
        yield "names the new file", put(put_file(s, s.generation + 1, whole), i, w._replace(step="flip"))

    def writer_flip(self, s: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        flipped = s._replace(number=s.number + 1, generation=s.generation + w.grows)
        if self.mutant == "index and number apart":
            yield "stores the number", put(flipped, i, w._replace(step="index"))
        else:
            yield "stores the word", put(flipped, i, w._replace(step="sweep" if w.grows else "unlock"))

    def writer_index(self, s: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        yield "stores the index", put(s._replace(index=s.number % 2), i, w._replace(step="unlock"))

    def writer_sweep(self, s: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        kept = tuple(one for one in s.files if one[0] >= s.generation)
        yield "removes the old file", put(s._replace(files=kept), i, w._replace(step="unlock"))

    def writer_unlock(self, s: State, i: int, w: Writer) -> Iterator[tuple[str, State]]:
        yield "unlocks", put(s._replace(owner=NOTHING), i, Writer(calls=w.calls - 1))

    # -- a reader ------------------------------------------------------------------------------------------------------

    def reader_look(self, s: State, r: Reader) -> Iterator[tuple[str, State]]:
        if not r.looks:
            return
        if not s.generation:
            yield "finds nothing", s._replace(reader=r._replace(looks=r.looks - 1))
            return
        begun = r._replace(step="open", number=s.number, generation=s.generation, long=NOTHING, short=NOTHING)
        yield "looks", s._replace(reader=begun)

    def reader_open(self, s: State, r: Reader) -> Iterator[tuple[str, State]]:
        if any(one == r.generation for one, _ in s.files):
            # mapped from here on: it stays readable after it lost its name, and nobody writes to it then
            yield "opens the file", s._replace(reader=r._replace(step="load", loads=frozenset({"short", "place"})))
        elif s.generation == r.generation:
            yield "finds no file", s._replace(reader=r._replace(step="damaged"))
        else:
            yield "finds no file any more", s._replace(reader=r._replace(step="look"))

    def reader_load(self, s: State, r: Reader) -> Iterator[tuple[str, State]]:
        found = dict(s.files).get(r.generation)
        if found is None:  # its last content; the writer that removed it has flipped before, so this look is in vain
            yield "reads an old file", s._replace(reader=r._replace(step="look"))
            return
        slot = found.slots[(s.index if self.mutant == "index and number apart" else r.number) % 2]
        for load in r.loads:
            rest = r.loads - {load}
            if load == "short":
                after = r._replace(short=slot.short, loads=rest)
            elif load == "place":
                after = r._replace(entry=slot, loads=rest | {"long"})
            else:
                after = r._replace(long=found.heap[r.entry.place], loads=rest)
            yield f"copies {load}", s._replace(reader=after)
        if not r.loads:
            same = (s.number, s.generation) == (r.number, r.generation) or self.mutant == "no second look"
            yield "looks again", s._replace(reader=r._replace(step="seen" if same else "look"))

    def reader_seen(self, s: State, r: Reader) -> Iterator[tuple[str, State]]:
        yield "goes on", s._replace(reader=Reader(looks=r.looks - 1))


def put(s: State, i: int, w: Writer) -> State:
    return s._replace(writers=(*s.writers[:i], w, *s.writers[i + 1 :]))


def file_of(s: State, generation: int) -> File:
    return dict(s.files)[generation]


def put_file(s: State, generation: int, file: File) -> State:
    files = {**dict(s.files), generation: file}
    return s._replace(files=tuple(sorted(files.items())))


def with_slot(file: File, slot: int, entry: Entry) -> tuple[Entry, Entry]:
    return (entry, file.slots[1]) if slot == 0 else (file.slots[0], entry)


def check(s: State, _stuck: bool) -> str | None:
    """What a reader accepts is one commit, whole; what the word names is there, and whole, at every moment."""
    r = s.reader
    if r.step == "damaged":
        return "the word names a file that is not there"
    if r.step == "seen" and not r.short == r.long == r.number:
        return f"torn: {r.short} and {r.long} in commit {r.number}"
    if s.generation:
        found = dict(s.files).get(s.generation)
        if found is None:
            return "the live file is gone"
        live = found.slots[s.number % 2]
        if not live.short == s.number == found.heap[live.place]:
            return f"torn: what is live is no commit {s.number}"
    return None
