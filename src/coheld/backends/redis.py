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
import select
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files as resource_files
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from ..errors import IncompatibleError
from .engine import Engine, capabilities, take_lease
from .server import EPOCH, HEALTHY, PATIENCE, Broken, Listener, Server, Unreachable, found, micro, plain
from .store import Ask, Change, Found, Granted, Known, Refused, number_of

CAPABILITIES = replace(capabilities(), cohorts=True)
_PORT = 6379
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
    """What a URL says; url is for redis-py."""

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
        self.lease = take_lease(options)
        if not options.keys().isdisjoint(_SETTLED):
            raise ValueError(f"{', '.join(_SETTLED)} cannot be options of the URL; {_WRONG}")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self.where = f"{parts.scheme}://{host}:{port}/{database}"
        self.url = urlunsplit(parts._replace(path=f"/{database}", query=urlencode(options)))
        login = options.get("username") or unquote(parts.username or ""), options.get("password", parts.password)
        self.password = login[1] and unquote(login[1])
        self.user = login[0] or ("default" if self.password is not None else None)
        self.options = options

    def check(self) -> None:
        self.client()

    def client(self, patience: float = PATIENCE) -> Any:
        """Of redis-py; it is not connected yet. Raises: ValueError: if that does not take the URL's options.
        IncompatibleError: if it is not there."""
        redis = _client_library()
        try:
            client = redis.Redis.from_url(
                self.url, socket_timeout=patience, socket_connect_timeout=patience, health_check_interval=HEALTHY
            )
            pool = client.connection_pool
            pool.connection_class(**pool.connection_kwargs)
        except (TypeError, ValueError):
            raise ValueError(
                f"an option of the URL of {self.where} is none of redis-py, or has a wrong value"
            ) from None
        return client


