"""Cycles of waits: one of their members is told, and the others go on; and nobody is told who is in none."""

import asyncio
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

import coheld
from coheld import DeadlockError, Lockable, LockTimeout, Owner, observing
from coheld.backends import deadlock, files, waiters
from coheld.testing.contract.observe import label_of
from coheld.testing.support import delays, effort, procs, seeds, states


class Bed(Lockable):
    def __init__(self, number: int) -> None:
        super().__init__(lock_name=f"bed-{number}")

    @Lockable.locked
    def book(self, other: Any, meet: Callable[[], object]) -> None:
        meet()
        other.look()

    @Lockable.locked
    def look(self) -> None:
        pass

    @Lockable.locked
    async def book_later(self, other: Any, meet: Callable[[], Any]) -> None:
        await meet()
        await other.look_later()

    @Lockable.locked
    async def look_later(self) -> None:
        pass


# ---- a ring: each has one bed, and wants the next one's --------------------------------------------------------------


class Members:
    """Those of a ring that are in this process: threads, and tasks of one loop."""

    def __init__(self, link: procs.Link, size: int) -> None:
        self.link, self.size = link, size
        self.answers: dict[int, Any] = {}
        self.go = threading.Event()
        self.holding = threading.Semaphore(0)
        self.work: list[threading.Thread] = []

    def meet(self) -> None:
        self.holding.release()
        assert self.go.wait(delays.LONG)

    async def meet_later(self) -> None:
        self.holding.release()
        assert await asyncio.to_thread(self.go.wait, delays.LONG)

    def in_thread(self, number: int) -> None:
        try:
            Bed(number).book(Bed((number + 1) % self.size), self.meet)
            self.answers[number] = "got it"
        except DeadlockError as error:
            self.answers[number] = error

    async def in_task(self, number: int) -> None:
        try:
            await Bed(number).book_later(Bed((number + 1) % self.size), self.meet_later)
            self.answers[number] = "got it"
        except DeadlockError as error:
            self.answers[number] = error

    async def in_loop(self, numbers: Iterable[int]) -> None:
        async with asyncio.TaskGroup() as group:
            for number in numbers:
                group.create_task(self.in_task(number), name=f"task-{number}")

    def run(self, threads: list[int], tasks: list[int]) -> dict[int, Any]:
        for number in threads:
            self.begin(f"thread-{number}", self.in_thread, number)
        if tasks:
            self.begin("loop", lambda: asyncio.run(self.in_loop(tasks)))
        for _ in [*threads, *tasks]:
            assert self.holding.acquire(timeout=delays.LONG)
        self.link.say("all hold")
        self.link.wait_for("go")
        self.go.set()
        for thread in self.work:
            thread.join(delays.LONG)
        return self.answers

    def begin(self, name: str, target: Callable[..., object], *args: object) -> None:
        self.work.append(threading.Thread(target=target, args=args, name=name))
        self.work[-1].start()


def members(link: procs.Link, size: int, threads: list[int], tasks: list[int]) -> dict[int, Any]:
    return Members(link, size).run(threads, tasks)


def in_threads(size: int) -> list[tuple[list[int], list[int]]]:
    return [(list(range(size)), [])]


def in_tasks(size: int) -> list[tuple[list[int], list[int]]]:
    return [([], list(range(size)))]


def in_processes(size: int) -> list[tuple[list[int], list[int]]]:
    return [([number], []) for number in range(size)]


def mixed(size: int) -> list[tuple[list[int], list[int]]]:
    """Neighbours are in different processes."""
    mine = [list(range(first, size, 3)) for first in range(3)]
    return [(numbers[::2], numbers[1::2]) for numbers in mine if numbers]


@pytest.mark.parametrize("layout", [in_threads, in_tasks, in_processes, mixed])
@pytest.mark.parametrize("size", [2, 3, 7, 20])
def test_exactly_one_of_a_ring_is_told(size: int, layout: Callable[[int], list[tuple[list[int], list[int]]]]) -> None:
    if layout is in_processes and size > 7:
        size = 12  # each takes a while to start
    groups = layout(size)
    with ExitStack() as stack:
        workers = [stack.enter_context(procs.start(members, size, *group)) for group in groups]
        for worker in workers:
            worker.expect("all hold")
        for worker in workers:
            worker.tell("go")
        answers = {number: answer for worker in workers for number, answer in worker.result().items()}
        pids = zip(workers, groups, strict=True)
        where = {number: worker.pid for worker, group in pids for number in [*group[0], *group[1]]}
    told = {number: answer for number, answer in answers.items() if answer != "got it"}
    assert len(answers) == size and len(told) == 1, answers
    [(number, error)] = told.items()
    assert_tells_all(error, number, size, where)


