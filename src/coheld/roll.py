"""A semaphore at a store: the roll of who has its permits, and the part of a semaphore that is otherwise permits.py.

The roll is the state of the store's lock of that name, and is changed in short holds of it: take, give, wait.  A permit
belongs to the session of its process (backends/sessions.py), whose lease is renewed for all that the process has there.
A session that is gone for good is struck off the roll by whoever has it next.

What is true is what the process knows it has (Has): the roll is made equal to that, by a number and not by one more or
less, so that a change may be made twice, or be made later, where nobody knows if it was made:

    asking      goes up before the roll is changed, and down after it: with it, the roll never has less than the process
    held        what the process has.  Up once the store has said that the roll is changed; down before it is
    got         of what is held, by the number of who asked for it: nobody has been told yet.  Where an interrupt comes
                before that, or the session is lost, nobody has had it
    lost        was held under a session that is lost: who gives that back is told, once for each
    written     in the roll, at least: what was there before or after the last change that may have been made.  If it
                has less, somebody has struck this session off, or the store has lost it: what is held is lost
    waits       the places in the queue that are somebody's; loops: of the tasks among those

All that a process has is under one of its sessions; objects with other leases have others, and whoever has the roll
puts what stands under another one under its own.

Where a change fails, or a wait ends with its place still there, the roll has more than the process: a thread makes it
right as soon as the store can be reached (_Janitor), or the session's end does.

Who waits.  The processes of a host queue at the gate, a local lock; the one that has it has a place in the roll's
queue.  It takes a permit if more are free than places are before its own, so hosts have their turn in the order in
which they came; who tries once looks at the permits alone.  A failed try leaves the lock as guards do, so that the next
loud release, of whichever host, wakes it.  Nobody says that a session has ended: it looks itself whether processes of
its own host live, in bounded sleeps, and asks the store of sessions when their leases may be over.
"""

from __future__ import annotations

