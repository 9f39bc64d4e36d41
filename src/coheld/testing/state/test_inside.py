"""Inside of the lock: own changes, in-place changes, one commit, atomic."""

import copy
import dataclasses
import operator
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import attrs
import msgspec
import pytest

import coheld
from coheld import DeadlockError, Lockable, shared
from coheld.mutex import remove
from coheld.state import store, view
from coheld.state.schema import Spec
from coheld.testing.contract.observe import CAPABILITIES
from coheld.testing.state.things import Shelf
from coheld.testing.support import delays, procs


def word(obj: Lockable) -> int:
    """The number of the last commit."""
    return obj.__lock__.version & ((1 << 48) - 1)


def test_own_changes_are_seen_and_are_committed_once() -> None:
    shelf = Shelf()
    with shelf:
        shelf.put("a")
        shelf.put("b")
        assert shelf.items == ["a", "b"] and shelf.count == 2
        assert word(shelf) == 0
    assert word(shelf) == 1
    assert shelf.items == ["a", "b"] and shelf.count == 2


def test_changes_deep_inside_are_kept() -> None:
    shelf = Shelf()
    with shelf:
        shelf.index["x"] = [1]
    with shelf:
        shelf.index["x"].append(2)
        shelf.marks |= {"m"}
    assert shelf.index == {"x": [1, 2]} and shelf.marks == {"m"}


class Optional(Lockable):
    items: list[int] | None = shared(None)
    count: int = shared(0)

    @Lockable.locked
    def put(self, items: list[int] | None) -> None:
        self.items = items


def put(_link: procs.Link, optional: Optional, items: list[int] | None) -> None:
    optional.put(items)


@pytest.mark.parametrize("has_read", [False, True])
def test_a_container_that_was_replaced_by_none_is_compared_with_that(has_read: bool) -> None:
    optional = Optional()
    with procs.start(put, optional, [1]) as other:
        other.result()
    with optional:
        assert not has_read or optional.items == [1]
        optional.items = None
    before = word(optional)
    with optional:
        assert optional.items is None
    assert word(optional) == before
    with optional:
        optional.count += 1
        assert optional.items is None
    assert (optional.count, optional.items) == (1, None)


def test_nothing_changed_nothing_committed() -> None:
    shelf = Shelf()
    with shelf:
        _ = shelf.count, shelf.items, shelf.marks
    assert word(shelf) == 0
    shelf.put("a")
    before = word(shelf)
    with shelf:
        _ = shelf.items, shelf.index, shelf.marks, shelf.count
        shelf.count = shelf.count
        shelf.items.append("b")
        shelf.items.pop()
        shelf.items = ["a"]
        shelf.label = ""
    assert word(shelf) == before


def test_a_set_that_was_only_looked_at_is_no_change_in_another_process() -> None:
    """Its encoding has another order there: hashes of strings differ."""
    shelf = Shelf(lock_name="shelf")
    with shelf:
        shelf.marks = {f"mark {n}" for n in range(50)}
    before = word(shelf)
    look = """
from coheld.testing.state.things import Shelf
shelf = Shelf(lock_name="shelf")
with shelf:
    print(len(shelf.marks))
with shelf:
    print(len(shelf.marks))
"""
    assert procs.run(look, env={**__import__("os").environ, "PYTHONHASHSEED": "77"}).split() == ["50", "50"]
    assert word(shelf) == before


def test_containers_are_detached_at_the_release() -> None:
    shelf = Shelf()
    mine = ["a"]
    with shelf:
        shelf.items = mine
        mine.append("b")
        shelf.index["x"] = inner = [1]
    mine.append("c")
    inner.append(2)
    with shelf:
        assert shelf.items == ["a", "b"] and shelf.index == {"x": [1]}
        kept = shelf.items
    kept.append("lost")
    with shelf:
        assert shelf.items == ["a", "b"]
    assert shelf.items == ["a", "b"]


def test_an_exception_keeps_what_was_changed() -> None:
    shelf = Shelf()
    with pytest.raises(KeyError):
        shelf.fail("a")
    assert shelf.items == ["a"] and shelf.count == 1


