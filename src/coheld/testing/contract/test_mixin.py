"""Lockable beside every kind of base class: the object keeps what it is, and has a lock that travels with it."""

import collections
import copy
import ctypes
import dataclasses
import enum
import pickle
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import attrs
import pytest

from coheld import Lockable, NotInitializedError, NotOwnerError, holder, statistics
from coheld.testing.contract.observe import URL, held_elsewhere, is_free
from coheld.testing.support import delays, procs

T = TypeVar("T")


def report(self: Any) -> bool:
    """Is it locked now?"""
    return holder(self) is not None


# ---- one class of every kind -------------------------------------------------------------------------------


class Plain(Lockable):
    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.size = size

    report = Lockable.locked(report)


class Slotted(Lockable):
    __slots__ = ("size",)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    report = Lockable.locked(report)


class Dict(Lockable, dict[str, int]):
    report = Lockable.locked(report)

    @Lockable.locked
    def __setitem__(self, key: str, value: int) -> None:
        super().__setitem__(key, value)


class Ordered(Lockable, collections.OrderedDict[str, int]):
    report = Lockable.locked(report)

    @Lockable.locked
    def __setitem__(self, key: str, value: int) -> None:
        super().__setitem__(key, value)


class Default(Lockable, collections.defaultdict[str, int]):
    report = Lockable.locked(report)


class Count(Lockable, collections.Counter[str]):
    report = Lockable.locked(report)


class List(Lockable, list[int]):
    report = Lockable.locked(report)

    @Lockable.locked
    def append(self, item: int) -> None:
        super().append(item)

    @Lockable.locked
    def extend(self, items: Any) -> None:
        super().extend(items)


class Deque(Lockable, collections.deque[int]):
    report = Lockable.locked(report)


class Set(Lockable, set[int]):
    report = Lockable.locked(report)


class Int(Lockable, int):
    report = Lockable.locked(report)


class Float(Lockable, float):
    report = Lockable.locked(report)


class Str(Lockable, str):
    report = Lockable.locked(report)


class Bytes(Lockable, bytes):
    report = Lockable.locked(report)


class Bytearray(Lockable, bytearray):
    report = Lockable.locked(report)


class Tuple(Lockable, tuple[int, ...]):
    report = Lockable.locked(report)


class Frozenset(Lockable, frozenset[int]):
    report = Lockable.locked(report)


class PointTuple(NamedTuple):
    x: int
    y: int = 2


class Point(Lockable, PointTuple):
    report = Lockable.locked(report)


OldPoint = collections.namedtuple("OldPoint", "x y")  # noqa: PYI024  # both kinds


class OtherPoint(Lockable, OldPoint):
    report = Lockable.locked(report)


class Error(Lockable, Exception):
    report = Lockable.locked(report)


class NotFound(Lockable, FileNotFoundError):
    report = Lockable.locked(report)


class Structure(Lockable, ctypes.Structure):
    _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_double))
    report = Lockable.locked(report)


class Thread(Lockable, threading.Thread):
    report = Lockable.locked(report)

    @Lockable.locked
    def run(self) -> None:
        self.seen = holder(self)


class Shape(ABC):
    def __init__(self, size: int) -> None:
        self.size = size

    @abstractmethod
    def area(self) -> int: ...


class Square(Lockable, Shape):
    report = Lockable.locked(report)

    @Lockable.locked
    def area(self) -> int:
        return self.size**2


class Box(Lockable, Generic[T]):
    def __init__(self, content: T) -> None:
        super().__init__()
        self.content = content

    report = Lockable.locked(report)


class LateBox(Generic[T], Lockable):  # noqa: PYI059  # both orders
    def __init__(self, content: T) -> None:
        super().__init__()
        self.content = content

    report = Lockable.locked(report)


class Sized(Protocol):
    size: int

    def area(self) -> int: ...


class Tile(Lockable, Sized):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def area(self) -> int:
        return self.size

    report = Lockable.locked(report)


class LateTile(Sized, Lockable):
    size = 1

    def area(self) -> int:
        return self.size

    report = Lockable.locked(report)


@dataclass
class Data(Lockable):
    x: int
    tags: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    report = Lockable.locked(report)


@dataclass(frozen=True)
class FrozenData(Lockable):
    x: int

    def __post_init__(self) -> None:
        super().__init__()

    report = Lockable.locked(report)


