"""What is PostgreSQL's alone of what goes wrong: sessions that end, grants that no disk has, poolers, rights."""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import coheld
from coheld import BackendError, IncompatibleError, LeaseLostError, Lockable, LockTimeout, wait_for
from coheld.backends import engine, renewing, server
from coheld.backends import postgresql as postgresql_backend
from coheld.backends.libpq import Session
from coheld.backends.server import Unreachable
from coheld.testing.support import delays, procs, states
from engines import ports, servers
from engines.hosts import Counter, Start, through, wait_until_waiting
from engines.proxy import Connection, Proxy

GRACE = 0.5
LONG = 60
"""A lease, that nobody waits for here."""


@pytest.fixture(autouse=True)
def _end_threads() -> Iterator[None]:
    yield
    renewing.end()
    engine.close()


@pytest.fixture
def proxy(postgresql: servers.Postgresql) -> Iterator[Proxy]:
    with Proxy(postgresql.port) as proxy:
        yield proxy


# ---- sessions that end ---------------------------------------------------------------------------------------


def test_the_lock_of_a_killed_holder_is_had_when_its_session_ends(postgresql: servers.Postgresql, start: Start) -> None:
    holder, other, last = (start(postgresql.url(), lease=LONG) for _ in range(3))
    holder.do("add")
    holder.do("acquire")
    holder.do("write", 7)
    token = holder.do("token")
    for place, waiting in enumerate((other, last), 1):
        waiting.tell("acquire")
        wait_until_waiting(postgresql, place)
    for dead, following in ((holder, other), (other, last)):
        dead.worker.kill()
        begun = time.monotonic()
        assert following.result() and time.monotonic() - begun < GRACE + delays.MEDIUM / 2
        assert following.do("token") > token and following.do("value") == 1
        token = following.do("token")


def test_so_is_that_of_a_holder_whose_child_lives(postgresql: servers.Postgresql, start: Start) -> None:
    """The child has none of its connections."""
    other = start(postgresql.url(), lease=LONG)
    with procs.start(holds_and_forks, f"{postgresql.url()}?lease={LONG}") as holder:
        child = holder.hear()
        other.tell("acquire")
        wait_until_waiting(postgresql, 1)
        os.kill(holder.pid, signal.SIGKILL)
        begun = time.monotonic()
        assert other.result() and time.monotonic() - begun < GRACE + delays.MEDIUM / 2
        assert not states.gone(child)
        os.kill(child, signal.SIGKILL)
        holder.kill()


def holds_and_forks(link: procs.Link, url: str) -> None:
    os.environ["COHELD_DIR"] = os.environ["COHELD_DIR"] + "/another"
    os.mkdir(os.environ["COHELD_DIR"], 0o700)
    counter = Counter(lock_name="counter", lock_backend=url)
    counter.acquire()
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        os.close(theirs)
        link.hear()
    os.close(ours)
    link.say(child)
    link.hear()


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_a_holder_whose_connections_are_cut_keeps_its_lease(
    postgresql: servers.Postgresql, proxy: Proxy, start: Start, reset: bool
) -> None:
    holder, other = start(through(postgresql, proxy), lease=LONG), start(postgresql.url(), lease=LONG)
    holder.do("acquire")
    holder.do("write", 7)
    other.tell("acquire")
    wait_until_waiting(postgresql, 1)
    (key,) = (postgresql.one("SELECT k FROM coheld.lock"),)
    for _ in range(3):
        proxy.cut(reset=reset)
        states.wait_until(lambda: postgresql.is_taken(key), "its process is here again")
        assert not holder.do("lost")
    holder.do("release")
    assert holder.do("heard") == [] and other.result() and other.do("value") == 7


def test_a_session_that_the_server_takes_for_living_makes_way(
    postgresql: servers.Postgresql, proxy: Proxy, start: Start
) -> None:
    """The client has lost it; the server does not know."""
    holder = start(through(postgresql, proxy), lease=4 * delays.SCALE)
    holder.do("acquire")
    key, before = postgresql.one("SELECT k FROM coheld.lock"), listens(postgresql)
    proxy.stall()
    proxy.forward()  # who connects anew gets through
    states.wait_until(lambda: listens(postgresql) not in (None, before), "another session has its key", delays.HANG)
    assert postgresql.is_taken(key) and not holder.do("lost")
    holder.do("release")


def listens(server: servers.Postgresql) -> int | None:
    """The session that has a key."""
    found: int | None = server.one(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted"
    )
    return found


