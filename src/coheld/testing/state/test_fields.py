"""What a shared field may hold, and how it is declared; the values go to another process and back."""

import dataclasses
import datetime
import decimal
import enum
import sys
import types
import uuid
from typing import Annotated, Any, ClassVar, Final, Generic, NamedTuple, NotRequired, TypedDict, TypeVar

import attrs
import msgspec
import pytest

import coheld
from coheld import Lockable, shared
from coheld.state import schema
from coheld.testing.support import procs


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Box(msgspec.Struct):
    corner: Point
    tags: list[str]


class Pair(NamedTuple):
    left: int
    right: list[int]


T = TypeVar("T")


class Crate(msgspec.Struct, Generic[T]):
    content: T


@dataclasses.dataclass
class Sack(Generic[T]):
    content: T
    inner: "Sack[T] | None" = None


class Label(TypedDict, Generic[T]):
    text: T


class Couple(NamedTuple, Generic[T]):
    one: T
    other: T


VALUES: list[tuple[Any, Any, list[Any]]] = [
    (int, 0, [1, -1, 127, 128, 255, 256, -32, -33, -128, -129, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63), 2**64 - 1]),
    (float, 0.0, [1.5, -0.0, float("inf"), 5e-324, 3]),
    (bool, False, [True, False]),
    (str, "", ["x", "ü", "x" * 19, "x" * 20, "y" * 31, "z" * 32, "€" * 7, "\0"]),
    (bytes, b"", [b"x", b"x" * 18, b"x" * 19, b"x" * 300]),
    (None, None, [None]),
    (int | None, None, [1, None, 2**40]),
    (str | int, 0, ["text", 5]),
    (tuple[int, str], (0, ""), [(1, "a")]),
    (tuple[int, ...], (), [(1, 2, 3)]),
    (frozenset[int], frozenset(), [frozenset({1, 2})]),
    (Color, Color.RED, [Color.BLUE]),
    (datetime.datetime, datetime.datetime(2020, 1, 1), [datetime.datetime(2024, 2, 3, 4, 5, 6, 7, datetime.UTC)]),
    (datetime.date, datetime.date(2020, 1, 1), [datetime.date(2024, 2, 29)]),
    (datetime.timedelta, datetime.timedelta(0), [datetime.timedelta(days=1, microseconds=1)]),
    (decimal.Decimal, decimal.Decimal(0), [decimal.Decimal("1.10")]),
    (uuid.UUID, uuid.UUID(int=0), [uuid.UUID(int=2**127 + 1)]),
    (Annotated[int, msgspec.Meta(ge=0)], 0, [7]),
]
CONTAINERS: list[tuple[Any, Any, list[Any]]] = [
    (list[int], list, [[1], [], list(range(1000))]),
    (dict[str, int], dict, [{"a": 1}, {}]),
    (dict[str, dict[int, list[str]]], dict, [{"a": {1: ["x"]}}]),
    (set[str], set, [{"a", "b"}]),
    (list[int] | None, list, [[1], None]),
    (tuple[list[int], int], lambda: ([], 0), [([1, 2], 3)]),
    (Point, lambda: Point(0), [Point(1, 2)]),
    (Box, lambda: Box(Point(0), []), [Box(Point(1), ["a"])]),
    (list[Point], list, [[Point(1), Point(2)]]),
    (Pair, lambda: Pair(0, []), [Pair(1, [2])]),
    (bytearray, bytearray, [bytearray(b"abc")]),
    (Crate[int], lambda: Crate(0), [Crate(1)]),
    (Crate[list[int]], lambda: Crate([]), [Crate([1])]),
    (Sack[int], lambda: Sack(0), [Sack(1, Sack(2))]),
    (dict[str, Label[int]], dict, [{"a": {"text": 1}}]),
    (Couple[int], lambda: Couple(0, 0), [Couple(1, 2)]),
]


def holder_of(annotation: Any, **how: Any) -> type[Any]:
    body = {"__annotations__": {"it": annotation}, "it": shared(**how) if how else None, "__module__": __name__}
    return type(Lockable)("Holder", (Lockable,), body)


def with_default(annotation: Any, default: Any) -> type[Any]:
    body = {"__annotations__": {"it": annotation}, "it": shared(default), "__module__": __name__}
    return type(Lockable)("Holder", (Lockable,), body)


