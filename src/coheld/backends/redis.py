"""Locks that a Redis or Valkey server has, with their state: redis.lua says what is there, and what is done in one
step.

    redis://host:port/database?lease=10     rediss:// with TLS; lease in seconds
    redis://user:password@host/0            user, password and whatever else redis-py takes in its URL go to that alone

What the server forgets (it was restarted without persistence, or a replica without the last writes took its place)
begins a new incarnation: who had a grant is refused, as its nonce is not there any more, and tokens go on from the
server's clock.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import select
import sys
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files as resource_files
from typing import Any, NoReturn
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from .. import native
from ..errors import BackendError, IncompatibleError
from ..process import at_fork
from . import of_scheme
from .base import Capabilities, Handle, known
from .remote import far_mutex
from .store import Alarm, Ask, Bell, Change, Found, Granted, Known, Refused, number_of

SCHEME = "redis"
CAPABILITIES = Capabilities(
    handoff_bound=None if native.missing else 0.5,
    wakes_without_polling=not native.missing,
    uninterruptible_entry=False,
    held_limit=None if native.missing else native.HELD_LIMIT,
    files=False,
    leases=True,
    handlers=False,
    readers=False,
    semaphores=True,
)
LEASE = 10.0
_SHORTEST, _LONGEST = 0.1, 3600.0
_PORT = 6379
_PATIENCE = 5.0
"""For how long the server is waited for, seconds, but not for more than a quarter of a lease: who renews it and finds a
connection dead can still try another."""
_REACHED_AGAIN = 0.2
_HEALTHY = 10
"""A connection that was silent for so long is asked whether it is there, seconds."""
_RING_AGAIN = 0.005
_MOST_NAME = 255
_WRONG = "the URL of a redis: backend must be redis://host:port/database"
_SETTLED = ("db", "decode_responses")
"""Options of redis-py by which a server would not be the one that messages name, or answer what is not understood."""


def _client_library() -> Any:
    try:
        import redis
    except ImportError:
        raise IncompatibleError("redis: needs a client library: pip install 'coheld[redis]'") from None
    return redis


class Place:
    """What a URL says.  where: the same without secrets, as messages and pickles have it.  url: for redis-py."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            port = _PORT if parts.port is None else parts.port
            database = int(parts.path.strip("/") or "0")
        except ValueError:
            raise ValueError(_WRONG) from None  # which would have the URL
        if not parts.hostname or not port or database < 0:
            raise ValueError(_WRONG)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.lease = _seconds(options.pop("lease", None))
        if not options.keys().isdisjoint(_SETTLED):
            raise ValueError(f"{', '.join(_SETTLED)} cannot be options of the URL; {_WRONG}")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self.where = f"{parts.scheme}://{host}:{port}/{database}"
        self.url = urlunsplit(parts._replace(path=f"/{database}", query=urlencode(options)))

    def client(self, patience: float = _PATIENCE) -> Any:
        """Of redis-py; it is not connected yet. Raises: ValueError: if that does not take the URL's options.
        IncompatibleError: if it is not there."""
        redis = _client_library()
        try:
            client = redis.Redis.from_url(
                self.url, socket_timeout=patience, socket_connect_timeout=patience, health_check_interval=_HEALTHY
            )
            pool = client.connection_pool
            pool.connection_class(**pool.connection_kwargs)
        except (TypeError, ValueError):
            raise ValueError(
                f"an option of the URL of {self.where} is none of redis-py, or has a wrong value"
            ) from None
        return client


def _seconds(text: str | None) -> float:
    try:
        seconds = LEASE if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not _SHORTEST <= seconds <= _LONGEST:
        raise ValueError(f"lease must be {_SHORTEST:g} to {_LONGEST:g} seconds, not {text}")
    return seconds


