"""A short run of what engines/prove.py does for as long as one likes; and that it finds a lock which does not fence."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from coheld.backends import engine as engines
from coheld.backends import renewing
from coheld.testing.support import procs, seeds
from engines import prove, servers
from engines.histories import INITIAL, Contradiction, Recorder, check, load
from engines.proxy import Proxy
from engines.registers import REGISTERS


@pytest.fixture(autouse=True)
def _end_threads() -> Iterator[None]:
    yield
    renewing.end()
    engines.close()


@pytest.mark.parametrize(
    ("engine", "register", "runs"), [("valkey", "fenced", 1), ("valkey", "coheld", 2), ("postgresql", "coheld", 2)]
)
def test_clients_under_faults(engine: str, register: str, runs: int) -> None:
    report = prove.prove(engine, register, seeds=runs, seed=seeds.SEED)
    assert report.runs == runs and report.outcomes["ok"] and report.faults.total() == runs * prove.FAULTS, report


def stopped_inside(link: procs.Link, register: str, url: str, directory: Path) -> str:
    subject = prove.on_host(directory, register, url)

    def work() -> None:
        link.say("inside")
        link.wait_for("go on")

    with Recorder(directory, 1) as recorder:
        return prove.commit(recorder, subject, work)


@pytest.mark.parametrize(
    ("register", "outcome", "expectation"),
    [
        ("coheld", "lost", nullcontext()),
        ("fenced", "lost", nullcontext()),
        ("unfenced", "ok", pytest.raises(Contradiction, match="an update is lost")),
    ],
)
def test_a_client_that_is_stopped_beyond_its_lease(
    valkey: servers.Valkey, tmp_path: Path, register: str, outcome: str, expectation: object
) -> None:
    with procs.start(stopped_inside, register, valkey.url(), tmp_path) as client:
        client.expect("inside")
        client.stop()
        with Recorder(tmp_path, 2) as recorder:
            assert prove.commit(recorder, REGISTERS[register](valkey.url())) == "ok"
        client.tell("go on")
        client.cont()
        assert client.result() == outcome
    with expectation:
        check(load(tmp_path))


def test_a_commit_whose_reply_is_lost(valkey: servers.Valkey, tmp_path: Path) -> None:
    with Proxy(valkey.port) as proxy, Recorder(tmp_path, 1) as recorder:
        subject = REGISTERS["fenced"](f"redis://127.0.0.1:{proxy.port}")
        proxy.lose_reply(b"fenced")
        assert prove.commit(recorder, subject) == "unknown"
        assert proxy.lost == 1 and subject.read() != INITIAL
        prove.read(recorder, subject)
        assert prove.commit(recorder, subject) == "ok"
    history = load(tmp_path)
    check(history)
    assert history.commits[1].read == history.commits[0].written == history.reads[0].value
