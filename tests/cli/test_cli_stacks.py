"""coheld ps --stack: what those who have a lock do now, said by their own processes; no other process is touched."""

import asyncio
import ctypes
import functools
import json
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

import coheld
from cli import commands
from coheld import Lockable, Semaphore, stacks
from coheld.process import start_of
from coheld.testing.support import delays, procs, states

BACKENDS = ["shm:", "file:"]
OFF = "it does not show them: COHELD_STACKS=1"


class Router(Lockable):
    @Lockable.locked
    def configure(self, link: procs.Link) -> None:
        talk(link)

    @Lockable.locked(exclusive=False)
    def read(self, link: procs.Link) -> None:
        talk(link)

    @Lockable.locked
    async def reload(self, link: procs.Link) -> None:
        await asyncio.get_running_loop().run_in_executor(None, talk, link)


def talk(link: procs.Link) -> None:
    link.say("in")
    link.wait_for("leave")


def hold(link: procs.Link, name: str | None, backend: str = "shm:", on: bool = True) -> None:
    if on:
        stacks.serve()
    router = Router(lock_name=name, lock_backend=backend)
    thread = threading.Thread(target=router.configure, args=(link,), name="configurer")
    thread.start()
    thread.join()


def hold_by_task(link: procs.Link, name: str | None, backend: str | None) -> None:
    stacks.serve()

    async def main() -> None:
        bystander = asyncio.create_task(asyncio.Event().wait(), name="bystander")
        router = Router(lock_name=name, lock_backend=backend)
        await asyncio.create_task(router.reload(link), name="reloader")
        bystander.cancel()

    asyncio.run(main())


def shown(name: str, status: int = 0) -> str:
    done = commands.coheld("ps", "--stack", name)
    assert (done.returncode, done.stderr) == (status, "")
    return done.stdout


def socket_of(pid: int, directory: Path) -> Path:
    return directory / f"stacks-{pid}-{start_of(pid)}"


# ---- who has it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_stack_of_the_thread_that_holds_it_comes_first(backend: str) -> None:
    with procs.start(hold, "lab/r1", backend) as holder:
        holder.expect("in")
        head, first, *rest = shown("lab/r1").splitlines()
        assert head.startswith(f"lab/r1: held by process {holder.pid} (") and " in Router.configure for " in head
        assert first.startswith("thread configurer (") and first.endswith("), which holds it:")
        own = rest[: next(number for number, line in enumerate(rest) if line.startswith("thread "))]
        assert any(line.endswith(", in Router.configure") for line in own) and "    talk(link)" in own
        assert "thread MainThread" in "\n".join(rest) and "    thread.join()" in rest
        holder.tell("leave")


@pytest.mark.parametrize(("name", "backend"), [*(("r1", backend) for backend in BACKENDS), (None, None)])
def test_the_stack_of_the_task_that_holds_it_comes_first(name: str | None, backend: str | None) -> None:
    with procs.start(hold_by_task, name, backend) as holder:
        holder.expect("in")
        (found,) = [one for one in coheld.resources() if one.holder]
        _, first, *rest = shown(found.called).splitlines()
        assert first == "task reloader, which holds it:"
        end = next(number for number, line in enumerate(rest) if line.startswith("thread "))
        assert any(line.endswith(", in Router.reload") for line in rest[:end])
        assert "task bystander:" in rest and any(line.startswith("thread MainThread ") for line in rest)
        holder.tell("leave")


def compute(link: procs.Link) -> None:
    stacks.serve()

    async def inner() -> None:
        with Router(lock_name="r1"):
            talk(link)

    async def main() -> None:
        await asyncio.create_task(inner(), name="computer")

    asyncio.run(main())


def test_a_task_that_runs_has_the_stack_of_its_thread() -> None:
    with procs.start(compute) as holder:
        holder.expect("in")
        text = shown("r1")
        own = text[: text.index("\nthread ")]
        assert "\ntask computer, running, which holds it:\n" in own
        assert own.index("inner") < own.index(", in talk") and "run_until_complete" not in own
        holder.tell("leave")


