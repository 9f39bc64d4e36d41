"""coheld run with a lock that a server has: what becomes of the command when the lock is lost."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.commands import COHELD, PYTHON, wait_for_line
from cli.commands import coheld as command
from coheld.backends import engine, renewing
from coheld.cli import exits
from coheld.testing.support import delays, states
from engines import servers
from engines.proxy import Proxy

LEASE = 0.9 * delays.SCALE
SOON = [sys.executable, "-c", "import sys; from coheld.cli import main, relay; relay.GRACE = 0.1; sys.exit(main())"]
TELLS = "import os, pathlib, sys, time; path = pathlib.Path(sys.argv[1]); path.write_text(f'{os.getpid()}\\n')\n"
STAYS = f"{TELLS}time.sleep({delays.HANG})"
TOLD = f"import signal; signal.signal(15, lambda *_: (path.write_text('told\\n'), sys.exit(7)))\n{TELLS}signal.pause()"
DEAF = f"import signal; signal.signal(15, signal.SIG_IGN)\n{TELLS}time.sleep({delays.HANG})"


@pytest.fixture
def proxy(valkey: servers.Valkey, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What is between the command and the server."""
    with Proxy(valkey.port) as proxy:
        monkeypatch.setenv("COHELD_BACKEND", f"redis://127.0.0.1:{proxy.port}/0?lease={LEASE}")
        yield proxy
        renewing.end()
        engine.close()


@contextmanager
def running(
    source: str, tells: Path, coheld: Sequence[str] = COHELD, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """The command runs when the block begins."""
    whole = [*coheld, "run", "job", "--", *PYTHON, source, str(tells)]
    with subprocess.Popen(whole, stderr=subprocess.PIPE, text=True, env=os.environ | environment) as runner:
        try:
            wait_for_line(tells)
            yield runner
        finally:
            runner.kill()


def forget(valkey: servers.Valkey) -> None:
    with valkey.client() as client:
        assert client.delete("coheld:{job}")


def test_it_is_told_to_end(valkey: servers.Valkey, proxy: Proxy, tmp_path: Path) -> None:
    with running(TOLD, tmp_path / "tells") as runner:
        forget(valkey)
        _, said = runner.communicate(timeout=delays.LONG)
        assert runner.returncode == exits.LOST and wait_for_line(tmp_path / "tells") == "told"
    assert said.startswith(f"coheld: 'job' at redis://127.0.0.1:{proxy.port}/0: the lease of {LEASE:g} s was lost")
    assert said.endswith("; the command is ended\n") and said.count("\n") == 1


@pytest.mark.parametrize("stopped", [False, True])
def test_one_that_does_not_end_is_killed(valkey: servers.Valkey, proxy: Proxy, tmp_path: Path, stopped: bool) -> None:
    with running(DEAF, tmp_path / "tells", SOON) as runner:
        pid = int(wait_for_line(tmp_path / "tells"))
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        forget(valkey)
        assert runner.wait(delays.LONG) == exits.LOST and states.task(pid) is None


def test_a_server_that_is_silent_for_a_lease(proxy: Proxy, tmp_path: Path) -> None:
    with running(STAYS, tmp_path / "tells") as runner:
        proxy.stall()
        assert runner.wait(delays.LONG) == exits.LOST
        assert runner.stderr is not None and "could not be renewed" in runner.stderr.read()


def test_a_loss_that_is_found_out_at_the_end(
    valkey: servers.Valkey, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COHELD_BACKEND", f"{valkey.url()}?lease=60")
    source = "import redis, sys; redis.Redis(port=int(sys.argv[1])).delete('coheld:{job}')"
    done = command("run", "job", "--", sys.executable, "-c", source, str(valkey.port))
    assert done.returncode == exits.LOST and done.stderr.endswith("; the command has run to its end\n"), done.stderr


def test_a_server_that_is_gone_at_the_end_does_not_spoil_what_is_done(proxy: Proxy, tmp_path: Path) -> None:
    path = tmp_path / "tells"
    source = f"import signal; signal.signal(10, lambda *_: sys.exit(7))\n{TELLS}signal.pause()"
    with running(source, path) as runner:
        proxy.refuse()
        os.kill(int(wait_for_line(path)), signal.SIGUSR1)
        _, said = runner.communicate(timeout=delays.LONG)
        assert runner.returncode == 7 and "cannot be reached" in said and "when its lease is over" in said


def test_signals_are_for_the_runner_and_not_for_the_threads_that_renew(proxy: Proxy, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    with running(STAYS, first / "tells", COHELD_DIR=str(first)) as there:  # on another host
        waits = subprocess.Popen([*COHELD, "run", "job", "--", *PYTHON, STAYS, str(second)])
        states.wait_until(lambda: len(tasks(waits.pid)) > 1, "it has a thread that waits for news")
        there.terminate()
    try:
        wait_for_line(second)
        others = [tid for tid in tasks(waits.pid) if tid != waits.pid]
        wanted = {signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD, signal.SIGCONT}
        assert len(others) >= 2 and all(wanted <= blocked(waits.pid, tid) for tid in others)
        for number in (signal.SIGCONT, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM) * 50:
            os.kill(waits.pid, number)
        assert waits.wait(delays.LONG) - 128 in {signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM}
    finally:
        waits.kill()
        waits.wait()


def tasks(pid: int) -> list[int]:
    return sorted(map(int, os.listdir(f"/proc/{pid}/task")))


def blocked(pid: int, tid: int) -> set[int]:
    [line] = [one for one in Path(f"/proc/{pid}/task/{tid}/status").read_text().splitlines() if "SigBlk" in one]
    mask = int(line.split()[1], 16)
    return {number for number in signal.valid_signals() if mask >> number - 1 & 1}


def test_it_is_renewed_and_given_back_and_the_next_host_has_it(valkey: servers.Valkey, proxy: Proxy) -> None:
    assert command("run", "job", "--", "sleep", str(1.5 * LEASE)).returncode == 0
    with valkey.client() as client:
        assert not client.hexists("coheld:{job}", "g")
    inner = [*COHELD, "run", "--no-wait", "job", "true"]
    done = command("run", "job", "--", *inner)
    assert done.returncode == exits.FAILED and "held by an ancestor" in done.stderr
