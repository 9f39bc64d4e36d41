"""Names: what may be one, that each means one lock, and how its file comes into being."""

import os
import pickle
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from coheld import Lockable, holder
from coheld.testing.contract import killpoints
from coheld.testing.contract.observe import CAPABILITIES, URL
from coheld.testing.contract.places import all_in, file_called, file_of, had, inode_of, live_once, place_of, took
from coheld.testing.support import effort, procs
from coheld.testing.support.exclusion import Exclusion

LONG = "long " * 51  # 255 bytes
NAMES = [
    "x",
    "lab/bed-1",
    "../x",
    "../../../../tmp/x",
    ".",
    "..",
    "/",
    "//",
    "/dev/shm/x",
    "%",
    "%2F",
    "%2f",
    "%%",
    "=",
    " ",
    "  ",
    " x ",
    "a b",
    "new\nline",
    "\t\r\x7f\x01",
    "~",
    "*?[a]",
    "'\"`$(x)\\;&|<>",
    "-rf",
    "name-x",
    ".new-1-2-3",
    "arena-1-2-ab",
    "Ünïcödé",
    "\u00e9",  # the same text in one character
    "e\u0301",  # and in two
    "ﬀ",
    "ff",
    "\u200b",
    "\ufeffx",
    "مرحبا",
    "🔒",
    "🔒" * 63,
    "X",
    "None",
    "0",
    LONG,
    LONG[:-1] + "!",
    "/" * 255,
    "/" * 254 + "!",
    "a" * 255,
    "a" * 254 + "b",
    "a" * 200,
    "a" * 201,
]


# ---- what may be a name ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_any_text_is_a_name(coheld_dir: Path, tmp_path: Path, name: str) -> None:
    obj = Lockable(lock_name=name)
    assert took(obj)
    assert [str(coheld_dir / one) for one in all_in(coheld_dir)] == [str(file_of(obj))]
    assert Lockable(lock_name=name).__lock__ is obj.__lock__
    assert repr(name) in repr(obj.__lock__)


def hold_all(link: procs.Link, names: list[str]) -> None:
    objs = [Lockable(lock_name=name) for name in names]
    link.say([inode_of(obj) for obj in objs])
    for obj in objs:
        link.wait_for("next")
        with obj:
            link.say("inside")
            link.wait_for("leave")
        link.say("left")


def test_each_name_is_one_lock_for_all_processes_and_no_two_names_share_one(coheld_dir: Path) -> None:
    objs = [Lockable(lock_name=name) for name in NAMES]
    assert len({inode_of(obj) for obj in objs}) == len(set(NAMES)) == len(all_in(coheld_dir))
    with procs.start(hold_all, NAMES, method="spawn") as other:
        other.expect([inode_of(obj) for obj in objs])
        for held in objs:
            other.tell("next")
            other.expect("inside")
            assert [obj for obj in objs if not took(obj)] == [held]
            other.tell("leave")
            other.expect("left")


def test_no_short_name_is_taken_for_a_long_one() -> None:
    """A long name's file has a digest in its name; that text may be a name too."""
    for number in range(300):
        name = f"{number:03}" * 85
        digest = sha256(name.encode()).hexdigest()
        first, lookalike = Lockable(lock_name=name), file_of(Lockable(lock_name=name)).name
        for other in (name[:120] + "%" + digest, name[:120] + chr(number % 127 + 1) + digest[2:]):
            assert file_of(Lockable(lock_name=other)).name != lookalike
        assert took(first)


@pytest.mark.parametrize("name", [1, b"x", 1.5, object(), ["x"], ("x",), True, Path("x")])
def test_what_is_no_text_is_a_type_error(coheld_dir: Path, name: Any) -> None:
    with pytest.raises(TypeError, match="lock_name must be a string"):
        Lockable(lock_name=name)
    assert all_in(coheld_dir) == []


