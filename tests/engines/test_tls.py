"""rediss://: the server is behind a TLS end. Whom to trust is said in the URL, as redis-py has it."""

import sys
from collections.abc import Iterator

import pytest

import coheld
from cli.commands import coheld as command
from coheld import BackendError, Lockable, shared
from coheld.backends import engine, renewing
from coheld.testing.support import delays, procs, states
from engines import servers, tls


class Bed(Lockable):
    bookings: int = shared(0)

    @Lockable.locked
    def book(self) -> int:
        self.bookings += 1
        return self.bookings


@pytest.fixture(autouse=True)
def _end_threads() -> Iterator[None]:
    yield
    renewing.end()
    engine.close()


@pytest.fixture
def secure(valkey: servers.Valkey) -> Iterator[tls.End]:
    with tls.end(valkey.port) as end:
        yield end


def url(end: tls.End, options: str = "", login: str = "") -> str:
    return f"rediss://{login}127.0.0.1:{end.port}/0?lease={delays.MEDIUM}{options}"


def trusting(end: tls.End, login: str = "") -> str:
    return url(end, f"&ssl_ca_certs={end.authority}", login)


def test_whom_it_trusts_has_the_lock_and_its_state(secure: tls.End) -> None:
    bed = Bed(lock_name="bed", lock_backend=trusting(secure))
    bed.book()
    before = secure.accepted
    assert [bed.book() for _ in range(20)] == list(range(2, 22))
    assert secure.accepted == before  # what a server says by itself, as a session's ticket, does not end a connection
    assert coheld.resources()[0].label == f"'bed' at rediss://127.0.0.1:{secure.port}/0"


def want(link: procs.Link, where: str) -> int:
    bed = Bed(lock_name="bed", lock_backend=where)
    link.wait_for("go")
    return bed.book()


def test_who_waits_is_woken_by_tls(secure: tls.End, monkeypatch: pytest.MonkeyPatch) -> None:
    bed = Bed(lock_name="bed", lock_backend=trusting(secure))
    with procs.start(want, trusting(secure), method="spawn") as other:
        with bed:
            other.tell("go")
            states.wait_until(lambda: coheld.waiters(bed), "it waits")
        assert other.result() == 1 and bed.bookings == 1


WRONG = {
    "an unknown authority": lambda end: url(end, login="lab:SECRET@"),
    "another host's name": lambda end: url(end, f"&ssl_ca_certs={end.authority}", "lab:SECRET@").replace(
        "127.0.0.1", "localhost"
    ),
}


@pytest.mark.parametrize("which", WRONG)
def test_who_is_not_trusted_is_refused_and_told_nothing(secure: tls.End, which: str) -> None:
    bed = Bed(lock_name="bed", lock_backend=WRONG[which](secure))
    with pytest.raises(BackendError, match=r"rediss://\S+/0 does not prove .*verify failed") as raised:
        bed.book()
    assert "does not help by itself" in str(raised.value) and not secure.accepted
    assert "SECRET" not in f"{raised.value!r} {raised.value} {raised.value.__cause__} {raised.value.__context__}"


def test_a_server_without_tls_is_no_server(valkey: servers.Valkey) -> None:
    bed = Bed(lock_name="bed", lock_backend=valkey.url().replace("redis:", "rediss:"))
    with pytest.raises(BackendError, match="rediss://"):
        bed.book()


def test_a_password_goes_by_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    with servers.valkey(user="lab", password="SECRET") as server, tls.end(server.port) as end:
        with pytest.raises(BackendError, match=r"refuses: .*password") as raised:
            Bed(lock_name="bed", lock_backend=trusting(end, "lab:SECRET2@")).book()
        assert "SECRET" not in str(raised.value)
        assert Bed(lock_name="bed", lock_backend=trusting(end, "lab:SECRET@")).book() == 1
        monkeypatch.setenv("COHELD_BACKEND", trusting(end, "lab:SECRET@"))
        done = command("run", "bed", "--", sys.executable, "-c", "print('ran')")
        assert (done.stdout, done.stderr, done.returncode) == ("ran\n", "", 0)
        shown = command("show", "bed")
        assert "bookings  int  1" in shown.stdout and "SECRET" not in f"{shown.stdout}{shown.stderr}"
