"""A semaphore at a store: the roll of who has its permits, and the part of a semaphore that is otherwise permits.py.

The roll is the state of the store's lock of that name, and is changed in short holds of it: take, give, wait.  A permit
belongs to the session of its process (backends/sessions.py), whose lease is renewed for all that the process has there.
A session that is gone for good is struck off the roll by whoever has it next.

What is true is what the process knows it has (Has): the roll is made equal to that, by a number and not by one more or
less, so that a change may be made twice, or be made later, where nobody knows if it was made:

    asking      goes up before the roll is changed, and down after it: with it, the roll never has less than the process
    held        what the process has.  Up once the store has said that the roll is changed; down before it is
    lost        was held under a session that is lost: who gives that back is told, once for each
    written     in the roll, at least: what was there before or after the last change that may have been made.  If it
                has less, somebody has struck this session off, or the store has lost it: what is held is lost
    waits       the places in the queue that are somebody's; loops: of the tasks among those

Where a change fails, or a wait ends with its place still there, the roll has more than the process: a thread makes it
right as soon as the store can be reached (_Janitor), or the session's end does.

Who waits.  The processes of a host queue at the gate, a local lock; the one that has it has a place in the roll's
queue.  It takes a permit if more are free than places are before its own, so hosts have their turn in the order in
which they came; who tries once looks at the permits alone.  A failed try leaves the lock as guards do, so that the next
loud release, of whichever host, wakes it.  Nobody says that a session has ended: it looks itself whether processes of
its own host live, in bounded sleeps, and asks the store of sessions when their leases may be over.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from secrets import randbits
from typing import Any

from . import native, waiting
from .backends import sessions, tasking
from .backends.sessions import Client, Session, Sessions
from .errors import BackendError, CoheldError, DeadlockError, LeaseLostError, NotLockedError
from .lockable import Lockable
from .process import at_fork
from .state import shared, snapshot
from .waiting import FOREVER, left

_SLICE = 0.02
"""How long who waits sleeps at most before it looks whether processes of its host live, seconds."""
_MOMENTS = 1.0
"""For how long the roll is waited for at a time, seconds: whoever has it asks the store twice."""


@dataclass(frozen=True)
class Holder:
    """So many permits of a session."""

    client: Client
    count: int


@dataclass(frozen=True)
class Place:
    """In the queue.  number: whoever waits has drawn it."""

    number: int
    client: Client


class Roll(Lockable):
    """Who has permits, by session, and who waits for one, in the order in which they came."""

    value: int = shared(0)
    holders: dict[str, Holder] = shared(default_factory=dict)
    queue: list[Place] = shared(default_factory=list)

    def free(self) -> int:
        return self.value - sum(holder.count for holder in self.holders.values())

    def before(self, number: int) -> int:
        """How many places there are before that one, or in all."""
        numbers = [place.number for place in self.queue]
        return numbers.index(number) if number in numbers else len(numbers)

    def clients(self) -> list[Client]:
        found = {holder.client.session: holder.client for holder in self.holders.values()}
        return list((found | {place.client.session: place.client for place in self.queue}).values())

    def bury(self, gone: Callable[[Client], bool]) -> bool:
        """By the owner: what sessions had that are gone is nobody's. Was there any?"""
        dead = {client.session for client in self.clients() if gone(client)}
        for session in dead & self.holders.keys():
            del self.holders[session]
        if any(place.client.session in dead for place in self.queue):
            self.queue[:] = [place for place in self.queue if place.client.session not in dead]
        return bool(dead)


@dataclass(eq=False)
class Has:
    """What this process has of one semaphore: see above.  guard: held by who changes it, for moments."""

    label: str
    held: int = 0
    asking: int = 0
    lost: int = 0
    written: int = 0
    session: Session | None = None
    waits: set[int] = field(default_factory=set)
    loops: dict[int, Any] = field(default_factory=dict)
    when_lost: list[Callable[[LeaseLostError], object]] = field(default_factory=list)
    guard: Any = field(default_factory=threading.RLock)
    permits: weakref.ref[FarPermits] | None = None

    def uses(self, session: Session) -> None:
        """What is had from now on is under that one. Raises: LeaseLostError: if it is lost already."""
        session.add(id(self), self)
        with self.guard:
            if self.session is not session:
                self.session, self.written = session, 0

    def rests(self) -> None:
        """If nothing is had or asked for any more, the session may end."""
        with self.guard:
            session = self.session
            if session is not None and not (self.held or self.asking or self.waits):
                session.drop(id(self))

    def lose(self, error: LeaseLostError) -> None:
        """Of its session."""
        with self.guard:
            taken, self.lost, self.held, self.written = self.held, self.lost + self.held, 0, 0
            self.session = None
        self.settle_soon()
        if taken:
            told = self.error(str(error))
            for call in list(self.when_lost):
                try:
                    call(told)
                except Exception:
                    logging.getLogger("coheld").exception(
                        "%s: what was to be called at its loss has failed", self.label
                    )

    def look(self) -> None:
        """Places of tasks whose loop is closed are nobody's."""
        with self.guard:
            closed = [number for number, loop in self.loops.items() if loop.is_closed()]
            for number in closed:
                del self.loops[number]
            self.waits.difference_update(closed)
        if closed:
            self.settle_soon()

    def settle_soon(self) -> None:
        if self.permits is not None and (permits := self.permits()) is not None:
            permits._settle_soon()

    def error(self, why: str) -> LeaseLostError:
        return LeaseLostError(f"semaphore {self.label}: this process has lost its permits: {why}", resource=self.label)


