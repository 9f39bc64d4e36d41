"""Hosts that share a counter on a server, and do with it what a test says.

A host here is a process with a COHELD_DIR of its own, so that nothing but the server connects them.
"""

import logging
import os
import pickle
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import coheld
from coheld import Lockable, native, shared
from coheld.backends import memo
from coheld.testing.support import delays, procs, states
from engines import servers
from engines.proxy import Proxy

LEASE = 1.5 * delays.SCALE  # a quarter of it is how long an answer is waited for, on a busy machine as well


class Counter(Lockable):
    value: int = shared(0)
    made: int = shared(0)

    def __create__(self) -> None:
        self.made += 1

    @Lockable.locked
    def add(self) -> int:
        self.value += 1
        return self.value

    @Lockable.locked
    def make_more(self) -> int:
        self.made += 1
        return self.made

    @Lockable.locked(when=lambda counter: counter.value >= 1)
    def take(self) -> float:
        self.value -= 1
        return time.monotonic()

    @Lockable.locked
    def take_after_a_wait(self) -> float:
        coheld.wait_for(self, lambda: self.value >= 1)
        self.value -= 1
        return time.monotonic()

    @Lockable.locked
    def put(self) -> float:
        self.value += 1
        return time.monotonic()

    @Lockable.locked
    def write_slowly(self, value: int, link: procs.Link) -> None:
        self.value = value
        link.say("inside")
        link.wait_for("go on")


class Plain(Lockable):
    value: int = shared(0)

    @Lockable.locked
    def write(self, value: int) -> None:
        self.value = value


class Other(Lockable):
    value: str = shared("")

    @Lockable.locked
    def add(self) -> None:
        self.value += "1"


def plain(_: object, url: str) -> Plain:
    return Plain(lock_name="plain", lock_backend=url)


def held_and_pickled(_: object, url: str) -> bytes:
    """What its lock guards was not looked at meanwhile."""
    held = plain(_, url)
    with native.lock_of(held):
        pass
    return pickle.dumps(held)


def looks_of_semaphore(semaphore: coheld.Semaphore) -> list[str]:
    with semaphore:
        semaphore.acquire(timeout=delays.TICK)
    return [repr(semaphore), str(pickle.dumps(semaphore)), str(vars(semaphore))]


LOG: list[str] = []
HEARD: list[str] = []
ACTS: dict[str, Callable[..., Any]] = {
    "add": Counter.add,
    "make more": Counter.make_more,
    "take": Counter.take,
    "take after a wait": Counter.take_after_a_wait,
    "put": Counter.put,
    "acquire": lambda counter, timeout=None: counter.acquire(timeout=timeout),
    "release": Counter.release,
    "write": lambda counter, value: setattr(counter, "value", value),
    "value": lambda counter: counter.value,
    "made": lambda counter: counter.made,
    "token": coheld.token,
    "lost": coheld.lost,
    "ensure": coheld.ensure_held,
    "looks": lambda counter: [
        repr(counter),
        repr(native.lock_of(counter)),
        str(pickle.dumps(counter)),
        str(vars(counter)),
    ],
    "write_plain": lambda _, url, value: plain(_, url).write(value),
    "pickled": held_and_pickled,
    "semaphore": lambda _, url: looks_of_semaphore(coheld.Semaphore(1, name="permits", backend=url)),
    "other": lambda _, url: Other(lock_name="counter", lock_backend=url).add(),
    "unpickled": lambda _: "UNPICKLED" in subprocess.check_output("env", text=True),
    "pass on for long": lambda _: setattr(memo, "LONGEST_STAY", delays.LONG),
    "log": lambda _: LOG,
    "heard": lambda _: HEARD,
}


class Told(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        LOG.append(record.getMessage())


def host(link: procs.Link, directory: Path, url: str) -> None:
    """Does what it is told with the counter there, and says what came of it."""
    os.environ["COHELD_DIR"] = str(directory)
    logging.getLogger("coheld").addHandler(Told())
    logging.getLogger("coheld").setLevel(logging.INFO)
    counter = Counter(lock_name="counter", lock_backend=url)
    coheld.when_lost(counter, lambda error: HEARD.append(type(error).__name__))
    link.say("ready")
    while True:
        act, *args = link.hear()
        try:
            link.say(counter.write_slowly(*args, link) if act == "write_slowly" else ACTS[act](counter, *args))
        except (coheld.CoheldError, AssertionError) as error:
            link.say(error)


class Host:
    """One, from outside."""

    def __init__(self, worker: procs.FunctionWorker) -> None:
        self.worker = worker

    def tell(self, act: str, *args: object) -> None:
        self.worker.tell((act, *args))

    def do(self, act: str, *args: object) -> Any:
        """What came of it. Raises: what it raised there."""
        self.tell(act, *args)
        return self.result()

    def result(self) -> Any:
        if isinstance(result := self.worker.hear(), Exception):
            raise result
        return result


Start = Callable[..., Host]


@contextmanager
def starting(directory: Path, program: Callable[..., None]) -> Iterator[Start]:
    """Start hosts that run this and reach the server by that URL; they are gone at the end."""
    with ExitStack() as life:

        def begin(url: str, lease: float = LEASE) -> Host:
            place = directory / f"host-{len(list(directory.iterdir()))}"
            place.mkdir(0o700)
            one = Host(life.enter_context(procs.start(program, place, f"{url}?lease={lease}")))
            life.callback(one.worker.kill)
            one.worker.expect("ready")
            return one

        yield begin


def through(server: servers.Server, proxy: Proxy) -> str:
    """The URL by which that proxy is the server."""
    return server.url().replace(f":{server.port}/", f":{proxy.port}/")


def wait_until_waiting(server: servers.Server, number: int) -> None:
    states.wait_until(lambda: len(server.waiting("counter")) == number, f"{number} wait")
