"""Outside of the lock: the last commit, without waiting, read-only."""

import copy
import dataclasses
import gc
import json
import operator
import os
import pickle
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import coheld
from coheld import Lockable, NotLockedError, shared
from coheld.backends.away import PASS_BITS
from coheld.state import store
from coheld.state.looking import look
from coheld.state.view import View
from coheld.testing.contract import observe
from coheld.testing.state.things import Shelf
from coheld.testing.support import delays, procs, states


class Pair(NamedTuple):
    left: int
    right: list[int]


@dataclasses.dataclass
class Part:
    x: int
    tags: list[int]


class Nested(Lockable):
    """Containers in what is none that can be changed."""

    pairs: dict[str, tuple[int, list[int], Pair]] = shared(default_factory=dict)
    places: list[Part] = shared(default_factory=list)
    rows: list[list[int]] = shared(default_factory=list)
    table: dict[str, list[list[int]]] = shared(default_factory=dict)


CHANGES: list[Callable[[Shelf], Any]] = [
    lambda s: s.items.append("x"),
    lambda s: s.items.__setitem__(0, "x"),
    lambda s: s.items.sort(),
    lambda s: operator.iadd(s.items, ["x"]),
    lambda s: operator.delitem(s.items, 0),
    lambda s: s.index.update(x=[1]),
    lambda s: s.index["a"].append(1),
    lambda s: operator.setitem(s.index, "b", [1]),
    lambda s: s.index.setdefault("b", []),
    lambda s: operator.ior(s.index, {}),
    lambda s: s.marks.add("x"),
    lambda s: operator.ior(s.marks, {"x"}),
    lambda s: setattr(s, "count", 1),
    lambda s: setattr(s, "items", []),
    lambda s: operator.iadd(coheld.snapshot(s).items, [1]),
    lambda s: setattr(coheld.snapshot(s), "count", 1),
    lambda s: s.items.__init__(["x"]),  # type: ignore[misc]
    lambda s: s.items.__init__(),  # type: ignore[misc]
    lambda s: s.index.__init__(x=[1]),  # type: ignore[misc]
    lambda s: s.marks.__init__({"x"}),  # type: ignore[misc]
]


def filled() -> Shelf:
    shelf = Shelf()
    with shelf:
        shelf.put("a")
        shelf.index["a"] = [1]
        shelf.marks.add("m")
    return shelf


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused(change: Callable[[Shelf], Any]) -> None:
    shelf = filled()
    before = coheld.snapshot(shelf)
    with pytest.raises(NotLockedError):
        change(shelf)
    assert coheld.snapshot(shelf) == before


def test_every_method_that_changes_a_container_is_refused() -> None:
    shelf = filled()
    for value, plain in ((shelf.items, list), (shelf.index, dict), (shelf.marks, set)):
        own = {name for name in dir(plain) if getattr(type(value), name) is getattr(plain, name)}
        changing = {"append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse", "popitem", "setdefault"}
        changing |= {"update", "add", "discard", "difference_update", "intersection_update"}
        changing |= {"symmetric_difference_update", "__setitem__", "__delitem__", "__iadd__", "__imul__", "__ior__"}
        changing |= {"__iand__", "__isub__", "__ixor__"}
        assert not own & changing


def test_the_error_says_what_to_do() -> None:
    shelf = filled()
    with pytest.raises(NotLockedError, match=r"Shelf\.count is shared, and was set without the lock"):
        shelf.count += 1
    with pytest.raises(NotLockedError, match="this list was read outside of the lock"):
        shelf.items.append("x")


def test_what_is_read_behaves_as_the_plain_value() -> None:
    shelf = filled()
    assert shelf.items == ["a"] and isinstance(shelf.items, list) and shelf.items + ["b"] == ["a", "b"]  # noqa: RUF005
    assert json.dumps(shelf.index) == '{"a": [1]}'
    for value in (shelf.items, shelf.index, shelf.marks):
        for made in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
            assert made == value and type(made) in (list, dict, set)
    copied = copy.deepcopy(shelf.index)
    copied["a"].append(2)
    assert shelf.index == {"a": [1]}
    with shelf:
        shelf.items = shelf.items + ["b"]  # noqa: RUF005
    frozen = shelf.items
    with shelf:
        shelf.items = frozen
        shelf.items.append("c")
    assert shelf.items == ["a", "b", "c"] and frozen == ["a", "b"]