def assert_tells_all(error: DeadlockError, number: int, size: int, where: dict[int, int]) -> None:
    assert isinstance(error, DeadlockError) and len(error.cycle) == size
    for step, member in enumerate(error.cycle):
        at = (number + step) % size
        assert member.pid == where[at]
        assert f"task-{at}" == member.task or f"thread-{at}" == member.thread
        assert (member.holds, member.waits_for) == tuple(label_of(f"bed-{one}") for one in (at, (at + 1) % size))
        assert (member.held_in, member.waits_in) in {
            ("Bed.book", "Bed.look"),
            ("Bed.book_later", "Bed.look_later"),
        }
        assert str(member) in str(error)
    [stack] = error.__notes__
    assert "the wait that was given up" in stack and ("in book" in stack)


class Observer:
    def acquired(self, lock: Any, waited: float) -> None:
        pass

    def released(self, lock: Any) -> None:
        pass


def observed_members(link: procs.Link, size: int) -> dict[int, Any]:
    observing.start(Observer())
    return members(link, size, list(range(size)), [])


def test_one_of_a_ring_is_told_where_somebody_observes() -> None:
    with procs.start(observed_members, 2) as worker:
        worker.expect("all hold")
        worker.tell("go")
        [(number, error)] = [told for told in worker.result().items() if told[1] != "got it"]
        assert_tells_all(error, number, 2, dict.fromkeys(range(2), worker.pid))


# ---- who is not told -------------------------------------------------------------------------------------------------


def hold_and_want(link: procs.Link, mine: int, other: int, timeout: float | None) -> str:
    """acquire, and not a call: with a time-out or without."""
    with Bed(mine):
        link.say("holds")
        link.wait_for("go")
        link.say("goes")
        try:
            if Bed(other).acquire(timeout=timeout):
                Bed(other).release()
                return "got it"
            return "too late"
        except DeadlockError:
            return "told"


def test_a_wait_with_a_time_out_ends_by_itself_and_nobody_is_told() -> None:
    with (
        procs.start(hold_and_want, 0, 1, None) as patient,
        procs.start(hold_and_want, 1, 0, 2 * waiters.SEARCH_AFTER + delays.SHORT) as hasty,
    ):
        for one in (patient, hasty):
            one.expect("holds")
        for one in (hasty, patient):
            one.tell("go")
            one.expect("goes")
        assert (hasty.result(), patient.result()) == ("too late", "got it")


def test_who_is_stopped_is_still_the_one_to_give_up() -> None:
    with procs.start(hold_and_want, 0, 1, None) as elder, procs.start(hold_and_want, 1, 0, None) as younger:
        for one in (elder, younger):
            one.expect("holds")
        elder.tell("go")
        elder.expect("goes")
        elder.wait_until_blocked()
        younger.tell("go")
        younger.expect("goes")
        states.wait_until(lambda: len(list(waits_here())) == 2, "both wait")
        younger.stop()
        states.wait_until(lambda: searches_of(elder.pid), "the elder has looked")
        younger.cont()
        assert (younger.result(), elder.result()) == ("told", "got it")


def searches_of(pid: int) -> bool:
    """Has it waited for longer than until its second look?"""
    return has_waited(pid, waiters.SEARCH_AFTER + waiters.SEARCH_AGAIN + delays.SHORT)


def has_waited(pid: int, seconds: float) -> bool:
    """Has it waited for so long, or does it not wait any more?"""
    age = [time.monotonic_ns() - wait.since for wait in waits_here() if wait.pid == pid]
    return not age or age[0] > 1e9 * seconds


def waits_here() -> Iterable[waiters.Wait]:
    return waiters.all_waits(files.lock_directory())


