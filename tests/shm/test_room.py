"""No room: a full /dev/shm, a process at its limits, no /dev/shm at all. A clear OSError, and nothing is lost."""

import errno
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from coheld import Lockable, holder
from coheld.backends import shm
from coheld.mutex import remove
from coheld.testing.contract import killpoints
from coheld.testing.contract.places import all_in, file_of, place_of, took
from coheld.testing.support import delays, procs
from shm import namespaces

PAGE = 4096
MOST = 100_000  # locks; there is never room for so many here
DEFAULT = Path(f"/dev/shm/coheld-{os.geteuid()}")
FILLER = Path("/dev/shm/filler")


def in_child(action: Callable[[], object]) -> None:
    """Run the action in a forked child; its failure, or a signal that it dies of, fails the test."""

    def run(_: procs.Link) -> None:
        action()

    with procs.start(run) as worker:
        worker.result()


def make_until_full(make: Callable[[int], Lockable], first: int = 0) -> tuple[list[Lockable], OSError]:
    """As many locks as there is room for, and the error that said so when those were there."""
    objs: list[Lockable] = []
    try:
        for number in range(first, first + MOST):
            objs.append(make(number))  # noqa: PERF401
    except OSError as error:
        return objs, error
    raise AssertionError(f"there was room for all {MOST}")


def anonymous(_: int = 0) -> Lockable:
    return Lockable()


def named(number: int = 0) -> Lockable:
    return Lockable(lock_name=f"x{number}")


KINDS = [anonymous, named]


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[[int], Lockable]:
    return request.param  # type: ignore[no-any-return]


# ---- a full /dev/shm ---------------------------------------------------------------------------------------


def full_shm(pages: int = 32) -> None:
    """A tiny /dev/shm of so many pages."""
    namespaces.private_shm(f"size={pages * PAGE},mode=1777")


def fill(leave: int = 0) -> None:
    """Take all its pages but some."""
    with FILLER.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(PAGE))
    os.truncate(FILLER, os.path.getsize(FILLER) - leave * PAGE)


def free() -> None:
    FILLER.unlink()


def says_that_it_is_full(error: OSError) -> bool:
    return error.errno == errno.ENOSPC and "no lock can be made: No space left on device" in str(error)


def test_a_full_file_system_is_a_clear_error_and_what_exists_works(make: Callable[[int], Lockable]) -> None:
    def run() -> None:
        full_shm()
        objs, error = make_until_full(make)
        assert says_that_it_is_full(error) and str(DEFAULT) in str(error)
        assert len(objs) > 20 and all(map(took, objs))
        assert [name for name in all_in(DEFAULT) if name.startswith(".")] == []
        for other in KINDS:
            assert says_that_it_is_full(make_until_full(other, first=1000)[1])
        assert all(map(took, objs))

    in_child(run)


def test_an_arena_fills_it_to_the_last_page() -> None:
    def run() -> None:
        full_shm()
        objs, _ = make_until_full(anonymous)
        assert len(objs) > 30 * PAGE / 256 - 16

    in_child(run)


def test_room_again_and_it_works(make: Callable[[int], Lockable]) -> None:
    def run() -> None:
        full_shm()
        fill()
        objs, error = make_until_full(make)
        assert not objs and says_that_it_is_full(error) and all_in(DEFAULT) == []
        free()
        objs, error = make_until_full(make)
        assert len(objs) > 20 and says_that_it_is_full(error) and all(map(took, objs))

    in_child(run)


def test_a_dropped_lock_makes_room_for_the_next() -> None:
    def run() -> None:
        full_shm()
        objs, _ = make_until_full(anonymous)
        for _ in range(5):
            objs.pop()
        objs += [Lockable() for _ in range(5)]
        assert all(map(took, objs)) and len({place_of(obj) for obj in objs}) == len(objs)
        with pytest.raises(OSError, match="No space left on device"):
            Lockable()

    in_child(run)


@pytest.mark.parametrize("pages", range(24))
def test_with_any_number_of_pages_left_it_works_or_says_so(make: Callable[[int], Lockable], pages: int) -> None:
    """Never SIGBUS: a page that is not reserved is not touched."""

    def run() -> None:
        full_shm(64)
        fill(leave=pages)
        objs, error = make_until_full(make)
        assert says_that_it_is_full(error) and all(map(took, objs))
        free()
        objs.append(make(len(objs)))
        assert all(map(took, objs)) and took(pickle.loads(pickle.dumps(objs[-1])))

    in_child(run)