def test_a_deep_copy_has_nothing_in_common_with_what_was_read() -> None:
    nested = Nested()
    with nested:
        nested.pairs["a"] = (1, [2], Pair(3, [4]))
        nested.places = [Part(5, [6])]
    copied = copy.deepcopy(nested.pairs)
    copied["a"][1].append(1)
    copied["a"][2].right.append(1)
    assert copied == {"a": (1, [2, 1], Pair(3, [4, 1]))} and nested.pairs == {"a": (1, [2], Pair(3, [4]))}
    places = nested.places
    of_places, again = copy.deepcopy([places, places])
    assert of_places is again and type(of_places) is list
    of_places[0].tags.append(1)
    assert places == [Part(5, [6])]


def test_what_was_read_outside_can_be_changed_where_it_was_assigned_inside() -> None:
    nested = Nested()
    with nested:
        nested.pairs["a"] = (1, [2], Pair(3, [4]))
        nested.rows = [[1], [2]]
    read, rows = nested.pairs, list(nested.rows)
    with nested:
        nested.pairs = read
        nested.pairs["a"][1].append(20)
        nested.pairs["a"][2].right.append(40)
        nested.rows = rows
        nested.rows[0].append(10)
        rows.append([3])  # it is the shared one, until the lock is given back
        nested.table = {"x": nested.rows, "y": [read["a"][1]]}
        nested.table["y"][0].append(7)
    assert nested.pairs == {"a": (1, [2, 20], Pair(3, [4, 40]))} and read == {"a": (1, [2], Pair(3, [4]))}
    assert nested.rows == [[1, 10], [2], [3]] and nested.table == {"x": [[1, 10], [2], [3]], "y": [[2, 7]]}


def test_a_container_that_is_in_itself_is_refused() -> None:
    nested, endless = Nested(), []  # type: ignore[var-annotated]
    endless.append(endless)
    with nested, pytest.raises(coheld.StateError, match=r"Nested\.rows"):
        nested.rows = endless
    assert nested.rows == []


def test_one_value_as_long_as_nothing_changes_it() -> None:
    shelf = filled()
    items = shelf.items
    with shelf:
        shelf.count += 1
    assert shelf.items is items
    shelf.put("b")
    assert shelf.items is not items and items == ["a"]


def hold(link: procs.Link, shelf: Shelf) -> None:
    with shelf:
        shelf.put("unfinished")
        link.say("holding")
        link.wait_for("go")


@pytest.mark.parametrize("stopped", [False, True])
def test_a_holder_does_not_block_a_reader(stopped: bool) -> None:
    shelf = filled()
    with procs.start(hold, shelf) as holder:
        holder.expect("holding")
        if stopped:
            holder.stop()
        assert shelf.items == ["a"] and shelf.count == 1
        assert coheld.snapshot(shelf).items == ["a"]
        with pytest.raises(NotLockedError):
            shelf.count = 0
        if stopped:
            holder.cont()
        holder.tell("go")
        holder.end()
    assert shelf.items == ["a", "unfinished"]


def test_what_a_killed_holder_had_not_committed_is_gone() -> None:
    shelf = filled()
    with procs.start(hold, shelf) as holder:
        holder.expect("holding")
        holder.kill()
    assert shelf.items == ["a"]
    shelf.put("b")
    assert shelf.items == ["a", "b"] and shelf.count == 2


class Balance(Lockable):
    """Two fields that always agree, and one that makes commits long."""

    left: int = shared(0)
    right: int = shared(0)
    both: list[int] = shared(default_factory=lambda: [0] * 2000)

    @Lockable.locked
    def move(self) -> None:
        self.left += 1
        self.both[:] = [self.left] * 2000
        self.right -= 1


def move_always(link: procs.Link, balance: Balance) -> None:
    link.say("moving")
    while not link._connection.poll():
        balance.move()


def test_a_snapshot_is_one_commit() -> None:
    balance = Balance()
    with procs.start(move_always, balance) as mover, procs.start(move_always, balance) as other:
        mover.expect("moving")
        other.expect("moving")
        seen, snapshots = set(), 0
        while snapshots < 2000 or len(seen) < 10:  # they may begin late
            found = coheld.snapshot(balance)
            assert found.left == -found.right and set(found.both) == {found.left}
            seen.add(found.left)
            snapshots += 1
        mover.tell("end")
        other.tell("end")


def test_a_reader_gets_on_while_commits_never_end() -> None:
    """Large states under commits without a pause: the reader asks for the lock in between."""
    balance = Balance()
    with balance:
        balance.both = [1] * 500_000
    with procs.start(move_large, balance) as mover:
        mover.expect("moving")
        for _ in range(5):
            found = coheld.snapshot(balance)
            assert len(set(found.both)) == 1
        mover.tell("end")


