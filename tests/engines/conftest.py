"""One server for all tests that leave it alone; who kills, stops or restarts one makes one by `servers.valkey()`."""

from collections.abc import Iterator

import pytest

from engines import servers


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
    assert postgresql_session.running and postgresql_session.pid == pid, "the server of all tests was killed by this"
