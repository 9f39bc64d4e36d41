"""Permissions: nothing of ours is open to others, and nothing that others could change is used."""

import errno
import os
import pickle
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coheld import CoheldError, InsecureError, Lockable
from coheld.backends import files, shm
from coheld.mutex import remove
from coheld.testing.contract.places import all_in, file_of, took
from coheld.testing.support import procs
from shm import namespaces

DEFAULT = f"/dev/shm/coheld-{os.geteuid()}"
UMASKS = [0o000, 0o002, 0o022, 0o077, 0o177, 0o277, 0o777]


def mode_of(path: str | os.PathLike[str]) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


# ---- what we make ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", UMASKS, ids=oct)
def test_files_are_for_their_owner_whatever_the_umask(coheld_dir: Path, mask: int) -> None:
    with umask(mask):
        objs = [Lockable(), Lockable(lock_name="x")]
    assert [mode_of(file_of(obj)) for obj in objs] == [0o600, 0o600]
    assert len(all_in(coheld_dir)) == 2 and all(took(obj) for obj in objs)


@pytest.mark.parametrize("mask", UMASKS, ids=oct)
def test_so_is_the_directory_that_the_environment_names(
    coheld_dir: Path, monkeypatch: pytest.MonkeyPatch, mask: int
) -> None:
    directory = coheld_dir / "new"
    monkeypatch.setenv("COHELD_DIR", str(directory))
    with umask(mask):
        Lockable()
    assert mode_of(directory) == 0o700


def make_both(link: procs.Link, mask: int) -> list[int]:
    namespaces.private_shm()
    with umask(mask):
        objs = [Lockable(), Lockable(lock_name="x")]
    assert {str(file_of(obj).parent) for obj in objs} == {DEFAULT} and all(map(took, objs))
    return [mode_of(DEFAULT), *(mode_of(file_of(obj)) for obj in objs)]


@pytest.mark.parametrize("mask", UMASKS, ids=oct)
def test_so_is_the_default_directory(mask: int) -> None:
    with procs.start(make_both, mask) as worker:
        assert worker.result() == [0o700, 0o600, 0o600]


def make_as_a_stranger(link: procs.Link) -> list[int]:
    """Who is not root cannot look past permissions that are too narrow."""
    namespaces.private_shm()
    directory = f"/dev/shm/coheld-{namespaces.become_stranger()}"
    with umask(0o777):
        objs = [Lockable(), Lockable(lock_name="x")]
        assert all(map(took, objs)) and took(pickle.loads(pickle.dumps(objs[0])))
    return [mode_of(directory), *(mode_of(file_of(obj)) for obj in objs)]


def test_an_unprivileged_user_can_use_what_he_made() -> None:
    with procs.start(make_as_a_stranger) as worker:
        assert worker.result() == [0o700, 0o600, 0o600]


def become_another_user(link: procs.Link, obj: Lockable) -> list[str]:
    """A service gives up its privileges after it has made locks; its own later ones go with it."""
    namespaces.private_shm()
    before = Lockable()
    user = namespaces.become_stranger()
    directory = f"/dev/shm/coheld-{user}"
    after = Lockable()
    assert all(map(took, (obj, before, Lockable(lock_name="x")))) and took(after)
    if os.fork() == 0:
        assert took(after) and took(before) and took(Lockable())
        shm._leave()
        os._exit(0)
    assert os.wait()[1] == 0
    shm._leave()
    return all_in(directory)


def test_a_process_that_becomes_another_user_leaves_nothing_in_his_directory() -> None:
    with procs.start(become_another_user, Lockable()) as worker:
        assert worker.result() == ["name-x"]


# ---- the directory -----------------------------------------------------------------------------------------


def someone_elses() -> None:
    namespaces.foreign_directory(DEFAULT)


def a_link() -> None:
    os.mkdir("/dev/shm/mine", 0o700)
    os.symlink("/dev/shm/mine", DEFAULT)


def a_link_to_nowhere() -> None:
    os.symlink("/dev/shm/nowhere", DEFAULT)


def a_file() -> None:
    Path(DEFAULT).touch(0o600)


def a_fifo() -> None:
    os.mkfifo(DEFAULT, 0o600)


def writable_by_all() -> None:
    os.mkdir(DEFAULT)
    os.chmod(DEFAULT, 0o777)


def writable_by_all_and_sticky() -> None:
    os.mkdir(DEFAULT)
    os.chmod(DEFAULT, 0o1777)


