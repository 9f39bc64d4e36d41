"""Pickle, copy and fork: how a state gets about, and what of it does."""

import copy
import multiprocessing
import os
import pickle
import threading
from typing import Any

import cloudpickle
import dill
import pytest

import coheld
from coheld import Lockable, shared
from coheld.state import store
from coheld.testing.contract.observe import CAPABILITIES
from coheld.testing.state.things import Shelf
from coheld.testing.support import delays, procs


def put(link: procs.Link, shelf: Shelf) -> list[str]:
    shelf.put("child")
    return list(shelf.items)


@pytest.mark.parametrize("method", procs.METHODS)
@pytest.mark.parametrize("name", [None, "shelf"])
def test_an_argument_of_a_process(method: str, name: str | None) -> None:
    shelf = Shelf(lock_name=name) if name else Shelf()
    shelf.put("parent")
    with procs.start(put, shelf, method=method) as child:
        assert child.result() == ["parent", "child"]
    assert shelf.items == ["parent", "child"]


def put_in_pool(shelf: Shelf) -> int:
    shelf.put("pool")
    return shelf.count


def test_a_pool() -> None:
    shelf = Shelf()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        counts = pool.map(put_in_pool, [shelf] * 10)
        pool.close()
        pool.join()
    assert len(shelf.items) == 10 and max(counts) == 10


@pytest.mark.parametrize("library", [pickle, cloudpickle, dill])
def test_a_pickle_is_the_same_resource(library: Any) -> None:
    shelf = Shelf()
    shelf.put("a")
    shelf.own = "attribute"  # type: ignore[attr-defined]
    other = library.loads(library.dumps(shelf))
    other.put("b")
    assert shelf.items == other.items == ["a", "b"] and other.own == "attribute"
    assert "items" not in vars(other)


def test_copy_shares_and_deepcopy_does_not() -> None:
    shelf = Shelf(lock_name="shelf")
    with shelf:
        shelf.put("a")
        shelf.index["a"], shelf.marks = [1], {"m"}
    same, other = copy.copy(shelf), copy.deepcopy(shelf)
    same.put("b")
    assert shelf.items == ["a", "b"]
    assert other.items == ["a"] and other.index == {"a": [1]} and other.marks == {"m"}
    other.put("c")
    assert other.items == ["a", "c"] and shelf.items == ["a", "b"]


def test_deepcopy_inside_of_the_lock_has_what_is_there_then() -> None:
    shelf = Shelf()
    with shelf:
        shelf.put("a")
        other = copy.deepcopy(shelf)
        shelf.put("b")
        assert coheld.holder(other) is None
        assert other.items == ["a"]
    assert shelf.items == ["a", "b"]


def test_deepcopy_does_not_create_again() -> None:
    class Made(Lockable):
        n: int = shared(0)

        def __create__(self) -> None:
            self.n += 1

    made = Made()
    assert copy.deepcopy(made).n == made.n == 1


def in_child(check: Any) -> None:
    if not (pid := os.fork()):
        try:
            check()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_fork_in_mid_call_sees_the_last_commit() -> None:
    shelf = Shelf()
    shelf.put("committed")

    def look() -> None:
        assert shelf.items == ["committed"] and shelf.count == 1
        assert coheld.snapshot(shelf).items == ["committed"]
        with pytest.raises(coheld.NotLockedError):
            shelf.count = 5
        assert not shelf.acquire(blocking=False)

    with shelf:
        shelf.put("unfinished")
        shelf.index["x"] = [1]
        in_child(look)
        assert shelf.items == ["committed", "unfinished"]
    assert shelf.items == ["committed", "unfinished"]


def test_a_fork_in_mid_call_has_its_own_turn_later() -> None:
    shelf = Shelf()
    shelf.put("committed")
    ready, go = os.pipe()

    def take_turn() -> None:
        os.read(ready, 1)
        shelf.put("child")
        assert shelf.items == ["committed", "parent", "child"] and shelf.count == 3

    with shelf:
        shelf.put("parent")
        if not (pid := os.fork()):
            try:
                take_turn()
            except BaseException:
                os._exit(1)
            os._exit(0)
    os.write(go, b"1")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(ready)
    os.close(go)
    assert shelf.items == ["committed", "parent", "child"]


def test_a_fork_in_the_middle_of_a_commit_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child has the other thread's unfinished values, and must not take them for its own."""
    shelf = Shelf()
    shelf.put("committed")
    committing, forked = threading.Event(), threading.Event()
    put_entries = store.StateFile.put_entries

    def slowly(*args: Any) -> None:
        monkeypatch.setattr(store.StateFile, "put_entries", put_entries)
        committing.set()
        assert forked.wait(delays.LONG)
        put_entries(*args)

    monkeypatch.setattr(store.StateFile, "put_entries", slowly)
    thread = threading.Thread(target=lambda: shelf.put("thread"))
    thread.start()
    assert committing.wait(delays.LONG)
    with procs.start(put_when_told, shelf) as child:
        forked.set()
        thread.join(delays.LONG)
        shelf.put("parent")
        child.tell("go")
        assert child.result() == ["committed", "thread", "parent", "child"]
    assert shelf.items == ["committed", "thread", "parent", "child"] and shelf.count == 4


def put_when_told(link: procs.Link, shelf: Shelf) -> list[str]:
    link.wait_for("go")
    return put(link, shelf)


def test_msgspec_is_imported_with_the_first_field_only() -> None:
    source = "import sys, coheld\nassert 'msgspec' not in sys.modules\nclass T(coheld.Lockable): pass\nT()\n"
    source += "assert 'msgspec' not in sys.modules\nclass T(coheld.Lockable):\n    n: int = coheld.shared(0)\n"
    if not CAPABILITIES.files:
        source = source.replace("T()\n", "")  # a store is told who asks, in MessagePack
    procs.run(source + "assert 'msgspec' in sys.modules")