def tell(link: procs.Link, holder: Any) -> None:
    while (value := link.hear()) != "end":
        assert holder.it == value, (holder.it, value)
        with holder:
            assert holder.it == value
            link.say(holder.it)


def through_another(holder: Any, values: list[Any]) -> None:
    with procs.start(tell, holder) as other:
        for value in values:
            with holder:
                holder.it = value
                assert holder.it == value
            assert holder.it == value
            other.tell(value)
            back = other.hear()
            assert back == value and type(back) is type(holder.it if back is None else back)
        other.tell("end")


class Drawn(Lockable):
    number: uuid.UUID = shared(default_factory=uuid.uuid4)
    numbers: list[uuid.UUID] = shared(default_factory=lambda: [uuid.uuid4()])


def read(_link: procs.Link, drawn: Drawn) -> tuple[uuid.UUID, list[uuid.UUID]]:
    return drawn.number, list(drawn.numbers)


def test_a_default_that_is_drawn_is_that_of_all_once_the_owner_has_read_it() -> None:
    drawn = Drawn()
    with drawn:
        number, numbers = drawn.number, list(drawn.numbers)
    assert (drawn.number, drawn.numbers) == (number, numbers)
    with procs.start(read, drawn) as other:
        assert other.result() == (number, numbers)


def test_a_default_is_of_the_type_that_is_declared() -> None:
    holder = with_default(float, 0)()
    assert type(holder.it) is float
    with holder:
        assert type(holder.it) is float
    with pytest.raises(coheld.StateError, match="it"):
        _ = holder_of(int, default_factory=lambda: "no number")().it


@pytest.mark.parametrize(("annotation", "default", "values"), VALUES, ids=lambda one: str(one)[:30])
def test_values_that_cannot_be_changed(annotation: Any, default: Any, values: list[Any]) -> None:
    holder = with_default(annotation, default)()
    assert holder.it == default
    through_another(holder, values)


@pytest.mark.parametrize(("annotation", "factory", "values"), CONTAINERS, ids=lambda one: str(one)[:30])
def test_values_that_can(annotation: Any, factory: Any, values: list[Any]) -> None:
    holder = holder_of(annotation, default_factory=factory)()
    assert holder.it == factory()
    through_another(holder, values)


EARLY = datetime.datetime(1, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))


@pytest.mark.parametrize(
    ("annotation", "default", "value", "why"),
    [
        (int, 0, 2**64, "64 bits"),
        (int, 0, -(2**63) - 1, "64 bits"),
        (int, 0, "1", "Expected `int`"),
        (int, 0, 1.5, "Expected `int`"),
        (int, 0, True, "Expected `int`"),
        (str, "", 1, "Expected `str`"),
        (str, "", "\ud800", "surrogates"),
        (bool, False, 1, "Expected `bool`"),
        (int | None, None, "x", "Expected `int | null`"),
        (Annotated[int, msgspec.Meta(ge=0)], 0, -1, ">= 0"),
        (tuple[int, ...], (), (1, "x"), "Expected `int`"),
        (int, 0, object(), "object cannot be stored"),
        (datetime.datetime, datetime.datetime(2020, 1, 1), EARLY, "date value out of range, as UTC"),
    ],
)
def test_what_an_assignment_refuses(annotation: Any, default: Any, value: Any, why: str) -> None:
    holder = with_default(annotation, default)()
    with holder, pytest.raises(coheld.StateError, match=r"Holder\.it") as failure:
        holder.it = value
    assert why in str(failure.value)
    assert holder.it == default


@pytest.mark.parametrize(
    ("annotation", "factory", "bad"),
    [(list[int], list, ["x"]), (dict[str, int], dict, {1: 1}), (list[int], list, [2**64]), (set[str], set, [object()])],
)
def test_what_a_release_refuses(annotation: Any, factory: Any, bad: Any) -> None:
    holder = holder_of(annotation, default_factory=factory)()
    holder.acquire()
    holder.it = bad
    with pytest.raises(coheld.StateError, match=r"Holder\.it"):
        holder.release()
    assert coheld.holder(holder) is None  # the lock is free
    assert holder.it == factory()  # the last commit stands
    with holder:
        assert holder.it == factory()


