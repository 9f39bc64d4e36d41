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
from . import store, stored
from .slots import UNDECODABLE, TornError
from .untyped import decoded


@dataclass(frozen=True)
class Shown:
    """One field.  type: as the class that committed it says.  value: decoded without that class."""

    name: str
    type: str
    value: Any


@dataclass(frozen=True)
class Look:
    """commits: how many there were. size: bytes of all values. file: bytes that they lie in. holder: of the lock
    now.  Of one that a store on another host has: store: where, without secrets; token: the first one of the last grant
    (the processes of a host that pass it on have greater ones); nobody counts commits there, and there is no file."""

    name: str
    commits: int | None
    size: int
    file: int | None
    holder: Owner | None
    fields: list[Shown]
    store: str = ""
    token: int | None = None


def look(name: str) -> Look | None:
    """The last commit of a named resource; None: there is no such resource. Takes no lock, and makes nothing.

    Raises: IncompatibleError: if what is there is damaged, or of another version.  BackendError: if a store cannot be
    asked.
    """
    backend = backend_of(None)
    files.check_name(name)
    if not backend.CAPABILITIES.files:
        return _look_there(backend, name)
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


def _look_there(backend: Any, name: str) -> Look | None:
    """At what a store has."""
    seen = backend.seen(name)
    if seen is None:
        return None
    found, holder = seen
    try:
        texts, fields = ({}, {}) if found.payload is None else stored.unpack(found.payload)
    except UNDECODABLE as error:
        raise _damaged(name, error) from None
    shown = [Shown(field, texts[field], _decoded(name, raw)) for field, raw in fields.items()]
    return Look(name, None, sum(map(len, fields.values())), None, holder, shown, backend.where, found.token)


def fields_in(payload: bytes | None) -> dict[str, Any]:
    """Names and values of a state as a store has it; none, if it is no state."""
    if payload is None:
        return {}
    try:
        _, fields = stored.unpack(payload)
        return {name: msgspec.msgpack.decode(raw) for name, raw in fields.items()}
    except UNDECODABLE:
        return {}


def lessees_of(mutex: Any) -> list[tuple[int, int]]:
    """By the owner: process and its start, of each lease, where the state is the ledger of a pool (ledger.py) on this
    machine."""
    try:
        fields = {field: msgspec.msgpack.decode(raw) for field, _, raw in _copied(mutex, int(mutex.version))[0]}
        if fields.keys() == {"leases", "queue"}:
            return [(int(one["pid"]), int(one["start"])) for one in fields["leases"].values()]
    except (*UNDECODABLE, FileNotFoundError, TornError, IncompatibleError, AttributeError, KeyError, TypeError):
        pass
    return []


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
        return decoded(raw)
    except UNDECODABLE as error:
        raise _damaged(name, error) from None


def _damaged(name: str, error: Exception) -> IncompatibleError:
    return IncompatibleError(f"the state of {name!r} is damaged: {error}", resource=name)
