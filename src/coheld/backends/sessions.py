"""The session of a process at a store: the lease of what it has there for longer than a call, as permits of a
semaphore, resources of a pool, and places among those who wait for them.

What these are is in registers, each the state of a lock (roll.py, ledger.py), under the number of the session.  The
session itself is a lock of the store, which nobody but its process takes while that lives, so its lease is by the
store's clock, and one renewal is for all that the process has:

    open         the store has given its lease, before anything stands in a register under its number
    renewed      by the thread that renews the leases of locks
    over         its time has passed, and nobody has noticed: the process may still renew it
    taken over   another has taken the lock of the session, and removed it: for good
    lost         its process knows, of the store or because it could not renew it in time, and never renews it again
    ended        by its process, which has nothing under it any more

What a session had is given to others only once it was taken over (or when its process is gone, as its own host sees).
To take over is one step of the store, and so is to renew: if the renewal comes first, the session is not over; if it
comes later, it is refused, and the process finds out.  So nobody renews what others have been given.  A process that
was stopped for longer believes that it has it until it goes on, as with every lease.

Killed between taking over and removing: the lease of who took it over ends, and the next takes it over from that.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from ..errors import CoheldError, LeaseLostError
from ..process import at_fork, start_of
from . import files, leaving, renewing
from .away import Grant
from .store import Ask, Granted, Known, Store

_IDLE = 30.0
"""For how long a session stays though nothing is under it, seconds."""
_MANY = 10_000


@dataclass(frozen=True)
class Client:
    """Who a session is of, as registers have it.  host: its processes know of each other whether they live; machine:
    for messages."""

    session: str
    host: str
    machine: str
    pid: int
    start: int

    def is_beside(self, other: Client) -> bool:
        """Are both of one process?"""
        return (self.host, self.pid, self.start) == (other.host, other.pid, other.start)

    def __str__(self) -> str:
        return f"process {self.pid}" + ("" if self.machine == socket.gethostname() else f" on {self.machine}")


def holders_in(fields: dict[str, Any]) -> list[Client]:
    """In the fields of a roll or a ledger (roll.py, ledger.py), by who does not know its class; of another state there
    are none."""
    try:
        found = {("holders", "queue", "value"): "holders", ("leases", "queue"): "leases"}.get(tuple(sorted(fields)))
        return msgspec.convert([one["client"] for one in fields[found].values()], list[Client]) if found else []
    except (AttributeError, KeyError, TypeError, msgspec.ValidationError):
        return []


class User(Protocol):
    """Who has something under a session."""

    def lose(self, session: Session, error: LeaseLostError) -> None:
        """That one is lost; by whoever finds out. Must not block."""

    def look(self) -> None:
        """By the thread that renews, each time: is it still somebody's?  A loop may have been closed while another
        thread asked the store in a task's stead, and nobody else finds that. Must not block."""


