"""Threads that wait in the stead of tasks: for a lock, and for news of a guard; one of each per lock and process,
however many tasks wait, and only while they do.

Who gets a turn.  Tasks queue in the order in which they came.  The thread waits for the lock as threads do, among those
of all processes, and makes the first task the owner before it gives the mutex back: there is no moment at which the
lock is free and a newcomer could pass.  Then it wakes the task's loop.  A turn is settled under the lookout's guard, in
one of two ways: it was granted, or it was withdrawn (a time-out, a cancellation).  Who is cancelled and finds it
granted gives the lock back.

A coroutine may be destroyed by the collector of garbage, in the middle of whatever runs: also of a section under the
guard, in the same thread, with half of it done.  So such a turn is dropped: noted, and withdrawn by whoever has the
guard when it gives that back.  The note comes before a try for the guard, and who has given the guard back looks for
notes after that: one of the two finds it.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..errors import CoheldError, DeadlockError
from ..process import at_fork
from ..waiting import FOREVER, TOLD_AFTER
from . import waiters
from .tasking import current_task, when_closed
from .waiters import deadlock

if TYPE_CHECKING:
    from .base import Handle

_PATIENCE = 0.2
"""For how long a thread that waits for news sleeps at most before it looks whether anybody still waits, seconds."""


class Turn:
    """A task's place in a queue.  granted: how, or False."""

    __slots__ = (
        "begun",
        "future",
        "granted",
        "key",
        "lock",
        "loop",
        "place",
        "reads",
        "searches",
        "task",
        "teller",
        "tid",
        "timer",
        "waits",
    )

    def __init__(self, lock: Handle, key: Any, reads: bool) -> None:
        self.lock = lock  # for the collector, which has taken weak references off it
        self.loop = asyncio.get_running_loop()
        self.task = asyncio.current_task()
        self.tid = threading.get_native_id()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.key, self.reads = key, reads
        self.place: waiters.Place | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.teller: asyncio.TimerHandle | None = None
        self.begun = monotonic()
        self.waits = True
        self.searches = False  # (again) for a cycle of waits that it is part of
        self.granted: Any = False

    def hide(self) -> None:
        """It is no waiter any more, to others.  By whoever settles it; its loop may be giving the place back."""
        place = self.place
        if place is not None:
            place.end()

    def end(self) -> None:
        """In the loop: the wait is over."""
        self.hide()
        self.place = None
        for timer in (self.timer, self.teller):
            if timer is not None:
                timer.cancel()

    def settle(self, error: BaseException | None = None) -> None:
        """In the loop: the task goes on."""
        if not self.future.done():
            if error is None:
                self.future.set_result(self.granted)
            else:
                self.future.set_exception(error)

    def tell(self, error: BaseException | None = None) -> bool:
        """From any thread. False: the loop is closed."""
        try:
            self.loop.call_soon_threadsafe(self.settle, error)
        except RuntimeError:
            for look in when_closed:
                look()
            return False
        return True