class Resource:
    """A lock of that name there, and the local one by which this host's processes agree first."""

    scheme, named = SCHEME, True

    def __init__(self, where: str, name: str, lease: float, permits: bool = False) -> None:
        self.where, self.name, self.lease, self.permits = where, name, lease, permits
        local = of_scheme(_local_scheme())
        here = _local_name(where, name)
        self.local = local.semaphore(here)[0].resource if permits else local.named(here)
        self.path: str = self.local.path

    def attach(self) -> tuple[Any, int]:
        segment, offset = self.local.attach()
        return segment, int(offset)

    def find(self) -> NoReturn:
        """For who looks at the state without its class: it is not in this machine's memory."""
        raise IncompatibleError(f"{self.label(0)}: its state is there, and is not shown yet", resource=self.name)

    def retire(self, segment: Any) -> None:
        self.local.retire(segment)

    def token(self, _offset: int) -> tuple[object, ...]:
        return (self.where, self.name, self.lease, self.permits)

    def label(self, _offset: int) -> str:
        return f"{self.name!r} at {self.where}"

    def open_guard(self, segment: Any, offset: int) -> int:
        return int(self.local.open_guard(segment, offset))

    def guards(self, segment: Any, fd: int) -> bool:
        return bool(self.local.guards(segment, fd))

    def give_back(self, _offset: int) -> None:
        """A named one stays."""

    def store(self) -> Server:
        return _server(self.where, min(_PATIENCE, self.lease / 4))


def _local_scheme() -> str:
    return "file" if native.missing else "shm"


def _local_name(where: str, name: str) -> str:
    whole = f"{where}/{name}"
    if len(whole.encode()) <= _MOST_NAME:
        return whole
    return f"{where}/{hashlib.sha256(name.encode()).hexdigest()}"


class Backend:
    """What backend_of gives for a URL."""

    scheme = SCHEME

    def __init__(self, url: str) -> None:
        self._place = place = Place(url)
        if _process.urls.get(place.where) != place.url:
            place.client()  # what is wrong with it is said here, not by the first call
            with _process.guard:
                _process.urls[place.where] = place.url
                for server in [one for (where, _), one in _process.servers.items() if where == place.where]:
                    server.connects_by(place)
        self.where = self._place.where
        self.CAPABILITIES, self.Mutex = CAPABILITIES, Mutex

    def named(self, name: str) -> Resource:
        return Resource(self._place.where, name, self._place.lease)

    def existing(self, name: str) -> Resource:
        """The resource of that name, whatever it is here; a lock, if there is none."""
        where, local = self._place.where, of_scheme(_local_scheme())
        permits = isinstance(local.existing(_local_name(where, name)), local.NamedSemaphore)
        return Resource(where, name, self._place.lease, permits)

    def anonymous(self, cls: type | None = None) -> Handle:
        """They live in this machine's memory."""
        return anonymous(cls)

    def semaphore(self, name: str | None) -> tuple[Handle, Handle]:
        local = of_scheme(_local_scheme())
        if name is None:
            anonymous: tuple[Handle, Handle] = local.semaphore(None)
            return anonymous
        far = Resource(self._place.where, name, self._place.lease, permits=True)
        gate: Handle = local.semaphore(_local_name(far.where, name))[1]
        return known((SCHEME, *far.token(0)), lambda: Mutex(far)), gate


at = Backend


def anonymous(cls: type | None = None) -> Handle:
    """A deep copy of one has a lock of its own, without a name: on this machine."""
    made: Handle = of_scheme(_local_scheme()).anonymous(cls)
    return made


def resource(where: str, name: str, lease: float, permits: bool) -> Resource:
    """What travelled as that token."""
    return Resource(where, name, lease, permits)


Mutex: Any = far_mutex()


# -- the server -------------------------------------------------------------------------------------------------------


class _Process:
    """What belongs to this process alone; connections are not a child's."""

    def __init__(self) -> None:
        self.urls: dict[str, str] = {}
        self.begin()

    def begin(self) -> None:
        self.guard = threading.RLock()
        self.servers: dict[tuple[str, float], Server] = {}

    def close(self) -> None:
        """Nothing is asked of a server any more; who asks again, is connected anew."""
        with self.guard:
            servers, self.servers = list(self.servers.values()), {}
        for server in servers:
            server.close()


_process = _Process()
at_fork(child=_process.begin)


def _server(where: str, patience: float) -> Server:
    key = where, patience
    server = _process.servers.get(key)
    if server is None:
        with _process.guard:
            if (server := _process.servers.get(key)) is None:
                server = _process.servers[key] = Server(_place_of(where), patience)
    return server


