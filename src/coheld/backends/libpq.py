"""A connection to PostgreSQL, by libpq: each question of it has its time, as a server that is silent hangs nobody.

It is one thread's at a time.  What a fork inherits of it is closed there: a server takes a process whose connection is
open for one that lives.
"""

from __future__ import annotations

import os
import re
import select
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from ..errors import IncompatibleError
from ..process import at_fork
from .server import Broken, Unreachable, plain

READS, WRITES = 1, 4
"""As poll has them."""
_FATAL = re.compile(r"FATAL|PANIC")
_MAY_PASS = re.compile(r"starting up|shutting down|recovery|not (yet )?accepting|too many|connection slots")
_WHOSE = re.compile(r'\b(user|role) "[^"]*"')
_DECODE: dict[int, Callable[[bytes], Any]] = {
    16: lambda raw: raw == b"\1",
    17: bytes,
    20: lambda raw: int.from_bytes(raw, "big", signed=True),
    23: lambda raw: int.from_bytes(raw, "big", signed=True),
}
"""Of a type's number: bool, bytea, int8, int4."""
_NAME = 60
_BEGIN = b"""SELECT pg_catalog.set_config('lock_timeout', $2, false),
    pg_catalog.set_config('default_transaction_isolation', 'read committed', false),
    pg_catalog.set_config('search_path', 'pg_catalog', false)
    FROM (SELECT pg_catalog.pg_backend_pid() AS pid) AS this WHERE pid OPERATOR(pg_catalog.=) $1::pg_catalog.int4"""
"""No row, and nothing is set, where the session is not the one that we have connected to.  search_path: an operator of
somebody else's cannot be meant."""

Value = bytes | str | int | bool | None


def client_library() -> Any:
    try:
        import psycopg
    except ImportError:
        raise IncompatibleError("postgresql: needs a client library: pip install 'coheld[postgresql]'") from None
    return psycopg


class Refusal(Exception):
    """The server's, of one question.  state: SQLSTATE, or empty where it lets nobody in."""

    def __init__(self, state: str, why: str) -> None:
        super().__init__(why)
        self.state = state


