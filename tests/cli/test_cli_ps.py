"""coheld ps, and coheld.resources: what is there, who has it, and nothing changed by looking."""

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

import coheld
from cli import commands
from coheld import Lockable, Pool, Resource, Semaphore, native
from coheld.backends import survey
from coheld.testing.support import delays, procs, states

BACKENDS = ["shm:", "file:"]


class Router(Lockable):
    @Lockable.locked
    def configure(self, link: procs.Link) -> None:
        link.say("in")
        link.wait_for("leave")

    @Lockable.locked(exclusive=False)
    def read(self, link: procs.Link) -> None:
        link.say("in")
        link.wait_for("leave")


def hold(link: procs.Link, name: str, backend: str) -> None:
    Router(lock_name=name, lock_backend=backend).configure(link)


def call(link: procs.Link, method: Any) -> None:
    method(link)


def wait(link: procs.Link, router: Router) -> None:
    router.acquire()
    router.release()


def named(name: str) -> Resource:
    (found,) = [one for one in coheld.resources() if one.name == name]
    return found


def listed(*options: str) -> list[dict[str, Any]]:
    done = commands.coheld("ps", "--json", *options)
    assert done.returncode == 0 and not done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_has_a_named_lock_and_how_many_wait(backend: str) -> None:
    router = Router(lock_name="lab/r1", lock_backend=backend)
    with procs.start(hold, "lab/r1", backend) as holder:
        holder.expect("in")
        with procs.start(wait, router) as waiter:
            waiter.wait_until_blocked()
            (found,) = listed()
            assert (found["name"], found["kind"], found["backend"]) == ("lab/r1", "lock", backend.removesuffix(":"))
            assert found["holder"]["pid"] == holder.pid and found["holder"]["method"] == "Router.configure"
            assert 0 <= found["holder"]["held_seconds"] < delays.HANG and found["holder"]["depth"] == 1
            assert found["waiters"] == 1 and found["acquisitions"] == 1
            printed = commands.coheld("ps").stdout
            assert "lab/r1" in printed and f"{holder.pid} " in printed and "Router.configure" in printed
            holder.tell("leave")
            holder.end()
    (found,) = listed()
    assert found["holder"] is None and found["waiters"] == 0 and found["acquisitions"] == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_by_its_name_and_who_waits_for_it(backend: str) -> None:
    router, other = Router(lock_name="r1", lock_backend=backend), Router(lock_name="r2", lock_backend=backend)
    with procs.start(hold, "r1", backend) as holder, other:
        holder.expect("in")
        with procs.start(wait, router) as waiter:
            states.wait_until(lambda: named("r1").waiting, "it waits")
            lines = commands.coheld("ps", "r1").stdout.splitlines()
            assert lines[0] == f"'r1', a lock on {backend}" and len(lines) == 4
            assert lines[1] == "  taken 1 times, 0 had to wait, 0 deaths"
            assert lines[2].startswith(f"  held by process {holder.pid} (") and " in Router.configure for " in lines[2]
            assert lines[3].startswith(f"  waits: process {waiter.pid} (") and ", thread MainThread, for " in lines[3]
            (found,) = listed("r1")
            assert [one["pid"] for one in found["waiting"]] == [waiter.pid] and found["waiting"][0]["task_id"] is None
            holder.tell("leave")
            holder.end()


def hold_one_without_a_name(link: procs.Link) -> None:
    os.environ["COHELD_BACKEND"] = "file:"
    Router().configure(link)


def test_those_without_a_name_are_told_apart() -> None:
    with procs.start(hold_one_without_a_name) as one, procs.start(hold_one_without_a_name) as other:
        for worker in (one, other):
            worker.expect("in")
        found = {resource.called: resource.holder.pid for resource in coheld.resources() if resource.holder}
        assert sorted(found.values()) == sorted([one.pid, other.pid])
        printed = commands.coheld("ps").stdout
        for called, pid in found.items():
            assert called in printed
            assert [json.loads(commands.coheld("ps", "--json", called).stdout)["holder"]["pid"]] == [pid]
        for worker in (one, other):
            worker.tell("leave")


def test_a_directory_is_read_once_however_many_names_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    semaphores = [Semaphore(2, name=f"s{number}") for number in range(3)]
    read: list[str] = []

    def listed(directory: str) -> list[str]:
        read.append(directory)
        return os.listdir(directory)

    monkeypatch.setattr(survey, "_listed", listed)
    with semaphores[1]:
        assert [len(named(f"s{number}").inside) for number in range(3)] == [0, 1, 0]
    assert len(read) == 3  # one for each look