@dataclasses.dataclass
class Solid(Point):
    z: int = 0


class Same(Point):
    """With nothing more."""


@dataclasses.dataclass(frozen=True)
class Spot:
    x: int


@dataclasses.dataclass(frozen=True)
class Stain(Spot):
    color: str


class Large(Box):
    size: int


class Entry(TypedDict):
    n: int
    points: NotRequired[list[Point]]


class Tree(msgspec.Struct):
    n: int
    inner: "list[Tree]" = []


class Oak(Tree):
    age: int = 0


class Leaf(msgspec.Struct, tag="leaf"):
    n: int


class Flower(Leaf, tag="flower"):
    color: str


@attrs.define
class Card:
    n: int


@attrs.define
class Photo(Card):
    size: int


MORE: list[tuple[Any, Any, str]] = [
    (list[Point], [Point(1), Solid(1)], "z of Solid, where Point is meant"),
    (dict[str, Point], {"a": Solid(1)}, "z of Solid"),
    (tuple[int, Point], (1, Solid(1)), "z of Solid"),
    (Point | None, Solid(1), "z of Solid"),
    (Spot, Stain(1, "red"), "color of Stain"),
    (dict[Spot, int], {Stain(1, "red"): 1}, "color of Stain"),
    (frozenset[Spot], frozenset({Stain(1, "red")}), "color of Stain"),
    (Box, Box(Solid(1), []), "z of Solid"),
    (Box, Large(Point(1), [], 5), "size of Large"),
    (Sack[Point], Sack(Point(1), Sack(Solid(1))), "z of Solid"),
    (Tree, Tree(1, [Tree(1), Tree(1, [Oak(1)])]), "age of Oak"),
    (list[Card], [Photo(1, 2)], "size of Photo"),
    (Entry, {"n": 1, "m": 2}, "m, which Entry has not"),
    (list[Entry], [{"n": 1, "points": []}, {"n": 1, "points": [Solid(1)]}], "z of Solid"),
    (list[Entry], [{"n": 1, "points": []}, {"n": 1, "points": [], "m": 1}], "m, which Entry has not"),
    (list[Couple[Point]], [Couple(Point(1), Solid(1))], "z of Solid"),
    (dict[str, list[Point] | int], {"a": 1, "b": [Solid(1)]}, "z of Solid"),
    (Annotated[list[Point], msgspec.Meta(max_length=3)], [Solid(1)], "z of Solid"),
]


@pytest.mark.parametrize(("annotation", "value", "more"), MORE, ids=lambda one: str(one)[:30])
def test_a_value_with_more_than_its_type_is_refused(annotation: Any, value: Any, more: str) -> None:
    holder = holder_of(annotation | None, default_factory=lambda: None)()
    with pytest.raises(coheld.StateError, match=r"Holder\.it is .*, and its value has more") as failure, holder:
        holder.it = value
    assert more in str(failure.value)
    assert holder.it is None and coheld.holder(holder) is None


@pytest.mark.parametrize(
    ("annotation", "value", "read"),
    [
        (list[Point], [Point(1), Same(2)], [Point(1), Point(2)]),
        (list[Leaf | Flower], [Leaf(1), Flower(1, "red")], [Leaf(1), Flower(1, "red")]),
        (list[Entry], [{"n": 1}, {"n": 1, "points": [Point(1)]}], [{"n": 1}, {"n": 1, "points": [Point(1)]}]),
        (Tree, Tree(1, [Tree(2)]), Tree(1, [Tree(2)])),
        (dict[str, Point], {"a": {"x": 1}}, {"a": Point(1)}),
    ],
    ids=lambda one: str(one)[:30],
)
def test_a_value_with_nothing_more_is_not(annotation: Any, value: Any, read: Any) -> None:
    holder = holder_of(annotation | None, default_factory=lambda: None)()
    with holder:
        holder.it = value
    assert msgspec.to_builtins(holder.it) == msgspec.to_builtins(
        msgspec.convert(value, annotation, from_attributes=True)
    )


def test_the_other_changes_of_a_refused_release_are_dropped_too() -> None:
    class Two(Lockable):
        n: int = shared(0)
        q: list[int] = shared(default_factory=list)

    two = Two()
    with two:
        two.n = 1
    with pytest.raises(coheld.StateError), two:
        two.n = 2
        two.q.append("x")  # type: ignore[arg-type]
    assert two.n == 1 and two.q == []


