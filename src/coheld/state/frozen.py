"""Containers as they are read outside of the lock: equal to the plain ones, and read-only."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Self

from ..errors import NotLockedError

ATOMS = frozenset({int, float, str, bytes, bool, type(None)})
"""Types of which nothing can be inside of a value."""


def _refuse(self: Any, *_args: Any, **_kwargs: Any) -> NoReturn:
    raise NotLockedError(
        f"this {type(self).__mro__[2].__name__} was read outside of the lock, and a change of it would be lost: "
        "change it in a locked method, or with obj: …; or copy it"
    )


def _read_only(*names: str) -> Callable[[type], type]:
    def decorate(cls: type) -> type:
        for name in ("__init__", *names):
            setattr(cls, name, _refuse)
        return cls

    return decorate


class Frozen:
    """A copy, and what a pickle loads, is of the builtin type."""

    __slots__ = ()

    @classmethod
    def of(cls, items: Iterable[Any]) -> Self:
        """A new one. Its __init__, which would fill it again, is refused."""
        plain: Any = cls.__mro__[2]
        made = plain.__new__(cls)
        plain.__init__(made, items)
        return made  # type: ignore[no-any-return]

    def __copy__(self) -> Any:
        return type(self).__mro__[2](self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__copy__(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self).__mro__[2], (self.__copy__(),)


@_read_only("__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "extend", "insert", "pop", "remove")
@_read_only("clear", "sort", "reverse")
class FrozenList(Frozen, list[Any]):
    """A list that was read outside of the lock."""

    __slots__ = ()


@_read_only("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update")
class FrozenDict(Frozen, dict[Any, Any]):
    """A dict that was read outside of the lock."""

    __slots__ = ()


@_read_only("__iand__", "__ior__", "__isub__", "__ixor__", "add", "clear", "discard", "pop", "remove", "update")
@_read_only("difference_update", "intersection_update", "symmetric_difference_update")
class FrozenSet(Frozen, set[Any]):
    """A set that was read outside of the lock."""

    __slots__ = ()


def freeze(value: Any) -> Any:
    """The value with every list, dict and set in it read-only; what is in other objects stays as it is."""
    cls = type(value)
    if cls is list:
        return FrozenList.of(map(freeze, value))
    if cls is dict:
        return FrozenDict.of((key, freeze(one)) for key, one in value.items())
    if cls is set:
        return FrozenSet.of(value)
    if isinstance(value, tuple):
        return _like(value, map(freeze, value))
    return value


def thaw(value: Any) -> Any:
    """The value with a plain copy of every container in it that is read-only.  Who has the plain ones may go on with
    them: these stay the same objects, and take the copies in."""
    cls = type(value)
    if cls is FrozenList:
        return [thaw(one) for one in value]
    if cls is FrozenDict:
        return {key: thaw(one) for key, one in value.items()}
    if cls is FrozenSet:
        return set(value)
    if cls is list and not ATOMS.issuperset(map(type, value)):
        _take(value, enumerate(value))
    elif cls is dict and not ATOMS.issuperset(map(type, value.values())):
        _take(value, value.items())
    elif isinstance(value, tuple):
        items = [thaw(one) for one in value]
        return value if all(map(operator.is_, items, value)) else _like(value, items)
    return value


def _take(container: Any, items: Iterable[tuple[Any, Any]]) -> None:
    for place, one in items:
        if (plain := thaw(one)) is not one:
            container[place] = plain  # a place that is there: to go on with the items is fine


def _like(value: tuple[Any, ...], items: Any) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
