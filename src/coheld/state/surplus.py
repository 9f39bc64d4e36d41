"""What a value has that its type has not, and that would not come back: fields of a subclass, keys that a TypedDict has
not.  An encoding has them, and who decodes it leaves them out without a word.

Only types and keys are looked at, of all values at one place of a type together: a commit of a thousand records must
not feel it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, get_origin

import msgspec
from msgspec import inspect as ms

Search = Callable[[list[Any]], str | None]
"""Says what one of these values has more than its type; None: nothing."""
_Part = tuple[Callable[[list[Any]], Iterable[Any]], Search]
"""What lies at one place of some values, and the search for it."""

_ROWS = (ms.ListType, ms.SetType, ms.FrozenSetType, ms.VarTupleType)


def search_of(info: Any, known: dict[Any, Search] | None = None) -> Search | None:
    """For values of what msgspec.inspect says of a type; None: they have nothing more.  known: classes of records that
    the whole type has, each of which may lie in itself."""
    known = {} if known is None else known
    kind = type(info)
    if kind is ms.Metadata:
        return search_of(info.type, known)
    if kind is ms.UnionType:
        return _one_of([search for one in info.types if (search := search_of(one, known))])
    if kind in _ROWS:
        return _within((list, tuple, set, frozenset), _parts([chain.from_iterable], [info.item_type], known))
    if kind is ms.TupleType:
        places = [functools.partial(map, itemgetter(place)) for place in range(len(info.item_types))]
        return _within((list, tuple), _parts(places, info.item_types, known))
    if kind is ms.DictType:
        return _within((dict,), _parts([chain.from_iterable, _values], [info.key_type, info.value_type], known))
    if hasattr(info, "fields"):
        return known.get(info.cls) or _record(info, known)
    return None


def _parts(places: Iterable[Any], types: Iterable[Any], known: dict[Any, Search]) -> list[_Part]:
    found = [(place, search_of(one, known)) for place, one in zip(places, types, strict=True)]
    return [(place, search) for place, search in found if search]


def _values(dicts: list[dict[Any, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, dicts))


def _one_of(searches: list[Search]) -> Search | None:
    def search(values: list[Any]) -> str | None:
        return next(filter(None, (one(values) for one in searches)), None)

    return search if searches else None


def _within(classes: tuple[type, ...], parts: list[_Part]) -> Search | None:
    """Values of other classes are another arm's of a union, or what is decoded as well."""

    def search(values: list[Any]) -> str | None:
        own = [one for one in values if isinstance(one, classes)]
        return next(filter(None, (one(list(place(own))) for place, one in parts)), None) if own else None

    return search if parts else None


def _record(info: Any, known: dict[Any, Search]) -> Search:
    cls, names = get_origin(info.cls) or info.cls, [one.name for one in info.fields]
    if type(info) is ms.TypedDictType:
        record: Any = _Keys(cls, names, sum(one.required for one in info.fields))
        places = [functools.partial(_at_key, name) for name in names]
    else:
        record = _Fields(cls, names, known)
        places = [functools.partial(map, attrgetter(name)) for name in names]
    known[cls] = known[info.cls] = record
    record.parts = _parts(places, [one.type for one in info.fields], known)
    return record  # type: ignore[no-any-return]


class _Fields:
    """Of a Struct, dataclass, class of attrs or NamedTuple."""

    def __init__(self, cls: type, names: list[str], known: dict[Any, Search]) -> None:
        self.cls, self.names, self.known = cls, frozenset(names), known
        self.parts: list[_Part] = []

    def __call__(self, values: list[Any]) -> str | None:
        types: set[Any] = set(map(type, values))
        if types != {self.cls}:
            values = [one for one in values if isinstance(one, self.cls)]
            for cls in types - self.known.keys():
                if issubclass(cls, self.cls) and (more := _names_of(cls) - self.names):
                    return f"{', '.join(sorted(more))} of {cls.__qualname__}, where {self.cls.__qualname__} is meant"
        return next(filter(None, (one(list(place(values))) for place, one in self.parts)), None) if values else None


class _Keys:
    """Of a TypedDict.  least: how many keys each one has."""

    def __init__(self, cls: type, names: list[str], least: int) -> None:
        self.cls, self.names, self.least = cls, frozenset(names), least
        self.parts: list[_Part] = []

    def __call__(self, values: list[Any]) -> str | None:
        dicts = [one for one in values if isinstance(one, dict)]
        if max(map(len, dicts), default=0) > self.least and (more := set(chain.from_iterable(dicts)) - self.names):
            return f"{', '.join(sorted(map(str, more)))}, which {self.cls.__qualname__} has not"
        return next(filter(None, (one(list(place(dicts))) for place, one in self.parts)), None)


def _at_key(name: str, dicts: list[dict[Any, Any]]) -> Iterable[Any]:
    return (one[name] for one in dicts if name in one)


@functools.lru_cache(256)
def _names_of(cls: type) -> frozenset[str]:
    """Of the fields of a record's class."""
    if issubclass(cls, msgspec.Struct):
        return frozenset(cls.__struct_fields__)
    if issubclass(cls, tuple):
        return frozenset()  # one that is longer than its type is refused
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else getattr(cls, "__attrs_attrs__", ())
    return frozenset(field.name for field in fields)
