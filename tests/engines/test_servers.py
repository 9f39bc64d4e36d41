"""The servers that the tests of engines stand on."""

import os
import socket
import time
from pathlib import Path

import pytest
import redis

from coheld.testing.support import delays, hygiene, procs, states
from engines import ports, servers


def directories() -> set[Path]:
    """Those of this run."""
    return set(Path("/dev/shm").glob(f"{hygiene.PREFIX}{os.getpid()}-*"))


def test_the_server_of_all_tests_is_empty(valkey: servers.Valkey) -> None:
    with valkey.client() as client, valkey.client(database=5) as other:
        assert client.dbsize() == other.dbsize() == 0
        client.set("left behind", "1")
        other.set("left behind", "1")


test_the_server_of_all_tests_is_empty_again = test_the_server_of_all_tests_is_empty


def test_a_port_is_kept_while_nobody_listens() -> None:
    with ports.reserved() as port:
        with ports.open_socket() as listener:
            listener.bind((ports.HOST, port))
            listener.listen()
            socket.create_connection((ports.HOST, port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((ports.HOST, port))
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind((ports.HOST, port))


def test_a_restart_loses_all_and_keeps_the_port() -> None:
    with servers.valkey() as server:
        with server.client() as client:
            client.set("x", "1")
        url = server.url()
        server.restart()
        assert server.url() == url
        with server.client() as client:
            assert client.get("x") is None


def test_a_durable_server_keeps_what_it_acknowledged() -> None:
    with servers.valkey(durable=True) as server:
        with server.client() as client:
            for n in range(50):
                client.set("x", n)
                client.rpush("all", n)
        server.restart()
        with server.client() as client:
            assert client.get("x") == b"49" and client.llen("all") == 50
        server.wipe()
        with server.client() as client:
            assert client.dbsize() == 0


def test_a_stopped_server_accepts_and_is_silent() -> None:
    with servers.valkey() as server, server.client(socket_timeout=delays.SHORT) as hasty:
        server.stop()
        with pytest.raises(redis.TimeoutError):
            hasty.ping()
        server.cont()
        with server.client() as client:
            assert client.ping()
        server.stop()
        server.kill()
        with pytest.raises(redis.ConnectionError):
            client.ping()


@pytest.mark.parametrize("user", ["default", "lab"])
def test_a_password(user: str) -> None:
    with servers.valkey(user=user, password="s3cret") as server:
        with server.client() as client:
            assert client.acl_whoami() == user
        for login in ("", ":wrong@"):
            stranger = redis.Redis.from_url(f"redis://{login}{ports.HOST}:{server.port}")
            with stranger, pytest.raises((redis.AuthenticationError, redis.ResponseError)):
                stranger.ping()
        assert "s3cret" not in Path(f"/proc/{server.pid}/cmdline").read_text()


def test_two_servers_at_once_and_nothing_left() -> None:
    before = directories()
    with servers.valkey() as one, servers.valkey() as other:
        pids, ours = (one.pid, other.pid), directories() - before
        with one.client() as client, other.client() as another:
            client.set("x", "1")
            assert another.get("x") is None
        assert len(ours) >= 2
    assert all(states.gone(pid) for pid in pids) and not ours & directories()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((ports.HOST, one.port))


def test_a_killed_server_leaves_no_shared_memory(postgresql: servers.Postgresql) -> None:
    """It is in the server's own directory, and in a namespace of its own."""
    maps = Path(f"/proc/{postgresql.pid}/maps").read_text()
    assert "/dev/shm/PostgreSQL" not in maps and "/SYSV" in maps
    if os.geteuid() == 0:  # else user namespaces may be forbidden
        assert os.readlink(f"/proc/{postgresql.pid}/ns/ipc") != os.readlink("/proc/self/ns/ipc")


def test_what_fails_leaves_nothing() -> None:
    before = directories()
    with pytest.raises(AssertionError, match="ended"), servers.valkey(password="p q") as server:
        pytest.fail(f"{server} took a configuration that is wrong")  # three words, where one must be
    assert directories() == before


def start_and_wait(link: procs.Link) -> None:
    with servers.valkey() as server:
        link.say(server.pid)
        link.hear()


def test_a_server_dies_with_its_test() -> None:
    with procs.start(start_and_wait) as tests:
        pid = tests.hear()
        tests.kill()
        states.wait_until(lambda: states.gone(pid), "the server is gone as well")
    hygiene.remove_private_directories(tests.pid)  # as the watchdog of a run does


def test_it_is_up_soon() -> None:
    begun = time.monotonic()
    with servers.valkey():
        assert time.monotonic() - begun < delays.LONG / 4