@dataclass(slots=True)
class SlottedData(Lockable):
    x: int

    def __post_init__(self) -> None:
        Lockable.__init__(self)  # super() does not work in a dataclass with slots

    report = Lockable.locked(report)


@dataclass(frozen=True, slots=True)
class FrozenSlottedData(Lockable):
    x: int

    def __post_init__(self) -> None:
        Lockable.__init__(self)

    report = Lockable.locked(report)


@dataclass(order=True, unsafe_hash=True, kw_only=True)
class KeywordData(Lockable):
    x: int
    lock_name: dataclasses.InitVar[str | None] = None

    def __post_init__(self, lock_name: str | None) -> None:
        super().__init__(lock_name=lock_name)

    report = Lockable.locked(report)


@attrs.define(slots=False)
class Attrs(Lockable):
    x: int

    def __attrs_post_init__(self) -> None:
        super().__init__()

    report = Lockable.locked(report)


@attrs.define
class SlottedAttrs(Lockable):
    x: int

    def __attrs_post_init__(self) -> None:
        super().__init__()

    report = Lockable.locked(report)


@attrs.frozen
class FrozenAttrs(Lockable):
    x: int

    def __attrs_post_init__(self) -> None:
        super().__init__()

    report = Lockable.locked(report)


@attrs.frozen(slots=False)
class FrozenDictAttrs(Lockable):
    x: int

    def __attrs_pre_init__(self) -> None:
        super().__init__()

    report = Lockable.locked(report)


class Colour(Lockable, enum.Enum):
    RED = 1
    GREEN = 2

    report = Lockable.locked(report)


class Level(Lockable, enum.IntEnum):
    LOW = 1
    HIGH = 2

    report = Lockable.locked(report)


@dataclass(frozen=True)
class Kind:
    """A kind of object: how to make one, and what shows that it is still what its base made it."""

    make: Callable[[], Any]
    value: Callable[[Any], object]
    expected: object


KINDS = {
    "plain": Kind(lambda: Plain(3), lambda obj: obj.size, 3),
    "slots": Kind(lambda: Slotted(3), lambda obj: obj.size, 3),
    "dict": Kind(lambda: Dict({"a": 1}, b=2), lambda obj: {**obj}, {"a": 1, "b": 2}),
    "OrderedDict": Kind(lambda: Ordered([("a", 1), ("b", 2)]), lambda obj: [*obj.items()], [("a", 1), ("b", 2)]),
    "defaultdict": Kind(lambda: Default(int, a=1), lambda obj: (obj["a"], obj["z"]), (1, 0)),
    "Counter": Kind(lambda: Count("aab"), lambda obj: obj.most_common(1), [("a", 2)]),
    "list": Kind(lambda: List([1, 2]), lambda obj: [*obj], [1, 2]),
    "deque": Kind(lambda: Deque([1, 2, 3], 2), lambda obj: ([*obj], obj.maxlen), ([2, 3], 2)),
    "set": Kind(lambda: Set([1, 2]), lambda obj: {*obj}, {1, 2}),
    "int": Kind(lambda: Int("7"), lambda obj: obj + 1, 8),
    "float": Kind(lambda: Float(0.5), lambda obj: obj * 2, 1.0),
    "str": Kind(lambda: Str(b"abc", "ascii"), lambda obj: obj.upper(), "ABC"),
    "bytes": Kind(lambda: Bytes(b"abc"), lambda obj: obj[1:], b"bc"),
    "bytearray": Kind(lambda: Bytearray(b"abc"), bytes, b"abc"),
    "tuple": Kind(lambda: Tuple([1, 2]), lambda obj: (*obj,), (1, 2)),
    "frozenset": Kind(lambda: Frozenset([1, 2]), lambda obj: obj | {3}, {1, 2, 3}),
    "NamedTuple": Kind(lambda: Point(1), lambda obj: (obj.x, obj.y), (1, 2)),
    "namedtuple": Kind(lambda: OtherPoint(1, y=5), lambda obj: (obj.x, obj.y), (1, 5)),
    "Exception": Kind(lambda: Error("no", 3), lambda obj: obj.args, ("no", 3)),
    "OSError": Kind(lambda: NotFound(2, "gone", "file"), lambda obj: (obj.errno, obj.filename), (2, "file")),
    "ctypes.Structure": Kind(lambda: Structure(1, y=0.5), lambda obj: (obj.x, obj.y), (1, 0.5)),
    "ABC": Kind(lambda: Square(3), lambda obj: obj.area(), 9),
    "Generic": Kind(lambda: Box[str]("it"), lambda obj: obj.content, "it"),
    "Generic first": Kind(lambda: LateBox[str]("it"), lambda obj: obj.content, "it"),
    "Protocol": Kind(lambda: Tile(3), lambda obj: obj.area(), 3),
    "Protocol first": Kind(LateTile, lambda obj: obj.area(), 1),
    "dataclass": Kind(lambda: Data(1, tags=["a"]), dataclasses.asdict, {"x": 1, "tags": ["a"]}),
    "dataclass, frozen": Kind(lambda: FrozenData(1), dataclasses.astuple, (1,)),
    "dataclass, slots": Kind(lambda: SlottedData(1), dataclasses.astuple, (1,)),
    "dataclass, frozen, slots": Kind(lambda: FrozenSlottedData(1), dataclasses.astuple, (1,)),
    "dataclass, keywords": Kind(lambda: KeywordData(x=1), dataclasses.astuple, (1,)),
    "dataclass, named": Kind(lambda: KeywordData(x=1, lock_name="data"), dataclasses.astuple, (1,)),
    "attrs": Kind(lambda: Attrs(1), attrs.asdict, {"x": 1}),
    "attrs, slots": Kind(lambda: SlottedAttrs(1), attrs.asdict, {"x": 1}),
    "attrs, frozen, slots": Kind(lambda: FrozenAttrs(1), attrs.asdict, {"x": 1}),
    "attrs, frozen": Kind(lambda: FrozenDictAttrs(1), attrs.asdict, {"x": 1}),
    "Enum": Kind(lambda: Colour.RED, lambda obj: (obj.name, obj.value), ("RED", 1)),
    "IntEnum": Kind(lambda: Level.LOW, lambda obj: obj + 1, 2),
}