def writable_by_the_group() -> None:
    os.mkdir(DEFAULT)
    os.chmod(DEFAULT, 0o720)


BAD_DIRECTORIES = {
    someone_elses: "belongs to user",
    a_link: "is not a directory",
    a_link_to_nowhere: "is not a directory",
    a_file: "is not a directory",
    a_fifo: "is not a directory",
    writable_by_all: "can be written by other users",
    writable_by_all_and_sticky: "can be written by other users",
    writable_by_the_group: "can be written by other users",
}


def use_the_default(link: procs.Link, prepare: Callable[[], None]) -> list[tuple[type[BaseException], str]]:
    namespaces.private_shm()
    prepare()
    errors = [error_of(Lockable), error_of(lambda: Lockable(lock_name="x")), error_of(lambda: remove("x"))]
    assert os.path.islink(DEFAULT) or not os.path.isdir(DEFAULT) or all_in(DEFAULT) == [] or prepare is someone_elses
    assert all_in("/dev/shm") in ([f"coheld-{os.geteuid()}"], [f"coheld-{os.geteuid()}", "mine"])
    return errors


def error_of(action: Callable[[], object]) -> tuple[type[BaseException], str]:
    """What the action raises: its type and message."""
    try:
        action()
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("prepare", BAD_DIRECTORIES, ids=lambda prepare: prepare.__name__)
def test_a_directory_that_others_could_change_is_not_used(prepare: Callable[[], None]) -> None:
    with procs.start(use_the_default, prepare) as worker:
        for kind, message in worker.result():
            assert kind is InsecureError
            assert DEFAULT in message and BAD_DIRECTORIES[prepare] in message


def readable_by_all() -> None:
    os.mkdir(DEFAULT)
    os.chmod(DEFAULT, 0o755)


def use_a_good_one(link: procs.Link, prepare: Callable[[], None]) -> bool:
    namespaces.private_shm()
    prepare()
    return took(Lockable()) and took(Lockable(lock_name="x")) and remove("x")


@pytest.mark.parametrize("prepare", [readable_by_all, lambda: os.mkdir(DEFAULT, 0o700), lambda: None])
def test_one_that_is_there_and_safe_is_used(prepare: Callable[[], None]) -> None:
    with procs.start(use_a_good_one, prepare) as worker:
        assert worker.result() is True


def replace_the_directory(link: procs.Link) -> list[type[BaseException]]:
    """Somebody takes our place after a session manager has removed our directory."""
    namespaces.private_shm()
    obj = Lockable(lock_name="x")
    with obj:
        for path in Path(DEFAULT).iterdir():
            path.unlink()
        os.rmdir(DEFAULT)
        writable_by_all()
    return [error_of(lambda: remove("x"))[0], error_of(lambda: Lockable(lock_name="y"))[0], wait_for_error(obj)]


def wait_for_error(obj: Lockable) -> type[BaseException]:
    """What it raises when it finds that its file is gone, and its directory is somebody's trap."""
    try:
        while True:
            with obj:
                pass
    except CoheldError as error:
        return type(error)


def test_one_that_took_the_place_of_ours_is_not_used() -> None:
    with procs.start(replace_the_directory) as worker:
        assert worker.result() == [InsecureError] * 3


