"""What a host has of a state that is on a server: its copy, and the values that its processes have seen of it.

This process is one host, and beside it are others, each a process with a COHELD_DIR of its own.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coheld import native
from coheld.backends import engine, renewing
from coheld.testing.support import procs
from engines import hosts, servers
from engines.hosts import LEASE, Counter, Host


@pytest.fixture(autouse=True)
def _end_threads() -> Iterator[None]:
    yield
    renewing.end()
    engine.close()


def host(link: procs.Link, directory: Path, url: str) -> None:
    """Calls what it is told, with the URL, and says what came of it."""
    os.environ["COHELD_DIR"] = str(directory)
    link.say("ready")
    while True:
        act, *args = link.hear()
        link.say(act(url, *args))


@pytest.fixture
def other(valkey: servers.Valkey, tmp_path: Path) -> Iterator[Host]:
    """It is there before this process has used a lock: what is forked later is of this host."""
    with hosts.starting(tmp_path, host) as start:
        yield start(valkey.url())


@pytest.fixture
def url(valkey: servers.Valkey) -> str:
    return f"{valkey.url()}?lease={LEASE}"


def counter(url: str) -> Counter:
    return Counter(lock_name="counter", lock_backend=url)


def add(url: str) -> int:
    return counter(url).add()


# ---- values that a process has seen ----------------------------------------------------------------------------


def test_an_interrupt_while_the_state_is_taken_in_leaves_no_old_value(
    other: Host, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the copy is new, and the values are not looked at yet."""
    mine = counter(url)
    assert [mine.add(), mine.add(), other.do(add)] == [1, 2, 3]
    kind: Any = type(native.lock_of(mine).view.inside_file)

    def interrupt(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "confirm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mine.add()
    assert [mine.add(), other.do(add)] == [4, 5]
