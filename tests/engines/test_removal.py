"""A name that is removed goes from the server, for all hosts; who waits for it there has it anew at once."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coheld import Lockable, LockTimeout, shared
from coheld.backends import engine, renewing
from coheld.mutex import remove
from coheld.testing.support import delays, procs, states
from engines import servers


class Bed(Lockable):
    notes: list[str] = shared(default_factory=list)

    @Lockable.locked
    def note(self, text: str) -> list[str]:
        self.notes.append(text)
        return list(self.notes)


def on_another_host(link: procs.Link, directory: Path, url: str) -> list[str]:
    os.environ |= {"COHELD_DIR": str(directory), "COHELD_BACKEND": url}
    bed = Bed(lock_name="bed")
    link.say(bed.notes)
    link.wait_for("go")
    return bed.note("there")


@pytest.fixture
def url(valkey: servers.Valkey, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("COHELD_BACKEND", valkey.url())
    yield valkey.url()
    renewing.end()
    engine.close()


def test_nothing_of_it_is_left_there(valkey: servers.Valkey, url: str) -> None:
    Bed(lock_name="bed").note("here")
    with valkey.client() as client:
        assert client.keys("coheld:*")
        assert remove("bed") is True and remove("bed") is False
        assert not client.keys("coheld:*")


def test_one_that_only_other_hosts_have_is_removed_too(valkey: servers.Valkey, url: str, tmp_path: Path) -> None:
    with procs.start(on_another_host, tmp_path, url, method="spawn") as there:
        there.expect([])
        there.tell("go")
        assert there.result() == ["there"]
    with valkey.client() as client:
        assert remove("bed") is True and not client.keys("coheld:*")


def test_who_waits_on_another_host_has_it_anew_at_once(valkey: servers.Valkey, url: str, tmp_path: Path) -> None:
    bed = Bed(lock_name="bed")
    bed.note("here")
    with procs.start(on_another_host, tmp_path, url, method="spawn") as there, valkey.client() as client:
        there.expect(["here"])
        with bed:
            with pytest.raises(LockTimeout):
                remove("bed")
            there.tell("go")
            states.wait_until(lambda: client.exists("coheld:{bed}:waiting"), "it waits at the server")
            since = time.monotonic()
            bed.__lock__.away.remove()  # which is what remove() does, under the lock
            assert there.result() == ["there"]
            assert time.monotonic() - since < 5 * delays.SCALE  # a lease has ten seconds
