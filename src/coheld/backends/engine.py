"""Locks that a server has, whichever it is: what a URL says, this process's way to each server, and a lock by its name.

An engine is a module that has a Place, which reads its URL, and a Server (server.py), which has its verbs:

    engine = Engine("redis", CAPABILITIES, Place, Server)
    at, anonymous, resource, Mutex = engine.at, engine.anonymous, engine.resource, engine.Mutex
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from .. import native
from ..owner import Owner
from ..process import at_fork
from . import files, of_scheme
from .away import PASS_BITS, owner_of
from .base import Capabilities, Handle, known
from .remote import far_mutex
from .server import PATIENCE, Server
from .store import Found, Known

_LEASE = 10.0
_SHORTEST, _LONGEST = 0.1, 3600.0


class Place(Protocol):
    """What a URL says.  where: the same without secrets, as messages and pickles have it; it is a URL as well.  url:
    with them.  lease: seconds.  user, password: None: it says none.  options: for the client library."""

    where: str
    url: str
    lease: float
    user: str | None
    password: str | None
    options: dict[str, str]

    def check(self) -> None:
        """What is wrong with its options is said here, not by the first call. Raises: ValueError.  IncompatibleError:
        if the client library is not there."""


def _adds_nothing(place: Place, known: Place) -> bool:
    """Is all that it says of who we are, or how to connect, in what is known?  So is the URL that messages have."""
    if place.user is None and place.password is None:
        return known.user is not None or known.password is not None or not place.options
    return place.user == known.user and place.password is None and known.password is not None


def take_lease(options: dict[str, str]) -> float:
    """Out of the options of a URL. Raises: ValueError: if it is none."""
    text = options.pop("lease", None)
    try:
        seconds = _LEASE if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not _SHORTEST <= seconds <= _LONGEST:
        raise ValueError(f"lease must be {_SHORTEST:g} to {_LONGEST:g} seconds, not {text}")
    return seconds


def capabilities() -> Capabilities:
    """Of a store: what is not the store's alone is the local lock's."""
    return Capabilities(
        handoff_bound=None if native.missing else 0.5,
        wakes_without_polling=not native.missing,
        uninterruptible_entry=False,
        held_limit=None if native.missing else native.HELD_LIMIT,
        files=False,
        leases=True,
        cohorts=False,
        handlers=False,
        readers=False,
        semaphores=True,
    )


class Engine:
    """One kind of servers, and those of them that this process has asked; connections are not a child's."""

    def __init__(
        self,
        scheme: str,
        capabilities: Capabilities,
        place: Callable[[str], Place],
        server: Callable[[Any, float], Server],
    ) -> None:
        self.scheme, self.capabilities, self._place, self._connect = scheme, capabilities, place, server
        self.Mutex: Any = far_mutex()
        self._urls: dict[str, str] = {}
        self.begin()
        _engines.append(self)

    def begin(self) -> None:
        self._guard = threading.RLock()
        self._servers: dict[tuple[str, float], Server] = {}

    def close(self) -> None:
        """Nothing is asked of a server any more; who asks again, is connected anew."""
        with self._guard:
            servers, self._servers = list(self._servers.values()), {}
        for server in servers:
            server.close()

    # -- what a backend's module has -----------------------------------------------------------------------------------

    def at(self, url: str) -> Backend:
        """The backend of a URL. Raises: ValueError: if it is none, or has another user of a server than the one by
        whom this process asks it.  IncompatibleError: without the client library."""
        place = self._place(url)
        if self._urls.get(place.where) != place.url:
            place.check()
            with self._guard:
                self._learn(place)
        return Backend(self, place)

    def _learn(self, place: Place) -> None:
        """All objects of a server share its connections, so what is said there is of one user.  Another may take the
        place of one whom the server has never answered: it may have been a wrong one."""
        known = self._known(place.where)
        servers = [one for (where, _), one in self._servers.items() if where == place.where]
        if known is not None and place.user is not None and known.user not in (None, place.user):
            if any(server.answered for server in servers):
                raise ValueError(f"this process asks {place.where} as another user: give all of a server the same one")
        elif known is not None and _adds_nothing(place, known):
            return
        self._urls[place.where] = place.url
        for server in servers:
            server.connects_by(place)

    def anonymous(self, cls: type | None = None) -> Handle:
        """A deep copy of one has a lock of its own, without a name: on this machine."""
        made: Handle = of_scheme(_local_scheme()).anonymous(cls)
        return made

    def resource(self, where: str, name: str, lease: float, permits: bool = False) -> Resource:
        """What travelled as that token."""
        return Resource(self, where, name, lease, permits)

    # -- the way to a server -------------------------------------------------------------------------------------------

    def server(self, where: str, lease: float) -> Server:
        """This process's one, for a lock with that lease."""
        key = where, min(PATIENCE, lease / 4)
        server = self._servers.get(key)
        if server is None:
            with self._guard:
                if (server := self._servers.get(key)) is None:
                    server = self._servers[key] = self._connect(self._place_of(where), key[1])
        return server

    def _place_of(self, where: str) -> Place:
        """With its secrets, if this process has been told any."""
        return self._known(where) or self._place(where)

    def _known(self, where: str) -> Place | None:
        if (known := self._urls.get(where)) is not None:
            return self._place(known)
        if (default := os.environ.get("COHELD_BACKEND", "")).startswith(self.scheme):
            place = self._place(default)
            if place.where == where:
                return place
        return None