def test_the_death_of_one_opens_the_ring_and_nobody_is_told() -> None:
    with procs.start(hold_and_want, 0, 1, None) as one, procs.start(hold_and_want, 1, 0, None) as killed:
        for worker in (one, killed):
            worker.expect("holds")
        killed.kill()
        one.tell("go")
        one.expect("goes")
        assert one.result() == "got it"
    assert not list(waits_here())


def take_back(link: procs.Link) -> str:
    """Waits for a condition of one bed, with another one in hand, and has to have the first again in the end."""
    with Bed(1), Bed(0):
        link.say("holds")
        try:
            coheld.wait_for(Bed(0), lambda: False, timeout=delays.MEDIUM)
        except LockTimeout:
            return "has it"
        return "got it"


def want_the_other(link: procs.Link) -> str:
    with Bed(0):
        link.say("holds")
        try:
            Bed(1).look()
            return "got it"
        except DeadlockError as error:
            return f"told of {len(error.cycle)}"


def test_who_must_have_it_back_is_not_the_one_to_give_up() -> None:
    with procs.start(take_back) as must:
        must.expect("holds")
        with procs.start(want_the_other) as may:
            may.expect("holds")
            assert (may.result(), must.result()) == ("told of 2", "has it")


def interrupted_early(link: procs.Link) -> str:
    """Waits for one bed; a signal's handler has another one meanwhile, and gives that back."""

    def handle(*_: object) -> None:
        with Bed(1):
            link.say("has the other")
            link.wait_for("give it back")

    signal.signal(signal.SIGUSR1, handle)
    link.say("ready")
    link.wait_for("go")
    try:
        Bed(0).look()
        return "got it"
    except DeadlockError:
        return "told"


def test_who_waits_for_a_handler_of_one_who_waits_is_in_no_ring() -> None:
    with (
        procs.start(hold_and_want, 0, 1, None) as holder,
        procs.start(interrupted_early) as waiter,
    ):
        holder.expect("holds")
        waiter.expect("ready")
        waiter.tell("go")
        states.wait_until(lambda: list(waits_here()), "it waits")
        waiter.signal(signal.SIGUSR1)  # at once: a moment later their times alone would say it
        waiter.expect("has the other")
        holder.tell("go")
        holder.expect("goes")
        states.wait_until(lambda: has_waited(holder.pid, waiters.SEARCH_AFTER + delays.SHORT), "it has looked")
        waiter.tell("give it back")
        assert (holder.result(), waiter.result()) == ("got it", "got it")