import _thread
import logging
import sys
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
from .process import at_fork, start
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
    lost: int = 0
    written: int = 0
    session: Session | None = None
    asking: set[int] = field(default_factory=set)
    got: set[int] = field(default_factory=set)
    waits: set[int] = field(default_factory=set)
    loops: dict[int, Any] = field(default_factory=dict)
    when_lost: list[Callable[[LeaseLostError], object]] = field(default_factory=list)
    guard: Any = field(default_factory=threading.RLock)
    permits: weakref.ref[FarPermits] | None = None

    def uses(self, session: Session) -> None:
        """By the owner of the roll: what is had from now on is under that one. Raises: LeaseLostError: if it is lost
        already."""
        session.add(id(self), self)
        former = self.session
        if former is session:
            return
        if former is not None and not former.is_good() and (error := former.error) is not None:
            self.lose(former, error)  # who has found that out may not have come here yet
        with self.guard:
            self.session, self.written = session, 0
        if former is not None:
            former.drop(id(self))

    def rests(self) -> None:
        """By the owner of the roll: if nothing is had or asked for any more, the session may end."""
        with self.guard:
            session = self.session
            if session is not None and not (self.held or self.asking or self.waits):
                session.drop(id(self))

    def keeps(self, number: int) -> bool:
        """Who asked with that number is told from here on that it has a permit.  False: it has none any more."""
        with self.guard:
            there = number in self.got
            self.got.discard(number)
        return there

    def drop(self, number: int) -> bool:
        """What was asked with that number is nobody's. Was there anything?"""
        with self.guard:
            if there := number in self.got:
                self.held -= 1
            there = there or number in self.waits or number in self.asking
            for numbers in (self.got, self.waits, self.asking):
                numbers.discard(number)
        return there

    def lose(self, session: Session, error: LeaseLostError) -> None:
        """It is lost."""
        with self.guard:
            if self.session is not session:
                return
            taken = self.held - len(self.got)
            self.lost += taken
            self.held = self.written = 0
            self.got.clear()
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
        self._stay_out()
        try:
            self._enter(FOREVER)
            value: int = self._roll.value or self._value
            self._roll.value = value
            self._tell(False)
            return value
        finally:
            waiting.surely(self._out)

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
            return bool(waiting.run(self.one_step(), self._mutex))
        deadline, begun = time.monotonic() + seconds, patience()
        if not self._gate.acquire(timeout=None if seconds == FOREVER else seconds):
            return False
        try:
            return bool(waiting.run(steps(deadline, begun), self._mutex))
        finally:
            self._gate.release()

    def one_step(self) -> waiting.Steps[bool]:
        """By who tries once: a permit?"""
        number, taken = randbits(62), False
        try:
            found = yield self._ask(number, waits=False, last=True)
            taken = found is None and self.has.keeps(number)
        finally:
            if not taken:
                self._drop(number)
        return taken

    def steps(self, deadline: float, patience: waiting.Patience) -> waiting.Steps[bool]:
        """By who has the gate: a permit by the deadline?"""
        number, taken, last, has = randbits(62), False, False, self.has
        if (task := tasking.current_task()) is not None:
            has.loops[number] = task.get_loop()
        try:
            while (epoch := (yield self._ask(number, True, last))) is not None or not has.keeps(number):
                if last:
                    return False
                patience.look()
                while not (epoch is None or epoch is False or left(deadline) <= 0 or self._is_worth_it()):
                    if (yield waiting.Sleep(epoch, min(deadline, time.monotonic() + _SLICE), deadline < FOREVER)):
                        break
                    patience.look()
                last = left(deadline) <= 0
            taken = True
        finally:
            has.loops.pop(number, None)
            if not taken:
                self._drop(number)
        return True

    def _ask(self, number: int, waits: bool, last: bool) -> waiting.Inquiry:
        return waiting.Inquiry(partial(self.attempt, number, _MOMENTS, waits, last), partial(self._drop, number))

    def _drop(self, number: int, _found: object = None) -> None:
        """Nobody wants what was asked with that number, or what an attempt has come to. Never blocks."""
        if self.has.drop(number):
            self._settle_soon()

    def attempt(self, number: int, seconds: float, waits: bool, last: bool) -> int | bool | None:
        """None: this process has one more; the epoch that the next release moves on: none was free, and the place of
        that number in the queue is its own (but of who tries once); False: another has the roll for longer than that.
        last: who asks does not ask again; it may be the first of its process, and know nothing of sessions that are
        over.  Asks the store. Raises: BackendError."""
        self._sessions.ask(self._seen)
        found = self._try(number, seconds, waits)
        if last and found is not None and self._sessions.ask(self._seen, anew=True):
            return self._try(number, seconds, waits)
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
        try:
            with has.guard:
                if (had := has.held - len(has.got) + has.lost) < count:
                    return had
                lost = min(count, has.lost)
                has.lost -= lost
                has.held -= count - lost
            kept = lost < count and self._write()
        except BaseException:
            self._settle_soon()
            raise
        if not kept:
            raise has.error("who works without one is to be told")
        return had

    # -- the roll ------------------------------------------------------------------------------------------------------

    def _is_inside(self) -> bool:
        """Has this thread the roll?  Then this is a signal's handler."""
        return bool(self._mutex.attached and self._mutex._mine())

    def _stay_out(self) -> None:
        """Raises: DeadlockError."""
        if self._is_inside():
            raise DeadlockError(
                f"{self._mutex.label}: this is a signal's handler, whose thread takes a permit or gives one back, and "
                "it cannot take one in between",
                resource=self._mutex.label,
            )

    def _enter(self, seconds: float) -> bool:
        """By a thread that has not the roll: its lock, for moments.  Where this raises, it may be had: _out()."""
        return bool(self._mutex._take(self._roll, "permits", None if seconds == FOREVER else seconds))

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
        """The roll is others', and without what was not told."""
        if self._is_inside():
            if self._mutex.away.grant is not None:
                self._mutex.away.part_quietly()
            self._mutex._local_give()

    def _try(self, number: int, seconds: float, waits: bool) -> int | bool | None:
        session = self._session()
        self._stay_out()
        try:
            return self._try_inside(session, number, waits) if self._enter(seconds) else False
        except LeaseLostError:  # of the roll's lock, and nothing has changed; or of the session
            self._settle_soon()
            return False
        except BaseException:
            self.has.drop(number)  # whoever asked is told something else
            self._settle_soon()
            raise
        finally:
            waiting.surely(self._out)

    def _try_inside(self, session: Session, number: int, waits: bool) -> int | bool | None:
        """By the owner."""
        try:
            freed = self._make_right(session)
            freed |= waits and self._is_first_here(session, number)
            taken = self._grab(session, number, waits)
            self._seen = self._roll.clients()
            self._look = self._sessions.next_look(self._seen)
            if waits and not taken:
                self._mutex._listen()
            self._tell(freed)
            if taken:
                return None if self._confirm(session, number) else False
            if waits:
                return int(self._mutex._suspend(False))
            self.has.rests()
            return 0
        finally:
            self.has.asking.discard(number)

    def _make_right(self, session: Session) -> bool:
        """By the owner: the roll has what this process has, and nothing of the dead. Is there more for others?
        Raises: LeaseLostError: of the session."""
        has, roll = self.has, self._roll
        if not roll.value:  # the store has lost it
            roll.value = self._value
        freed = roll.bury(self._sessions.is_gone)
        former = has.session
        if former is not None and self._there() < has.written and (grant := former.grant) is not None:
            error = former.lose(grant, "the store has not what this process had")
            if former is session:
                raise error
        has.uses(session)
        return self._put(session) or freed

    def _put(self, session: Session) -> bool:
        """By the owner: the roll has what is had, under that session alone of this process. Has it less than before?"""
        has, roll, me = self.has, self._roll, session.client
        with has.guard:
            count, waits = has.held + len(has.asking), set(has.waits)
        there = self._there()
        if count and count != there:
            roll.holders[me.session] = Holder(me, count)
        elif there and not count:
            del roll.holders[me.session]
        others = [one.client.session for one in roll.holders.values() if one.client != me and me.is_beside(one.client)]
        for other in others:
            del roll.holders[other]
        stale = any(me.is_beside(place.client) and place.number not in waits for place in roll.queue)
        if stale:
            roll.queue[:] = [one for one in roll.queue if not me.is_beside(one.client) or one.number in waits]
        return stale or bool(others) or count < there

    def _is_first_here(self, session: Session, number: int) -> bool:
        """By the owner, who has the gate: other places of this host are of those who had it before, and do not wait any
        more. Was there any?"""
        roll, host = self._roll, session.client.host
        others = [place.number for place in roll.queue if place.client.host == host and place.number != number]
        if not others:
            return False
        roll.queue[:] = [place for place in roll.queue if place.number not in others]
        return True

    def _grab(self, session: Session, number: int, waits: bool) -> bool:
        """By the owner: the roll has one more, or that place."""
        has, roll = self.has, self._roll
        if roll.free() > (roll.before(number) if waits else 0):
            with has.guard:
                has.asking.add(number)
                has.waits.discard(number)
            self._put(session)
            return True
        if waits and all(place.number != number for place in roll.queue):
            with has.guard:
                has.waits.add(number)
            roll.queue.append(Place(number, session.client))
        return False

    def _confirm(self, session: Session, number: int) -> bool:
        """By the owner: the store has said that it is so. False: it is lost already."""
        has = self.has
        good = session.is_good()
        with has.guard:
            if good and has.session is session:
                has.held += 1
                has.got.add(number)
                return True
        self._settle_soon()
        return False

    def _write(self) -> bool:
        """What is given back is so in the roll, now or soon. False: it was lost. Raises: BackendError."""
        has = self.has
        if self._is_inside():  # this is a signal's handler
            self._settle_soon()
            return True
        session = None
        try:
            if not self._enter(_MOMENTS):  # who has the roll may stand still: a thread waits for it
                self._settle_soon()
            elif (session := has.session) is not None:
                self._make_right(session)
                self._tell(True)
                has.rests()
            else:
                return False
        except LeaseLostError:
            if session is None or session.error is None:
                raise BackendError(f"{self._mutex.label}: the lock was lost meanwhile", resource=has.label) from None
            return False
        finally:
            waiting.surely(self._out)
        return True

    # -- waiting -------------------------------------------------------------------------------------------------------

    def _is_worth_it(self) -> bool:
        """Has one ended that stands in the roll, as this host sees; or is it time to ask the store?"""
        return time.monotonic() >= self._look or any(map(self._sessions.is_gone, self._seen))

    def _settle_soon(self) -> None:
        _process.janitor.call(self)

    def settle(self) -> bool:
        """By a thread: the roll is made right. False: not now."""
        try:
            try:
                if not self._enter(_MOMENTS):
                    return False
                session = self.has.session
                if session is not None and session.is_good():
                    self._make_right(session)
                else:
                    self._roll.bury(self._sessions.is_gone)
                self._tell(True)
                self.has.rests()
            finally:
                waiting.surely(self._out)
        except (CoheldError, OSError):
            return False
        return True