def test_a_name_that_nobody_has() -> None:
    for options in (["r1"], ["--json", "r1"]):
        done = commands.coheld("ps", *options)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "coheld: no resource named 'r1'\n")


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_says_what_the_lock_itself_says(backend: str) -> None:
    router = Router(lock_name="r1", lock_backend=backend)
    with procs.start(hold, "r1", backend) as dead:
        dead.expect("in")
        with procs.start(wait, router) as waiter:
            waiter.wait_until_blocked()
            dead.kill()
    with router, router:
        found, lock = named("r1"), native.lock_of(router)
        assert found.holder == coheld.holder(router)
        counted = found.acquisitions, found.contended, found.recoveries, found.waiters
        assert counted == tuple(lock._counters()) and found.recoveries == 1 and found.contended == 1


def test_a_killed_holder_has_nothing() -> None:
    with procs.start(hold, "r1", "shm:") as holder:
        holder.expect("in")
        holder.kill()
    assert named("r1").holder is None


def test_anonymous_locks_are_shown_while_somebody_has_them() -> None:
    router = Router()
    assert listed() == [] and len(listed("--all")) >= 1
    with procs.start(call, router.configure) as holder:
        holder.expect("in")
        (found,) = listed()
        assert found["name"] is None and found["holder"]["pid"] == holder.pid
        holder.tell("leave")


@pytest.mark.parametrize("backend", BACKENDS)
def test_readers_and_permits(backend: str) -> None:
    router, gpus = Router(lock_name="r1", lock_backend=backend), Semaphore(3, "gpus", backend)
    with procs.start(call, router.read) as reader, gpus:
        reader.expect("in")
        assert named("r1").inside == {reader.pid: 1} and named("r1").busy
        found = named("gpus")
        assert (found.kind, found.permits, found.inside) == ("semaphore", 3, {os.getpid(): 1})
        printed = commands.coheld("ps").stdout
        assert f"1 readers: {reader.pid}" in printed and f"1 of 3 permits: {os.getpid()}" in printed
        reader.tell("leave")
        reader.end()
    assert not named("r1").inside and not named("gpus").inside


def lease_until_told(link: procs.Link, pool: Pool) -> None:
    with pool.lease():
        link.say("has it")
        link.wait_for("leave")


@pytest.mark.parametrize("backend", BACKENDS)
def test_leases_of_a_pool(backend: str, monkeypatch: pytest.MonkeyPatch, coheld_dir: Path) -> None:
    monkeypatch.setenv("COHELD_BACKEND", backend)
    pool = Pool(["a", "b"], "gpus")
    with pool.lease(), procs.start(lease_until_told, pool) as other:
        other.expect("has it")
        found = named("gpus")
        assert (found.kind, found.inside) == ("pool", {os.getpid(): 1, other.pid: 1}) and found.busy
        printed = commands.coheld("ps").stdout
        assert "2 leases: " in printed and str(other.pid) in printed
        assert "1 leases: process" in commands.coheld("ps", "gpus").stdout
        assert listed()[0]["kind"] == "pool" and "has 1 lease" in commands.coheld("graph").stdout
        with procs.start(lease_until_told, pool) as waiter:
            states.wait_until(lambda: [one.pid for one in named("gpus").waiting] == [waiter.pid], "it waits")
            states.wait_until(lambda: "for a lease" in commands.coheld("graph").stdout, "its place in the graph")
            waiter.kill()
        other.kill()
        states.wait_until(lambda: states.gone(other.pid), "its end")
        assert named("gpus").inside == {os.getpid(): 1}
    found = named("gpus")
    assert (found.kind, found.inside, found.holder) == ("pool", {}, None)
    for state in coheld_dir.glob("name-gpus~*"):  # which no look relies on
        whole, cut = state.read_bytes(), 512
        for damaged in (b"", whole[:100], whole[:cut], whole[:cut].ljust(len(whole), b"\xc1"), whole[::-1]):
            state.unlink()  # the old one stays mapped
            state.write_bytes(damaged)
            assert named("gpus").inside == {}


def test_a_stopped_holder_stops_nobody_who_looks() -> None:
    with procs.start(hold, "r1", "shm:") as holder:
        holder.expect("in")
        holder.stop()
        assert named("r1").holder is not None
        holder.cont()
        holder.tell("leave")


