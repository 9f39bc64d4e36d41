"""A look at the state of a named resource by who does not know its class."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec

from .. import native
from ..backends import backend_of, files
from ..errors import IncompatibleError
from ..owner import Owner
from . import store
from .slots import UNDECODABLE, Stored, TornError


@dataclass(frozen=True)
class Shown:
    """One field.  type: as the class that committed it says.  value: decoded without that class."""

    name: str
    type: str
    value: Any


@dataclass(frozen=True)
class Look:
    """commits: how many there were. size: bytes of all values. file: bytes that they lie in. holder: of the lock
    now."""

    name: str
    commits: int
    size: int
    file: int
    holder: Owner | None
    fields: list[Shown]


def look(name: str) -> Look | None:
    """The last commit of a named resource; None: there is no such resource. Takes no lock, and makes nothing.

    Raises: IncompatibleError: if what is there is damaged, or of another version.
    """
    backend = backend_of(None)
    files.check_name(name)
    if not backend.CAPABILITIES.files:
        raise IncompatibleError(f"{name!r}: coheld show looks at states of this machine; a store has it", resource=name)
    resource = backend.named(name)
    mutex = backend.Mutex(resource)
    try:
        mutex.bind(*resource.find())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise IncompatibleError(f"{resource.path} is damaged: {error}", resource=name) from None
    try:
        word, (fields, file) = store.consistently(
            lambda: int(mutex.version), lambda word: _copied(mutex, word), lambda: time.sleep(0.001)
        )
    except (FileNotFoundError, TornError, IncompatibleError) as error:
        if mutex.flags & native.REMOVED:  # in the middle of the look
            return None if mutex._linked() else look(name)
        if isinstance(error, IncompatibleError):
            raise
        raise _damaged(name, error) from None
    shown = [Shown(field, text, _decoded(name, raw)) for field, text, raw in fields]
    size = sum(len(raw) for _, _, raw in fields)
    return Look(name, store.number_of(word), size, file, mutex.owner(), shown)


def fields_in(payload: bytes | None) -> dict[str, Any]:
    """Names and values of a state as a store has it; none, if it is no state."""
    if payload is None:
        return {}
    try:
        stored = msgspec.msgpack.decode(payload, type=Stored)
        names = [name for name, _ in msgspec.msgpack.decode(stored.schema, type=list[tuple[str, str]])]
        return {name: msgspec.msgpack.decode(raw) for name, raw in zip(names, stored.fields, strict=True)}
    except UNDECODABLE:
        return {}


def _copied(mutex: Any, word: int) -> tuple[list[tuple[str, str, bytes]], int]:
    generation = store.generation_of(word)
    if not generation:
        return [], 0
    state = store.opened(mutex.segment.path, mutex.segment.identity, mutex.offset, generation)
    entries = state.entries(word)
    fields = zip(state.fields.items(), entries, strict=True)
    return [(field, text, state.raw(entry)) for (field, text), entry in fields], state.head.size


def _decoded(name: str, raw: bytes) -> Any:
    try:
        return msgspec.msgpack.decode(raw)
    except UNDECODABLE as error:
        raise _damaged(name, error) from None


def _damaged(name: str, error: Exception) -> IncompatibleError:
    return IncompatibleError(f"the state of {name!r} is damaged: {error}", resource=name)