class RedisServer(Server):
    """What is asked of it, and how."""

    def __init__(self, place: Place, patience: float = PATIENCE) -> None:
        super().__init__(place.where, patience)
        self.client = place.client(patience)
        self._errors = _client_library().exceptions

    # -- the five verbs ------------------------------------------------------------------------------------------------

    def try_acquire(self, name: str, ask: Ask) -> Granted | Refused:
        known = ask.known.incarnation.rstrip(b"\0"), ask.known.version
        answer = self._do(
            "acquire",
            name,
            ask.nonce,
            micro(ask.lease),
            ask.who,
            *known,
            self.id,
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
            state = found(incarnation, int(version), payload, ask.known)
            self._queue_anew(name)
            return Granted(int(token) - EPOCH, state, dead or b"", created == b"1")
        except ValueError:
            raise self._foreign(name, "it is no lock of coheld") from None

    def release(self, name: str, change: Change) -> int | None:
        state = b"" if change.payload is None else change.payload
        lease = b"" if change.keep is None else micro(change.keep)
        version = self._do(
            *("release", name, change.nonce, change.number, int(change.payload is not None), state, lease),
            *(int(change.loud), int(change.recovered), int(change.created)),
        )
        return None if version is None else int(version)

    def renew(self, name: str, nonce: bytes, lease: float) -> bool:
        return bool(self._do("renew", name, nonce, micro(lease)))

    def settle(self, _name: str, _nonce: bytes, _lease: float) -> bool:
        return True  # it has what it answers as durably as it ever will

    def load(self, name: str, known: Known) -> Found:
        incarnation, version, payload, holder, token, nonce, created = self._do(
            "load", name, known.incarnation.rstrip(b"\0"), known.version
        )
        try:
            state = found(incarnation, int(version), payload, known)
            return replace(state, holder=holder, token=int(token) - EPOCH, nonce=nonce, created=bool(created))
        except ValueError:
            raise self._foreign(name, "it is no lock of coheld") from None

    def leave(self, name: str) -> None:
        self._do("leave", name, self.id)
        self._queue_anew(name)

    def remove(self, name: str, nonce: bytes) -> bool:
        return bool(self._do("remove", name, nonce, number_of(nonce)))

    # -- how -----------------------------------------------------------------------------------------------------------

    def connects_by(self, place: Place) -> None:
        self.client = place.client(self.patience)  # who hears has the former until it leaves that
        self._connect_anew()

    def close(self) -> None:
        super().close()
        self.client.close()

    def _listen(self) -> Listener:
        return _Listener(self)

    def _is_there(self, connection: Any) -> bool:
        return _is_silent(connection)

    def _close(self, connection: Any) -> None:
        connection.disconnect()

    def _do(self, verb: str, name: str, *args: Any) -> Any:
        script, key = _scripts()[verb], _key(name)
        return self.call((b"EVALSHA", script[0], b"2", key, key + b":waiting", *args), name, script[1])

    def call(self, command: tuple[Any, ...], name: str, script: bytes = b"") -> Any:
        """Raises: BackendError."""
        return self._answer(lambda: self._evaluated(command, name, script), name)

    def _evaluated(self, command: tuple[Any, ...], name: str, script: bytes) -> Any:
        errors = self._errors
        try:
            try:
                return self._send(command)
            except errors.NoScriptError:
                return self._send((b"EVAL", script, *command[2:]))
        except (errors.ResponseError, errors.AuthenticationError) as error:
            text = plain(error)
            if "WRONGTYPE" in text or ": attempt to " in text:  # of a script that finds no numbers where it looks
                raise self._foreign(name, text) from None
            self._refuse(text, name)
        except errors.TimeoutError as error:
            raise Unreachable(plain(error)) from None
        except (errors.ConnectionError, OSError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in (text := plain(error)):
                self._distrust(text, name)
            raise Broken(text) from None
        except errors.RedisError as error:
            raise Unreachable(plain(error)) from None

    def _send(self, command: tuple[Any, ...]) -> Any:
        """The way of redis-py's client, without what takes half of its time: a pool for each call, metrics, retries."""
        connection = self._connection()
        try:
            connection.send_packed_command([_packed(command)], check_health=False)
            answer = connection.read_response()
        except self._errors.ResponseError as error:
            if _follows(error, self._errors):
                connection.disconnect()
                self._connect_anew()  # the one that is in its place now may be had at the same address
                raise Broken(plain(error)) from None
            self._idle.append(connection)
            raise
        except BaseException:
            connection.disconnect()
            raise
        self._idle.append(connection)
        return answer

    def _connection(self) -> Any:
        """An idle one, or another."""
        if (idle := self._idle_one()) is not None:
            return idle
        pool = self.client.connection_pool
        connection = pool.connection_class(**pool.connection_kwargs)
        connection.connect()
        return connection


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


def _name(key: bytes) -> str:
    return unquote(key.decode().removeprefix("coheld:{").removesuffix("}"))


def _follows(error: Exception, errors: Any) -> bool:
    """Is it of a server that follows another now?  A script may have it as text."""
    return isinstance(error, errors.ReadOnlyError | errors.MasterDownError) or "READONLY" in str(error)


def _is_silent(connection: Any) -> bool:
    """Nothing is to be read: no end, and nothing that nobody has asked for."""
    if sys.platform == "win32":
        return not select.select([connection._sock], [], [], 0)[0]
    poll = select.poll()  # which takes descriptors of any number
    poll.register(connection._sock, select.POLLIN)
    return not poll.poll(0)


class _Listener(Listener):
    """A client that is subscribed; it is stirred by what is said at this process's own channel."""

    _server: RedisServer
    _channels: Any = None

    def _cut(self) -> None:
        sock = getattr(getattr(self._channels, "connection", None), "_sock", None)
        if sock is not None:
            with suppress(OSError):  # it is closed meanwhile
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not TLS's own, which is another thread's

    def stir(self) -> None:
        self._server.call((b"PUBLISH", self._channel(""), b""), "")

    def _channel(self, name: str) -> str:
        return f"coheld:news:{_key(name).decode()}" if name else f"coheld:wake:{self._server.id}"

    def _hear(self) -> None:
        client = self._server.client  # which would close its connections if nobody had it any more
        self._channels = channels = client.pubsub()
        subscribed: dict[str, str] = {}
        try:
            while self._goes_on():
                missing = {self._channel(name): name for name in self._missing()}
                if missing.keys() - subscribed.keys():
                    channels.subscribe(*missing.keys() - subscribed.keys())
                    subscribed |= missing
                message = channels.get_message(timeout=self._patience())
                if message is not None:
                    self._heard(message, subscribed[message["channel"].decode()])
                self._ring_late()
        finally:
            channels.close()

    def _heard(self, message: dict[str, Any], name: str) -> None:
        if message["type"] == "subscribe":
            self._hears(name)
        elif message["type"] == "message" and name:
            self._ring({name})
        elif message["type"] == "message" and message["data"]:
            self._server.wake(_name(message["data"]))


engine = Engine("redis", CAPABILITIES, Place, RedisServer)
at, anonymous, resource, Mutex = engine.at, engine.anonymous, engine.resource, engine.Mutex
