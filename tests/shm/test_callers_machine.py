"""A state machine: threads and tasks of several processes, a lock that some read, a semaphore and a pool, against a
model in plain Python."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from coheld import snapshot
from coheld.testing.contract.actors import Actor
from coheld.testing.support import delays, effort, seeds, states
from shm.cast import FIRST_TASK, Cast, Things

ACTORS = 5  # of a process: threads 0, 1, 2, tasks 3, 4
PERMITS = 2
RESOURCES = ["a", "b"]
DEEPEST = 2  # calls inside of one another


@dataclass
class Model:
    """What everybody has. A call that waits is in `waiting`, with what it waits for."""

    calls: dict[Actor, list[str]] = field(default_factory=dict)
    """The calls that an actor is in: read, write, or level: one more of its own."""
    died: bool = False
    """An owner has, and nobody has recovered since."""
    recovered: int = 0
    permits: Counter[int] = field(default_factory=Counter)
    """Of each process."""
    leases: dict[str, Actor] = field(default_factory=dict)
    waiting: dict[Actor, tuple[str, list[str]]] = field(default_factory=dict)
    """In the order in which they came: read, write, take, lease; and the resources that will do."""

    # -- the lock -----------------------------------------------------------------------------------------------------

    def writer(self) -> Actor | None:
        return next((actor for actor, calls in self.calls.items() if "write" in calls), None)

    def readers(self) -> list[Actor]:
        return [actor for actor, calls in self.calls.items() if "read" in calls]

    def counted(self) -> int:
        """Reading calls."""
        return sum(calls.count("read") for calls in self.calls.values())

    def waiters(self, *kinds: str) -> list[Actor]:
        return [actor for actor, (kind, _) in self.waiting.items() if kind in kinds]

    def is_inside(self, actor: Actor) -> bool:
        return bool(self.calls.get(actor))

    def may(self, actor: Actor, kind: str) -> bool:
        """Might it come in now, by what must hold always?"""
        if self.is_inside(actor):
            return kind == "read" or self.writer() == actor
        together = kind == "read" and not self.died
        return self.writer() is None and (together or not self.readers())

    def at_once(self, actor: Actor, kind: str) -> bool:
        """Does it come in now, where all is calm? One that waits for readers has others behind it."""
        return self.may(actor, kind) and (self.is_inside(actor) or not self.waiters("read", "write"))

    def come_in(self, actor: Actor, kind: str) -> None:
        if self.is_inside(actor):
            self.calls[actor].append("read" if "read" in self.calls[actor] else "level")
            return
        self.calls.setdefault(actor, []).append(kind)
        self.recovered += self.died
        self.died = False

    # -- permits and leases -------------------------------------------------------------------------------------------

    def free(self) -> int:
        return PERMITS - self.permits.total()

    def fitting(self, actor: Actor, keys: list[str]) -> list[str]:
        """One of these it would get, behind those who wait; which, depends on whose death somebody has seen."""
        earlier: set[str] = set()
        for other in self.waiters("lease"):
            if other == actor:
                break
            earlier.update(self.waiting[other][1])
        return [key for key in keys if key not in self.leases and key not in earlier]

    # -- both ---------------------------------------------------------------------------------------------------------

    def owed(self) -> set[Actor]:
        """One of them, at least, gets what it waits for."""
        if self.free() and (takers := self.waiters("take")):
            return set(takers)
        if lessees := {one for one in self.waiters("lease") if self.fitting(one, self.waiting[one][1])}:
            return lessees
        writers, readers = self.waiters("write"), self.waiters("read")
        if self.writer() or (self.readers() and (writers or self.died)):
            return set()
        return {*writers, *readers}

    def lose(self, process: int) -> None:
        """It has died."""
        writer = self.writer()
        self.died |= writer is not None and writer[0] == process
        self.permits.pop(process, None)
        self.leases = {key: one for key, one in self.leases.items() if one[0] != process}
        self.calls = {one: calls for one, calls in self.calls.items() if one[0] != process}
        self.waiting = {one: what for one, what in self.waiting.items() if one[0] != process}


class Machine(stateful.RuleBasedStateMachine):
    """Whatever is done in whichever order: what each says is what the model says."""

    made = 0
    failure: Exception | None = None

    def __init__(self) -> None:
        super().__init__()
        self.model, self.things = self.new_model(), Things(PERMITS, RESOURCES)
        self.cast = Cast(self.things)
        self.actors: list[Actor] = [self.cast.process(), self.cast.process()]
        self.actors += [self.cast.more(process, number) for process in (0, 1) for number in (1, FIRST_TASK)]

    def new_model(self) -> Model:
        return Model()

    def idle(self, threads: bool = False) -> list[Actor]:
        """Those that do not wait."""
        return [one for one in self.actors if one not in self.model.waiting and not (threads and one[1] >= FIRST_TASK)]

    def some(self, data: st.DataObject, threads: bool = False) -> Actor:
        return data.draw(st.sampled_from(self.idle(threads)))

    # -- until all is calm --------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Hear of all who get what they wait for, until nothing moves by itself any more."""
        deadline = time.monotonic() + delays.LONG
        while (owed := self.model.owed()) or not self.is_calm():
            heard = list(self.hear(delays.LONG if owed else delays.TICK))
            assert heard or not owed, f"none of {owed} gets what it waits for"
            assert time.monotonic() < deadline, "it does not come to rest"

    def is_calm(self) -> bool:
        """Nobody is on the way: who has the mutex is a writer inside, or waits for those who read."""
        list(self.hear(0))
        ledger, lock, waiting = snapshot(self.things.pool._ledger), self.things.thing.__lock__, self.model.waiting
        if len(ledger.queue) < len(self.model.waiters("lease")):
            return False
        if self.model.writer():
            return True
        owner = lock.owner()
        if not self.model.waiters("read", "write"):
            return owner is None or states.gone(owner.pid)
        pids = {self.cast.pid(process) for process, _ in waiting}
        counted = sum(count for _, _, count in lock._held_by())
        return owner is not None and owner.pid in pids and counted == self.model.counted()

    def hear(self, timeout: float) -> Iterator[Actor]:
        if self.model.waiting and not self.cast.silent_for({process for process, _ in self.actors}, timeout):
            actor, said = self.cast.hear(self.actors)
            self.get(actor, said)
            yield actor

    def get(self, actor: Actor, said: Any) -> None:
        """It has got what it waited for."""
        assert actor in self.model.waiting, f"{actor} says {said!r}, and did not wait"
        kind, keys = self.model.waiting[actor]
        fits = self.model.fitting(actor, keys)
        del self.model.waiting[actor]
        if kind in ("read", "write"):
            assert said == "in"
            assert self.model.may(actor, kind), f"{actor} is in by a call that is to {kind}"
            self.model.come_in(actor, kind)
        elif kind == "take":
            assert said is True
            assert self.model.free()
            self.model.permits[actor[0]] += 1
        else:
            assert said in fits
            self.model.leases[said] = actor

    @stateful.invariant()
    def nobody_gets_what_is_not_there(self) -> None:
        self.settle()
        assert self.cast.silent({process for process, _ in self.actors})
        assert self.things.recoveries() == self.model.recovered

    # -- who there is -------------------------------------------------------------------------------------------------

    @stateful.precondition(lambda self: not self.cast.full())
    @stateful.rule()
    def start(self) -> None:
        self.actors.append(self.cast.process())

    @stateful.precondition(lambda self: not self.cast.full() and self.idle(threads=True))
    @stateful.rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """What the parent has, its child has not; also by one that is in a call."""
        self.actors.append(self.cast.fork(self.some(data, threads=True)))

    @stateful.precondition(lambda self: self.actors)
    @stateful.rule(data=st.data())
    def one_more(self, data: st.DataObject) -> None:
        """Thread, or task."""
        process, _ = data.draw(st.sampled_from(self.actors))
        free = [number for number in range(1, ACTORS) if (process, number) not in self.actors]
        if free:
            self.actors.append(self.cast.more(process, data.draw(st.sampled_from(free))))

    @stateful.precondition(lambda self: self.actors)
    @stateful.rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        """A process, and all that it does; one that waits for readers does so as the owner of the mutex."""
        self.end(data.draw(st.sampled_from(self.actors))[0])

    def end(self, process: int) -> None:
        if self.cast.full() and len({one for one, _ in self.actors}) == 1:
            return
        owner = self.things.thing.__lock__.owner()
        heir = owner is not None and owner.pid == self.cast.pid(process)
        self.cast.kill(process)
        self.actors = [one for one in self.actors if one[0] != process]
        self.model.lose(process)
        self.model.died |= heir

    # -- what they do -------------------------------------------------------------------------------------------------

    @stateful.precondition(lambda self: self.idle())
    @stateful.rule(
        data=st.data(), kind=st.sampled_from(["read", "read", "write"]), how=st.sampled_from(["now", "soon"])
    )
    def call(self, data: st.DataObject, kind: str, how: str) -> None:
        self.do_call(self.some(data), kind, how)

    @stateful.precondition(lambda self: self.idle())
    @stateful.rule(data=st.data(), kind=st.sampled_from(["read", "write"]))
    def call_for_ever(self, data: st.DataObject, kind: str) -> None:
        self.do_call(self.some(data), kind, "wait")

    def do_call(self, actor: Actor, kind: str, how: str) -> None:
        model = self.model
        if len(model.calls.get(actor, [])) == DEEPEST:
            return
        if model.at_once(actor, kind):
            assert self.cast.ask(actor, kind, how) == "in"
            model.come_in(actor, kind)
        elif kind == "write" and actor in model.readers():
            assert self.cast.ask(actor, kind, how) == ("time is up" if how == "now" else "deadlock")
        else:
            self.wait(actor, kind, how, how, "time is up")

    def wait(self, actor: Actor, kind: str, how: str, value: Any, else_: Any, keys: list[str] | None = None) -> None:
        """Not now."""
        if how != "wait":
            assert self.cast.ask(actor, kind, value) == else_
            return
        self.cast.tell(actor, kind, value)
        self.cast.asleep(actor)
        self.model.waiting[actor] = kind, keys or []

    @stateful.precondition(lambda self: any(self.model.calls.get(one) for one in self.idle()))
    @stateful.rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.give_up(data.draw(st.sampled_from([one for one in self.idle() if self.model.calls.get(one)])), "leave")

    def give_up(self, actor: Actor, word: str) -> None:
        said = self.cast.ask(actor, word)
        if word == "leave":
            assert said == "left"
            self.model.calls[actor].pop()
        elif word == "give":
            had = self.model.permits[actor[0]] > 0
            assert said is had
            self.model.permits[actor[0]] -= had
        else:
            assert said is None
            del self.model.leases[[key for key, one in self.model.leases.items() if one == actor][-1]]

    def in_the_way(self) -> list[tuple[Actor, str]]:
        """What somebody waits for, another has, and can give up."""
        kinds = {kind for kind, _ in self.model.waiting.values()}
        keys = {key for _, keys in self.model.waiting.values() for key in keys}
        ways = {
            "leave": lambda one: kinds & {"read", "write"} and self.model.is_inside(one),
            "give": lambda one: "take" in kinds and self.model.permits[one[0]],
            "return": lambda one: any(self.model.leases.get(key) == one for key in keys),
        }
        return [(one, word) for one in self.idle() for word, is_one in ways.items() if is_one(one)]

    @stateful.precondition(lambda self: self.in_the_way())
    @stateful.rule(data=st.data())
    def make_way(self, data: st.DataObject) -> None:
        """More often than chance would have it."""
        self.give_up(*data.draw(st.sampled_from(self.in_the_way())))

    @stateful.precondition(lambda self: self.in_the_way())
    @stateful.rule(data=st.data())
    def make_way_by_dying(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.in_the_way()))[0][0])

    @stateful.precondition(lambda self: self.model.waiting)
    @stateful.rule(data=st.data())
    def kill_who_waits(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from([*self.model.waiting]))[0])

    @stateful.precondition(lambda self: self.idle())
    @stateful.rule(data=st.data(), how=st.sampled_from(["now", "soon", "wait"]))
    def take(self, data: st.DataObject, how: str) -> None:
        """Who tries once passes those who wait, but finds none free where somebody does."""
        actor = self.some(data)
        if self.model.free():
            assert self.cast.ask(actor, "take", how) is True
            self.model.permits[actor[0]] += 1
        else:
            self.wait(actor, "take", how, how, False)

    @stateful.precondition(lambda self: self.idle())
    @stateful.rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        """Whatever thread or task of the process has taken it; or none has."""
        self.give_up(self.some(data), "give")

    @stateful.precondition(lambda self: self.idle())
    @stateful.rule(
        data=st.data(),
        how=st.sampled_from(["now", "soon", "wait"]),
        keys=st.sampled_from([["a"], ["b"], RESOURCES, RESOURCES]),
    )
    def lease(self, data: st.DataObject, how: str, keys: list[str]) -> None:
        actor = self.some(data)
        if fits := self.model.fitting(actor, keys):
            key = self.cast.ask(actor, "lease", (how, keys))
            assert key in fits
            self.model.leases[key] = actor
        else:
            self.wait(actor, "lease", how, (how, keys), None, keys)

    @stateful.precondition(lambda self: set(self.model.leases.values()) & set(self.idle()))
    @stateful.rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """The lease that it has had last."""
        self.give_up(
            data.draw(st.sampled_from([one for one in self.idle() if one in self.model.leases.values()])), "return"
        )

    @stateful.precondition(lambda self: any(number >= FIRST_TASK for _, number in self.model.waiting))
    @stateful.rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A task that waits."""
        actor = data.draw(st.sampled_from([one for one in self.model.waiting if one[1] >= FIRST_TASK]))
        assert self.cast.ask(actor, "cancel") == "cancelled"
        del self.model.waiting[actor]

    def teardown(self) -> None:
        type(self).made += 1
        error = sys.exc_info()[1]
        if isinstance(error, Exception) and not isinstance(error, hypothesis.errors.HypothesisException):
            type(self).failure = type(self).failure or error
        self.cast.close()


def run(machine: type[Machine], examples: int) -> None:
    """The seed of the run decides what is tried. What fails is shown as it was found. Who of those who wait is first
    may differ from one time to the other, and what is drawn with it: where Hypothesis finds that out it begins anew.

    Raises: AssertionError: the first, whatever came of it when it was tried again.
    """
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=40,
        phases=[hypothesis.Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    machine.made, machine.failure = 0, None
    while machine.made < examples:
        with suppress(hypothesis.errors.Flaky):
            stateful.run_state_machine_as_test(hypothesis.seed(seeds.SEED + machine.made)(machine), settings=settings)
        if machine.failure is not None:
            raise machine.failure


def test_readers_permits_and_leases_are_what_the_model_says() -> None:
    run(Machine, effort.rounds(15))


class Immortal(Model):
    """A dead process keeps its permits."""

    def lose(self, process: int) -> None:
        kept = self.permits[process]
        super().lose(process)
        self.permits[process] = kept


class Unread(Model):
    """A dead process reads on."""

    def lose(self, process: int) -> None:
        reading = {one: self.calls[one] for one in self.readers() if one[0] == process}
        super().lose(process)
        self.calls |= reading


class AboutPermits(Machine):
    """With less to choose from, a mistake is found sooner."""

    call = call_for_ever = lease = None

    def new_model(self) -> Model:
        return Immortal()


class AboutReaders(Machine):
    """As above."""

    take = lease = make_way = kill_who_waits = fork = None

    def new_model(self) -> Model:
        return Unread()


@pytest.mark.parametrize("mistaken", [AboutPermits, AboutReaders])
def test_the_machine_sees_what_is_not_as_its_model(mistaken: type[Machine]) -> None:
    with pytest.raises(AssertionError):
        run(mistaken, 150)
