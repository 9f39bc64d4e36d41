"""Guards and wait_for: woken, not polled; over processes; after deaths; what could never end is an error."""

import asyncio
import os
import signal
import threading
import time
from decimal import Decimal
from typing import Any

import pytest

import coheld
from coheld import DeadlockError, Lockable, LockTimeout, NotLockedError, shared
from coheld.backends.monitor import Monitor
from coheld.mutex import remove
from coheld.testing.state.things import Shelf
from coheld.testing.support import delays, procs, states


def take_some(link: procs.Link, shelf: Shelf, count: int) -> list[str]:
    link.say("taking")
    return [shelf.take() for _ in range(count)]


def put_some(link: procs.Link, shelf: Shelf, name: str, count: int) -> None:
    for n in range(count):
        shelf.put_bounded(f"{name}{n}")


def test_a_guard_waits_until_another_process_makes_it_true() -> None:
    shelf = Shelf()
    with procs.start(take_some, shelf, 2) as taker:
        taker.expect("taking")
        taker.wait_until_blocked()
        shelf.put("a")
        shelf.put("b")
        assert taker.result() == ["a", "b"]


@pytest.mark.parametrize("method", procs.METHODS)
def test_a_bounded_buffer(method: str) -> None:
    shelf = Shelf(lock_name="shelf")
    with (
        procs.start(put_some, shelf, "a", 200, method=method),
        procs.start(put_some, shelf, "b", 200, method=method),
        procs.start(take_some, shelf, 200, method=method) as one,
        procs.start(take_some, shelf, 200, method=method) as other,
    ):
        taken = one.result() + other.result()
    assert sorted(taken) == sorted(f"{name}{n}" for name in "ab" for n in range(200))
    assert shelf.items == [] and shelf.count == 0
    for name in "ab":  # each taker got each producer's in order
        for half in (taken[:200], taken[200:]):
            numbers = [int(one[1:]) for one in half if one[0] == name]
            assert numbers == sorted(numbers)


def test_a_wake_is_not_a_poll() -> None:
    """A hundred hand-overs take far less than a hundred slices of sleep."""
    shelf = Shelf()
    with procs.start(take_some, shelf, 100) as taker:
        begun = time.monotonic()
        for n in range(100):
            shelf.put_bounded(f"{n}")
        assert taker.result() == [f"{n}" for n in range(100)]
        assert time.monotonic() - begun < 100 * 0.2 / 2


def test_the_timeout_covers_the_lock_and_the_guard() -> None:
    class Never(Shelf):
        @Lockable.locked(when=lambda self: False, timeout=delays.SHORT)
        def never(self) -> None:
            raise AssertionError("called")

    never = Never()
    with pytest.raises(LockTimeout, match="its guard was false") as failure:
        never.never()
    assert failure.value.waited == delays.SHORT
    assert coheld.holder(never) is None
    never.put("a")  # nobody is in the way


def test_a_guard_sees_the_last_commit_and_may_only_look() -> None:
    class Spoiled(Shelf):
        @Lockable.locked(when=lambda self: self.items.append("x"))
        def in_place(self) -> None: ...

        @Lockable.locked(when=lambda self: setattr(self, "count", 1))
        def assigned(self) -> None: ...

        @Lockable.locked(when=lambda self: self.put("x"))
        def by_a_call(self) -> None: ...

    spoiled = Spoiled()
    for method in (spoiled.in_place, spoiled.assigned, spoiled.by_a_call):
        with pytest.raises(NotLockedError):
            method()
        assert coheld.holder(spoiled) is None
    assert spoiled.items == [] and spoiled.count == 0
    with spoiled:  # and in a nested call, where there are changes to be seen
        spoiled.put("a")
        with pytest.raises(NotLockedError):
            spoiled.assigned()
        assert spoiled.take() == "a"


