"""Locks that a PostgreSQL server has, with their state: postgresql.sql says what is there, and what one step does.

    postgresql://user:password@host:port/database?lease=10    lease in seconds; all else is for libpq, as sslmode=…

A process has a session that listens, whose end says that the process has ended: see there.  So a grant is of a process,
and does not pass to another of its host without the server being asked.
"""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.resources import files as resource_files
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from . import renewing
from .engine import Engine, capabilities, take_lease
from .libpq import Refusal, Session, Value, client_library, wait_for_any
from .server import EPOCH, PATIENCE, Broken, Listener, Server, Unreachable, found, micro
from .store import Ask, Change, Found, Granted, Known, Refused, number_of

CAPABILITIES = replace(capabilities(), cohorts=False)
_PORT = 5432
_WRONG = "the URL of a postgresql: backend must be postgresql://host:port/database"
_SETTLED = ("host", "hostaddr", "port", "dbname", "service", "servicefile", "client_encoding")
"""Options of libpq by which a server would not be the one that messages name, or answer what is not understood."""
_VALUES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
    "channel_binding": ("disable", "prefer", "require"),
    "gssencmode": ("disable", "prefer", "require"),
}
"""What libpq looks at only when it connects."""
_DEFAULTS = {
    "client_encoding": "utf8",
    "fallback_application_name": "coheld",
    "target_session_attrs": "read-write",
}
"""The last: of some hosts the one that the others follow now."""
_MISSING = ("42883", "3F000", "42P01")
"""SQLSTATE: no such function, schema or table."""
_READ_ONLY = "25006"
"""SQLSTATE: this one follows another now."""
_SITS_AFTER, _SITS_FOR = 0.1, 30.0
"""Seconds.  A session that sits has a transaction open, and VACUUM leaves what has ended since."""
_LOOKS_AFTER_CLIENTS = 140000
_LOOK_AFTER_US = b"SELECT pg_catalog.set_config('client_connection_check_interval', '500', false)"
"""A session that waits there for long ends half a second after its client."""
_PREPARING = 0x636F68656C64
"""The number of the lock under which the schema is made."""


