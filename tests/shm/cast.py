"""Threads and tasks of several processes that do with a lock, a semaphore and a pool as they are told; the conversation
is that of coheld.testing.contract.actors. In a call they go on to do as told, until they hear that they leave it.
"""

import asyncio
import itertools
import mmap
import os
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from coheld import DeadlockError, Lockable, LockTimeout, PermitError, Pool, Semaphore, aio
from coheld.testing.contract.actors import Actor, Crowd
from coheld.testing.support import delays, procs, states

FIRST_TASK = 3  # of a process the actors from here on are tasks of one loop, those before are threads
PATIENCE = {"now": 0, "soon": delays.SHORT, "wait": None}
_recoveries = mmap.mmap(-1, mmap.PAGESIZE)  # of all processes; whoever recovers has the lock


class Thing(Lockable):
    """Has the lock."""

    def __recover__(self, dead: Any) -> None:
        _recoveries[0] += 1


def _methods(kind: str, exclusive: bool) -> None:
    """Of each kind and patience one for threads, and one for tasks."""

    def call(self: Thing, body: Callable[[], None]) -> None:
        body()

    async def task_call(self: Thing, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await body()

    for (how, seconds), fn in itertools.product(PATIENCE.items(), (call, task_call)):
        setattr(Thing, f"{kind}_{how}_{fn.__name__}", Lockable.locked(timeout=seconds, exclusive=exclusive)(fn))


_methods("read", False)
_methods("write", True)


class Things:
    """What they share."""

    def __init__(self, permits: int, resources: list[str]) -> None:
        self.thing, self.semaphore, self.pool = Thing(), Semaphore(permits), Pool(resources)
        _recoveries[0] = 0

    def recoveries(self) -> int:
        return _recoveries[0]


class Process:
    """The side of one process: its threads and tasks, and its end of the conversation."""

    def __init__(self, things: Things, ends: list[Connection], number: int) -> None:
        self.things, self.ends, self.number = things, ends, number
        self.saying = threading.Lock()
        self.orders: dict[int, Any] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.loop: asyncio.AbstractEventLoop | None = None

    def live(self) -> None:
        """By its first thread, which becomes actor 0."""
        self.orders[0] = queue.SimpleQueue()
        threading.Thread(target=self.listen, daemon=True).start()
        self.thread(0)

    def listen(self) -> None:
        with suppress(EOFError):
            while True:
                number, word, value = self.ends[self.number].recv()
                if word == "begin":
                    self.begin(number)
                elif number < FIRST_TASK:
                    self.orders[number].put((word, value))
                else:
                    assert self.loop
                    self.loop.call_soon_threadsafe(self.order_task, number, word, value)
        os._exit(0)

    def begin(self, number: int) -> None:
        if number < FIRST_TASK:
            self.orders[number] = queue.SimpleQueue()
            threading.Thread(target=self.thread, args=[number], daemon=True).start()
            return
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.loop.call_soon_threadsafe(self.begin_task, number)

    def begin_task(self, number: int) -> None:
        self.orders[number] = asyncio.Queue()
        self.tasks[number] = asyncio.get_running_loop().create_task(self.task(number))

    def order_task(self, number: int, word: str, value: Any) -> None:
        """ping: when the loop comes to that, the task waits, or has said what came of it."""
        if word == "cancel":
            self.tasks[number].cancel()
        elif word == "ping":
            asyncio.get_running_loop().call_soon(self.say, number, "pong")
        else:
            self.orders[number].put_nowait((word, value))

    def say(self, number: int, what: object) -> None:
        with self.saying:
            self.ends[self.number].send((number, what))

    # -- a thread -----------------------------------------------------------------------------------------------------

    def thread(self, number: int) -> None:
        self.say(number, (os.getpid(), threading.get_native_id()))
        self.act(number, [])

    def act(self, number: int, leases: list[Any]) -> None:
        while True:
            word, value = self.orders[number].get()
            if word == "leave":
                return
            self.say(number, self.do(number, leases, word, value))

    def do(self, number: int, leases: list[Any], word: str, value: Any) -> Any:
        if word in ("read", "write"):
            return self.call(number, leases, f"{word}_{value}_call")
        if word == "take":
            return self.things.semaphore.acquire(timeout=PATIENCE[value])
        if word == "lease":
            return self.lease(leases, *value)
        if word == "return":
            return leases.pop().__exit__()
        return self.fork(value) if word == "fork" else self.give(value)

    def call(self, number: int, leases: list[Any], method: str) -> str:
        def body() -> None:
            self.say(number, "in")
            self.act(number, leases)

        try:
            getattr(self.things.thing, method)(body)
        except LockTimeout:
            return "time is up"
        except DeadlockError:
            return "deadlock"
        return "left"

    def give(self, _: None) -> bool:
        try:
            self.things.semaphore.release()
        except PermitError:
            return False
        return True

    def lease(self, leases: list[Any], how: str, keys: list[str]) -> str | None:
        lease = self.things.pool.lease(PATIENCE[how], where=lambda resource: resource in keys)
        try:
            resource = lease.__enter__()
        except LockTimeout:
            return None
        leases.append(lease)
        return resource

    def fork(self, number: int) -> None:
        if not os.fork():
            try:
                Process(self.things, self.ends, number).live()
            finally:
                os._exit(1)

    # -- a task -------------------------------------------------------------------------------------------------------

    async def task(self, number: int) -> None:
        self.say(number, (os.getpid(), threading.get_native_id()))
        await self.task_act(number, [])

    async def task_act(self, number: int, leases: list[Any]) -> None:
        while True:
            word, value = await self.orders[number].get()
            if word == "leave":
                return
            try:
                said = await self.task_does(number, leases, word, value)
            except asyncio.CancelledError:
                said = "cancelled"
            self.say(number, said)

    async def task_does(self, number: int, leases: list[Any], word: str, value: Any) -> Any:
        if word in ("read", "write"):
            return await self.task_call(number, leases, f"{word}_{value}_task_call")
        if word == "take":
            return await aio.acquire(self.things.semaphore, PATIENCE[value])
        if word == "lease":
            return await self.task_lease(leases, *value)
        if word == "return":
            return await leases.pop().__aexit__()
        return self.give(value)

    async def task_call(self, number: int, leases: list[Any], method: str) -> str:
        async def body() -> None:
            self.say(number, "in")
            await self.task_act(number, leases)

        try:
            await getattr(self.things.thing, method)(body)
        except LockTimeout:
            return "time is up"
        except DeadlockError:
            return "deadlock"
        return "left"

    async def task_lease(self, leases: list[Any], how: str, keys: list[str]) -> str | None:
        lease = self.things.pool.lease(PATIENCE[how], where=lambda resource: resource in keys)
        try:
            resource = await lease.__aenter__()
        except LockTimeout:
            return None
        leases.append(lease)
        return resource


def begin(_: procs.Link, things: Things, ends: list[Connection], number: int) -> None:
    Process(things, ends, number).live()


class Cast(Crowd):
    """The test's side."""

    def __init__(self, things: Things) -> None:
        super().__init__(things)  # type: ignore[arg-type]  # it hands them on

    def process(self) -> Actor:
        actor = self._new()
        worker = self._started.enter_context(procs.start(begin, self._obj, self._theirs(), actor[0]))
        self._started.callback(worker.kill)
        return self._born(actor)

    def more(self, process: int, number: int) -> Actor:
        """One more thread or task of a process."""
        self.tell((process, number), "begin")
        return self._born((process, number))

    def pid(self, process: int) -> int:
        return self._where[process, 0][0]

    def silent_for(self, processes: Iterable[int], seconds: float) -> bool:
        """Has nobody there said anything by then?"""
        return not wait([self._pipes[process][0] for process in processes], seconds)

    def asleep(self, actor: Actor) -> None:
        """Returns when a thread sleeps, or a task waits."""
        if actor[1] < FIRST_TASK:
            pid, tid = self._where[actor]
            states.wait_until(lambda: states.blocked(pid, tid) or not self.silent([actor[0]]), f"{actor} waits")
            assert self.silent([actor[0]]), f"{actor} does not wait"
        else:  # what comes of it at once it says before that
            assert self.ask(actor, "ping") == "pong"