@pytest.mark.parametrize("inodes", range(2, 9))
def test_no_file_left_is_a_clear_error_too(inodes: int) -> None:
    """The one that got no name gives its place back at once, though the error's traceback lives on."""

    def run() -> None:
        namespaces.private_shm(f"nr_inodes={inodes},mode=1777")
        objs, error = make_until_full(named)
        assert says_that_it_is_full(error) and len(objs) == max(0, inodes - 3)  # a link takes one for a moment
        if inodes > 2:
            objs.append(Lockable())  # the arena is the last file
        shm._process.arena = None
        with pytest.raises(OSError, match="no lock can be made: No space left on device"):
            Lockable()
        assert all(map(took, objs)) and [name for name in all_in(DEFAULT) if name.startswith(".")] == []

    in_child(run)


def test_one_process_that_fills_it_does_not_disturb_another() -> None:
    def run() -> None:
        full_shm()
        obj = Lockable()
        with procs.start(hold_until_told, obj) as other:
            other.expect("inside")
            make_until_full(named)
            assert not took(obj)
            owner = holder(obj)
            assert owner and owner.pid == other.pid
            with procs.start(enter, obj) as waiting:
                waiting.wait_until_blocked()
                other.kill()
                waiting.expect("inside")

    in_child(run)


def hold_until_told(link: procs.Link, obj: Lockable) -> None:
    with obj:
        link.say("inside")
        link.wait_for("leave")


def enter(link: procs.Link, obj: Lockable) -> None:
    with obj:
        link.say("inside")


def test_what_a_dead_process_left_is_room_for_the_next() -> None:
    def leave_it_full() -> None:
        make_until_full(anonymous)

    def run() -> None:
        full_shm()
        assert killpoints.forked(leave_it_full) == 0
        assert len(all_in(DEFAULT)) == 1
        assert took(Lockable())

    in_child(run)


# ---- a process at its limits -------------------------------------------------------------------------------


@contextmanager
def limited(which: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(which)
    resource.setrlimit(which, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


MORE_THAN_FIT = 600  # cells, into the largest of these


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 64 * 1024 - 1, 64 * 1024, 100_000])
def test_a_limit_of_file_size_is_a_clear_error(coheld_dir: Path, size: int) -> None:
    def run() -> None:
        before = [Lockable(), Lockable(lock_name="x")]
        shm._process.arena = None
        with limited(resource.RLIMIT_FSIZE, size):
            for make in KINDS:
                objs: list[Lockable] = []
                with suppress(OSError):
                    for number in range(MORE_THAN_FIT):
                        objs.append(make(number))  # noqa: PERF401
                assert all(map(took, [*before, *objs])) and (len(objs) == MORE_THAN_FIT or size < MORE_THAN_FIT * 256)
        assert [name for name in all_in(coheld_dir) if name.startswith(".")] == []
        assert took(Lockable()) and took(Lockable(lock_name="y"))

    in_child(run)


def test_that_error_names_the_reason(coheld_dir: Path) -> None:
    def run() -> None:
        with limited(resource.RLIMIT_FSIZE, 1):
            for make in KINDS:
                _, error = make_until_full(make)
                assert error.errno == errno.EFBIG and "no lock can be made: File too large" in str(error)

    in_child(run)
    assert all_in(coheld_dir) == []


