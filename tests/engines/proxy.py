"""A TCP proxy between client and server, whose faults a test switches at any time.

    with Proxy(server.port) as proxy:           # clients connect to proxy.port
        proxy.stall()                           # half-open: all that is sent is swallowed, and nothing is closed
        proxy.forward()                         # as it began

A switch is in force when its call returns: `forward`, `slow`, `stall` and `refuse`, one of them at a time. `cut`,
`lose_reply` and `turn_to` do something once, and leave the switch as it is. The proxy runs in a thread of the test;
nothing of it is left after the block. It sleeps only for the delay that it is asked for, and holds at most CHUNKS reads
a direction.
"""

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

from coheld.testing.support import delays
from engines import ports

CHUNK, CHUNKS = 65536, 64
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST

_sockets: WeakSet[socket.socket] = WeakSet()


def _forget() -> None:
    """In a forked child: a connection is closed, and a port refused, only when no process has it open any more."""
    for one in list(_sockets):
        one.close()


os.register_at_fork(after_in_child=_forget)


class ReplyLost(Exception):
    """Ends a connection whose reply is not to be delivered."""


@dataclass(eq=False)
class Connection:
    """One of a client, and the one to the server that goes with it."""

    client: socket.socket
    server: socket.socket
    stalled: bool = False  # for good: what was swallowed is missing
    loses: bool = False  # the next bytes of the server are the reply to lose
    reset: bool = False  # end it by RST

    def close(self) -> None:
        for one in (self.client, self.server):
            if self.reset:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            one.close()


class Proxy:
    """On a port of its own on loopback, to the port `target` there. All methods: from any thread of the test."""

    def __init__(self, target: int) -> None:
        self.lost = 0
        """How many replies lose_reply has lost."""
        self._target = target
        self._life = ExitStack()
        self._connections: dict[Connection, asyncio.Task[None]] = {}
        self._listener: socket.socket | None = None
        self._delay = 0.0
        self._healed = asyncio.Event()  # set unless stalled
        self._loses: bytes | None = None

    def __enter__(self) -> Self:
        self.port = self._life.enter_context(ports.reserved())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy on port {self.port}")
        self._thread.start()
        self.forward()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.refuse()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._life.close()

    # ---- switches ------------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Pass on. A connection that was stalled stays silent; that one of its ends is closed is told to the other."""
        self._do(self._switch())

    def slow(self, seconds: float) -> None:
        """Deliver whatever is read from now on this much later, in both directions, in order."""
        self._do(self._switch(delay=seconds))

    def stall(self) -> None:
        """Half-open: swallow what is sent, also on new connections, and tell neither end that the other has closed."""
        self._do(self._switch(stall=True))

    def refuse(self) -> None:
        """Reset all connections, and refuse new ones."""
        self._do(self._refuse())

    def turn_to(self, target: int) -> None:
        """New connections are to that port; those that there are stay."""
        self._target = target

    # ---- what happens once ---------------------------------------------------------------------------------

    def cut(self, *, reset: bool) -> None:
        """Close all connections, at both ends, by RST or by FIN. Returns when they are closed."""
        self._do(self._cut(reset))

    def lose_reply(self, request: bytes = b"") -> None:
        """Let the next request that has these bytes through, and close its connection by FIN instead of its reply.

        Returns when it is set; `lost` grows when it has happened: the server has done what it was asked for. The bytes
        must arrive in one read, as a small request does. A request is one of a connection that awaits no other reply.
        """
        self._do(self._lose(request))

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    # ---- in the thread -------------------------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(delays.LONG)

    async def _switch(self, delay: float = 0.0, stall: bool = False) -> None:
        self._accept_all()  # who has connected before the switch belongs to what was before it
        self._delay = delay
        if stall:
            self._healed.clear()
            for connection in self._connections:
                connection.stalled = True
        else:
            self._healed.set()
        if self._listener is None:
            self._listen()

    def _listen(self) -> None:
        self._listener = ports.open_socket()
        _sockets.add(self._listener)
        self._listener.setblocking(False)
        self._listener.bind((ports.HOST, self.port))
        self._listener.listen(1024)
        self._loop.add_reader(self._listener, self._accept_all)

    async def _refuse(self) -> None:
        self._accept_all()
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        await self._cut(reset=True)

    async def _cut(self, reset: bool) -> None:
        self._accept_all()
        for connection, task in self._connections.items():
            connection.reset = reset
            task.cancel()
        await asyncio.gather(*self._connections.values(), return_exceptions=True)

    async def _lose(self, request: bytes) -> None:
        self._loses = request

    def _accept_all(self) -> None:
        with suppress(BlockingIOError):
            while self._listener is not None:
                self._accept(self._listener.accept()[0])

    def _accept(self, client: socket.socket) -> None:
        client.setblocking(False)
        connection = Connection(client, socket.socket(), stalled=not self._healed.is_set())
        connection.server.setblocking(False)
        _sockets.update((client, connection.server))
        self._connections[connection] = task = self._loop.create_task(self._serve(connection))
        task.add_done_callback(lambda _: self._end(connection))  # a task cut before it began has no `finally`

    def _end(self, connection: Connection) -> None:
        connection.close()
        del self._connections[connection]

    async def _serve(self, connection: Connection) -> None:
        try:
            await self._pump_both(connection)
        except* OSError:  # one end was reset, or the server is not there
            connection.reset = True
        except* ReplyLost:
            self.lost += 1

    async def _pump_both(self, connection: Connection) -> None:
        client, server = connection.client, connection.server
        await self._loop.sock_connect(server, (ports.HOST, self._target))
        async with asyncio.TaskGroup() as group:
            for source, sink, look in ((client, server, self._look_at_request), (server, client, self._look_at_reply)):
                queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS)
                group.create_task(self._read(connection, source, queue, look))
                group.create_task(self._write(connection, queue, sink))

    async def _read(
        self,
        connection: Connection,
        source: socket.socket,
        queue: asyncio.Queue[tuple[float, bytes]],
        look: Callable[[Connection, bytes], bytes],
    ) -> None:
        data = b"-"
        while data:
            data = await self._loop.sock_recv(source, CHUNK)
            if not connection.stalled:
                data = look(connection, data)
                await queue.put((self._loop.time() + self._delay, data))
            elif not data:
                await queue.put((0, data))

    async def _write(
        self, connection: Connection, queue: asyncio.Queue[tuple[float, bytes]], sink: socket.socket
    ) -> None:
        data = b"-"
        while data:
            due, data = await queue.get()
            await asyncio.sleep(due - self._loop.time())
            if not connection.stalled:
                await self._loop.sock_sendall(sink, data)
        if connection.stalled:
            await self._healed.wait()
        sink.shutdown(socket.SHUT_WR)

    def _look_at_request(self, connection: Connection, data: bytes) -> bytes:
        if self._loses is not None and data and self._loses in data:
            self._loses, connection.loses = None, True
        return data

    def _look_at_reply(self, connection: Connection, data: bytes) -> bytes:
        if connection.loses and data:
            raise ReplyLost
        return data
