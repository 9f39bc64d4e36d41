"""Without the extension: the install, what is said of it, and that nothing on the way there needs a POSIX system."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coheld import IncompatibleError, Lockable, native, shared
from coheld.backends import files
from coheld.testing.contract.observe import OTHER_URL, URL, is_free
from coheld.testing.support import delays, procs
from tools import environments

ROOT = Path(__file__).parents[1]

WITHOUT = "import sys; sys.modules['coheld._native'] = None\n"
USE = """
import coheld, logging
logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
for name in (None, "bed"):
    obj = coheld.Lockable(lock_name=name)
    with obj:
        print(obj.__lock__)
        assert coheld.holder(obj).depth == 1
coheld.Lockable()
"""


def test_without_the_extension_files_serve_and_one_line_says_why() -> None:
    warning, *locks = procs.run(WITHOUT + USE, env=os.environ | {"COHELD_BACKEND": ""}).splitlines()
    assert warning.startswith("WARNING coheld: running without the C extension") and "_native" in warning
    assert [line.partition(" ")[2].partition(" ")[0] for line in locks] == ["file:", "file:"]


def test_the_extension_that_was_asked_for_is_not_replaced_in_silence() -> None:
    source = "import coheld\ntry: coheld.Lockable()\nexcept coheld.IncompatibleError as error: print(error)"
    said = procs.run(WITHOUT + source, env=os.environ | {"COHELD_BACKEND": "shm:"})
    assert "needs the C extension" in said


def test_nothing_on_the_way_needs_what_only_posix_systems_have() -> None:
    """filelock has chosen its own way to lock before they are out of sight."""
    hidden = ["fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "coheld._native"]
    source = f"import filelock, sys; sys.modules.update(dict.fromkeys({hidden}))\n"
    assert "held by" in procs.run(source + USE, env=os.environ | {"COHELD_BACKEND": "file:"})


def test_one_name_never_means_two_locks() -> None:
    Lockable(lock_name="bed")
    source = f"import coheld\ntry: coheld.Lockable(lock_name='bed', lock_backend='{OTHER_URL}')\n"
    said = procs.run(source + "except coheld.IncompatibleError as error: print(error)")
    ours, theirs = URL.strip(":"), OTHER_URL.strip(":")
    assert ours in said and (theirs in said or "needs the C extension" in said)


def test_a_named_lock_of_files_beside_the_extension() -> None:
    with Lockable(lock_name="bed", lock_backend="file:") as bed:
        assert repr(bed.__lock__).startswith("<Mutex file: 'bed', held by")
        assert not is_free(Lockable(lock_name="bed", lock_backend="file:"))


class Shelf(Lockable):
    count: int = shared(0)
    items: list[str] = shared(default_factory=list)

    @Lockable.locked
    def put(self, item: str) -> None:
        self.items.append(item)
        self.count += 1


def test_one_class_with_state_on_both_backends() -> None:
    one, other = Shelf(lock_name="one", lock_backend="shm:"), Shelf(lock_name="other", lock_backend="file:")
    for shelf in (one, other):
        shelf.put("a")
    with one, other:
        one.items += other.items
        other.count += one.count
    assert one.items == ["a", "a"] and other.count == 2 and other.items == ["a"]


def test_where_a_file_in_use_stays_removal_makes_the_lock_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: the next one finds a lock without a past, which is the one that others have open."""
    from coheld.backends import file

    bed = Lockable(lock_name="bed", lock_backend="file:")
    with bed:
        segment = bed.__lock__.segment
        bed.__lock__._flag(native.CREATED, True)
        with monkeypatch.context() as patched:
            patched.setattr(files, "IN_USE_STAYS", True)
            patched.setattr(file.os, "unlink", refuse)
            bed.__lock__.resource.retire(segment)
        assert bed.__lock__.flags == 0 and os.path.exists(segment.path)


def refuse(path: str) -> None:
    raise PermissionError(13, "used by another process", path)