THREAD = Kind(lambda: Thread(name="it", daemon=True), lambda obj: (obj.name, obj.daemon), ("it", True))
ALL = KINDS | {"Thread": THREAD}  # a thread can be neither pickled nor copied

every_kind = pytest.mark.parametrize("kind", ALL.values(), ids=ALL)
every_kind_that_travels = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@every_kind
def test_it_locks(kind: Kind) -> None:
    obj = kind.make()
    assert obj.report() is True
    assert is_free(obj)
    with obj as same:
        assert same is obj and not is_free(obj)
    assert obj.acquire() and obj.acquire(timeout=0)
    obj.release()
    obj.release()
    assert is_free(obj)
    with held_elsewhere(obj), pytest.raises(NotOwnerError):
        obj.release()


@every_kind
def test_it_stays_what_its_base_made_it(kind: Kind) -> None:
    obj = kind.make()
    assert kind.value(obj) == kind.expected
    with obj:
        assert kind.value(obj) == kind.expected


@every_kind
def test_two_of_them_have_two_locks(kind: Kind) -> None:
    one, other = kind.make(), kind.make()
    one_resource = one is other or kind is KINDS["dataclass, named"]
    with one:
        assert is_free(other) is not one_resource


@every_kind_that_travels
def test_it_pickles_with_its_lock(kind: Kind) -> None:
    obj = kind.make()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(obj, protocol))
        assert type(loaded) is type(obj) and kind.value(loaded) == kind.expected
        assert loaded.__lock__ is obj.__lock__
        assert loaded.report()
    with held_elsewhere(obj):
        assert not loaded.acquire(blocking=False)
    assert is_free(obj)


COPIES_ITSELF = ("defaultdict", "deque")  # these bases have a __copy__ of their own, which makes a new object


@pytest.mark.parametrize("name", [name for name in KINDS if name not in COPIES_ITSELF])
def test_a_copy_shares_the_lock(name: str) -> None:
    kind = KINDS[name]
    obj = kind.make()
    copied = copy.copy(obj)
    assert type(copied) is type(obj) and kind.value(copied) == kind.expected
    with copied:
        assert not is_free(obj)
    assert is_free(obj)


@pytest.mark.parametrize("name", COPIES_ITSELF)
def test_a_base_that_copies_itself_decides(name: str) -> None:
    kind = KINDS[name]
    copied = copy.copy(kind.make())
    assert kind.value(copied) == kind.expected
    assert copied.report() and is_free(copied)


@every_kind_that_travels
def test_a_deep_copy_has_a_lock_of_its_own(kind: Kind) -> None:
    obj = kind.make()
    with obj:
        copied = copy.deepcopy(obj)
        assert type(copied) is type(obj) and kind.value(copied) == kind.expected
        assert is_free(copied) is (copied is not obj)  # an Enum member is the only one of its kind
    assert copied.report() and is_free(copied)


