"""Growth, the limit, schemas, files and their ends, and coheld show."""

import gc
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import coheld
from coheld import IncompatibleError, Lockable, StateError, native, shared
from coheld.mutex import remove
from coheld.state import store
from coheld.state.slots import ENTRY, MAPPED
from coheld.testing.contract.observe import where
from coheld.testing.contract.places import file_called
from coheld.testing.state.things import Shelf
from coheld.testing.support import delays, procs


class Big(Lockable):
    number: int = shared(0)
    data: bytes = shared(b"")
    copy: bytes = shared(b"")

    @Lockable.locked
    def fill(self, size: int) -> None:
        self.number = size
        self.data = self.copy = bytes([size % 251]) * size


class Small(Lockable, max_state=1000):
    number: int = shared(0)
    data: bytes = shared(b"")


WHOLE = (32 << 20) - 100  # of each of two fields: the limit is 64 MiB


def sizes() -> list[int]:
    found, size = [], 100
    while size < 30 << 20:
        found += [size, size + 1, size // 2]
        size *= 3
    return [*found, WHOLE]


def fill_all(link: procs.Link, big: Big) -> None:
    for size in sizes():
        big.fill(size)
        big.fill(max(size - 1, 0))
    link.say("filled")


def check(big: Big) -> int:
    found = coheld.snapshot(big)
    assert len(found.data) == len(found.copy) == found.number
    assert set(found.data[:1000]) <= {found.number % 251} and found.data == found.copy
    return found.number


def test_growth_while_others_read_and_write(coheld_dir: Path) -> None:
    big = Big(lock_name="big")
    with procs.start(fill_all, big) as one, procs.start(fill_all, big) as other:
        seen = set()
        while one.alive() or other.alive():
            seen.add(check(big))
        one.end()
        other.end()
    assert len(seen) > 1
    assert len(list(coheld_dir.glob(f"{file_called('big')}~[0-9]*"))) == 1
    assert check(big) == WHOLE - 1


def test_the_limit_keeps_the_last_commit() -> None:
    small = Small()
    with small:
        small.data = b"x" * 900
    with pytest.raises(StateError, match=r"max_state"), small:
        small.number = 1
        small.data = b"x" * 1000
    assert coheld.holder(small) is None
    assert small.number == 0 and len(small.data) == 900
    with small:
        small.number = 2
    assert small.number == 2


class Notes(Lockable, max_state=20):
    one: str = shared("")
    two: str = shared("")


def test_the_limit_is_exact_for_short_values_too() -> None:
    notes = Notes()
    with notes:
        notes.one = notes.two = "123456789"  # and a byte before each
    with pytest.raises(StateError, match=r"21 bytes, and may have 20"), notes:
        notes.two = "1234567890"
    assert notes.two == "123456789"
    with notes:
        notes.two = "12345678"
        notes.one = "1234567890"
    assert len(notes.one + notes.two) == 18


def test_the_limit_is_64_mib_unless_the_class_says_otherwise() -> None:
    big = Big()
    with pytest.raises(StateError, match="67,108,864"), big:
        big.data = b"x" * (64 << 20)
    assert big.data == b""
    with pytest.raises(TypeError, match="max_state"):

        class Nothing(Lockable, max_state=5):
            pass

    class Same(Small):
        more: int = shared(0)

    with pytest.raises(StateError), Same() as same:
        same.data = b"x" * 1000


@where("files")
def test_a_full_file_system_keeps_the_last_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    big = Big(lock_name="big")
    big.fill(10)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space"):
            big.fill(100_000)
    assert coheld.holder(big) is None and big.number == 10
    big.fill(100_000)
    check(big)


class Log(Lockable):
    lines: list[int] = shared(default_factory=list)
    other: bytes = shared(b"")

    @Lockable.locked
    def add(self) -> None:
        self.lines.append(70_000)


def test_a_list_that_grows_does_not_need_a_new_file_each_time() -> None:
    """There can be 32,767 files, one after the other: less than a log has lines."""
    log = Log()
    with log:
        log.lines = [70_000] * 2000
    for _ in range(300):
        log.add()
    assert store.generation_of(log.__lock__.version) < 4


def test_a_state_that_grows_and_shrinks_comes_to_rest(rng: random.Random) -> None:
    log = Log()
    for _ in range(400):
        with log:
            log.lines, log.other = [70_000] * rng.randrange(4000), b"x" * rng.randrange(30_000)
    assert store.generation_of(log.__lock__.version) < 20


@where("files")
def test_the_last_file_that_can_be_counted(monkeypatch: pytest.MonkeyPatch, coheld_dir: Path) -> None:
    big = Big(lock_name="big")
    big.fill(10)
    big.fill(10_000)
    monkeypatch.setattr(store, "GENERATIONS", 2)
    with pytest.raises(StateError, match="larger file"):
        big.fill(1_000_000)
    assert coheld.holder(big) is None and check(big) == 10_000
    assert len(list(coheld_dir.glob(f"{file_called('big')}~[0-9]*"))) == 1
    big.fill(9_000)
    assert check(big) == 9_000


# ---- files -----------------------------------------------------------------------------------------------------------


def test_named_state_survives_its_processes_and_goes_with_its_name(coheld_dir: Path) -> None:
    program = "from coheld.testing.state.things import Shelf\nShelf(lock_name='s').put('a')"
    procs.run(program)
    assert Shelf(lock_name="s").items == ["a"]
    assert list(coheld_dir.glob("*~*"))
    assert remove("s")
    assert not list(coheld_dir.iterdir())
    assert Shelf(lock_name="s").items == []


@where("files")
def test_anonymous_state_goes_with_its_object(coheld_dir: Path) -> None:
    shelves = [Shelf() for _ in range(20)]
    for shelf in shelves:
        shelf.put("a")
    assert len(list(coheld_dir.rglob("*~*"))) == 20
    del shelf, shelves
    assert not list(coheld_dir.rglob("*~*"))
    assert Shelf().items == []  # in a cell that was used before


@where("files")
def test_the_memory_of_an_anonymous_state_goes_with_its_object(coheld_dir: Path) -> None:
    """Not when the collector comes: it does not know how much that is."""
    gc.disable()
    try:
        shelf = Shelf()
        shelf.put("a")
        assert shelf.items == ["a"]
        del shelf
        mapped = Path("/proc/self/maps").read_text().splitlines()
        assert not [line for line in mapped if str(coheld_dir) in line and "~" in line]
    finally:
        gc.enable()


def test_many_objects_need_no_descriptors() -> None:
    shelves = [Shelf() for _ in range(300)]
    shelves[0].put("a")  # a store is connected
    before = len(os.listdir("/proc/self/fd"))
    for shelf in shelves[1:]:
        shelf.put("a")
    assert all(shelf.items == ["a"] for shelf in shelves)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_what_a_dead_process_leaves_is_swept(coheld_dir: Path) -> None:
    source = "import os\nfrom coheld.testing.state.things import Shelf\ns = Shelf(); s.put('a')\n"
    procs.run(source)
    assert not list(coheld_dir.iterdir())
    with procs.program(source + "print('ready'); input()") as worker:
        worker.expect("ready")
        assert list(coheld_dir.rglob("*~*"))
        worker.kill()
    assert list(coheld_dir.rglob("*~*"))
    procs.run(source)
    assert not list(coheld_dir.iterdir())


# ---- schemas ---------------------------------------------------------------------------------------------------------


class First(Lockable):
    n: int = shared(0)
    m: list[int] = shared(default_factory=list)


class Second(Lockable):
    """First, and more."""

    a: str = shared("new")
    n: int = shared(0)
    m: list[int] = shared(default_factory=list)
    z: dict[str, int] = shared(default_factory=lambda: {"z": 1})


class Changed(Lockable):
    n: float = shared(0.0)
    m: list[int] = shared(default_factory=list)


def test_new_fields_are_an_upgrade() -> None:
    first, second = First(lock_name="r"), Second(lock_name="r")
    with first:
        first.n, first.m = 5, [1]
    assert (second.a, second.n, second.m, second.z) == ("new", 5, [1], {"z": 1})
    with second:
        assert second.n == 5 and second.z == {"z": 1}
    assert first.n == 5  # who only looked has changed nothing
    with second:
        second.n += 1
        second.z["y"] = 2
    assert coheld.snapshot(second).z == {"z": 1, "y": 2} and second.n == 6 and second.m == [1] and second.a == "new"
    with pytest.raises(IncompatibleError, match="a field a: str"):
        _ = first.n
    with pytest.raises(IncompatibleError, match="a field a: str"), first:
        first.n = 7
    assert second.n == 6 and coheld.holder(second) is None


def test_a_changed_type_is_refused_by_name() -> None:
    with First(lock_name="r") as first:
        first.n = 1
    changed = Changed(lock_name="r")
    for use in (lambda: changed.n, lambda: coheld.snapshot(changed), lambda: write(changed)):
        with pytest.raises(IncompatibleError, match=r"n is int there, and float in Changed"):
            use()
    assert First(lock_name="r").n == 1


def write(changed: Changed) -> None:
    with changed:
        changed.n = 1.0


class Inner(msgspec.Struct):
    x: int


def test_nested_types_are_compared_too() -> None:
    class One(Lockable):
        it: list[Inner] = shared(default_factory=list)

    with One(lock_name="r") as one:
        one.it.append(Inner(1))

    class Inner2(msgspec.Struct):
        x: int
        y: int = 0

    Inner2.__name__ = "Inner"

    class Two(Lockable):
        it: list[Inner2] = shared(default_factory=list)

    with pytest.raises(IncompatibleError, match="it is list"):
        _ = Two(lock_name="r").it


# ---- damage ----------------------------------------------------------------------------------------------------------


def state_file(coheld_dir: Path) -> Path:
    (path,) = coheld_dir.glob("name-s~*")
    return path


DAMAGES: list[Callable[[bytearray], Any]] = [
    lambda raw: raw.__setitem__(slice(0, 8), b"\0" * 8),
    lambda raw: raw.__setitem__(9, 77),
    lambda raw: raw.__setitem__(20, 77),
    lambda raw: raw.__setitem__(slice(None), raw[:100]),
    lambda raw: raw.__setitem__(slice(None), b""),
    lambda raw: raw.__setitem__(slice(None), raw[:2000]),
]


@where("files")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_reported(coheld_dir: Path, damage: Callable[[bytearray], Any]) -> None:
    Shelf(lock_name="s").put("a")
    path = state_file(coheld_dir)
    raw = bytearray(path.read_bytes())
    damage(raw)
    path.write_bytes(raw)
    path.chmod(0o600)
    for source in ("s.items", "s.put('b')", "coheld.snapshot(s)"):
        program = f"""
import coheld
from coheld.testing.contract.observe import where
from coheld.testing.contract.places import file_called
from coheld.testing.state.things import Shelf
s = Shelf(lock_name="s")
try: {source}
except coheld.IncompatibleError as error: print(error)
assert coheld.holder(s) is None
"""
        assert "no state of coheld, or damaged" in procs.run(program)
    assert show("s").returncode == 125


@where("files")
@pytest.mark.parametrize("where", ["length", "place", "bytes"])
def test_damaged_values_are_reported(coheld_dir: Path, where: str) -> None:
    shelf = Shelf(lock_name="s")
    with shelf:
        shelf.items, shelf.count = ["long enough for the heap"] * 9, 5
    word = shelf.__lock__.version
    state = store.opened(shelf.__lock__.segment.path, shelf.__lock__.segment.identity, shelf.__lock__.offset, 1)
    begin = state.slots[word & 1] + ENTRY.size * 2  # count, index, items, …
    if where == "length":
        state.put(begin + 8, struct.pack("=I", 1 << 30))
    elif where == "place":
        state.put(begin + 12, struct.pack("=Q", 1 << 60))
    else:
        state.put(state.entries(word)[2].place[0], b"\xc1")
    assert procs.run(DAMAGED).splitlines() == ["damaged"] * 3
    with pytest.raises(IncompatibleError, match="damaged"):
        _ = shelf.items
    assert coheld.holder(shelf) is None
    if where == "bytes" or state.head.magic == MAPPED:
        assert shelf.count == 5  # which is not
    else:
        with pytest.raises(IncompatibleError, match="damaged"):  # a slot is confirmed as a whole
            _ = shelf.count
    done = show("s")
    assert done.returncode == 125 and "damaged" in done.stderr


DAMAGED = """
import coheld
from coheld.testing.contract.observe import where
from coheld.testing.contract.places import file_called
from coheld.testing.state.things import Shelf
shelf = Shelf(lock_name="s")
for use in (lambda: shelf.items, lambda: coheld.snapshot(shelf), lambda: shelf.put("x")):
    try: use()
    except coheld.IncompatibleError as error: print("damaged" if "damaged" in str(error) else error)
"""


@where("files")
def test_the_state_of_another_resource_is_refused(coheld_dir: Path) -> None:
    Shelf(lock_name="s").put("a")
    other = Shelf(lock_name="other")
    other.put("b")
    os.replace(state_file(coheld_dir), next(coheld_dir.glob("name-other~*")))
    program = """
import coheld
from coheld.testing.contract.observe import where
from coheld.testing.contract.places import file_called
from coheld.testing.state.things import Shelf
try: print(Shelf(lock_name="other").items)
except coheld.IncompatibleError as error: print(error)
"""
    assert "the state of another resource" in procs.run(program)


# ---- coheld show -----------------------------------------------------------------------------------------------------


def show(*arguments: str) -> "subprocess.CompletedProcess[str]":
    source = "import sys; from coheld.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", source, "show", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=delays.LONG)