@pytest.mark.parametrize("changes", [False, True])
def test_a_guard_of_a_call_that_has_changed_something_may_only_look_too(changes: bool) -> None:
    shelf = Shelf()
    shelf.put("a")
    with shelf:
        if changes:
            shelf.put("b")
        with pytest.raises(NotLockedError):
            coheld.wait_for(shelf, lambda: [shelf.items.pop()], timeout=0)
        assert coheld.wait_for(shelf, lambda: list(shelf.items), timeout=0) == ["a", "b"][: 1 + changes]
        shelf.items.append("c")
    assert shelf.items == [*["a", "b"][: 1 + changes], "c"]


def test_a_guard_that_raises_leaves_the_lock_free() -> None:
    class Wrong(Shelf):
        @Lockable.locked(when=lambda self: 1 / 0)
        def wrong(self) -> None: ...

    wrong = Wrong()
    with pytest.raises(ZeroDivisionError):
        wrong.wrong()
    assert coheld.holder(wrong) is None


def test_a_false_guard_in_a_nested_call_is_an_error_at_once() -> None:
    shelf = Shelf()
    with shelf, pytest.raises(DeadlockError, match="nested"):
        shelf.take()
    with shelf:
        shelf.put("a")
        assert shelf.take() == "a"


def test_threads_wake_each_other() -> None:
    shelf, taken = Shelf(), []
    takers = [threading.Thread(target=lambda: taken.append(shelf.take())) for _ in range(3)]
    for taker in takers:
        taker.start()
    for item in "abc":
        shelf.put(item)
    for taker in takers:
        taker.join(delays.LONG)
    assert sorted(taken) == ["a", "b", "c"]


def test_attributes_that_are_not_shared_work_between_threads() -> None:
    class Door(Lockable):
        opened = False

        @Lockable.locked
        def open(self) -> None:
            self.opened = True

        @Lockable.locked(when=lambda self: self.opened)
        def pass_(self) -> str:
            return "passed"

    door, passed = Door(), []
    thread = threading.Thread(target=lambda: passed.append(door.pass_()))
    thread.start()
    door.open()
    thread.join(delays.LONG)
    assert passed == ["passed"]


def test_a_killed_waiter_strands_nobody() -> None:
    shelf = Shelf()
    with (
        procs.start(take_some, shelf, 1) as doomed,
        procs.start(take_some, shelf, 1) as other,
        procs.start(take_some, shelf, 1) as stopped,
    ):
        for one in (doomed, other, stopped):
            one.expect("taking")
        states.wait_until(lambda: guards(shelf) == 3, "all of them wait for the guard, and none for the lock")
        for one in (doomed, other, stopped):
            one.wait_until_blocked()
        doomed.kill()
        stopped.stop()
        shelf.put("a")
        assert other.result() == ["a"]
        shelf.put("b")
        stopped.cont()
        assert stopped.result() == ["b"]
    assert shelf.items == []


def guards(shelf: Shelf) -> int:
    """How many wait for a condition."""
    return sum(waiter.waits_for == "guard" for waiter in coheld.waiters(shelf))


def put_and_die(link: procs.Link, shelf: Shelf, committed: bool) -> None:
    shelf.acquire()
    shelf.put("a")
    if committed:
        shelf.__lock__._commit()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("committed", [True, False])
def test_a_committer_that_dies_before_its_release(committed: bool) -> None:
    """Its word wakes nobody: who waits for a guard finds the death, and looks at what was committed."""
    shelf = Shelf()
    with procs.start(take_some, shelf, 1) as taker:
        taker.expect("taking")
        taker.wait_until_blocked()
        with procs.start(put_and_die, shelf, committed) as killer:
            killer.end(-signal.SIGKILL)
        if not committed:
            taker.wait_until_blocked()
            shelf.put("a")
        assert taker.result(timeout=delays.LONG) == ["a"]
    assert coheld.statistics(shelf).recoveries == 1


