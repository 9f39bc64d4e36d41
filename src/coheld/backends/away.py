"""What a lock of a store is besides its local half: the grant, the state that came with it, and how both go back.

Its caller is the owner of the local lock, where nothing else is said; remote.py says what that is for, and the order of
the steps.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from .. import native
from ..errors import BackendError, CoheldError, LeaseLostError, NotLockedError
from ..owner import Owner
from ..process import at_fork, thread_name
from ..waiting import FOREVER, left
from . import renewing, waiters
from .memo import Memo, path_beside
from .store import Alarm, Ask, Change, Found, Granted, Known, Refused, Store, number_of

if TYPE_CHECKING:
    from .base import Handle

PASS_BITS = 12
"""Of a token: a store gives the others, and the processes of a host count on in these."""
_SLICE = 0.2
"""For how long who waits for a task looks away, seconds: nobody may want it any more."""
_who = msgspec.msgpack.Decoder(tuple[str, int, int, int, str, str, float]).decode


class Grant:
    """What the owner has.  lost: what it is told, once that is known.  leaves: it is being given back, and a store that
    does not know it any more has it back."""

    __slots__ = ("leaves", "lost", "nonce", "settled", "token", "until")

    def __init__(self, nonce: bytes, token: int, until: float) -> None:
        self.nonce, self.token, self.until = nonce, token, until
        self.lost: LeaseLostError | None = None
        self.leaves = False
        self.settled = False  # a crash of the store cannot make it forget the token


class Away:
    """All of a lock that is not local; one per handle.  guard: held by who changes grant, for moments."""

    def __init__(self, lock: Handle, resource: Any) -> None:
        self._lock: weakref.ref[Any] = weakref.ref(lock)
        self._store: Callable[[], Store] = resource.store
        self.name, self.lease, self._cohorts = resource.name, resource.lease, resource.cohorts
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
        self.watched = False

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
        if self.passes_on(memo):
            memo.passes += 1
            self._have(Grant(memo.nonce, memo.token << PASS_BITS | memo.passes, memo.until / 1e9))
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
            self.taken_by = owner = self.lock._owner()
            self.level = owner.depth if owner is not None else 1
        renewing.while_held(self)

    def _memo_here(self) -> Memo:
        """By the owner."""
        segment = self.lock.segment
        if self.memo is None or self.segment is not segment:
            self.memo = Memo(path_beside(segment.path, segment.identity[1]))
            self.segment = segment
        return self.memo

    def may_pass_on(self) -> bool:
        """By anybody: can the grant be had here without the store being asked, as far as this process has seen?"""
        memo = self.memo
        return memo is not None and self.segment is self.lock.segment and self.passes_on(memo)

    def passes_on(self, memo: Memo) -> bool:
        """Does the grant that this host has pass to its next owner, without the store being asked?"""
        return bool(self._cohorts and memo.passes_on(self.lease))

    def is_between(self) -> bool:
        """By the owner of the local lock: is this a signal's handler, whose thread asks the store or gives back?  The
        stack says so: an interrupt may have ended that, and left the mark."""
        frame = sys._getframe() if self.between else None
        while frame is not None:
            if frame.f_code in _BETWEEN and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        self.between = False
        return False

    def has_another(self) -> bool:
        """By the owner of the local lock: has it the grant by another object's lease?  What an object had that is gone
        since, by an interrupt, is this one's to take on: it is in the memo."""
        here, found = self.lock.segment.identity, False
        for away in list(_all):
            if away is self or away.grant is None or away.segment is None or away.segment.identity != here:
                continue
            if away._lock() is None:
                away.grant = None
            else:
                found = True
        return found

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
        if self.segment is segment:
            return self.memo
        return Memo.seen(path_beside(segment.path, segment.identity[1]))

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
        """Never for much of a lease: a store that has forgotten who has it and who waits says nothing, and who asks
        again has its place anew."""
        slices = _SLICE if stop is not None else FOREVER
        self.alarm.wait(min(answer.seconds, self.lease / 3, left(deadline), slices))

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
        self._have(Grant(nonce, memo.token << PASS_BITS | memo.passes, until))
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
            self.between = grant.leaves = True
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
        self.parting = parting = self.departing or (self.lease if self._stays() else None, loud)
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
        if parting[0] is not None and (memo := self.memo) is not None and memo.valid:
            renewing.look_after(lock, self, memo.nonce, memo.passes)
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
        if suspends:
            lock._flag(native.GUARDED, True)  # as Remote._listen
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
            self._cohorts
            and self.grant is not None
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

    def give_up(self, nonce: bytes, passes: int) -> bool:
        """By the thread that renews: the grant that was kept here at that pass goes to others, if nobody has taken it
        since; False: somebody has the local lock, perhaps for a moment only.

        taken since     passes is another, or the nonce; or it is asked for anew, and valid is down
        not taken       with the local lock nobody can take it.  Who waits for that, and comes late, asks the store
        killed here     with the local lock, before the store has it back: valid is LEAVING, and the next owner asks
        """
        lock, memo = self.lock, self.memo
        if memo is None or not lock.attached or self.segment is not lock.segment or not memo.is_kept(nonce, passes):
            return True
        if not lock._local_take(None, "", 0):
            return False
        try:
            if memo.is_kept(nonce, passes):
                self._let_go(memo)
        finally:
            lock._local_give()
        return True

    def _let_go(self, memo: Memo) -> None:
        """By the owner of the local lock alone: the grant that was kept goes to others, unless a dead owner left it,
        of whom its lease tells them."""
        if self.grant is not None or self.lock._record()[0] != 1 or self.lock.flags & native.RECOVERING:
            return
        nonce = memo.nonce
        memo.pause()
        try:
            self.store.release(self.name, Change(nonce, number_of(nonce), None, None, False, False, False))
        except BackendError:
            self.drop(nonce)
        else:
            self.forget()

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
        return owner_of(self.elsewhere)

    def ring(self) -> bool:
        """By the store's thread: who waits here for a guard looks again."""
        lock = self._lock()
        return not self.is_wanted() or lock is None or bool(lock._stir())

    def is_wanted(self) -> bool:
        """Does anybody wait here for a guard, as far as is seen without the lock?"""
        lock = self._lock()
        return bool(lock is not None and lock.attached and lock.flags & native.GUARDED)

    def remove(self) -> None:
        """By the owner: the store has nothing of it any more, and the grant is over. Raises: LeaseLostError: nothing
        was changed.  BackendError: it may have been."""
        grant = self.mine()
        grant.leaves = True
        if self.memo is not None:
            self.memo.pause()  # killed from here on: nobody takes what is gone for this host's
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

    def token(self) -> int:
        """It lasts from now on. Raises: LeaseLostError.  BackendError: if the store has to be asked, and cannot be."""
        grant = self.mine()
        if not grant.settled and grant.lost is None:
            if not self.store.settle(self.name, grant.nonce, self.lease):
                raise self.lose(grant, "another has had it since")
            grant.settled = True
        return grant.token

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


_BETWEEN = {Away._asked.__code__, Away.part.__code__}
_all: weakref.WeakSet[Away] = weakref.WeakSet()


def _become_child() -> None:
    for away in list(_all):
        away.begin()


at_fork(child=_become_child)


def owner_of(who: bytes) -> Owner | None:
    """As it was told to the store: by anybody."""
    try:
        host, pid, start, tid, method, thread, since = _who(who)
    except (ValueError, msgspec.MsgspecError):
        return None
    ago = max(0.0, time.time() - since)
    here = "" if host == socket.gethostname() else host
    return Owner(pid, start, tid, method, time.monotonic() - ago, 1, thread=thread, host=here)