class Session:
    """It, connected. Raises: Unreachable; Refusal: it lets us not in.  IncompatibleError: by a pooler."""

    def __init__(self, conninfo: str, where: str, patience: float, connects_within: float | None = None) -> None:
        self._psycopg = client_library()
        self._patience = patience
        self.socket, self._mark = -1, 0
        self._fatal = self._psycopg.pq.ExecStatus.FATAL_ERROR
        self._prepared: set[bytes] = set()
        self._pq = self._connect(conninfo.encode(), patience if connects_within is None else connects_within)
        self.version = int(self._pq.server_version)
        try:
            answer = self._begin()
        except BaseException:
            self.close()
            raise
        if answer is None:
            self.close()
            raise IncompatibleError(
                f"{where} is a pooler, which gives a connection to one session of the server after the other; a lock "
                "is lost there with its session: give the address of the server itself"
            )

    def _connect(self, conninfo: bytes, within: float) -> Any:
        enums = self._psycopg.pq.PollingStatus
        deadline = time.monotonic() + within
        made = self._psycopg.pq.PGconn.connect_start(conninfo)
        _connecting.add(made)
        try:
            while (status := made.connect_poll()) != enums.FAILED:
                self._has(int(made.socket))  # each time: another address, another socket
                if status == enums.OK:
                    made.nonblocking = 1
                    return made
                wait(self.socket, READS if status == enums.READING else WRITES, deadline)
            self._not_in(plain(Exception(made.get_error_message())))
        except BaseException:
            _forget(self.socket, self._mark)
            made.finish()
            raise
        finally:
            _connecting.discard(made)

    def _has(self, fd: int) -> None:
        _forget(self.socket, self._mark)
        self.socket, self._mark = fd, _remember(fd)

    def _begin(self) -> list[Any] | None:
        """It is asked without a name: behind a pooler that would stay with somebody else's session."""
        deadline = time.monotonic() + self._patience
        values = [_raw(self._pq.backend_pid), _raw(int(self._patience * 1000))]
        self._do(self._pq.send_query_params, _BEGIN, values)
        return self._row(self._result(deadline))

    def _not_in(self, why: str) -> None:
        why = _WHOSE.sub(r"\1", why)
        if _FATAL.search(why) is None:
            raise Broken(why)
        if _MAY_PASS.search(why):
            raise Unreachable(why)
        raise Refusal("", why)

    def close(self) -> None:
        _forget(self.socket, self._mark)
        self._pq.finish()

    def end(self) -> None:
        """Wait for what was asked, and close it."""
        with suppress(Unreachable, Refusal):
            self._result(time.monotonic() + self._patience)
        self.close()

    def is_there(self) -> bool:
        """As far as this end of it knows: the server has not closed it. Never blocks, and keeps the interpreter."""
        with suppress(Broken):
            self._consume()
            return True
        return False

    # -- a question ----------------------------------------------------------------------------------------------------

    def ask(self, statement: bytes, *values: Value) -> list[Any] | None:
        """The one row of the answer; None: there is no row. Raises: Unreachable, Refusal."""
        deadline = time.monotonic() + self._patience
        self._send(statement, values, deadline)
        return self._row(self._result(deadline))

    def send(self, statement: bytes, *values: Value) -> None:
        """A question whose answer is waited for elsewhere: when `socket` has something, answer()."""
        deadline = time.monotonic() + self._patience
        self._send(statement, values, deadline)
        self._flush(deadline)

    def answer(self) -> bool:
        """Is it there? Never blocks. Raises: as ask()."""
        self._consume()
        if self._pq.is_busy():
            return False
        self._result(time.monotonic() + self._patience)
        return True

    def script(self, text: bytes) -> None:
        """Some statements, in one transaction. Raises: as ask()."""
        deadline = time.monotonic() + self._patience
        self._do(self._pq.send_query, text)
        self._result(deadline)

    def news(self) -> list[tuple[str, str]]:
        """Channel and text of what was said. Never blocks. Raises: Broken."""
        self._consume()
        said = []
        while (one := self._pq.notifies()) is not None:
            said.append((one.relname.decode(), one.extra.decode()))
        return said

    def _send(self, statement: bytes, values: Sequence[Value], deadline: float) -> None:
        name = statement[:_NAME]  # no two begin with the same
        if name not in self._prepared:
            self._do(self._pq.send_prepare, name, statement)
            self._result(deadline)
            self._prepared.add(name)
        raw = [_raw(value) for value in values]
        self._do(self._pq.send_query_prepared, name, raw, [type(value) is bytes for value in values], 1)

    def _do(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except self._psycopg.Error as error:
            raise Broken(plain(error)) from None

    def _flush(self, deadline: float) -> None:
        while self._do(self._pq.flush):
            if wait(self.socket, READS | WRITES, deadline) & READS:
                self._consume()

    def _consume(self) -> None:
        self._do(self._pq.consume_input)

    def _result(self, deadline: float) -> Any:
        """The last one of the question. Raises: Refusal: it, or one before, is an error."""
        pq, last, failed = self._pq, None, None
        try:
            if pq.flush():
                self._flush(deadline)
            while True:
                while pq.is_busy():
                    wait(self.socket, READS, deadline)
                    pq.consume_input()
                if (result := pq.get_result()) is None:
                    break
                last = result
                if result.status == self._fatal:
                    failed = failed or result
        except self._psycopg.Error as error:
            raise Broken(plain(error)) from None
        if failed is not None:
            self._fail(failed)
        return last

    def _fail(self, result: Any) -> NoReturn:
        fields = self._psycopg.pq.DiagnosticField
        state, why = (result.error_field(field) or b"" for field in (fields.SQLSTATE, fields.MESSAGE_PRIMARY))
        if not state:
            raise Broken(plain(Exception(result.get_error_message())))
        raise Refusal(state.decode(), plain(Exception(why.decode(errors="replace"))))

    def _row(self, result: Any) -> list[Any] | None:
        if not result.ntuples:
            return None
        row = (result.get_value(0, column) for column in range(result.nfields))
        return [
            None if raw is None else _DECODE.get(result.ftype(column), bytes)(raw) for column, raw in enumerate(row)
        ]


def _raw(value: Value) -> bytes | None:
    if value is None or type(value) is bytes:
        return value
    if type(value) is bool:
        return b"t" if value else b"f"
    return str(value).encode()


def wait(fd: int, events: int, deadline: float) -> int:
    """Until it is ready; for what. Raises: Unreachable: it is not, by then."""
    ready = _ready({fd: events}, deadline - time.monotonic())
    if not ready:
        raise Unreachable("no answer in time")
    return ready[fd]


def wait_for_any(fds: list[int], seconds: float) -> set[int]:
    """Those where something is to be read; none: for so long there was nothing."""
    return set(_ready(dict.fromkeys(fds, READS), seconds))


def _ready(wanted: dict[int, int], seconds: float) -> dict[int, int]:
    seconds = max(0.0, seconds)
    if sys.platform == "win32":
        reads, writes = ([fd for fd, events in wanted.items() if events & one] for one in (READS, WRITES))
        readable, writable, _ = select.select(reads, writes, [], seconds)
        return {fd: (fd in readable) * READS | (fd in writable) * WRITES for fd in {*readable, *writable}}
    poll = select.poll()  # which takes descriptors of any number
    for fd, events in wanted.items():
        poll.register(fd, events)
    both = READS | WRITES
    return {fd: found if not found & ~both else both for fd, found in poll.poll(seconds * 1e3)}


# -- a fork -----------------------------------------------------------------------------------------------------------

_open: dict[int, int] = {}
"""Sockets of this process, and which each is."""
_connecting: set[Any] = set()
"""Connections that libpq is making: it may have a socket that we have not seen yet, and have sent something by it."""


def _remember(fd: int) -> int:
    if not hasattr(os, "fork"):
        return 0  # on Windows a socket's number is no file's
    _open[fd] = mark = os.fstat(fd).st_ino
    return mark


def _forget(fd: int, mark: int) -> None:
    if _open.get(fd) == mark:  # else libpq has closed it, and the number is another's
        del _open[fd]


def _become_child() -> None:
    for fd, which in list(_open.items()):
        with suppress(OSError):  # libpq has closed it, and the number may be another's
            if os.fstat(fd).st_ino == which:
                os.close(fd)
    _open.clear()
    for made in _connecting:
        with suppress(client_library().Error, OSError):  # it has none, or one that is closed above
            os.close(made.socket)
    _connecting.clear()


at_fork(child=_become_child)