@pytest.mark.hang_limit(4 * delays.HANG)
def test_another_process_that_was_spawned_shares_the_lock() -> None:
    objects = {name: kind.make() for name, kind in KINDS.items()}
    with procs.start(hold_each, objects, method="spawn") as worker:
        for name, obj in objects.items():
            worker.expect(name)
            assert not obj.acquire(blocking=False), name
            worker.tell("next")
            worker.expect(f"{name} is free")
            assert obj.report(), name
            assert is_free(obj), name


def hold_each(link: procs.Link, objects: dict[str, Any]) -> None:
    for name, obj in objects.items():
        assert KINDS[name].value(obj) == KINDS[name].expected
        with obj:
            link.say(name)
            link.wait_for("next")
        link.say(f"{name} is free")


def test_a_lockable_thread_runs_its_locked_run() -> None:
    thread = Thread()
    with thread:
        thread.start()
        assert thread.is_alive() and "seen" not in vars(thread)
    thread.join(delays.LONG)
    assert thread.seen is not None and thread.seen.tid == thread.native_id
    assert is_free(thread)


def test_generic_and_annotations_are_kept() -> None:
    assert Box[int].__args__ == (int,)  # type: ignore[attr-defined]
    assert [field.name for field in dataclasses.fields(Data)] == ["x", "tags"]
    assert [field.name for field in attrs.fields(SlottedAttrs)] == ["x"]


def test_equality_hash_and_repr_are_the_classes_own() -> None:
    assert Data(1) == Data(1) and repr(Data(1)) == "Data(x=1, tags=[])"
    assert FrozenData(1) == FrozenData(1) and hash(FrozenData(1)) == hash(FrozenData(1))
    assert KeywordData(x=1) < KeywordData(x=2) and Int(7) == 7 and hash(Int(7)) == 7
    assert SlottedAttrs(1) == SlottedAttrs(1) and repr(SlottedAttrs(1)) == "SlottedAttrs(x=1)"
    assert Plain() != Plain() and Str("a") == "a"


# ---- a well-behaved mixin ----------------------------------------------------------------------------------


class Base:
    def __init__(self, *args: object, **kwargs: object) -> None:
        self.got = (args, kwargs)
        super().__init__()


class First(Lockable, Base):
    pass


class Last(Base, Lockable):
    pass


def test_it_takes_its_own_arguments_and_passes_on_the_rest() -> None:
    obj = First(1, "two", three=3, lock_name="it", lock_backend=URL)
    assert obj.got == ((1, "two"), {"three": 3})
    with obj:
        assert not is_free(Lockable(lock_name="it"))


def test_it_may_come_last() -> None:
    obj = Last(1, two=2)
    assert obj.got == ((1,), {"two": 2})
    with obj:
        assert not is_free(obj)


def test_the_next_class_finds_the_lock_in_place() -> None:
    class Eager:
        def __init__(self) -> None:
            with self:  # type: ignore[attr-defined]
                self.locked_in_init = not is_free(self)  # type: ignore[arg-type]

    class Both(Lockable, Eager):
        pass

    assert Both().locked_in_init


def test_a_diamond_is_initialised_once_for_each_class() -> None:
    calls = []

    class Top(Lockable):
        def __init__(self, **kwargs: Any) -> None:
            calls.append("Top")
            super().__init__(**kwargs)

    class Left(Top):
        def __init__(self, left: int, **kwargs: Any) -> None:
            calls.append("Left")
            super().__init__(**kwargs)

    class Right(Top):
        def __init__(self, right: int, **kwargs: Any) -> None:
            calls.append("Right")
            super().__init__(**kwargs)

    class Bottom(Left, Right):
        pass

    with Bottom(left=1, right=2, lock_name="it"):
        assert calls == ["Left", "Right", "Top"]
        assert not is_free(Lockable(lock_name="it"))


class Consuming(Lockable):
    """A class whose __new__ takes the arguments."""

    size: int

    def __new__(cls, size: int, *, unit: str = "m") -> Self:
        made = super().__new__(cls)
        made.size = size
        return made


def test_arguments_that_new_has_consumed_are_dropped() -> None:
    obj: Any = Consuming(3, unit="cm")
    assert obj.size == 3
    with obj:
        assert not is_free(obj)


