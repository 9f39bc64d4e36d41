"""The URL of a lock on a server: what is wrong with it is said at once, to who gives it, and without its secrets."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from coheld import BackendError, Lockable, LockTimeout, token, wait_for
from coheld.backends import engine, renewing
from coheld.testing.support import delays, procs, states
from engines import servers

WRONG = [
    "redis://",
    "redis:",
    "redis:///0",
    "redis://u:SECRET@host/x",
    "redis://u:SECRET@host/-1",
    "redis://u:SECRET@host/0/1",
    "redis://u:SECRET@host/0?lease=0",
    "redis://u:SECRET@host/0?lease=x",
    "redis://u:SECRET@host/0?lease=",
    "redis://u:SECRET@host/0?lease=nan",
    "redis://u:SECRET@host/0?lease=3601",
    "redis://u:SECRET@host:0/0",
    "redis://u:SECRET@host:65536/0",
    "redis://u:SECRET@host:x/0",
    "redis://u:SECRET@[::1/0",
    "redis://u:SEC/RET@host/0",
    "redis://u:SECRET@host/0?nosuch=SECRET",
    "redis://u:SECRET@host/0?socket_timeout=SECRET",
    "redis://u:SECRET@host/0?db=3",
    "redis://u:SECRET@host/0?decode_responses=1",
    "reddis://u:SECRET@host/0",
    "postgresql://",
    "postgresql:",
    "postgresql:///lab",
    "postgresql://u:SECRET@host",
    "postgresql://u:SECRET@host/",
    "postgresql://u:SECRET@host/lab/x",
    "postgresql://u:SECRET@host/lab?lease=0",
    "postgresql://u:SECRET@host/lab?lease=nan",
    "postgresql://u:SECRET@host:0/lab",
    "postgresql://u:SECRET@host:65536/lab",
    "postgresql://u:SECRET@host:x/lab",
    "postgresql://u:SECRET@one:1,:2/lab",
    "postgresql://u:SECRET@[::1/lab",
    "postgresql://u:SEC/RET@host/lab",
    "postgresql://u:SECRET@host/lab?nosuch=SECRET",
    "postgresql://u:SECRET@host/lab?SECRET",
    "postgresql://u:SECRET@host/lab?sslmode=SECRET",
    "postgresql://u:SECRET@host/lab?sslmode=",
    "postgresql://u:SECRET@host/lab?target_session_attrs=read_write",
    "postgresql://u:SECRET@host/lab?dbname=other",
    "postgresql://u:SECRET@host/lab?service=SECRET",
    "postgresql://u:SECRET%zz@host/lab",
    "postgres://u:SECRET@host/lab",
]


@pytest.fixture(autouse=True)
def _end_threads() -> Iterator[None]:
    yield
    renewing.end()
    engine.close()


@pytest.mark.parametrize("url", WRONG)
def test_a_wrong_one_is_refused_where_it_is_given(url: str) -> None:
    with pytest.raises(
        ValueError, match=r"(redis|postgresql)://host:port/database|lease must be|option of the URL|no backend"
    ) as raised:
        Lockable(lock_name="x", lock_backend=url)
    assert not isinstance(raised.value, OSError)
    assert "SEC" not in f"{raised.value} {raised.value.__cause__}"


@pytest.mark.parametrize("url", [b"redis://host/0", 5, True])
def test_it_is_text(url: object) -> None:
    with pytest.raises(TypeError, match="lock_backend must be a URL"):
        Lockable(lock_name="x", lock_backend=url)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("postgresql://u:SECRET@lab-host/lab", "postgresql://lab-host:5432/lab"),
        ("postgresql://lab-host:5433/a%2Fb?sslmode=disable&lease=3", "postgresql://lab-host:5433/a%2Fb"),
        ("postgresql://one,two:7/lab?target_session_attrs=read-write", "postgresql://one:5432,two:7/lab"),
        ("postgresql://[::1]/lab", "postgresql://[::1]:5432/lab"),
        ("postgresql://%2Frun%2Fpostgresql/lab", "postgresql://%2Frun%2Fpostgresql:5432/lab"),
    ],
)
def test_it_is_named_without_what_is_secret(url: str, where: str) -> None:
    lock = Lockable(lock_name="x", lock_backend=url)
    assert f"'x' at {where}" in repr(lock.__lock__)
    assert "SECRET" not in f"{lock.__lock__!r} {pickle.dumps(lock)!r}"
    assert Lockable(lock_name="x", lock_backend=where).__lock__.label == lock.__lock__.label


def test_a_wrong_one_does_no_harm_to_a_right_one(valkey: servers.Valkey) -> None:
    with pytest.raises(ValueError, match="option"):
        Lockable(lock_name="x", lock_backend=f"{valkey.url()}?nosuch=1")
    with Lockable(lock_name="x", lock_backend=f"{valkey.url()}?lease=2&socket_timeout=3") as lock:
        assert token(lock)


def test_an_object_that_has_a_name_keeps_its_lock(valkey: servers.Valkey) -> None:
    named = Lockable(lock_name="x", lock_backend=valkey.url())
    lock = named.__lock__
    Lockable.__init__(named)
    with pytest.raises(TypeError, match="lock_backend needs a lock_name"):
        Lockable.__init__(named, lock_backend=valkey.url(1))
    assert named.__lock__ is lock
    Lockable.__init__(named, lock_name="x", lock_backend=valkey.url(1))
    assert named.__lock__ is not lock


def test_no_secret_is_in_messages_and_pickles() -> None:
    with servers.valkey(user="lab", password="SECRET") as server:
        with Lockable(lock_name="x", lock_backend=server.url()) as lock:
            shown = f"{lock.__lock__!r} {pickle.dumps(lock)!r}"
        wrong = Lockable(lock_name="x", lock_backend=server.url(1).replace("SECRET", "SECRET2"))
        with pytest.raises(ConnectionError) as raised:
            wrong.acquire()
    assert "127.0.0.1" in shown and "SECRET" not in f"{shown} {raised.value}"


LOADS = """
import pickle, sys
from coheld import BackendError, Lockable
lock = pickle.loads(bytes.fromhex(sys.argv[1]))
try:
    with lock:
        print("had")