_engines: list[Engine] = []


def close() -> None:
    """All servers of all engines are left alone; who asks one again, is connected anew."""
    for engine in _engines:
        engine.close()


def _become_child() -> None:
    for engine in _engines:
        engine.begin()


at_fork(child=_become_child)


class Backend:
    """What backend_of gives for a URL."""

    def __init__(self, engine: Engine, place: Place) -> None:
        self._engine, self._place = engine, place
        self.scheme, self.where = engine.scheme, place.where
        self.CAPABILITIES, self.Mutex = engine.capabilities, engine.Mutex
        self.anonymous = engine.anonymous

    def named(self, name: str) -> Resource:
        return Resource(self._engine, self.where, name, self._place.lease)

    def existing(self, name: str) -> Resource:
        """The resource of that name, whatever it is here; a lock, if there is none."""
        local = of_scheme(_local_scheme())
        permits = isinstance(local.existing(files.name_there(self.where, name)), local.NamedSemaphore)
        return Resource(self._engine, self.where, name, self._place.lease, permits)

    def seen(self, name: str) -> tuple[Found, Owner | None] | None:
        """By who only looks: what the server has of that name, with the first token of its last grant, and who has the
        lock; None: nothing. Makes nothing. Raises: BackendError."""
        resource = self.named(name)
        found = resource.store().load(name, Known())
        if not found.known.incarnation.strip(b"\0"):
            return None
        found = replace(found, token=found.token << PASS_BITS)
        mutex = self.Mutex(resource)
        try:
            mutex.bind(*resource.find())
        except FileNotFoundError:
            return found, owner_of(found.holder)
        return found, mutex.owner_by(found)

    def semaphore(self, name: str | None) -> tuple[Handle, Handle]:
        """The locks of a semaphore: the one whose state is its roll, and this host's gate.  Without a name both are
        local."""
        local = of_scheme(_local_scheme())
        if name is None:
            anonymous: tuple[Handle, Handle] = local.semaphore(None)
            return anonymous
        far = Resource(self._engine, self.where, name, self._place.lease, permits=True)
        gate: Handle = local.semaphore(files.name_there(self.where, name))[1]
        return known((self.scheme, *far.token(0)), lambda: self.Mutex(far)), gate


class Resource:
    """A lock of that name there, and the local one by which this host's processes agree first.  permits: it has the
    roll of a semaphore."""

    named = True

    def __init__(self, engine: Engine, where: str, name: str, lease: float, permits: bool = False) -> None:
        self.where, self.name, self.lease = where, name, lease
        self._engine, self.scheme = engine, engine.scheme
        self.cohorts = engine.capabilities.cohorts
        self.permits = permits
        local, here = of_scheme(_local_scheme()), files.name_there(where, name)
        self.local = local.semaphore(here)[0].resource if permits else local.named(here)
        self.path: str = self.local.path

    def attach(self) -> tuple[Any, int]:
        segment, offset = self.local.attach()
        return segment, int(offset)

    def find(self) -> tuple[Any, int]:
        """The same, and nothing is made. Raises: FileNotFoundError: if this host has none."""
        segment, offset = self.local.find()
        return segment, int(offset)

    def retire(self, segment: Any) -> None:
        self.local.retire(segment)

    def token(self, _offset: int) -> tuple[object, ...]:
        return (self.where, self.name, self.lease, self.permits)

    def label(self, _offset: int) -> str:
        return f"{self.name!r} at {self.where}"

    def open_guard(self, segment: Any, offset: int) -> int:
        return int(self.local.open_guard(segment, offset))

    def guards(self, segment: Any, fd: int) -> bool:
        return bool(self.local.guards(segment, fd))

    def give_back(self, _offset: int) -> None:
        """A named one stays."""

    def store(self) -> Server:
        return self._engine.server(self.where, self.lease)


def _local_scheme() -> str:
    return "file" if native.missing else "shm"
