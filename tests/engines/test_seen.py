"""What one sees of a lock that a server has: what users call it, and who of this host has it or wants it."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import coheld
from cli.commands import coheld as command
from coheld import Lockable
from coheld.backends import engine, files, renewing
from coheld.graph import graph_of
from coheld.sight import see
from coheld.testing.support import procs, states
from engines import servers


class Bed(Lockable):
    @Lockable.locked
    def use(self, link: procs.Link) -> None:
        link.say("used")
        link.wait_for("end")


def use(link: procs.Link, name: str = "lab/bed-1") -> None:
    Bed(lock_name=name).use(link)


def use_on_another_host(link: procs.Link, directory: Path, name: str = "lab/bed-1") -> None:
    os.environ["COHELD_DIR"] = str(directory)
    socket.gethostname = lambda: "lab-2"
    use(link, name)


@pytest.fixture(autouse=True)
def where(valkey: servers.Valkey, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of the server, as listings have it."""
    monkeypatch.setenv("COHELD_BACKEND", f"{valkey.url()}?lease=5")
    yield valkey.url()
    renewing.end()
    engine.close()


@pytest.fixture
def there(tmp_path: Path) -> Callable[..., Any]:
    """Starts one who has it on another host."""
    return lambda *more: procs.start(use_on_another_host, tmp_path, *more, method="spawn")


def of_this_host() -> coheld.Resource:
    [found] = coheld.resources()
    return found


def test_it_is_called_what_users_call_it(where: str) -> None:
    with procs.start(use) as worker:
        worker.expect("used")
        one = of_this_host()
        assert (one.name, one.store, one.backend, one.kind) == ("lab/bed-1", where, "redis", "lock")
        assert one.label == f"'lab/bed-1' at {where}" and one.called == see(one).name == f"lab/bed-1 at {where}"
        assert one.holder is not None and (one.holder.pid, one.holder.method) == (worker.pid, "Bed.use")
        assert see(one).lines()[0] == f"'lab/bed-1' at {where}, a lock on redis:"
        for name in (one.name, one.called):
            assert f"held by process {worker.pid}" in command("ps", name).stdout
        [shown] = map(json.loads, command("ps", "--json").stdout.splitlines())
        assert (shown["name"], shown["store"], shown["holder"]["pid"]) == ("lab/bed-1", where, worker.pid)
        assert f"'lab/bed-1' at {where}" in command("graph").stdout
        worker.tell("end")


@pytest.mark.parametrize("name", ["b" * 255, "\N{BED}" * 63, "shm"])
def test_a_name_of_any_length_is_one_lock(name: str, where: str) -> None:
    with Lockable(lock_name=name), Lockable(lock_name=f"{name[:-1]}x"):
        found = [one for one in coheld.resources() if one.holder]
        assert len(found) == 2 and all(one.store == where for one in found)
        shown = [one.name for one in found]
        assert name in shown or all(name.startswith(str(one).partition("=")[0]) for one in shown)


@pytest.mark.parametrize("name", ["redis://127.0.0.1:6379/0/x", "x at redis://127.0.0.1:6379/0"])
def test_a_name_that_looks_like_one_of_a_server_is_local(name: str) -> None:
    with Lockable(lock_name=name, lock_backend="shm:"):
        one = of_this_host()
    assert (one.name, one.store, one.backend) == (name, "", "shm")
    assert files.where_and_name(files.name_there("redis://h:1/0", name)) == ("redis://h:1/0", name)


def want(link: procs.Link) -> None:
    with Lockable(lock_name="lab/bed-1"):
        link.say("had")


def test_who_waits_for_another_host_does_not_hold_it(there: Any) -> None:
    with there() as holder:
        holder.expect("used")
        with procs.start(want) as waiter:
            states.wait_until(lambda: [one for one in coheld.resources() if one.waiting], "one of this host waits")
            one = of_this_host()
            assert one.holder is None and one.waiters == 1
            [found] = one.waiting
            assert (found.pid, found.waits_for) == (waiter.pid, "store") and "MainThread, for the store, for " in str(
                found
            )
            assert coheld.waiters(Bed(lock_name="lab/bed-1")) == [found]
            [edge] = graph_of([one]).edges
            assert (edge.holds, edge.what) == (False, "store") and "waits for the store" in edge.told(found.since)
            holder.tell("end")
            waiter.expect("had")
            assert waiter.result() is None and holder.result() is None