def test_two_objects_of_one_resource_have_one_state() -> None:
    one, other = Shelf(lock_name="shelf"), Shelf(lock_name="shelf")
    with one:
        one.put("a")
        other.put("b")
        assert one.items == other.items == ["a", "b"]
    assert other.items == ["a", "b"]


def test_threads_have_one_state() -> None:
    shelf = Shelf()

    def put_many() -> None:
        for _ in range(500):
            shelf.put("a")

    threads = [threading.Thread(target=put_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shelf.count == len(shelf.items) == 2000


def test_what_a_thread_did_not_commit_before_it_ended_is_gone() -> None:
    shelf = Shelf()
    shelf.put("a")

    def end_inside() -> None:
        shelf.acquire()
        shelf.put("lost")
        shelf.index["lost"] = [1]

    thread = threading.Thread(target=end_inside)
    thread.start()
    thread.join()
    assert shelf.items == ["a"]
    with shelf:
        assert shelf.items == ["a"] and shelf.count == 1 and shelf.index == {}
    assert shelf.items == ["a"] and shelf.index == {}


def test_an_end_that_another_process_has_dealt_with() -> None:
    """Then this process's next owner is not told of the death, and must still not find the dead thread's changes."""
    shelf = Shelf(lock_name="shelf")
    shelf.put("a")

    def end_inside() -> None:
        shelf.acquire()
        shelf.put("lost")

    thread = threading.Thread(target=end_inside)
    thread.start()
    thread.join()
    program = (
        "from coheld.testing.state.things import Shelf\nwith Shelf(lock_name='shelf') as shelf: print(shelf.items)"
    )
    assert procs.run("" + program, stderr=-3).strip() == "['a']"
    with shelf:
        assert shelf.items == ["a"] and shelf.count == 1
    assert shelf.items == ["a"]


# ---- atomic ----------------------------------------------------------------------------------------------------------


def test_atomic_undoes() -> None:
    shelf = Shelf()
    shelf.put("a")
    before = coheld.snapshot(shelf), word(shelf)
    with pytest.raises(KeyError):
        shelf.put_or_nothing("b")
    assert (coheld.snapshot(shelf), word(shelf)) == before
    shelf.put_or_nothing("b", fail=False)
    assert shelf.items == ["a", "b"] and shelf.index == {"b": [1]} and shelf.marks == {"b"}


def test_atomic_in_a_call_undoes_its_own_changes_only() -> None:
    shelf = Shelf()
    shelf.put("a")
    with shelf:
        shelf.put("b")
        shelf.index["b"] = [7]
        items, inner = shelf.items, shelf.index["b"]
        with pytest.raises(KeyError):
            shelf.put_or_nothing("b")
        assert shelf.items == ["a", "b"] and shelf.count == 2 and shelf.index == {"b": [7]} and shelf.marks == set()
        items.append("c")  # the caller's list is still the shared one, and so is what lies inside
        inner.append(8)
    assert shelf.items == ["a", "b", "c"] and shelf.count == 2 and shelf.index == {"b": [7, 8]} and shelf.marks == set()


def test_atomic_in_atomic() -> None:
    class Nested(Shelf):
        @Lockable.locked(atomic=True)
        def outer(self, fail: bool) -> None:
            self.put("outer")
            with pytest.raises(KeyError):
                self.put_or_nothing("inner")
            assert self.items == ["outer"]
            if fail:
                raise ValueError("outer")

    shelf = Nested()
    with pytest.raises(ValueError, match="outer"):
        shelf.outer(True)
    assert shelf.items == [] and shelf.count == 0
    shelf.outer(False)
    assert shelf.items == ["outer"] and shelf.count == 1


class Part(Lockable):
    """Values that are no builtin containers."""

    from dataclasses import dataclass

    @dataclass
    class Place:
        x: int
        tags: list[str]

    place: Place = shared(default_factory=lambda: Part.Place(0, []))

    @Lockable.locked(atomic=True)
    def move(self) -> None:
        self.place.x = 5
        self.place.tags.append("moved")
        raise KeyError


def test_atomic_restores_objects() -> None:
    part = Part()
    with part:
        part.place.x = 1
        place = part.place
        with pytest.raises(KeyError):
            part.move()
        assert part.place is place and place == Part.Place(1, [])
        place.x += 1
    assert part.place == Part.Place(2, [])


@dataclasses.dataclass
class Tag:
    words: list[str]


@dataclasses.dataclass(frozen=True)
class Seal:
    words: list[str]


class Slip(msgspec.Struct):
    tag: Tag


@attrs.define
class Card:
    slips: list[Slip]


class Case(Lockable):
    """Values of all kinds that can be changed in place, inside of each other."""

    rows: dict[str, list[list[int]]] = shared(default_factory=dict)
    marks: list[set[str]] = shared(default_factory=list)
    raw: bytearray = shared(default_factory=bytearray)
    pair: tuple[int, list[int]] = shared(default_factory=lambda: (0, []))
    seals: list[Seal] = shared(default_factory=list)
    card: Card = shared(default_factory=lambda: Card([]))
    numbers: list[int] = shared(default_factory=list)

    @Lockable.locked(atomic=True)
    def run_and_fail(self, change: Callable[["Case"], object]) -> None:
        change(self)
        raise KeyError


def filled_case(case: Case) -> list[Any]:
    """By the owner; what he may keep of it, outer ones first."""
    case.rows.update(a=[[1]], b=[[2], [3]])
    case.marks.append({"m"})
    case.raw += b"raw"
    case.pair = (1, [2])
    case.seals.append(Seal(["s"]))
    case.card.slips.append(Slip(Tag(["w"])))
    return kept_now(case)


def kept_now(case: Case) -> list[Any]:
    slip = case.card.slips[0]
    rows = [case.rows, case.rows["a"], case.rows["a"][0], case.rows["b"]]
    kept = [*rows, case.marks, case.marks[0], case.raw, case.pair[1], case.seals, case.seals[0], case.seals[0].words]
    return [*kept, case.card, case.card.slips, slip, slip.tag, slip.tag.words]


MINE = [[9]]
SPOILING: list[Callable[[Case], object]] = [
    lambda case: None,
    lambda case: case.numbers,
    lambda case: kept_now(case)[0],
    lambda case: case.rows["a"][0].append(2),
    lambda case: operator.setitem(case.rows, "a", MINE),
    lambda case: operator.setitem(case.rows["a"], 0, MINE[0]),
    lambda case: case.rows.clear(),
    lambda case: case.rows.pop("a") and case.rows.setdefault("a", [[1]]),  # in another order
    lambda case: setattr(case, "rows", {"a": []}),
    lambda case: setattr(case, "rows", case.rows),
    lambda case: case.marks[0].add("n"),
    lambda case: case.marks.insert(0, {"n"}),
    lambda case: case.raw.extend(b"more"),
    lambda case: setattr(case, "raw", bytearray()),
    lambda case: case.pair[1].append(3),
    lambda case: setattr(case, "pair", (7, [])),
    lambda case: case.seals[0].words.append("t"),
    lambda case: case.card.slips[0].tag.words.append("v"),
    lambda case: setattr(case.card.slips[0], "tag", Tag([])),
    lambda case: setattr(case.card, "slips", [Slip(Tag(["x"])), Slip(Tag(["y"]))]),
    lambda case: case.numbers.append("none"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("spoil", SPOILING)
def test_a_failed_atomic_call_leaves_what_its_caller_has_kept(spoil: Callable[[Case], object]) -> None:
    """The same objects, with the same in them, and what is changed in them after that is committed."""
    case = Case()
    with case:
        kept = filled_case(case)
        before = copy.deepcopy(kept)
        with pytest.raises(KeyError):
            case.run_and_fail(spoil)
        assert kept == before and list(kept[0]) == ["a", "b"] and MINE == [[9]]
        assert all(map(operator.is_, kept_now(case), kept))
        kept[2].append(20)
        kept[5].add("k")
        kept[6] += b"!"
        kept[7].append(21)
        kept[-1].append("z")
    assert case.rows == {"a": [[1, 20]], "b": [[2], [3]]} and case.marks == [{"m", "k"}] and case.raw == b"raw!"
    assert case.pair == (1, [2, 21]) and case.seals == [Seal(["s"])] and case.card == Card([Slip(Tag(["w", "z"]))])
    assert case.numbers == []


def test_a_failed_atomic_call_in_a_loop_over_what_it_leaves_alone() -> None:
    case = Case()
    with case:
        case.rows.update(a=[[1]], b=[[2]])
        for rows in case.rows.values():
            with pytest.raises(KeyError):
                case.run_and_fail(lambda case: case.numbers.append(1))
            rows[0].append(3)
    assert case.rows == {"a": [[1, 3]], "b": [[2, 3]]} and case.numbers == []


@pytest.mark.parametrize("bad", ["text", object()])
def test_an_atomic_call_fails_while_its_caller_has_what_does_not_fit(bad: Any) -> None:
    case = Case()
    with case:
        case.numbers += [1, bad]
        numbers = case.numbers
        with pytest.raises(KeyError):
            case.run_and_fail(lambda case: case.numbers.append(2))
        assert case.numbers is numbers and numbers == [1, bad]
        numbers[1] = 5
    assert case.numbers == [1, 5]


# ---- in the middle of a commit ---------------------------------------------------------------------------------------


def interrupted(monkeypatch: pytest.MonkeyPatch, cls: type, name: str, after: bool) -> None:
    """A signal comes in the first call of that method."""
    method = getattr(cls, name)

    def wrapped(*args: Any) -> Any:
        monkeypatch.setattr(cls, name, method)
        if not after:
            signal.raise_signal(signal.SIGUSR1)
        result = method(*args)
        if after:
            signal.raise_signal(signal.SIGUSR1)
        return result

    monkeypatch.setattr(cls, name, wrapped)


STEPS = [(Spec, "encode"), (store.StateFile, "put_entries"), (view.View, "_write"), (view.View, "_settle")]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("cls", "name"), STEPS)
def test_what_a_handler_changes_in_the_middle_of_a_commit_is_kept(
    monkeypatch: pytest.MonkeyPatch, cls: type, name: str, after: bool
) -> None:
    shelf = Shelf()
    shelf.put("first")

    def late(*_: object) -> None:
        shelf.put("late")
        shelf.label = "late"
        shelf.marks.add("late")

    with handled(late):
        with nullcontext() if CAPABILITIES.handlers else pytest.raises(DeadlockError, match="handler"), shelf:
            shelf.label = "body"
            shelf.items.append("body")
            shelf.marks.add("body")
            interrupted(monkeypatch, cls, name, after)
        if CAPABILITIES.handlers:
            assert shelf.items == ["first", "body", "late"] and shelf.count == 2
            assert shelf.label == "late" and shelf.marks == {"body", "late"}
        elif cls is Spec:  # the store has not heard of it
            assert shelf.items == ["first"] and shelf.count == 1 and not shelf.label and not shelf.marks
        else:
            assert shelf.items == ["first", "body"] and shelf.count == 1
            assert shelf.label == "body" and shelf.marks == {"body"}
    assert coheld.holder(shelf) is None
    with shelf:
        assert shelf.items[0] == "first" and len(shelf.items) == shelf.count + ("body" in shelf.items)


def test_a_handler_that_takes_back_what_is_being_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf()
    shelf.put("first")
    left = ["first"] if CAPABILITIES.handlers else ["first", "body"]
    with handled(lambda *_: take_back(shelf)):
        with nullcontext() if CAPABILITIES.handlers else pytest.raises(DeadlockError, match="handler"), shelf:
            shelf.items.append("body")
            interrupted(monkeypatch, view.View, "_write", after=True)
        assert shelf.items == left
        with shelf:
            assert shelf.items == left


def take_back(shelf: Shelf) -> None:
    with shelf:
        shelf.items.remove("body")


@pytest.mark.parametrize("fail", [False, True])
def test_a_signal_where_an_atomic_call_ends(monkeypatch: pytest.MonkeyPatch, fail: bool) -> None:
    """The call has raised, so nothing of it is there; and what comes next is not taken for a part of it."""

    def interrupt(*_: object) -> None:
        raise InterruptedError

    shelf = Shelf()
    with handled(interrupt), shelf:
        interrupted(monkeypatch, type(shelf.__lock__), "_leave_atomic", after=False)
        with pytest.raises(InterruptedError):
            shelf.put_or_nothing("a", fail)
        assert shelf.__lock__.atomic == 0
    assert shelf.items == [] and shelf.index == {} and shelf.__lock__.version == 0


class handled:  # noqa: N801
    """With this handler of SIGUSR1."""

    def __init__(self, handler: Callable[..., object]) -> None:
        self.handler = handler

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGUSR1, self.handler)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGUSR1, self.before)


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_a_snapshot_inside_has_own_changes_and_is_detached() -> None:
    shelf = Shelf()
    with shelf:
        shelf.put("a")
        taken: Any = coheld.snapshot(shelf)
        shelf.put("b")
    assert taken.items == ["a"] and taken.count == 1


class Twin(Lockable):
    """The fields of a Shelf."""

    count: int = shared(0)
    label: str = shared("")
    items: list[str] = shared(default_factory=list)
    index: dict[str, list[int]] = shared(default_factory=dict)
    marks: set[str] = shared(default_factory=set)


def in_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(delays.LONG)
    assert not thread.is_alive()


def test_two_classes_of_one_resource() -> None:
    shelf, twin = Shelf(lock_name="shelf"), Twin(lock_name="shelf")
    for n in range(1, 5):
        shelf.put("a")
        assert twin.count == n * 2 - 1
        with twin:
            twin.count += 1
        assert shelf.count == n * 2
    with pytest.raises(coheld.IncompatibleError, match="one class"), shelf:
        shelf.count += 1
        twin.count += 1
    assert len(shelf.__lock__.view.siblings) == 2


def test_a_reader_of_another_class_does_not_disturb_the_owner() -> None:
    shelf, twin, seen = Shelf(lock_name="shelf"), Twin(lock_name="shelf"), []
    shelf.put("a")

    def look() -> None:
        seen.append((twin.count, twin.items, coheld.snapshot(twin).label))
        assert twin.items is twin.items

    with shelf:
        shelf.put("b")
        in_thread(look)
        shelf.label = "c"
        shelf.put("d")
        assert shelf.items == ["a", "b", "d"]
    assert seen == [(1, ["a"], "")]
    assert twin.items == ["a", "b", "d"] and twin.label == "c"


class Delayed:
    """A thread that looks at the shelf, and stands still where it has just made a view."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shelf: Shelf) -> None:
        self.made, self.go = threading.Event(), threading.Event()
        self.seen: list[int] = []
        self.thread = threading.Thread(target=lambda: self.seen.append(shelf.count))
        init = view.View.__init__

        def slowly(*args: Any) -> None:
            init(*args)
            if threading.current_thread() is self.thread:
                self.made.set()
                assert self.go.wait(delays.LONG)

        monkeypatch.setattr(view.View, "__init__", slowly)
        self.thread.start()
        assert self.made.wait(delays.LONG)

    def end(self) -> list[int]:
        self.go.set()
        self.thread.join(delays.LONG)
        return self.seen


def test_two_threads_that_look_first_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf()
    other = Delayed(monkeypatch, shelf)
    with shelf:
        shelf.count += 1
        assert other.end() == [0]
        shelf.count += 1
        assert shelf.count == 2
    assert shelf.count == 2


def test_a_thread_that_looks_first_while_the_resource_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(lock_name="shelf")
    other = Delayed(monkeypatch, shelf)
    assert remove("shelf")
    shelf.put("a")
    assert other.end() in ([0], [1])
    assert shelf.count == 1 and shelf.items == ["a"]
    shelf.put("b")
    assert shelf.items == ["a", "b"]