class Bystander:
    """A base with neither __new__ nor __init__."""


def test_arguments_that_nobody_takes_are_a_type_error() -> None:
    class Bare(Lockable):
        pass

    class Beside(Lockable, Bystander):
        pass

    for cls in (Lockable, Bare, Beside):
        make: Any = cls
        with pytest.raises(TypeError):
            make(1)
        with pytest.raises(TypeError):
            make(size=1)
        with pytest.raises(TypeError):
            make(1, 2, lock_name="it")


def test_arguments_are_checked_by_the_class_that_takes_them() -> None:
    wrong: Any = Int
    with pytest.raises(TypeError):
        wrong([])
    with pytest.raises(TypeError):
        wrong(1, 2, 3)
    with pytest.raises(TypeError):
        Error(keyword=1)


def test_a_second_init_keeps_the_lock_also_while_it_is_held() -> None:
    obj = Plain()
    lock = obj.__lock__
    with obj:
        obj.__init__(2)  # type: ignore[misc]
        assert obj.__lock__ is lock and not is_free(obj)
    assert is_free(obj) and obj.size == 2


def test_a_second_init_keeps_a_named_lock() -> None:
    obj = Lockable(lock_name="it")
    with obj:
        obj.__init__(lock_name="it")  # type: ignore[misc]
        assert not is_free(Lockable(lock_name="it"))
    assert is_free(obj)


def test_both_bases_of_a_diamond_may_call_it_by_name() -> None:
    class Left(Lockable):
        def __init__(self) -> None:
            Lockable.__init__(self)
            self.left = self.__lock__

    class Right(Lockable):
        def __init__(self) -> None:
            Lockable.__init__(self)
            self.right = self.__lock__

    class Both(Left, Right):
        def __init__(self) -> None:
            Left.__init__(self)
            Right.__init__(self)

    both = Both()
    assert both.left == both.right == both.__lock__


# ---- the user's namespace ----------------------------------------------------------------------------------


def test_nothing_else_is_put_into_the_users_namespace() -> None:
    class Ours(Lockable):
        pass

    class Theirs:
        pass

    added = set(dir(Ours())) - set(dir(Theirs()))
    assert {name for name in added if not name.startswith("__")} == {"acquire", "release", "locked"}
    dunders = {"__enter__", "__exit__", "__aenter__", "__aexit__", "__lock__", "__annotations__"}
    dunders.add("__slotnames__")  # copyreg's cache, in every class of which an object was pickled
    assert added - {"acquire", "release", "locked"} <= dunders | {"__slots__"}  # of a base that is not C


def test_a_subclass_is_as_it_was_written() -> None:
    class Ours(Lockable):
        size = 1

    class Theirs:
        size = 1

    assert set(vars(Ours)) <= set(vars(Theirs))
    assert type(Ours) is type


def test_an_object_has_the_lock_and_nothing_else() -> None:
    assert set(vars(Lockable())) == {"__lock__"}
    assert set(vars(Plain(1))) == {"__lock__", "size"}


def test_only_the_lock_is_seen_from_slots() -> None:
    obj = Slotted(1)
    assert set(vars(obj)) == {"__lock__"} and obj.size == 1


# ---- not initialised ---------------------------------------------------------------------------------------


class Forgetful(Lockable):
    def __init__(self) -> None:
        pass

    report = Lockable.locked(report)


@dataclass
class ForgetfulData(Lockable):
    x: int = 1

    report = Lockable.locked(report)


@dataclass(slots=True)
class ForgetfulSlots(Lockable):
    """Its __post_init__ cannot use super(): the class is made anew, which Python before 3.14 does not tell super()."""

    x: int = 1

    report = Lockable.locked(report)


@attrs.define
class ForgetfulAttrs(Lockable):
    x: int = 1

    report = Lockable.locked(report)


class ForgetfulTile(Sized, Lockable):
    """Its super().__init__() ends at the Protocol, which calls nobody further."""

    def __init__(self) -> None:
        super().__init__()

    def area(self) -> int:
        return 1

    report = Lockable.locked(report)


class Shadowed(Lockable):
    """Somebody else's lock under the same name."""

    def __init__(self) -> None:
        self.__lock__ = threading.RLock()  # type: ignore[assignment]

    report = Lockable.locked(report)


