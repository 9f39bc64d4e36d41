"""Pickled and copied: what arrives is the same resource, with its lock in place, and loading never raises."""

import copy
import functools
import gc
import io
import multiprocessing
import pickle
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import dill  # type: ignore[import-untyped]
import pytest

from coheld import BackendError, CoheldError, IncompatibleError, InsecureError, Lockable, NotInitializedError, holder
from coheld.testing.contract.observe import held_elsewhere, is_free
from coheld.testing.support import delays, procs


class Bed(Lockable):
    """What is pickled here; with a name its lock has one."""

    def __init__(self, size: int = 1, name: str | None = None) -> None:
        super().__init__(lock_name=name)
        self.size = size

    @Lockable.locked
    def book(self, who: str) -> str:
        return f"{who} {self.size} {holder(self) is not None}"


def in_python(obj: object) -> bytes:
    """By the pickler that is written in Python."""
    file = io.BytesIO()
    pickle._Pickler(file).dump(obj)
    return file.getvalue()


def of_multiprocessing(obj: object) -> bytes:
    return bytes(multiprocessing.reduction.ForkingPickler.dumps(obj))


DUMPS: dict[str, Callable[[object], bytes]] = {
    **{f"pickle {number}": functools.partial(pickle.dumps, protocol=number) for number in range(6)},
    "pickle in Python": in_python,
    "multiprocessing": of_multiprocessing,
    "cloudpickle": cloudpickle.dumps,
    "dill": dill.dumps,
    "dill, recurse": functools.partial(dill.dumps, recurse=True),
    "dill, by reference": functools.partial(dill.dumps, byref=True),
}

by_every_pickler = pytest.mark.parametrize("dumps", DUMPS.values(), ids=DUMPS)
both = pytest.mark.parametrize("name", [None, "lab/bed-1"], ids=["anonymous", "named"])


# ---- there and back ----------------------------------------------------------------------------------------


@by_every_pickler
@both
def test_what_is_loaded_is_the_same_resource(dumps: Callable[[object], bytes], name: str | None) -> None:
    bed = Bed(3, name)
    loaded = pickle.loads(dumps(bed))
    assert type(loaded) is Bed and loaded is not bed and loaded.size == 3
    assert loaded.book("ann") == "ann 3 True"
    with held_elsewhere(bed):
        assert not loaded.acquire(blocking=False)
    with loaded:
        assert not is_free(bed)
    assert is_free(bed)


@both
def test_one_process_has_one_handle_of_a_resource(name: str | None) -> None:
    bed = Bed(1, name)
    loaded = [pickle.loads(pickle.dumps(bed)) for _ in range(3)]
    assert all(one.__lock__ is bed.__lock__ for one in loaded)
    with bed:
        loaded[0].release()
        assert loaded[1].acquire(timeout=0)
    assert is_free(bed)


def test_one_name_is_one_handle() -> None:
    assert Bed(1, "it").__lock__ is Lockable(lock_name="it").__lock__
    assert Bed(1, "it").__lock__ is not Lockable(lock_name="other").__lock__


def tell_handles(link: procs.Link, one: Bed, other: Bed, pickled: bytes) -> None:
    third = pickle.loads(pickled)
    link.say((one is other, one.__lock__ is other.__lock__ is third.__lock__))


@pytest.mark.parametrize("method", procs.METHODS)
@both
def test_another_process_has_one_handle_of_a_resource_too(method: str, name: str | None) -> None:
    bed = Bed(1, name)
    with procs.start(tell_handles, bed, copy.copy(bed), pickle.dumps(bed), method=method) as worker:
        assert worker.hear() == (False, True)


def test_objects_in_one_pickle_stay_one_object() -> None:
    bed = Bed()
    one, other, shared = pickle.loads(pickle.dumps([bed, bed, copy.copy(bed)]))
    assert one is other is not shared and one.__lock__ is shared.__lock__


def test_objects_that_refer_to_each_other() -> None:
    one: Any = Bed(1)
    other: Any = Bed(2)
    one.friend, other.friend, one.me = other, one, one
    for again in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert again.friend.friend is again.me is again and again.friend.size == 2
        assert again.book("ann") == "ann 1 True" and again.friend.book("bob") == "bob 2 True"