def take(link: procs.Link, name: str) -> None:
    stacks.serve()
    with Semaphore(2, name):
        talk(link)


def test_all_who_have_permits_are_asked() -> None:
    with procs.start(take, "gpus") as one, procs.start(take, "gpus") as other:
        for worker in (one, other):
            worker.expect("in")
        text = shown("gpus")
        for worker in (one, other):
            assert f"gpus: process {worker.pid} (" in text
            worker.tell("leave")
        assert text.count(" has 1 permits") == text.count(", in take") == 2


def read(link: procs.Link) -> None:
    stacks.serve()
    Router(lock_name="r1").read(link)


def test_those_who_read_are_asked() -> None:
    with procs.start(read) as reader:
        reader.expect("in")
        text = shown("r1")
        assert f"r1: process {reader.pid} (" in text and " has 1 reading calls" in text and "in Router.read\n" in text
        reader.tell("leave")


def test_for_programs() -> None:
    with procs.start(hold, "r1") as holder:
        holder.expect("in")
        (line,) = commands.coheld("ps", "--json", "--stack", "r1").stdout.splitlines()
        found = json.loads(line)
        assert found["holder"]["pid"] == holder.pid and found["still_held"]
        (answer,) = found["stacks"]
        (thread,) = [one for one in answer["threads"] if one["tid"] == found["holder"]["thread"]]
        assert thread["name"] == "configurer" and answer["missing"] == ""
        assert ("talk", 'link.wait_for("leave")') in [(one["function"], one["code"]) for one in thread["frames"]]
        holder.tell("leave")


def test_one_that_nobody_has_and_one_that_is_not_there() -> None:
    Router(lock_name="r1")
    assert shown("r1") == "r1: nobody has it\n"
    done = commands.coheld("ps", "--stack", "r2")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "coheld: no resource named 'r2'\n")


# ---- switched on, or not --------------------------------------------------------------------------------------------

PROGRAM = """
import coheld
with coheld.Lockable(lock_name="r1"):
    print("in")
    input()
"""


def test_the_environment_switches_it_on(coheld_dir: Path) -> None:
    with procs.program(PROGRAM, env={**os.environ, "COHELD_STACKS": "1"}) as holder:
        holder.expect("in")
        assert "\nthread MainThread (" in shown("r1")
        assert oct(socket_of(holder.pid, coheld_dir).stat().st_mode)[-3:] == "600"
        before = sorted(coheld_dir.iterdir())
        done = commands.coheld("ps", "--stack", "r1", env={**os.environ, "COHELD_STACKS": "1"})
        assert "\nthread MainThread (" in done.stdout and sorted(coheld_dir.iterdir()) == before
        holder.tell("go on")
    assert [path.name for path in coheld_dir.iterdir()] == ["name-r1"]


def test_an_import_alone_makes_nothing(coheld_dir: Path) -> None:
    loaded = procs.run("import sys, coheld; print(*sys.modules)", env={**os.environ, "COHELD_STACKS": "1"})
    assert "coheld.stacks" not in loaded.split() and not list(coheld_dir.iterdir())


def test_what_cannot_be_switched_on_is_told_of_and_the_lock_works(coheld_dir: Path) -> None:
    blocked = "import os, coheld.process as p; path = f'stacks-{os.getpid()}-{p.start_of(os.getpid())}'; "
    blocked += f"os.mkdir(os.path.join({str(coheld_dir)!r}, path))\n"
    with procs.program(blocked + PROGRAM, env={**os.environ, "COHELD_STACKS": "1"}, stderr=-2) as holder:
        assert holder.hear().startswith("no stacks are shown to coheld ps --stack: ")
        holder.expect("in")
        assert OFF in shown("r1", 124)
        holder.tell("go on")