class _Lookout:
    """A queue of turns, and the thread that serves it while there are any.  Those keep the lock, and it does not."""

    what_for = waiters.FOR_LOCK
    tells = True
    """Else it is a part of a wait, of which others tell."""

    def __init__(self, lock: Handle) -> None:
        self.reference = weakref.ref(lock)
        self._guard = threading.Lock()
        self.dropped: deque[Turn] = deque()
        self.turns: deque[Turn] = deque()
        self.waiting = 0
        self.stop = bytearray(1)
        self.running = False
        self.searching: set[Any] = set()

    @property
    def lock(self) -> Handle:
        found = self.reference()
        assert found is not None
        return found

    async def wait(
        self, key: Any, method: bytes, deadline: float, timed: bool, reads: bool = False, keep: bool = False
    ) -> Any:
        """How it was granted by the deadline, a time.monotonic(); False: it was not.  timed: see waiting.Sleep."""
        turn = Turn(self.lock, key, reads)
        kind = waiters.kind_of(self.what_for, timed, keep)
        try:
            self._show(turn, kind, method)
            self.enter(turn)
            if deadline != FOREVER:
                turn.timer = turn.loop.call_at(deadline, self._expire, turn)
            elif kind == waiters.FOR_LOCK and turn.place is not None:
                turn.timer = turn.loop.call_later(waiters.SEARCH_AFTER, self._first_look, turn)
            if self.tells and deadline - turn.begun > TOLD_AFTER:
                turn.teller = turn.loop.call_later(TOLD_AFTER, self._tell, turn)
            granted = await self._until_settled(turn)
            turn.end()
        except BaseException:
            turn.end()  # again, as that may be what was interrupted
            raise
        return granted

    async def _until_settled(self, turn: Turn) -> Any:
        try:
            return await turn.future
        except GeneratorExit:
            self.dropped.append(turn)
            self._take_dropped()
            raise
        except BaseException:
            if not self.withdraw(turn) and turn.granted:
                self.refuse(turn)
            raise

    def _show(self, turn: Turn, kind: int, method: bytes) -> None:
        """It waits, and the table says so, as long as it has a place."""
        assert turn.task is not None
        turn.place = waiters.place(turn.task.get_name())
        if turn.place is not None:
            turn.place.begin(waiters.cell_of(self.lock), kind, method, turn.tid, id(turn.task))

    def _tell(self, turn: Turn) -> None:
        """In the loop, once for each turn: it has waited for long, however many were served before it."""
        if turn.waits:
            self.lock._waits_long(monotonic() - turn.begun)

    def _first_look(self, turn: Turn) -> None:
        """In the loop, once for each turn: can its wait end at all?"""
        if self._ends(turn):
            turn.searches = True
            with self.guard():
                self.searching = {loop for loop in self.searching if not loop.is_closed()}
                first = turn.loop not in self.searching
                self.searching.add(turn.loop)
            if first:
                turn.loop.call_later(waiters.SEARCH_AGAIN, self._look_again, turn.loop)

    def _look_again(self, loop: Any) -> None:
        """The same, for all of the loop that have had their first look: thousands may wait for the one lock."""
        with self.guard():
            turns = [turn for turn in self.turns if turn.waits and turn.searches and turn.loop is loop]
            if not turns:
                self.searching.discard(loop)
        if turns:
            place = turns[0].place
            if place is None or deadlock().may_be_part(turns[0].lock, place):
                for turn in turns:
                    self._ends(turn)
            loop.call_later(waiters.SEARCH_AGAIN, self._look_again, loop)

    def _ends(self, turn: Turn) -> bool:
        """May it end by itself?  Else it is told."""
        place = turn.place
        if place is None:
            return True  # its coroutine is being destroyed, by another thread
        try:
            deadlock().search_for_task(turn.lock, place, turn.task)
        except DeadlockError as error:
            if self.withdraw(turn):
                turn.settle(error)
            return False
        return True

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Held for moments."""
        try:
            with self._guard:
                yield
        finally:
            self._take_dropped()

    def _take_dropped(self) -> None:
        """Never blocks: it may be a thread that has the guard which destroys a coroutine."""
        while self.dropped and self._guard.acquire(blocking=False):
            try:
                turn = self.dropped.popleft() if self.dropped else None
                waited = turn is not None and self._take_out(turn)
            finally:
                self._guard.release()
            if waited:
                self._let_go()
            elif turn is not None and turn.granted:
                with suppress(CoheldError, OSError):  # theirs whose coroutine it was
                    self.refuse(turn)

    def enter(self, turn: Turn) -> None:
        with self.guard():
            if not self.running:  # first: where no thread is to be had, nobody waits
                name = f"coheld {self.lock.label}"
                threading.Thread(target=self._run, args=(self.lock,), name=name, daemon=True).start()
                self.running = True
            self.turns.append(turn)
            self.count(1)

    def withdraw(self, turn: Turn) -> bool:
        """False: it was settled before."""
        with self.guard():
            waited = self._take_out(turn)
        if waited:
            self._let_go()
        return waited

    def _take_out(self, turn: Turn) -> bool:
        """Under the guard."""
        if not turn.waits:
            return False
        turn.waits = False
        self.count(-1)
        return True

    def _let_go(self) -> None:
        """Who waits in their stead looks whether it still has to."""
        if self.stop[0] and (lock := self.reference()) is not None:
            lock._nudge()

    def count(self, more: int) -> None:
        """So many more wait."""
        self.waiting += more
        self.stop[0] = not self.waiting

    def _expire(self, turn: Turn) -> None:
        if self.withdraw(turn):
            turn.settle()

    def _run(self, _lock: Handle) -> None:
        waiters.stay_out()
        while self._is_wanted():
            try:
                self.serve()
            except BaseException as error:  # of a lock that cannot be reached: theirs who wait for it
                for turn in self.taken():
                    turn.tell(error)

    def _is_wanted(self) -> bool:
        with self.guard():
            if not self.waiting:
                self.turns.clear()
                self.running = False
            return self.running

    def taken(self) -> list[Turn]:
        """All who wait, and they do no more."""
        with self.guard():
            turns = [turn for turn in self.turns if turn.waits]
            self.turns.clear()
            self.count(-len(turns))
            for turn in turns:
                turn.waits = False
        return turns

    def serve(self) -> None:
        raise NotImplementedError

    def refuse(self, turn: Turn) -> None:
        """What was granted to the turn is not wanted."""


class _Locks(_Lookout):
    """Waits for the lock.  reads: what for, now."""

    reads = False

    def count(self, more: int) -> None:
        super().count(more)
        self.lock.queued = self.waiting > 0  # a newcomer does not pass them
        first = self._first()
        self.stop[0] = first is None or first.reads > self.reads  # nobody keeps readers out who does not wait any more

    def serve(self) -> None:
        reads = self._next_reads()
        if self.lock._wait_turn(self.stop, reads) and (turn := self._granted(reads)) and not turn.tell():
            self.refuse(turn)

    def _first(self) -> Turn | None:
        """Under the guard: of those who wait."""
        while self.turns and not self.turns[0].waits:
            self.turns.popleft()
        return self.turns[0] if self.turns else None

    def _next_reads(self) -> bool:
        with self.guard():
            first = self._first()
            self.reads = first is not None and first.reads
            self.count(0)
            return self.reads

    def _granted(self, reads: bool) -> Turn | None:
        """The first has it; None: there is none, or another is the first by now, and waits for something else."""
        with self.guard():
            turn = self._first()
            if turn is not None and turn.reads != reads:
                turn = None
            kept = False
            try:
                if turn is not None:
                    turn.hide()  # first: nobody who waits for a lock owns it
                    turn.granted = self._entrusted_to(turn)
                    kept = turn.granted is True
                    turn.waits = False
                    self.turns.popleft()
                    self.count(-1)
            finally:
                if not kept:
                    self.lock.release()
            return turn

    def _entrusted_to(self, turn: Turn) -> Any:
        if turn.reads:
            return self.lock._read_on()
        self.lock._entrust(turn.task, turn.tid, turn.key)
        return True

    def refuse(self, turn: Turn) -> None:
        how, turn.granted = turn.granted, False  # once: a task whose loop is closed may still be unwound
        if turn.reads and how:
            how.leave()
        elif how and (current_task() is turn.task or not turn.lock._mine()):  # else who unwinds it is the next owner
            turn.lock._task_give()


class _Attempts(_Locks):
    """Waits for the lock of a semaphore's register, and takes a permit of that in a turn's stead, if one is free: no
    task ever has that lock, as who gives a permit back in the loop would wait for it."""

    what_for, tells = waiters.FOR_PERMIT, False

    def _entrusted_to(self, turn: Turn) -> Any:
        return (turn.key._counts._try(),)

    def refuse(self, turn: Turn) -> None:
        how, turn.granted = turn.granted, False
        if how == (None,):
            turn.key._give_soon()


class _News(_Lookout):
    """Waits until somebody has released, or died, since the epoch that a turn was given."""

    what_for, tells = waiters.FOR_GUARD, False

    def serve(self) -> None:
        with self.guard():
            epochs = [turn.key for turn in self.turns if turn.waits]
        if not epochs:
            return
        news = self.lock._sleep(epochs[0], monotonic() + _PATIENCE, "", True)
        for turn in self._told(epochs[0] if news else None):
            turn.tell()

    def _told(self, epoch: int | None) -> list[Turn]:
        """Those who wait for news of that epoch, or cannot be told any more."""
        with self.guard():
            waiting = [turn for turn in self.turns if turn.waits]
            told: list[Turn] = []
            self.turns = deque()
            for turn in waiting:
                (told if turn.key == epoch or turn.loop.is_closed() else self.turns).append(turn)
            for turn in told:
                turn.waits, turn.granted = False, True
            self.count(-len(told))
        return told


class _Process:
    """Of this process; a child has no threads but its own."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.guard = threading.Lock()
        self.locks: weakref.WeakKeyDictionary[Handle, _Locks] = weakref.WeakKeyDictionary()
        self.news: weakref.WeakKeyDictionary[Handle, _News] = weakref.WeakKeyDictionary()
        self.attempts: weakref.WeakKeyDictionary[Handle, _Attempts] = weakref.WeakKeyDictionary()

    def become_child(self) -> None:
        for lock in list(self.locks):
            lock.queued = False
        self.begin()


