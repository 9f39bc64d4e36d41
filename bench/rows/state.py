"""Shared state: what a field costs, against what programs use for it."""

import itertools
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any

import msgspec

from bench import workers
from bench.measure import Plan, calibrated, gc_off, in_rounds
from bench.peers import COHELD
from bench.table import Bar, Line, against
from coheld import Lockable, shared

VALUE = "mp.Value"
NAMESPACE = "Manager().Namespace"
PROPERTY = "property"
CODEC = "encode, decode twice"
SMALL = "without the list"
BARE = "no shared fields"
BATCH = 10


class Counter(Lockable):
    n: int = shared(0)

    @Lockable.locked
    def count(self) -> None:
        self.n += 1

    @Lockable.locked
    def nothing(self) -> None:
        pass


def used() -> Counter:
    """One whose state is there: the first commit makes a file, and imports."""
    counter = Counter()
    counter.count()
    return counter


class Bare(Lockable):
    @Lockable.locked
    def nothing(self) -> None:
        pass


class ByValue:
    def __init__(self) -> None:
        self.value: Any = multiprocessing.get_context("fork").Value("q", 0)

    def count(self) -> None:
        value = self.value
        with value.get_lock():
            value.value += 1


class ByNamespace:
    def __init__(self, manager: Any) -> None:
        self.lock, self.space = manager.Lock(), manager.Namespace()
        self.space.n = 0

    def count(self) -> None:
        with self.lock:
            self.space.n += 1


class WithProperty:
    def __init__(self) -> None:
        self._n = 1

    @property
    def n(self) -> int:
        return self._n


class Ten(Lockable):
    n: int = shared(0)
    a: int = shared(1)
    b: int = shared(2)
    c: float = shared(0.5)
    d: float = shared(1.5)
    e: bool = shared(True)
    f: str = shared("a name")
    g: str = shared("")
    h: int | None = shared(None)
    items: list[int] = shared(default_factory=list)

    @Lockable.locked
    def count(self) -> None:
        self.n += 1


class Table(Lockable):
    rows: dict[str, int] = shared(default_factory=dict)

    @Lockable.locked
    def change(self, value: int) -> None:
        self.rows["row 500"] = value


def measure(plan: Plan) -> list[Line]:
    return [
        *_counting(plan),
        *_by_four(plan),
        *_namespace(plan),
        *_reading(plan),
        *_table(plan),
        *_ten(plan),
        *_bare(plan),
    ]


def _loops(plan: Plan, what: str, bar: Bar, peer: str, statement: str, ours: object, theirs: object) -> list[Line]:
    measures = {
        COHELD: calibrated(statement, ours, plan.loop),
        peer: calibrated(statement, theirs, plan.loop),
    }
    return against(what, "s", in_rounds(measures, plan.rounds), {peer: bar})


def _counting(plan: Plan) -> list[Line]:
    return _loops(plan, "self.n += 1, one process", Bar(0.9), VALUE, "it.count()", used(), ByValue())


def _by_four(plan: Plan) -> list[Line]:
    measures = {
        COHELD: partial(_rate, used(), plan.burst),
        VALUE: partial(_rate, ByValue(), plan.burst),
    }
    return against("self.n += 1, 4 processes", "/s", in_rounds(measures, plan.bursts), {VALUE: Bar(2.0, at_least=True)})


def _rate(counter: Any, burst: float) -> float:
    return sum(workers.together([partial(_counts, counter, burst)] * 4)) / burst


def _counts(counter: Any, burst: float) -> int:
    done = 0
    with gc_off():
        end = time.monotonic() + burst
        while True:
            for _ in repeat(None, BATCH):
                counter.count()
            if time.monotonic() > end:
                return done
            done += BATCH


def _namespace(plan: Plan) -> list[Line]:
    with multiprocessing.get_context("fork").Manager() as manager:
        return _loops(
            plan, "the same, by a manager", Bar(1 / 50), NAMESPACE, "it.count()", used(), ByNamespace(manager)
        )


def _reading(plan: Plan) -> list[Line]:
    return _loops(plan, "reading a field, unlocked", Bar(3.0), PROPERTY, "it.n", used(), WithProperty())


def _table(plan: Plan) -> list[Line]:
    table, values = Table(), itertools.count()
    with table:
        table.rows = {f"row {n}": n for n in range(1000)}
    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(dict[str, int]).decode
    rows = dict(table.rows)
    raw = encode(rows)
    work: dict[str, Callable[[], object]] = {
        COHELD: lambda: table.change(next(values)),
        CODEC: lambda: (encode(rows), decode(raw), decode(raw)),
    }
    measures = {name: calibrated("it()", one, plan.loop) for name, one in work.items()}
    samples = in_rounds(measures, plan.rounds)
    return against("a dict of 1,000, one changed", "s", samples, {CODEC: Bar(1.4)})


def _ten(plan: Plan) -> list[Line]:
    large, small = Ten(), Ten()
    with large:
        large.items = list(range(10_000))
    small.count()
    return _loops(plan, "ten fields, a counter changed", Bar(1.3), SMALL, "it.count()", large, small)


def _bare(plan: Plan) -> list[Line]:
    return _loops(plan, "a call that touches no field", Bar(1.1), BARE, "it.nothing()", used(), Bare())
