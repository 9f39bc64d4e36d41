"""What holders and waiters of locks on a server find when hosts, the server, or what is between them fails.

Here is what all engines have in common.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

import pytest

from cli.commands import COHELD
from coheld import BackendError, LeaseLostError, native
from coheld.backends import engine as backends_of_servers
from coheld.backends import postgresql, redis, renewing
from coheld.backends.store import Ask, Change, Granted, Known, number_of
from coheld.testing.support import delays, procs, states
from engines import servers
from engines.hosts import LEASE, Counter, Host, Start, host, through, wait_until_waiting
from engines.proxy import Proxy

ENGINES = {servers.Valkey: redis.engine, servers.Postgresql: postgresql.engine}
Make = Callable[..., AbstractContextManager[servers.Server]]


@pytest.fixture(params=["valkey", "postgresql"])
def server(
    request: pytest.FixtureRequest, valkey_session: servers.Valkey, postgresql_session: servers.Postgresql
) -> servers.Server:
    """Those of all tests have to be there before this one begins."""
    made: servers.Server = request.getfixturevalue(request.param)
    return made


def durable_valkey(password: str = "") -> AbstractContextManager[servers.Server]:
    return servers.valkey(durable=True, user="me" if password else "default", password=password)


@pytest.fixture(params=[durable_valkey, servers.postgresql], ids=["valkey", "postgresql"])
def made(request: pytest.FixtureRequest) -> Make:
    """Makes one."""
    make: Make = request.param
    return make


@pytest.fixture
def proxy(server: servers.Server) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


def test_hosts_in_turn_see_what_the_other_has_written(server: servers.Server, start: Start) -> None:
    hosts = start(server.url()), start(server.url())
    assert [one.do("add") for _ in range(3) for one in hosts] == [1, 2, 3, 4, 5, 6]


def test_a_process_sees_what_its_own_host_has_written_before_another_wrote_a_field(
    server: servers.Server, start: Start, tmp_path: Path
) -> None:
    """Its host's copy of the state has the one from here, and gets the other from the server."""
    one, other = start(server.url()), start(server.url())
    with procs.start(host, tmp_path / "host-0", f"{server.url()}?lease={LEASE}") as beside:
        beside.expect("ready")
        for turn in range(1, 6, 2):
            assert one.do("add") == turn
            beside.tell(("add",))
            assert beside.hear() == turn + 1
            assert other.do("make more") == turn // 2 + 2
        assert one.do("add") == 7
        beside.kill()


@pytest.mark.parametrize("take", ["take", "take after a wait"])
def test_a_guard_is_woken_by_another_host(server: servers.Server, start: Start, take: str) -> None:
    one, other = start(server.url()), start(server.url())
    taken = []
    for _ in range(5):
        one.tell(take)
        states.wait_until(lambda: server.is_heard("counter"), "it listens")
        one.worker.wait_until_blocked()
        put = other.do("put")
        taken.append(one.result() - put)
    assert sorted(taken)[2] < delays.SHORT, taken


def test_waiting_hosts_are_served_in_turn(server: servers.Server, start: Start) -> None:
    hosts = [start(server.url()) for _ in range(4)]
    hosts[0].do("acquire")
    for place, waiting in enumerate(hosts[1:], 1):
        waiting.tell("acquire")
        wait_until_waiting(server, place)
    for one, following in pairwise(hosts):
        one.do("release")
        assert following.result()
        wait_until_waiting(server, 3 - hosts.index(following))


def test_who_comes_anew_need_not_wait_for_a_holder(server: servers.Server, start: Start) -> None:
    """__create__ has returned, which the server knows."""
    holder = start(server.url())
    holder.do("acquire")
    assert start(server.url()).do("made") == 1
    assert not holder.do("lost")


@pytest.mark.parametrize(("fault", "bound"), [("kill", delays.MEDIUM / 2), ("stop", 1.5 * delays.MEDIUM)])
def test_a_waiter_that_is_dead_or_stopped_keeps_nobody_waiting(
    server: servers.Server, start: Start, fault: str, bound: float
) -> None:
    holder, first, second = (start(server.url(), lease=60) for _ in range(3))
    holder.do("acquire")
    for place, waiting in enumerate((first, second), 1):
        waiting.tell("acquire")
        wait_until_waiting(server, place)
    getattr(first.worker, fault)()
    alive = 1 if fault == "kill" else 2
    states.wait_until(lambda: len(server.waiting("counter", alive=True)) == alive, "the server knows who listens")
    begun = time.monotonic()
    holder.do("release")
    assert second.result() and time.monotonic() - begun < bound