@pytest.mark.parametrize("seen", [True, False])
def test_a_child_of_a_process_that_connects_just_then_has_no_connection(seen: bool) -> None:
    """Not even if libpq has its socket, and nobody else has seen that."""
    with (
        socket.create_server((ports.HOST, 0)) as server,
        procs.start(connects_and_forks, f"postgresql://{ports.HOST}:{server.getsockname()[1]}/lab", seen) as worker,
    ):
        client, _ = server.accept()
        with client:
            client.settimeout(delays.LONG)
            assert not seen or client.recv(64)
            worker.tell("fork")
            child = worker.hear()
            while client.recv(64):
                pass
            assert not states.gone(child)
        os.kill(child, signal.SIGKILL)
        worker.kill()


def connects_and_forks(link: procs.Link, conninfo: str, seen: bool) -> None:
    forked = threading.Event()

    class Late(Session):
        def _has(self, fd: int) -> None:
            assert seen or forked.wait(delays.LONG)
            super()._has(fd)

    def connects() -> None:
        with suppress(Unreachable):
            Late(conninfo, "", delays.MEDIUM)

    threading.Thread(target=connects).start()
    link.wait_for("fork")
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        os.close(theirs)
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
    forked.set()
    link.say(child)
    link.hear()


def test_a_waiter_that_is_killed_leaves_no_session_at_the_key(postgresql: servers.Postgresql, start: Start) -> None:
    holder, waiting = start(postgresql.url(), lease=LONG), start(postgresql.url(), lease=LONG)
    holder.do("acquire")
    waiting.tell("acquire")
    states.wait_until(lambda: sits(postgresql) == 1, "it sits there")
    waiting.worker.kill()
    states.wait_until(lambda: sits(postgresql) == 0, "the server has noticed")
    holder.do("release")


def test_who_waits_first_and_gives_up_has_the_next_sit_at_the_key(postgresql: servers.Postgresql, start: Start) -> None:
    holder, first, second = (start(postgresql.url(), lease=LONG) for _ in range(3))
    holder.do("acquire")
    first.tell("acquire", delays.MEDIUM)
    wait_until_waiting(postgresql, 1)
    second.tell("acquire")
    wait_until_waiting(postgresql, 2)
    assert not first.result()
    holder.worker.kill()
    begun = time.monotonic()
    assert second.result() and time.monotonic() - begun < LONG / 2


def test_who_sits_at_a_key_has_no_transaction_open_for_long(
    postgresql: servers.Postgresql, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql_backend, "_SITS_FOR", delays.SHORT)
    holder = start(postgresql.url(), lease=LONG)
    holder.do("acquire")
    waiting = threading.Thread(target=uses_once, args=(f"{postgresql.url()}?lease={LONG}",))
    waiting.start()
    seen: set[object] = set()
    states.wait_until(lambda: len(seen.add(postgresql.one(SITS_SINCE)) or seen - {None}) > 2, "it sits there anew")
    holder.do("release")
    waiting.join()


SITS_SINCE = (
    "SELECT xact_start FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND NOT granted"
)


def uses_once(url: str) -> None:
    with Lockable(lock_name="counter", lock_backend=url):
        pass


def test_what_is_said_while_a_waiter_connects_anew_is_not_missed(postgresql: servers.Postgresql, start: Start) -> None:
    """It has looked again, and cannot hear yet."""
    holder, waiting = start(postgresql.url(), lease=LONG), start(postgresql.url(), lease=LONG)
    holder.do("acquire")
    waiting.tell("acquire")
    states.wait_until(lambda: sits(postgresql) == 1, "it sits there")
    (key,) = postgresql.waiting("counter")
    session, cut = postgresql.one(AT_KEY + "granted", key), postgresql.one("SELECT clock_timestamp()")
    with postgresql.client() as client:
        client.execute("SELECT pg_terminate_backend(%s), pg_advisory_lock_shared(%s)", (session, key))
        states.wait_until(lambda: postgresql.one(AT_KEY + "NOT granted", key), "it connects anew")
        states.wait_until(lambda: postgresql.one(ASKED_SINCE, cut), "it has asked again")
        holder.do("release")
    begun = time.monotonic()
    assert waiting.result() and time.monotonic() - begun < LONG / 2


ASKED_SINCE = (
    "SELECT pid FROM pg_stat_activity "
    "WHERE query LIKE '%%FROM coheld.acquire%%' AND state = 'idle' AND query_start > %s"
)
AT_KEY = (
    "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' "
    "AND (classid::bigint << 32 | objid::bigint) = %s AND "
)