def _place_of(where: str) -> Place:
    """With its secrets, if this process has been told any."""
    if (known := _process.urls.get(where)) is not None:
        return Place(known)
    if (default := os.environ.get("COHELD_BACKEND", "")).startswith(SCHEME):
        place = Place(default)
        if place.where == where:
            return place
    return Place(where)


class Server:
    """A Store."""

    def __init__(self, place: Place, patience: float = _PATIENCE) -> None:
        self.where, self.patience, self._client = place.where, patience, place.client(patience)
        self._errors = _client_library().exceptions
        self._idle: deque[Any] = deque()  # connections that nobody uses now
        self._id = os.urandom(9).hex()
        self._guard = threading.Lock()
        # A name that was removed may have more than one lock here, for a moment: who has the old file, and the new one.
        self._alarms: dict[bytes, weakref.WeakSet[Alarm]] = {}
        self._bells: dict[bytes, weakref.WeakSet[Bell]] = {}
        self._listener: _Listener | None = None

    # -- the five verbs ------------------------------------------------------------------------------------------------

    def try_acquire(self, name: str, ask: Ask) -> Granted | Refused:
        known = ask.known.incarnation.rstrip(b"\0"), ask.known.version
        answer = self._do(
            "acquire",
            name,
            ask.nonce,
            _micro(ask.lease),
            ask.who,
            *known,
            self._id,
            int(ask.queue),
            number_of(ask.nonce),
        )
        more: list[bytes | None] = []
        try:
            if isinstance(answer, list):
                answer, *more = answer
                if b" " not in answer:
                    return Refused(int(answer) / 1e6, more[0] or b"")
            token, incarnation, version, created = answer.split(b" ")
            payload, dead = more or (None, None)
            found = _found(incarnation, version, payload, ask.known)
            self._queue_anew(name)
            return Granted(int(token) - _EPOCH, found, dead or b"", created == b"1")
        except ValueError:
            raise self._foreign(name, "it is no lock of coheld") from None

    def release(self, name: str, change: Change) -> int | None:
        state = b"" if change.payload is None else change.payload
        lease = b"" if change.keep is None else _micro(change.keep)
        version = self._do(
            *("release", name, change.nonce, change.number, int(change.payload is not None), state, lease),
            *(int(change.loud), int(change.recovered), int(change.created)),
        )
        return None if version is None else int(version)

    def renew(self, name: str, nonce: bytes, lease: float) -> bool:
        return bool(self._do("renew", name, nonce, _micro(lease)))

    def load(self, name: str, known: Known) -> Found:
        incarnation, version, payload, holder, token, nonce, created = self._do(
            "load", name, known.incarnation.rstrip(b"\0"), known.version
        )
        try:
            found = _found(incarnation, version, payload, known)
            return replace(found, holder=holder, token=int(token) - _EPOCH, nonce=nonce, created=bool(created))
        except ValueError:
            raise self._foreign(name, "it is no lock of coheld") from None

    def leave(self, name: str) -> None:
        self._do("leave", name, self._id)
        self._queue_anew(name)

    def _queue_anew(self, name: str) -> None:
        """The place of this process among those who wait is gone; another of its locks of that name may want it."""
        if len(self._alarms.get(key := _key(name), ())) > 1:
            self._wake(key)

    def watch(self, name: str, alarm: Alarm) -> None:
        with self._guard:
            self._alarms.setdefault(_key(name), weakref.WeakSet()).add(alarm)
        self._listening().add(f"coheld:wake:{self._id}")

    def listen(self, name: str, lock: Bell) -> None:
        with self._guard:
            self._bells.setdefault(_key(name), weakref.WeakSet()).add(lock)
        self._listening().add(f"coheld:news:{_key(name).decode()}")

    def remove(self, name: str, nonce: bytes) -> bool:
        return bool(self._do("remove", name, nonce, number_of(nonce)))

    def connects_by(self, place: Place) -> None:
        """From now on: with what another URL of it says, a password that this process had not been told."""
        former, self._client = self._client, place.client(self.patience)
        former.close()

    # -- how -----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._guard:
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.end()
        while self._idle:
            self._idle.pop().disconnect()
        self._client.close()

    def _do(self, verb: str, name: str, *args: Any) -> Any:
        script, key = _scripts()[verb], _key(name)
        return self._call((b"EVALSHA", script[0], b"2", key, key + b":waiting", *args), name, script[1])

    def _call(self, command: tuple[Any, ...], name: str, script: bytes = b"") -> Any:
        """Sent again, once, if the connection broke: the script does nothing twice.  But if another had the lock before
        it was asked again, it does not know any more whether it did it the first time: nobody says "lost" then."""
        errors = self._errors
        try:
            try:
                return self._evaluated(command, script)
            except errors.AuthenticationError:
                raise
            except errors.TimeoutError:
                self._idle.clear()  # as silent as that one, perhaps
                raise
            except (errors.ConnectionError, OSError):
                self._idle.clear()
                if (answer := self._evaluated(command, script)) is None:
                    raise errors.ConnectionError("an answer was lost; what was changed may be committed") from None
                return answer
        except (errors.ResponseError, errors.AuthenticationError) as error:
            self._refused(error, name)
        except (errors.RedisError, OSError) as error:
            raise BackendError(
                f"{self.where} cannot be reached, or does not answer: {_plain(error)}; trying again may work",
                resource=name or self.where,
            ) from None

    def _evaluated(self, command: tuple[Any, ...], script: bytes) -> Any:
        try:
            return self._send(command)
        except self._errors.NoScriptError:
            return self._send((b"EVAL", script, *command[2:]))

    def _send(self, command: tuple[Any, ...]) -> Any:
        """The way of redis-py's client, without what takes half of its time: a pool for each call, metrics, retries."""
        connection = self._connection()
        try:
            connection.send_packed_command([_packed(command)], check_health=False)
            answer = connection.read_response()
        except self._errors.ResponseError:
            self._idle.append(connection)
            raise
        except BaseException:
            connection.disconnect()
            raise
        self._idle.append(connection)
        return answer

    def _connection(self) -> Any:
        """An idle one, or another: one that the server has closed meanwhile is found before anything is sent."""
        while self._idle:
            with suppress(IndexError):  # another thread was first
                connection = self._idle.pop()
                if _is_silent(connection):
                    return connection
                connection.disconnect()
        pool = self._client.connection_pool
        connection = pool.connection_class(**pool.connection_kwargs)
        connection.connect()
        return connection

    def _refused(self, error: Exception, name: str) -> NoReturn:
        text = _plain(error)
        if "WRONGTYPE" in text or ": attempt to " in text:  # of a script that finds no numbers where it looks for them
            raise self._foreign(name, text) from None
        raise BackendError(f"{self.where} refuses: {text}; trying again does not help by itself", resource=name)

    def _foreign(self, name: str, why: str) -> IncompatibleError:
        return IncompatibleError(f"{self.where}: another program has what {name!r} needs: {why}", resource=name)

    def _listening(self) -> _Listener:
        with self._guard:
            if self._listener is None or not self._listener.is_alive():
                self._listener = _Listener(self)
                self._listener.start()
            return self._listener

    def _wake(self, name: bytes) -> None:
        """KEYS[1] of the lock; empty: something may have been missed."""
        with self._guard:
            alarms = [alarm for key, those in self._alarms.items() if not name or key == name for alarm in those]
        for alarm in alarms:
            alarm.set()

    def _bells_of(self, name: bytes) -> list[Bell]:
        with self._guard:
            return [bell for key, those in self._bells.items() if not name or key == name for bell in those]


