"""Reading calls: any number together, never with an exclusive one, and nobody stuck whoever is killed."""

import asyncio
import gc
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import coheld
from coheld import (
    DeadlockError,
    Lockable,
    LockTimeout,
    NotLockedError,
    NotOwnerError,
    native,
    shared,
)
from coheld.mutex import remove
from coheld.testing.contract.observe import where
from coheld.testing.support import delays, effort, procs, states

pytestmark = where("readers")

Act = Callable[[], Any]


class Device(Lockable):
    @Lockable.locked(exclusive=False)
    def read(self, act: Act = lambda: None) -> Any:
        return act()

    @Lockable.locked
    def write(self, act: Act = lambda: None) -> Any:
        return act()

    @Lockable.locked(timeout=delays.SHORT)
    def write_soon(self) -> None:
        pass

    @Lockable.locked(timeout=delays.SHORT, exclusive=False)
    def read_soon(self) -> None:
        pass

    @Lockable.locked(exclusive=False)
    async def read_async(self, act: Act | None = None) -> Any:
        return await act() if act else None

    @Lockable.locked
    async def write_async(self, act: Act | None = None) -> Any:
        return await act() if act else None

    @Lockable.locked(timeout=delays.SHORT, exclusive=False)
    async def read_async_soon(self) -> None:
        pass