FORGETFUL = {
    "a class": (Forgetful, ["Forgetful", "super().__init__()"]),
    "a dataclass": (ForgetfulData, ["ForgetfulData", "__post_init__", "super().__init__()"]),
    "an attrs class": (ForgetfulAttrs, ["ForgetfulAttrs", "__attrs_post_init__", "super().__init__()"]),
    "a dataclass with slots": (ForgetfulSlots, ["ForgetfulSlots", "__post_init__", "Lockable.__init__(self)"]),
    "a Protocol in front": (ForgetfulTile, ["ForgetfulTile", "Sized", "Lockable.__init__(self)"]),
    "another lock": (Shadowed, ["Shadowed", "RLock"]),
}

USES: dict[str, Callable[[Any], object]] = {
    "acquire": lambda obj: obj.acquire(),
    "acquire(False)": lambda obj: obj.acquire(False),
    "release": lambda obj: obj.release(),
    "with": lambda obj: obj.__enter__(),
    "a locked call": lambda obj: obj.report(),
    "holder": holder,
    "statistics": statistics,
}


@pytest.mark.parametrize(("cls", "words"), FORGETFUL.values(), ids=FORGETFUL)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_was_not_initialised_says_so(cls: type[Any], words: list[str], use: Callable[[Any], object]) -> None:
    obj = cls()
    with pytest.raises(NotInitializedError) as caught:
        use(obj)
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, RuntimeError) and not isinstance(caught.value, AttributeError)


def test_hasattr_does_not_swallow_the_error() -> None:
    class Lazy(Forgetful):
        @property
        @Lockable.locked
        def size(self) -> int:
            return 1

    with pytest.raises(NotInitializedError):
        hasattr(Lazy(), "size")
    assert not hasattr(Lazy(), "__lock__")


def test_an_init_that_failed_leaves_an_object_that_works_after_another() -> None:
    class Late(Lockable):
        def __init__(self, ready: bool) -> None:
            if not ready:
                raise ValueError("not yet")
            super().__init__()

        report = Lockable.locked(report)

    late = Late.__new__(Late)
    with pytest.raises(ValueError, match="not yet"):
        late.__init__(False)  # type: ignore[misc]
    with pytest.raises(NotInitializedError):
        late.report()
    late.__init__(True)  # type: ignore[misc]
    assert late.report()


# ---- proxies -----------------------------------------------------------------------------------------------


class Proxy(Lockable):
    """Hands on whatever it does not have itself."""

    def __init__(self, target: object, *, initialise: bool) -> None:
        object.__setattr__(self, "target", target)
        if initialise:
            super().__init__()

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "target"), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.target, name, value)

    report = Lockable.locked(report)


class StrictProxy(Proxy):
    """Hands on everything."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("target", "__class__"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "target"), name)


@pytest.mark.parametrize("cls", [Proxy, StrictProxy])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_proxy_without_a_lock_never_locks_its_target(cls: type[Proxy], use: Callable[[Any], object]) -> None:
    target = Plain()
    proxy = cls(target, initialise=False)
    direct: dict[object, Callable[[Any], object]] = {  # past __getattribute__, as `with`, and a call through the class
        USES["acquire"]: Lockable.acquire,
        USES["acquire(False)"]: lambda obj: Lockable.acquire(obj, False),
        USES["release"]: Lockable.release,
        USES["with"]: lambda obj: type(obj).__enter__(obj),
        USES["a locked call"]: lambda obj: type(obj).report(obj),
    }
    with pytest.raises(NotInitializedError, match="Proxy"):
        (direct.get(use) or use)(proxy)
    assert statistics(target).acquisitions == 0 and is_free(target)


def test_a_proxy_has_a_lock_of_its_own() -> None:
    target = Plain()
    lock = target.__lock__
    proxy = Proxy(target, initialise=True)
    assert target.__lock__ is lock is not proxy.__lock__
    with proxy:
        assert is_free(target) and not is_free(proxy)
    with target:
        assert is_free(proxy)


def test_a_proxy_that_is_no_lockable_hands_its_calls_on() -> None:
    class Around:
        def __init__(self, target: Plain) -> None:
            self.target = target

        def __getattr__(self, name: str) -> Any:
            return getattr(self.target, name)

    target = Plain()
    around = Around(target)
    assert around.acquire() and not is_free(target)
    around.release()
    assert around.report() and is_free(target)


def test_path_like_bases_with_their_own_new() -> None:
    path_type: Any = PurePosixPath

    class Path(Lockable, path_type):  # type: ignore[misc]
        report = Lockable.locked(report)

    path: Any = Path("/a")
    assert str(path) == "/a" and path.report()
