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
from coheld import Lockable, shared
from coheld.backends import engine, files, renewing
from coheld.cli import exits
from coheld.graph import graph_of
from coheld.inspecting import called
from coheld.sight import see
from coheld.testing.support import procs, states
from engines import servers


class Bed(Lockable):
    bookings: int = shared(0)

    @Lockable.locked
    def book(self) -> None:
        self.bookings += 1

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


def test_another_hosts_state_and_holder_are_shown(there: Any, where: str) -> None:
    name = "lab/bed-1"
    for arguments in (("show", name), ("ps", name)):
        assert command(*arguments).returncode == exits.NO_SUCH_RESOURCE
    with there() as worker:
        worker.expect("used")
        assert not coheld.resources()
        shown = command("show", name).stdout
        assert f"{name} at {where}: token " in shown and f"held by process {worker.pid} on lab-2, thread" in shown
        assert "bookings" not in shown  # nothing was committed
        assert f"held by process {worker.pid} on lab-2, thread MainThread in Bed.use" in command("ps", name).stdout
        [one] = [json.loads(line) for line in command("ps", "--json", name).stdout.splitlines()]
        assert (one["holder"]["pid"], one["holder"]["host"], one["holder"]["command"]) == (worker.pid, "lab-2", "")
        assert (one["name"], one["store"], one["backend"], one["waiters"]) == (name, where, "redis", 0)
        assert not coheld.resources() and os.listdir(files.lock_directory()) == []
        worker.tell("end")
        assert worker.result() is None
    Bed(lock_name=name).book()
    shown = json.loads(command("show", "--json", name).stdout)
    assert shown["fields"] == {"bookings": {"type": "int", "value": 1}} and shown["holder"] is None
    assert (shown["store"], shown["commits"]) == (where, None) and shown["token"] > 0


def test_who_has_it_is_told_beside_who_wants_it_here(there: Any) -> None:
    with there() as holder:
        holder.expect("used")
        with procs.start(want) as waiter:
            states.wait_until(lambda: [one for one in coheld.resources() if one.waiting], "one of this host waits")
            [one] = called("lab/bed-1")
            assert one.holder is not None and (one.holder.pid, one.holder.host) == (holder.pid, "lab-2")
            assert [found.pid for found in one.waiting] == [waiter.pid]
            assert "nobody of this host has it" in command("ps", "--stack", "lab/bed-1").stdout
            holder.tell("end")
            waiter.expect("had")
            assert waiter.result() is None and holder.result() is None


def test_a_long_name_is_found_by_the_whole_of_it() -> None:
    name = "b" * 255
    with Lockable(lock_name=name):
        [one] = called(name)
        assert one.name == name and one.holder is not None and one.holder.pid == os.getpid()


def test_what_cannot_be_asked_is_said_and_this_host_is_shown_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COHELD_BACKEND", "redis://lab:SECRET@127.0.0.1:1/0")
    for arguments in (("show", "x"), ("ps", "x"), ("rm", "x")):
        done = command(*arguments)
        assert done.returncode == exits.FAILED
        assert "redis://127.0.0.1:1/0 cannot be reached" in done.stderr and "SECRET" not in done.stderr
    assert command("ps").stdout == "no resources\n"


def test_a_state_that_is_none_is_said_to_be_damaged(valkey: servers.Valkey) -> None:
    Bed(lock_name="bed").book()
    with valkey.client() as client:
        client.hset("coheld:{bed}", "s", b"\x91\xc0")
    done = command("show", "bed")
    assert done.returncode == exits.FAILED and "the state of 'bed' is damaged" in done.stderr


@pytest.mark.parametrize("name", ["", "\udcff", "x" * 300])
def test_what_cannot_be_a_name_is_not_asked_for(name: str) -> None:
    assert called(name) == []
