"""The example of docs/howto/leases.md for prefork servers, in a real gunicorn whose workers are killed."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

from coheld.testing.support import delays

PAGE = Path(__file__).resolve().parents[1] / "docs/howto/leases.md"
SLOW = """

def infer(gpu, path):
    import os, time
    with open("inside", "x"):
        if path == "/die":
            os.kill(os.getpid(), 9)
        time.sleep(0.005)
    os.unlink("inside")
    return f"{path} by {gpu}".encode()
"""


def app() -> str:
    """As the page has it, with work that cannot overlap unseen."""
    found = re.search(r"<!-- file: app.py -->\n```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1] + SLOW


@contextmanager
def server(directory: Path) -> Iterator[int]:
    """Its port. All its processes are gone at the end."""
    (directory / "app.py").write_text(app())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        port = int(listener.getsockname()[1])
        command = [sys.executable, "-m", "gunicorn", "--workers", "3", "--bind", f"fd://{listener.fileno()}"]
        command += ["--no-control-socket"] if _has_control_socket() else []
        with open(directory / "log", "wb") as log:
            master = subprocess.Popen(
                [*command, "app:application"], cwd=directory, pass_fds=[listener.fileno()], stdout=log, stderr=log
            )
        try:
            yield port
        finally:
            master.send_signal(signal.SIGTERM)
            assert master.wait(delays.LONG) == 0, (directory / "log").read_text()


def _has_control_socket() -> bool:
    help_text = subprocess.run([sys.executable, "-m", "gunicorn", "--help"], capture_output=True, text=True, check=True)
    return "--no-control-socket" in help_text.stdout


def get(port: int, path: str) -> str:
    connection = HTTPConnection("127.0.0.1", port, timeout=delays.LONG)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return f"{answer.status} {answer.read().decode()}"
    finally:
        connection.close()


@pytest.mark.source_tree
def test_one_slot_between_the_workers_of_gunicorn(tmp_path: Path) -> None:
    with server(tmp_path) as port, ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda number: get(port, f"/{number}"), range(40)))
        assert answers == [f"200 /{number} by cuda:0" for number in range(40)]
        with pytest.raises(ConnectionError):
            get(port, "/die")  # the worker that has the slot is gone
        (tmp_path / "inside").unlink()
        answers = list(clients.map(lambda number: get(port, f"/{number}"), range(40)))
        assert answers == [f"200 /{number} by cuda:0" for number in range(40)]