def address_space() -> int:
    """What this process has mapped, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE


def test_too_little_address_space_is_a_clear_error(coheld_dir: Path) -> None:
    def run() -> None:
        with limited(resource.RLIMIT_AS, address_space() + 900 * 1024):  # an arena wants a MiB at least
            with pytest.raises(OSError, match="cannot be mapped") as caught:
                Lockable()
            assert caught.value.errno == errno.ENOMEM
            assert took(Lockable(lock_name="x"))
        assert all_in(coheld_dir) == ["name-x"]
        assert took(Lockable())

    in_child(run)


@pytest.mark.parametrize("spare", [2, 4, 30, 100, 1000])
def test_an_arena_takes_the_address_space_that_there_is(coheld_dir: Path, spare: int) -> None:
    def run() -> None:
        with limited(resource.RLIMIT_AS, address_space() + spare * 2**20):
            obj = Lockable()
            assert obj.__lock__.segment.length <= spare * 2**20 and took(obj)

    in_child(run)


def test_one_that_is_used_up_is_followed_by_another(coheld_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "_ARENA_SPAN", 1 << 20)

    def run() -> None:
        objs = [Lockable() for _ in range(10_000)]
        assert len({file_of(obj) for obj in objs}) == len(all_in(coheld_dir)) == 3
        assert len({place_of(obj) for obj in objs}) == 10_000 and all(map(took, objs))
        del objs[:5_000]
        objs += [Lockable() for _ in range(5_000)]
        assert len({place_of(obj) for obj in objs}) == 10_000
        with procs.start(lambda link: [took(obj) for obj in objs]) as child:
            assert all(child.result())
        shm._leave()

    in_child(run)
    assert all_in(coheld_dir) == []


def test_attaching_to_a_large_arena_with_little_address_space() -> None:
    objs = [Lockable() for _ in range(20_000)]
    data = [pickle.dumps(objs[0]), pickle.dumps(objs[-1])]
    for spare, outcome in ((900 * 1024, "OSError"), (100 * 2**20, "took")):
        with procs.start(attach_with_little, data, spare, method="spawn") as other:
            assert other.result() == [outcome] * 2


def attach_with_little(link: procs.Link, data: list[bytes], spare: int) -> list[str]:
    with limited(resource.RLIMIT_AS, address_space() + spare):
        objs = [pickle.loads(one) for one in data]
        return [outcome_of(obj) for obj in objs]


def outcome_of(obj: Lockable) -> str:
    try:
        return "took" if took(obj) else "busy"
    except Exception as error:
        return type(error).__name__


def errno_of(action: Callable[[], object]) -> int | None:
    try:
        action()
    except OSError as error:
        return error.errno
    return None


def use_all_kinds(data: bytes) -> None:
    """Everything that opens a file."""
    assert took(Lockable())
    assert took(Lockable(lock_name="x"))
    assert took(pickle.loads(data))
    assert remove("x")


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """No more than `count` can be opened."""
    lowest = os.dup(0)
    os.close(lowest)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    holes = [fd for fd in range(lowest, highest) if not os.path.exists(f"/proc/self/fd/{fd}")]
    for fd in holes:
        os.dup2(0, fd)
    with limited(resource.RLIMIT_NOFILE, max(highest, lowest) + count):
        yield
    for fd in holes:
        os.close(fd)


@pytest.mark.parametrize("count", range(8))
def test_no_descriptor_left_is_a_clear_error(coheld_dir: Path, count: int) -> None:
    obj = Lockable()
    data = pickle.dumps(obj)

    def run(link: procs.Link) -> list[int | None]:
        errors = []
        with descriptors_left(count):
            for action in (Lockable, lambda: Lockable(lock_name="y"), lambda: pickle.loads(data).acquire()):
                errors.append(errno_of(action))  # noqa: PERF401
            assert took(obj)
        use_all_kinds(data)
        return errors

    with procs.start(run) as worker:
        errors = worker.result()
    assert set(errors) <= {errno.EMFILE, None} and (errors[:2] == [errno.EMFILE] * 2 or count > 1)
    assert [name for name in all_in(coheld_dir) if name.startswith(".")] == []


def test_no_descriptors_are_lost_whatever_fails(coheld_dir: Path) -> None:
    def run() -> None:
        use_all_kinds(pickle.dumps(Lockable()))
        before = os.listdir("/proc/self/fd")
        for count in range(8):
            with descriptors_left(count), suppress(OSError):
                Lockable(lock_name=f"x{count}")
            with limited(resource.RLIMIT_FSIZE, 1), suppress(OSError):
                Lockable(lock_name=f"y{count}")
        assert os.listdir("/proc/self/fd") == before

    in_child(run)


# ---- no /dev/shm -------------------------------------------------------------------------------------------

PROGRAM = """\
import os, pickle, subprocess, sys
from coheld import Lockable
obj, name = Lockable(), Lockable(lock_name="x")
if len(sys.argv) > 1:
    print(pickle.loads(bytes.fromhex(sys.argv[1])).acquire(blocking=False), name.acquire(blocking=False))
else:
    directory = os.path.dirname(obj.__lock__.segment.path)
    print(directory, oct(os.stat(directory).st_mode), sorted(os.listdir(directory))[1:])
    with obj, name:
        other = subprocess.run([sys.executable, *sys.orig_argv[1:3], pickle.dumps(obj).hex()], stdout=1)
    if not os.fork():
        print(obj.acquire(blocking=False), name.acquire(blocking=False), flush=True)
    else:
        os.wait()