def test_a_refused_release_has_the_error_of_the_body_as_its_context() -> None:
    class One(Lockable):
        q: list[int] = shared(default_factory=list)

        @Lockable.locked
        def spoil(self) -> None:
            self.q.append("x")  # type: ignore[arg-type]
            raise KeyError("body")

    with pytest.raises(coheld.StateError) as failure:
        One().spoil()
    assert isinstance(failure.value.__context__, KeyError)


def test_a_float_field_takes_an_int_and_holds_a_float() -> None:
    holder = with_default(float, 0.0)()
    with holder:
        holder.it = 3
        assert type(holder.it) is float
    assert type(holder.it) is float and holder.it == 3.0


class OfOne:
    """As numpy's numbers are: no subclasses of the builtin ones."""

    dtype = "int64"

    def __init__(self, value: Any) -> None:
        self.value = value

    def item(self) -> Any:
        return self.value


class Whole(int):
    pass


@pytest.mark.parametrize(("value", "kept"), [(OfOne(3), 3), (Whole(4), 4)])
def test_numbers_of_other_types_become_plain_ones(value: Any, kept: int) -> None:
    holder = with_default(int, 0)()
    with holder:
        holder.it = value
        assert type(holder.it) is int and holder.it == kept
    listed = holder_of(list[int], default_factory=list)()
    with listed:
        listed.it = [value]
    assert listed.it == [kept] and type(listed.it[0]) is int


def test_a_number_of_another_type_that_does_not_fit_is_refused() -> None:
    holder = with_default(int, 0)()
    with holder, pytest.raises(coheld.StateError):
        holder.it = OfOne(1.5)


# ---- declaring -------------------------------------------------------------------------------------------------------


class NoFields:
    pass


@pytest.mark.parametrize(
    "annotation",
    [Any, list, dict, tuple, set, list[Any], object, NoFields, list[NoFields], complex, memoryview, dict[str, Any]],
    ids=str,
)
def test_a_type_that_does_not_come_back_is_refused_when_the_class_is_made(annotation: Any) -> None:
    with pytest.raises(TypeError, match=r"Holder\.it cannot be shared"):
        holder_of(annotation, default_factory=list)


@pytest.mark.parametrize("annotation", [Final[int], "Final[int]", Annotated[Final[int], 1]], ids=str)
def test_a_final_field_is_refused(annotation: Any) -> None:
    with pytest.raises(TypeError, match=r"Holder\.it cannot be shared: .*Final"):
        with_default(annotation, 0)


@pytest.mark.parametrize("limit", [0, -1, 2**63, True, "1", 1.5], ids=repr)
def test_a_limit_that_is_none_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError if type(limit) is int else TypeError, match=r"Holder.*: max_state is"):

        class Holder(Lockable, max_state=limit):
            n: int = shared(0)


def test_the_least_limit() -> None:
    class Holder(Lockable, max_state=1):
        n: int = shared(0)

    holder = Holder()
    with holder:
        holder.n = 1
    assert holder.n == 1
    with pytest.raises(coheld.StateError, match="may have 1"), holder:
        holder.n = 1000
    assert holder.n == 1


def test_a_union_that_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Holder\.it cannot be shared"):
        holder_of(list[int] | set[int], default_factory=list)


def test_a_default_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"default of Holder\.it"):
        with_default(int, "x")


def test_a_container_as_default_is_refused() -> None:
    with pytest.raises(TypeError, match="default_factory"):
        shared([])
    with pytest.raises(TypeError, match="default"):
        shared()  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="default"):
        shared(1, default_factory=int)  # type: ignore[call-overload]


def test_a_field_without_annotation_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Holder\.it is shared, and needs an annotation"):
        type(Lockable)("Holder", (Lockable,), {"it": shared(0)})


def test_a_struct_and_a_model_are_refused() -> None:
    with pytest.raises(TypeError):

        class Mixed(Lockable, msgspec.Struct):
            n: int = shared(0)


