"""What `prove` puts to the proof: one register under one lock, on a server, as its clients call it.

`coheld` is the real one. `fenced` and `unfenced` show that the proof proves something: a lock with a lease by hand, in
scripts on the server, whose commit asks who has the lock, or, as is done so often, does not.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import redis

import coheld
from coheld import Lockable, shared
from coheld.testing.support import delays
from engines.histories import INITIAL, Operation

LEASE = delays.MEDIUM  # seconds
PATIENCE = 4 * LEASE  # for the lock, and for each answer of the server
Work = Callable[[], None]


class Register(ABC):
    """As a client has it, which is a process that knows the server's URL. Made when the server may be away."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def commit(self, operation: Operation, work: Work) -> str:
        """Under the lock: read, `operation.intend`, `work()`, write. The outcome, one of histories.OUTCOMES."""

    @abstractmethod
    def read(self) -> int | None:
        """Outside of the lock; None: that failed."""


# ---- coheld, by its public interface alone -------------------------------------------------------------------


class Shared(Lockable):
    """The register, and two counts that take turns: each commit changes one, and leaves the other as it was."""

    value: int = shared(INITIAL)
    odd: int = shared(0)
    even: int = shared(0)

    @Lockable.locked(timeout=PATIENCE)
    def commit(self, operation: Operation, work: Work) -> None:
        fresh = operation.intend(self.value, coheld.token(self))
        work()
        if self.odd == self.even:
            self.odd += 1
        else:
            self.even += 1
        self.value = fresh
        assert 0 <= self.odd - self.even <= 1, (self.odd, self.even)


class Coheld(Register):
    def _open(self) -> Shared:
        return Shared(lock_name="register", lock_backend=f"{self.url}?lease={LEASE:g}")

    def commit(self, operation: Operation, work: Work) -> str:
        try:
            self._open().commit(operation, work)
        except (coheld.LeaseLostError, coheld.LockTimeout):
            return "lost"
        except coheld.BackendError:
            return "unknown"
        return "ok"

    def read(self) -> int | None:
        try:
            return self._open().value
        except coheld.BackendError:
            return None


# ---- by hand -------------------------------------------------------------------------------------------------

ACQUIRE = """
if redis.call('EXISTS', 'lock') == 1 then return false end
local now = redis.call('TIME')
local token = math.max((tonumber(redis.call('GET', 'token')) or 0) + 1, now[1] * 1000000 + now[2])
token = string.format('%.0f', token)
redis.call('SET', 'token', token)
redis.call('SET', 'lock', token, 'PX', ARGV[1])
return {token, redis.call('GET', 'value') or '0'}
"""

COMMIT = """
local mine = redis.call('GET', 'lock') == ARGV[1]
if not mine and ARGV[3] == 'fenced' then return 0 end
redis.call('SET', 'value', ARGV[2])
if mine then redis.call('DEL', 'lock') end
return 1
"""


class Fenced(Register):
    """The lock lasts for one lease, which nobody renews. Who waits looks again and again."""

    mode = "fenced"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.client = redis.Redis.from_url(url, socket_timeout=PATIENCE, retry=None)

    def commit(self, operation: Operation, work: Work) -> str:
        try:
            grant = self._acquire()
            if grant is None:
                return "lost"
            fresh = operation.intend(int(grant[1]), int(grant[0]))
            work()
            return "ok" if self.client.eval(COMMIT, 0, grant[0], fresh, self.mode) else "lost"
        except (redis.ConnectionError, redis.TimeoutError):
            return "unknown"

    def _acquire(self) -> list[bytes] | None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if grant := self.client.eval(ACQUIRE, 0, int(LEASE * 1000)):
                return grant
            time.sleep(LEASE / 100)
        return None

    def read(self) -> int | None:
        try:
            return int(self.client.get("value") or INITIAL)
        except (redis.ConnectionError, redis.TimeoutError):
            return None


class Unfenced(Fenced):
    """Sure that who has taken the lock has it."""

    mode = "unfenced"


REGISTERS: dict[str, type[Register]] = {"coheld": Coheld, "fenced": Fenced, "unfenced": Unfenced}
