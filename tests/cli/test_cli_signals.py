"""coheld run and signals: passed on, never twice, and the runner follows its command, never ahead of it."""

import os
import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from cli.commands import COHELD, PYTHON, Terminal, can_be_had, really_gone
from coheld import Lockable, holder
from coheld.cli import relay
from coheld.testing.support import procs, states

# Prints the names of the signals it gets; ends with status 9 at SIGALRM.
LISTENER = """
import os, signal, sys
def heard(number, frame):
    name = signal.Signals(number).name if number < 32 else str(number)
    os.write(1, name.encode() + b"\\n")
    if number == signal.SIGALRM:
        os._exit(9)
for number in map(int, sys.argv[1:]):
    signal.signal(number, heard)
signal.signal(signal.SIGALRM, heard)
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""

PASSED_ON = [
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH),
    *(signal.SIGCONT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGABRT, signal.SIGPIPE, signal.SIGURG),
    *(signal.SIGPWR, signal.SIGIO, signal.SIGVTALRM, signal.SIGPROF, signal.SIGXCPU, signal.SIGRTMIN, signal.SIGRTMAX),
]


@pytest.fixture
def running() -> Iterator[procs.ProgramWorker]:
    """A runner, and under it a listener that tells of every signal."""
    command = [*PYTHON, LISTENER, *(str(int(number)) for number in PASSED_ON)]
    with procs.command([*COHELD, "run", "name", *command]) as runner:
        runner.expect("ready")
        yield runner
        runner.signal(signal.SIGALRM)
        runner.expect("SIGALRM")
        runner.end(9)


@pytest.mark.parametrize("number", PASSED_ON, ids=lambda number: number.name)
def test_a_signal_to_the_runner_is_passed_on_once(running: procs.ProgramWorker, number: signal.Signals) -> None:
    running.signal(number)
    running.expect(number.name if number < 32 else str(int(number)))


def test_every_signal_that_can_be_passed_on_is() -> None:
    assert set(PASSED_ON) <= relay.PASSED_ON
    assert {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGSEGV}.isdisjoint(relay.PASSED_ON)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_the_runner_reports_what_the_signal_did(number: signal.Signals) -> None:
    with procs.command([*COHELD, "run", "name", "sh", "-c", "echo ready; exec sleep 1000"]) as runner:
        runner.expect("ready")
        runner.signal(number)
        runner.end(128 + number)
    assert can_be_had(Lockable(lock_name="name"))


def test_the_runner_outlives_a_command_that_takes_its_time() -> None:
    """SIGTERM ends the command when that likes; until then the lock is held."""
    source = "trap 'echo asked; read line; exit 4' TERM; echo ready; while :; do sleep 0.01; done"
    lock = Lockable(lock_name="name")
    with procs.command([*COHELD, "run", "name", "sh", "-c", source]) as runner:
        runner.expect("ready")
        runner.signal(signal.SIGTERM)
        runner.expect("asked")
        owner = holder(lock)
        assert owner is not None
        assert owner.pid == runner.pid
        runner.tell("end now")
        runner.end(4)
    assert can_be_had(lock)


def test_a_stopped_command_does_not_stop_the_runner_without_a_terminal() -> None:
    """SIGSTOP and SIGCONT to the command alone, as cpulimit does it: nobody would continue the runner."""
    with procs.command([*COHELD, "run", "name", "sh", "-c", "echo $$; read line; exit 5"]) as runner:
        command = int(runner.hear())
        os.kill(command, signal.SIGSTOP)
        states.wait_until(lambda: states.stopped(command), "the command stands still")
        os.kill(command, signal.SIGCONT)
        runner.tell("end now")
        runner.end(5)


# ---- before the command runs -----------------------------------------------------------------------------------------


def run_with_signals_before(link: procs.Link, number: int, when: str) -> int:
    """A runner that is sent the signal by itself just after it began to hold signals back, or just after the fork."""
    from coheld.cli import main, run

    if when == "before the fork":
        original = relay.block

        def block() -> set[int]:
            mask = original()
            os.kill(os.getpid(), number)
            return mask

        relay.block = block
    else:
        fork = run._fork

        def forked(command: list[str], mask: set[int]) -> tuple[int, int]:
            made = fork(command, mask)
            os.kill(os.getpid(), number)
            return made

        run._fork = forked
    return main(["run", "name", "sh", "-c", "exit 0"])


@pytest.mark.parametrize("when", ["before the fork", "after the fork"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_command_runs_is_not_lost(number: signal.Signals, when: str) -> None:
    with procs.start(run_with_signals_before, number, when) as runner:
        assert runner.result() == 128 + number
    assert can_be_had(Lockable(lock_name="name"))


# ---- on a terminal ---------------------------------------------------------------------------------------------------


def listener(*signals: int) -> list[str]:
    return [*COHELD, "run", "name", *PYTHON, LISTENER, *(str(int(number)) for number in signals)]


def check_heard_once(terminal: Terminal, cause: Callable[[], None], number: signal.Signals) -> None:
    """What the terminal sends both reaches the command at once, and is not sent again by a runner that is late."""
    terminal.expect("ready")
    os.kill(terminal.job, signal.SIGSTOP)
    states.wait_until(lambda: states.stopped(terminal.job), "the runner stands still")
    cause()
    terminal.expect(number.name)
    os.kill(terminal.job, signal.SIGCONT)
    os.kill(terminal.job, signal.SIGALRM)
    terminal.expect("SIGALRM")
    assert terminal.news() == "ended 9"
    assert number.name not in terminal.before


@pytest.mark.parametrize(("key", "number"), [("\x03", signal.SIGINT), ("\x1c", signal.SIGQUIT)], ids=["^C", "^\\"])
def test_a_key_reaches_the_command_once(key: str, number: signal.Signals) -> None:
    with Terminal(listener(number)) as terminal:
        check_heard_once(terminal, lambda: terminal.type(key), number)


def test_a_new_window_size_reaches_the_command_once() -> None:
    with Terminal(listener(signal.SIGWINCH)) as terminal:
        check_heard_once(terminal, lambda: terminal.resize(30, 100), signal.SIGWINCH)


def test_a_key_before_there_is_a_command_reaches_it() -> None:
    """The terminal has sent it to the runner, which is about to fork."""
    source = """