def test_fields_are_inherited_and_merged() -> None:
    class Base(Lockable):
        a: int = shared(1)
        b: int = shared(2)

    class Other(Lockable):
        c: list[int] = shared(default_factory=lambda: [3])

    class Both(Base, Other):
        b: str = shared("two")  # type: ignore[assignment]

    class Last(Both):
        pass

    last = Last()
    with last:
        last.a, last.b = 10, "twenty"
        last.c.append(30)
    assert coheld.snapshot(last) == coheld.snapshot(last)
    assert (last.a, last.b, last.c) == (10, "twenty", [3, 30])
    base = Base()
    assert (base.a, base.b) == (1, 2)


class Counted:
    """A mixin that is no Lockable, as those below."""

    count: "int" = shared(0)
    parts: "list[Crate[int]]" = shared(default_factory=list)


class Named(Counted):
    name: str = shared("")
    count: int = shared(7)
    fixed: int = shared(0)


class Fixed:
    fixed = 3


def tell_count(link: procs.Link, holder: Any) -> None:
    link.hear()
    link.say((holder.count, holder.name, holder.parts))


def test_fields_of_a_mixin_are_shared_as_if_the_class_had_declared_them() -> None:
    class Device(Fixed, Named, Lockable):
        own: int = shared(1)

    device = Device(lock_name="device")
    assert (device.count, device.name, device.fixed, device.own) == (7, "", 3, 1)
    with pytest.raises(coheld.NotLockedError, match=r"Named\.count"):
        device.count = 5
    with device:
        device.count, device.name = 8, "x"
        device.parts.append(Crate(1))
        device.fixed = 4  # as before: no field
    with procs.start(tell_count, device) as other:
        other.tell("go")
        assert other.hear() == (8, "x", [Crate(1)])
    assert isinstance(vars(Named)["count"], schema.Shared)


def test_a_mixin_without_fields_of_the_class_itself() -> None:
    class Device(Named, Lockable):
        pass

    class Special(Device):
        pass

    class Other(Counted, Lockable):
        pass

    class Late(Fixed, Other):
        count: int = shared(9)

    special, other, late = Special(lock_name="device"), Other(), Late()
    with special:
        special.count += 1
    assert Device(lock_name="device").count == 8
    with other, late:
        other.count += 1
        late.count += 1
        late.parts.append(Crate(3))
    assert (other.count, late.count, late.parts, late.fixed) == (1, 10, [Crate(3)], 3)


def test_a_mixin_beside_a_class_with_fields() -> None:
    class Device(Lockable):
        count: str = shared("device's")
        size: int = shared(2)

    class First(Counted, Device):
        pass

    class Last(Device, Counted):
        pass

    first, last = First(), Last()
    assert (first.count, first.size, first.parts) == (0, 2, [])
    assert (last.count, last.size, last.parts) == ("device's", 2, [])
    with first, last:
        first.parts.append(Crate(1))
        last.parts.append(Crate(2))
    assert first.parts == [Crate(1)] and last.parts == [Crate(2)]


def test_a_mixin_of_another_module_knows_its_names() -> None:
    module = types.ModuleType("mixin_of_another")
    sys.modules[module.__name__] = module
    try:
        text = "import msgspec, coheld\nclass Only(msgspec.Struct):\n  n: int\nclass Mixin:\n"
        exec(text + "  only: 'list[Only]' = coheld.shared(default_factory=list)\n", vars(module))

        class Device(module.Mixin, Lockable):  # type: ignore[name-defined,misc]
            pass

        device = Device()
        with device:
            device.only.append(module.Only(1))
        assert device.only == [module.Only(1)]
    finally:
        del sys.modules[module.__name__]


def test_a_dataclass_that_has_a_mixin() -> None:
    @dataclasses.dataclass
    class Device(Named, Lockable):
        label: str

        def __post_init__(self) -> None:
            super().__init__()

    device = Device("a")
    with device:
        device.count += 1
    assert device.count == 8 and [one.name for one in dataclasses.fields(device)] == ["label"]


@pytest.mark.parametrize(
    "decorate", [dataclasses.dataclass, dataclasses.dataclass(slots=True), attrs.define], ids=["", "slots", "attrs"]
)
def test_a_mixin_whose_field_is_an_argument_is_refused(decorate: Any) -> None:
    class Mixin:
        n: int = shared(0)

    with pytest.raises(TypeError, match=r"Mixin\.n cannot be shared"):
        type(Lockable)("Device", (decorate(Mixin), Lockable), {})