_EPOCH = 1_704_067_200_000_000
"""2024, microseconds: a token has 51 bits of them, and 12 for the passes of a cohort; that is good until 2095."""


def _found(incarnation: bytes, version: bytes, payload: bytes | None, asked: Known) -> Found:
    """Raises: ValueError: if the server has something else."""
    known = Known(incarnation.ljust(16, b"\0"), int(version))
    if payload is None and known.version and known != asked:
        raise ValueError("a state without bytes")
    return Found(known, payload)


def _micro(seconds: float) -> int:
    return int(seconds * 1e6)


@functools.cache
def _scripts() -> dict[str, tuple[bytes, bytes]]:
    """Of each verb: how the server knows it once it has it, and what it is."""
    head, *parts = resource_files(__package__).joinpath("redis.lua").read_bytes().split(b"\n-- ==== ")
    scripts = {part[: part.index(b":")].decode(): head + b"\n-- " + part for part in parts}
    return {verb: (hashlib.sha1(script).hexdigest().encode(), script) for verb, script in scripts.items()}


def _packed(command: tuple[Any, ...]) -> bytes:
    """As redis-py packs it, in a third of the time: it is a tenth of a call."""
    parts = [b"*%d\r\n" % len(command)]
    for part in command:
        raw = part if type(part) is bytes else str(part).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    return b"".join(parts)