class FarPermits:
    """Of one semaphore.  mutex: of the store.  gate: held by the one of this host that waits for a permit."""

    def __init__(self, mutex: Any, gate: Any, value: int) -> None:
        self._mutex, self._gate, self._value = mutex, gate, value
        self._roll = Roll.__new__(Roll)
        native.hang(self._roll, mutex)
        self._seen: list[Client] = []
        self._look = FOREVER

    @property
    def has(self) -> Has:
        """Of this process, which may have been forked."""
        found = _process.of(self._mutex.label)
        found.permits = weakref.ref(self)
        return found

    @property
    def _sessions(self) -> Sessions:
        return sessions.at(self._mutex.away._store, self._mutex.away.lease)

    def _session(self) -> Session:
        """Of what this process has already, by an object with another lease as well; or of the next that it takes. May
        ask the store. Raises: BackendError."""
        has, session = self.has, self.has.session
        if session is not None and (has.held or has.asking or has.waits):
            return session.sessions.here()
        return self._sessions.here()

    # -- what a semaphore asks -----------------------------------------------------------------------------------------

    def open(self) -> int:
        """The value that it has; this one's, if it is new. Asks the store. Raises: BackendError."""
        self._mutex.attach()
        if found := self._roll.value:
            return int(found)
        if not self._enter(FOREVER):
            return 0
        try:
            value: int = self._roll.value or self._value
            self._roll.value = value
            return value
        finally:
            self._leave(False)

    def free(self) -> int:
        """A look without the lock; asks the store. Raises: BackendError."""
        self._mutex.attach()
        holders = snapshot(self._roll).holders.values()
        taken: int = sum(one.count for one in holders if not self._sessions.is_gone(one.client))
        return self._value - taken

    def why_not(self) -> str:
        """Who has them, as far as was seen."""
        mine = self._sessions.mine
        others = [str(one) for one in self._seen if mine is None or one != mine.client]
        return f"all permits are with {', '.join(others[:5]) or 'this process'}"

    def lost(self) -> bool:
        has = self._holding()
        return bool(has.lost) or has.session is None or not has.session.is_good()

    def ensure(self) -> None:
        """Ask the store. Raises: LeaseLostError, BackendError."""
        has = self._holding()
        if has.lost or has.session is None or not has.session.ensure():
            raise has.error("their session is over")

    def _holding(self) -> Has:
        if not (self.has.held or self.has.lost):
            raise NotLockedError(f"semaphore {self.has.label}: this is for who has a permit", resource=self.has.label)
        return self.has

    def take(self, seconds: float, steps: Any, patience: Any) -> bool:
        """By a thread: a permit within that time?"""
        if not seconds:
            return self.attempt(0, _MOMENTS) is None
        deadline, begun = time.monotonic() + seconds, patience()
        if not self._gate.acquire(timeout=None if seconds == FOREVER else seconds):
            return False
        try:
            return bool(waiting.run(steps(deadline, begun), self._mutex))
        finally:
            self._gate.release()

    def steps(self, deadline: float, patience: waiting.Patience) -> waiting.Steps[bool]:
        """By who has the gate: a permit by the deadline?"""
        number, taken, has = randbits(62), False, self.has
        if (task := tasking.current_task()) is not None:
            has.loops[number] = task.get_loop()
        try:
            while (epoch := (yield waiting.Inquiry(partial(self.attempt, number, _MOMENTS), self.undo))) is not None:
                patience.look()
                while epoch is not False and left(deadline) > 0 and not self._is_worth_it():
                    if (yield waiting.Sleep(epoch, min(deadline, time.monotonic() + _SLICE), deadline < FOREVER)):
                        break
                    patience.look()
                if left(deadline) <= 0:
                    return False
            taken = True
        finally:
            has.loops.pop(number, None)
            if not taken:
                self._stay_no_longer(number)
        return True

    def undo(self, found: int | bool | None) -> None:
        """Nobody wants what an attempt, or a take, has come to. Never blocks."""
        if found is None or found is True:
            with self.has.guard:
                self.has.held -= 1
            self._settle_soon()

    def attempt(self, number: int, seconds: float) -> int | bool | None:
        """None: this process has one more; the epoch that the next release moves on: none was free, and that place in
        the queue is its own (0: of who tries once); False: another has the roll for longer than that.  Asks the store.
        Raises: BackendError."""
        self._sessions.ask(self._seen)
        found = self._try(number, seconds)
        if not number and found not in (None, False) and self._sessions.ask(self._seen, anew=True):
            return self._try(number, seconds)
        return found

    def give(self, count: int, seconds: float) -> int | None:
        """So many back, if this process has them. How many it had; None: that would block, and nothing has changed.

        Raises: LeaseLostError: some of them were lost.  BackendError: a thread gives them back as soon as the store can
        be asked.
        """
        if not seconds:
            return None
        has = self.has
        if (session := has.session) is not None:
            session.is_good()  # else they are lost from here on
        with has.guard:
            if (had := has.held + has.lost) < count:
                return had
            lost = min(count, has.lost)
            has.lost -= lost
            has.held -= count - lost
        try:
            kept = lost < count and self._write(count - lost)
        except BaseException:
            self._settle_soon()
            raise
        if not kept:
            raise has.error("who works without one is to be told")
        return had

    # -- the roll ------------------------------------------------------------------------------------------------------

    def _enter(self, seconds: float) -> bool:
        """By a thread: the lock of the roll, for moments."""
        mutex = self._mutex
        if not mutex._take(self._roll, "permits", None if seconds == FOREVER else seconds):
            return False
        if mutex._record()[0] > 1:
            mutex.release()
            raise DeadlockError(
                f"{mutex.label}: this is a signal's handler, whose thread takes a permit or gives one back, and it "
                "cannot do so in between",
                resource=mutex.label,
            )
        return True

    def _leave(self, loud: bool) -> None:
        try:
            self._tell(loud)
        finally:
            self._out()

    def _tell(self, loud: bool) -> None:
        """By the owner: what is changed goes to the store, and the grant with it."""
        with self.has.guard:
            there = self._there()
            least = self.has.written = min(self.has.written, there)
        self._mutex.away.part(loud)
        with self.has.guard:
            if self.has.written == least:
                self.has.written = there

    def _there(self) -> int:
        """What the roll has of this process."""
        session = self.has.session
        holder = self._roll.holders.get(session.client.session) if session is not None else None
        return holder.count if holder is not None else 0

    def _out(self) -> None:
        if self._mutex._mine():
            self._mutex._local_give()

    def _try(self, number: int, seconds: float) -> int | bool | None:
        session, has = self._session(), self.has
        if not self._enter(seconds):
            return False
        taken = told = False
        try:
            freed = self._make_right(session) | self._is_first_here(session, number)
            taken = self._grab(session, number)
            self._seen = self._roll.clients()
            self._look = self._sessions.next_look(self._seen)
            if taken or not number:
                self._tell(freed)
                told = True
                return None if taken and self._confirm(session) else False if taken else 0
            self._mutex._listen()
            self._tell(freed)
            told = True
            return int(self._mutex._suspend(False))
        except LeaseLostError:  # of the roll's lock, and nothing has changed; or of the session
            return False
        finally:
            if not told:
                if self._mutex._mine():
                    self._mutex.away.part_quietly()
                if taken:
                    with has.guard:
                        has.asking -= 1
                self._settle_soon()
            self._out()

    def _make_right(self, session: Session) -> bool:
        """By the owner: the roll has what this process has, and nothing of the dead. Is there more for others?
        Raises: LeaseLostError: of the session."""
        has, roll = self.has, self._roll
        if not roll.value:  # the store has lost it
            roll.value = self._value
        freed = roll.bury(self._sessions.is_gone)
        has.uses(session)
        if self._there() < has.written and session.grant is not None:
            raise session.lose(session.grant, "the store has not what this process had")
        return self._put(session, 0) or freed

    def _put(self, session: Session, more: int) -> bool:
        """By the owner: the roll has so many more than is held. Has it less than before?"""
        has, roll, me = self.has, self._roll, session.client
        with has.guard:
            count, waits = has.held + has.asking + more, set(has.waits)
        there = self._there()
        if count and count != there:
            roll.holders[me.session] = Holder(me, count)
        elif there and not count:
            del roll.holders[me.session]
        stale = any(place.client == me and place.number not in waits for place in roll.queue)
        if stale:
            roll.queue[:] = [place for place in roll.queue if place.client != me or place.number in waits]
        return stale or count < there

    def _is_first_here(self, session: Session, number: int) -> bool:
        """By the owner, who has the gate (but for 0): other places of this host are of those who had it before, and do
        not wait any more. Was there any?"""
        roll, host = self._roll, session.client.host
        others = [place.number for place in roll.queue if place.client.host == host and place.number != number]
        if not number or not others:
            return False
        roll.queue[:] = [place for place in roll.queue if place.number not in others]
        return True

    def _grab(self, session: Session, number: int) -> bool:
        """By the owner: the roll has one more, or that place."""
        has, roll = self.has, self._roll
        if roll.free() > (roll.before(number) if number else 0):
            with has.guard:
                has.waits.discard(number)
                has.asking += 1
            self._put(session, 0)
            return True
        if number and all(place.number != number for place in roll.queue):
            with has.guard:
                has.waits.add(number)
            roll.queue.append(Place(number, session.client))
        return False

    def _confirm(self, session: Session) -> bool:
        """The store has said that it is so. False: it is lost already."""
        has = self.has
        good = session.is_good()
        with has.guard:
            has.asking -= 1
            if good and has.session is session:
                has.held += 1
                return True
        self._settle_soon()
        return False

    def _write(self, given: int) -> bool:
        """So many are given back. False: they were lost. Raises: BackendError."""
        has = self.has
        with has.guard:
            session = has.session
        if session is None:
            return False
        if not self._enter(_MOMENTS):  # who has the roll may stand still: a thread waits for it
            self._settle_soon()
            return True
        told = False
        try:
            self._make_right(session)
            self._tell(True)
            told = True
        except LeaseLostError:
            if session.error is None:
                raise BackendError(f"{self._mutex.label}: the lock was lost meanwhile", resource=has.label) from None
            return False
        finally:
            if not told and self._mutex._mine():
                self._mutex.away.part_quietly()
            self._out()
            has.rests()
        return True

    # -- waiting -------------------------------------------------------------------------------------------------------

    def _is_worth_it(self) -> bool:
        """Has one ended that stands in the roll, as this host sees; or is it time to ask the store?"""
        return time.monotonic() >= self._look or any(map(self._sessions.is_gone, self._seen))

    def _stay_no_longer(self, number: int) -> None:
        with self.has.guard:
            if number not in self.has.waits:
                return
            self.has.waits.discard(number)
        self._settle_soon()

    def _settle_soon(self) -> None:
        _process.janitor.call(self)

    def settle(self) -> bool:
        """By a thread: the roll is made right. False: not now."""
        has = self.has
        try:
            session = self._sessions.mine
            if not self._enter(_MOMENTS):
                return False
            told = False
            try:
                if session is not None and session.is_good():
                    self._make_right(session)
                else:
                    self._roll.bury(self._sessions.is_gone)
                self._tell(True)
                told = True
            finally:
                if not told and self._mutex._mine():
                    self._mutex.away.part_quietly()
                self._out()
        except (CoheldError, OSError):
            return False
        has.rests()
        return True


