"""What a value was, object by object: an atomic call that fails leaves it so, and everything in it the same objects as
before, since the caller may have kept them.

Of each object that can be changed in place its content is kept, a shallow copy.  An encoding would be smaller, but does
not say which object is which: what the failed call has put into the place of another would be made like that one.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import msgspec

from .frozen import ATOMS

_MISSING: Any = object()


class _Kind(NamedTuple):
    """How objects of a type are dealt with.  content: a copy of what one has.  inside: what can be in that.  restore:
    one that has another content than this gets it again."""

    content: Callable[[Any], Any]
    inside: Callable[[Any], Iterable[Any]]
    restore: Callable[[Any, Any], None]


class Former:
    """A value as it is now."""

    def __init__(self, value: Any) -> None:
        self._kept: list[tuple[_Kind, Sequence[Any], Sequence[Any]]] = []  # objects, and the content of each
        seen: set[int] = set()
        level = {id(value): value}
        while level:
            seen |= level.keys()
            by_type: dict[type, list[Any]] = {}
            for one in level.values():
                by_type.setdefault(type(one), []).append(one)
            level = {}
            for cls, objects in by_type.items():
                if kind := _kind_of(cls):
                    contents = list(map(kind.content, objects))
                    self._kept.append((kind, objects, contents))
                    level |= {id(one): one for one in _inside(kind, contents) if id(one) not in seen}

    def restore(self) -> None:
        """Make it so again, what lies inside first. What is as it was is left alone."""
        for kind, objects, contents in reversed(self._kept):
            for one, content in zip(objects, contents, strict=True):
                kind.restore(one, content)


def _inside(kind: _Kind, contents: Sequence[Any]) -> list[Any]:
    """What may have a content in its turn."""
    if ATOMS.issuperset(map(type, chain.from_iterable(map(kind.inside, contents)))):
        return []
    return [one for content in contents for one in kind.inside(content) if type(one) not in ATOMS]


def _restore_list(one: list[Any], content: list[Any]) -> None:
    if not _same(one, content):
        one[:] = content


def _restore_dict(one: dict[Any, Any], content: dict[Any, Any]) -> None:
    if not _same(one, content) or not _same(one.values(), content.values()):
        one.clear()
        one.update(content)


def _restore_set(one: set[Any], content: list[Any]) -> None:
    if not _same(one, content):
        one.clear()
        one.update(content)


def _restore_bytes(one: bytearray, content: bytes) -> None:
    if one != content:
        one[:] = content


def _restore_nothing(one: Any, content: Any) -> None:
    """It cannot be changed."""


def _same(items: Any, former: Any) -> bool:
    """The same objects, in the same order?"""
    return len(items) == len(former) and all(map(operator.is_, items, former))


def _record_of(names: Sequence[str], put: Callable[[Any, str, Any], None]) -> _Kind:
    def content(one: Any) -> list[Any]:
        return [getattr(one, name, _MISSING) for name in names]

    def restore(one: Any, former: list[Any]) -> None:
        for name, value in zip(names, former, strict=True):
            if getattr(one, name, _MISSING) is value:
                continue
            if value is _MISSING:
                delattr(one, name)
            else:
                put(one, name, value)

    return _Kind(content, iter, restore)


_BUILTIN: dict[type | tuple[type, ...], _Kind] = {
    dict: _Kind(dict, lambda content: chain(content, content.values()), _restore_dict),
    list: _Kind(list, iter, _restore_list),
    set: _Kind(list, iter, _restore_set),
    bytearray: _Kind(bytes, lambda content: (), _restore_bytes),
    (tuple, frozenset): _Kind(list, iter, _restore_nothing),
}


@functools.lru_cache(256)
def _kind_of(cls: type) -> _Kind | None:
    """None: nothing in it can be changed, as far as an encoding has it."""
    for builtin, kind in _BUILTIN.items():
        if issubclass(cls, builtin):
            return kind
    if issubclass(cls, msgspec.Struct):
        return _record_of(cls.__struct_fields__, msgspec.structs.force_setattr)
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else getattr(cls, "__attrs_attrs__", ())
    return _record_of([field.name for field in fields], object.__setattr__) if fields else None