STATE = """
import coheld
class Bed(coheld.Lockable):
    bookings: int = coheld.shared(0)
    queue: list[str] = coheld.shared(default_factory=list)
    def __create__(self): self.queue.append("first")
    @coheld.Lockable.locked(atomic=True)
    def book(self, who, fail=False):
        self.bookings += 1
        self.queue.append(who)
        if fail: raise KeyError
    @coheld.Lockable.locked(when=lambda self: self.queue, timeout=20)
    def next(self): return self.queue.pop(0)
    async def later(self): pass
bed = Bed(lock_name="bed")
try: bed.book("nobody", fail=True)
except KeyError: pass
bed.book("second")
print(bed.next(), bed.queue, coheld.snapshot(bed).bookings)
with bed: print(coheld.wait_for(bed, lambda: bed.queue, timeout=1))
from coheld.cli import main
main(["show", "bed"])
"""


@pytest.mark.parametrize("hidden", [WITHOUT, ""], ids=["without the extension", "beside it"])
def test_state_guards_and_show_work_on_files(hidden: str) -> None:
    said = procs.run(hidden + STATE, env=os.environ | {"COHELD_BACKEND": "file:"}).splitlines()
    assert said[:3] == ["first ['second'] 1", "['second']", "bed: 3 commits, 9 bytes, free"]


TASKS = """
import asyncio, coheld
class Bed(coheld.Lockable):
    @coheld.Lockable.locked
    async def book(self): return "booked"
    @coheld.Lockable.locked(exclusive=False)
    def look(self): return "looked"
bed, permits, pool = Bed(lock_name="bed"), coheld.Semaphore(2, "permits"), coheld.Pool(["a"], "pool")
async def main():
    async with bed, permits, pool.lease() as one:
        print(one, await bed.book(), bed.look(), permits.free(), pool.free())
asyncio.run(main())
print(bed.look(), permits.free(), pool.free())
assert coheld.holder(bed) is None and bed.acquire(False)
"""


@pytest.mark.parametrize("hidden", [WITHOUT, ""], ids=["without the extension", "beside it"])
def test_tasks_readers_permits_and_leases_work_on_files(hidden: str) -> None:
    said = procs.run(hidden + TASKS, env=os.environ | {"COHELD_BACKEND": "file:"}).splitlines()
    assert said == ["a booked looked 1 []", "looked 2 ['a']"]


@pytest.mark.parametrize("hidden", [WITHOUT, ""], ids=["without the extension", "beside it"])
def test_a_creation_that_raises_is_begun_anew_on_files(hidden: str) -> None:
    source = """
import coheld
class Bed(coheld.Lockable):
    tries = 0
    def __create__(self):
        Bed.tries += 1
        if Bed.tries == 1: raise OSError
try: Bed(lock_name="bed")
except OSError: pass
Bed(lock_name="bed"), Bed(lock_name="bed")
print(Bed.tries)
"""
    assert procs.run(hidden + source, env=os.environ | {"COHELD_BACKEND": "file:"}).strip() == "2"


def test_what_killed_processes_left_is_swept(coheld_dir: Path) -> None:
    source = (
        "import os; os.environ['COHELD_BACKEND'] = 'file:'\nimport coheld; one = coheld.Lockable(); one.acquire()\n"
    )
    with procs.program(source + "print(os.getpid()); input()") as killed:
        pid = killed.hear()
        killed.kill()
    assert [path.name.split("-")[1] for path in coheld_dir.glob("cells-*")] == [pid]
    procs.run(source)
    assert list(coheld_dir.iterdir()) == []


def test_both_backends_refuse_what_is_damaged(coheld_dir: Path) -> None:
    (coheld_dir / files.file_name("bed")).write_bytes(b"")
    os.chmod(coheld_dir / files.file_name("bed"), 0o600)
    with pytest.raises(IncompatibleError, match="damaged"):
        Lockable(lock_name="bed")


@pytest.mark.source_tree
@pytest.mark.hang_limit(300)
def test_it_installs_without_a_compiler_and_works(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", "/nonexistent/cc")
        wheel = environments.build(source, tmp_path)
    place = tmp_path / "installed"
    environments.run(sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--target", str(place), str(wheel))
    assert not list(place.rglob("*.so"))
    environment = {**os.environ, "PYTHONPATH": str(place), "COHELD_BACKEND": ""}
    command = [sys.executable, "-m", "coheld.testing", "contract/test_threads.py", "state/test_inside.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=delays.HANG, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"from {place}" in done.stdout and "backend file:" in done.stdout