class Place:
    """What a URL says.  conninfo: the same, as libpq takes it; conninfos: for each of the hosts."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            login, _, hosts = parts.netloc.rpartition("@")
            options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
            places = [_host(host) for host in hosts.split(",")]
            self.where = f"{parts.scheme}://{','.join(places)}/{_database(parts.path)}"
        except ValueError:
            raise ValueError(_WRONG) from None  # which would have the URL
        self.lease = take_lease(options)
        if not options.keys().isdisjoint(_SETTLED):
            raise ValueError(f"{', '.join(_SETTLED)} cannot be options of the URL; {_WRONG}")
        begin, end = f"{parts.scheme}://{login}{'@' * bool(login)}", f"/{_database(parts.path)}"
        self.url = f"{begin}{','.join(places)}{end}{_query(options)}"
        user, colon, password = login.partition(":")
        self.user = options.get("user") or unquote(user) or None
        self.password = options.get("password", unquote(password) if colon else None)
        self.options = options
        self.conninfo, *self.conninfos = (
            f"{begin}{place}{end}{_query(_DEFAULTS | options)}" for place in (",".join(places), *places)
        )

    def check(self) -> None:
        psycopg = client_library()
        try:
            psycopg.conninfo.conninfo_to_dict(self.conninfo)
            right = all(self.options.get(name, values[0]) in values for name, values in _VALUES.items())
        except psycopg.Error:
            right = False
        if not right:
            raise ValueError(f"an option of the URL of {self.where} is none of libpq, or has a wrong value")


def _query(options: dict[str, str]) -> str:
    parts = (f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in options.items())
    return "?" + "&".join(parts) if options else ""


def _host(text: str) -> str:
    """With its port. Raises: ValueError: if it is none."""
    parts = urlsplit(f"//{text}")
    port = _PORT if parts.port is None else parts.port
    if not parts.hostname or not port:
        raise ValueError(text)
    name = text.rpartition(":")[0] if parts.port is not None else text.rstrip(":")
    return f"{name}:{port}"


def _database(path: str) -> str:
    name = path.removeprefix("/")
    if not name or "/" in name:
        raise ValueError(path)
    return quote(unquote(name), safe="")


# -- the server -------------------------------------------------------------------------------------------------------


@dataclass
class _Post:
    """Who waits first for some locks sits at the key of who has them.  session: None: it is on its way there.  until:
    by time.monotonic()."""

    until: float
    names: set[str] = field(default_factory=set)
    session: Session | None = None


class PostgresqlServer(Server):
    """What is asked of it, and how."""

    def __init__(self, place: Place, patience: float = PATIENCE) -> None:
        super().__init__(place.where, patience)
        self.key = int.from_bytes(os.urandom(8), "big") >> 1
        self.present = False
        """Has a session of this process the key, as far as it knows?"""
        self.posts: dict[int, _Post] = {}
        self._found_at: dict[str, int] = {}  # of each lock that is waited for first: the key of its holder
        self._conninfos = place.conninfos
        self._at = 0  # of these, the one that did the last time
        self._interrupted: deque[Session] = deque()
        self._ending = threading.RLock()
        self._arrived = False

    # -- the verbs -----------------------------------------------------------------------------------------------------

    def try_acquire(self, name: str, ask: Ask) -> Granted | Refused:
        if not self._arrived:
            self._arrive(name)
        elif not self.present and (listener := self._listener) is not None and listener.idles:
            listener.resume()
        known = ask.known.incarnation, ask.known.version
        row = self._do(
            *("acquire", name, ask.nonce, micro(ask.lease), ask.who, *known),
            *(self.key, self.present, ask.queue, number_of(ask.nonce)),
        )
        token, incarnation, version, created, state, dead, wait, holder, watched = row
        if wait is not None:
            seconds = wait / 1e6
            return Refused(seconds if watched is None else self._attend(name, watched, seconds), holder)
        self._found_at.pop(name, None)
        self._queue_anew(name)
        return Granted(token - EPOCH, self._found(name, incarnation, version, state, ask.known), dead or b"", created)

    def release(self, name: str, change: Change) -> int | None:
        keep = None if change.keep is None else micro(change.keep)
        version = self._do(
            *("release", name, change.nonce, change.number, change.payload, keep),
            *(change.loud, change.recovered, change.created),
        )
        return None if version is None else int(version)

    def renew(self, name: str, nonce: bytes, lease: float, durable: bool = False) -> bool:
        return bool(self._do("renew", name, nonce, micro(lease), self.key, self.present, durable))

    def settle(self, name: str, nonce: bytes, lease: float) -> bool:
        return self.renew(name, nonce, lease, durable=True)

    def load(self, name: str, known: Known) -> Found:
        incarnation, version, state, holder, token, nonce, created = self._do(
            "load", name, known.incarnation, known.version
        )
        seen = self._found(name, incarnation or b"", version or 0, state, known)
        token = token - EPOCH if token else 0
        return replace(seen, holder=holder or b"", token=token, nonce=nonce or b"", created=bool(created))

    def _found(self, name: str, incarnation: bytes, version: int, state: bytes | None, asked: Known) -> Found:
        try:
            return found(incarnation, version, state, asked)
        except ValueError:
            raise self._foreign(name, "it is no lock of coheld") from None

    def leave(self, name: str) -> None:
        self._found_at.pop(name, None)
        self._do("leave", name, self.key)
        self._queue_anew(name)

    def remove(self, name: str, nonce: bytes) -> bool:
        return bool(self._do("remove", name, nonce, number_of(nonce)))

    # -- how -----------------------------------------------------------------------------------------------------------

    def connects_by(self, place: Place) -> None:
        self._conninfos = place.conninfos
        self._forget_idle()  # who hears has its session still: its end would be taken for that of this process

    def close(self) -> None:
        super().close()
        while self._interrupted:
            self._interrupted.pop().close()
        while self.posts:
            with suppress(KeyError):
                _, post = self.posts.popitem()
                if post.session is not None:
                    post.session.close()

    def _listen(self) -> Listener:
        return _Listener(self)

    def _is_there(self, connection: Session) -> bool:
        return connection.is_there()

    def _close(self, connection: Session) -> None:
        connection.close()

    def _arrive(self, name: str) -> None:
        """Before its first grant this process is there; what is wrong is said to who asks, not to the log alone."""
        self._do("load", name, b"", 0)
        self._listening().add("")
        self._arrived = True

    def _do(self, verb: str, name: str, *values: Value) -> Any:
        """What the verb's function answers; a value where it is one. Raises: BackendError, IncompatibleError."""
        return self._answer(lambda: self._asked(verb, name, values), name)

    def _asked(self, verb: str, name: str, values: tuple[Value, ...]) -> Any:
        try:
            session = self._session()
            try:
                row = self.ask(session, verb, name, *values)
            except Refusal:
                self._idle.append(session)
                raise
            except Exception:
                session.close()
                raise
            except BaseException:
                self._interrupted.append(session)
                raise
        except Refusal as refusal:
            self._told(refusal, name)
        self._idle.append(session)
        return row

    def ask(self, session: Session, verb: str, *values: Value) -> Any:
        """The schema is made there if it is missing. Raises: as Session.ask()."""
        statement = _statements()[verb]
        try:
            row = session.ask(statement, *values)
        except Refusal as refusal:
            if refusal.state not in _MISSING:
                raise
            session.script(_script())
            row = session.ask(statement, *values)
        return row[0] if row is not None and len(row) == 1 else row

    def connect(self) -> Session:
        """To one of its hosts, each of which has its part of the time: one that is silent is not all there is."""
        hosts, at = self._conninfos, self._at
        for more in reversed(range(len(hosts))):
            try:
                session = Session(hosts[at % len(hosts)], self.where, self.patience, self.patience / len(hosts))
            except Unreachable:
                if not more:
                    raise
                at += 1
            else:
                self._at = at % len(hosts)
                return session
        raise AssertionError("a URL has a host")

    def _session(self) -> Session:
        """An idle one, or another.  What an interrupted thread has asked is answered before: else it might be done
        after it was taken back."""
        while self._interrupted:
            with self._ending:  # no other thread asks before it has its answer, either
                if self._interrupted:
                    (session := self._interrupted[0]).end()
                    with suppress(ValueError):  # a signal's handler was first
                        self._interrupted.remove(session)
        idle: Session | None = self._idle_one()
        return self.connect() if idle is None else idle

    def _told(self, refusal: Refusal, name: str) -> None:
        """What the server says, by its class. Raises: Unreachable, Broken: another time it may say something else."""
        state, why = refusal.state, str(refusal)
        if state[:3] == "57P" or state[:2] in ("08", "40") or state == _READ_ONLY:
            raise Broken(why) from None
        if state[:2] in ("53", "57") or state == "55P03":
            raise Unreachable(why) from None
        if state in ("42501", *_MISSING):
            self._refuse(f"{why}; the schema coheld must be there, or this user be allowed to make it", name)
        if state[:2] in ("22", "42"):
            raise self._foreign(name, why) from None
        self._refuse(why, name)

    # -- who waits first -----------------------------------------------------------------------------------------------

    def _attend(self, name: str, key: int, seconds: float) -> float:
        """By who waits first for what the process of that key has, and may wait for so long: how long it should, if
        nobody wakes it before.  Most holds are short; only who finds the same key again has somebody sit there."""
        if self._found_at.get(name) != key:
            self._found_at[name] = key
            return min(seconds, _SITS_AFTER)
        with self._guard:
            sits = key in self.posts
            self.posts.setdefault(key, _Post(time.monotonic() + min(seconds, _SITS_FOR))).names.add(name)
        if not sits:
            self._listening().stir()
        return seconds

    def sit(self, key: int) -> None:
        """By the thread that listens: a session sits at that key, if one can be had.  If not, the lease ends, and so
        does the wait."""
        post = self.posts[key]
        try:
            session = self._session() if len(self._idle) > 1 else self.connect()
            try:
                if session.version >= _LOOKS_AFTER_CLIENTS:
                    session.ask(_LOOK_AFTER_US)
                left = post.until - time.monotonic()
                session.send(_statements()["attend"], key, max(1, int(left * 1000)))
            except BaseException:
                session.close()
                raise
            post.session = session
        except (Unreachable, Refusal):
            self.posts.pop(key, None)

    def attended(self, key: int) -> None:
        """By the thread that listens: something is said to who sits there."""
        post = self.posts[key]
        assert post.session is not None
        try:
            if not post.session.answer():
                return
            self._idle.append(post.session)
        except (Unreachable, Refusal):
            post.session.close()
        with self._guard:
            self.posts.pop(key, None)
        for name in post.names:
            self.wake(name)