"""


def read_only() -> None:
    namespaces.tmpfs("/dev/shm", "ro")


def not_there() -> None:
    namespaces.tmpfs("/dev", "mode=755")


def not_for_all() -> None:
    """Root's own; who is not root cannot make it so."""
    namespaces.tmpfs("/dev/shm", "mode=755" if os.geteuid() == 0 else "ro")
    namespaces.become_stranger()


def run_without_shm(link: procs.Link, without: Callable[[], None], temporary: str) -> list[str]:
    namespaces.private_mounts()
    namespaces.tmpfs(temporary)
    without()
    environment = {name: value for name, value in os.environ.items() if name != "COHELD_DIR"} | {"TMPDIR": temporary}
    command = [sys.executable, "-c", PROGRAM]
    said = subprocess.run(command, stdin=0, stdout=-1, env=environment, check=True, timeout=delays.LONG).stdout
    return [*said.decode().splitlines(), *all_in(f"{temporary}/coheld-{os.geteuid()}")]


@pytest.mark.parametrize("without", [read_only, not_there])
def test_without_dev_shm_the_temporary_directory_serves(tmp_path: Path, without: Callable[[], None]) -> None:
    with procs.start(run_without_shm, without, str(tmp_path)) as worker:
        assert worker.result() == [
            f"{tmp_path}/coheld-{os.geteuid()} 0o40700 ['name-x']",
            "False False",
            "True True",
            "name-x",
        ]


def fork_without_shm(link: procs.Link) -> tuple[str, bool, bool]:
    namespaces.private_mounts()
    os.environ.pop("COHELD_DIR", None)
    namespaces.tmpfs("/tmp")
    not_for_all()
    tempfile.tempdir = "/tmp"
    obj = Lockable()
    return str(file_of(obj).parent), took(obj), took(Lockable(lock_name="x"))


def test_so_it_does_where_dev_shm_is_not_for_all() -> None:
    user = namespaces.STRANGER if os.geteuid() == 0 else os.geteuid()
    with procs.start(fork_without_shm) as worker:
        assert worker.result() == (f"/tmp/coheld-{user}", True, True)


def use_nothing_writable(link: procs.Link) -> list[str]:
    namespaces.private_mounts()
    for name in ("COHELD_DIR", "TMPDIR", "TEMP", "TMP"):
        os.environ.pop(name, None)
    for place in ("/dev/shm", "/tmp", "/var/tmp", "/usr/tmp"):
        if os.path.isdir(place):
            namespaces.read_only(place)
    os.chdir("/tmp")
    source = "from coheld import Lockable\ntry: Lockable({})\nexcept OSError as error: print(error)"
    kinds = ("", "lock_name='x'")
    return [subprocess.check_output([sys.executable, "-c", source.format(kind)], text=True) for kind in kinds]


def test_with_nothing_writable_at_all_importing_works_and_the_first_use_says_what_is_missing() -> None:
    with procs.start(use_nothing_writable) as worker:
        for message in worker.result():
            assert "no place for locks" in message and "/dev/shm" in message and "COHELD_DIR" in message


def use_read_only(link: procs.Link, directory: str) -> list[tuple[int | None, str]]:
    obj, name = Lockable(), Lockable(lock_name="x")
    namespaces.private_mounts()
    namespaces.read_only(directory)
    errors = []
    shm._process.arena = None
    for action in (Lockable, lambda: Lockable(lock_name="y"), lambda: remove("x")):
        with pytest.raises(OSError, match="Read-only file system") as caught:
            action()
        errors.append((caught.value.errno, str(caught.value)))
    assert took(obj) and took(name)
    return errors


def test_a_named_directory_that_cannot_be_written_is_a_clear_error(coheld_dir: Path) -> None:
    with procs.start(use_read_only, str(coheld_dir)) as worker:
        for number, message in worker.result():
            assert number == errno.EROFS and str(coheld_dir) in message


def test_a_directory_that_is_removed_is_made_again(coheld_dir: Path) -> None:
    before = Lockable()
    for path in coheld_dir.iterdir():
        path.unlink()
    coheld_dir.rmdir()
    assert took(before) and took(Lockable())
    assert took(Lockable(lock_name="x")) and all_in(coheld_dir) == ["name-x"]
