"""Loopback ports that stay ours, over restarts of who listens there."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

HOST = "127.0.0.1"


@contextmanager
def reserved() -> Iterator[int]:
    """A port on loopback that nobody is given before the block is left, also while nobody listens there.

    A socket is bound to it, and never listens. Connections are refused then, the kernel gives the port to nobody that
    asks for any, and who sets SO_REUSEADDR may listen on it beside us.
    """
    with open_socket() as holder:
        holder.bind((HOST, 0))
        yield holder.getsockname()[1]


def open_socket() -> socket.socket:
    """One for TCP that may listen on a reserved port."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return made
