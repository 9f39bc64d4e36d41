"""The ledger of a pool: who has what, and who waits for what; and what becomes of a request that nobody can end.

At a store what a process has is under its session there (backends/sessions.py), and whether others live is asked by who
waits, before it takes the ledger again; bury() then goes by the answer.  A request that others have struck off, as its
session was gone, is queued anew under another one, behind those who wait.
"""

from __future__ import annotations

import _thread
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from types import MappingProxyType
from typing import Any

from . import native, waiting
from .backends import sessions, tasking
from .backends.sessions import Client, Session, Sessions
from .errors import BackendError, CoheldError, LeaseLostError, LockTimeout
from .lockable import Lockable
from .process import at_fork, start_of
from .state import shared, snapshot

_SLICE = 0.05
"""How long who waits sleeps at most before it looks whether those who hold leases live, seconds."""
_STORE_MOMENTS = 1.0
"""waiting.MOMENTS, where whoever has the ledger asks a store meanwhile."""


@dataclass(frozen=True)
class Request:
    """A wait for one of those keys.  Of a process, whose death ends it; at a store, of its session there.  number:
    whoever asks has drawn it, and can withdraw what it asked for wherever an interrupt came."""

    number: int
    pid: int
    start: int
    keys: list[str]
    client: Client | None = None


@dataclass(frozen=True)
class Held:
    """A resource is somebody's."""

    number: int
    pid: int
    start: int
    client: Client | None = None


class NotGot(LockTimeout):
    """The deadline has passed, and nothing of the request is left."""


