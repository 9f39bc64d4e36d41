"""coheld demo: kills that are real, books that come out exact, and that would not if the lock were broken."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cli.commands import COHELD, Terminal, coheld
from coheld import holder, statistics
from coheld.cli import exits, testbed
from coheld.cli.report import DeviceResult, Report, WorkerResult
from coheld.testing.support import delays, procs, states

BRIEF = ["demo", "--seconds", "1.5", "--workers", "4", "--devices", "2"]


def totals(output: str) -> list[int]:
    """Calls made and counted, holders killed, recoveries: the row of sums of the end table."""
    row = re.search(r"^\s*all\s+([\d,]+)\s+([\d,]+)\s+exact\s+(\d+)\s+(\d+)", output, re.MULTILINE)
    assert row, output
    return [int(cell.replace(",", "")) for cell in row.groups()]


def test_the_books_are_exact_after_kills(coheld_dir: Path) -> None:
    done = coheld(*BRIEF, "--kills", "6")
    assert (done.returncode, done.stderr) == (0, "")
    made, counted, kills, recoveries = totals(done.stdout)
    assert made == counted > 50
    assert kills == recoveries == 6
    assert done.stdout.count("SIGKILL w") == done.stdout.count("recovered router by ") + done.stdout.count(
        "recovered switch by "
    )
    shares = [float(text) for text in re.findall(r"^w\d+ .* ([\d.]+) %", done.stdout, re.MULTILINE)]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert re.search(r"longest wait [\d,]+ ms", done.stdout)
    assert list(coheld_dir.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ["--workers", "1", "--devices", "1", "--kills", "3"],
        ["--workers", "3", "--devices", "10", "--kills", "0"],
        ["--workers", "8", "--devices", "1", "--kills", "20"],
    ],
    ids=" ".join,
)
def test_any_size(options: list[str], coheld_dir: Path) -> None:
    done = coheld("demo", "--seconds", "1", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    made, counted, kills, recoveries = totals(done.stdout)
    assert made == counted > 0
    assert kills == recoveries == int(options[-1])
    assert list(coheld_dir.iterdir()) == []


def test_it_shows_who_holds_what() -> None:
    done = coheld(*BRIEF, "--kills", "0")
    assert done.stdout.startswith("coheld demo: 4 workers share 2 devices for 1.5 s\n")
    assert f"backend shm, {os.environ['COHELD_DIR']}" in done.stdout
    assert re.search(r"1\.\d s  router: (w\d in \w+|free), \d waiting, [\d,]+ calls \| switch: ", done.stdout)


@pytest.mark.parametrize("backend", ["redis", "postgresql"])
def test_on_a_server_that_it_starts(coheld_dir: Path, backend: str) -> None:
    done = coheld(*BRIEF, "--kills", "2", "--backend", backend)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"backend {backend}://127.0.0.1:" in done.stdout
    made, counted, kills, recoveries = totals(done.stdout)
    assert made == counted > 0
    assert kills == recoveries == 2


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("nosuch:", "no backend for 'nosuch:'; known: shm:, file:, redis:, rediss:, postgresql:"),
        ("redis://lab:SECRET@host/x", "the URL of a redis: backend must be redis://host:port/database"),
    ],
)
def test_on_no_backend_at_all(url: str, complaint: str) -> None:
    done = coheld(*BRIEF, "--backend", url)
    assert (done.returncode, done.stdout) == (exits.FAILED, "")
    assert done.stderr == f"coheld: {complaint}\n"


# ---- it would tell ---------------------------------------------------------------------------------------------------


def demo_with_unlocked_devices(link: procs.Link) -> int:
    """The same demo, with methods that are not locked."""
    from coheld.cli import main

    for name in ("ping", "configure", "reboot"):
        setattr(testbed.Device, name, getattr(testbed.Device, name).__wrapped__)
    return main([*BRIEF, "--kills", "0"])


def test_without_the_lock_calls_are_lost(capfd: pytest.CaptureFixture[str]) -> None:
    with procs.start(demo_with_unlocked_devices) as demo:
        assert demo.result() == 1
    output = capfd.readouterr().out
    assert "WRONG" in output
    assert "NOT" in output


@pytest.mark.parametrize(
    ("made", "counted", "mishaps", "exact", "good"),
    [(5, 5, (), True, True), (5, 4, (), False, False), (4, 5, (), False, False), (5, 5, ("w1 failed",), True, False)],
)
def test_a_report_is_good_only_if_all_is(
    made: int, counted: int, mishaps: tuple[str, ...], exact: bool, good: bool
) -> None:
    devices = (DeviceResult("router", made, counted, 0, 0), DeviceResult("switch", 7, 7, 0, 0))
    report = Report(devices, (WorkerResult("w1", made + 7, 0, 0.0),), mishaps)
    assert (report.exact, report.good) == (exact, good)


def test_two_wrong_devices_do_not_make_a_right_sum() -> None:
    devices = (DeviceResult("router", 5, 4, 0, 0), DeviceResult("switch", 4, 5, 0, 0))
    assert not Report(devices, (WorkerResult("w1", 9, 0, 0.0),), ()).exact


def call_killed_at(link: procs.Link, board: testbed.Board, sleep: int) -> None:
    """Make calls, and be killed in the sleep-th pause of a device: two are in each call."""
    pauses = 0

    def pause(_: object) -> None:
        nonlocal pauses
        pauses += 1
        if pauses == sleep:
            os.kill(os.getpid(), signal.SIGKILL)

    time.sleep = pause
    worker = testbed.Worker(1, board)
    device = testbed.Device("router", 0, board, worker)
    while True:
        worker.call(device, "ping")


@pytest.mark.parametrize(("pause", "calls"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
def test_a_call_cut_short_is_taken_back(pause: int, calls: int) -> None:
    board = testbed.Board(devices=1, workers=2)
    device = testbed.Device("router", 0, board, testbed.Worker(0, board))
    with procs.start(call_killed_at, board, pause) as worker:
        worker.end(-signal.SIGKILL)
    half_done = pause % 2 == 0
    assert (board.counted[0], board.made[1, 0]) == (calls + half_done, calls)
    device.ping(testbed.Worker(0, board))
    assert (board.counted[0], board.made[1, 0], board.made[0, 0]) == (calls + 1, calls, 1)
    assert statistics(device).recoveries == 1


# ---- ends ------------------------------------------------------------------------------------------------------------


def start_demo(*options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([*COHELD, "demo", "--seconds", "1000", *options], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_ended_early_it_clears_up(number: signal.Signals, coheld_dir: Path) -> None:
    with start_demo("--kills", "500") as demo:
        states.wait_until(lambda: len(states.children(demo.pid)) == 6, "the workers are there")
        workers = states.children(demo.pid)
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=delays.LONG)
    assert demo.returncode == 128 + number
    made, counted, *_ = totals(output)
    assert made == counted
    assert all(states.gone(worker) for worker in workers)
    assert list(coheld_dir.iterdir()) == []


def test_killed_its_workers_die_too() -> None:
    with start_demo() as demo:
        states.wait_until(lambda: len(states.children(demo.pid)) == 6, "the workers are there")
        workers = states.children(demo.pid)
        demo.kill()
    states.wait_until(lambda: all(states.gone(worker) for worker in workers), "the workers are gone")


def test_a_worker_killed_by_somebody_else_is_replaced() -> None:
    with start_demo("--kills", "0") as demo:
        states.wait_until(lambda: len(states.children(demo.pid)) == 6, "the workers are there")
        victim = states.children(demo.pid)[0]
        os.kill(victim, signal.SIGKILL)
        states.wait_until(
            lambda: len(set(states.children(demo.pid)) - {victim}) == 6, "there is another worker in its place"
        )
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=delays.LONG)
    assert "was killed by SIGKILL, not by this demo" in output
    made, counted, *_ = totals(output)
    assert made == counted


# ---- on a terminal ---------------------------------------------------------------------------------------------------


def test_live_on_a_terminal(coheld_dir: Path) -> None:
    with Terminal([*COHELD, *BRIEF, "--kills", "3"]) as terminal:
        for text in ("coheld demo: 4 workers share 2 devices", "held by", "3 of 3 killed", "holders killed"):
            terminal.expect(text)
        assert terminal.news() == "ended 0"
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.screen)
        made, counted, kills, recoveries = totals(plain)
    assert made == counted
    assert kills == recoveries == 3
    assert list(coheld_dir.iterdir()) == []


def test_ctrl_c_on_a_terminal(coheld_dir: Path) -> None:
    with Terminal([*COHELD, "demo", "--seconds", "1000"]) as terminal:
        terminal.expect("held by")
        terminal.type("\x03")
        assert terminal.news() == f"ended {128 + signal.SIGINT}"
        terminal.expect("counted")
    assert list(coheld_dir.iterdir()) == []


def test_plain_on_a_terminal_if_asked_for() -> None:
    with Terminal([*COHELD, *BRIEF, "--kills", "0", "--plain"]) as terminal:
        assert terminal.news() == "ended 0"
        assert "\x1b" not in terminal.screen
        assert "exact" in terminal.screen


def test_without_rich_it_says_so_and_goes_on() -> None:
    source = "import sys; sys.modules['rich'] = None; from coheld.cli import main; sys.exit(main(sys.argv[1:]))"
    with Terminal([COHELD[0], "-c", source, *BRIEF, "--kills", "0"]) as terminal:
        assert terminal.news() == "ended 0"
        assert "coheld: no live display" in terminal.screen
        assert "pip install 'coheld[cli]'" in terminal.screen
        assert "exact" in terminal.screen


def test_others_see_the_devices_by_name() -> None:
    with start_demo("--kills", "0") as demo:
        states.wait_until(lambda: len(states.children(demo.pid)) == 6, "the workers are there")
        board = testbed.Board(devices=1, workers=1)
        router = testbed.Device(f"demo-{demo.pid}/router", 0, board, testbed.Worker(0, board))
        owner = states.wait_until(lambda: holder(router), "somebody holds the router")
        assert owner is not None
        assert owner.pid in states.children(demo.pid)
        assert owner.method.startswith("Device.")
        assert owner.since <= time.monotonic()
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=delays.LONG)