def test_a_mixin_whose_field_is_wrong_is_refused() -> None:
    class Mixin:
        n = shared(0)

    with pytest.raises(TypeError, match=r"Mixin\.n is shared, and needs an annotation"):
        type(Lockable)("Device", (Mixin, Lockable), {})


def test_a_dataclass_leaves_the_fields_alone() -> None:
    @dataclasses.dataclass
    class Device(Lockable):
        name: str
        uses: int = shared(0)

        def __post_init__(self) -> None:
            super().__init__()

    device = Device("a")
    with device:
        device.uses += 1
    assert device.uses == 1 and [one.name for one in dataclasses.fields(device)] == ["name"]


def test_a_frozen_dataclass_with_slots() -> None:
    @dataclasses.dataclass(frozen=True)
    class Device(Lockable):
        name: str
        uses: int = shared(0)

        def __post_init__(self) -> None:
            Lockable.__init__(self)

    device = Device("a")
    assert device.uses == 0


def test_attrs_leaves_the_fields_alone() -> None:
    @attrs.define(slots=False)
    class Device(Lockable):
        name: str
        uses: int = shared(0)

        def __attrs_post_init__(self) -> None:
            super().__init__()

    device = Device("a")
    with device:
        device.uses += 1
    assert device.uses == 1


def test_a_class_that_was_made_again_by_its_decorator() -> None:
    @attrs.define
    class Device(Lockable):
        name: str
        uses: "list[Later]" = shared(default_factory=list)
        __weakref__: ClassVar[Any]

        def __attrs_post_init__(self) -> None:
            Lockable.__init__(self)

    class Later(msgspec.Struct):
        n: int

    globals()["Later"] = Later  # as at the end of a module
    try:
        device = Device("a")
        with device:
            device.uses.append(Later(1))
        assert device.uses == [Later(1)]
    finally:
        del globals()["Later"]


def test_a_descriptor_that_was_taken_away_is_missed() -> None:
    def spoil(cls: Any) -> Any:
        cls.n = 5
        return cls

    @spoil
    class Device(Lockable):
        n: int = shared(0)

    with pytest.raises(TypeError, match=r"Device\.n was declared as shared, and is 5 now"):
        Device()


def test_what_a_subclass_puts_in_place_of_a_field_is_named() -> None:
    class Device(Lockable):
        n: int = shared(0)

    class Special(Device):
        n = 5

    with pytest.raises(TypeError, match=r"Special\.n is 5, and replaces the shared field .*Device\.n"):
        Special()


def test_names_that_are_known_late() -> None:
    class Device(Lockable):
        parts: "dict[str, Part]" = shared(default_factory=dict)

    with pytest.raises(TypeError, match="Part"):
        Device()

    class Part(msgspec.Struct):
        n: int

    globals()["Part"] = Part
    try:
        device = Device()
        with device:
            device.parts["a"] = Part(1)
        assert device.parts == {"a": Part(1)}
    finally:
        del globals()["Part"]


def test_local_names_are_known() -> None:
    class Part(msgspec.Struct):
        n: int

    class Device(Lockable):
        part: "Part" = shared(default_factory=lambda: Part(1))

    assert Device().part == Part(1)


def test_only_annotations_of_shared_fields_are_looked_at() -> None:
    class Device(Lockable):
        other: "NoSuchName"  # type: ignore[name-defined]  # noqa: F821
        n: int = shared(0)

    assert Device().n == 0


def test_the_field_itself_is_had_from_the_class() -> None:
    class Device(Lockable):
        n: int = shared(0)

    assert "shared field n" in repr(Device.n) and Device.n is Device.__dict__["n"]


def test_a_field_cannot_be_deleted() -> None:
    class Device(Lockable):
        n: int = shared(0)

    device = Device()
    with device, pytest.raises(AttributeError, match="cannot be deleted"):
        del device.n


def test_no_lock_no_field() -> None:
    class Device(Lockable):
        n: int = shared(0)

        def __init__(self) -> None:
            pass

    with pytest.raises(coheld.NotInitializedError):
        _ = Device().n
    with pytest.raises(coheld.NotInitializedError):
        Device().n = 1
    with pytest.raises(TypeError, match="no shared fields"):
        coheld.snapshot(Lockable())
