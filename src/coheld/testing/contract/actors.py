"""Threads of several processes that do with one lock as they are told, one word at a time, and may die at any time.

    crowd = Crowd(obj)                 # in the test; at its end crowd.close()
    actor = crowd.process()            # a new process's first thread; also crowd.thread(actor), crowd.fork(actor)
    crowd.ask(actor, "try")            # what it says
    crowd.tell(actor, "wait")          # without an answer yet; crowd.hear([actor, …]): who answers first, and what

An actor is (number of its process, number of its thread).
"""

import os
import queue
import signal
import threading
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from coheld import Lockable, NotOwnerError
from coheld.testing.support import delays, procs, states

Actor = tuple[int, int]
MOST = 12  # processes in the life of a crowd


class Noting(Lockable):
    """Counts in each process how often it was recovered there."""

    recovered = 0

    def __recover__(self, dead: Any) -> None:
        type(self).recovered += 1


class Process:
    """The side of one process: its threads, and its end of the conversation."""

    def __init__(self, obj: Noting, ends: list[Connection], number: int) -> None:
        Noting.recovered = 0
        self.obj, self.ends, self.number = obj, ends, number
        self.saying = threading.Lock()
        self.orders: dict[int, queue.SimpleQueue[tuple[str, Any]]] = {}
        self.threads: dict[int, threading.Thread] = {}

    def live(self) -> None:
        """By its first thread, which becomes actor 0."""
        self.orders[0] = queue.SimpleQueue()
        threading.Thread(target=self.listen, daemon=True).start()
        self.act(0)

    def listen(self) -> None:
        """Hand on what the test says, until it closes its end."""
        with suppress(EOFError):
            while True:
                thread, word, value = self.ends[self.number].recv()
                if word == "thread":
                    self.orders[thread] = queue.SimpleQueue()
                    self.threads[thread] = threading.Thread(target=self.act, args=[thread], daemon=True)
                    self.threads[thread].start()
                else:
                    self.orders[thread].put((word, value))
        os._exit(0)

    def act(self, thread: int) -> None:
        self.say(thread, (os.getpid(), threading.get_native_id()))
        while True:
            word, value = self.orders[thread].get()
            if word == "end":
                return
            self.say(thread, getattr(self, word)(value))

    def say(self, thread: int, what: object) -> None:
        with self.saying:
            self.ends[self.number].send((thread, what))

    def take(self, timeout: float | None) -> tuple[bool, int]:
        """Did it get the lock, and how often did it recover it?"""
        before = self.obj.recovered
        return self.obj.acquire(timeout=timeout), self.obj.recovered - before

    def give(self, _: None) -> bool:
        """Was it ours to give?"""
        try:
            self.obj.release()
        except NotOwnerError:
            return False
        return True

    def fork(self, number: int) -> None:
        if not os.fork():
            try:
                Process(self.obj, self.ends, number).live()
            finally:
                os._exit(1)


def begin(_: procs.Link, obj: Noting, ends: list[Connection], number: int) -> None:
    Process(obj, ends, number).live()


class Crowd:
    """The test's side."""

    def __init__(self, obj: Noting) -> None:
        self._obj = obj
        self._pipes = [Pipe() for _ in range(MOST)]  # made before all processes: whoever is forked can use its own
        self._started = ExitStack()
        self._where: dict[Actor, tuple[int, int]] = {}
        self._used = 0

    def process(self) -> Actor:
        """One more child of the test."""
        actor = self._new()
        worker = self._started.enter_context(procs.start(begin, self._obj, self._theirs(), actor[0]))
        self._started.callback(worker.kill)
        return self._born(actor)

    def fork(self, parent: Actor) -> Actor:
        """By that thread of a process, which says nothing else."""
        actor = self._new()
        self.ask(parent, "fork", actor[0])
        return self._born(actor)

    def thread(self, process: int, thread: int) -> Actor:
        """One more thread of a process."""
        actor = process, thread
        self.tell(actor, "thread")
        return self._born(actor)

    def full(self) -> bool:
        """There will be no more processes."""
        return self._used == MOST

    def end_thread(self, actor: Actor) -> None:
        """Returns when the kernel has let it go."""
        self.tell(actor, "end")
        states.wait_until(partial(self._thread_gone, *self._where.pop(actor)), "the thread has ended")

    def kill(self, process: int) -> None:
        """SIGKILL; returns when it is gone."""
        pid = self._where[process, 0][0]
        os.kill(pid, signal.SIGKILL)
        states.wait_until(partial(self._process_gone, pid), "the process has ended")

    def tell(self, actor: Actor, word: str, value: Any = None) -> None:
        self._pipes[actor[0]][0].send((actor[1], word, value))

    def ask(self, actor: Actor, word: str, value: Any = None) -> Any:
        self.tell(actor, word, value)
        who, said = self.hear([actor])
        assert who == actor, f"{who} answers instead of {actor}"
        return said

    def hear(self, actors: Iterable[Actor], timeout: float = delays.LONG) -> tuple[Actor, Any]:
        """The first that says something."""
        ours = {self._pipes[process][0]: process for process, _ in actors}
        ready = wait(list(ours), timeout)
        assert ready, f"none of {list(actors)} says anything"
        assert isinstance(ready[0], Connection)
        thread, said = ready[0].recv()
        return (ours[ready[0]], thread), said

    def silent(self, processes: Iterable[int]) -> bool:
        """Has nobody there said anything that was not heard?"""
        return not wait([self._pipes[process][0] for process in processes], 0)

    def asleep(self, actor: Actor) -> None:
        """Returns when it sleeps until the lock is free."""
        states.wait_until_blocked(*self._where[actor])

    def close(self) -> None:
        """All processes end."""
        pids = {pid for pid, _ in self._where.values()}
        for pid in pids:
            if not states.gone(pid):
                os.kill(pid, signal.SIGKILL)
        self._started.close()
        for pid in pids:  # whom a process forked that has ended are the test's to wait for
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
        for pipe in self._pipes:
            for end in pipe:
                end.close()

    def _theirs(self) -> list[Connection]:
        return [theirs for _, theirs in self._pipes]

    def _new(self) -> Actor:
        self._used += 1
        return self._used - 1, 0

    def _born(self, actor: Actor) -> Actor:
        who, where = self.hear([actor])
        assert who == actor
        self._where[actor] = where
        return actor

    @staticmethod
    def _thread_gone(pid: int, tid: int) -> bool:
        return states.task(pid, tid) is None

    @staticmethod
    def _process_gone(pid: int) -> bool:
        """All its threads: the first may be a zombie while another still has the files that they share."""
        found = [states.task(pid, tid) for tid in states.threads_of(pid)]
        return all(one is None or one.state in "ZX" for one in found)
