"""The thread of a process that renews its leases, and gives back what nobody has any more: one for each store, while
somebody here holds a lock of it.

It looks every sixth of the shortest lease, and renews what is older than a third of its own.  A store that cannot be
reached is asked again at the next look, and said once, until all is renewed again; a lease whose time is over then is
lost: others may have it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from ..process import at_fork, start
from .store import Alarm, Change, Store, number_of

if TYPE_CHECKING:
    from .away import Grant

KEPT = 0.25
"""For how long a grant that is kept for who waits here is left alone, seconds: who can come has it in moments.  With
the time between two looks at it, less than the bound of a hand-over (engine.capabilities)."""
_TRIMS = 10.0
"""How often connections are looked at that nobody uses, seconds."""
_PATIENCE = 30.0
"""For how long the thread stays though nobody holds anything, seconds."""


class Leased(Protocol):
    """What has a lease: the Away of a lock, or a Session."""

    name: str
    lease: float
    grant: Grant | None

    @property
    def store(self) -> Store: ...

    def deserted(self, grant: Grant, /) -> bool:
        """Is it not to be renewed any more?"""

    def renewed(self, grant: Grant, until: float) -> None: ...

    def lose(self, grant: Grant, why: str) -> object: ...


class Keeper(Protocol):
    """What has kept a grant for the next of its host: the Away of a lock."""

    lease: float

    @property
    def store(self) -> Store: ...

    def give_up(self, nonce: bytes, passes: int, /) -> bool:
        """It goes to others, if nobody here has taken it since. False: not now."""


class _Renewer:
    """Of one store: one that does not answer holds up nobody else's leases."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.guard = threading.RLock()
        self.held: dict[int, Leased] = {}
        self.orphans: deque[tuple[Leased, bytes, float]] = deque()
        self.kept: dict[int, tuple[object, Keeper, bytes, int, float]] = {}
        self.wake = Alarm()
        self.tick = 0.0
        self.thread: threading.Thread | None = None
        self.ends = self.again = False
        self.said: set[str] = set()  # why leases could not be renewed, since all could

    def start(self, tick: float) -> None:
        with self.guard:
            self.tick = min(tick, self.tick or tick)
            if self.thread is None:
                thread = threading.Thread(target=self._run, name="coheld leases", daemon=True)
                start(thread)
                self.thread = thread  # not before: an interrupt, or no room for it, would leave nobody to renew
            self.wake.set()

    def end(self) -> None:
        """Blocks until the thread has ended."""
        self.held.clear()
        self.kept.clear()
        self.ends = True
        self.wake.set()
        if (thread := self.thread) is not None:
            thread.join()

    def _run(self) -> None:
        idle = trimmed = time.monotonic()
        while not self.ends:
            self.wake.wait(min(self.tick, KEPT / 2 if self.kept else _TRIMS))
            self._give_back()
            self._renew_all()
            self._give_up_kept()
            if time.monotonic() - trimmed > _TRIMS:
                trimmed = time.monotonic()
                with suppress(Exception):  # whatever it was, as below
                    self.store.trim()
            if self.held or self.orphans or self.kept:
                idle = time.monotonic()
            elif time.monotonic() - idle > _PATIENCE and self._leaves():
                return

    def _leaves(self) -> bool:
        """By the thread: nobody wants it any more.  It never waits for who starts it."""
        if not self.guard.acquire(blocking=False):
            return False
        try:
            if self.held or self.orphans or self.kept:
                return False
            self.thread = None
            return True
        finally:
            self.guard.release()

    def _give_back(self) -> None:
        for _ in range(len(self.orphans)):
            away, nonce, until = self.orphans.popleft()
            try:
                away.store.release(away.name, Change(nonce, number_of(nonce), None, None, False, False, False))
            except Exception:  # whatever it was, all leases of the store depend on this thread
                if time.monotonic() < until:
                    self.orphans.append((away, nonce, until))

    def _give_up_kept(self) -> None:
        for key, entry in list(self.kept.items()):
            _, away, nonce, passes, since = entry
            if time.monotonic() - since < KEPT:
                continue
            try:
                done = away.give_up(nonce, passes)
            except Exception:  # as above; it ends with its lease
                done = True
            if done and self.kept.get(key) is entry:  # else another was kept meanwhile
                del self.kept[key]

    def _renew_all(self) -> None:
        again, self.again = self.again, False
        tried = []
        for key, away in list(self.held.items()):
            grant = away.grant
            if grant is None:
                self.held.pop(key, None)
            elif grant.lost is None and (renewed := self._renew(away, grant, again)) is not None:
                tried.append(renewed)
        if self.said and tried and all(tried):
            self.said.clear()
            logging.getLogger("coheld").info("leases are renewed again, since %s answers", away.store.where)

    def _renew(self, away: Leased, grant: Grant, again: bool) -> bool | None:
        """Has the store answered?  None: it was not asked, as it is not time yet, or nobody has it."""
        begun = time.monotonic()
        if (grant.until - begun > away.lease * 2 / 3 and not again) or away.deserted(grant):
            return None
        try:
            kept = away.store.renew(away.name, grant.nonce, away.lease)
        except Exception as error:  # as above
            if (why := str(error)) not in self.said:  # most are the same, of whichever lock, and at each try
                self.said.add(why)
                logging.getLogger("coheld").warning("%s: its lease could not be renewed: %s", away.name, why)
            if grant.until <= time.monotonic() and away.grant is grant:
                away.lose(grant, f"it could not be renewed: {error}")
            return False
        if kept:
            away.renewed(grant, begun + away.lease)
        elif away.grant is grant and not grant.leaves:
            away.lose(grant, "another has had it since")
        return True


class _Process:
    """What belongs to this process alone."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.renewers: dict[Store, _Renewer] = {}


_process = _Process()
at_fork(child=_process.begin)


def while_held(away: Leased) -> None:
    """It is held from now on: its lease is renewed until it is not."""
    renewer = _renewer_of(away)
    renewer.held[id(away)] = away
    if renewer.thread is None or away.lease / 6 < renewer.tick:
        renewer.start(away.lease / 6)


def give_back(away: Leased, nonce: bytes) -> None:
    """By who was interrupted in the middle: the store may have given it, and nobody knows; it is asked to take it back,
    by a thread that nothing interrupts."""
    renewer = _renewer_of(away)
    renewer.orphans.append((away, nonce, time.monotonic() + away.lease))
    renewer.start(away.lease / 6)


def look_after(lock: object, away: Keeper, nonce: bytes, passes: int) -> None:
    """By who has kept that grant, as somebody here waits for the lock: one who was killed or stopped does not come, and
    nobody has told the lock.  lock: it lasts for as long."""
    renewer = _renewer_of(away)
    first = not renewer.kept
    renewer.kept[id(away)] = lock, away, nonce, passes, time.monotonic()
    if first:
        renewer.start(away.lease / 6)


def renew_soon(store: Store) -> None:
    """By the store: it may take this process for dead, so all leases are renewed now, whatever is left of them."""
    if (renewer := _process.renewers.get(store)) is not None:
        renewer.again = True
        renewer.wake.set()


def holds(store: Store) -> bool:
    """Has this process anything there whose lease is renewed?"""
    renewer = _process.renewers.get(store)
    return renewer is not None and bool(renewer.held)


def end() -> None:
    """Nobody holds anything any more; blocks until the threads have ended."""
    for renewer in list(_process.renewers.values()):
        renewer.end()
    _process.begin()


def _renewer_of(away: Leased | Keeper) -> _Renewer:
    store = away.store
    return _process.renewers.get(store) or _process.renewers.setdefault(store, _Renewer(store))