def test_a_guard_is_evaluated_after_a_death() -> None:
    class Counted(Shelf):
        @Lockable.locked(when=lambda self: coheld.statistics(self).recoveries, timeout=delays.LONG)
        def after_a_death(self) -> str:
            return "after"

    counted = Counted()
    with procs.start(lambda link: counted.after_a_death()) as waiter:
        waiter.wait_until_blocked()
        with procs.start(put_and_die, counted, False) as killer:
            killer.end(-signal.SIGKILL)
        assert waiter.result() == "after"


def test_a_wait_whose_resource_is_replaced_before_it_sleeps() -> None:
    """Nobody will tell the new one: it has not been asked to."""
    shelf = Shelf(lock_name="shelf")
    shelf.acquire()
    epoch = shelf.__lock__._suspend(False)
    assert remove("shelf")
    with shelf:
        pass
    begun = time.monotonic()
    shelf.__lock__._sleep(epoch, begun + delays.LONG, "", True)
    assert time.monotonic() - begun < delays.LONG / 2


def test_an_interrupt_ends_the_wait() -> None:
    shelf = Shelf()

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, delays.SHORT)
        with pytest.raises(Interrupted):
            shelf.take()
        assert coheld.holder(shelf) is None
        with shelf:
            signal.setitimer(signal.ITIMER_REAL, delays.SHORT)
            with pytest.raises(Interrupted):
                coheld.wait_for(shelf, lambda: shelf.items)
            assert coheld.holder(shelf).depth == 1  # type: ignore[union-attr]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert coheld.holder(shelf) is None


# ---- wait_for --------------------------------------------------------------------------------------------------------


def test_wait_for_gives_up_all_levels_and_takes_them_back() -> None:
    shelf = Shelf()
    with procs.start(put_some, shelf, "a", 1) as putter, shelf, shelf:
        shelf.label = "before"
        value = coheld.wait_for(shelf, lambda: shelf.items, timeout=delays.LONG)
        assert value == ["a0"] and shelf.items == ["a0"]
        assert coheld.holder(shelf).depth == 2  # type: ignore[union-attr]
        shelf.label = "after"
        assert shelf.label == "after"
        putter.end()
    assert coheld.holder(shelf) is None and shelf.label == "after"


def test_changes_before_the_wait_become_visible() -> None:
    shelf = Shelf()
    with procs.start(answer, shelf), shelf:
        shelf.label = "question"
        assert coheld.wait_for(shelf, lambda: shelf.count, timeout=delays.LONG) == 42


def answer(link: procs.Link, shelf: Shelf) -> None:
    with shelf:
        coheld.wait_for(shelf, lambda: shelf.label == "question", timeout=delays.LONG)
        shelf.count = 42


def test_wait_for_sees_own_changes_before_it_waits() -> None:
    shelf = Shelf()
    with shelf:
        shelf.put("a")
        assert coheld.wait_for(shelf, lambda: shelf.items == ["a"]) is True
    with shelf:
        assert coheld.wait_for(shelf, lambda: len(shelf.items)) == 1


def test_wait_for_times_out_with_the_lock_held() -> None:
    shelf = Shelf()
    with shelf, shelf:
        for timeout in (delays.SHORT, 0, -1, Decimal(0)):
            with pytest.raises(LockTimeout):
                coheld.wait_for(shelf, lambda: shelf.items, timeout=timeout)  # type: ignore[arg-type]
            assert coheld.holder(shelf).depth == 2  # type: ignore[union-attr]
    with pytest.raises(TypeError), shelf:
        coheld.wait_for(shelf, lambda: True, timeout="1")  # type: ignore[arg-type]


def test_wait_for_needs_the_lock() -> None:
    shelf = Shelf()
    with pytest.raises(NotLockedError):
        coheld.wait_for(shelf, lambda: True)