class _Janitor:
    """Makes rolls right: a thread, while there are any to do."""

    def __init__(self) -> None:
        self.guard = threading.RLock()
        self.todo: dict[int, FarPermits] = {}
        self.runs = False

    def call(self, permits: FarPermits) -> None:
        """Never blocks."""
        with self.guard:
            self.todo[id(permits.has)] = permits
            if self.runs:
                return
            self.runs = True
        try:
            threading.Thread(target=self._run, name="coheld permits", daemon=True).start()
        except RuntimeError:  # no room for it: the next one tries, and every change of the roll makes it right
            self.runs = False

    def _run(self) -> None:
        while True:
            with self.guard:
                todo, self.todo = self.todo, {}
                if not todo:
                    self.runs = False
                    return
            failed = {key: permits for key, permits in todo.items() if not permits.settle()}
            if failed:
                time.sleep(min(permits._sessions.lease for permits in failed.values()) / 6)
                with self.guard:
                    self.todo = failed | self.todo


class _Process:
    """What belongs to this process alone: a child of a fork holds no permit."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.has: dict[str, Has] = {}
        self.janitor = _Janitor()

    def of(self, label: str) -> Has:
        return self.has.get(label) or self.has.setdefault(label, Has(label))


_process = _Process()
at_fork(child=_process.begin)


def end() -> None:
    """Nobody holds anything any more."""
    _process.begin()