@functools.lru_cache(1024)
def _key(name: str) -> bytes:
    return f"coheld:{{{quote(name, safe='/:-_. ')}}}".encode()


def _is_silent(connection: Any) -> bool:
    """Nothing is to be read: no end, and nothing that nobody has asked for."""
    if sys.platform == "win32":
        return not select.select([connection._sock], [], [], 0)[0]
    poll = select.poll()  # which takes descriptors of any number
    poll.register(connection._sock, select.POLLIN)
    return not poll.poll(0)


def _plain(error: BaseException) -> str:
    """What it says, in a line: redis-py names host and port, and no secrets."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class _Listener(threading.Thread):
    """Hears what the server says to this process: one connection, for as long as the process lives.  It sleeps until
    something is said; who wants another channel says that at the first one, which is this process's own."""

    def __init__(self, server: Server) -> None:
        super().__init__(name="coheld news", daemon=True)
        self._server, self._own = server, f"coheld:wake:{server._id}"
        self._channels = {self._own: threading.Event()}
        self._guard = threading.Lock()
        self._late: set[bytes] = set()
        self._ended = False

    def end(self) -> None:
        """Blocks until it has."""
        self._ended = True
        with suppress(BackendError):
            self._server._call((b"PUBLISH", self._own, b"-"), "")
        self.join(self._server.patience)

    def add(self, channel: str) -> None:
        """Subscribe: when this returns, nothing that is said from now on is missed, but for what a cut connection
        loses. Raises: BackendError: if the server cannot be reached."""
        with self._guard:
            ready = self._channels.setdefault(channel, threading.Event())
        if ready.is_set():
            return
        self._server._call((b"PUBLISH", self._own, b"-"), "")
        if not ready.wait(self._server.patience):
            raise BackendError(
                f"{self._server.where} cannot be reached, or does not answer; trying again may work",
                resource=self._server.where,
            )

    def run(self) -> None:
        while not self._ended:
            try:
                self._hear()
            except Exception as error:  # whatever it was, those who wait depend on this thread
                self._lost(error)

    def _hear(self) -> None:
        channels = self._server._client.pubsub()
        subscribed: set[str] = set()
        try:
            while not self._ended:
                with self._guard:
                    missing = set(self._channels) - subscribed
                if missing:
                    channels.subscribe(*missing)
                    subscribed |= missing
                message = channels.get_message(timeout=_RING_AGAIN if self._late else _HEALTHY)
                if message is not None:
                    self._heard(message)
                if self._late:
                    self._ring(self._late)
        finally:
            channels.close()

    def _heard(self, message: dict[str, Any]) -> None:
        name = message["channel"]
        if message["type"] == "subscribe":
            self._channels[name.decode()].set()
        elif message["type"] == "message" and name.startswith(b"coheld:wake:"):
            self._server._wake(message["data"])
        elif message["type"] == "message":
            self._ring({name.removeprefix(b"coheld:news:")})

    def _ring(self, names: set[bytes]) -> None:
        self._late = {name for name in names for bell in self._server._bells_of(name) if not bell.ring()}

    def _lost(self, error: Exception) -> None:
        """The connection is gone, and with it what was said meanwhile: all look again."""
        logging.getLogger("coheld").warning("%s: its news is not heard: %s", self._server.where, _plain(error))
        for ready in list(self._channels.values()):
            ready.clear()
        self._server._wake(b"")
        self._late = set(self._server._bells)
        time.sleep(_REACHED_AGAIN)
