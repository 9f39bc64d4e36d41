"""The TLS end before a server: what is encrypted comes in, and goes on in the clear, as stunnel does it.

with tls.end(server.port) as end:
    end.port                    # of 127.0.0.1, for rediss://
    end.authority               # a file with the certificate of who has signed its own
    end.accepted                # how many connections have got through the handshake
"""

import asyncio
import socket
import ssl
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import trustme

from coheld.testing.support import delays, hygiene
from engines import ports


class End:
    """In a thread of the test; `end` makes it."""

    def __init__(self, target: int, directory: Path, name: str) -> None:
        self.accepted = 0
        self._target = target
        authority = trustme.CA()
        self.authority = directory / "authority.pem"
        authority.cert_pem.write_to_path(self.authority)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(self._context)
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[asyncio.Task[None], socket.socket] = {}

    async def begin(self, port: int) -> None:
        self.port = port
        self._listener = ports.open_socket()
        self._listener.setblocking(False)
        self._listener.bind((ports.HOST, port))
        self._listener.listen(128)
        self._loop.add_reader(self._listener, self._accept_all)

    async def finish(self) -> None:
        self._accept_all()  # who has connected meanwhile would be left to the collector
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept_all(self) -> None:
        with suppress(BlockingIOError):
            while True:
                client, _ = self._listener.accept()
                client.setblocking(False)
                task = self._loop.create_task(self._serve(client))
                self._tasks[task] = client
                task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        """One that was cancelled before it began has closed nothing."""
        self._tasks.pop(task).close()

    async def _serve(self, client: socket.socket) -> None:
        with socket.socket() as server, suppress(OSError):  # an SSLError is one
            server.setblocking(False)
            await self._loop.sock_connect(server, (ports.HOST, self._target))
            outside = await self._streams(client, self._context)
            self.accepted += 1
            inside = await self._streams(server, None)
            try:
                await asyncio.gather(_pump(outside[0], inside[1]), _pump(inside[0], outside[1]))
            finally:
                for _, writer in (outside, inside):
                    writer.transport.abort()

    async def _streams(
        self, one: socket.socket, context: ssl.SSLContext | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Of a socket that stays its caller's to close: nothing of it is left to the end of the loop."""
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, one, ssl=context)
        return reader, asyncio.StreamWriter(transport, protocol, reader, self._loop)


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        sink.write(data)
        await sink.drain()
    sink.close()


@contextmanager
def end(target: int, name: str = ports.HOST) -> Iterator[End]:
    """Before the port `target` of loopback, with a certificate for that name, by an authority of its own."""
    with ports.reserved() as port, hygiene.private_directory() as directory:
        made = End(target, directory, name)
        thread = threading.Thread(target=made._loop.run_forever, name=f"TLS on port {port}")
        thread.start()

        def do(work: Coroutine[Any, Any, None]) -> None:
            asyncio.run_coroutine_threadsafe(work, made._loop).result(delays.LONG)

        try:
            do(made.begin(port))
            yield made
        finally:
            do(made.finish())
            made._loop.call_soon_threadsafe(made._loop.stop)
            thread.join()
            made._loop.close()