class Session:
    """Of this process; as renewing.py has it, it is a lock."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions, self.lease = sessions, sessions.lease
        pid = os.getpid()
        self.client = Client(os.urandom(16).hex(), _host(), socket.gethostname(), pid, start_of(pid) or 0)
        self.name = _name_of(self.client.session)
        self.grant: Grant | None = None
        self.error: LeaseLostError | None = None
        self.users: dict[int, User] = {}
        self.used = time.monotonic()

    @property
    def store(self) -> Store:
        return self.sessions.store

    def add(self, key: int, user: User) -> None:
        """The user has something under it from now on. Raises: LeaseLostError: if it is over."""
        with self.sessions.guard:
            if self.grant is None or self.error is not None:
                raise self.error or LeaseLostError(f"{self.store.where}: this session has ended", resource=self.name)
            self.users[key] = user

    def drop(self, key: int) -> None:
        """The user has nothing any more."""
        self.users.pop(key, None)

    def open(self) -> None:
        """Raises: BackendError."""
        nonce, begun = os.urandom(16), time.monotonic()
        answer = self.store.try_acquire(self.name, Ask(nonce, _who(self.client), self.lease, Known(), False))
        assert isinstance(answer, Granted), "nobody else draws its number"
        self.grant = Grant(nonce, answer.token, begun + self.lease)
        renewing.while_held(self)

    def is_good(self) -> bool:
        """As far as this process knows. Never blocks."""
        grant = self.grant
        if grant is None or self.error is not None:
            return False
        if grant.until <= time.monotonic():
            self.lose(grant, "its time is over")
            return False
        return True

    def ensure(self) -> bool:
        """Ask the store. Raises: BackendError."""
        grant, begun = self.grant, time.monotonic()
        if grant is None or self.error is not None:
            return False
        if self.store.renew(self.name, grant.nonce, self.lease):
            self.renewed(grant, begun + self.lease)
            return True
        self.lose(grant, "another has taken it over")
        return False

    def end(self) -> None:
        """Nothing is under it any more, or its process ends. Raises: BackendError."""
        grant, self.grant = self.grant, None
        if grant is not None and self.error is None:
            self.store.remove(self.name, grant.nonce)

    # -- called by who renews ------------------------------------------------------------------------------------------

    def renewed(self, grant: Grant, until: float) -> None:
        grant.until = max(grant.until, until)

    def deserted(self, _grant: Grant) -> bool:
        """Has it ended?  It does where nothing was under it for long."""
        for user in list(self.users.values()):
            user.look()
        with self.sessions.guard:
            if self.users:
                self.used = time.monotonic()
            if time.monotonic() - self.used < _IDLE:
                return False
            if self.sessions.mine is self:
                self.sessions.mine = None
        with suppress(CoheldError):
            self.end()
        return True

    def lose(self, grant: Grant, why: str) -> LeaseLostError:
        error = LeaseLostError(
            f"{self.store.where}: the lease of {self.lease:g} s on what this process has there was lost ({why}); "
            "others may have it",
            resource=self.store.where,
        )
        with self.sessions.guard:
            if self.error is not None:
                return self.error
            self.error = grant.lost = error
            self.grant = None
            self.sessions.gone.add(self.client.session)  # as it is never renewed again
            users = list(self.users.values())
            self.users.clear()
        for user in users:
            try:
                user.lose(self, error)
            except Exception:
                logging.getLogger("coheld").exception("%s: what was to be told of a loss has failed", self.store.where)
        return error


class Sessions:
    """Of one store and lease, as this process knows them.  gone: those that are over for good."""

    def __init__(self, store: Callable[[], Store], lease: float) -> None:
        self._store, self.lease = store, lease
        self.guard = threading.RLock()
        self.opening = threading.RLock()
        self.mine: Session | None = None
        self.gone: set[str] = set()
        self.due: dict[str, float] = {}
        self.asked: set[str] = set()

    @property
    def store(self) -> Store:
        return self._store()

    def here(self) -> Session:
        """This process's, opened if there is none; may ask the store. Raises: BackendError."""
        with self.opening:
            with self.guard:
                session = self.mine
                if session is not None:
                    session.used = time.monotonic()
            if session is not None and session.is_good():
                grant = session.grant
                if grant is not None and (grant.until - time.monotonic() > self.lease / 2 or session.ensure()):
                    return session
            session = Session(self)
            session.open()
            with self.guard:
                self.mine = session
            leaving.at_exit(end)
            return session

    def is_gone(self, client: Client) -> bool:
        """For good, as far as this process knows without the store."""
        if client.session in self.gone:
            return True
        if (mine := self.mine) is not None and client.session == mine.client.session:
            return False
        if client.host == _host() and start_of(client.pid) != client.start:
            self.gone.add(client.session)
            return True
        return False

    def next_look(self, clients: Iterable[Client]) -> float:
        """When the store is to be asked of one of them, a time.monotonic()."""
        if len(self.due) > _MANY or len(self.gone) > _MANY:  # of most nothing is anywhere any more
            self.due.clear()
            self.asked.clear()
            self.gone.clear()  # who has lost one does not use it, and the store says it of others
        soon = time.monotonic() + self.lease / 3  # one that was just seen may have been renewed just before
        return min((self.due.setdefault(one.session, soon) for one in self._others(clients)), default=float("inf"))

    def ask(self, clients: Iterable[Client], anew: bool = False) -> bool:
        """Those whose time has come, or (anew) of whom it was never asked: is one of them gone, which was not known?
        Asks the store for each. Raises: BackendError."""
        found = False
        for client in self._others(clients):
            due = self.due.get(client.session, float("inf"))
            if time.monotonic() >= due or (anew and client.session not in self.asked):
                found |= self._takes_over(client)
        return found

    def _others(self, clients: Iterable[Client]) -> list[Client]:
        """Of whom the store may know more: one of this host may stand still, which only its lease tells."""
        mine = self.mine and self.mine.client.session
        return [one for one in clients if one.session not in self.gone and one.session != mine]

    def _takes_over(self, client: Client) -> bool:
        name, nonce = _name_of(client.session), os.urandom(16)
        answer = self.store.try_acquire(name, Ask(nonce, _who(client), self.lease, Known(), False))
        self.asked.add(client.session)
        if not isinstance(answer, Granted):
            self.due[client.session] = time.monotonic() + max(answer.seconds, self.lease / 6)
            return False
        self.gone.add(client.session)
        self.due.pop(client.session, None)
        with suppress(CoheldError):  # it lapses
            self.store.remove(name, nonce)
        return True


class _Process:
    """What belongs to this process alone; a child of a fork has no session."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.known: dict[tuple[str, float], Sessions] = {}
        self.host: tuple[str, str] | None = None


_process = _Process()
at_fork(child=_process.begin)


def at(store: Callable[[], Store], lease: float) -> Sessions:
    """Those of a store."""
    key = store().where, lease
    return _process.known.get(key) or _process.known.setdefault(key, Sessions(store, lease))


def end() -> None:
    """By a process that ends: what it still has there is others'. Asks each store, and no longer than that lets it."""
    known, _process.known = list(_process.known.values()), {}
    for sessions in known:
        if (session := sessions.mine) is not None:
            with suppress(CoheldError):
                session.end()


def _host() -> str:
    """Its processes see which of the others live: they have one directory, of one boot and one space of numbers."""
    directory = files.directory_here()
    if _process.host is None or _process.host[0] != directory:
        found = os.stat(files.lock_directory())
        whole = f"{files.boot_id()!r} {files.pid_namespace()} {found.st_dev} {found.st_ino}"
        _process.host = directory, hashlib.sha256(whole.encode()).hexdigest()[:16]
    return _process.host[1]


def _name_of(session: str) -> str:
    return f"session/{session}"


def _who(client: Client) -> bytes:
    """As away.py tells of the owner of a lock."""
    return msgspec.msgpack.encode((client.machine, client.pid, client.start, client.pid, "", "", time.time()))