@pytest.mark.parametrize("name", ["", "\0", "x\0", "a\0b", "a" * 256, "é" * 128, "🔒" * 64, "x" * 100_000])
def test_what_is_empty_too_long_or_has_a_nul_is_a_value_error(coheld_dir: Path, name: str) -> None:
    with pytest.raises(ValueError, match="lock_name must have 1 to 255 bytes"):
        Lockable(lock_name=name)
    assert all_in(coheld_dir) == []


@pytest.mark.parametrize("name", ["\ud800", "x\udcff", "\udfff\ud800"])
def test_what_is_no_utf_8_is_a_value_error(coheld_dir: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be written as UTF-8"):
        Lockable(lock_name=name)
    assert all_in(coheld_dir) == []


@pytest.mark.parametrize("name", [1, "", "\0", "a" * 256, "\ud800"])
def test_a_bad_name_loses_nothing_that_an_object_had(name: Any) -> None:
    obj = Lockable(lock_name="x")
    lock = obj.__lock__
    with obj:
        with pytest.raises((TypeError, ValueError)):
            obj.__init__(lock_name=name)  # type: ignore[misc]
        assert obj.__lock__ is lock and holder(obj) is not None
    assert took(obj)


# ---- which backend -----------------------------------------------------------------------------------------


def test_the_default_is_that_of_this_run() -> None:
    assert place_of(Lockable(lock_name="x")) == place_of(Lockable(lock_name="x", lock_backend=URL))


@pytest.mark.parametrize("url", [URL, ""])
def test_the_environment_may_name_the_default_too(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("COHELD_BACKEND", url)
    assert took(Lockable(lock_name="x"))


BAD_URLS = ["shm", "nosuch:", "nosuch://x", "SHM:", " shm:", ":", "://", "/dev/shm", "🔒:"]


@pytest.mark.parametrize("url", [*BAD_URLS, ""])
def test_an_unknown_backend_is_a_value_error(coheld_dir: Path, url: str) -> None:
    with pytest.raises(ValueError, match="no backend for"):
        Lockable(lock_name="x", lock_backend=url)
    assert all_in(coheld_dir) == []


@pytest.mark.parametrize("url", BAD_URLS)
def test_an_unknown_backend_in_the_environment_is_a_value_error(
    coheld_dir: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("COHELD_BACKEND", url)
    with pytest.raises(ValueError, match="no backend for"):
        Lockable(lock_name="x")
    assert all_in(coheld_dir) == []


def test_one_that_is_asked_for_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COHELD_BACKEND", "nosuch:")
    assert took(Lockable(lock_name="x", lock_backend=URL))


@pytest.mark.parametrize("url", [1, b"shm:", ["shm:"]])
def test_a_backend_that_is_no_text_is_a_type_error(url: Any) -> None:
    with pytest.raises(TypeError, match="lock_backend must be a URL"):
        Lockable(lock_name="x", lock_backend=url)


def test_a_backend_without_a_name_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="lock_backend needs a lock_name"):
        Lockable(lock_backend=URL)


# ---- how a name begins -------------------------------------------------------------------------------------


def test_a_name_outlives_those_who_use_it(coheld_dir: Path) -> None:
    source = "from coheld import Lockable\nwith Lockable(lock_name='x') as obj: print(obj.__lock__.segment.identity[1])"
    first, second = procs.run(source), procs.run(source)
    assert first == second and all_in(coheld_dir) == [file_called("x")]


def test_a_named_lock_is_one_page(coheld_dir: Path) -> None:
    for number in range(50):
        Lockable(lock_name=f"x{number}")
    assert {path.stat().st_size for path in coheld_dir.iterdir()} == {4096}


def make_one_of_a_name(link: procs.Link, exclusion: Exclusion, worker: int) -> None:
    while (name := link.hear()) != "end":
        obj = Lockable(lock_name=name)
        with obj, exclusion.inside(worker):
            pass
        link.say(inode_of(obj))


@pytest.mark.hang_limit(180)
@pytest.mark.parametrize("rounds", [300])
def test_those_who_make_one_name_at_once_get_one_lock(coheld_dir: Path, tmp_path: Path, rounds: int) -> None:
    exclusion = Exclusion(tmp_path)
    with (
        procs.start(make_one_of_a_name, exclusion, 0) as first,
        procs.start(make_one_of_a_name, exclusion, 1) as second,
        procs.start(make_one_of_a_name, exclusion, 2) as third,
    ):
        workers = [first, second, third]
        for number in range(rounds):
            for worker in workers:
                worker.tell(f"x{number}")
            assert len({worker.hear() for worker in workers}) == 1
        for worker in workers:
            worker.tell("end")
    exclusion.check(calls=3 * rounds)
    assert len(all_in(coheld_dir)) == rounds


def make_by_name() -> None:
    assert took(Lockable(lock_name="x"))


@pytest.mark.hang_limit(180)
def test_one_who_is_killed_at_any_step_of_making_a_name_is_in_nobodys_way(coheld_dir: Path) -> None:
    left = set()
    for _ in killpoints.killed_at_each_line(make_by_name):
        left |= {name.partition("-")[0] for name in all_in(coheld_dir)}
        assert killpoints.forked(make_by_name) == 0
        assert killpoints.forked(live_once) == 0
        assert all_in(coheld_dir) == [file_called("x")]
        (coheld_dir / file_called("x")).unlink()
    assert effort.are_met(left, {".new", "name"})


@pytest.mark.hang_limit(180)
def test_ctrl_c_at_any_step_of_making_a_name_is_in_nobodys_way(coheld_dir: Path) -> None:
    def go_on(line: int) -> None:
        if CAPABILITIES.leases:  # a store that was asked in vain is told so by another thread, soon
            assert had(Lockable(lock_name="x"))
        make_by_name()
        assert all_in(coheld_dir) == [file_called("x")], f"interrupted before line {line}"

    for _ in killpoints.interrupted_at_each_line(make_by_name, go_on):
        (coheld_dir / file_called("x")).unlink()


def test_a_pickled_name_is_loaded_where_it_was_made(
    coheld_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the directory that the loading process uses for its own names; one in a store is the same from there."""
    obj = Lockable(lock_name="x")
    monkeypatch.setenv("COHELD_DIR", str(tmp_path))
    other = Lockable(lock_name="x")
    assert pickle.loads(pickle.dumps(obj)).__lock__ is obj.__lock__
    assert (other.__lock__ is obj.__lock__) is not CAPABILITIES.files


def go_elsewhere(link: procs.Link, directory: str) -> None:
    os.chdir(directory)
    os.environ["COHELD_DIR"] = "locks"
    first = Lockable(lock_name="x")
    with first:
        os.makedirs("locks/elsewhere", exist_ok=True)
        os.chdir("locks/elsewhere")
        link.say(Lockable(lock_name="x").__lock__ is first.__lock__)
        with procs.start(name_is_held) as child:  # by a fork
            link.say(child.result())


def name_is_held(_: procs.Link) -> bool:
    return not Lockable(lock_name="x").acquire(blocking=False)


def test_a_relative_directory_stays_the_same_one_when_the_process_goes_elsewhere(tmp_path: Path) -> None:
    with procs.start(go_elsewhere, str(tmp_path)) as process:
        assert process.hear(), "the name has become another lock"
        assert process.hear(), "the name is another lock in a child"
        process.end()


def check_another_directory(link: procs.Link, data: bytes, directory: str) -> int:
    os.environ["COHELD_DIR"] = directory
    loaded = pickle.loads(data)
    link.say(took(loaded))
    return inode_of(loaded)


def test_so_it_is_in_another_process(tmp_path: Path) -> None:
    """Which is as one of another host, where a store has the lock: files of its own, and the same lock."""
    obj = Lockable(lock_name="x")
    with obj, procs.start(check_another_directory, pickle.dumps(obj), str(tmp_path), method="spawn") as other:
        other.expect(False)
        assert (other.result() == inode_of(obj)) is CAPABILITIES.files