def hold(link: procs.Link) -> None:
    with Shelf(lock_name="s") as shelf:
        shelf.put("unfinished")
        link.say("holding")
        link.wait_for("go")


@where("files")
def test_show() -> None:
    shelf = Shelf(lock_name="s")
    with shelf:
        shelf.items, shelf.index = ["a", "b"], {"x": [1]}
    done = show("s")
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if not native.missing or "C extension" not in line] == []
    assert "s: 1 commits" in done.stdout and "items  list[str]" in done.stdout and "['a', 'b']" in done.stdout
    with procs.start(hold) as holder:
        holder.expect("holding")
        holder.stop()
        answer = json.loads(show("--json", "s").stdout)
        holder.cont()
        holder.tell("go")
    assert answer["fields"]["items"] == {"type": "list[str]", "value": ["a", "b"]}
    assert answer["commits"] == 1 and f"process {holder.pid}" in answer["holder"]


@where("files")
def test_show_makes_nothing(coheld_dir: Path) -> None:
    done = show("nothing")
    assert done.returncode == 1 and "no resource named 'nothing'" in done.stderr
    assert not list(coheld_dir.iterdir())
    with Lockable(lock_name="bare"):
        assert show("bare").stdout.startswith("bare: 0 commits, 0 bytes, held by")


@where("files")
def test_show_of_keys_that_json_has_not() -> None:
    class Odd(Lockable):
        it: dict[tuple[int, int], bytes] = shared(default_factory=dict)

    with Odd(lock_name="s") as odd:
        odd.it[1, 2] = b"x"
    answer = json.loads(show("--json", "s").stdout)
    assert answer["fields"]["it"]["value"] == {"(1, 2)": "eA=="}