@pytest.mark.parametrize("what", ["nothing", "socket", "file", "directory", "link"])
def test_a_process_that_is_not_switched_on_is_not_touched(what: str, coheld_dir: Path) -> None:
    with procs.start(hold, "r1", "shm:", False) as holder, socket.socket(socket.AF_UNIX) as foreign:
        holder.expect("in")
        path = socket_of(holder.pid, coheld_dir)
        foreign.bind(str(path if what == "socket" else coheld_dir / "foreign"))
        foreign.listen()
        foreign.setblocking(False)
        if what == "file":
            path.write_text("")
        elif what == "directory":
            path.mkdir()
        elif what == "link":
            path.symlink_to(coheld_dir / "foreign")
        assert OFF in shown("r1", 124)
        with pytest.raises(BlockingIOError):
            foreign.accept()
        holder.tell("leave")
        holder.end()


def test_another_process_in_its_place_is_not_believed(coheld_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(coheld_dir / "stacks-1-1"))
        foreign.listen()
        with pytest.raises(ConnectionRefusedError):
            stacks._read(str(coheld_dir), "stacks-1-1", 1, time.monotonic() + delays.LONG)


def test_another_user_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for user, answered in [(os.geteuid(), True), (0, True), (os.geteuid() + 1, False)]:
        here, there = socket.socketpair()
        monkeypatch.setattr(stacks, "_peer", lambda _, user=user: (1, user, user))
        with here, there:
            threading.Thread(target=stacks._answer, args=(there,)).start()
            assert bool(here.recv(1)) == answered
            while here.recv(1 << 16):
                pass


SWITCH_ON_OVER = """
import os, pathlib, socket, sys
from coheld import process, stacks
path = pathlib.Path(os.environ["COHELD_DIR"]) / f"stacks-{os.getpid()}-{process.start_of(os.getpid())}"
what = sys.argv[1]
if what == "file": path.write_text("")
if what == "link": path.symlink_to("/etc/passwd")
if what == "socket": socket.socket(socket.AF_UNIX).bind(str(path))
"""


@pytest.mark.parametrize("what", ["file", "link", "socket"])
def test_what_is_left_in_its_place_is_replaced(what: str) -> None:
    with procs.program(SWITCH_ON_OVER + "stacks.serve(); stacks.serve()" + PROGRAM, what) as holder:
        holder.expect("in")
        assert "\nthread MainThread (" in shown("r1")
        holder.tell("go on")


def test_a_directory_with_a_long_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / ("long" * 40)
    directory.mkdir()
    monkeypatch.setenv("COHELD_DIR", str(directory))
    with procs.start(hold, "r1") as holder:
        holder.expect("in")
        assert len(str(socket_of(holder.pid, directory))) > 108 and ", which holds it:" in shown("r1")
        holder.tell("leave")


# ---- those that cannot answer ---------------------------------------------------------------------------------------


def test_a_stopped_holder_is_said_to_be_stopped() -> None:
    with procs.start(hold, "r1") as holder:
        holder.expect("in")
        holder.stop()
        assert "no stacks: it is stopped, by SIGSTOP or a debugger\n" in shown("r1", 124)
        holder.cont()
        assert ", which holds it:" in shown("r1")
        holder.tell("leave")


def keep_the_interpreter(link: procs.Link) -> None:
    stacks.serve()
    link.say("in")
    ctypes.PyDLL(None).pause()


def test_one_that_keeps_its_interpreter_is_not_waited_for() -> None:
    with procs.start(keep_the_interpreter) as holder:
        holder.expect("in")
        silent = f"it does not answer within {delays.SHORT:g} s: "
        ask = functools.partial(stacks.ask, holder.pid, start_of(holder.pid), delays.SHORT)
        states.wait_until(lambda: ask().missing.startswith(silent), "it is in there")
        assert ask().missing.startswith(silent)
        holder.kill()


def test_those_who_connect_and_say_nothing_keep_nobody_out(coheld_dir: Path) -> None:
    with procs.start(hold, "r1") as holder:
        holder.expect("in")
        idle = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for one in idle:
            one.connect(str(socket_of(holder.pid, coheld_dir)))
        assert ", which holds it:" in shown("r1")
        for one in idle:
            one.close()
        holder.tell("leave")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_holder_leaves_a_socket_that_the_next_start_removes(backend: str, coheld_dir: Path) -> None:
    with procs.start(hold, "r1", backend) as holder:
        holder.expect("in")
        pid, path = holder.pid, socket_of(holder.pid, coheld_dir)
        start = start_of(pid)
        holder.kill()
    assert stacks.ask(pid, start).missing == "it has ended"
    assert shown("r1") == "r1: nobody has it\n" and path.exists()
    Router(lock_name="r2", lock_backend=backend)
    assert not path.exists()


