"""A backend of another distribution is found by its entry point: the one of docs/howto/backends.md, and bad ones."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import coheld
from cli.commands import coheld as command
from coheld import IncompatibleError, Lockable, LockTimeout, shared
from coheld.backends import _of_others, backend_of, engine, renewing
from coheld.testing.support import hygiene, procs

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "backends.md"
FILES = re.compile(r"<!-- file: (\S+) -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
Install = Callable[..., None]


class Bed(Lockable):
    bookings: int = shared(0)

    @Lockable.locked
    def book(self) -> int:
        self.bookings += 1
        return self.bookings

    @Lockable.locked(timeout=0)
    def try_once(self) -> None:
        raise AssertionError


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution where this process, and those that it starts, look for them."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    before = set(sys.modules)

    def put(name: str, entry: str, **modules: str) -> None:
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[coheld.backends]\n{entry}\n")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)

    yield put
    renewing.end()
    engine.close()
    _of_others.cache_clear()
    for module in {"coheld_sqlite", "bad"} & set(sys.modules) - before:
        del sys.modules[module]


@pytest.fixture
def url(install: Install, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of the backend of that page, which is installed."""
    modules = {name.removesuffix(".py"): source for name, source in FILES.findall(PAGE.read_text())}
    install("coheld-sqlite", "sqlite = coheld_sqlite:engine", **modules)
    with hygiene.private_directory() as directory:
        monkeypatch.setenv("COHELD_BACKEND", f"sqlite://{directory}/db?lease=5")
        yield f"sqlite://{directory}/db"


def book_and_keep(link: procs.Link) -> None:
    bed = Bed(lock_name="bed")
    with bed:
        link.say(bed.book())
        link.wait_for("end")


def test_it_is_found_and_has_all_of_a_lock(url: str) -> None:
    bed = Bed(lock_name="bed", lock_backend=url)
    assert [bed.book(), bed.book()] == [1, 2] and Bed(lock_name="bed").bookings == 2
    with bed:
        first = coheld.token(bed)
    with procs.start(book_and_keep) as other:
        other.expect(3)
        with pytest.raises(LockTimeout, match=rf"'bed' at {url}: .*held by process {other.pid}"):
            bed.try_once()
        other.kill()
    with bed:  # of this host: at once
        assert coheld.token(bed) > first and coheld.statistics(bed).recoveries == 1
    assert pickle.loads(pickle.dumps(bed)).__lock__ is bed.__lock__


def test_commands_have_it(url: str) -> None:
    Bed(lock_name="bed").book()
    assert json.loads(command("show", "--json", "bed").stdout)["fields"]["bookings"]["value"] == 1
    done = command("run", "bed", "--", sys.executable, "-c", "print('ran')")
    assert (done.stdout, done.returncode) == ("ran\n", 0)
    assert f"bed at {url}" in command("ps").stdout
    assert command("rm", "bed").returncode == 0 and command("show", "bed").returncode == 1


def test_the_contract_runs_on_it(url: str, tmp_path: Path) -> None:
    parts = ["contract/test_capabilities.py", "-k", "declared and not sleeps"]
    whole = [sys.executable, "-m", "coheld.testing", "-q", "-p", "empties_sqlite", *parts]
    done = subprocess.run(whole, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and re.search(r"^[1-9]\d* passed", done.stdout, re.MULTILINE), done.stdout
    Bed(lock_name="bed").book()
    done = subprocess.run(whole, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode and "has locks already, as bed" in done.stdout
    assert Bed(lock_name="bed").bookings == 1


WRONG = {
    "cannot be imported": ("x = bad:engine", "import nosuch", r"cannot be imported, as bad:engine: ModuleNot.*nosuch"),
    "has no such name": ("x = bad:engine", "", r"cannot be imported, as bad:engine: AttributeError"),
    "raises": ("x = bad", "1 / 0", r"cannot be imported, as bad: ZeroDivisionError"),
    "is something else": ("x = bad", "def at(url): ...", r"is none: bad has no Mutex, anonymous, resource"),
    "cannot be at a URL": ("x = bad", "Mutex = anonymous = resource = 1", r"is none: bad has no named, existing, sem"),
    "has another scheme": ("x = coheld.backends.redis:engine", "", r"is one for redis: and its entry point has an"),
}


@pytest.mark.parametrize("which", WRONG)
def test_one_that_is_none_is_refused_by_name(install: Install, which: str) -> None:
    entry, source, message = WRONG[which]
    install("bad-one", entry, bad=source)
    for _ in range(2):
        with pytest.raises(IncompatibleError, match=rf"the backend for x: of bad-one .*{message}"):
            Lockable(lock_name="bed", lock_backend="x://host")


def test_of_two_none_is_taken(install: Install) -> None:
    for name in ("bad-one", "bad-two"):
        install(name, f"x = {name[4:]}:engine")
    with pytest.raises(IncompatibleError, match=r"for x: of bad-\w+ and of bad-\w+: one of them can be installed"):
        backend_of("x://host")


def test_what_is_not_there_is_told_with_what_is(install: Install) -> None:
    install("coheld-x", "x = bad:engine\nshm = bad:engine\nredis = bad:engine")
    with pytest.raises(ValueError, match=r"no backend for 'y:'; known: shm:, file:, redis:, .*, x:$") as raised:
        Lockable(lock_name="bed", lock_backend="y://u:SECRET@host")
    assert "SECRET" not in str(raised.value)
    with Lockable(lock_name="bed", lock_backend="shm:") as bed:  # our own are not replaced
        assert bed.__lock__.resource.scheme == "shm"


def test_a_pickle_of_one_that_is_missing_here_fails_at_its_first_call(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = pickle.dumps(Lockable(lock_name="bed")).hex()
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.delenv("COHELD_BACKEND")
    source = (
        "import pickle, coheld\n"
        f"lock = pickle.loads(bytes.fromhex({raw!r}))\n"
        "try: lock.acquire()\n"
        "except coheld.IncompatibleError as error: print(error)\n"
        "pickle.loads(pickle.dumps(lock))"
    )
    assert "a lock of sqlite: cannot be used here: no backend for 'sqlite:'; known: shm:" in procs.run(source)
