"""The state beside a lock of files: what a reader accepts, whatever it sees first; what it costs, and when it goes."""

import dataclasses
import gc
import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import coheld
from coheld import IncompatibleError, native, process
from coheld.backends import file, files, of_scheme, record
from coheld.state import slots, store
from coheld.testing.state.things import Shelf
from coheld.testing.support import delays, procs


@pytest.fixture
def shelf() -> Shelf:
    """One with a past: there is an older value wherever something new is written."""
    shelf = Shelf(lock_name="shelf", lock_backend="file:")
    for number in range(3):
        change(shelf, number)
    return shelf


def change(shelf: Shelf, number: int) -> None:
    with shelf:
        shelf.items, shelf.count = [f"{number}" * 40], number


def look(shelf: Shelf) -> tuple[str, int]:
    """As another process sees it: what this one has stored, it need not look at."""
    shelf.__lock__.view.files.clear()
    found = coheld.snapshot(shelf)
    return found.items[0][0], found.count


class Reordered:
    """One store of a commit, that of this number, becomes visible later than its word, as on a machine without order:
    where the reader sleeps for the third time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, late: int) -> None:
        self.naps = 0
        put, sleep, number = slots.CheckedFile.put, time.sleep, itertools.count()
        held: list[Any] = []

        def put_later(*store: Any) -> None:
            if next(number) == late:
                held.append(store)
            else:
                put(*store)

        def nap(seconds: float) -> None:
            self.naps += 1
            if self.naps == 3:
                put(*held[0])
            sleep(seconds)

        monkeypatch.setattr(slots.CheckedFile, "put", put_later)
        monkeypatch.setattr(store.time, "sleep", nap)


@pytest.mark.parametrize("late", [0, 1], ids=["the heap", "the slot"])
def test_a_word_that_is_seen_before_what_it_names(monkeypatch: pytest.MonkeyPatch, shelf: Shelf, late: int) -> None:
    machine = Reordered(monkeypatch, late)
    change(shelf, 3)
    assert look(shelf) == ("3", 3)
    assert machine.naps == 3


@pytest.mark.parametrize(("late", "seen"), [(0, ("1", 3)), (1, ("3", 1))], ids=["the heap", "the slot"])
def test_a_reader_that_trusts_would_see_what_never_was(
    monkeypatch: pytest.MonkeyPatch, shelf: Shelf, late: int, seen: tuple[str, int]
) -> None:
    """So the test above tests something."""
    monkeypatch.setattr(slots.CheckedFile, "entries", trusted_entries)
    monkeypatch.setattr(slots.CheckedFile, "_read", trusted_value)
    Reordered(monkeypatch, late)
    change(shelf, 3)
    assert look(shelf) == seen


def trusted_entries(state: Any, word: int) -> list[slots.Entry]:
    raw = state._copied(state.slots[word & 1], state.head.count * slots.ENTRY.size)
    return [slots.Entry(*one) for one in slots.ENTRY.iter_unpack(raw)]


def trusted_value(state: Any, entry: slots.Entry) -> Any:
    return state._copied(entry.place[0], entry.length)


def test_what_never_arrives_is_damage(monkeypatch: pytest.MonkeyPatch, shelf: Shelf) -> None:
    monkeypatch.setattr(slots.CheckedFile, "put", lambda *_: None)
    change(shelf, 3)
    with pytest.raises(IncompatibleError, match="damaged"):
        look(shelf)


def test_an_object_keeps_no_descriptor_and_no_mapping(coheld_dir: Path, shelf: Shelf) -> None:
    shelf.put("a")
    assert coheld.snapshot(shelf).items[1] == "a"
    opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd.isdigit() and is_open(fd)]
    assert not [path for path in opened if "~" in path]
    assert "name-shelf~" not in Path("/proc/self/maps").read_text()


def is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_file_that_was_taken_away_is_not_written_to(coheld_dir: Path, shelf: Shelf) -> None:
    """By hand, under a holder: the file that has its name by then may be another one's."""
    (path,) = coheld_dir.glob("name-shelf~*")
    with pytest.raises(IncompatibleError, match="damaged"), shelf:
        shelf.count = 3
        content = bytearray(path.read_bytes())
        content[40] ^= 1  # whose it is
        path.unlink()
        path.write_bytes(content)
        path.chmod(0o600)
    assert path.read_bytes() == content and coheld.holder(shelf) is None