def test_what_threads_look_at_for_each_other_may_go_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgets(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            """As if another thread had taken it out at once."""

    monkeypatch.setattr(deadlock, "_looks", Forgets())
    look = deadlock._look((0, 0))
    assert (look.owner, look.waits) == (None, [])


def test_a_chain_may_be_longer_than_calls_may_be_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    size = sys.getrecursionlimit() - 10
    waits = [waiters.Wait(1, 1, at, 0, (1, at), waiters.FOR_LOCK, at, "", "", 1, at) for at in range(size)]
    owners = [
        Owner(1, 1, (at + 1) % size) for at in range(size)
    ]  # each waits for the cell of its number, the next has it
    monkeypatch.setattr(deadlock, "_owner_of", lambda _directory, cell: owners[cell[1]])
    monkeypatch.setattr(deadlock, "_waits_of", lambda _directory, owner: [waits[owner.tid]])
    monkeypatch.setattr(waiters, "goes_on", lambda _directory, _wait: True)
    assert deadlock.cycle_of("", waits[0]) == waits


def looked_at(bed: Bed) -> str:
    try:
        bed.look()
        return "got it"
    except DeadlockError:
        return "told"


def test_a_plain_call_that_blocks_the_loop_is_part_of_a_ring() -> None:
    answers: list[str] = []
    first, second, holding = Bed(0), Bed(1), threading.Barrier(2)

    def thread() -> None:
        with second:
            holding.wait(delays.LONG)
            answers.append(looked_at(first))

    async def main() -> None:
        async with first:
            holding.wait(delays.LONG)
            answers.append(looked_at(second))

    workers = [threading.Thread(target=thread), threading.Thread(target=lambda: asyncio.run(main()))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(delays.LONG)
    assert sorted(answers) == ["got it", "told"]


def test_the_error_travels_with_its_cycle() -> None:
    error = DeadlockError("a", resource="'r'")
    error.cycle = (coheld.errors.Member(1, "c", "t", "", "'a'", "A.x", "'b'", "B.y"),)
    error.add_note("note")
    again = pickle.loads(pickle.dumps(error))
    assert (again.cycle, again.resource, again.__notes__) == (error.cycle, "'r'", ["note"])


# ---- no cycle, and much waiting --------------------------------------------------------------------------------------

BEDS, ROUNDS = 4, 12


def stress(link: procs.Link, seed: int, held: float) -> tuple[int, int]:
    """Takes beds in the order of their numbers, or with time-outs in any. How often it got all, and too late."""
    rng = random.Random(seed)
    beds, counts = [Bed(number) for number in range(BEDS)], [0, 0]

    def turn() -> None:
        chosen = rng.sample(range(BEDS), 2)
        ordered = rng.random() < 0.7
        first, second = sorted(chosen) if ordered else chosen
        with beds[first]:
            if beds[second].acquire(timeout=None if ordered else rng.uniform(0, held)):
                time.sleep(rng.uniform(0, held))
                beds[second].release()
                counts[0] += 1
            else:
                counts[1] += 1

    async def task_turn() -> None:
        first, second = sorted(rng.sample(range(BEDS), 2))
        async with beds[first], beds[second]:
            await asyncio.sleep(rng.uniform(0, held))
            counts[0] += 1

    async def tasks() -> None:
        for _ in range(ROUNDS):
            await asyncio.gather(task_turn(), task_turn())

    def turns() -> None:
        for _ in range(ROUNDS):
            turn()

    threads = [threading.Thread(target=turns), threading.Thread(target=lambda: asyncio.run(tasks()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts[0], counts[1]


def killed_in_it(link: procs.Link, seed: int) -> None:
    link.say("begins")
    stress(link, seed, delays.SHORT)


def watch(link: procs.Link) -> int:
    """Looks for cycles among all waits without a pause, until it is told to stop. How many looks it had."""
    directory, looks = files.lock_directory(), 0
    while not link._connection.poll(0):
        for wait in waiters.all_waits(directory):
            if wait.kind != waiters.FOR_LOCK:
                continue  # it ends by itself
            assert (found := deadlock.cycle_of(directory, wait)) is None, found
            looks += 1
    return looks


@pytest.mark.parametrize("run", range(effort.rounds(5)))
def test_nobody_is_told_who_is_in_no_cycle(run: int) -> None:
    """Ordered locking, waits with time-outs in any order, tasks, threads, and deaths; and somebody who looks for cycles
    all the time, where waiters look after 200 ms only."""
    seed = seeds.SEED + run
    with procs.start(watch) as watcher:
        with procs.start(stress, seed, delays.SHORT) as one, procs.start(stress, seed + 1, delays.SHORT) as two:
            for number in range(4):
                with procs.start(killed_in_it, seed + 2 + number) as victim:
                    victim.expect("begins")
                    states.wait_until(lambda: [w for w in waits_here() if w.pid == victim.pid], "the victim waits")
                    victim.kill()
            assert sum(one.result()) and sum(two.result())
        with suppress(BrokenPipeError):
            watcher.tell("stop")
        assert watcher.result() > 0


def test_a_directory_that_cannot_be_made_again_does_not_hurt_who_waits(
    coheld_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search only looks: who waits goes on to do so where it cannot."""
    bed, said = Bed(0), list[dict[str, Any]]()

    async def wait() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: said.append(context))
        task = asyncio.create_task(bed.look_later())
        while not (found := coheld.waiters(bed)):
            await asyncio.sleep(delays.TICK)
        with monkeypatch.context() as changed:
            changed.setenv("COHELD_DIR", str(coheld_dir / "file" / "directory"))
            with pytest.raises(OSError, match="file"):
                files.lock_directory()
            while time.monotonic() < found[0].since + 2 * waiters.SEARCH_AFTER:
                await asyncio.sleep(delays.TICK)
        release.set()
        await task

    (coheld_dir / "file").touch()
    release = threading.Event()
    holds = threading.Event()

    def hold() -> None:
        with bed:
            holds.set()
            assert release.wait(delays.LONG)

    holder = threading.Thread(target=hold)
    holder.start()
    assert holds.wait(delays.LONG)
    asyncio.run(wait())
    holder.join(delays.LONG)
    assert said == []
