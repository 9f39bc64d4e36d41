"""A state machine: threads of several processes and one lock, against a re-entrant lock in plain Python."""

from dataclasses import dataclass, field

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from coheld.testing.contract.actors import Actor, Crowd, Noting
from coheld.testing.support import delays, effort, seeds

THREADS = 3  # of a process, at most


@dataclass
class Model:
    """A re-entrant lock of which an owner may die."""

    owner: Actor | None = None
    depth: int = 0
    died: bool = False
    """An owner has, and nobody has recovered since."""
    waiting: set[Actor] = field(default_factory=set)

    def take(self, actor: Actor) -> tuple[bool, int]:
        """Did it get the lock, and how often did it recover it?"""
        if self.owner not in (None, actor):
            return False, 0
        self.owner, self.depth = actor, self.depth + 1
        recovered, self.died = self.died, False
        return True, int(recovered)

    def give(self, actor: Actor) -> bool:
        """Was it the owner?"""
        if self.owner != actor:
            return False
        self.depth -= 1
        if not self.depth:
            self.owner = None
        return True

    def lose(self, actor: Actor) -> None:
        """It has died."""
        self.waiting.discard(actor)
        if self.owner == actor:
            self.owner, self.depth, self.died = None, 0, True


class Machine(stateful.RuleBasedStateMachine):
    """Whatever is done in whichever order: what each says is what the model says."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.crowd = Model(), Crowd(Noting())
        self.actors: list[Actor] = [self.crowd.process(), self.crowd.process()]

    def some(self, data: st.DataObject) -> Actor:
        """One that is not waiting."""
        return data.draw(st.sampled_from([one for one in self.actors if one not in self.model.waiting]))

    def anybody_idle(self) -> bool:
        return len(self.model.waiting) < len(self.actors)

    def is_the_last(self) -> bool:
        """One process is left, and there will be no other."""
        return self.crowd.full() and len({process for process, _ in self.actors}) == 1

    def settle(self) -> None:
        """Where it is free now, one of those who wait has it."""
        if self.model.owner is None and self.model.waiting:
            actor, said = self.crowd.hear(self.model.waiting)
            assert actor in self.model.waiting
            self.model.waiting.remove(actor)
            assert said == self.model.take(actor)

    # -- who there is -------------------------------------------------------------------------------------------------

    @stateful.precondition(lambda self: not self.crowd.full())
    @stateful.rule()
    def start(self) -> None:
        self.actors.append(self.crowd.process())

    @stateful.precondition(lambda self: not self.crowd.full() and self.anybody_idle())
    @stateful.rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """What the parent holds, its child does not."""
        self.actors.append(self.crowd.fork(self.some(data)))

    @stateful.precondition(lambda self: self.actors)
    @stateful.rule(data=st.data())
    def start_thread(self, data: st.DataObject) -> None:
        process, _ = data.draw(st.sampled_from(self.actors))
        free = [number for number in range(1, THREADS) if (process, number) not in self.actors]
        if free:
            self.actors.append(self.crowd.thread(process, free[0]))

    @stateful.precondition(lambda self: self.anybody_idle())
    @stateful.rule(data=st.data())
    def end_thread(self, data: st.DataObject) -> None:
        """With the lock, or without."""
        actor = self.some(data)
        if actor[1]:
            self.crowd.end_thread(actor)
            self.remove([actor])

    @stateful.precondition(lambda self: self.actors and not self.is_the_last())
    @stateful.rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        """A process, and all its threads, whatever they do."""
        process, _ = data.draw(st.sampled_from(self.actors))
        self.crowd.kill(process)
        self.remove([one for one in self.actors if one[0] == process])

    def remove(self, dead: list[Actor]) -> None:
        for actor in dead:
            self.actors.remove(actor)
            self.model.lose(actor)
        self.settle()

    # -- the lock -----------------------------------------------------------------------------------------------------

    @stateful.precondition(lambda self: self.anybody_idle())
    @stateful.rule(data=st.data(), timeout=st.sampled_from([0, 0, delays.SHORT]))
    def acquire(self, data: st.DataObject, timeout: float) -> None:
        actor = self.some(data)
        assert self.crowd.ask(actor, "take", timeout) == self.model.take(actor)

    @stateful.precondition(lambda self: self.anybody_idle())
    @stateful.rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        actor = self.some(data)
        if self.model.owner in (None, actor):
            assert self.crowd.ask(actor, "take") == self.model.take(actor)
        else:
            self.crowd.tell(actor, "take")
            self.crowd.asleep(actor)
            self.model.waiting.add(actor)

    @stateful.precondition(lambda self: self.anybody_idle())
    @stateful.rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        actor = self.some(data)
        assert self.crowd.ask(actor, "give") == self.model.give(actor)
        self.settle()

    @stateful.precondition(lambda self: self.model.owner)
    @stateful.rule()
    def release_by_the_owner(self) -> None:
        """More often than chance would have it."""
        assert self.model.owner
        assert self.crowd.ask(self.model.owner, "give") == self.model.give(self.model.owner)
        self.settle()

    @stateful.invariant()
    def nobody_else_gets_it(self) -> None:
        assert self.crowd.silent({process for process, _ in self.actors})

    def teardown(self) -> None:
        self.crowd.close()


def run(machine: type[Machine], examples: int, batch: int = 0) -> None:
    """The seed of the run, and the batch, decide what is tried. What fails is shown as it was found: to shrink it takes
    minutes."""
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=30,
        phases=[hypothesis.Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    stateful.run_state_machine_as_test(hypothesis.seed(seeds.SEED + batch)(machine), settings=settings)


def test_a_lock_is_what_the_model_says() -> None:
    run(Machine, effort.rounds(20))


class Forgetful(Machine):
    """Its model does not know that a dead owner's lock is recovered."""

    def remove(self, dead: list[Actor]) -> None:
        super().remove(dead)
        self.model.died = False


def test_the_machine_sees_a_lock_that_is_not_as_its_model() -> None:
    with pytest.raises(AssertionError, match="assert"):
        for batch in range(10):  # in nearly all of them there is an example; in some there is none
            run(Forgetful, 30, batch)
