"""A server that came back without its last writes, as after a fail-over: what it has is what all have from then on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coheld import LeaseLostError, Lockable, shared
from coheld.backends import engine, renewing
from engines import servers


class Counter(Lockable):
    n: int = shared(0)

    def __init__(self, url: str) -> None:
        super().__init__(lock_name="counter", lock_backend=url)

    @Lockable.locked
    def add(self, number: int) -> int:
        self.n += number
        return self.n


ELSEWHERE = "import sys; from engines.test_lost_writes import Counter; print(Counter(sys.argv[1]).add(100))"


def added_elsewhere(url: str, directory: Path) -> int:
    """By a process that shares nothing with this one but the server, as one on another host."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "COHELD_DIR": str(directory), "PYTHONPATH": str(tests)}
    command = [sys.executable, "-c", ELSEWHERE, url]
    return int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


@pytest.fixture(autouse=True)
def _end_threads() -> Iterator[None]:
    yield
    renewing.end()
    engine.close()


def test_no_host_takes_its_copy_for_a_state_of_the_same_number(valkey: servers.Valkey, tmp_path: Path) -> None:
    counter = Counter(valkey.url())
    with valkey.client() as client:
        counter.add(1)
        saved: Any = client.dump("coheld:{counter}")
        assert counter.add(1) == counter.n == 2
        client.restore("coheld:{counter}", 0, saved, replace=True)
    assert added_elsewhere(valkey.url(), tmp_path) == 101
    assert counter.n == 101
    assert counter.add(0) == 101


def test_who_had_it_meanwhile_is_refused_and_what_is_left_is_read(valkey: servers.Valkey) -> None:
    counter = Counter(valkey.url())
    with valkey.client() as client:
        counter.add(1)
        saved: Any = client.dump("coheld:{counter}")
        counter.acquire()
        counter.n += 1
        client.restore("coheld:{counter}", 0, saved, replace=True)
    with pytest.raises(LeaseLostError):
        counter.release()
    assert counter.n == counter.add(0) == 1
