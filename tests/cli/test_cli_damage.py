"""ps, graph and top while what they look at is damaged, foreign, half made or on its way out: they show what they can,
take no lock, and change nothing."""

import asyncio
import fcntl
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from textual.pilot import Pilot

import coheld
from cli import commands
from coheld import Lockable, Semaphore
from coheld.cli import graph, picture, ps
from coheld.cli.screen import Top
from coheld.graph import graph_of
from coheld.history import COLUMNS, History
from coheld.mutex import remove
from coheld.process import start_of
from coheld.sight import see
from coheld.testing.support import delays, effort, procs, states
from shm import spoil

BACKENDS = ["shm:", "file:"]
HEAD = 1 << 16
"""Bytes; what is damaged of a file. What follows are slots that nobody has used."""
CELL = 4096


class Router(Lockable):
    @Lockable.locked
    def configure(self, link: procs.Link) -> None:
        link.say("in")
        link.wait_for("leave")

    @Lockable.locked(exclusive=False)
    def read(self, link: procs.Link) -> None:
        self.configure.__wrapped__(self, link)


def configure(link: procs.Link, name: str, backend: str) -> None:
    Router(lock_name=name, lock_backend=backend).configure(link)


def read(link: procs.Link, backend: str) -> None:
    Router(lock_name="read", lock_backend=backend).read(link)


def take(link: procs.Link, backend: str) -> None:
    with Semaphore(1, "gpus", backend):
        link.say("in")
        link.wait_for("leave")


@contextmanager
def lab(backend: str) -> Iterator[None]:
    """Every kind of file: three have something, two wait; all are stopped, and touch nothing while it is damaged."""
    with ExitStack() as stack:
        start = lambda *call: stack.enter_context(procs.start(*call))  # noqa: E731
        workers = [start(configure, "spoilt", backend), start(read, backend), start(take, backend)]
        for worker in workers:
            worker.expect("in")
        workers += [start(configure, "spoilt", backend), start(take, backend)]
        states.wait_until(lambda: sum(len(one.waiting) for one in coheld.resources()) == 2, "two wait")
        for worker in workers:
            worker.stop()
        try:
            yield
        finally:
            for worker in workers:
                worker.kill()


def look_in_all_ways() -> set[str | None]:
    """As the commands do, and with all that they print or draw."""
    found = coheld.resources()
    graphed, now, history = graph_of(found), time.monotonic(), History()
    graph.text(graphed, now), graph.mermaid(graphed, now), picture.svg(graphed, now)
    ps.lines_of(found), [ps.as_json(one) for one in found]
    for _ in range(2):
        history.add([see(one) for one in found])
    for column in COLUMNS:
        [row.sight.lines() for row in history.rows(column)]
    return {one.name for one in found}


def head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def state_of(directory: Path) -> dict[Path, object]:
    """All that a look could change."""
    found: dict[Path, object] = {}
    for path in directory.rglob("*"):
        told = path.lstat()
        head = head_of(path) if path.is_file() and not path.is_symlink() else b""
        found[path] = told.st_mtime_ns, told.st_size, told.st_ino, head
    return found


@contextmanager
def damaged(path: Path, rng: random.Random) -> Iterator[str]:
    """In place, so that it is the same file, and then whole again."""
    whole, size = head_of(path), path.stat().st_size
    data = bytearray(whole)
    ways = spoil.WAYS if len(data) >= CELL + spoil.CELL else [spoil.flip_some, spoil.noise, spoil.zero_some, spoil.cut]
    way = rng.choice(ways)
    way(rng, data, CELL)
    spoil.overwrite(path, 0, bytes(data))
    os.truncate(path, size + len(data) - len(whole))
    try:
        yield f"{path.name}, {way.__name__}"
    finally:
        spoil.overwrite(path, 0, whole)
        os.truncate(path, size)


@contextmanager
def no_lock_taken() -> Iterator[None]:
    def fail(*_: object) -> None:
        raise AssertionError("who looks takes no lock")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("flock", "lockf"):
            patch.setattr(fcntl, name, fail)
        patch.setattr(Lockable, "__init__", fail)
        yield