def test_the_lock_alone_pickles() -> None:
    bed = Bed()
    assert pickle.loads(pickle.dumps(bed.__lock__)) is bed.__lock__


def test_what_is_held_arrives_held() -> None:
    bed = Bed()
    with bed:
        loaded = pickle.loads(pickle.dumps(bed))
        owner = holder(loaded)
        assert owner is not None and owner.depth == 1
        loaded.release()
        assert is_free(bed)
        assert bed.acquire()


def test_a_handle_goes_when_nobody_has_it() -> None:
    bed = Bed()
    loaded = pickle.loads(pickle.dumps(bed))
    lock = weakref.ref(bed.__lock__)
    del bed, loaded
    gc.collect()
    assert lock() is None


def test_a_lock_that_was_pickled_is_never_another_objects() -> None:
    pickled = pickle.dumps(Bed())
    others = [Bed() for _ in range(100)]
    loaded = pickle.loads(pickled)
    with loaded:
        assert all(one.acquire(blocking=False) for one in others)
        assert all(is_free(one) is False for one in others)
    assert all(one.__lock__ is not loaded.__lock__ for one in others)
    for one in others:
        one.release()


def test_bound_methods_pickle() -> None:
    bed = Bed(3)
    method = pickle.loads(pickle.dumps(bed.book))
    assert method("ann") == "ann 3 True" and method.__self__.__lock__ is bed.__lock__


@by_every_pickler
def test_a_method_of_a_module_pickles_by_name(dumps: Callable[[object], bytes]) -> None:
    method: Any = Bed.book
    assert pickle.loads(dumps(method)) is method
    assert len(dumps(method)) < 200


def test_a_method_that_its_name_does_not_lead_to_does_not_pickle() -> None:
    class Local(Lockable):
        @Lockable.locked
        def book(self) -> None: ...

    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(Local.book)


# ---- copies ------------------------------------------------------------------------------------------------


@both
def test_a_copy_shares_the_lock(name: str | None) -> None:
    bed = Bed(3, name)
    copied = copy.copy(bed)
    assert copied.__lock__ is bed.__lock__ and copied.size == 3
    with copied:
        assert not is_free(bed)


@both
def test_a_deep_copy_is_a_new_resource(name: str | None) -> None:
    bed = Bed(3, name)
    with bed:
        copied = copy.deepcopy(bed)
        assert copied.size == 3 and holder(copied) is None and is_free(copied)
    with copied:
        assert is_free(bed)
    assert copied.book("ann") == "ann 3 True"


def test_a_deep_copy_of_what_shares_a_lock_shares_one() -> None:
    bed = Bed()
    one, other = copy.deepcopy([bed, copy.copy(bed)])
    assert one.__lock__ is other.__lock__ is not bed.__lock__


def test_a_deep_copy_of_what_is_not_initialised_is_not_either() -> None:
    bed = Bed.__new__(Bed)
    for again in (copy.copy(bed), copy.deepcopy(bed), pickle.loads(pickle.dumps(bed))):
        with pytest.raises(NotInitializedError):
            again.book("ann")


# ---- the user's own hooks ----------------------------------------------------------------------------------