def test_without_any_it_says_so_and_makes_nothing(coheld_dir: Path) -> None:
    assert commands.coheld("ps").stdout == "no resources\n" and listed() == []
    assert list(coheld_dir.iterdir()) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_damaged_is_passed_over_and_nothing_is_changed(
    backend: str, coheld_dir: Path, rng: random.Random
) -> None:
    for name in ("sound", "spoilt"):
        Router(lock_name=name, lock_backend=backend)
    path = coheld_dir / "name-spoilt"
    whole = path.read_bytes()
    strange = [coheld_dir / f"name-{what}" for what in ("link", "pipe", "directory")]
    strange[0].symlink_to("/etc/passwd")
    os.mkfifo(strange[1])
    strange[2].mkdir()
    for _ in range(200):
        raw = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randrange(1, 40)):
            if raw:
                raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw)
        before = {one: (one.lstat().st_mtime_ns, one.lstat().st_size) for one in coheld_dir.iterdir()}
        assert "sound" in [one.name for one in coheld.resources()]
        assert {one: (one.lstat().st_mtime_ns, one.lstat().st_size) for one in coheld_dir.iterdir()} == before
    for one in strange[:2]:
        one.unlink()
    strange[2].rmdir()


def make_and_remove(link: procs.Link, backend: str) -> None:
    from coheld.mutex import remove

    os.environ["COHELD_BACKEND"] = backend
    link.say("go")
    while True:
        Router(lock_name="r1").acquire()
        Router(lock_name="r1").release()
        remove("r1", timeout=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_comes_and_goes_meanwhile_is_there_or_not(backend: str) -> None:
    with procs.start(make_and_remove, backend) as other:
        other.expect("go")
        end, seen = time.monotonic() + delays.MEDIUM, set()
        while time.monotonic() < end:
            seen |= {one.name for one in coheld.resources()}
        other.kill()
    assert seen <= {"r1"}


def test_the_table_shows_the_busiest_and_how_many_more_there_are() -> None:
    kept = [Lockable(lock_name=f"n{number:02}") for number in range(45)]
    with kept[44]:
        lines = commands.coheld("ps").stdout.splitlines()
    assert lines[1].startswith("n44") and len(lines) == 42 and lines[-1] == "and 5 more: coheld ps --json"
    assert len(listed()) == 45


OF_CLASSES = """
import json, os, coheld

class Bed(coheld.Lockable): pass
class Odd(coheld.Lockable): __module__ = ["no", "name"]
class Gpu(coheld.Lockable): pass

kept = [Bed(), Gpu(), Odd(), Bed()]
gone = [type(f"C{number}", (coheld.Lockable,), {})() for number in range(60)]
print(json.dumps(sorted(
    one.class_name for one in coheld.resources() if one.acquisitions == 0 and one.class_name)))
del gone
again = [Bed() for _ in range(60)]
print(json.dumps(sorted(one.class_name for one in coheld.resources() if one.class_name)))
with kept[1], again[0]:
    print(*(one.label for one in coheld.resources() if one.holder), sep="\\n", flush=True)
    from coheld.cli import main
    main(["ps"])
    main(["ps", "--json"])
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_locks_without_a_name_have_their_class(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COHELD_BACKEND", backend)
    many, again, *labels = procs.run(OF_CLASSES).splitlines()
    classes = json.loads(many)
    assert classes.count("__main__.Bed") == 2 and classes.count("__main__.Gpu") == 1
    assert len(classes) < 62, "a file has room for 56"
    assert {f"__main__.C{number}" for number in range(54)} <= set(classes) >= set(json.loads(again))
    assert json.loads(again).count("__main__.Bed") >= 60
    for name in ("__main__.Bed", "__main__.Gpu"):
        assert any(line.startswith("anonymous lock ") and line.endswith(f" of {name}") for line in labels)
        assert any(line.startswith(f"{name} (") for line in labels), "in the table"
        assert any(f'"class": "{name}"' in line for line in labels), "and for programs"


def test_a_damaged_page_of_classes_is_passed_over(rng: random.Random) -> None:
    router = Router()
    path, _, _ = coheld.resources()[0].place.rpartition(":")
    with open(path, "r+b") as file:
        file.seek(512)
        file.write(rng.randbytes(4096 - 512))
    with router:
        (found,) = [one for one in coheld.resources() if one.holder]
        assert found.called in commands.coheld("ps").stdout
        assert found.label.isprintable()
    assert Router() is not None


def test_a_class_is_shown_in_one_line_and_with_nothing_that_a_terminal_obeys() -> None:
    odd = type("Odd\x1b[2J\nRouter", (coheld.Lockable,), {})()
    (found,) = coheld.resources()
    assert found.class_name.endswith(".Odd [2J Router") and found.label.endswith(f" of {found.class_name}")
    with odd:
        assert ".Odd [2J Router\n" in commands.coheld("graph").stdout