def test_the_lock_of_a_killed_holder_is_had_within_its_lease(server: servers.Server, start: Start) -> None:
    holder, other = start(server.url()), start(server.url())
    holder.do("add")
    holder.do("acquire")
    holder.do("write", 7)
    token = holder.do("token")
    other.tell("acquire")
    wait_until_waiting(server, 1)
    holder.worker.kill()
    begun = time.monotonic()
    assert other.result() and time.monotonic() - begun < LEASE + delays.MEDIUM / 2
    assert other.do("token") > token and other.do("value") == 1


@pytest.mark.parametrize("held_still", [False, True], ids=["given back since", "held by another"])
def test_a_holder_that_was_stopped_beyond_its_lease(server: servers.Server, start: Start, held_still: bool) -> None:
    holder, other = start(server.url()), start(server.url())
    holder.do("acquire")
    holder.do("write", 7)
    token = holder.do("token")
    holder.worker.stop()
    assert other.do("acquire") and other.do("token") > token
    other.do("write", 1)
    if not held_still:
        other.do("release")
    holder.worker.cont()
    assert holder.do("lost")
    with pytest.raises(LeaseLostError):
        holder.do("ensure")
    with pytest.raises(LeaseLostError, match="not committed"):
        holder.do("release")
    assert holder.do("heard") == ["LeaseLostError"]
    if held_still:
        assert other.do("value") == 1
        other.do("release")
    assert holder.do("value") == 1 and holder.do("add") == 2


def test_a_method_that_was_stopped_beyond_its_lease_has_changed_nothing(server: servers.Server, start: Start) -> None:
    holder, other = start(server.url()), start(server.url())
    holder.tell("write_slowly", 7)
    holder.worker.expect("inside")
    holder.worker.stop()
    assert other.do("add") == 1
    holder.worker.tell("go on")
    holder.worker.cont()
    with pytest.raises(LeaseLostError):
        holder.result()
    assert holder.do("add") == 2


def test_a_lease_is_renewed_for_as_long_as_it_is_held(server: servers.Server, start: Start) -> None:
    holder, other = start(server.url()), start(server.url())
    holder.do("acquire")
    holder.do("write", 7)
    assert not other.do("acquire", 3 * LEASE)
    assert not holder.do("lost")
    holder.do("ensure")
    holder.do("release")
    assert other.do("value") == 7 and holder.do("heard") == holder.do("log") == []


def test_a_lease_that_cannot_be_renewed_is_told_of_and_lost(server: servers.Server, proxy: Proxy, start: Start) -> None:
    holder = start(through(server, proxy))
    holder.do("acquire")
    holder.do("write", 7)
    proxy.refuse()
    states.wait_until(lambda: holder.do("heard") == ["LeaseLostError"], "it is lost", 2 * LEASE)
    assert holder.do("lost") and any("could not be renewed" in line for line in holder.do("log"))
    proxy.forward()
    with pytest.raises(LeaseLostError):
        holder.do("release")
    assert holder.do("add") == 1


def test_a_server_that_is_away_is_said_once_and_so_is_that_it_is_there_again(
    server: servers.Server, proxy: Proxy, start: Start
) -> None:
    one, other = start(through(server, proxy)), start(server.url())
    one.tell("take")
    states.wait_until(lambda: server.is_heard("counter"), "it listens")
    other.do("put")
    one.result()
    one.do("acquire")
    proxy.refuse()
    states.wait_until(lambda: one.do("heard") == ["LeaseLostError"], "it is lost", 2 * LEASE)
    said = one.do("log")
    assert sum("not heard" in line for line in said) == 1 and len(set(said)) == len(said), said
    proxy.forward()
    states.wait_until(lambda: any("heard again" in line for line in one.do("log")), "it is there again")
    with pytest.raises(LeaseLostError):
        one.do("release")
    one.do("acquire")
    states.wait_until(lambda: any("renewed again" in line for line in one.do("log")), "so are leases")
    said = one.do("log")[len(said) :]
    assert sum("again" in line for line in said) == 2 and len(set(said)) == len(said), said


