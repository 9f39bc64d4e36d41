"""A real connection of unicon, pyATS's own, to the mock of a device that unicon brings."""

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from unicon import Connection

from coheld.testing.support import delays, procs

MOCK = f"{Path(sys.executable).parent}/mock_device_cli --os iosxe --state general_enable"


@contextmanager
def connected() -> Iterator[Any]:
    conn = Connection(hostname="Router", start=[MOCK], os="iosxe", log_stdout=False, mit=True)
    conn.connect()
    try:
        yield conn
    finally:
        conn.disconnect()


def hold_inside_a_command(link: procs.Link, conn: Any) -> None:
    """Stop for ever where a command has been sent, and its answer is awaited."""

    def stop_here(*_: object) -> None:
        link.say("holding")
        link.wait_for("never said")

    conn.spawn.expect = conn.spawn.sendline = stop_here
    conn.execute("show clock")


@pytest.mark.hang_limit(300)
def test_a_connection_survives_a_holder_that_is_killed_inside_a_command(adopted: None) -> None:
    with connected() as conn:
        with procs.start(hold_inside_a_command, conn) as holder:
            holder.expect("holding")
            assert not conn.acquire(block=False)
            holder.kill()
            assert conn.acquire(timeout=delays.LONG)
            conn.release()
        assert "UTC" in conn.execute("show clock")


@pytest.mark.hang_limit(300)
def test_without_adopt_it_does_not() -> None:
    with connected() as conn:
        with procs.start(hold_inside_a_command, conn) as holder:
            holder.expect("holding")
            holder.kill()
            assert not conn.acquire(timeout=delays.MEDIUM)
        conn.__lock__ = multiprocessing.RLock()  # for disconnect, which would wait for ever
