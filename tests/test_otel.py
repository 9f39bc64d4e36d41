"""Metrics of locks: what OpenTelemetry's own SDK collects, and what its exporter for Prometheus serves."""

import asyncio
import os
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import coheld
from coheld import Lockable, Semaphore, otel
from coheld.testing.support import delays, procs, states

BACKENDS = ["shm:", "file:"]
WAIT, HOLD = "coheld.lock.wait.duration", "coheld.lock.hold.duration"
RECOVERIES, WAITERS = "coheld.lock.recoveries", "coheld.lock.waiters"
TIMEOUTS, READERS = "coheld.lock.timeouts", "coheld.lock.readers"
PERMITS, QUEUE = "coheld.semaphore.permits", "coheld.semaphore.waiters"


class Bed(Lockable):
    @Lockable.locked
    def book(self) -> None:
        self.again()

    @Lockable.locked
    def again(self) -> None:
        pass

    @Lockable.locked(timeout=delays.TICK)
    def book_soon(self) -> None:
        pass

    @Lockable.locked(exclusive=False)
    def read(self, act: Callable[[], Any]) -> Any:
        return act()

    @Lockable.locked
    async def work(self) -> None:
        await asyncio.sleep(delays.TICK)


class Meter:
    """What has been recorded, as the SDK collects it."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        otel.start(MeterProvider([self.reader], shutdown_on_exit=False))

    def metrics(self) -> dict[str, Any]:
        data = self.reader.get_metrics_data()
        scopes = [scope for resource in (data.resource_metrics if data else []) for scope in resource.scope_metrics]
        assert {(one.scope.name, one.scope.version) for one in scopes} <= {("coheld", coheld.__version__)}
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def points(self, name: str) -> dict[tuple[str, str], Any]:
        """Of each lock by its name and backend."""
        found = self.metrics().get(name)
        return {
            (point.attributes["coheld.lock.name"], point.attributes["coheld.lock.backend"]): point
            for point in (found.data.data_points if found else [])
            if len(point.attributes) == 2
        }


@pytest.fixture
def meter() -> Iterator[Meter]:
    yield Meter()
    coheld.observing.stop(otel._process.recorder)
    otel._process.recorder = None


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def key(name: str, backend: str) -> tuple[str, str]:
    return name, backend.removesuffix(":")


def test_each_hold_is_recorded_once(meter: Meter, backend: str) -> None:
    bed = Bed(lock_name="lab/bed-1", lock_backend=backend)
    for _ in range(3):
        bed.book()
    with bed, bed:
        pass
    wait, hold = (meter.points(name)[key("lab/bed-1", backend)] for name in (WAIT, HOLD))
    assert wait.count == hold.count == 4 and wait.sum == 0.0 < hold.sum < delays.LONG
    assert wait.explicit_bounds[0] == 0.0 and wait.bucket_counts[0] == 4
    assert hold.explicit_bounds == tuple(wait.explicit_bounds[1:])
    assert {meter.metrics()[name].unit for name in (WAIT, HOLD)} == {"s"}


def test_who_waits_is_counted_then_and_measured_after(meter: Meter, backend: str) -> None:
    bed = Bed(lock_name="bed", lock_backend=backend)
    with bed:
        thread = threading.Thread(target=bed.book)
        thread.start()
        states.wait_until(lambda: meter.points(WAITERS)[key("bed", backend)].value == 1, "it waits")
    thread.join()
    assert meter.points(WAITERS)[key("bed", backend)].value == 0
    wait = meter.points(WAIT)[key("bed", backend)]
    assert wait.count == 2 and wait.bucket_counts[0] == 1 and 0.0 < wait.sum < delays.LONG


def hold(link: procs.Link, bed: Bed) -> None:
    bed.acquire()
    link.say("holding")
    link.wait_for("go")
    bed.release()


def test_a_waiter_is_seen_before_it_has_ever_had_the_lock(meter: Meter, backend: str) -> None:
    bed = Bed(lock_name="bed", lock_backend=backend)
    with procs.start(hold, bed) as holder:
        holder.expect("holding")
        thread = threading.Thread(target=bed.book)
        thread.start()
        states.wait_until(lambda: meter.points(WAITERS)[key("bed", backend)].value == 1, "it waits")
        holder.tell("go")
        thread.join()


def test_who_takes_over_from_a_dead_owner_counts_it(meter: Meter, backend: str) -> None:
    bed = Bed(lock_name="bed", lock_backend=backend)
    for _ in range(2):
        with procs.start(hold, bed) as holder:
            holder.expect("holding")
            holder.kill()
        bed.book()
        bed.book()
    assert meter.points(RECOVERIES)[key("bed", backend)].value == 2
    assert coheld.statistics(bed).recoveries == 2


def book_and_tell(link: procs.Link, bed: Bed) -> None:
    mine = Meter()
    link.wait_for("take over")
    bed.book()
    link.say({name: len(mine.points(name)) for name in (RECOVERIES, WAIT)})


def test_a_death_is_counted_by_one_process(meter: Meter, backend: str) -> None:
    bed = Bed(lock_name="bed", lock_backend=backend)
    with procs.start(hold, bed) as dead, procs.start(book_and_tell, bed) as heir:
        dead.expect("holding")
        dead.kill()
        heir.tell("take over")
        assert heir.hear() == {RECOVERIES: 1, WAIT: 1}
        bed.book()
    assert RECOVERIES not in meter.metrics()


def test_anonymous_locks_are_told_of_by_their_class(meter: Meter) -> None:
    beds, plain = [Bed(), Bed()], Lockable()
    for bed in beds:
        bed.book()
    backend = plain.__lock__.resource.scheme
    assert meter.points(HOLD).keys() == {(f"{__name__}.Bed", backend)}
    assert meter.points(HOLD)[f"{__name__}.Bed", backend].count == 2
    with plain:
        waiters = meter.points(WAITERS)
    assert {key: point.value for key, point in waiters.items()} == {
        (f"{__name__}.Bed", backend): 0,
        ("coheld.Lockable", backend): 0,
    }


def test_tasks(meter: Meter, backend: str) -> None:
    bed = Bed(lock_name="bed", lock_backend=backend)

    async def main() -> None:
        await asyncio.gather(*(bed.work() for _ in range(5)))
        async with bed:
            pass

    asyncio.run(main())
    wait, hold = (meter.points(name)[key("bed", backend)] for name in (WAIT, HOLD))
    assert wait.count == hold.count == 6 and wait.bucket_counts[0] == 2
    assert 5 * delays.TICK <= hold.sum < delays.LONG and wait.sum >= (1 + 2 + 3 + 4) * delays.TICK / 2


def test_many_threads_keep_their_holds_apart(meter: Meter, backend: str) -> None:
    bed = Bed(lock_name="bed", lock_backend=backend)

    def work() -> None:
        for _ in range(50):
            bed.book()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.points(HOLD)[key("bed", backend)].count == meter.points(WAIT)[key("bed", backend)].count == 200


def test_who_waits_in_vain_is_counted(meter: Meter, backend: str) -> None:
    bed = Bed(lock_name="bed", lock_backend=backend)

    async def give_up() -> None:
        assert not await coheld.aio.acquire(bed, timeout=delays.TICK)
        assert not await coheld.aio.acquire(bed, timeout=0)

    with procs.start(hold, bed) as holder:
        holder.expect("holding")
        assert not bed.acquire(timeout=delays.TICK) and not bed.__lock__.acquire(timeout=delays.TICK)
        assert not bed.acquire(blocking=False)
        with pytest.raises(coheld.LockTimeout):
            bed.book_soon()
        asyncio.run(give_up())
        holder.tell("go")
    assert meter.points(TIMEOUTS)[key("bed", backend)].value == 4


def test_reading_calls_are_counted_as_they_run(meter: Meter, backend: str) -> None:
    bed = Bed(lock_name="bed", lock_backend=backend)
    assert bed.read(lambda: bed.read(lambda: meter.points(READERS)[key("bed", backend)].value)) == 2
    assert meter.points(READERS)[key("bed", backend)].value == 0


def test_permits_are_counted_and_who_waits_for_them_and_a_semaphore_is_no_lock(meter: Meter, backend: str) -> None:
    semaphore, mine = Semaphore(2, "gpus", backend), key("gpus", backend)
    with semaphore, semaphore:
        assert meter.points(PERMITS)[mine].value == 2
        threads = [threading.Thread(target=semaphore.acquire) for _ in range(2)]
        for thread in threads:
            thread.start()
        states.wait_until(lambda: meter.points(QUEUE)[mine].value == 2, "they wait")
    for thread in threads:
        thread.join(delays.LONG)
    assert meter.points(PERMITS)[mine].value == 2 and meter.points(QUEUE)[mine].value == 0
    assert meter.metrics().keys() == {PERMITS, QUEUE}
    semaphore.release(2)


def test_one_that_is_started_again_replaces_the_former(meter: Meter) -> None:
    bed = Bed(lock_name="bed")
    bed.book()
    later = Meter()
    bed.book()
    assert [one.points(HOLD)["bed", "shm"].count for one in (meter, later)] == [1, 1]
    assert WAITERS not in meter.metrics() and later.points(WAITERS)


def fork_and_book(link: procs.Link) -> None:
    bed, mine = Bed(lock_name="bed"), Meter()
    bed.acquire()
    if not os.fork():
        with pytest.raises(coheld.NotOwnerError):
            bed.release()
        link.say("go on")
        bed.book()
        link.say(mine.points(HOLD)["bed", "shm"].count)
        os._exit(0)
    link.wait_for("release")
    bed.release()
    os.wait()
    link.say(mine.points(HOLD)["bed", "shm"].count)


def test_a_forked_child_records_what_it_does_itself() -> None:
    with procs.start(fork_and_book) as parent:
        parent.expect("go on")
        parent.tell("release")
        parent.expect(1)
        parent.expect(1)


PROMETHEUS = """
import urllib.request
from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import start_http_server
from coheld import Lockable