class WithState(Bed):
    """Leaves out what cannot travel, and makes it anew."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.file = io.BytesIO()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.file = io.BytesIO()


class WithOnlyItsOwn(Bed):
    """Names what travels; the lock is not among it."""

    def __getstate__(self) -> int:
        return self.size

    def __setstate__(self, state: int) -> None:
        self.size = state


class LockedSetState(Bed):
    """Takes its lock while it is loaded."""

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size}

    @Lockable.locked
    def __setstate__(self, state: dict[str, Any]) -> None:
        assert holder(self) is not None
        vars(self).update(state)


class WithArguments(Bed):
    """What it is made of goes to __new__."""

    def __new__(cls, size: int) -> "WithArguments":  # noqa: PYI034
        made = super().__new__(cls)
        made.size = size
        return made

    def __getnewargs__(self) -> tuple[int]:
        return (self.size,)


class WithKeywords(Bed):
    def __new__(cls, *, size: int) -> "WithKeywords":  # noqa: PYI034
        return super().__new__(cls)

    def __init__(self, *, size: int) -> None:
        super().__init__(size)

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"size": self.size}


class WithReduce(Bed):
    """Is made anew by a call, and so gets a lock first that is not its own."""

    def __reduce__(self) -> Any:
        return WithReduce, (self.size,)


class WithReduceState(Bed):
    def __reduce__(self) -> Any:
        return WithReduceState, (), {"size": self.size}


class WithReduceEx(Bed):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol)


class Single(Bed):
    """Pickles as a name of its module."""

    def __reduce__(self) -> str:
        return "SINGLE"


SINGLE = Single(3)

HOOKED: dict[str, Callable[[], Bed]] = {
    "__getstate__ and __setstate__": lambda: WithState(3),
    "a state without the lock": lambda: WithOnlyItsOwn(3),
    "a locked __setstate__": lambda: LockedSetState(3),
    "__getnewargs__": lambda: WithArguments(3),
    "__getnewargs_ex__": lambda: WithKeywords(size=3),
    "__reduce__": lambda: WithReduce(3),
    "__reduce__ with state": lambda: WithReduceState(3),
    "__reduce_ex__": lambda: WithReduceEx(3),
}


@pytest.mark.parametrize("make", HOOKED.values(), ids=HOOKED)
@by_every_pickler
def test_an_object_with_hooks_of_its_own_keeps_its_lock(
    make: Callable[[], Bed], dumps: Callable[[object], bytes]
) -> None:
    bed = make()
    loaded = pickle.loads(dumps(bed))
    assert type(loaded) is type(bed) and loaded.__lock__ is bed.__lock__
    assert loaded.book("ann") == "ann 3 True"


@pytest.mark.parametrize("make", HOOKED.values(), ids=HOOKED)
def test_an_object_with_hooks_of_its_own_is_copied_with_its_lock(make: Callable[[], Bed]) -> None:
    bed = make()
    copied, deep = copy.copy(bed), copy.deepcopy(bed)
    assert copied.__lock__ is bed.__lock__ is not deep.__lock__
    assert copied.book("ann") == deep.book("ann") == "ann 3 True"


def test_what_pickles_as_a_name_is_itself() -> None:
    assert pickle.loads(pickle.dumps(SINGLE)) is SINGLE is copy.copy(SINGLE)


def test_copyreg_and_dispatch_tables_are_asked_as_ever() -> None:
    class Pickler(pickle.Pickler):
        def reducer_override(self, obj: object) -> Any:
            return (int, (7,)) if isinstance(obj, Bed) else NotImplemented

    file = io.BytesIO()
    Pickler(file).dump(Bed())
    assert pickle.loads(file.getvalue()) == 7


# ---- loading never raises ----------------------------------------------------------------------------------

MAKE = "import coheld, pickle; print(pickle.dumps(coheld.Lockable({})).hex())"


def pickled_elsewhere(arguments: str = "") -> bytes:
    """A lock whose process has ended."""
    return bytes.fromhex(procs.run(MAKE.format(arguments)))


def only(directory: Path, pattern: str) -> Path:
    (found,) = directory.glob(pattern)
    return found


def remove_directory(directory: Path) -> None:
    shutil.rmtree(directory)


def make_it_a_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("not a directory")


def zero(directory: Path) -> None:
    only(directory, "name-*").write_bytes(b"\0" * 4096)


def cut(directory: Path) -> None:
    with only(directory, "name-*").open("r+b") as file:
        file.truncate(100)


def empty(directory: Path) -> None:
    only(directory, "name-*").write_bytes(b"")


def garble(directory: Path) -> None:
    with only(directory, "name-*").open("r+b") as file:
        file.seek(1024)
        file.write(b"\xff" * 1024)


def open_to_all(directory: Path) -> None:
    only(directory, "name-*").chmod(0o666)


def link_elsewhere(directory: Path) -> None:
    file = only(directory, "name-*")
    file.symlink_to(file.rename(directory / "elsewhere"))


def a_directory_instead(directory: Path) -> None:
    file = only(directory, "name-*")
    file.unlink()
    file.mkdir()


RUINS: dict[str, tuple[str, Callable[[Path], object], tuple[type[Exception], ...]]] = {
    "an arena that is gone": ("", lambda _: None, (BackendError,)),
    "an arena whose directory is gone": ("", remove_directory, (BackendError,)),
    "a directory that became a file": ("lock_name='it'", make_it_a_file, (CoheldError, OSError)),
    "a named lock of zeros": ("lock_name='it'", zero, (IncompatibleError,)),
    "a named lock cut off": ("lock_name='it'", cut, (IncompatibleError,)),
    "an empty named lock": ("lock_name='it'", empty, (IncompatibleError,)),
    "a named lock with a damaged cell": ("lock_name='it'", garble, (IncompatibleError,)),
    "a named lock that all may write": ("lock_name='it'", open_to_all, (InsecureError,)),
    "a named lock that is a link": ("lock_name='it'", link_elsewhere, (InsecureError,)),
    "a named lock that is a directory": ("lock_name='it'", a_directory_instead, (InsecureError,)),
}


@pytest.fixture
def place(coheld_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that a test may ruin."""
    directory = coheld_dir / "ruined"
    monkeypatch.setenv("COHELD_DIR", str(directory))
    return directory