@functools.cache
def _script() -> bytes:
    """What makes the schema, by one process at a time."""
    text = resource_files(__package__).joinpath("postgresql.sql").read_bytes()
    guard = b"SELECT pg_catalog.pg_advisory_xact_lock(%d);" % _PREPARING
    return guard + text.replace(b"VERSION", hashlib.sha256(text).hexdigest()[:12].encode())


@functools.cache
def _statements() -> dict[str, bytes]:
    """Of each verb."""
    counts = {"acquire": 10, "release": 8, "renew": 6, "remove": 3, "load": 3, "leave": 2}
    counts |= {"arrive": 1, "hear": 1, "unhear": 1, "attend": 2}
    text = resource_files(__package__).joinpath("postgresql.sql").read_bytes()
    version = hashlib.sha256(text).hexdigest()[:12]
    return {
        verb: f"SELECT * FROM coheld.{verb}_{version}({', '.join(f'${n}' for n in range(1, count + 1))})".encode()
        for verb, count in counts.items()
    }


class _Listener(Listener):
    """The session whose end says that the process has ended."""

    _server: PostgresqlServer

    def __init__(self, server: PostgresqlServer) -> None:
        super().__init__(server)
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)

    def stir(self) -> None:
        with suppress(OSError):  # it is stirred already, or ends
            self._mouth.send(b"-")

    def _cut(self) -> None:
        self.stir()

    def _is_needed(self) -> bool:
        return super()._is_needed() or renewing.holds(self._server)

    def end(self) -> None:
        super().end()
        self._ear.close()
        self._mouth.close()

    def _hear(self) -> None:
        server, session = self._server, self._server.connect()
        try:
            server.ask(session, "arrive", server.key)
            server.present = True
            renewing.renew_soon(server)
            while self._goes_on():
                for name in self._let_go():
                    server.ask(session, "unhear", name)
                for name in self._missing():
                    if name:
                        server.ask(session, "hear", name)
                    self._hears(name)
                for channel, name in session.news():
                    self._heard(channel, name)
                self._ring_late()
                self._sleep(session)
        finally:
            server.present = False
            session.close()

    def _heard(self, channel: str, name: str) -> None:
        if channel.startswith("coheld_wake_"):
            self._server.wake(name)
        else:
            self._ring({name})

    def _sleep(self, session: Session) -> None:
        """Until somebody says something; who says nothing for long is asked whether it is there."""
        for key in [key for key, post in list(self._server.posts.items()) if post.session is None]:
            self._server.sit(key)
        posts = {post.session.socket: key for key, post in list(self._server.posts.items()) if post.session is not None}
        ready = wait_for_any([session.socket, self._ear.fileno(), *posts], self._patience())
        for fd in ready & posts.keys():
            self._server.attended(posts[fd])
        with suppress(BlockingIOError):
            self._ear.recv(4096)
        if not ready and not self._late:
            session.ask(b"SELECT true")


engine = Engine("postgresql", CAPABILITIES, Place, PostgresqlServer)
at, anonymous, resource, Mutex = engine.at, engine.anonymous, engine.resource, engine.Mutex