def test_a_connection_that_is_dead_costs_no_lease(proxy: Proxy, start: Start, server: servers.Server) -> None:
    holder = start(through(server, proxy), lease=2 * LEASE)
    holder.do("acquire")
    proxy.stall()
    proxy.forward()  # who connects anew gets through
    until = server.lease_end("counter")
    states.wait_until(lambda: server.lease_end("counter") != until, "it is renewed", 2 * LEASE)
    holder.do("release")
    assert holder.do("heard") == []


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_an_idle_connection_that_is_cut_is_not_noticed(
    server: servers.Server, proxy: Proxy, start: Start, reset: bool
) -> None:
    one = start(through(server, proxy))
    one.do("add")
    proxy.cut(reset=reset)
    assert one.do("add") == 2


def test_connections_of_a_burst_are_closed_when_nobody_uses_them(
    server: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renewing, "_TRIMS", delays.TICK)
    lock = Counter(lock_name="counter", lock_backend=f"{server.url()}?lease={LEASE}")
    store = native.lock_of(lock).away.store
    try:
        connect = store._session if isinstance(store, postgresql.PostgresqlServer) else store._connection
        burst = [connect() for _ in range(8)]
        store._idle.extend(burst)
        with lock:
            states.wait_until(lambda: len(store._idle) <= 2, "most are closed")
            assert lock.value == 0
        assert lock.add() == 1
    finally:
        renewing.end()
        backends_of_servers.close()


def test_an_acquire_whose_reply_is_lost_is_asked_again(server: servers.Server, proxy: Proxy, start: Start) -> None:
    one, other = start(through(server, proxy)), start(server.url())
    one.do("add")
    proxy.lose_reply(server.asking("acquire"))
    one.do("acquire")
    assert proxy.lost == 1 and not other.do("acquire", 0)
    one.do("release")
    assert other.do("acquire", 0)


def test_a_release_whose_reply_is_lost_is_made_once(server: servers.Server, proxy: Proxy, start: Start) -> None:
    one, other = start(through(server, proxy)), start(server.url())
    one.do("add")
    one.do("acquire")
    one.do("write", 7)
    proxy.lose_reply(server.asking("release"))
    one.do("release")
    assert proxy.lost == 1 and other.do("add") == 8 and one.do("add") == 9


class Raw:
    """A host's way to a server, without all that is above it."""

    def __init__(self, server: servers.Server) -> None:
        engine = ENGINES[type(server)]
        self._server = engine._connect(engine._place(server.url()), LEASE)
        self.close, self.load = self._server.close, self._server.load

    def hold(self, nonce: bytes) -> None:
        assert isinstance(self._server.try_acquire("counter", Ask(nonce, b"", LEASE, Known(), False)), Granted)

    def change(self, nonce: bytes, number: bytes, state: bytes, keep: float | None = None) -> int | None:
        return self._server.release("counter", Change(nonce, number, state, keep, False, False, False))


@pytest.fixture
def engines(server: servers.Server) -> Iterator[tuple[Raw, Raw]]:
    two = Raw(server), Raw(server)
    yield two
    for one in two:
        one.close()


ONE, OTHER = b"n" * 16, b"o" * 16


def test_a_change_that_comes_late_replaces_no_later_one(engines: tuple[Raw, Raw]) -> None:
    """It was on its way for long, was asked for again, and others of that grant came after it."""
    one, other = engines
    one.hold(ONE)
    first, second = number_of(ONE), number_of(ONE)
    assert one.change(ONE, first, b"first", LEASE) and one.change(ONE, second, b"second", LEASE)
    assert one.change(ONE, first, b"first", LEASE) is None
    assert other.load("counter", Known()).payload == b"second"


def test_a_release_of_a_killed_owner_that_comes_late_ends_nobodys_grant(engines: tuple[Raw, Raw]) -> None:
    """The next of its host has asked with the same nonce, and has it by that."""
    one, other = engines
    one.hold(ONE)
    late = number_of(ONE)
    other.hold(ONE)
    assert one.change(ONE, late, b"late") is None
    assert other.change(ONE, number_of(ONE), b"next")