@pytest.mark.parametrize(("arguments", "ruin", "errors"), RUINS.values(), ids=RUINS)
def test_what_cannot_be_reached_raises_at_the_first_call_not_when_loaded(
    place: Path, arguments: str, ruin: Callable[[Path], object], errors: tuple[type[Exception], ...]
) -> None:
    pickled = pickled_elsewhere(arguments)
    ruin(place)
    loaded: Lockable = pickle.loads(pickled)
    for _ in range(2):
        with pytest.raises(errors):
            loaded.acquire(timeout=0)
        with pytest.raises(errors):
            holder(loaded)
    assert "Mutex" in repr(loaded.__lock__)
    assert pickle.loads(pickle.dumps(loaded)).__lock__ is loaded.__lock__


def test_a_named_lock_that_was_removed_is_made_again(coheld_dir: Path) -> None:
    pickled = pickled_elsewhere("lock_name='it'")
    only(coheld_dir, "name-*").unlink()
    loaded: Lockable = pickle.loads(pickled)
    with loaded:
        assert not is_free(Lockable(lock_name="it"))


def acquire_it(lock: Lockable) -> bool:
    return lock.acquire(timeout=0)


@pytest.fixture
def tidy_pools() -> Iterator[None]:
    """A Pool is a cycle; its semaphores must go before their tracker does, at the end of the test."""
    yield
    gc.collect()


@pytest.mark.usefixtures("tidy_pools")
@pytest.mark.parametrize("method", procs.METHODS)
def test_a_pool_does_not_hang_on_what_is_gone(method: str) -> None:
    gone: Lockable = pickle.loads(pickled_elsewhere())
    with multiprocessing.get_context(method).Pool(2) as pool:
        with pytest.raises(BackendError, match="gone"):
            pool.map_async(acquire_it, [Lockable(), gone, Lockable()]).get(delays.LONG)
        assert pool.map_async(abs, [-1]).get(delays.LONG) == [1]
        pool.close()
        pool.join()


def make_one(size: int) -> Bed:
    return Bed(size)


@pytest.mark.usefixtures("tidy_pools")
@pytest.mark.parametrize("method", procs.METHODS)
def test_what_a_pool_returns_can_be_locked(method: str) -> None:
    with multiprocessing.get_context(method).Pool(2) as pool:
        beds = pool.map_async(make_one, [1, 2, 3]).get(delays.LONG)
        assert [bed.book("ann") for bed in beds] == ["ann 1 True", "ann 2 True", "ann 3 True"]
        pool.close()
        pool.join()
    with beds[0]:
        assert is_free(beds[1]) and not is_free(beds[0])


# ---- classes of __main__, by value -------------------------------------------------------------------------

PROGRAM = '''
import {tool} as tool, sys
from coheld import Lockable

class Bed(Lockable):
    def __init__(self, size):
        super().__init__()
        self.size = size

    @Lockable.locked
    def measure(self, unit="m"):
        """Measure it."""
        from coheld import holder  # dill takes no globals along, unless told to recurse
        return f"{{self.size}} {{unit}} {{holder(self).method}}"

    @Lockable.locked
    def twice(self):
        return self.measure() + "; " + self.measure("ft")

    @Lockable.locked(timeout=0)
    def hurry(self):
        return self.measure("km")

    measure.note = "a note"

class Bunk(Bed):
    @Lockable.locked
    def twice(self):
        return "bunk: " + super().twice()

def inner():
    class Cot(Bunk):
        @Lockable.locked
        def rock(self):
            return __class__.__name__
    return Cot
'''