class _Janitor:
    """Makes rolls right: a thread, while there are any to do."""

    def __init__(self) -> None:
        self.guard = threading.RLock()
        self.todo: dict[int, FarPermits] = {}
        self.runs = False

    def call(self, permits: FarPermits) -> None:
        """Never blocks: whoever calls may be collecting garbage, also where the interpreter ends, whose other threads
        stand still by then: what the process has ends with it."""
        if sys.is_finalizing():
            return
        with self.guard:
            self.todo[id(permits.has)] = permits
            if self.runs:
                return
            self.runs = True
        try:
            _thread.start_new_thread(self._start, ())  # threading's own start waits, for locks and for the thread
        except RuntimeError:  # no room for it: the next one tries, and every change of the roll makes it right
            self.runs = False
        except BaseException:  # of a signal's handler; two of them do no harm
            self.runs = False
            raise

    def _start(self) -> None:
        try:
            start(threading.Thread(target=self._run, name="coheld permits", daemon=True))
        except RuntimeError:  # as above
            self.runs = False

    def _run(self) -> None:
        while True:
            with self.guard:
                todo, self.todo = self.todo, {}
                if not todo:
                    self.runs = False
                    return
            failed = {key: permits for key, permits in todo.items() if not self._settles(permits)}
            if failed:
                time.sleep(min(_MOMENTS, *(permits._sessions.lease / 6 for permits in failed.values())))
                with self.guard:
                    self.todo = failed | self.todo

    def _settles(self, permits: FarPermits) -> bool:
        try:
            return permits.settle()
        except Exception:  # whatever it was, all rolls depend on this thread
            logging.getLogger("coheld").exception("%s: its permits could not be made right", permits.has.label)
            return False


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