server, thread = start_http_server(0, addr="127.0.0.1")
with Lockable(lock_name="early"):  # before there is a provider
    pass
metrics.set_meter_provider(MeterProvider([PrometheusMetricReader()]))
bed = Lockable(lock_name="lab/bed-1")
with bed:
    pass
print(server.server_port)
input()
server.shutdown()
thread.join()
server.server_close()
"""


def test_prometheus_gets_it_all() -> None:
    with procs.program(PROMETHEUS, env={**os.environ, "COHELD_OTEL": "1"}) as served:
        with urllib.request.urlopen(f"http://127.0.0.1:{served.hear()}/metrics", timeout=delays.LONG) as answer:
            lines = answer.read().decode().splitlines()
        served.tell("end")
    mine = [line for line in lines if 'coheld_lock_backend="shm",coheld_lock_name="lab/bed-1"' in line]
    counts = [line for line in mine if "_duration_seconds_count{" in line]
    assert len(counts) == 2 and all(line.endswith(" 1.0") for line in counts)
    zero = [
        line for line in mine if line.startswith("coheld_lock_wait_duration_seconds_bucket{") and 'le="0.0"' in line
    ]
    assert len(zero) == 1 and zero[0].endswith(" 1.0")
    (waiters,) = [line for line in mine if line.startswith("coheld_lock_waiters{")]
    assert waiters.endswith(" 0.0")


WITHOUT = """
import sys
sys.modules["opentelemetry"] = None
import coheld
with coheld.Lockable():
    print("held")
try:
    import coheld.otel
    coheld.otel.start()
except ImportError as error:
    print(error)
"""


def test_without_the_api_start_says_what_to_install_and_locks_work() -> None:
    with procs.program(WITHOUT, stderr=-2, env={**os.environ, "COHELD_OTEL": "1"}) as program:
        told = "coheld.otel needs the OpenTelemetry API: pip install 'coheld[otel]' ("
        assert program.hear().startswith(f"no metrics of locks: {told}")
        program.expect("held")
        assert program.hear().startswith(told)


def test_switched_off_nothing_of_it_is_imported() -> None:
    use = "import sys, coheld\nwith coheld.Lockable(): print(*sys.modules)"
    loaded = procs.run(use, env={**os.environ, "COHELD_OTEL": "0"}).split()
    assert not {one for one in loaded if one.startswith(("opentelemetry", "coheld.otel"))}
    assert "coheld.otel" in sys.modules
