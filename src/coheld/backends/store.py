"""What a store on another host gives: five verbs over a resource, and the values that they take and return.

    try_acquire     the lock, if it is free and it is the caller's turn; with it comes the state that it guards
    release         the change and the lock go back in one step; or only the change, and the lease begins anew
    renew           the lease begins anew
    load            the state of the last commit, for who does not have the lock
    watch           from now on who waits is told when it may be worth to try again

Re-entry, threads, deadlines, guards, tasks and cohorts are not a store's: remote.py has them.  What a store promises is
that one grant at a time is the last one, that its token is greater than all before, and that a change is made only by
the last grant, as a whole, and once: release is asked again where the answer was lost.
"""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
UNKNOWN = -1
"""A version that no state has."""


@dataclass(frozen=True, slots=True)
class Known:
    """A state by its number.  incarnation: of the store, or of the resource in it: what was wiped begins another."""

    incarnation: bytes = b""
    version: int = UNKNOWN


@dataclass(frozen=True, slots=True)
class Found:
    """The state of the last commit.  payload: None: it is the one that is known, or none was committed yet.  holder:
    who has the lock, as it was told.  token, nonce: of the last grant; nonce is empty if that is over.  created: the
    first state was made."""

    known: Known
    payload: bytes | None
    holder: bytes = b""
    token: int = 0
    nonce: bytes = b""
    created: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """For a lock.  nonce: of the grant; one that is the last one still is granted again.  who: for others to see.
    lease: seconds.  known: the state that needs not be sent.  queue: a place among those who wait, if it is not
    free."""

    nonce: bytes
    who: bytes
    lease: float
    known: Known
    queue: bool


@dataclass(frozen=True, slots=True)
class Granted:
    """The caller has it.  dead: who had it, and lost it without giving it back; empty: nobody, or that was put right
    since.  created: the first state was made."""

    token: int
    found: Found
    dead: bytes
    created: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """Another has it, or is in turn.  seconds: until it is worth to ask again, if nobody says anything before.  holder:
    who has it, as it was told."""

    seconds: float
    holder: bytes


@dataclass(frozen=True, slots=True)
class Change:
    """What the holder of that nonce does.  number: by number_of, so that it is made once.  payload: the new state, or
    None.  keep: seconds for which the lock stays, or None.  loud: who waits for the state hears of it.  recovered: what
    the dead one left is put right.  created: the first state is made."""

    nonce: bytes
    number: bytes
    payload: bytes | None
    keep: float | None
    loud: bool
    recovered: bool
    created: bool


def number_of(nonce: bytes) -> bytes:
    """Of a new change of that grant: greater than those before, by whichever process of the host that has it; a change
    that was on its way for long is known by that, and not made any more."""
    return nonce + b"%019d" % time.monotonic_ns()


class Alarm:
    """What who waits sleeps on: as threading.Event, but in one step each, so that no interrupt leaves it half done."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._lock.acquire()

    def set(self) -> None:
        with suppress(RuntimeError):  # it is set
            self._lock.release()

    def clear(self) -> None:
        self._lock.acquire(blocking=False)

    def wait(self, seconds: float) -> None:
        """Until it is set, which it is no more then, or for so long. Handlers of signals run."""
        self._lock.acquire(timeout=max(0.0, min(seconds, threading.TIMEOUT_MAX)))


class Store(Protocol):
    """Of one place, in this process.  All of it may block for as long as the place's time-outs say, and raises
    BackendError."""

    where: str
    """As messages name it; no secrets."""

    def try_acquire(self, name: str, ask: Ask) -> Granted | Refused: ...

    def release(self, name: str, change: Change) -> int | None:
        """The version of the state then; None: another has had the lock since, and nothing has changed."""

    def renew(self, name: str, nonce: bytes, lease: float) -> bool:
        """False: another has had it since."""

    def settle(self, name: str, nonce: bytes, lease: float) -> bool:
        """From now on no crash of the store makes it forget the token of that grant. False: another has had it
        since."""

    def load(self, name: str, known: Known) -> Found: ...

    def watch(self, name: str, alarm: Alarm) -> None:
        """From now on it is set whenever it may be worth to try again; as long as somebody else keeps it."""

    def leave(self, name: str) -> None:
        """It waits no more."""

    def listen(self, name: str, lock: Bell) -> None:
        """From now on its ring() is called after each loud release, by any holder."""

    def remove(self, name: str, nonce: bytes) -> bool:
        """All of it goes, by who has it. Who waits for it has it anew. False: another has had it since."""

    def done_by_thread(self, work: Callable[[], T]) -> Future[T]:
        """It is called by one of a few threads that are for this alone: none of what they do waits for anything but the
        store, and for moments."""

    def trim(self) -> None:
        """Connections that nobody has used since the last time are closed, but for a few. Never blocks for long."""


class Bell(Protocol):
    """Who wants to hear of changes."""

    def ring(self) -> bool:
        """By a thread of the store's. False: not now, ring again soon."""

    def is_wanted(self) -> bool:
        """Does anybody wait for it? Never blocks."""