def puts(link: procs.Link, directory: Path, url: str, names: list[str]) -> None:
    os.environ["COHELD_DIR"] = str(directory)
    for name in names:
        Counter(lock_name=name, lock_backend=url).put()


def heard(server: servers.Postgresql) -> int:
    """How many names are listened to."""
    shared = "locktype = 'advisory' AND mode = 'ShareLock' AND granted"
    return int(server.one(f"SELECT count(*) FROM pg_locks WHERE {shared}"))  # type: ignore[arg-type]


def test_a_name_that_nobody_waits_for_any_more_is_not_listened_to(
    postgresql: servers.Postgresql, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is, for who waits anew; and no other."""
    monkeypatch.setattr(server, "_KEEPS", 4)
    locks = [Counter(lock_name=f"counter-{number}", lock_backend=postgresql.url()) for number in range(20)]
    waits = [threading.Thread(target=lock.take) for lock in locks[:2]]
    waits[0].start()
    states.wait_until(lambda: postgresql.is_heard("counter-0"), "it is listened to")
    for lock in locks[1:]:
        with pytest.raises(LockTimeout), lock:
            wait_for(lock, lambda: False, timeout=delays.TICK)
    states.wait_until(lambda: heard(postgresql) < 10, "most are not listened to any more")
    assert postgresql.is_heard("counter-0") and not postgresql.is_heard("counter-1")
    waits[1].start()
    states.wait_until(lambda: postgresql.is_heard("counter-1"), "it is listened to anew")
    with procs.start(puts, tmp_path, postgresql.url(), ["counter-1", "counter-0"]) as other:
        other.result()
    for thread in waits:
        thread.join(delays.LONG)
        assert not thread.is_alive()


def test_a_clock_that_was_set_back_keeps_nobody_out(postgresql: servers.Postgresql, start: Start) -> None:
    """What the row says is of an hour later: since when the holder is gone, and until when the first in turn has it."""
    holder, stopped, other = (start(postgresql.url(), lease=LONG) for _ in range(3))
    holder.do("acquire")
    stopped.tell("acquire")
    wait_until_waiting(postgresql, 1)
    stopped.worker.stop()
    holder.worker.kill()
    with postgresql.client() as client:
        client.execute(
            "WITH clock AS (SELECT (date_part('epoch', now() + interval '1 hour') * 1000000)::bigint AS later) "
            "UPDATE coheld.lock SET d = later, u = later, n = waiting[1], e = later FROM clock"
        )
    assert other.do("acquire", delays.LONG)


def sits(server: servers.Postgresql) -> int:
    count: int = server.one("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    return count


class Interrupted:
    """A session whose answer is waited for, when a signal's handler asks as well."""

    def __init__(self, server: postgresql_backend.PostgresqlServer) -> None:
        self.server, self.ends = server, 0

    def end(self) -> None:
        self.ends += 1
        if self.ends == 1:
            self.server._session().close()


def test_a_handler_of_a_signal_may_end_what_was_interrupted_too(postgresql: servers.Postgresql) -> None:
    server = postgresql_backend.PostgresqlServer(postgresql_backend.Place(postgresql.url()))
    server._interrupted.append(Interrupted(server))  # type: ignore[arg-type]
    server._session().close()
    assert not server._interrupted


# ---- a crash -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settled", [False, True], ids=["not yet", "by its token"])
def test_a_crash_of_the_server_before_a_grant_is_on_the_disk(start: Start, settled: bool) -> None:
    with servers.postgresql(wal_writer_delay="10s") as server:
        holder, other = start(server.url()), start(server.url())
        holder.do("add")
        token = other.do("acquire") and other.do("token")
        other.do("release")
        holder.do("acquire")
        if settled:
            token = holder.do("token")
        holder.do("write", 7)
        server.restart()
        if settled:
            holder.do("release")
        else:
            with pytest.raises(LeaseLostError):
                holder.do("release")
        assert other.do("acquire") and other.do("token") > token
        assert other.do("value") == (7 if settled else 1) and other.do("made") == 1


# ---- who stands between, and what is there --------------------------------------------------------------------


class Pooler(Proxy):
    """Clients have numbers of its own, as PgBouncer gives them."""

    asked = b""

    def _look_at_request(self, connection: Connection, data: bytes) -> bytes:
        self.asked += data
        return super()._look_at_request(connection, data)

    def _look_at_reply(self, connection: Connection, data: bytes) -> bytes:
        head, found, rest = super()._look_at_reply(connection, data).partition(b"K\0\0\0\x0c")
        return head + found + (b"\0\0\0\1" + rest[4:] if found else rest)


def test_a_pooler_is_refused(postgresql: servers.Postgresql) -> None:
    with Pooler(postgresql.port) as pooler:
        lock = Lockable(lock_name="x", lock_backend=through(postgresql, pooler))
        for _ in range(2):
            with pytest.raises(IncompatibleError, match="is a pooler"):
                lock.acquire()
        names = re.findall(rb"P\0\0..([^\0]*)\0SELECT", pooler.asked, re.DOTALL)
        assert set(names) == {b""}, "what is prepared would stay with a session that others have next"


def test_what_somebody_else_has_made_in_the_database_is_not_called(
    postgresql: servers.Postgresql, start: Start
) -> None:
    with postgresql.client() as client:
        client.execute(
            "CREATE FUNCTION public.mine(bigint[], bigint) RETURNS bigint[] LANGUAGE plpgsql "
            "AS $$ BEGIN RAISE EXCEPTION 'with the rights of another'; END $$"
        )
        client.execute("CREATE OPERATOR public.|| (LEFTARG = bigint[], RIGHTARG = bigint, FUNCTION = public.mine)")
    holder, waiting = start(postgresql.url()), start(postgresql.url())
    holder.do("acquire")
    waiting.tell("acquire")
    wait_until_waiting(postgresql, 1)
    holder.do("release")
    assert waiting.result()


# ---- some hosts ------------------------------------------------------------------------------------------------


def test_one_of_some_hosts_that_is_silent_leaves_time_for_the_others(postgresql: servers.Postgresql) -> None:
    with socket.create_server((ports.HOST, 0)) as silent:
        both = f"{ports.HOST}:{silent.getsockname()[1]},{ports.HOST}:{postgresql.port}"
        url = postgresql.url().replace(f"{ports.HOST}:{postgresql.port}", both)
        with Lockable(lock_name="x", lock_backend=url) as lock:
            assert coheld.token(lock)


def test_a_server_that_follows_another_is_not_the_one(postgresql: servers.Postgresql) -> None:
    """As far as clients see."""
    with postgresql.client() as client:
        client.execute("CREATE ROLE lab LOGIN")
        client.execute("ALTER ROLE lab SET default_transaction_read_only = on")
        with pytest.raises(BackendError, match="read-only; trying again may work"):
            Lockable(lock_name="x", lock_backend=postgresql.url(user="lab")).acquire()
        client.execute("DROP ROLE lab")


def test_who_may_not_make_the_schema_is_told_so_and_may_use_it_when_it_is_there(
    postgresql: servers.Postgresql,
) -> None:
    lock = Lockable(lock_name="x", lock_backend=postgresql.url(user="lab"))
    with postgresql.client() as client:
        client.execute("CREATE ROLE lab LOGIN")
        with pytest.raises(BackendError, match="the schema coheld must be there"):
            lock.acquire()
        with procs.start(uses, postgresql.url()) as admin:
            admin.expect("ready")
            admin.tell("go")
        with pytest.raises(BackendError, match="the schema coheld must be there"):
            lock.acquire()
        client.execute("GRANT USAGE ON SCHEMA coheld TO lab")
        client.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON coheld.lock TO lab")
        with lock:
            assert coheld.token(lock)
        client.execute("DROP SCHEMA coheld CASCADE")
        client.execute("DROP ROLE lab")


def test_first_uses_at_once_make_the_schema_once(postgresql: servers.Postgresql, tmp_path: Path) -> None:
    with procs.start(uses, postgresql.url()) as one, procs.start(uses, postgresql.url()) as other:
        for worker in (one, other):
            worker.expect("ready")
        for worker in (one, other):
            worker.tell("go")
        assert sorted([one.result(), other.result()]) == [1, 2]


def uses(link: procs.Link, url: str) -> int:
    counter = Counter(lock_name="counter", lock_backend=url)
    link.say("ready")
    link.wait_for("go")
    return counter.add()


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE SCHEMA coheld; CREATE TABLE coheld.lock (name text)",
        "CREATE SCHEMA coheld; CREATE VIEW coheld.lock AS SELECT 1 AS name",
    ],
)
def test_what_another_program_has_under_the_name(postgresql: servers.Postgresql, statement: str) -> None:
    with postgresql.client() as client:
        for part in statement.split("; "):
            client.execute(part)  # type: ignore[call-overload]
    with pytest.raises(IncompatibleError, match="another program"):
        Lockable(lock_name="x", lock_backend=postgresql.url()).acquire()