def test_a_wait_that_is_cut_goes_on(server: servers.Server, proxy: Proxy, start: Start) -> None:
    holder, waiting = start(server.url()), start(through(server, proxy))
    holder.do("acquire")
    waiting.tell("acquire")
    wait_until_waiting(server, 1)
    proxy.cut(reset=True)
    holder.do("release")
    begun = time.monotonic()
    assert waiting.result() and time.monotonic() - begun < 2 * delays.MEDIUM


def test_who_waits_for_what_the_server_has_forgotten_need_not_wait_for_a_lease(
    server: servers.Server, start: Start
) -> None:
    holder, waiter = start(server.url(), lease=60), start(server.url(), lease=LEASE)
    holder.do("acquire")
    waiter.tell("acquire")
    wait_until_waiting(server, 1)
    server.flush()
    begun = time.monotonic()
    assert waiter.result() and time.monotonic() - begun < LEASE + delays.MEDIUM


def reached(one: Host) -> bool:
    try:
        return bool(one.do("add"))
    except BackendError:
        return False


@pytest.mark.parametrize("fault", ["stall", "refuse"])
def test_a_server_that_is_not_reached_ends_every_call_in_time(
    server: servers.Server, proxy: Proxy, start: Start, fault: str
) -> None:
    one = start(through(server, proxy))
    one.do("acquire")
    one.do("write", 7)
    getattr(proxy, fault)()
    for act in ("release", "add", "value", "acquire"):
        begun = time.monotonic()
        with pytest.raises((BackendError, LeaseLostError)):
            one.do(act)
        assert time.monotonic() - begun < 2 * LEASE, act
    proxy.forward()
    states.wait_until(lambda: reached(one), "it works again")


def test_a_slow_server_is_waited_for(server: servers.Server, proxy: Proxy, start: Start) -> None:
    one = start(through(server, proxy))
    proxy.slow(LEASE / 20)
    assert [one.do("add"), one.do("add")] == [1, 2]
    one.do("acquire")
    one.do("ensure")
    assert not one.do("lost")


SECRET = "not-for-you"


def test_a_password_is_told_to_nobody_but_the_server(start: Start, tmp_path: Path, made: Make) -> None:
    with made(password=SECRET) as server:
        one = start(server.url())
        assert one.do("add") == 1
        one.do("acquire")
        said = one.do("looks")
        said += one.do("semaphore", server.url())
        environment = os.environ | {"COHELD_DIR": str(tmp_path / "host-0"), "COHELD_BACKEND": server.url()}
        for command in ("ps", "ps counter"):
            line = [*COHELD, *command.split()]
            shown = subprocess.run(line, check=False, env=environment, capture_output=True, text=True)
            said += [shown.stdout, shown.stderr]
        server.kill()
        states.wait_until(lambda: one.do("heard"), "it is lost")
        for act in ("release", "add"):
            with pytest.raises((BackendError, LeaseLostError)) as error:
                one.do(act)
            said += [str(error.value), repr(vars(error.value))]
    said += [*one.do("log"), *os.listdir(tmp_path / "host-0")]
    assert len(one.do("log")) > 0
    assert SECRET not in " ".join(said)


def tried(link: procs.Link, url: str) -> str:
    try:
        Counter(lock_name="counter", lock_backend=url)
    except BackendError as error:
        return str(error)
    return "no error"


def test_a_wrong_password_is_said_to_be_one(made: Make) -> None:
    with (
        made(password=SECRET) as server,
        procs.start(tried, server.url().replace(SECRET, "wrong-one")) as client,
    ):
        said = client.result()
    assert "password" in said and "refuses" in said and "wrong-one" not in said, said


def test_a_durable_server_that_is_killed_goes_on(start: Start, made: Make) -> None:
    with made() as server:
        holder, other = start(server.url()), start(server.url())
        holder.do("add")
        holder.do("acquire")
        holder.do("write", 7)
        token = holder.do("token")
        server.restart()
        holder.do("release")
        assert other.do("acquire") and other.do("token") > token
        assert other.do("value") == 7 and other.do("made") == 1