def test_one_that_is_killed_at_any_time_is_gone_or_answers(rng: random.Random) -> None:
    for _ in range(10):
        with procs.start(hold, "r1") as holder:
            holder.expect("in")
            start = start_of(holder.pid)
            killer = threading.Timer(rng.uniform(0, 0.01), holder.kill)
            killer.start()
            answer = stacks.ask(holder.pid, start)
            killer.join()
            assert answer.missing in ("", "it has ended")


def serve_only(link: procs.Link) -> None:
    before = set(states.threads_of(os.getpid()))
    stacks.serve()
    (added,) = set(states.threads_of(os.getpid())) - before
    status = Path(f"/proc/self/task/{added}/status").read_text()
    blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
    link.say([number.name for number in (signal.SIGTERM, signal.SIGCHLD) if not blocked >> (number - 1) & 1])
    link.say(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_its_thread_takes_no_signal_of_the_program() -> None:
    with procs.start(serve_only) as worker:
        assert worker.hear() == []
        assert worker.hear() == signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_runner_shows_its_stacks_and_passes_signals_on() -> None:
    program = [*commands.COHELD, "run", "r1", *commands.PYTHON, "print('in', flush=True); input()"]
    with procs.command(program, env={**os.environ, "COHELD_STACKS": "1"}) as runner:
        runner.expect("in")
        assert "signal.sigwaitinfo(" in shown("r1")
        runner.signal(signal.SIGTERM)
        runner.end(128 + signal.SIGTERM)


# ---- fork and exec --------------------------------------------------------------------------------------------------


def fork_and_hold(link: procs.Link) -> None:
    stacks.serve()
    if pid := os.fork():
        os.waitpid(pid, 0)
        return
    with Router(lock_name="r1"):
        link.say(os.getpid())
        link.wait_for("leave")
    os._exit(0)


def test_a_forked_child_answers_for_itself(coheld_dir: Path) -> None:
    with procs.start(fork_and_hold) as parent:
        child = parent.hear()
        assert f"r1: held by process {child} (" in shown("r1")
        for pid in (parent.pid, child):
            answer = stacks.ask(pid, start_of(pid))
            (main,) = [one for one in answer.threads if one.tid == pid]
            assert ("waitpid" in main.frames[-1].code) == (pid == parent.pid)
            inherited = {f"socket:[{line.split()[6]}]" for line in listening(coheld_dir, parent.pid)}
            assert bool(inherited & set(stacks._descriptors(pid))) == (pid == parent.pid)
        parent.tell("leave")


def listening(directory: Path, pid: int) -> list[str]:
    name = socket_of(pid, directory).name
    return [line for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines() if line.endswith(name)]


EXEC = """
import os, sys
from coheld import stacks
stacks.serve()
os.execv(sys.executable, [sys.executable, "-uc", "print('in'); input()"])
"""


def test_a_program_that_has_called_exec_shows_nothing(coheld_dir: Path) -> None:
    with procs.program(EXEC) as other:
        other.expect("in")
        assert socket_of(other.pid, coheld_dir).exists()
        assert stacks.ask(other.pid, start_of(other.pid)).missing.startswith(OFF)
        other.tell("go on")


DAEMON = """
import os, socket
from coheld import stacks
stacks.serve()
assert stacks._process.server.listener.fileno() >= 100
os.closerange(3, 1000)
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1])
input()
for _ in range(3):
    server.accept()[0].close()
print("served")
"""


def test_a_daemon_that_closes_its_descriptors_shows_nothing_and_loses_no_other() -> None:
    with procs.program(DAEMON) as daemon:
        port = int(daemon.hear())
        assert stacks.ask(daemon.pid, start_of(daemon.pid)).missing.startswith(OFF)
        daemon.tell("serve")
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port), delays.LONG) as one:
                assert one.recv(1) == b""
        daemon.expect("served")
