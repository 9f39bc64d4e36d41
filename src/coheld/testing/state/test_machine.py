"""A state machine: several processes and one state, against a model in plain Python."""

import os
import signal
from contextlib import ExitStack, suppress
from typing import Any

import hypothesis
from hypothesis import stateful
from hypothesis import strategies as st

import coheld
from coheld import Lockable, shared
from coheld.testing.support import procs


class Thing(Lockable):
    number: int = shared(0)
    text: str = shared("")
    items: list[int] = shared(default_factory=list)
    table: dict[str, list[int]] = shared(default_factory=dict)

    @Lockable.locked
    def plain(self, changes: list[Any], fail: bool) -> None:
        self.change(changes, fail)

    @Lockable.locked(atomic=True)
    def atomic(self, changes: list[Any], fail: bool) -> None:
        self.change(changes, fail)

    @Lockable.locked
    def change(self, changes: list[Any], fail: bool) -> None:
        for change in changes:
            apply(self, change)
        if fail:
            raise KeyError

    @Lockable.locked
    def nested(self, before: list[Any], inner: list[Any], fail: bool, after: list[Any]) -> None:
        self.change(before, False)
        with suppress(KeyError):
            self.atomic(inner, fail)
        self.change(after, False)

    @Lockable.locked
    def die(self, changes: list[Any]) -> None:
        self.change(changes, False)
        os.kill(os.getpid(), signal.SIGKILL)


class Model:
    """The same, without any sharing."""

    def __init__(self) -> None:
        self.number, self.text = 0, ""
        self.items: list[int] = []
        self.table: dict[str, list[int]] = {}


FIELDS = ("number", "text", "items", "table")


def apply(thing: Any, change: tuple[str, Any]) -> None:
    what, value = change
    if what == "add":
        thing.number += value
    elif what == "append":
        thing.items.append(value)
    elif what == "pop" and thing.items:
        thing.items.pop()
    elif what == "deep":
        thing.table.setdefault(value[0], []).append(value[1])
    elif what == "replace":
        thing.items = list(value)
    elif what == "text":
        thing.text = value


def serve(link: procs.Link, thing: Thing) -> None:
    while (order := link.hear()) != "end":
        method, arguments = order
        with suppress(KeyError):
            getattr(thing, method)(*arguments)
        link.say({name: thaw(getattr(thing, name)) for name in FIELDS})


def thaw(value: Any) -> Any:
    import copy

    return copy.deepcopy(value)


small = st.integers(-(2**63), 2**63 - 1).filter(lambda n: abs(n) < 2**62)
change = st.one_of(
    st.tuples(st.just("add"), st.integers(-1000, 1000)),
    st.tuples(st.just("append"), small),
    st.tuples(st.just("pop"), st.none()),
    st.tuples(st.just("deep"), st.tuples(st.sampled_from(["a", "b", "ü"]), st.integers(0, 9))),
    st.tuples(st.just("replace"), st.lists(small, max_size=60)),
    st.tuples(st.just("text"), st.text(st.characters(exclude_categories=["Cs"]), max_size=40)),
)
changes = st.lists(change, max_size=4)
process = st.integers(0, 2)


class Machine(stateful.RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.thing, self.model = Thing(), Model()
        self.stack = ExitStack()
        self.workers = [self.worker() for _ in range(3)]

    def worker(self) -> Any:
        return self.stack.enter_context(procs.start(serve, self.thing))

    def order(self, number: int, method: str, *arguments: Any) -> None:
        self.workers[number].tell((method, arguments))
        seen = self.workers[number].hear()
        assert seen == {name: getattr(self.model, name) for name in FIELDS}

    def apply(self, some: list[Any]) -> None:
        for one in some:
            apply(self.model, one)

    @stateful.rule(number=process, some=changes, fail=st.booleans())
    def plain(self, number: int, some: list[Any], fail: bool) -> None:
        self.apply(some)
        self.order(number, "plain", some, fail)

    @stateful.rule(number=process, some=changes, fail=st.booleans())
    def atomic(self, number: int, some: list[Any], fail: bool) -> None:
        if not fail:
            self.apply(some)
        self.order(number, "atomic", some, fail)

    @stateful.rule(number=process, before=changes, inner=changes, fail=st.booleans(), after=changes)
    def nested(self, number: int, before: list[Any], inner: list[Any], fail: bool, after: list[Any]) -> None:
        self.apply([*before, *([] if fail else inner), *after])
        self.order(number, "nested", before, inner, fail, after)

    @stateful.rule(number=process, some=changes)
    def die(self, number: int, some: list[Any]) -> None:
        self.workers[number].tell(("die", (some,)))
        self.workers[number].end(-signal.SIGKILL)
        self.workers[number] = self.worker()

    @stateful.rule(some=changes)
    def here(self, some: list[Any]) -> None:
        self.apply(some)
        self.thing.plain(some, False)

    @stateful.invariant()
    def everybody_sees_the_same(self) -> None:
        found = coheld.snapshot(self.thing)
        assert {name: getattr(found, name) for name in FIELDS} == {name: getattr(self.model, name) for name in FIELDS}

    def teardown(self) -> None:
        for worker in self.workers:
            worker.tell("end")
        self.stack.close()


def test_the_machine() -> None:
    settings = hypothesis.settings(
        max_examples=int(os.environ.get("COHELD_MACHINES", "25")),
        stateful_step_count=15,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    stateful.run_state_machine_as_test(Machine, settings=settings)  # type: ignore[no-untyped-call]