import os, signal, sys
from coheld.cli import main, relay
block = relay.block
def block_and_wait():
    mask = block()
    os.write(1, b"about to fork\\n")
    while signal.SIGINT not in signal.sigpending():
        pass
    return mask
relay.block = block_and_wait
sys.exit(main(["run", "name", "sleep", "1000"]))
"""
    with Terminal([sys.executable, "-c", source]) as terminal:
        terminal.expect("about to fork")
        terminal.type("\x03")
        assert terminal.news() == f"ended {128 + signal.SIGINT}"


def test_ctrl_c_ends_the_command_and_then_the_runner() -> None:
    with Terminal([*COHELD, "run", "name", "sh", "-c", "echo ready; exec sleep 1000"]) as terminal:
        terminal.expect("ready")
        terminal.type("\x03")
        assert terminal.news() == f"ended {128 + signal.SIGINT}"
    assert can_be_had(Lockable(lock_name="name"))


def test_a_command_that_ignores_ctrl_c_keeps_its_runner_and_the_lock() -> None:
    source = "trap '' INT; echo ready; read line; echo $line; exit 6"
    with Terminal([*COHELD, "run", "name", "sh", "-c", source]) as terminal:
        terminal.expect("ready")
        terminal.type("\x03")
        terminal.expect("^C")
        owner = holder(Lockable(lock_name="name"))
        assert owner is not None
        assert owner.pid == terminal.job
        terminal.type("still here\n")
        terminal.expect("still here")
        assert terminal.news() == "ended 6"


def test_ctrl_c_while_waiting_for_the_lock() -> None:
    with procs.command([*COHELD, "run", "name", "sh", "-c", "echo inside; read line"]) as other:
        other.expect("inside")
        with Terminal([*COHELD, "run", "name", "echo", "ran"]) as terminal:
            states.wait_until_blocked(terminal.job)
            terminal.type("\x03")
            assert terminal.news() == f"ended {-signal.SIGINT}"
            assert "ran" not in terminal.screen
        other.tell("go on")


def test_ctrl_z_stops_the_job_and_the_shell_continues_it() -> None:
    source = "echo ready; read line; echo heard $line; exit 3"
    with Terminal([*COHELD, "run", "name", "sh", "-c", source]) as terminal:
        terminal.expect("ready")
        (command,) = states.children(terminal.job)
        for _ in range(20):  # a stop just after a start must not be undone by the SIGCONT that the runner passes on
            terminal.type("\x1a")
            assert terminal.news() == "stopped SIGTSTP"
            states.wait_until(lambda: states.stopped(command), "the command is stopped, too")
            assert states.stopped(terminal.job)
            owner = holder(Lockable(lock_name="name"))
            assert owner is not None
            assert owner.pid == terminal.job
            terminal.foreground()
            states.wait_until(lambda: not states.stopped(terminal.job), "the runner goes on")
            states.wait_until(lambda: not states.stopped(command), "the command goes on")
        terminal.type("you\n")
        terminal.expect("heard you")
        assert terminal.news() == "ended 3"


def test_a_command_that_handles_ctrl_z_decides() -> None:
    with Terminal(listener(signal.SIGTSTP)) as terminal:
        terminal.expect("ready")
        terminal.type("\x1a")
        terminal.expect("SIGTSTP")
        assert not states.stopped(terminal.job)
        os.kill(terminal.job, signal.SIGALRM)
        assert terminal.news() == "ended 9"


def test_sigtstp_to_the_runner_alone_stops_both() -> None:
    with Terminal([*COHELD, "run", "name", "sh", "-c", "echo ready; read line; exit 3"]) as terminal:
        terminal.expect("ready")
        (command,) = states.children(terminal.job)
        os.kill(terminal.job, signal.SIGTSTP)
        assert terminal.news() == "stopped SIGTSTP"
        assert states.stopped(command)
        terminal.foreground()
        terminal.type("go on\n")
        assert terminal.news() == "ended 3"


def test_a_background_read_stops_the_job() -> None:
    """SIGTTIN goes to the whole group; the shell must see the runner stop."""
    source = "trap '' HUP; echo ready; kill -TSTP $$; read line; echo heard $line; exit 3"
    with Terminal([*COHELD, "run", "name", "sh", "-c", source]) as terminal:
        terminal.expect("ready")
        assert terminal.news() == "stopped SIGTSTP"
        terminal.background()
        assert terminal.news() == "stopped SIGTTIN"
        terminal.foreground()
        terminal.type("you\n")
        terminal.expect("heard you")
        assert terminal.news() == "ended 3"


def test_a_command_in_a_group_of_its_own_gets_what_the_terminal_sends_the_runner() -> None:
    """An interactive shell does that. Here the runner's group stays in the foreground."""
    source = f"import os, sys; os.setpgid(0, 0); sys.argv[1:1] = []\n{LISTENER}"
    job = [*COHELD, "run", "name", *PYTHON, source, str(int(signal.SIGINT))]
    with Terminal(job) as terminal:
        terminal.expect("ready")
        terminal.type("\x03")
        terminal.expect("SIGINT")
        os.kill(terminal.job, signal.SIGALRM)
        assert terminal.news() == "ended 9"


def test_a_terminal_that_hangs_up_reaches_a_command_whose_runner_leads_the_session() -> None:
    """As under ssh: the kernel sends SIGHUP to the leader alone."""
    master, slave = os.openpty()
    source = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    job = [*PYTHON, source, *COHELD, "run", "name", "sh", "-c", "echo ready $$ >&2; exec sleep 1000"]
    read, write = os.pipe()
    with procs.command(job, start_new_session=True, preexec_fn=lambda: os.dup2(slave, 0), stderr=write) as runner:
        os.close(slave)
        os.close(write)
        command = int(os.read(read, 100).split()[1])
        os.close(master)
        runner.end(128 + signal.SIGHUP)
    assert really_gone(command)
    os.close(read)
