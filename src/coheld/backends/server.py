"""What a server's Store is besides its verbs: who wants to hear of what, the thread that hears it, and what becomes of
a question whose connection breaks.

The verbs are an engine's (redis.py).  Each is one question, which the server answers in one step and does not do twice,
so that it may be asked again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ..errors import BackendError, IncompatibleError
from ..process import start, starting
from ..waiting import FOREVER
from .store import Alarm, Bell, Found, Known, Store

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

T = TypeVar("T")

EPOCH = 1_704_067_200_000_000
"""2024, microseconds: a token has 51 bits of them, and 12 for the passes of a cohort; that is good until 2095."""
PATIENCE = 5.0
"""For how long a server is waited for, seconds, but not for more than a quarter of a lease: who renews it and finds a
connection dead can still try another."""
HEALTHY = 10
"""A connection that was silent for so long is asked whether it is there, seconds."""
_ERRANDS = 32
"""So many threads at most do what tasks ask of a server."""
_SPARE = 2
"""So many connections stay though nobody uses them."""
_KEEPS = 64
"""So many names are listened to before it is looked whether anybody here waits for them still."""
_RING_AGAIN, _RING_SELDOM = 0.005, 0.2
"""After how long who could not be rung is rung again, the first time and at most, seconds.  Who has its local lock
wakes those who wait there, as a rule, when it gives that back."""
_REACHED_AGAIN, _REACHED_SELDOM = 0.2, 3.2
"""Between two tries of who hears to reach a server that is away, the first time and at most, seconds."""


class Unreachable(Exception):
    """There is no answer, and none is to come: in time."""


class Broken(Unreachable):
    """There is none by this connection; another may have one."""


class Server(Store):
    """One that this process asks; any of its threads."""

    def __init__(self, where: str, patience: float) -> None:
        self.where, self.patience = where, patience
        self.answered = False
        """Has it ever?"""
        self._silent = False  # the last time
        self.id = os.urandom(9).hex()
        self._guard = threading.Lock()
        # A name that was removed may have more than one lock here, for a moment: who has the old file, and the new one.
        self._alarms: dict[str, weakref.WeakSet[Alarm]] = {}
        self._bells: dict[str, weakref.WeakSet[Bell]] = {}
        self._listener: Listener | None = None
        self._idle: deque[Any] = deque()  # connections that nobody uses now
        self._unused = 0  # of these, since the last look
        self._errands: Executor | None = None
        self._busy = 0  # errands that are not done

    # -- an engine's ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def connects_by(self, place: Any) -> None:
        """From now on: with what another URL of it says, a password that this process had not been told."""

    def _is_there(self, connection: Any) -> bool:
        """Of an engine that keeps idle ones, as _close: as far as this end of it knows, the server has not closed it.
        Never blocks."""
        raise NotImplementedError

    def _close(self, connection: Any) -> None:
        raise NotImplementedError

    @abstractmethod
    def _listen(self) -> Listener:
        """A thread that hears, not begun yet."""

    # -- who hears of what ---------------------------------------------------------------------------------------------

    def watch(self, name: str, alarm: Alarm) -> None:
        with self._guard:
            self._alarms.setdefault(name, weakref.WeakSet()).add(alarm)
        self._listening().add("")

    def listen(self, name: str, lock: Bell) -> None:
        with self._guard:
            self._bells.setdefault(name, weakref.WeakSet()).add(lock)
        self._listening().add(name)

    def close(self) -> None:
        """Blocks until the threads have ended: who hears, and who does errands."""
        with self._guard:
            listener, self._listener = self._listener, None
            errands, self._errands = self._errands, None
        if errands is not None:
            errands.shutdown()
        if listener is not None:
            listener.end()
        self._forget_idle()

    def wake(self, name: str) -> None:
        """Who waits for that lock looks again; empty: for whichever, as something may have been missed."""
        with self._guard:
            alarms = [alarm for key, those in self._alarms.items() if not name or key == name for alarm in those]
        for alarm in alarms:
            alarm.set()

    def bells(self, name: str) -> list[Bell]:
        """Of that lock, or of all."""
        with self._guard:
            return [bell for key, those in self._bells.items() if not name or key == name for bell in those]

    def is_listened_to(self) -> bool:
        """Does anybody here want to hear of anything still?"""
        with self._guard:
            return any(map(len, self._alarms.values())) or any(map(len, self._bells.values()))

    def _queue_anew(self, name: str) -> None:
        """The place of this process among those who wait is gone; another of its locks of that name may want it."""
        if len(self._alarms.get(name, ())) > 1:
            self.wake(name)

    def _listening(self) -> Listener:
        with self._guard:
            if self._listener is None or not self._listener.is_alive():
                self._listener = self._listen()
                start(self._listener)
            return self._listener

    def done_by_thread(self, work: Callable[[], T]) -> Future[T]:
        from concurrent.futures import ThreadPoolExecutor  # of whom asyncio has loaded most

        with self._guard, starting():
            if self._errands is None:
                self._errands = ThreadPoolExecutor(_ERRANDS, "coheld errand")
            future = self._errands.submit(work)
            self._busy += 1
        future.add_done_callback(self._end_errand)
        return future

    def _end_errand(self, _future: object) -> None:
        """The threads end with the last one."""
        with self._guard:
            self._busy -= 1
            errands = None if self._busy else self._errands
            if errands is not None:
                self._errands = None
        if errands is not None:
            errands.shutdown(wait=False)

    # -- connections ---------------------------------------------------------------------------------------------------

    def _idle_one(self) -> Any:
        """None: there is none.  One that the server has closed meanwhile is found before anything is sent."""
        while self._idle:
            with suppress(IndexError):  # another thread was first
                connection = self._idle.pop()
                self._unused = min(self._unused, len(self._idle))
                if self._is_there(connection):
                    return connection
                self._close(connection)
        self._unused = 0
        return None

    def _forget_idle(self) -> None:
        """The connections that nobody uses now are not used any more."""
        while self._idle:
            with suppress(IndexError):
                self._close(self._idle.pop())

    def trim(self) -> None:
        for _ in range(self._unused - _SPARE):
            with suppress(IndexError):
                self._close(self._idle.popleft())
        self._unused = len(self._idle)

    # -- a question ----------------------------------------------------------------------------------------------------

    def _answer(self, ask: Callable[[], Any], name: str) -> Any:
        """Asked again, once, if the connection broke: nothing is done twice.  But if another had the lock before it was
        asked again, it does not know any more whether it did it the first time: nobody says "lost" then."""
        try:
            try:
                answer = ask()
            except Broken:
                self._forget_idle()
                if (answer := ask()) is None:
                    raise Broken("an answer was lost; what was changed may be committed") from None
        except Unreachable as error:
            self._forget_idle()  # as silent as that one, perhaps
            self._silent = True
            raise BackendError(
                f"{self.where} cannot be reached, or does not answer: {error}; trying again may work",
                resource=name or self.where,
            ) from None
        self.answered = True
        if self._silent:
            self._silent = False
            if (listener := self._listener) is not None:
                listener.resume()
        return answer

    def _connect_anew(self) -> None:
        """What is connected now is not used any more, by who hears, either."""
        self._forget_idle()
        if (listener := self._listener) is not None:
            listener.begin_anew()

    def _refuse(self, why: str, name: str) -> NoReturn:
        raise BackendError(f"{self.where} refuses: {why}; trying again does not help by itself", resource=name)

    def _distrust(self, why: str, name: str) -> NoReturn:
        raise BackendError(
            f"{self.where} does not prove that it is the one: {why}; trying again does not help by itself",
            resource=name or self.where,
        )

    def _foreign(self, name: str, why: str) -> IncompatibleError:
        return IncompatibleError(f"{self.where}: another program has what {name!r} needs: {why}", resource=name)


def found(incarnation: bytes, version: int, payload: bytes | None, asked: Known) -> Found:
    """Raises: ValueError: if the server has something else."""
    known = Known(incarnation.ljust(16, b"\0"), version)
    if payload is None and known.version and known != asked:
        raise ValueError("a state without bytes")
    return Found(known, payload)


def micro(seconds: float) -> int:
    return int(seconds * 1e6)


def plain(error: BaseException) -> str:
    """What it says, in a line: client libraries name host and port, and no secrets."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class Listener(threading.Thread, ABC):
    """Hears what the server says to this process: one connection, for as long as the process lives.  It sleeps until
    something is said, or it is stirred: somebody wants the news of another lock.  "": what is said to this process."""

    def __init__(self, server: Server) -> None:
        super().__init__(name="coheld news", daemon=True)
        self._server = server
        self._wanted = {"": threading.Event()}
        self._guard = threading.Lock()
        self._late: dict[str, tuple[float, float]] = {}  # when to ring again, by time.monotonic(), and after how long
        self._was_lost = self._ended = self._anew = False
        self._unwanted: set[str] = set()  # at the last look
        self._look, self._most = 0.0, _KEEPS
        self._told = False  # of an error, since it heard the last time
        self._pause, self._delay = Alarm(), _REACHED_AGAIN
        self.idles = False
        """Does it wait until somebody needs it?"""

    @abstractmethod
    def stir(self) -> None:
        """By another thread: look again what is wanted. Raises: BackendError."""

    @abstractmethod
    def _hear(self) -> None:
        """On a connection of its own: _missing() again and again, what is said to _server.wake() and _ring(), until it
        breaks, or not _goes_on(). Raises: whatever it was that broke it."""

    @abstractmethod
    def _cut(self) -> None:
        """By another thread: who hears finds that its connection is closed, if it has one."""

    def begin_anew(self) -> None:
        """By another thread: it hears by a new connection from now on, as if the one that it has were lost.  One that
        it makes meanwhile it leaves as well, as it looks at `_anew` once it has that."""
        self._anew = True
        self._cut()

    def _goes_on(self) -> bool:
        return not (self._ended or self._anew)

    def end(self) -> None:
        """Blocks until it has."""
        self._ended = True
        self.resume()  # which ends also a wait that begins after this
        with suppress(BackendError):
            self.stir()
        self.join(self._server.patience)

    def add(self, name: str) -> None:
        """When this returns, nothing that is said of it from now on is missed, but for what a cut connection loses.
        Raises: BackendError: if the server cannot be reached."""
        with self._guard:
            ready = self._wanted.setdefault(name, threading.Event())
        if ready.is_set():
            return
        self.resume()
        self.stir()
        if not ready.wait(self._server.patience):
            raise BackendError(
                f"{self._server.where} cannot be reached, or does not answer; trying again may work",
                resource=self._server.where,
            )

    def resume(self) -> None:
        """By another thread: somebody needs it, or the server is there again; it tries now, if it waits with that."""
        self._delay = _REACHED_AGAIN
        self._pause.set()

    def run(self) -> None:
        while not self._ended:
            self._anew = False
            try:
                self._hear()
            except Exception as error:  # whatever it was, those who wait depend on this thread
                self._lost(None if self._anew else error)
            else:
                if not self._ended:
                    self._lost(None)

    def _missing(self) -> list[str]:
        """What is wanted and not heard yet."""
        with self._guard:
            return [name for name, ready in self._wanted.items() if not ready.is_set()]

    def _let_go(self) -> list[str]:
        """Names of whose locks nobody here waits for news any more, nor did at the look before: they are not listened
        to from now on.  By an engine to which each is a burden; it looks seldom, or where there are many.

            wanted, not ready    who waits has come, with its lock GUARDED; it does not sleep before it is
            wanted, ready        listened to
            neither              let go; who comes then finds it so, and stirs the listener

        Why no news is lost: who waits sets GUARDED, then asks for the name (add), both before each sleep.  The look at
        GUARDED and the end of the name are one step under the guard that add() takes: if it comes before add, that
        finds no name, and waits until it is listened to anew, by the same thread, after it was given up; if it comes
        after add, it finds GUARDED.  That is down only where who waits was woken, and looks by itself."""
        now = time.monotonic()
        if now < self._look and len(self._wanted) <= self._most:
            return []
        self._look = now + HEALTHY
        with self._guard:
            unwanted = {name for name, ready in self._wanted.items() if name and ready.is_set()}
            unwanted -= {name for name in unwanted for bell in self._server.bells(name) if bell.is_wanted()}
            gone, self._unwanted = unwanted & self._unwanted, unwanted - self._unwanted
            for name in gone:
                del self._wanted[name]
                self._late.pop(name, None)
            self._most = max(_KEEPS, 2 * (len(self._wanted) - len(self._unwanted)))
        return list(gone)

    def _hears(self, name: str) -> None:
        """From now on.  What was said to this process since the connection was lost, nobody has heard: who waits looks
        again, for the second time; at the first it had its place, and nobody to tell it."""
        self._wanted[name].set()
        if not name:
            self._delay = _REACHED_AGAIN
            if self._told:
                self._told = False
                logging.getLogger("coheld").info("%s: its news is heard again", self._server.where)
            if self._was_lost:
                self._was_lost = False
                self._server.wake("")

    def _patience(self) -> float:
        """For how long silence is nothing to look at, seconds."""
        if not self._late:
            return HEALTHY
        return max(0.0, min(at for at, _ in self._late.values()) - time.monotonic())

    def _ring(self, names: Iterable[str]) -> None:
        """Those; who cannot be rung now is late."""
        for name in names:
            rung = [bell.ring() for bell in self._server.bells(name)]
            if all(rung):
                self._late.pop(name, None)
            else:
                _, after = self._late.get(name, (0.0, _RING_AGAIN / 2))
                after = min(2 * after, _RING_SELDOM)
                self._late[name] = time.monotonic() + after, after

    def _ring_late(self) -> None:
        """Those whose time has come again."""
        if self._late:
            now = time.monotonic()
            self._ring([name for name, (at, _) in self._late.items() if at <= now])

    def _lost(self, error: Exception | None) -> None:
        """The connection is gone, and with it what was said meanwhile: all look again.  None: it was left."""
        if error is not None and not self._told and self._is_needed():
            self._told = True
            logging.getLogger("coheld").warning("%s: its news is not heard: %s", self._server.where, plain(error))
        had_begun = self._wanted[""].is_set()
        for ready in list(self._wanted.values()):
            ready.clear()
        if had_begun:
            self._server.wake("")
        self._late = {name: (0.0, _RING_AGAIN / 2) for name in self._wanted if name}
        self._was_lost = True
        self._rest(at_once=had_begun)

    def _rest(self, at_once: bool) -> None:
        """Before the next try.  The server may be away for long; and where nobody wants to hear, nothing is tried.
        Whoever needs it has said so before it looks for an answer, and that ends this wait, or the next."""
        if not self._is_needed():
            self.idles = True
            self._pause.wait(FOREVER)
            self.idles = False
        elif not at_once:
            delay, self._delay = self._delay, min(2 * self._delay, _REACHED_SELDOM)
            self._pause.wait(delay)

    def _is_needed(self) -> bool:
        return self._ended or self._server.is_listened_to()