def test_wait_for_with_changes_inside_of_atomic_is_an_error() -> None:
    class Both(Shelf):
        @Lockable.locked(atomic=True)
        def wait(self, change: bool) -> None:
            if change:
                self.put("x")
            else:
                _ = self.items
            coheld.wait_for(self, lambda: self.label, timeout=delays.SHORT)

    both = Both()
    with pytest.raises(DeadlockError, match="atomic"):
        both.wait(True)
    assert both.items == []
    with pytest.raises(LockTimeout):
        both.wait(False)


def test_atomic_after_a_wait_undoes_what_came_after_it() -> None:
    class Both(Shelf):
        @Lockable.locked(atomic=True)
        def wait_and_fail(self) -> None:
            coheld.wait_for(self, lambda: self.items, timeout=delays.LONG)
            self.items.append("undone")
            raise KeyError

    both = Both()
    with procs.start(put_some, both, "a", 1) as putter:
        with pytest.raises(KeyError):
            both.wait_and_fail()
        putter.end()
    assert both.items == ["a0"]


class Waiting(Shelf):
    @Lockable.locked(atomic=True)
    def wait_and_wait(self) -> None:
        coheld.wait_for(self, lambda: self.items, timeout=delays.LONG)
        self.label = "between"
        coheld.wait_for(self, lambda: self.count > 5, timeout=delays.SHORT)

    @Lockable.locked(atomic=True)
    def wait(self) -> None:
        coheld.wait_for(self, lambda: self.items, timeout=delays.LONG)


def test_a_call_is_still_atomic_after_a_wait() -> None:
    waiting = Waiting()
    with procs.start(put_some, waiting, "a", 1) as putter:
        with pytest.raises(DeadlockError, match="atomic"):
            waiting.wait_and_wait()
        putter.end()
    assert waiting.label == "" and waiting.items == ["a0"]


def test_a_call_is_not_atomic_any_more_after_one_that_waited() -> None:
    waiting = Waiting()
    with procs.start(put_some, waiting, "a", 1) as putter, waiting:
        waiting.wait()
        waiting.label = "after"
        with pytest.raises(LockTimeout):
            coheld.wait_for(waiting, lambda: False, timeout=0)
        putter.end()
    assert waiting.label == "after"


# ---- __recover__ -----------------------------------------------------------------------------------------------------


class Recovered(Shelf):
    def __recover__(self, dead: coheld.Owner) -> None:
        self.label += f"{dead.pid} "

    @Lockable.locked
    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def die(link: procs.Link, shelf: Recovered) -> None:
    shelf.die()


def test_what_a_recovery_changes_is_there_though_a_guard_is_false_then() -> None:
    shelf = Recovered()
    with procs.start(die, shelf) as victim:
        victim.end(-signal.SIGKILL)
    with procs.start(take_some, shelf, 1) as taker:
        taker.expect("taking")
        taker.wait_until_blocked()
        assert shelf.label == f"{victim.pid} "
        shelf.put("a")
        assert taker.result() == ["a"]
    assert shelf.label == f"{victim.pid} "


def test_what_a_recovery_changes_is_there_though_the_body_dies_then() -> None:
    shelf = Recovered()
    dead = []
    for _ in range(3):
        with procs.start(die, shelf) as victim:
            victim.end(-signal.SIGKILL)
        dead.append(str(victim.pid))
    with shelf:
        assert shelf.label.split() == dead


# ---- __create__ ------------------------------------------------------------------------------------------------------


class Created(Lockable):
    total: int = shared(0)
    runs: list[int] = shared(default_factory=list)

    def __create__(self) -> None:
        self.total += 10
        self.runs.append(os.getpid())


class DiesAtCreation(Created):
    def __create__(self) -> None:
        super().__create__()
        os.kill(os.getpid(), signal.SIGKILL)


class DiesAfterCreation(Created):
    """Between the commit of the first state and the mark that there is one."""

    def __create__(self) -> None:
        super().__create__()
        self.__lock__._commit_creation()
        os.kill(os.getpid(), signal.SIGKILL)


def create(link: procs.Link, cls: type[Created]) -> int:
    link.wait_for("go")
    made = cls(lock_name="created")
    return made.total