class Board:
    """Who is inside: a file for each, which tells of its maker. It must be made before the object is given away."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def reader(self) -> Iterator[None]:
        path = self.directory / f"r-{os.getpid()}-{threading.get_native_id()}"
        path.touch(exist_ok=False)
        assert not self._there("w"), "a writer is in"
        yield
        assert not self._there("w"), "a writer came in"
        path.unlink()

    @contextmanager
    def writer(self) -> Iterator[None]:
        path = self.directory / f"w-{os.getpid()}-{threading.get_native_id()}"
        path.touch(exist_ok=False)
        assert self._there("") == [path], "somebody is in"
        yield
        assert self._there("") == [path], "somebody came in"
        path.unlink()

    def _there(self, kind: str) -> list[Path]:
        """But for what the dead have left."""
        found = [path for path in self.directory.glob(f"{kind}*-*") if path.name[0] in "rw"]
        return [path for path in found if not states.gone(*map(int, path.name.split("-")[1:]))]


def hold(link: procs.Link, call: Callable[[Act], Any]) -> None:
    """Inside until told to leave."""

    def inside() -> None:
        link.say("in")
        link.wait_for("leave")

    call(inside)


def report(link: procs.Link, call: Act) -> None:
    call()
    link.say("done")


def leave(worker: Any) -> None:
    worker.tell("leave")
    worker.end()


def in_thread(act: Act) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def readers_of(obj: Lockable) -> int:
    register = native.lock_of(obj).readers
    return sum(count for _, _, count in register.counts()) if register else 0


# ---- together, and alone ---------------------------------------------------------------------------------------------


def test_readers_of_processes_and_threads_are_in_together() -> None:
    device = Device()
    meeting = threading.Barrier(3)
    with ExitStack() as running:
        workers = [running.enter_context(procs.start(hold, device.read)) for _ in range(3)]
        for worker in workers:
            worker.expect("in")
        threads = [in_thread(lambda: device.read(lambda: meeting.wait(delays.LONG))) for _ in range(2)]
        device.read(lambda: meeting.wait(delays.LONG))
        for thread in threads:
            thread.join(delays.LONG)
        assert coheld.holder(device) is None
        for worker in workers:
            leave(worker)
    assert readers_of(device) == 0
    device.write()


def mix(link: procs.Link, device: Device, board: Board, rounds: int, seed: int) -> int:
    chance = random.Random(seed)
    wrote = 0
    for _ in range(rounds):
        if chance.random() < 0.3:
            with device, board.writer():
                wrote += 1
        else:
            device.read(lambda: _reading(board))
    return wrote


def _reading(board: Board) -> None:
    with board.reader():
        pass


@pytest.mark.parametrize("method", procs.METHODS)
def test_no_reader_is_ever_in_with_a_writer(method: str, tmp_path: Path, rng: random.Random) -> None:
    device, board, rounds = Device(), Board(tmp_path), effort.rounds(400)
    with ExitStack() as running:
        seeds = [rng.randrange(1 << 30) for _ in range(3)]
        workers = [running.enter_context(procs.start(mix, device, board, rounds, one, method=method)) for one in seeds]
        mine = sum(mix(procs.Link, device, board, rounds, seed) for seed in [rng.randrange(1 << 30)])  # type: ignore[arg-type]
        assert sum(worker.result() for worker in workers) + mine > 0
    assert coheld.statistics(device).recoveries == 0 and readers_of(device) == 0


def test_a_writer_waits_for_the_readers_of_the_moment_and_later_ones_wait_behind_it() -> None:
    device = Device()
    with procs.start(hold, device.read) as first:
        first.expect("in")
        with procs.start(hold, device.write) as writer:
            writer.wait_until_blocked()
            with procs.start(hold, device.read) as second:
                second.wait_until_blocked()
                leave(first)
                writer.expect("in")
                leave(writer)
                second.expect("in")
                leave(second)


def test_a_writer_gets_in_though_readers_never_stop() -> None:
    device, stop = Device(), threading.Event()

    def read_on() -> None:
        while not stop.is_set():
            device.read(lambda: stop.wait(delays.TICK))

    threads = [in_thread(read_on) for _ in range(4)]
    try:
        for _ in range(20):
            device.write()
    finally:
        stop.set()
        for thread in threads:
            thread.join(delays.LONG)


def test_an_exception_ends_the_reading() -> None:
    device = Device()
    with pytest.raises(KeyError):
        device.read(lambda: {}["missing"])
    device.write_soon()


# ---- inside of one another -------------------------------------------------------------------------------------------


def test_an_exclusive_call_inside_of_a_reading_one_is_an_error_at_once() -> None:
    device = Device()
    for call in (device.write, device.acquire, device.write_soon, device.__enter__):
        with pytest.raises(DeadlockError, match="inside of a reading one"):
            device.read(call)
    assert device.read(lambda: device.acquire(blocking=False)) is False
    device.write_soon()


def test_it_is_one_also_where_a_writer_has_the_lock_already() -> None:
    device = Device()

    def inside() -> None:
        with procs.start(hold, device.write) as writer:
            writer.wait_until_blocked()
            with pytest.raises(DeadlockError):
                device.write()
            writer.kill()

    device.read(inside)
    device.write()


def test_a_reading_call_inside_of_an_exclusive_one_is_fine() -> None:
    device = Device()
    assert device.write(lambda: device.read(lambda: device.write(lambda: device.read(lambda: 5)))) == 5
    with device:
        assert device.read(lambda: 6) == 6
        assert readers_of(device) == 0
    device.write_soon()


def test_a_reading_call_inside_of_a_reading_one_passes_the_writer_that_waits_for_it() -> None:
    device = Device()
    with ExitStack() as running:

        def inside() -> Any:
            writer = running.enter_context(procs.start(hold, device.write))
            writer.wait_until_blocked()
            assert device.read(lambda: device.read(lambda: 7)) == 7
            return writer

        writer = device.read(inside)
        writer.expect("in")
        leave(writer)
    assert readers_of(device) == 0


def test_a_thread_may_read_many_locks_at_once() -> None:
    devices = [Device() for _ in range(40)]

    def nested(rest: list[Device]) -> int:
        return rest[0].read(lambda: nested(rest[1:])) + 1 if rest else 0

    assert nested(devices) == 40 and nested(devices * 2) == 80
    for device in devices:
        device.write_soon()
        with pytest.raises(DeadlockError):
            nested([*devices, type("Last", (), {"read": lambda _, act: device.write()})()])  # noqa: B023
    assert not any(readers_of(device) for device in devices)


def test_shared_fields_are_read_as_without_the_lock() -> None:
    class Meter(Lockable):
        count: int = shared(0)

        @Lockable.locked(exclusive=False)
        def look(self) -> int:
            return self.count

        @Lockable.locked(exclusive=False)
        def change(self) -> None:
            self.count += 1

    meter = Meter()
    with meter:
        meter.count = 3
    assert meter.look() == 3
    with pytest.raises(NotLockedError):
        meter.change()


# ---- time-outs and arguments -----------------------------------------------------------------------------------------


def test_a_writer_that_does_not_get_in_says_who_reads() -> None:
    device = Device()
    with procs.start(hold, device.read) as reader:
        reader.expect("in")
        with pytest.raises(LockTimeout, match=f"read by process {reader.pid}"):
            device.write_soon()
        assert not device.acquire(timeout=delays.SHORT) and not device.acquire(blocking=False)
        device.read()
        leave(reader)


def test_a_reader_that_does_not_get_in_says_who_has_it() -> None:
    device = Device()
    with procs.start(hold, device.write) as writer:
        writer.expect("in")
        with pytest.raises(LockTimeout, match=f"process {writer.pid}"):
            device.read_soon()
        leave(writer)
    device.read_soon()


def test_bad_options_are_refused_at_decoration() -> None:
    with pytest.raises(TypeError, match="exclusive must be True or False"):
        Lockable.locked(exclusive=0)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="exclusive=False goes with timeout alone"):
        Lockable.locked(exclusive=False, when=lambda _: True)
    with pytest.raises(ValueError, match="exclusive=False goes with timeout alone"):
        Lockable.locked(exclusive=False, atomic=True)


def test_a_reading_method_stays_one_by_value() -> None:
    class Local(Lockable):
        @Lockable.locked(exclusive=False)
        def read(self) -> int:
            return 1

    assert pickle.loads(cloudpickle.dumps(Local)).read.exclusive is False
    assert Device.read.exclusive is False and Device.write.exclusive is True  # type: ignore[attr-defined]


# ---- death and fork --------------------------------------------------------------------------------------------------


def test_a_killed_reader_strands_nobody() -> None:
    device = Device()
    with procs.start(hold, device.read) as reader:
        reader.expect("in")
        with procs.start(report, device.write) as writer:
            writer.wait_until_blocked()
            killed = time.monotonic()
            reader.kill()
            writer.expect("done")
            assert time.monotonic() - killed < delays.LONG
    device.write_soon()


def test_a_killed_writer_strands_no_reader(caplog: pytest.LogCaptureFixture) -> None:
    device = Device()
    device.read()
    for _ in range(3):
        with procs.start(hold, device.write) as writer:
            writer.expect("in")
            with procs.start(report, device.read) as reader:
                reader.wait_until_blocked()
                writer.kill()
                reader.expect("done")
    assert coheld.statistics(device).recoveries == 3


def test_a_writer_that_is_killed_while_it_waits_for_readers_strands_nobody() -> None:
    device = Device()
    with procs.start(hold, device.read) as reader:
        reader.expect("in")
        with procs.start(hold, device.write) as writer:
            writer.wait_until_blocked()
            with procs.start(report, device.read) as second:
                second.wait_until_blocked()
                writer.kill()
                leave(reader)  # for all that others know, the writer had begun: who comes next recovers, alone
                second.expect("done")
    device.write_soon()


def test_a_forked_child_is_not_in() -> None:
    device = Device()

    def inside() -> None:
        if not (pid := os.fork()):
            os._exit(1 if device.acquire(timeout=delays.SHORT) else 0)  # its parent's reader is in
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    device.read(inside)
    device.write_soon()


def test_a_child_that_returns_from_its_parents_call_counts_nobody_out() -> None:
    device = Device()
    pid = device.read(os.fork)
    if not pid:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert readers_of(device) == 0
    device.write_soon()


def test_more_processes_than_the_first_page_has_room_for() -> None:
    device, count = Device(), 70
    device.read()
    with ExitStack() as running:
        workers = [running.enter_context(procs.start(hold, device.read)) for _ in range(count)]
        for worker in workers:
            worker.expect("in")
        assert readers_of(device) == count
        for worker in workers[:-1]:
            leave(worker)
        assert not device.acquire(blocking=False)
        workers[-1].kill()
    device.write_soon()


def churn(link: procs.Link, device: Device, board: Board, seed: int) -> None:
    link.say("go")
    while True:
        mix(link, device, board, 50, seed)
        seed += 1


def test_processes_killed_at_any_moment_strand_nobody(tmp_path: Path, rng: random.Random) -> None:
    device, board = Device(), Board(tmp_path)
    for _ in range(effort.rounds(30)):
        with ExitStack() as running:
            seeds = [rng.randrange(1 << 30) for _ in range(3)]
            workers = [running.enter_context(procs.start(churn, device, board, seed)) for seed in seeds]
            for worker in workers:
                worker.expect("go")
            time.sleep(rng.random() * 0.02)
            for worker in workers:
                worker.kill()
                mix(procs.Link, device, board, 3, rng.randrange(1 << 30))  # type: ignore[arg-type]
        assert device.acquire(timeout=delays.LONG)
        device.release()


def test_its_file_goes_with_it(coheld_dir: Path) -> None:
    device = Device()
    device.read()
    assert list(coheld_dir.rglob("*.register"))
    del device
    assert not list(coheld_dir.rglob("*.register"))
    named = Device(lock_name="bench")
    named.read()
    assert list(coheld_dir.glob("name-bench~*.register"))
    assert remove("bench") and not list(coheld_dir.glob("*bench*"))
    named.read()
    named.write()
    assert remove("bench")


# ---- tasks -----------------------------------------------------------------------------------------------------------


def run(main: Callable[[], Any]) -> None:
    asyncio.run(main())


def test_tasks_read_together_and_write_alone() -> None:
    async def main() -> None:
        device, inside, most = Device(), [0, 0], [0, 0]

        async def one(kind: int) -> None:
            assert not inside[1] and not (kind and inside[0])
            inside[kind] += 1
            most[kind] = max(most[kind], inside[kind])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            inside[kind] -= 1

        calls = [
            device.write_async(lambda: one(1)) if n % 5 == 4 else device.read_async(lambda: one(0)) for n in range(100)
        ]
        await asyncio.gather(*calls)
        assert most[1] == 1 and most[0] > 1 and readers_of(device) == 0

    run(main)


def test_a_writing_task_waits_for_reading_ones_and_others_behind_it() -> None:
    async def main() -> None:
        device, go = Device(), asyncio.Event()
        first = asyncio.create_task(device.read_async(go.wait))
        await asyncio.sleep(0)
        writer = asyncio.create_task(device.write_async())
        await _until_queued(device, 1)
        second = asyncio.create_task(device.read_async())
        await _until_queued(device, 2)
        assert not writer.done() and not second.done()
        go.set()
        await asyncio.gather(first, writer, second)
        assert readers_of(device) == 0

    run(main)


async def _until_queued(device: Device, count: int) -> None:
    from coheld.backends import lookout

    lock = native.lock_of(device)
    deadline = time.monotonic() + delays.LONG
    while (queue := lookout._process.locks.get(lock)) is None or queue.waiting < count:
        assert time.monotonic() < deadline
        await asyncio.sleep(delays.TICK)


def test_for_a_task_too_an_exclusive_call_inside_of_a_reading_one_is_an_error() -> None:
    async def main() -> None:
        device = Device()

        async def acquire() -> None:
            await coheld.aio.acquire(device)

        async def write_sync() -> None:
            device.write()

        async def enter() -> None:
            async with device:
                raise AssertionError

        for call in (device.write_async, acquire, write_sync, enter):
            with pytest.raises(DeadlockError, match="inside of a reading one"):
                await device.read_async(call)
        assert await device.read_async(lambda: coheld.aio.acquire(device, timeout=0)) is False
        await device.write_async()

    run(main)


def test_reading_calls_of_a_task_pass_the_writer_that_waits_for_it() -> None:
    async def main() -> None:
        device = Device()
        waiting: list[asyncio.Task[Any]] = []

        async def inside() -> int:
            waiting.append(asyncio.create_task(device.write_async()))
            await _until_queued(device, 1)
            device.read()
            await device.read_async()
            return await device.read_async(nothing) or 8

        async def nothing() -> None:
            device.read()

        assert await device.read_async(inside) == 8
        await waiting[0]
        async with device:
            assert await device.read_async() is None and device.read(lambda: 9) == 9
        await device.write_async()

    run(main)


def test_a_sync_call_that_would_block_the_loop_of_a_reading_task_says_so() -> None:
    async def main() -> None:
        device, go = Device(), asyncio.Event()
        reader = asyncio.create_task(device.read_async(go.wait), name="reader")
        await asyncio.sleep(0)
        with pytest.raises(DeadlockError, match="'reader' of this thread's loop is in a reading call"):
            device.write()
        errors: list[Exception] = []
        asyncio.get_running_loop().call_soon(noted, device.write, errors)  # which is no task
        await asyncio.sleep(0)
        assert [type(error) for error in errors] == [DeadlockError]
        device.read()
        go.set()
        await reader
        device.write()

    run(main)


def noted(call: Callable[[], object], errors: list[Exception]) -> None:
    try:
        call()
    except Exception as error:
        errors.append(error)


def test_who_is_about_to_wait_looks_at_readers_that_come_and_go_in_another_loop() -> None:
    device, done = Device(), threading.Event()

    async def read() -> None:
        go = asyncio.Event()
        many = [asyncio.create_task(device.read_async(go.wait)) for _ in range(2000)]
        while not done.is_set():
            await asyncio.gather(*(device.read_async() for _ in range(10)))
        go.set()
        await asyncio.gather(*many)

    async def look() -> None:
        for _ in range(300):
            native.lock_of(device)._reads_itself(False)  # which raises nothing

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = in_thread(lambda: run(read))
    try:
        states.wait_until(lambda: readers_of(device) >= 2000, "they read")
        run(look)
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()


def test_without_a_task_of_asyncio_it_is_an_error_and_nobody_is_in() -> None:
    async def main() -> None:
        device, ended = Device(), asyncio.get_running_loop().create_future()

        def call() -> None:
            with pytest.raises(RuntimeError, match="task of a running asyncio loop"):
                device.read_async().send(None)
            ended.set_result(None)

        asyncio.get_running_loop().call_soon(call)
        await ended
        assert readers_of(device) == 0

    run(main)
    with pytest.raises(RuntimeError, match="task of a running asyncio loop"):
        Device().read_async().send(None)


def test_a_cancelled_reader_leaves_no_trace() -> None:
    async def main() -> None:
        for awaits in range(8):
            device, go = Device(), asyncio.Event()
            holder = asyncio.create_task(device.write_async(go.wait))
            await asyncio.sleep(0)
            reader = asyncio.create_task(device.read_async(_forever))
            for _ in range(awaits):
                await asyncio.sleep(delays.TICK if awaits % 2 else 0)
            if awaits > 3:
                go.set()
                await holder
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader
            go.set()
            await holder
            assert await coheld.aio.acquire(device, timeout=delays.LONG)
            device.release()
            assert readers_of(device) == 0

    async def _forever() -> None:
        await asyncio.Event().wait()

    run(main)


def test_a_reading_task_does_not_wait_behind_a_writer_that_has_given_up() -> None:
    device, go = Device(), threading.Event()

    async def main() -> None:
        writer = asyncio.create_task(device.write_async())
        await _until_queued(device, 1)
        reader = asyncio.create_task(device.read_async())
        await _until_queued(device, 2)
        writer.cancel()
        await asyncio.wait_for(reader, delays.LONG)

    thread = in_thread(lambda: device.read(lambda: go.wait(delays.HANG)))
    try:
        states.wait_until(lambda: readers_of(device), "it reads")
        run(main)
    finally:
        go.set()
        thread.join()


def test_a_reading_task_whose_loop_is_closed_while_it_waits_is_counted_out_once() -> None:
    device, go = Device(), threading.Event()
    writer = in_thread(lambda: device.write(lambda: go.wait(delays.HANG)))
    states.wait_until(lambda: coheld.holder(device), "it writes")
    loop = asyncio.new_event_loop()
    task = loop.create_task(device.read_async())
    loop.run_until_complete(_until_queued(device, 1))
    loop.close()
    go.set()
    writer.join()
    native.lock_of(device).acquire()  # behind the turn of the task
    native.lock_of(device).release()

    def unwound() -> int:
        nonlocal task
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        del task
        gc.collect()
        return readers_of(device)

    assert device.read(unwound) == 1
    device.write()


def test_a_reading_task_times_out() -> None:
    async def main() -> None:
        device, go = Device(), asyncio.Event()
        holder = asyncio.create_task(device.write_async(go.wait))
        await asyncio.sleep(0)
        with pytest.raises(LockTimeout):
            await device.read_async_soon()
        go.set()
        await holder
        await device.read_async_soon()

    run(main)


def test_the_loop_goes_on_while_a_writer_elsewhere_has_it() -> None:
    async def main() -> None:
        device = Device()
        with procs.start(hold, device.write) as writer:
            await asyncio.to_thread(writer.expect, "in")
            readers = [asyncio.create_task(device.read_async()) for _ in range(100)]
            await _until_queued(device, 100)
            assert not any(reader.done() for reader in readers)
            writer.tell("leave")
            await asyncio.gather(*readers)
            await asyncio.to_thread(writer.end)

    run(main)


def test_a_reading_task_that_dies_with_its_process_strands_nobody() -> None:
    device = Device()
    with procs.start(read_in_a_task, device) as reader:
        reader.expect("in")
        with procs.start(report, device.write) as writer:
            writer.wait_until_blocked()
            reader.kill()
            writer.expect("done")


def read_in_a_task(link: procs.Link, device: Device) -> None:
    async def inside() -> None:
        link.say("in")
        await asyncio.Event().wait()

    asyncio.run(device.read_async(inside))


def test_a_signal_interrupts_who_waits() -> None:
    device = Device()

    def interrupt(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with procs.start(hold, device.read) as reader:
            reader.expect("in")
            tid = threading.get_native_id()
            thread = in_thread(
                lambda: (states.wait_until_blocked(os.getpid(), tid), os.kill(os.getpid(), signal.SIGUSR1))
            )
            with pytest.raises(InterruptedError):
                device.write()
            thread.join(delays.LONG)
            device.read()
            leave(reader)
    finally:
        signal.signal(signal.SIGUSR1, before)
    device.write_soon()


def test_a_reader_cannot_release() -> None:
    device = Device()
    with pytest.raises(NotOwnerError):
        device.read(device.release)
