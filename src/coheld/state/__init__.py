"""State that lives beside the lock, and that a crash cannot tear.

    __init__    shared() and snapshot()
    declaring   what becomes of a class that has shared fields
    frozen      containers as they are read outside of the lock
    shapes      what a type is: its text, whether its values can be changed
    surplus     what a value has, and its type has not
    schema      the fields of a class, their encoding, and the way to the state of a resource
    slots       one generation of a state, as its bytes
    store       its files
    stored      the same in one value, for a store on another host
    undoing     what a value was, for an atomic call that fails
    view        what this process knows of a state: read, commit, grow, undo
    plain       caches and marks of that, where they are not C
    looking     a state for who does not know its class
    untyped     a value for who does not know its type

Protocol and states are in _state.h; what is otherwise where there is no C, in slots.CheckedFile.  msgspec is imported
with the first shared field, and with that all but this module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

from .. import native

if TYPE_CHECKING:
    from .schema import Schema

T = TypeVar("T")
_MISSING: Any = object()


@overload
def shared(default: T, /) -> T: ...


# The builtin containers do not say of what they are: what the annotation says is meant.
@overload
def shared(*, default_factory: type[list[Any]]) -> list[Any]: ...


@overload
def shared(*, default_factory: type[dict[Any, Any]]) -> dict[Any, Any]: ...


@overload
def shared(*, default_factory: type[set[Any]]) -> set[Any]: ...


@overload
def shared(*, default_factory: Callable[[], T]) -> T: ...


def shared(default: Any = _MISSING, /, *, default_factory: Any = None) -> Any:
    """Declare a field that all copies of the object share, in whatever process: ``n: int = shared(0)``.

    The annotation says what it holds: int (64 bits), float, bool, str, bytes, None, list, dict, set, tuple, dataclasses
    and msgspec.Structs, enums, datetime, Decimal, UUID, and unions of them that MessagePack can tell apart.  A list,
    dict or set needs default_factory, as in dataclasses.  If that gives another value each
    time, as uuid4, the first locked call that reads it commits it; before that each reader outside sees one of its own.

    With the lock the owner sees its own changes, also those inside of lists and dicts; they become visible to others
    when it gives the lock back, all at once.  Without the lock a read never blocks and gives the last such state, its
    containers read-only; an assignment raises NotLockedError.

    Raises: TypeError: here, or when the class is made: if the annotation is missing or cannot be stored.
    """
    from .schema import Shared

    if (default is _MISSING) == (default_factory is None):
        raise TypeError("shared() takes a default, or default_factory=…")
    if default_factory is not None:
        return Shared(default_factory=default_factory)
    if type(default).__hash__ is None:
        raise TypeError(
            f"shared() of a {type(default).__name__}: use default_factory=…, so that each resource has its own"
        )
    return Shared(default)


def snapshot(obj: object) -> Any:
    """All shared fields of the object as one commit left them: an object with the same attributes, read-only.

    Never blocks, also while the lock is held. The owner of the lock gets what it has at the moment.

    Raises: TypeError: if the object has no shared fields.  NotInitializedError: if it has no lock.
    """
    if (schema := schema_of(type(obj))) is None:
        raise TypeError(f"{type(obj).__qualname__} has no shared fields")
    return schema.bind(native.lock_of(obj))._snapshot()


def schema_of(cls: type) -> Schema | None:
    """The shared fields of a class; None: it has none."""
    for base in cls.__mro__:
        for value in vars(base).values():
            if isinstance(value, native.Field):
                schema: Schema = value.schema
                return schema
    return None


unsettled: dict[int, Callable[[], None]] = {}
"""What is to be done before the first object of a class gets its lock, by the class's id."""


def declare(cls: type, max_state: int | None) -> None:
    """When a class is made: see declaring.declare. Raises: TypeError: if a field of it cannot be shared."""
    if f"{__name__}.schema" in sys.modules:
        from .declaring import declare as declare_

        declare_(cls, max_state)
    elif max_state is not None:
        raise TypeError(f"{cls.__qualname__} has max_state, and no shared fields")