_process = _Process()
at_fork(child=_process.become_child)


async def turn(lock: Handle, method: bytes, deadline: float, reads: bool = False, keep: bool = False) -> Any:
    """The running task waits until it has the lock, once; or reads: until it is in, by the register that this gives.
    keep: it must have it, whatever comes.  False: not by the deadline.  Raises: DeadlockError."""
    with _process.guard:
        lookout = _process.locks.get(lock) or _process.locks.setdefault(lock, _Locks(lock))
    return await lookout.wait(method, method, deadline, deadline < FOREVER, reads, keep)


async def attempt(semaphore: Any, deadline: float) -> int | None:
    """What an attempt to take a permit comes to, for the running task, once the lock is to be had; see waiting.py."""
    lock = semaphore._lock
    with _process.guard:
        lookout = _process.attempts.get(lock) or _process.attempts.setdefault(lock, _Attempts(lock))
    granted = await lookout.wait(semaphore, b"", deadline, True)
    found: int | None = granted[0] if granted else False
    return found


async def news(lock: Handle, epoch: int, until: float, timed: bool, method: str) -> bool:
    """The running task waits for a release or a death after that epoch. False: none until then.  timed: see Sleep."""
    with _process.guard:
        lookout = _process.news.get(lock) or _process.news.setdefault(lock, _News(lock))
    told: bool = await lookout.wait(epoch, method.encode(errors="replace"), until, timed)
    return told
