"""What holds for every test: a private segments directory, a hang limit, nothing left behind, a seed."""

import platform
import random
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import coheld
from coheld import mutex, native
from coheld._version import __version__
from coheld.backends import backend_of, base, default, file, files
from coheld.ledger import lost
from coheld.testing.support import delays, effort, hygiene, seeds, states
from coheld.testing.support.watchdog import Watchdog

watchdog_key = pytest.StashKey[Watchdog]()
WARNINGS = [
    "error",
    # Forking while threads run is what some tests are about.
    "ignore:This process .* is multi-threaded:DeprecationWarning",
]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "hang_limit(seconds): this test may take longer than support.delays.HANG")
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    files.boot_id()  # which is read once: an interrupt in the middle of that is a warning, and an error here
    hygiene.adopt_orphans()
    hygiene.stop_ignoring_signals()
    config.stash[watchdog_key] = Watchdog()


def pytest_unconfigure(config: pytest.Config) -> None:
    if watchdog_key in config.stash:
        config.stash[watchdog_key].close()


def pytest_report_header() -> list[str]:
    backend = default() + (f" ({native.missing})" if native.missing else "")
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return [
        f"coheld: {__version__} from {coheld.__path__[0]}, backend {backend}",
        f"python: {python}, libc {' '.join(platform.libc_ver())}",
        f"seed: COHELD_TEST_SEED={seeds.SEED}",
        f"delays x {delays.SCALE:g} (COHELD_TEST_SCALE), one of {effort.STRIDE} repetitions (COHELD_TEST_STRIDE)",
    ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    marker = item.get_closest_marker("hang_limit")
    watchdog = item.config.stash[watchdog_key]
    watchdog.arm(marker.args[0] * delays.SCALE if marker else delays.HANG, item.nodeid)
    try:
        return (yield)
    finally:
        watchdog.disarm()


def backends() -> list[Any]:
    """Those that this process can use."""
    return [file] if native.missing else [file, import_module("coheld.backends.shm")]


@pytest.fixture(autouse=True)
def coheld_dir(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Iterator[Path]:
    """The private segments directory of this test; every process it starts inherits it by COHELD_DIR."""
    with hygiene.private_directory() as directory:
        monkeypatch.setenv("COHELD_DIR", str(directory))
        for backend in backends():
            monkeypatch.setattr(backend._process, "arena", None)  # the next anonymous lock lands in this directory
        with hygiene.nothing_left(), _in_a_store(monkeypatch, pytestconfig):
            yield directory


@contextmanager
def _in_a_store(monkeypatch: pytest.MonkeyPatch, config: pytest.Config) -> Iterator[None]:
    """Where a store is asked for (COHELD_BACKEND), locks without a name are put there as well, by one that nobody else
    has: else most of the contract would be asked of this machine's memory.  Its threads end with the test, and each
    finds it empty."""
    url = default()
    if (backend := backend_of(url)).CAPABILITIES.files:
        yield
        return
    place = type(backend)
    by_name = place.semaphore
    monkeypatch.setattr(mutex, "_maker_of_anonymous", lambda: lambda _cls: mutex.named(_new_name()))
    monkeypatch.setattr(place, "semaphore", lambda self, name: by_name(self, name or _new_name()))
    _empty_store(url, config)
    base._handles.known.clear()  # of earlier tests, which are not collected yet: a name there says no directory
    yield
    states.wait_until(lambda: not (lost.numbers or lost.busy.locked()), "what was lost of pools is forgotten")
    import_module("coheld.roll").end()
    import_module("coheld.backends.sessions").end()
    import_module("coheld.backends.renewing").end()
    _empty_store(url, config)
    import_module("coheld.backends.engine").close()


def _new_name() -> str:
    return f"anonymous-{uuid.uuid4()}"


_emptied: set[str] = set()


class Hooks:
    """Of this plugin, for others."""

    @pytest.hookspec(firstresult=True)
    def pytest_coheld_locks(self, url: str) -> Iterator[str] | None:
        """The name of each lock at that URL, which is forgotten when the next is asked for; None: it is none of this
        backend, which is not coheld's own."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def _empty_store(url: str, config: pytest.Config) -> None:
    """Raises: AssertionError: if there are locks in it before the first test; they are somebody's."""
    emptied = url in _emptied
    for name in config.hook.pytest_coheld_locks(url=url) or _names_in(url):
        assert emptied, f"{url} has locks already, as {name}; give the tests a database of their own"
    _emptied.add(url)


def _names_in(url: str) -> Iterator[str]:
    """As Hooks has it, of coheld's own."""
    return _names_in_postgresql(url) if url.startswith("postgresql") else _names_in_redis(url)


def _names_in_redis(url: str) -> Iterator[str]:
    """And they are not there any more when the next one is asked for."""
    client = import_module("redis").Redis.from_url(import_module("coheld.backends.redis").Place(url).url)
    with closing(client):
        for name in client.scan_iter(match="coheld:*", count=1000):
            yield name
            client.delete(name)


def _names_in_postgresql(url: str) -> Iterator[str]:
    """The same."""
    psycopg = import_module("psycopg")
    conninfo = import_module("coheld.backends.postgresql").Place(url).conninfo
    with psycopg.connect(conninfo, autocommit=True) as client, suppress(psycopg.errors.UndefinedTable):
        for (name,) in client.execute("SELECT name FROM coheld.lock").fetchall():
            yield name
            client.execute("DELETE FROM coheld.lock WHERE name = %s", [name])


@pytest.fixture(autouse=True)
def rng(request: pytest.FixtureRequest) -> random.Random:
    """A generator for this test; the module `random` is seeded as well."""
    generator = seeds.for_test(request.node.nodeid)
    random.seed(generator.random())
    return generator