except BackendError as error:
    print("refused" if "SECRET" not in str(error) else error)
"""


def test_who_loads_a_pickle_needs_the_secret_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads() -> str:
        command = [sys.executable, "-c", LOADS, pickle.dumps(lock).hex()]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    with servers.valkey(user="lab", password="SECRET") as server:
        lock = Lockable(lock_name="x", lock_backend=server.url())
        assert loads() == "refused"
        monkeypatch.setenv("COHELD_BACKEND", server.url())
        assert loads() == "had"


def test_a_secret_that_is_told_later_is_used_from_then_on() -> None:
    with servers.valkey(user="lab", password="SECRET") as server:
        first = Lockable(lock_name="x", lock_backend=server.url().replace("SECRET", "wrong"))
        with pytest.raises(BackendError, match=r"refuses|reached"):
            first.acquire()
        second = Lockable(lock_name="x", lock_backend=server.url())
        with first, second:
            assert token(first) == token(second)


def cut(server: servers.Valkey) -> None:
    """All connections: who asks again has to log in."""
    with server.client() as client:
        client.client_kill_filter(skipme=True)


def test_a_url_without_a_login_is_by_the_one_that_is_known() -> None:
    """Messages have it so."""
    with servers.valkey(user="lab", password="SECRET") as server:
        first = Lockable(lock_name="x", lock_backend=server.url())
        bare = server.url().replace("lab:SECRET@", "")
        with first:
            pass
        second = Lockable(lock_name="x", lock_backend=bare)
        third = Lockable(lock_name="x", lock_backend=server.url().replace(":SECRET", ""))
        cut(server)
        for lock in (first, second, third):
            with lock:
                assert token(lock)


@pytest.mark.parametrize("made", [servers.valkey, servers.postgresql], ids=["valkey", "postgresql"])
def test_another_user_of_a_server_that_is_asked_is_refused(made: Callable[..., Any]) -> None:
    with made(password="SECRET") as server:
        with Lockable(lock_name="x", lock_backend=server.url()):
            pass
        other = server.url().partition("://")[0] + "://other:SECRET2@" + server.url().partition("@")[2]
        with pytest.raises(ValueError, match="as another user") as raised:
            Lockable(lock_name="y", lock_backend=other)
        assert "SECRET" not in str(raised.value) and "other:" not in str(raised.value)
        with Lockable(lock_name="x", lock_backend=server.url()) as lock:
            assert token(lock)


def test_a_user_whom_the_server_has_never_answered_may_have_been_a_wrong_one() -> None:
    with servers.valkey(user="lab", password="SECRET") as server:
        first = Lockable(lock_name="x", lock_backend=server.url().replace("lab:", "lap:"))
        with pytest.raises(BackendError, match="refuses"):
            first.acquire()
        with Lockable(lock_name="y", lock_backend=server.url()), first:
            pass


def test_a_new_password_is_used_from_then_on_by_who_hears_as_well(caplog: pytest.LogCaptureFixture) -> None:
    with servers.valkey(user="lab", password="SECRET") as server, server.client() as client:
        lock = Lockable(lock_name="x", lock_backend=server.url())
        with pytest.raises(LockTimeout), lock:
            wait_for(lock, lambda: False, timeout=delays.SHORT)  # from now on it hears
        client.execute_command("ACL", "SETUSER", "lab", ">SECRET2", "<SECRET")
        heard = listeners(client)
        assert heard
        Lockable(lock_name="y", lock_backend=server.url().replace("SECRET", "SECRET2"))
        states.wait_until(lambda: listeners(client) and not listeners(client) & heard, "it hears anew")
        with lock:
            assert token(lock)
        assert "not heard" not in caplog.text


def listeners(client: Any) -> set[str]:
    return {one["id"] for one in client.client_list(_type="pubsub")}


@pytest.mark.parametrize(
    ("client", "url"), [("redis", "redis://127.0.0.1/0"), ("psycopg", "postgresql://127.0.0.1/lab")]
)
def test_without_the_client_library_it_says_what_to_install(client: str, url: str) -> None:
    source = (
        f"import sys; sys.modules[{client!r}] = None\n"
        "from coheld import BackendError, IncompatibleError, Lockable\n"
        f"try: Lockable(lock_name='x', lock_backend={url!r})\n"
        "except IncompatibleError as error: print(error)\n"
        "Lockable(lock_name='x').acquire()"
    )
    assert f"pip install 'coheld[{url.partition(':')[0]}]'" in procs.run(source)
