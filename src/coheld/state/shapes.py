"""What a type is, as far as shared state cares: its text, whether its values can be changed, what C may write."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_origin

import msgspec
from msgspec import inspect as ms

from .frozen import FrozenDict, FrozenList, FrozenSet, freeze

NONE, BOOL, INT, FLOAT, STR, BYTES, MUTABLE, COPIED = 1, 2, 4, 8, 16, 32, 64, 128
"""Bits of a field's kinds, as _state.h has them."""

HANDED, ASSIGNED = 1, 2
"""Marks of a field that its owner may have changed, as _state.h has them."""

_SHORT = {
    ms.NoneType: NONE,
    ms.BoolType: BOOL,
    ms.IntType: INT,
    ms.FloatType: FLOAT,
    ms.StrType: STR,
    ms.BytesType: BYTES,
}
_OTHER = (ms.DateTimeType, ms.DateType, ms.TimeType, ms.TimeDeltaType, ms.UUIDType, ms.DecimalType)
_FREEZERS: dict[type, Callable[[Any], Any]] = {
    ms.ListType: FrozenList.of,
    ms.DictType: FrozenDict.of,
    ms.SetType: FrozenSet.of,
}
_UNFIT: dict[type, str] = {
    ms.AnyType: "Any, or a container that does not say of what",
    ms.CustomType: "a type that MessagePack cannot hold",
    ms.MemoryViewType: "a memoryview",
    ms.RawType: "msgspec.Raw",
    ms.ExtType: "msgspec.msgpack.Ext",
}


class UnfitError(TypeError):
    """A type that does not come back from its encoding as it was."""


@dataclass(frozen=True)
class Shape:
    """text: the type, the same in every process that means the same.  unordered: a set may be in it."""

    text: str
    kinds: int = 0
    mutable: bool = False
    copied: bool = False
    unordered: bool = False
    freeze: Callable[[Any], Any] | None = None


def shape_of(info: Any, seen: tuple[Any, ...] = ()) -> Shape:
    """The shape of what msgspec.inspect says of a type. Raises: UnfitError: if its values would not come back."""
    kind = type(info)
    if kind in _UNFIT:
        raise UnfitError(f"{_UNFIT[kind]}{f': {info.cls.__name__}' if kind is ms.CustomType else ''}")
    if kind is ms.Metadata:
        return shape_of(info.type, seen)
    if kind in _SHORT:
        limits = _limits(info)
        return Shape(_named(kind) + limits, kinds=0 if limits else _SHORT[kind])
    if kind in _OTHER:
        return Shape(_named(kind) + _limits(info))
    if kind is ms.ByteArrayType:
        return Shape("bytearray" + _limits(info), mutable=True, copied=True)
    if kind is ms.EnumType:
        return Shape(f"{info.cls.__name__}({', '.join(f'{one.name}={one.value!r}' for one in info.cls)})")
    if kind is ms.LiteralType:
        return Shape(f"Literal[{', '.join(map(repr, info.values))}]")
    return _compound(info, seen)


def _compound(info: Any, seen: tuple[Any, ...]) -> Shape:
    kind = type(info)
    if kind in (ms.ListType, ms.SetType, ms.FrozenSetType, ms.VarTupleType):
        return _joined(info, _named(kind), [shape_of(info.item_type, seen)])
    if kind is ms.DictType:
        return _joined(info, "dict", [shape_of(info.key_type, seen), shape_of(info.value_type, seen)])
    if kind is ms.TupleType:
        return _joined(info, "tuple", [shape_of(one, seen) for one in info.item_types])
    if kind is ms.UnionType:
        return _union([shape_of(one, seen) for one in info.types])
    if hasattr(info, "fields"):
        return _record(info, seen)
    raise UnfitError(f"what msgspec calls {kind.__name__}")


def _joined(info: Any, name: str, items: list[Shape]) -> Shape:
    shallow = not any(item.freeze for item in items)
    changeable = type(info) in _FREEZERS
    deep = freeze if changeable or not shallow else None
    return Shape(
        f"{name}[{', '.join(item.text for item in items)}]{_limits(info)}",
        mutable=changeable or any(item.mutable for item in items),
        copied=any(item.copied for item in items),
        unordered=name in ("set", "frozenset") or any(item.unordered for item in items),
        freeze=_FREEZERS[type(info)] if changeable and shallow else deep,
    )


def _union(arms: list[Shape]) -> Shape:
    short = all(arm.kinds for arm in arms)
    return Shape(
        " | ".join(sorted(arm.text for arm in arms)),
        kinds=sum(arm.kinds for arm in arms) if short else 0,
        mutable=any(arm.mutable for arm in arms),
        copied=any(arm.copied for arm in arms),
        unordered=any(arm.unordered for arm in arms),
        freeze=freeze if any(arm.freeze for arm in arms) else None,
    )


def _record(info: Any, seen: tuple[Any, ...]) -> Shape:
    """A Struct, dataclass, NamedTuple or TypedDict.  The first two are copied for readers: they cannot be made
    read-only from outside, unless they say that they are.  Of a generic one the fields say what it is of."""
    made, kind = info.cls, type(info)
    cls = get_origin(made) or made
    if made in seen:
        return Shape(cls.__name__)
    fields = [(one, shape_of(one.type, (*seen, made))) for one in info.fields]
    dictionary, tuple_ = kind is ms.TypedDictType, kind is ms.NamedTupleType
    mutable = any(shape.mutable for _, shape in fields) or not (tuple_ or _frozen(cls))
    deep = any(shape.freeze for _, shape in fields)
    return Shape(
        f"{cls.__name__}({', '.join(_of_record(one, shape) for one, shape in fields)})",
        mutable=mutable,
        copied=any(shape.copied for _, shape in fields) if dictionary or tuple_ else mutable,
        unordered=any(shape.unordered for _, shape in fields),
        freeze=freeze if dictionary or (tuple_ and deep) else None,
    )


def _of_record(field: Any, shape: Shape) -> str:
    return f"{field.encode_name}: {shape.text}{'' if field.required else ' = …'}"


def _frozen(cls: type) -> bool:
    if issubclass(cls, msgspec.Struct):
        return bool(cls.__struct_config__.frozen)
    parameters = getattr(cls, "__dataclass_params__", None)
    return bool(parameters and parameters.frozen)


def _named(kind: type) -> str:
    text = kind.__name__.removesuffix("Type").lower()
    return {"none": "None", "vartuple": "tuple"}.get(text, text) + ("..." if text == "vartuple" else "")


def _limits(info: Any) -> str:
    """The constraints of msgspec.Meta."""
    names: Iterable[str] = (name for name in type(info).__struct_fields__ if not name.endswith(("_type", "_types")))
    said = [f"{name}={getattr(info, name)!r}" for name in names if getattr(info, name) is not None]
    return f"({', '.join(said)})" if said else ""