def test_a_race_of_creators_makes_one_state() -> None:
    import contextlib

    for _ in range(5):
        with contextlib.ExitStack() as stack:
            racers = [stack.enter_context(procs.start(create, Created)) for _ in range(6)]
            for racer in racers:
                racer.tell("go")
            assert [racer.result() for racer in racers] == [10] * 6
        assert len(Created(lock_name="created").runs) == 1
        assert remove("created")


@pytest.mark.parametrize("cls", [DiesAtCreation, DiesAfterCreation])
def test_a_kill_in_the_creation(cls: type[Created]) -> None:
    with procs.start(create, cls) as victim:
        victim.tell("go")
        victim.end(-signal.SIGKILL)
    made = Created(lock_name="created")
    assert made.total == 10 and len(made.runs) == 1
    assert Created(lock_name="created").total == 10


def test_a_creation_that_raises_is_begun_anew() -> None:
    class Fails(Created):
        fail: Any = True

        def __create__(self) -> None:
            super().__create__()
            if Fails.fail:
                raise KeyError

    with pytest.raises(KeyError):
        Fails(lock_name="created")
    Fails.fail = False
    assert Fails(lock_name="created").total == 10


def test_a_state_of_a_class_that_had_no_creation_yet_is_kept() -> None:
    class Former(Lockable):
        total: int = shared(0)
        runs: list[int] = shared(default_factory=list)

    former = Former(lock_name="created")
    with former:
        former.total = 1
    made = Created(lock_name="created")
    assert (made.total, made.runs) == (1, [])


class Waits(Created):
    """For itself alone."""

    def __create__(self) -> None:
        super().__create__()
        coheld.wait_for(self, lambda: self.total == 20)


def test_nobody_is_let_in_by_a_creation_that_waits() -> None:
    with pytest.raises(DeadlockError, match="__create__"):
        Waits(lock_name="created")
    assert Created(lock_name="created").total == 10


def test_who_dies_in_the_creation_leaves_nothing_to_recover() -> None:
    """Not even in the life of an object, whose name was removed."""

    class Recovers(Created):
        total: int = shared(0)

        def __recover__(self, _dead: coheld.Owner) -> None:
            self.total = -1

    there = Recovers(lock_name="created")
    assert remove("created")
    with procs.start(create, DiesAtCreation) as victim:
        victim.tell("go")
        victim.end(-signal.SIGKILL)
    with there:
        assert there.total == 10
    assert Recovers(lock_name="created").total == 10


@pytest.mark.parametrize("step", ["_leave_atomic", "_commit_creation"])
def test_a_creation_that_a_signal_breaks_off_is_begun_anew(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def interrupted(*_: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, step, interrupted)
        with pytest.raises(InterruptedError):
            Created(lock_name="created")
    made = Created(lock_name="created")
    assert made.total == 10 and len(made.runs) == 1


# ---- options ---------------------------------------------------------------------------------------------------------


def test_options_are_checked_when_the_method_is_made() -> None:
    async def later(_self: object) -> bool:
        await asyncio.sleep(0)
        return True

    for options in ({"when": 1}, {"when": later}, {"atomic": 1}, {"timeout": "x"}, {"nothing": 1}):
        with pytest.raises(TypeError):
            Lockable.locked(**options)  # type: ignore[call-overload]


def test_options_are_kept_by_pickles() -> None:
    import cloudpickle

    class Local(Shelf):
        @Lockable.locked(when=lambda self: self.label, atomic=True, timeout=delays.SHORT)
        def guarded(self) -> None:
            self.count += 1
            raise KeyError

    method = cloudpickle.loads(cloudpickle.dumps(Local.guarded))
    assert method.atomic and method.timeout == delays.SHORT
    shelf = Shelf()
    with pytest.raises(LockTimeout):
        method(shelf)
    with shelf:
        shelf.label = "x"
    with pytest.raises(KeyError):
        method(shelf)
    assert shelf.count == 0
