"""A lock that a store on another host has: the local lock of the same name, and the store's grant.

Processes of one host first agree through the local lock (lock cohorting: Dice, Marathe and Shavit, 2012), so a host
sends one contender; re-entry, threads, tasks, deadlines, who waits and who died here are the local lock's.  Whoever has
that needs the grant as well, before a body runs:

    local lock    grant          state
    -             -              free, here
    held          -              asks the store, or waits there
    held          this owner's   held: the body runs
    -             kept in memo   the next of this host has it without the store being asked, if somebody waits here

How the grant comes, goes and is lost:

    taken         the store gives a nonce of ours its lease, and a token greater than all before; or the memo has it
    renewed       by a thread of this process, while the owner is of this process (a frozen one keeps no lease alive)
    lost          the store says so, or its time is over and nobody could ask: the owner is told (see leases.py)
    given back    with the change, in one step; before the local lock, so nobody here runs without it

A change is made in the store first, and there only by the last nonce; then in the local state, which is a copy, so that
fields are read as ever.  Killed between the two, the memo says that the copy is not known to be one.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import msgspec

from .. import native
from ..errors import BackendError, CoheldError, DeadlockError, IncompatibleError, LeaseLostError, NotLockedError
from ..owner import Owner
from ..process import at_fork, thread_name
from ..waiting import FOREVER, left, patience
from . import renewing, waiters
from .memo import Memo
from .store import Alarm, Ask, Change, Found, Granted, Known, Refused, Store, number_of
from .tasking import current_task

if TYPE_CHECKING:
    from .base import Handle

_PASS_BITS = 12
_SLICE = 0.2
"""For how long who waits for a task looks away, seconds: nobody may want it any more."""
_RETRY = 0.05
"""Between two tries of a store that cannot be reached, seconds."""
_who = msgspec.msgpack.Decoder(tuple[str, int, int, int, str, str, float]).decode


class Grant:
    """What the owner has.  lost: what it is told, once that is known."""

    __slots__ = ("lost", "nonce", "token", "until")

    def __init__(self, nonce: bytes, token: int, until: float) -> None:
        self.nonce, self.token, self.until = nonce, token, until
        self.lost: LeaseLostError | None = None


class Away:
    """All of a lock that is not local; one per handle.  guard: held by who changes grant, for moments."""

    def __init__(self, lock: Handle, store: Callable[[], Store], name: str, lease: float) -> None:
        self._lock: weakref.ref[Any] = weakref.ref(lock)
        self._store = store
        self.name, self.lease = name, lease
        self.when_lost: list[Callable[[LeaseLostError], object]] = []
        self.begin()
        _all.add(self)

    def begin(self) -> None:
        """In this process nobody has it."""
        self.guard = threading.RLock()
        self.alarm = Alarm()
        self.grant: Grant | None = None
        self.taken_by: Owner | None = None
        self.memo: Memo | None = None
        self.segment: Any = None
        self.pending: Found | None = None  # of the grant, and not in the local state yet
        self.parting: tuple[float | None, bool] | None = None  # for how long the grant stays, and is it loud
        self.departing: tuple[float | None, bool] | None = None  # the same, settled before
        self.sent: tuple[bytes, int] | None = None  # a change that was made ahead of the local commit, and its version
        self.recovers = self.makes = False
        self.between = False  # its thread asks the store for the grant, or gives it back
        self.level = 1  # of the local lock, on which it was taken
        self.dead = b""
        self.elsewhere = b""
        self.seen = Found(Known(), None)
        self.watched = self.heard = False

    @property
    def store(self) -> Store:
        return self._store()

    @property
    def lock(self) -> Any:
        """A Mutex of far_mutex()."""
        lock = self._lock()
        assert lock is not None
        return lock

    @property
    def label(self) -> str:
        lock = self._lock()
        return f"{self.name!r}" if lock is None else str(lock.label)

    # -- the grant -----------------------------------------------------------------------------------------------------

    def secure(self, obj: Any, deadline: float, stop: bytearray | None = None) -> bool:
        """By the new owner of the local lock: the grant as well; False: not by the deadline.  The caller gives the
        local lock back where this raises."""
        memo = self._memo_here()
        if memo.passes_on(self.lease):
            memo.passes += 1
            self._have(Grant(memo.nonce, memo.token << _PASS_BITS | memo.passes, memo.until / 1e9))
        elif not self._asked(memo, deadline, stop):
            return False
        lock = self.lock
        try:
            if memo.recovers:
                lock._flag(native.RECOVERING, True)
            self._absorb(obj)
            if lock.flags & native.RECOVERING:
                lock._recover(obj)
            if obj is not None:
                lock.create(obj)
        except BaseException:
            self.part_quietly()
            raise
        return True

    def _have(self, grant: Grant) -> None:
        with self.guard:
            self.grant, self.parting, self.departing, self.sent = grant, None, None, None
            self.recovers = self.makes = False
            self.pending = None
            self.level = self.lock._record()[0]
            self.taken_by = self.lock._owner()
        renewing.while_held(self)

    def _memo_here(self) -> Memo:
        """By the owner."""
        segment = self.lock.segment
        if self.memo is None or self.segment is not segment:
            self.memo = Memo(_memo_of(segment))
            self.segment = segment
        return self.memo

    def may_pass_on(self) -> bool:
        """By anybody: can the grant be had here without the store being asked, as far as this process has seen?"""
        memo = self.memo
        return memo is not None and self.segment is self.lock.segment and memo.passes_on(self.lease)

    def stays_here(self, held: bool) -> bool:
        """Has this host the grant, as far as is seen from outside?  held: somebody here has the local lock."""
        memo = self._memo_seen()
        return bool(memo is not None and memo.valid and (held or memo.until > time.monotonic_ns()))

    def is_ours(self, nonce: bytes) -> bool:
        """Did this host ask for the grant of that nonce?"""
        memo = self._memo_seen()
        return memo is not None and memo.asked != 0 and memo.nonce == nonce

    def _memo_seen(self) -> Memo | None:
        segment = self.lock.segment
        return self.memo if self.segment is segment else Memo.seen(_memo_of(segment))

    def _asked(self, memo: Memo, deadline: float, stop: bytearray | None) -> bool:
        self.between = True
        try:
            return self._ask(memo, deadline, stop)
        finally:
            self.between = False

    def _ask(self, memo: Memo, deadline: float, stop: bytearray | None) -> bool:
        nonce, look = memo.ask(), waiters.begin_patience(self.lock, stop is not None, False).look
        queue, queued, who = self.watched, False, self._who()
        try:
            while True:
                self.alarm.clear()
                begun = time.monotonic()
                answer = self.store.try_acquire(self.name, Ask(nonce, who, self.lease, memo.known, queue))
                if isinstance(answer, Granted):
                    self._granted(memo, nonce, answer, begun + self.lease)
                    return True
                queued, self.elsewhere = queue, answer.holder
                if left(deadline) <= 0 or (stop is not None and stop[0]):
                    self._stay_no_longer(queued)
                    return False
                if queued:
                    look()
                    self._sleep(answer, deadline, stop)
                else:
                    self._watch()
                    queue = True
        except BaseException:
            self.drop(nonce)
            self._stay_no_longer(queued)
            raise

    def _sleep(self, answer: Refused, deadline: float, stop: bytearray | None) -> None:
        seconds = min(answer.seconds, left(deadline), _SLICE if stop is not None else FOREVER)
        self.alarm.wait(seconds)

    def _watch(self) -> None:
        self.store.watch(self.name, self.alarm)
        self.watched = True

    def _stay_no_longer(self, queued: bool) -> None:
        if queued:
            with suppress(BackendError):
                self.store.leave(self.name)

    def _granted(self, memo: Memo, nonce: bytes, answer: Granted, until: float) -> None:
        stale = answer.found.known != memo.known
        if stale:
            memo.forget_state()  # before it begins: who finds this process killed must not pass the grant on with it
        memo.created, memo.recovers, self.dead = int(answer.created), int(bool(answer.dead)), answer.dead
        if not answer.created:
            self.lock._flag(native.CREATED, False)  # of a store that was wiped since
        memo.begin(answer.token, until)
        self.elsewhere = b""
        self._have(Grant(nonce, memo.token << _PASS_BITS | memo.passes, until))
        self.pending = answer.found if stale else None

    def _who(self) -> bytes:
        who = self.lock._record()[2]
        thread = thread_name(who[0], who[2])  # current_thread() would add one that is not Python's for good
        return msgspec.msgpack.encode((socket.gethostname(), *who, thread, time.time()))

    # -- the state -----------------------------------------------------------------------------------------------------

    def _absorb(self, obj: Any) -> None:
        """What the store has becomes the local state, if this process knows of what class it is."""
        lock, found, memo = self.lock, self.pending, self.memo
        if found is None or memo is None:
            return
        if found.payload is None and not lock.version:
            self.pending = None  # nothing, here and there
            memo.mirrors(found.known)
            return
        view = lock.view
        if view is None and obj is not None and (schema := lock.find_schema(type(obj))) is not None:
            view = schema.bind(lock)  # which absorbs it
        if view is not None:
            self.absorbed_by(view)

    def absorbed_by(self, view: Any) -> None:
        """By the owner: the local state of that view becomes what the store has."""
        found, memo = self.pending, self.memo
        if found is None or memo is None:
            return
        view._absorb(found.payload, bool(memo.created))
        self.pending = None
        memo.mirrors(found.known)

    def change(self, payload: bytes, made: bool) -> int:
        """By the owner: the store has that state from now on. Its version."""
        if self.sent is not None and self.sent[0] == payload:
            version, self.sent = self.sent[1], None
            return version
        keep, loud = self.parting or (self.lease, False)
        return self._tell(payload, made, keep, loud)

    def mirrored(self, version: int) -> None:
        """By the owner: the local state is that."""
        if self.memo is not None:
            self.memo.mirrors(Known(bytes(self.memo.map[144:160]), version))

    def _tell(self, payload: bytes | None, made: bool, keep: float | None, loud: bool) -> int:
        """The store is told; the version of its state then. Raises: LeaseLostError."""
        grant, memo = self._living()
        if payload is not None:
            memo.forget_state()
        if keep is None:
            memo.pause()
            self.between = True
        change = Change(grant.nonce, number_of(grant.nonce), payload, keep, loud, self.recovers, made or self.makes)
        begun = time.monotonic()
        try:
            version = self.store.release(self.name, change)
        except BaseException as error:
            if payload is not None:  # the change may be made, or not: nothing can be built on either
                grant.lost = self._unknown(error)
            raise
        if version is None:
            raise self.lose(grant, "another has had it since")
        self._told(change, grant, memo, begun + self.lease)
        return version

    def _living(self) -> tuple[Grant, Memo]:
        """By the owner. Raises: LeaseLostError: if its grant is known to be none."""
        grant, memo = self.grant, self.memo
        if grant is None or memo is None:
            raise LeaseLostError(f"{self.label}: this process has no grant of it any more", resource=self.label)
        if grant.lost is not None:
            raise grant.lost
        return grant, memo

    def _told(self, change: Change, grant: Grant, memo: Memo, until: float) -> None:
        """The store has made the change."""
        with self.guard:
            self.recovers = self.makes = False
            if change.recovered:
                memo.recovers = 0
            if change.created:
                memo.created = 1
            if change.keep is None:
                memo.end()
                self.grant = None
            else:
                grant.until = until
                memo.until = int(until * 1e9)

    def _unknown(self, error: BaseException) -> LeaseLostError:
        return LeaseLostError(
            f"{self.label}: the store did not say whether a change before this was made ({error}); read it again, with "
            "the lock",
            resource=self.label,
        )

    def load(self) -> Found:
        """The last commit; by anybody. Raises: BackendError."""
        seen = self.seen
        found = self.store.load(self.name, seen.known)
        if found.known == seen.known:
            found = replace(found, payload=seen.payload)
        self.seen = found
        return found

    # -- going, and losing it ------------------------------------------------------------------------------------------

    def part(self, loud: bool) -> None:
        """By the owner, before the local lock is given back: what is changed goes to the store, and the grant with it,
        or the next of this host may have it.  Raises: LeaseLostError, StateError: nothing was changed.  BackendError:
        it may have been."""
        lock, self.between = self.lock, True
        self.parting = self.departing or (self.lease if self._stays() else None, loud)
        try:
            try:
                lock._commit()
            except (LeaseLostError, BackendError):
                raise
            except (CoheldError, OSError):
                lock._discard()
                self._finish()  # the last commit stands, and the lock goes back
                raise
            self._finish()
        except LeaseLostError:
            lock._discard()
            self.forget()
            raise
        except BaseException:
            lock._discard()
            self.drop(self.grant.nonce if self.grant is not None else b"")
            raise
        finally:
            self.parting = self.departing = None
            self.between = False
        with self.guard:
            self.grant, self.pending = None, None

    def departure(self, loud: bool, suspends: bool = False) -> Callable[[], object] | None:
        """By the owner: what part(loud) will have to tell the store, for another thread to do before it; None: nothing.
        suspends: all levels go, and news of others is to be heard from then on."""
        lock = self.lock
        if self.grant is None or (lock._record()[0] > 1 and not suspends):
            return None
        keep, payload = self.lease if self._stays() else None, None
        try:
            if lock.pending:
                payload = lock.view._changed_payload()
        except (CoheldError, OSError):
            return None  # part says so
        tells = bool(payload is not None or keep is None or self.recovers or self.makes or self.grant.lost)
        if tells:
            self.departing = keep, loud
        return partial(self._depart, payload, keep, loud, tells, suspends) if tells or suspends else None

    def _depart(self, payload: bytes | None, keep: float | None, loud: bool, tells: bool, listens: bool) -> None:
        if listens:
            self.store.listen(self.name, self)
        if not tells:
            return
        try:
            version = self._tell(payload, False, keep, loud)
        except LeaseLostError:
            self.forget()
            raise
        except BaseException:
            self.drop(self.grant.nonce if self.grant is not None else b"")
            raise
        if payload is not None:
            self.sent = payload, version

    def _stays(self) -> bool:
        memo, lock = self.memo, self.lock
        return bool(
            self.grant is not None
            and not self.grant.lost
            and memo is not None
            and (lock._counters()[3] or lock.queued)
            and memo.may_stay(self.lease)
        )

    def _finish(self) -> None:
        """After the commit, if there was any."""
        if self.grant is None or self.parting is None:
            return
        keep, loud = self.parting
        if self.grant.lost or keep is None or self.recovers or self.makes:
            self._tell(None, False, keep, loud)

    def part_quietly(self) -> None:
        """It is given back where something else is raised already."""
        self.lock._discard()
        with suppress(CoheldError):
            self.part(False)

    def drop(self, nonce: bytes) -> None:
        """The store may believe that it is ours still; empty: it does not."""
        self.forget()
        if nonce:
            renewing.give_back(self, nonce)

    def forget(self) -> None:
        """This owner's grant is over, and the store knows that, or is told."""
        with self.guard:
            self.grant, self.pending = None, None
            if self.memo is not None:
                self.memo.end()

    def lose(self, grant: Grant, why: str) -> LeaseLostError:
        """It is known that it is lost; who wants to hear of it does, once."""
        error = LeaseLostError(
            f"{self.label}: the lease of {self.lease:g} s was lost ({why}); what was changed is not committed",
            resource=self.label,
            owner=self.holder(),
        )
        with self.guard:
            first, grant.lost = grant.lost is None, grant.lost or error
            if self.memo is not None and self.grant is grant:
                self.memo.end()
        for call in list(self.when_lost) if first else []:
            try:
                call(grant.lost)
            except Exception:
                logging.getLogger("coheld").exception("%s: what was to be called at its loss has failed", self.label)
        return grant.lost

    def renewed(self, grant: Grant, until: float) -> None:
        """By the thread that renews."""
        with self.guard:
            if self.grant is grant and self.memo is not None:
                grant.until = until
                self.memo.until = int(until * 1e9)

    def deserted(self, grant: Grant) -> bool:
        """By the thread that renews: has a thread or task of this process ended with it?  Then the lease ends by
        itself, and the next owner is told who died.  (A lock that nothing refers to any more is its thread's for as
        long as that runs.)"""
        lock = self._lock()
        owner = (lock and lock._owner()) or self.taken_by
        if owner is None or owner.pid != os.getpid():
            return False
        if not (lock._task_is_gone() if lock and owner.task_id else not owner.alive()):
            return False
        with self.guard:
            if self.grant is grant:  # the next owner here has another
                self.grant = None
        return True

    def holder(self) -> Owner | None:
        """Who had it elsewhere when the store was asked last."""
        return _owner_of(self.elsewhere)

    def ring(self) -> bool:
        """By the store's thread: who waits here for a guard looks again."""
        lock = self._lock()
        if lock is None or not lock.attached or not lock.flags & native.GUARDED:
            return True
        return bool(lock._stir())

    def remove(self) -> None:
        """By the owner: the store has nothing of it any more, and the grant is over. Raises: LeaseLostError: nothing
        was changed.  BackendError: it may have been."""
        grant = self.mine()
        try:
            removed = self.store.remove(self.name, grant.nonce)
        except BaseException:
            self.drop(grant.nonce)
            raise
        if not removed:
            raise self.lose(grant, "another has had it since")
        self.forget()

    # -- questions of the owner ----------------------------------------------------------------------------------------

    def mine(self) -> Grant:
        """The caller's. Raises: NotLockedError."""
        lock, grant = self.lock, self.grant
        if grant is None or not (lock.attached and lock._mine()):
            raise NotLockedError(f"{lock.label}: this is for who holds the lock", resource=lock.label)
        return grant

    def lost(self) -> bool:
        grant = self.mine()
        return grant.lost is not None or grant.until <= time.monotonic()

    def ensure(self) -> None:
        """Ask the store. Raises: LeaseLostError."""
        grant = self.mine()
        if grant.lost is None:
            begun = time.monotonic()
            if self.store.renew(self.name, grant.nonce, self.lease):
                self.renewed(grant, begun + self.lease)
                return
            self.lose(grant, "another has had it since")
        assert grant.lost is not None
        raise grant.lost


