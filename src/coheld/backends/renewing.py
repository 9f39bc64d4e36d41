"""The thread of a process that renews its leases, and gives back what nobody has any more: one, while somebody here
holds a lock of a store.

It looks every sixth of the shortest lease, and renews what is older than a third of its own.  A store that cannot be
reached is asked again at the next look, and said once; a lease whose time is over then is lost: others may have it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from ..process import at_fork
from .store import Alarm, Change, number_of

if TYPE_CHECKING:
    from .remote import Away, Grant

_PATIENCE = 30.0
"""For how long the thread stays though nobody holds anything, seconds."""


class _Process:
    """What belongs to this process alone."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.guard = threading.Lock()
        self.held: dict[int, Away] = {}
        self.orphans: deque[tuple[Away, bytes, float]] = deque()
        self.running = False
        self.wake = Alarm()
        self.tick = 0.0
        self.thread: threading.Thread | None = None
        self.ends = False


_process = _Process()
at_fork(child=_process.begin)


def while_held(away: Away) -> None:
    """It is held from now on: its lease is renewed until it is not."""
    process = _process
    process.held[id(away)] = away
    if not process.running or away.lease / 6 < process.tick:
        _start(away.lease / 6)


def give_back(away: Away, nonce: bytes) -> None:
    """By who was interrupted in the middle: the store may have given it, and nobody knows; it is asked to take it back,
    by a thread that nothing interrupts."""
    _process.orphans.append((away, nonce, time.monotonic() + away.lease))
    _start(away.lease / 6)


def end() -> None:
    """Nobody holds anything any more; blocks until the thread has ended."""
    process, thread = _process, _process.thread
    process.held.clear()
    process.ends = True
    process.wake.set()
    if thread is not None:
        thread.join()
    process.begin()


def _start(tick: float) -> None:
    with _process.guard:
        _process.tick = min(tick, _process.tick or tick)
        if not _process.running:
            thread = threading.Thread(target=_run, args=(_process.held,), name="coheld leases", daemon=True)
            thread.start()
            _process.thread, _process.running = thread, True
        _process.wake.set()


def _run(held: dict[int, Away]) -> None:
    idle = time.monotonic()
    while held is _process.held and not _process.ends:
        _process.wake.wait(_process.tick)
        _give_back()
        for key, away in list(held.items()):
            grant = away.grant
            if grant is None:
                held.pop(key, None)
            elif grant.lost is None:
                _renew(away, grant)
        if held or _process.orphans:
            idle = time.monotonic()
        elif time.monotonic() - idle > _PATIENCE:
            with _process.guard:
                if not held and not _process.orphans:
                    _process.running = False
                    return


def _give_back() -> None:
    for _ in range(len(_process.orphans)):
        away, nonce, until = _process.orphans.popleft()
        try:
            away.store.release(away.name, Change(nonce, number_of(nonce), None, None, False, False, False))
        except Exception:  # whatever it was, all leases of the process depend on this thread
            if time.monotonic() < until:
                _process.orphans.append((away, nonce, until))


def _renew(away: Away, grant: Grant) -> None:
    begun = time.monotonic()
    if grant.until - begun > away.lease * 2 / 3 or away.deserted(grant):
        return
    try:
        kept = away.store.renew(away.name, grant.nonce, away.lease)
    except Exception as error:  # as above
        logging.getLogger("coheld").warning("%s: its lease could not be renewed: %s", away.name, error)
        if grant.until <= time.monotonic() and away.grant is grant:
            away.lose(grant, f"it could not be renewed: {error}")
        return
    if kept:
        away.renewed(grant, begun + away.lease)
    elif away.grant is grant:
        away.lose(grant, "another has had it since")