DUMP = """
bed = {make}
print(tool.dumps({what}{options}).hex())
for line in sys.stdin:
    print(bed.acquire(blocking=False) and not bed.release())
"""

LOAD = """
import {tool} as tool, sys
what = tool.loads(bytes.fromhex(sys.argv[1]))
bed = getattr(what, "__self__", what)
assert type(bed).__qualname__ not in vars(sys.modules["__main__"])
print(bed.twice(), bed.hurry(), bed.measure.note, bed.measure.__doc__, type(bed).measure.__wrapped__.__name__)
with bed:
    print("holding")
    input()
print("free")
input()
"""

TOOLS = {
    "cloudpickle": ("cloudpickle", ""),
    "dill": ("dill", ""),
    "dill, recurse": ("dill", ", recurse=True"),
}
THINGS = {
    "an object": ("Bed(2)", "bed", ""),
    "an object with super() in its methods": ("Bunk(2)", "bed", "bunk: "),
    "a bound method": ("Bed(2)", "bed.measure", ""),
    "an object of a class in a function": ("inner()(2)", "bed", "bunk: "),
}


@pytest.mark.parametrize(("tool", "options"), TOOLS.values(), ids=TOOLS)
@pytest.mark.parametrize(("make", "what", "prefix"), THINGS.values(), ids=THINGS)
def test_what_is_of_main_travels_by_value(tool: str, options: str, make: str, what: str, prefix: str) -> None:
    source = PROGRAM.format(tool=tool) + DUMP.format(make=make, what=what, options=options)
    with procs.program(source) as sender, procs.program(LOAD.format(tool=tool), sender.hear()) as receiver:
        measured = "2 m Bunk.twice; 2 ft Bunk.twice" if prefix else "2 m Bed.twice; 2 ft Bed.twice"
        receiver.expect(f"{prefix}{measured} 2 km Bed.hurry a note Measure it. measure")
        receiver.expect("holding")
        sender.tell("try")
        sender.expect("False")
        receiver.tell("go on")
        receiver.expect("free")
        sender.tell("try")
        sender.expect("True")
        receiver.tell("end")
        sender.process.stdin.close()  # type: ignore[union-attr]


METHOD = """
import {tool} as tool, sys
method = tool.loads(bytes.fromhex(sys.argv[1]))
class Stranger: pass
try:
    method(Stranger())
except RuntimeError as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("tool", ["cloudpickle", "dill"])
def test_a_method_of_main_travels_by_value_and_locked(tool: str) -> None:
    source = PROGRAM.format(tool=tool) + "print(tool.dumps(Bed.measure).hex())"
    assert procs.run(METHOD.format(tool=tool), procs.run(source).strip()) == "NotInitializedError\n"


def test_plain_pickle_sends_a_method_of_main_by_name() -> None:
    source = PROGRAM.format(tool="pickle") + "print(pickle_of := tool.dumps(Bed.measure), len(pickle_of))"
    assert "__main__" in procs.run(source) and "Bed.measure" in procs.run(source)


FORKED = """
with tool.get_context("fork").Pool(1) as pool:
    print(pool.apply(Bed(2).measure), pool.apply(Bed.measure, (Bed(3),)))
"""


def test_multiprocessing_sends_what_is_of_main_by_name() -> None:
    source = PROGRAM.format(tool="multiprocessing") + FORKED
    assert procs.run(source) == "2 m Bed.measure 3 m Bed.measure\n"


def test_cloudpickle_can_be_told_to_send_a_module_by_value(tmp_path: Path) -> None:
    (tmp_path / "beds.py").write_text(PROGRAM.format(tool="cloudpickle"))
    send = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import beds, cloudpickle\n"
        "cloudpickle.register_pickle_by_value(beds)\nprint(cloudpickle.dumps(beds.Bunk).hex())"
    )
    load = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1]))(2).twice(), 'beds' in sys.modules)"
    assert procs.run(load, procs.run(send).strip()) == "bunk: 2 m Bunk.twice; 2 ft Bunk.twice False\n"