class Ledger(Lockable):
    """Who has what, and who waits for what, in the order in which they came.  A free resource goes to the first that it
    fits: each takes its own, and leaves what an earlier one could have."""

    leases: dict[str, Held] = shared(default_factory=dict)
    queue: list[Request] = shared(default_factory=list)
    seen: Mapping[str, str] = MappingProxyType({})
    """Of a store's: who had what when a request of this process was not served last."""

    def serve(self, steps: waiting.Steps[str]) -> str:
        """By the owner, of a thread."""
        return waiting.run(steps, native.lock_of(self))

    def fitting(self, request: Request) -> str | None:
        """By the owner: what the request may take now; all who are queued are before one that is not."""
        earlier: set[str] = set()
        for other in self.queue:
            if other.number == request.number:
                break
            earlier.update(other.keys)
        return next((key for key in request.keys if key not in self.leases and key not in earlier), None)

    def take(self, request: Request) -> str | None:
        """By the owner: what the request has from now on; None: nothing yet."""
        if (key := self.fitting(request)) is not None:
            self.leases[key] = Held(request.number, request.pid, request.start, request.client)
            self.withdraw(request.number)
        return key

    def withdraw(self, number: int) -> None:
        """By the owner: it waits no more."""
        self.queue[:] = [request for request in self.queue if request.number != number]

    @Lockable.locked
    def give_back(self, key: str, number: int) -> bool:
        """False: this process does not have it so."""
        held = self.leases.get(key)
        if held is None or (held.number, held.pid, held.start) != (number, *me()):
            return False
        del self.leases[key]
        return True

    def forget(self, numbers: Collection[int]) -> None:
        """Nothing of the requests is left. Raises: LockTimeout: if who has the ledger does not go on."""
        forget = self._forget_soon if native.lock_of(self).far else self._forget_at_once
        forget(numbers)

    @Lockable.locked(timeout=waiting.MOMENTS)
    def _forget_at_once(self, numbers: Collection[int]) -> None:
        self.keep(lambda one: one.number not in numbers)

    @Lockable.locked(timeout=_STORE_MOMENTS)
    def _forget_soon(self, numbers: Collection[int]) -> None:
        self.keep(lambda one: one.number not in numbers)

    def bury(self) -> None:
        """By the owner: what dead processes, or lost requests of this one, had or waited for is nobody's."""
        lost.note_waits()
        gone = set(lost.numbers)
        peers = peers_of(self)
        alive: dict[tuple[int, int, Client | None], bool] = {}
        for one in self._all():
            if (who := (one.pid, one.start, one.client)) not in alive:  # each is looked at once: most have many
                alive[who] = lives(one, peers)
        self.keep(lambda one: alive[one.pid, one.start, one.client] and one.number not in gone)

    def _all(self) -> list[Held | Request]:
        return [*self.leases.values(), *self.queue]

    def _clients(self) -> list[Client]:
        """Each once."""
        return list(dict.fromkeys(one.client for one in self._all() if one.client is not None))

    def keep(self, stays: Callable[[Held | Request], bool]) -> None:
        """By the owner: the others go."""
        for key in [key for key, one in self.leases.items() if not stays(one)]:
            del self.leases[key]
        self.queue[:] = [one for one in self.queue if stays(one)]

    def lessees(self, keys: Collection[str]) -> str:
        """Whose processes have these, as messages say it; without the lock."""
        if native.lock_of(self).far:  # it is not asked for words
            holders = sorted({who for key, who in self.seen.items() if key in keys})
        else:
            pids = sorted({one.pid for key, one in snapshot(self).leases.items() if key in keys})
            holders = [f"process {pid}" for pid in pids]
        return ", ".join(holders[:5]) or "others, who have just given them back"

    def steps(self, request: Request, deadline: float) -> waiting.Steps[str]:
        """By the owner: what the request has got.  One that does not wait is not queued.

        Raises: NotGot: nothing, by the deadline.  LockTimeout: the ledger could not be had again, and is not held.
        """
        lock, queued, peers, keys = native.lock_of(self), False, peers_of(self), request.keys
        depth, _, (_, _, _, method) = lock._record()
        patience: waiting.Patience | None = None
        while (key := self.take(request)) is None:
            self.bury()
            if (key := self.take(request)) is not None:
                break
            if lock.far:
                self.seen = {key: str(one.client) for key, one in self.leases.items()}
            if waiting.left(deadline) <= 0:
                key = yield from self._last_try(request, peers)
                break
            if all(other.number != request.number for other in self.queue):
                self.queue.append(request)
            clients = self._clients()
            if lock.far:
                yield waiting.Depart(not queued)
            elif lock.pending:
                lock._commit()
            epoch = lock._suspend(not queued)
            queued = True
            patience = patience or waiting.telling(lock, lambda: f"what would do is with {self.lessees(keys)}")
            patience.look()
            if peers is None:
                yield waiting.Sleep(epoch, min(deadline, monotonic() + _SLICE), deadline < waiting.FOREVER)
            else:
                yield from self._doze(epoch, deadline, peers, clients, patience)
                request = yield waiting.Inquiry(partial(_anew, request, self, peers, clients))
            nested = depth > 1  # a signal's handler waits: the call that it came in goes on with the ledger
            again = waiting.FOREVER if nested else monotonic() + moments(self, deadline)
            if not (yield waiting.Take(self, method, depth, again, keep=nested)):
                raise LockTimeout
        return key

    def _last_try(self, request: Request, peers: Sessions | None) -> waiting.Steps[str]:
        """By the owner.  Whoever asks may be the first of its process, and know nothing of sessions that are over.
        Raises: NotGot."""
        if peers is not None and (yield waiting.Inquiry(partial(peers.ask, self._clients(), anew=True))):
            self.bury()
            if (key := self.take(request)) is not None:
                return key
        self.withdraw(request.number)
        raise NotGot

    def _doze(
        self, epoch: int, deadline: float, peers: Sessions, clients: Collection[Client], patience: waiting.Patience
    ) -> waiting.Steps[None]:
        """Until there is news, or somebody's session may be over."""
        look = peers.next_look(clients)
        while waiting.left(deadline) > 0 and monotonic() < look and not any(map(peers.is_gone, clients)):
            if (yield waiting.Sleep(epoch, min(deadline, monotonic() + _SLICE), deadline < waiting.FOREVER)):
                break
            patience.look()


def moments(ledger: Ledger, deadline: float) -> float:
    """How long who has until that deadline waits for the ledger, which everybody has for moments only, seconds."""
    least = _STORE_MOMENTS if native.lock_of(ledger).far else waiting.MOMENTS
    return max(waiting.left(deadline), least)


def peers_of(ledger: Ledger) -> Sessions | None:
    """Whose sessions it goes by; None: it is of this machine."""
    lock: Any = native.lock_of(ledger)
    return sessions.at(lock.away._store, lock.away.lease) if lock.far else None


def enrol(number: int, ledger: Ledger) -> Client | None:
    """For a new request: who asks.  A store may be asked. Raises: BackendError."""
    if (peers := peers_of(ledger)) is None:
        return None
    session = peers.here()
    lost.keep_session(number, session)
    return session.client


def _anew(request: Request, ledger: Ledger, peers: Sessions, clients: Collection[Client]) -> Request:
    """The request, under a session that is good; and the store is asked of others' whose time has come."""
    peers.ask(clients)
    return replace(request, client=enrol(request.number, ledger))