def files_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)


NAMES = {"spoilt", "read", "gpus"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_damage_of_all_kinds(backend: str, coheld_dir: Path, rng: random.Random) -> None:
    with lab(backend), no_lock_taken():
        paths = files_in(coheld_dir)
        assert {path.name.partition("-")[0] for path in paths} >= {"name", "waits"}
        assert look_in_all_ways() == NAMES
        for _ in range(effort.rounds(100)):
            with damaged(rng.choice(paths), rng) as what:
                before = state_of(coheld_dir)
                assert len(look_in_all_ways() & NAMES) >= 2, what
                assert state_of(coheld_dir) == before, what
        assert look_in_all_ways() == NAMES


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_screen_stays_alive(backend: str, coheld_dir: Path, rng: random.Random) -> None:
    async def watch(top: Top) -> None:
        async with top.run_test() as pilot:
            await until_shown(top, pilot, lambda: top.table.row_count == len(NAMES))
            for _ in range(effort.rounds(12)):
                with damaged(rng.choice(files_in(coheld_dir)), rng):
                    last = top.history.rows()[0].sight.when
                    await until_shown(top, pilot, lambda last=last: top.history.rows()[0].sight.when > last)
                    top.action_sort()
            await until_shown(top, pilot, lambda: top.table.row_count == len(NAMES))
            assert "cannot" not in str(top.status.render())

    with lab(backend), no_lock_taken():
        asyncio.run(watch(Top(every=delays.TICK)))


async def until_shown(top: Top, pilot: Pilot[int], true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + delays.LONG
    while not true():
        assert time.monotonic() < deadline, str(top.status.render())
        await pilot.pause(delays.TICK)  # without a time it waits until nobody works


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_half_made_or_foreign(backend: str, coheld_dir: Path) -> None:
    Router(lock_name="sound", lock_backend=backend)
    head = (coheld_dir / "name-sound").read_bytes()[:CELL]
    start = start_of(os.getpid())
    for name, content in {
        "name-empty": b"",
        "name-head": head,
        "name-text": b"not a lock\n" * 1000,
        ".new-1-2": head,
        "cells-x/chunk-0": b"\0" * CELL,
        f"waits-{os.getppid()}-{start_of(os.getppid())}": head[:100],
        f"waits-1-{start}": b"\xff" * 3 * CELL,
        "name-sound~4096.register": b"\xff" * CELL,
        "other": b"\0",
    }.items():
        (coheld_dir / name).parent.mkdir(exist_ok=True)
        (coheld_dir / name).write_bytes(content)
    (coheld_dir / "name-link").symlink_to("/etc/passwd")
    (coheld_dir / "arena-1-1-1").symlink_to("nowhere")
    (coheld_dir / "name-directory").mkdir()
    os.mkfifo(coheld_dir / "name-pipe")
    os.mkfifo(coheld_dir / f"waits-{os.getpid()}-{start}9")
    before = state_of(coheld_dir)
    with no_lock_taken():
        assert look_in_all_ways() == {"sound"}
    for arguments in (["ps"], ["ps", "sound"], ["ps", "--json", "--all"], ["graph"], ["graph", "--mermaid"]):
        done = commands.coheld(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
    assert state_of(coheld_dir) == before
    for path in coheld_dir.iterdir():
        if path.name != "name-sound":
            path.unlink() if not path.is_dir() or path.is_symlink() else shutil.rmtree(path)


def make_and_remove(link: procs.Link, backend: str) -> None:
    os.environ["COHELD_BACKEND"] = backend
    link.say("go")
    while True:
        with Router(lock_name="spoilt"), Semaphore(1, "gpus"):
            pass
        remove("spoilt", timeout=1)
        remove("gpus", timeout=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_comes_and_goes_meanwhile_is_there_or_not(backend: str) -> None:
    with procs.start(make_and_remove, backend) as other:
        other.expect("go")
        end, seen = time.monotonic() + delays.MEDIUM, set()
        while time.monotonic() < end:
            seen |= look_in_all_ways()
        other.kill()
    assert "spoilt" in seen and seen <= {"spoilt", "gpus"}