def test_a_new_name_is_not_taken_off_by_who_saw_the_old_one(monkeypatch: pytest.MonkeyPatch, shelf: Shelf) -> None:
    """Who removed it was killed on the way; two find that, and one makes it anew while the other is not done."""
    with shelf:
        shelf.__lock__._flag(native.REMOVED, True)
    unlink_whole, overtaking = files.unlink_whole, []

    def slowly(path: str) -> None:
        monkeypatch.setattr(files, "unlink_whole", unlink_whole)
        overtaking.append(procs.run(PUT).strip())
        unlink_whole(path)

    monkeypatch.setattr(files, "unlink_whole", slowly)
    assert shelf.items == []
    if "kept locked" in overtaking[0]:  # it could not, and tries again
        assert procs.run(PUT).strip() == "['a']"
    assert procs.run(LOOK).strip() == "['a']"
    assert shelf.items == ["a"]


LOOK = """
import sys; sys.path.insert(0, "tests")
import coheld
from coheld.testing.state.things import Shelf
shelf = Shelf(lock_name="shelf", lock_backend="file:")
print(shelf.items)
"""
PUT = LOOK.replace(
    "print",
    """
try: shelf.put("a")
except coheld.BackendError as error: print(error)
else: print""",
)


def test_a_state_outlives_a_restart(shelf: Shelf) -> None:
    """On a disk, which may have another number then; whoever held the lock is dead, and had committed nothing more."""
    lock = shelf.__lock__
    device, inode = lock.segment.identity
    assert store.opened(lock.segment.path, (device + 1, inode), lock.offset, 1).head.device == device
    with pytest.raises(IncompatibleError, match="of another resource"):
        store.opened(lock.segment.path, (device, inode + 1), lock.offset, 1)
    with procs.start(hold, shelf) as holder:
        holder.expect("holding")
        holder.kill()
    header = file.header_here(files.NAMED, "shelf")
    with open(lock.segment.path, "r+b") as raw:
        raw.write(dataclasses.replace(header, boot=b"0" * 36).pack())
    assert procs.run(LOOK).strip() == str(shelf.items)
    assert procs.run(PUT).strip() == str(shelf.items)


def hold(link: procs.Link, shelf: Shelf) -> None:
    with shelf:
        shelf.put("unfinished")
        link.say("holding")
        link.wait_for("never")


def test_a_child_has_the_state_though_its_parent_has_dropped_the_object() -> None:
    shelves = [of_files() for _ in range(3)]
    shelves[0].put("a")
    with procs.start(look_when_told, shelves[0]) as child:
        child.expect("ready")
        del shelves
        gc.collect()
        others = [of_files() for _ in range(100)]  # none of them is in its cell
        for other in others:
            other.put("other")
        child.tell("go")
        assert child.result() == ["a", "b"]


def look_when_told(link: procs.Link, shelf: Shelf) -> list[str]:
    link.say("ready")
    link.wait_for("go")
    shelf.put("b")
    return list(shelf.items)


def of_files() -> Shelf:
    shelf = Shelf.__new__(Shelf)
    native.hang(shelf, of_scheme("file").anonymous())
    Shelf.__init__(shelf)
    return shelf


def test_threads_that_read_while_others_write(shelf: Shelf) -> None:
    done, wrong = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            found = coheld.snapshot(shelf)
            if found.items != [f"{found.count}" * 40]:
                wrong.append(found)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(2, 300):
        change(shelf, number)
    done.set()
    for thread in threads:
        thread.join(delays.LONG)
    assert not wrong


def test_those_who_wait_for_a_guard_do_not_hide_one_who_waits_for_the_lock() -> None:
    """A newcomer stands back for whoever waits for the lock; there are not places for all on record."""
    cell, start = record.Cell(bytearray(record.CELL_SIZE), 0), process.start_of(os.getpid())
    assert start is not None
    for tid in range(100):
        cell.enrol((os.getpid(), start, tid), 0)
    assert cell.watchers() and not cell.waiters() and cell.waiting_since() == 0
    cell.enrol((os.getpid(), start, 1000), 77)
    assert [one[2:] for one in cell.waiters()] == [(1000, 77)] and cell.waiting_since() == 77
    cell.leave((os.getpid(), start, 1000))
    assert cell.waiting_since() == 0
