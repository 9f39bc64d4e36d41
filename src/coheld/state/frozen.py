"""Containers as they are read outside of the lock: equal to the plain ones, and read-only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import NotLockedError


def _refuse(self: Any, *_args: Any, **_kwargs: Any) -> NoReturn:
    raise NotLockedError(
        f"this {type(self).__mro__[2].__name__} was read outside of the lock, and a change of it would be lost: "
        "change it in a locked method, or with obj: …; or copy it"
    )


def _read_only(*names: str) -> Callable[[type], type]:
    def decorate(cls: type) -> type:
        for name in names:
            setattr(cls, name, _refuse)
        return cls

    return decorate


class _Plain:
    """A copy, and what a pickle loads, is of the builtin type."""

    __slots__ = ()

    def __copy__(self) -> Any:
        return type(self).__mro__[2](self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return thaw(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return thaw, (self.__copy__(),)


@_read_only("__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "extend", "insert", "pop", "remove")
@_read_only("clear", "sort", "reverse")
class FrozenList(_Plain, list[Any]):
    """A list that was read outside of the lock."""

    __slots__ = ()


@_read_only("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update")
class FrozenDict(_Plain, dict[Any, Any]):
    """A dict that was read outside of the lock."""

    __slots__ = ()


@_read_only("__iand__", "__ior__", "__isub__", "__ixor__", "add", "clear", "discard", "pop", "remove", "update")
@_read_only("difference_update", "intersection_update", "symmetric_difference_update")
class FrozenSet(_Plain, set[Any]):
    """A set that was read outside of the lock."""

    __slots__ = ()


def freeze(value: Any) -> Any:
    """The value with every list, dict and set in it read-only; what is in other objects stays as it is."""
    cls = type(value)
    if cls is list:
        return FrozenList(map(freeze, value))
    if cls is dict:
        return FrozenDict((key, freeze(one)) for key, one in value.items())
    if cls is set:
        return FrozenSet(value)
    if isinstance(value, tuple):
        return _like(value, map(freeze, value))
    return value


def thaw(value: Any) -> Any:
    """A plain copy of what freeze made; containers that are plain already stay as they are."""
    if isinstance(value, FrozenList):
        return [thaw(one) for one in value]
    if isinstance(value, FrozenDict):
        return {key: thaw(one) for key, one in value.items()}
    if isinstance(value, FrozenSet):
        return set(value)
    return value


def _like(value: tuple[Any, ...], items: Any) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