# ---- the directory that COHELD_DIR names -------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o755, 0o700])
def test_a_directory_that_is_named_is_taken_as_it_is(
    coheld_dir: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    directory = coheld_dir / "named"
    directory.mkdir()
    directory.chmod(mode)
    monkeypatch.setenv("COHELD_DIR", str(directory))
    assert took(Lockable()) and took(Lockable(lock_name="x"))
    assert mode_of(directory) == mode and len(all_in(directory)) == 2


def test_it_may_be_a_link_and_somebody_elses(coheld_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, link = coheld_dir / "named", coheld_dir / "link"
    directory.mkdir()
    if os.geteuid() == 0:
        os.chown(directory, namespaces.STRANGER, namespaces.STRANGER)
    link.symlink_to(directory)
    monkeypatch.setenv("COHELD_DIR", str(link))
    assert took(Lockable()) and took(Lockable(lock_name="x"))
    assert len(all_in(directory)) == 2


def test_it_may_be_missing_with_its_parents(coheld_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COHELD_DIR", str(coheld_dir / "a" / "b.new-c" / "d"))
    assert took(Lockable()) and took(Lockable(lock_name="x"))


@pytest.mark.parametrize("directory", ["with space", "new\nline", "Ünïcödé", "back\\slash", "name-x", ".new-1-2-ab"])
def test_it_may_have_any_name(coheld_dir: Path, monkeypatch: pytest.MonkeyPatch, directory: str) -> None:
    monkeypatch.setenv("COHELD_DIR", str(coheld_dir / directory))
    obj = Lockable()
    assert took(obj) and took(Lockable(lock_name="x")) and remove("x")
    with procs.start(lambda link: took(pickle.loads(pickle.dumps(obj)))) as worker:
        assert worker.result()


def test_it_may_be_relative(coheld_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(coheld_dir)
    monkeypatch.setenv("COHELD_DIR", "here")
    obj = Lockable(lock_name="x")
    assert file_of(obj) == coheld_dir / "here" / "name-x"
    monkeypatch.chdir("/")
    assert took(obj) and pickle.loads(pickle.dumps(obj)).__lock__ is obj.__lock__


def test_it_cannot_be_a_file(coheld_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (coheld_dir / "file").touch()
    for path in (coheld_dir / "file", coheld_dir / "file" / "below"):
        monkeypatch.setenv("COHELD_DIR", str(path))
        with pytest.raises(OSError, match="file") as caught:
            Lockable()
        assert caught.value.errno in (errno.EEXIST, errno.ENOTDIR)
        with pytest.raises(OSError, match="file"):
            Lockable(lock_name="x")


# ---- files -------------------------------------------------------------------------------------------------


def link_file(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def fifo_file(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def directory_file(path: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


def socket_file(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(path))


def writable_file(path: Path) -> None:
    path.chmod(0o602)


def group_writable_file(path: Path) -> None:
    path.chmod(0o620)


def unreadable_file(path: Path) -> None:
    """For who is not root."""
    path.chmod(0o000)


def foreign_file(path: Path) -> None:
    os.chown(path, namespaces.STRANGER, namespaces.STRANGER)


BAD_FILES = [
    link_file,
    link_to_nowhere,
    fifo_file,
    directory_file,
    socket_file,
    writable_file,
    group_writable_file,
    foreign_file if os.geteuid() == 0 else unreadable_file,
]


@pytest.fixture(params=BAD_FILES, ids=lambda spoil: spoil.__name__)
def spoil(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return request.param  # type: ignore[no-any-return]


def make_and_spoil(link: procs.Link, spoil: Callable[[Path], None]) -> bytes:
    """Two locks of a process that still runs; what others find there is not what it made."""
    objs = Lockable(), Lockable(lock_name="x")
    for obj in objs:
        spoil(file_of(obj))
    link.say((pickle.dumps(objs[0]), [str(file_of(obj)) for obj in objs]))
    link.wait_for("end")
    return b""


def test_a_file_that_others_could_change_is_not_used(
    monkeypatch: pytest.MonkeyPatch, coheld_dir: Path, spoil: Callable[[Path], None]
) -> None:
    monkeypatch.chdir("/")
    with procs.start(make_and_spoil, spoil) as maker:
        data, paths = maker.hear()
        anonymous = pickle.loads(data)  # loading never raises
        for path, action in (
            (paths[0], anonymous.acquire),
            (paths[1], lambda: Lockable(lock_name="x")),
            (paths[1], lambda: remove("x")),
        ):
            with pytest.raises(InsecureError) as caught:
                action()
            assert path in str(caught.value) and caught.value.resource == path
        maker.tell("end")
    assert took(Lockable()) and took(Lockable(lock_name="y"))


def test_what_a_link_leads_to_is_not_touched(coheld_dir: Path, tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.write_bytes(b"gold")
    (coheld_dir / "name-x").symlink_to(treasure)
    for action in (lambda: Lockable(lock_name="x"), lambda: remove("x")):
        with pytest.raises(InsecureError):
            action()
    assert treasure.read_bytes() == b"gold" and mode_of(treasure) == 0o644
    assert (coheld_dir / "name-x").is_symlink()


def test_an_insecure_place_is_a_permission_error_too() -> None:
    assert issubclass(InsecureError, PermissionError) and issubclass(InsecureError, CoheldError)


def test_opening_reports_what_is_no_question_of_permission(coheld_dir: Path) -> None:
    """Not as something insecure."""
    Lockable(lock_name="x")
    with pytest.raises(FileNotFoundError):
        files.open_checked(str(coheld_dir / "name-y"))
    with pytest.raises(NotADirectoryError):
        files.open_checked(str(coheld_dir / "name-x" / "below"))
