"""One server for all tests that leave it alone; who kills, stops or restarts one makes one by `servers.valkey()`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engines import hosts, servers


@pytest.fixture(scope="session")
def valkey_session() -> Iterator[servers.Valkey]:
    """What `valkey` gives to each test."""
    with servers.valkey() as server:
        yield server


@pytest.fixture
def valkey(valkey_session: servers.Valkey) -> Iterator[servers.Valkey]:
    """A server without any data, not durable, that other tests have used and will use."""
    valkey_session.flush()
    pid = valkey_session.pid
    yield valkey_session
    assert valkey_session.running and valkey_session.pid == pid, "the server of all tests was killed by this one"


@pytest.fixture(scope="session")
def postgresql_session() -> Iterator[servers.Postgresql]:
    """What `postgresql` gives to each test."""
    with servers.postgresql() as server:
        yield server


@pytest.fixture
def postgresql(postgresql_session: servers.Postgresql) -> Iterator[servers.Postgresql]:
    """A server without any data, that other tests have used and will use."""
    postgresql_session.flush()
    pid = postgresql_session.pid
    yield postgresql_session
    postgresql_session.end_sessions()
    assert postgresql_session.running and postgresql_session.pid == pid, "the server of all tests was killed by this"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[hosts.Start]:
    """Start a host that reaches the server by that URL."""
    with hosts.starting(tmp_path, hosts.host) as begin:
        yield begin
