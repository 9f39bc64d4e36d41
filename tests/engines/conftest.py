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
