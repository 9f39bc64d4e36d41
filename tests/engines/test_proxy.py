"""The proxy between clients and servers: each switch does what it says, and nothing is left of it."""

import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from coheld.testing.support import delays, procs, states
from engines import ports, servers
from engines.proxy import Proxy


class Echo(socketserver.BaseRequestHandler):
    """Says in capitals what it hears; what it has heard, and how connections ended, is on record."""

    def handle(self) -> None:
        try:
            while data := self.request.recv(65536):
                self.server.heard += data
                self.request.sendall(data.upper())
            self.server.ends.append("FIN")
        except ConnectionResetError:
            self.server.ends.append("RST")


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = False
    request_queue_size = 128

    def __init__(self) -> None:
        self.heard = b""
        self.ends: list[str] = []
        super().__init__((ports.HOST, 0), Echo)

    def handle_error(self, request: object, client_address: object) -> None:
        raise AssertionError


@contextmanager
def echo() -> Iterator[tuple[Server, Proxy]]:
    """A server, and the proxy before it."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(delays.TICK,))
        thread.start()
        try:
            with Proxy(server.server_address[1]) as proxy:
                yield server, proxy
        finally:
            server.shutdown()
            thread.join()


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection((ports.HOST, proxy.port), delays.LONG)


def ask(client: socket.socket, text: bytes) -> bytes:
    client.sendall(text)
    return hear(client, len(text))


def hear(client: socket.socket, size: int) -> bytes:
    heard = b""
    while len(heard) < size and (data := client.recv(size - len(heard))):
        heard += data
    return heard


def assert_silent(client: socket.socket) -> None:
    client.settimeout(delays.SHORT)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.settimeout(delays.LONG)


def ended(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_it_passes_on_both_ways_and_both_ends() -> None:
    with echo() as (server, proxy), connect(proxy) as client:
        assert ask(client, b"hello") == b"HELLO"
        much = os.urandom(1 << 20).replace(b"\n", b" ")
        sender = threading.Thread(target=client.sendall, args=(much,))
        sender.start()
        assert hear(client, len(much)) == much.upper()
        sender.join()
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        states.wait_until(lambda: server.ends == ["FIN"] and not proxy.connections, "the server hears of the end")


def test_refused() -> None:
    with echo() as (server, proxy), connect(proxy) as client:
        assert ask(client, b"x") == b"X"
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        states.wait_until(lambda: server.ends == ["RST"], "the server is cut off, too")
        proxy.forward()
        with connect(proxy) as again:
            assert ask(again, b"y") == b"Y"


@pytest.mark.parametrize("reset", [False, True])
def test_cut(reset: bool) -> None:
    with echo() as (server, proxy), connect(proxy) as client, connect(proxy) as other:
        assert ask(client, b"x") == ask(other, b"x") == b"X"
        with connect(proxy) as newest:
            proxy.cut(reset=reset)
            assert ended(newest)
        for one in (client, other):
            if reset:
                with pytest.raises(ConnectionResetError):
                    one.recv(1)
            else:
                assert one.recv(1) == b""
        end = "RST" if reset else "FIN"
        states.wait_until(lambda: server.ends[:2] == [end] * 2, "the server is cut off, too")
        with connect(proxy) as again:
            assert ask(again, b"y") == b"Y"


def test_stalled_is_half_open() -> None:
    with echo() as (server, proxy), connect(proxy) as client, connect(proxy) as leaving:
        assert ask(client, b"x") == ask(leaving, b"x") == b"X"
        proxy.stall()
        client.sendall(b"swallowed")
        leaving.close()
        with connect(proxy) as late:
            late.sendall(b"swallowed, too")
            assert_silent(client)
            assert_silent(late)
            assert server.heard == b"xx" and not server.ends
            proxy.forward()
            states.wait_until(lambda: server.ends == ["FIN"], "the server hears of the one that is closed")
            client.sendall(b"more")
            assert_silent(client)  # what is missing stays missing
            with connect(proxy) as again:
                assert ask(again, b"y") == b"Y"
            assert server.heard == b"xxy"
            proxy.cut(reset=False)
            assert client.recv(1) == late.recv(1) == b""


def test_slow_each_way_and_in_order() -> None:
    with echo() as (_, proxy), connect(proxy) as client:
        proxy.slow(delays.SHORT)
        begun = time.monotonic()
        client.sendall(b"one ")
        assert ask(client, b"two") == b"ONE TWO"[:3] and hear(client, 4) == b" TWO"
        assert 2 * delays.SHORT <= time.monotonic() - begun < delays.LONG
        client.sendall(b"three")
        proxy.forward()
        client.sendall(b"four")
        assert hear(client, 9) == b"THREEFOUR"


def test_a_reply_is_lost_once() -> None:
    with echo() as (server, proxy), connect(proxy) as client, connect(proxy) as other:
        proxy.lose_reply(b"commit")
        assert ask(client, b"acquire") == b"ACQUIRE" and proxy.lost == 0
        assert ask(client, b"commit 1") == b""
        assert server.heard.endswith(b"commit 1") and proxy.lost == 1
        assert ask(other, b"commit 2") == b"COMMIT 2"
        proxy.lose_reply()
        assert ask(other, b"anything") == b"" and proxy.lost == 2


def test_a_server_that_is_not_there_and_one_that_comes_back() -> None:
    with servers.valkey() as server, Proxy(server.port) as proxy:
        server.kill()
        with pytest.raises(ConnectionResetError), connect(proxy) as client:  # connecting may come to see it, too
            client.recv(1)
        server.start()
        with connect(proxy) as client:
            assert ask(client, b"PING\r\n") == b"+PONG\r"
        states.wait_until(lambda: not proxy.connections, "all connections are closed")


def test_a_lost_reply_of_a_server_whose_data_has_changed(valkey: servers.Valkey) -> None:
    with Proxy(valkey.port) as proxy, connect(proxy) as client, valkey.client() as direct:
        proxy.lose_reply(b"INCR")
        assert ask(client, b"INCR x\r\n") == b""
        assert direct.get("x") == b"1"


def wait_for_end(link: procs.Link) -> None:
    link.say("forked")
    link.wait_for("end")


def test_a_forked_child_keeps_nothing_open() -> None:
    with echo() as (_, proxy), connect(proxy) as client, connect(proxy) as other:
        assert ask(client, b"x") == ask(other, b"x") == b"X"
        with procs.start(wait_for_end, method="fork") as child:
            child.expect("forked")
            proxy.cut(reset=True)
            for one in (client, other):
                with pytest.raises(ConnectionResetError):
                    one.recv(1)
            proxy.refuse()
            with pytest.raises(ConnectionRefusedError):
                connect(proxy)
            child.tell("end")


def test_nothing_is_left() -> None:
    descriptors = set(os.listdir("/proc/self/fd"))
    with echo() as (_, proxy), connect(proxy) as client:
        assert ask(client, b"x") == b"X"
        proxy.stall()
    assert set(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)


def test_it_ends_with_a_slow_delivery_under_way() -> None:
    with echo() as (server, proxy):
        proxy.slow(delays.HANG)
        with closing(connect(proxy)) as client:
            client.sendall(b"x")
            states.wait_until(lambda: proxy.connections, "the proxy has the connection")
    assert server.heard == b""