def move_large(link: procs.Link, balance: Balance) -> None:
    link.say("moving")
    n = 0
    while not link._connection.poll():
        n += 1
        with balance:
            balance.both = [n] * 500_000


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a file that Python had just opened
def test_a_signal_in_a_commit_leaves_the_lock_free() -> None:
    """Whatever the moment of the exception: the lock is given back, or the thread still has it where that is declared,
    and the state is one of two."""

    class Interrupted(Exception):
        pass

    armed = False

    def interrupt(*_: object) -> None:
        if armed:
            raise Interrupted

    gc.collect()
    gc.disable()  # what a handler raises in the middle of a collection, in somebody's weakref callback, is lost
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        interruptions = 0
        for n in range(800):
            if n % 4 == 0:
                balance = Balance()  # its first commits make, and grow, its file
            try:
                armed = True
                # again later: Python drops what is raised where nobody can get it, in a callback of the collector
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + n * 3e-6, delays.MEDIUM)
                while True:
                    balance.move()
            except Interrupted:
                armed = False
                interruptions += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            if not observe.CAPABILITIES.uninterruptible_entry:
                observe.give_all_back(balance)
            assert coheld.holder(balance) is None
            found = coheld.snapshot(balance)
            assert set(found.both) in ({found.left}, {-found.right}) and abs(found.left + found.right) <= 1
            with balance:
                balance.right, balance.both = -balance.left, [balance.left] * 2000
        assert interruptions == 800
    finally:
        signal.signal(signal.SIGALRM, before)
        gc.enable()


@observe.where("files")
@pytest.mark.parametrize("anew", [False, True])
def test_removed_in_the_middle_of_a_first_look(monkeypatch: pytest.MonkeyPatch, anew: bool) -> None:
    """The file that the word leads to is gone, or the next resource's: that is no damage."""
    shelf = Shelf(lock_name="shelf")
    with shelf:
        shelf.items = ["long enough for the heap"]
    program = "from coheld.mutex import remove; assert remove('shelf')\n"
    if anew:
        program += "from coheld.testing.state.things import Shelf\n"
        program += "Shelf(lock_name='shelf').put('a')"
    copied = View._copied

    def late(self: View, word: int, indices: Any) -> Any:
        monkeypatch.setattr(View, "_copied", copied)
        self.files.clear()
        procs.run(program)
        return copied(self, self._word(), indices)

    for read in (lambda: coheld.snapshot(shelf).items, lambda: shelf.items):
        monkeypatch.setattr(View, "_copied", late)
        assert read() == (["a"] if anew else [])
        with shelf:
            shelf.items = ["long enough for the heap"]


def test_show_has_the_last_commit_and_the_holder() -> None:
    assert look("shelf") is None
    shelf = Shelf(lock_name="shelf")
    shelf.put("a")
    with shelf:
        shelf.put("b")
        found = look("shelf")
        token = coheld.token(shelf) if observe.CAPABILITIES.leases else None
    assert found is not None and {one.name: one.value for one in found.fields}["items"] == ["a"]
    assert [one.type for one in found.fields if one.name == "count"] == ["int"]
    assert found.holder is not None and found.holder.pid == os.getpid()
    if observe.CAPABILITIES.files:
        assert (found.store, found.token, found.commits) == ("", None, 1) and found.file
    else:
        assert found.store and found.commits is found.file is None
        assert found.token and token and found.token <= token < found.token + (1 << PASS_BITS)
    assert look("shelf").holder is None  # type: ignore[union-attr]


@observe.where("files")
def test_show_in_the_middle_of_a_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    Shelf(lock_name="shelf").put("a")
    opened = store.opened

    def late(*args: Any) -> Any:
        monkeypatch.setattr(store, "opened", opened)
        procs.run("from coheld.mutex import remove; assert remove('shelf')")
        return opened(*args)

    monkeypatch.setattr(store, "opened", late)
    assert look("shelf") is None


def test_removed_by_another_process() -> None:
    shelf = Shelf(lock_name="shelf")
    shelf.put("a")
    assert shelf.items == ["a"]
    procs.run("from coheld.mutex import remove; assert remove('shelf')")
    states.wait_until(lambda: shelf.items == [], "the reader sees the new one", delays.LONG)
    shelf.put("b")
    assert shelf.items == ["b"] and Shelf(lock_name="shelf").items == ["b"]