def lives(one: Held | Request, peers: Sessions | None) -> bool:
    """Does its process, or the session that it was of?"""
    if one.client is not None and peers is not None:
        return not peers.is_gone(one.client)
    return start_of(one.pid) == one.start


def me() -> tuple[int, int]:
    pid = os.getpid()
    return pid, start_of(pid) or 0


class _Lost:
    """Requests of this process that nobody can end any more: their coroutine was destroyed, or its loop closed while it
    waited, or their Lease dropped.

    Whoever finds that out may be collecting garbage, in the middle of anything: the same thread may have the ledger, or
    be about to change what stands in it.  So it only notes the number, and neither waits nor looks at the ledger.

    noted       who looks for what the dead had (bury), or what is free, passes it over from here on, in this process
    forgotten   it is taken out of the ledger, and committed: nobody anywhere is kept out by it.  A thread does that, at
                once, as others wait who know nothing of the note, and nobody else of this process may ever come again.
                It begins again until that is done, so the note goes last

    Why no note stays: busy is taken by who starts the thread, after the note, and given back by the thread, which then
    looks for notes once more: either finds what the other did.  Where no thread is to be had, the next note tries.

    ledgers     of all requests that a ledger may know of, by number.  What the collector has found to be garbage may
                be used no more: its weak references are gone.  So the ledger of a request is none until that ends
    waits       the loops of those that wait
    sessions    at a store: of those that may have something there
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """In this process; a child of a fork has no requests."""
        self.ledgers: dict[int, Ledger] = {}
        self.waits: dict[int, Any] = {}
        self.numbers: dict[int, None] = {}
        self.sessions: dict[int, Session] = {}
        self.busy = threading.Lock()

    def begin_request(self, number: int, ledger: Ledger) -> None:
        """By the owner of the ledger, before that knows of it."""
        if (task := tasking.current_task()) is not None:
            self.waits[number] = task.get_loop()
        self.ledgers[number] = ledger

    def keep_session(self, number: int, session: Session) -> None:
        """It stays while the request may have something. Raises: LeaseLostError: if it is over."""
        session.add(number, self)
        self.sessions[number] = session

    def lose(self, _session: Session, _error: LeaseLostError) -> None:
        """Of a session: who gives back what is not its own any more is told then."""

    def look(self) -> None:
        """Of a session."""
        self.note_waits()

    def note_waits(self) -> None:
        """Those of closed loops. Never blocks."""
        for number, loop in list(self.waits.items()):
            if loop.is_closed():
                self.note(number)

    def note(self, number: int) -> None:
        """Nothing where it has ended. Never blocks."""
        if number in self.ledgers and not sys.is_finalizing():
            self.numbers[number] = None
            self._begin_thread()

    def end(self, number: int) -> None:
        """Nothing of it is in the ledger."""
        self.waits.pop(number, None)
        self.ledgers.pop(number, None)
        self.numbers.pop(number, None)
        if (session := self.sessions.pop(number, None)) is not None:
            session.drop(number)

    def _begin_thread(self) -> None:
        if self.busy.acquire(blocking=False):
            try:
                _thread.start_new_thread(self._start, ())  # threading's own start waits, for locks and for the thread
            except RuntimeError:
                self.busy.release()

    def _start(self) -> None:
        try:
            threading.Thread(target=self._run, name="coheld pool", daemon=True).start()
        except RuntimeError:
            self.busy.release()

    def _run(self) -> None:
        while self.numbers:
            self._forget_all()
        self.busy.release()
        if self.numbers:
            self._begin_thread()

    def _forget_all(self) -> None:
        """One try for each ledger: another's owner may have been stopped."""
        by_lock: dict[Any, dict[int, Ledger]] = {}
        for number in list(self.numbers):
            if (ledger := self.ledgers.get(number)) is None:  # it has ended meanwhile
                self.end(number)
            else:
                by_lock.setdefault(native.lock_of(ledger), {})[number] = ledger
        for lock, ledgers in by_lock.items():
            try:
                next(iter(ledgers.values())).forget(ledgers)
            except LockTimeout:
                continue
            except (CoheldError, OSError) as error:
                if lock.far and isinstance(error, BackendError | LeaseLostError):
                    time.sleep(_STORE_MOMENTS)  # the store cannot be reached, or the hold of the ledger was lost
                    continue
                # else there is no such ledger any more
            for number in ledgers:
                self.end(number)


lost = _Lost()
at_fork(child=lost.begin)
tasking.when_closed.append(lost.note_waits)