def _memo_of(segment: Any) -> str:
    return f"{segment.path}~grant.{segment.identity[1]}"


_all: weakref.WeakSet[Away] = weakref.WeakSet()


def _become_child() -> None:
    for away in list(_all):
        away.begin()


at_fork(child=_become_child)


def _owner_of(who: bytes) -> Owner | None:
    """As it was told to the store: by anybody."""
    try:
        host, pid, start, tid, method, thread, since = _who(who)
    except (ValueError, msgspec.MsgspecError):
        return None
    ago = max(0.0, time.time() - since)
    here = "" if host == socket.gethostname() else host
    return Owner(pid, start, tid, method, time.monotonic() - ago, 1, thread=thread, host=here)


if TYPE_CHECKING:
    _Base = Handle
else:
    _Base = object


class Remote(_Base):
    """A mixin, before a local Mutex that has a slot `away`; _local_take and _local_give are that one's own."""

    __slots__ = ()
    far: ClassVar[bool] = True
    away: Away

    if TYPE_CHECKING:

        def _local_take(
            self, obj: Any, method: str, deadline: float, keep: bool = False, stop: bytearray | None = None
        ) -> bool: ...
        def _local_give(self) -> None: ...

    # -- take and give back --------------------------------------------------------------------------------------------

    def _take(
        self,
        obj: Any,
        method: str,
        timeout: float | None,
        /,
        stop: bytearray | None = None,
        reads: bool = False,
        keep: bool = False,
    ) -> bool:
        """As of every lock."""
        if reads:
            self._no_readers()
        deadline = FOREVER if timeout is None else time.monotonic() + timeout
        if not self._local_take(obj, method, 0 if timeout is not None and timeout <= 0 else deadline, keep, stop):
            return False
        if self._record()[0] > 1 and (granted := self._has_grant(timeout)) is not None:
            return granted
        if not self._secured(obj, deadline, stop):
            return False
        if not method and stop is None and (task := current_task()) is not None and self.task is None:
            self._entrust(task, threading.get_native_id(), b"")
            self._entrusted(task)
        return True

    def _has_grant(self, timeout: float | None) -> bool | None:
        """By who has just got one level more.  None: an interrupt has left the local lock alone with this thread, and
        the store is to be asked.  Else, where it has no grant, that level goes: it is a signal's handler in a thread
        that asks the store, or gives back; or the thread has it by another lease."""
        away = self.away
        if not away.between and (away.grant is not None or not away._memo_here().valid):
            return None if away.grant is None else True
        self._local_give()
        if timeout is not None:
            return False
        raise DeadlockError(
            f"{self.label}: this is a signal's handler, whose thread asks the store for the lock or gives it back, and "
            "it cannot have it in between; or the thread has it by an object with another lease: give all of a name "
            "the same URL",
            resource=self.label,
        )

    def _secured(self, obj: Any, deadline: float, stop: bytearray | None) -> bool:
        got = False
        try:
            got = self.away.secure(obj, deadline, stop)
        finally:
            if not got and self._mine():
                self._local_give()
        return got

    def acquire(self, blocking: bool = True, timeout: float | None = None, *, block: Any = None) -> bool:
        """As Lockable.acquire."""
        wait = patience(blocking if block is None else block, timeout)
        return self._take(None, "", None if wait == FOREVER else wait)

    def __enter__(self) -> Any:
        self._take(None, "", None)
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release()

    def release(self) -> None:
        """As Lockable.release; the last level asks the store, and blocks for that."""
        if not (self.attached and self._mine()):
            self._not_owner()
        if self._record()[0] > self.away.level:
            self._local_give()
            return
        try:
            self.away.part(loud=True)
        finally:
            if self._mine():
                self._local_give()

    def _wait_turn(self, stop: bytearray, reads: bool, /) -> bool:
        return self._take(None, "", None, stop, reads)

    # -- guards --------------------------------------------------------------------------------------------------------

    def _part(self, loud: bool) -> None:
        """By the owner, before _suspend: the grant goes, or stays with this host."""
        self.away.store.listen(self.away.name, self.away)
        self.away.part(loud)

    def _suspend(self, loud: bool, /) -> int:
        if self.away.grant is not None:
            self._part(loud)
        return int(super()._suspend(loud))

    def _resume(self, obj: object, method: str, levels: int, deadline: float, keep: bool, /) -> bool:
        wait = None if deadline == FOREVER else max(0.0, left(deadline))
        if not self._take(obj, method or "wait_for", wait, keep=keep):
            return False
        for _ in range(1, levels):
            self._local_take(obj, method, FOREVER)
        return True

    def _stir(self) -> bool:
        """Who waits here for a guard looks again; False: somebody has the local lock for long."""
        if self._local_take(None, "", time.monotonic() + _RETRY):
            self._local_give()
            return True
        return False

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def _task_take(self, obj: object, method: bytes, patient: bool, /) -> bool:
        asks = patient and current_task() is not None and not self.away.may_pass_on()
        if asks and not (self.attached and self._mine()):
            return False  # a thread asks the store, and the loop goes on meanwhile
        if not super()._task_take(obj, method, patient):
            return False
        if self._record()[0] > 1:
            granted = self._has_grant(None)
            if granted is not None:
                return granted
        memo = self.away._memo_here()
        if patient and not memo.passes_on(self.away.lease):
            super()._task_give()  # a thread asks the store, and the loop goes on meanwhile
            return False
        got = False
        try:
            got = self.away.secure(obj, 0)
        finally:
            if not got:
                super()._task_give()
        return got

    def _task_give(self) -> None:
        try:
            if self._record()[0] == 1 and self._mine():
                self.away.part(loud=True)
        finally:
            super()._task_give()

    # -- state ---------------------------------------------------------------------------------------------------------

    def _adopt(self, view: Any, former: Any, /) -> bool:
        pending = self.away.pending is not None
        if pending and not self._mine():
            time.sleep(0.001)  # the owner takes it in before others look at the copy
            return False
        fits = super()._adopt(view, former)
        if fits and pending:
            self.away.absorbed_by(view)
        return bool(fits)

    def _look(self, _obj: object) -> bool:
        return self._linked()  # its first state is the store's to know

    def _owner_died(self, record: tuple[int, int, int, str]) -> None:
        self.away.grant = None  # of a thread or task of this process, if it was one
        super()._owner_died(record)

    def created(self) -> None:
        self.away.makes = True
        super().created()

    def recovered(self) -> None:
        self.away.recovers = True
        super().recovered()

    def _is_created(self) -> bool:
        memo = self.away._memo_here()
        if self.away.grant is not None or memo.valid:
            return bool(memo.created)
        return self.away.load().created  # whoever has the lock elsewhere, and for how long

    def _recover(self, obj: object) -> None:
        if self.away.grant is not None:  # else the local lock alone is there, and it is not this owner's turn yet
            super()._recover(obj)

    def dead(self) -> Owner:
        return _owner_of(self.away.dead) or super().dead()

    # -- what it says --------------------------------------------------------------------------------------------------

    def owner(self) -> Owner | None:
        """Who has it; of another host as the store says, which is asked. Raises: BackendError."""
        here = super().owner()
        if self.away.stays_here(here is not None):
            return here  # the store knows who asked for the grant, not who has it
        found = self.away.store.load(self.away.name, self.away.seen.known)
        return here if self.away.is_ours(found.nonce) else _owner_of(found.holder)

    def _known_owner(self) -> Owner | None:
        return self.away.holder() or super().owner()

    def __repr__(self) -> str:
        where = f"{self.resource.scheme}: {self.label}"
        if not self.attached:
            return f"<Mutex {where}, not attached>"
        here = super().owner()
        return f"<Mutex {where}, {f'held by {here}' if here else 'not held by this host'}>"

    def _exists(self) -> bool:
        """Is there something of it, here or there?  Asks the store. Raises: BackendError."""
        return super()._exists() or bool(self.away.store.load(self.away.name, Known()).known.incarnation.strip(b"\0"))

    def _vanish(self) -> None:
        self.away.remove()

    def _why_not(self) -> str:
        here, there = super().owner(), self.away.holder()
        return f"held by {there}" if there is not None else f"held by {here}" if here else "try again"

    def _no_readers(self) -> NoReturn:
        raise IncompatibleError(
            f"{self.label}: locks in a store have no reading calls yet; use exclusive ones", resource=self.label
        )

    def _thread_reads(self, _obj: object, _method: str, _timeout: float | None, /) -> Any:
        self._no_readers()

    def _read(self, _obj: object, _method: bytes, _again: bool, /) -> Any:
        self._no_readers()


def far_mutex() -> Any:
    """The Mutex of a store's locks, over the one that this machine has."""
    scheme = "file" if native.missing else "shm"
    local = import_module(f"{__package__}.{scheme}").Mutex

    class Mutex(Remote, local):  # type: ignore[misc, valid-type]  # known at run time
        """A lock of a store, and the local one of its name."""

        __slots__ = ("away",)

        def __init__(self, resource: Any, *where: Any) -> None:
            if native.missing:
                super().__init__(resource, *where)
            self.away = Away(self, resource.store, resource.name, resource.lease)

        def _local_take(
            self, obj: Any, method: str, deadline: float, keep: bool = False, stop: bytearray | None = None
        ) -> bool:
            if native.missing:
                wait = None if deadline == FOREVER else max(0.0, left(deadline))
                return bool(local._take(self, obj, method, wait, stop, keep=keep))
            if stop is not None:
                return bool(local._wait_turn(self, stop, False))
            return bool(local._resume(self, obj, method, 1, deadline, keep))

        def _local_give(self) -> None:
            local.release(self)

    return Mutex
