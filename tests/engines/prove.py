"""Clients of one register on a server, faults at random, and the check that what they saw fits one lock and one state.

    PYTHONPATH=tests python -m engines.prove --seeds 200 --seed 1 --engine valkey

prints a report, one JSON object, and ends with an error, which names the seed and the events, if anything was wrong.
Each seed is a run of its own: a server that is durable, a proxy before it, clients that commit and read through it, on
two or three hosts (a COHELD_DIR each). Meanwhile, one after the other: clients are killed, and others take their place;
clients are stopped beyond their lease and continued; connections are cut, refused, half-open and slow; replies are
lost; the server is stopped, killed and started again, and a Valkey loses all its data. In the end a new client must get
through.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import coheld
from coheld.testing.support import procs
from engines import servers
from engines.histories import Recorder, check, load
from engines.proxy import Proxy
from engines.registers import LEASE, REGISTERS, Register, Work

ENGINES: dict[str, Callable[[], AbstractContextManager[servers.Server]]] = {
    "valkey": lambda: servers.valkey(durable=True),
    "postgresql": servers.postgresql,
}
FAULTS = 6  # of a run
BEYOND = 1.6 * LEASE


@dataclass
class Report:
    """What was done; all of it goes into the JSON."""

    engine: str
    register: str
    seed: int  # the first
    runs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)  # of commits that were intended
    reads: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


# ---- a client ------------------------------------------------------------------------------------------------


def client(link: procs.Link, register: str, url: str, host: Path, events: Path, number: int) -> None:
    """Commits and reads until it is told to end; `host` is its COHELD_DIR."""
    rng, subject = random.Random(number), on_host(host, register, url)
    with Recorder(events, number) as recorder:
        while not link._connection.poll(0):
            outcome = commit(recorder, subject, lambda: time.sleep(rng.choice([0, rng.uniform(0, LEASE / 5)])))
            if rng.random() < 0.3:
                read(recorder, subject)
            if outcome != "ok":
                time.sleep(LEASE / 50)  # a server that is away is not asked as fast as can be


def last_client(_link: procs.Link, register: str, url: str, host: Path, events: Path, number: int) -> str:
    """One commit, and a read; what became of the commit."""
    subject = on_host(host, register, url)
    with Recorder(events, number) as recorder:
        outcome = commit(recorder, subject)
        read(recorder, subject)
    return outcome


def on_host(directory: Path, register: str, url: str) -> Register:
    os.environ["COHELD_DIR"] = str(directory)
    return REGISTERS[register](url)


def commit(recorder: Recorder, subject: Register, work: Work = lambda: None) -> str:
    operation = recorder.commit()
    outcome = subject.commit(operation, work)
    operation.end(outcome)
    return outcome


def read(recorder: Recorder, subject: Register) -> None:
    operation = recorder.read()
    if (value := subject.read()) is not None:
        operation.saw(value)


# ---- a run ---------------------------------------------------------------------------------------------------


class Run:
    """One server, one proxy, some clients, and what happens to them, by `rng` alone."""

    def __init__(self, engine: str, register: str, rng: random.Random, directory: Path, life: ExitStack) -> None:
        self.rng, self._register, self._life, self.events = rng, register, life, directory / "events"
        self.events.mkdir()
        self._recorder = life.enter_context(Recorder(self.events, 0))
        self.server = life.enter_context(ENGINES[engine]())
        self.proxy = life.enter_context(Proxy(self.server.port))
        self._url = self.server.url().replace(f":{self.server.port}/", f":{self.proxy.port}/")
        self._hosts = [directory / f"host-{number}" for number in range(rng.randint(2, 3))]
        for host in self._hosts:
            host.mkdir(0o700)
        self._numbers = count(1)
        self.clients = [self._start(host) for host in self._hosts for _ in range(rng.randint(1, 2))]

    def _start(self, host: Path) -> procs.FunctionWorker:
        arguments = self._register, self._url, host, self.events, next(self._numbers)
        return self._life.enter_context(procs.start(client, *arguments))

    def faults(self) -> list[str]:
        """Strike, one after the other; what was done."""
        done = []
        for _ in range(FAULTS):
            time.sleep(self.rng.uniform(0, LEASE / 2))
            fault = self.rng.choice(ALL if isinstance(self.server, servers.Valkey) else ALL[:-1])
            self._check_clients()
            fault(self)
            done.append(fault.__name__)
        return done

    def _check_clients(self) -> None:
        """Raises: procs.WorkerFailed: one has ended, which none does by itself; with its error."""
        for one in self.clients:
            if not one.alive():
                one.result()

    def last_words(self) -> None:
        """All is well again: the clients end, and a new one commits."""
        for one in self.clients:
            with suppress(BrokenPipeError):  # it has ended, by an error, which result() raises
                one.tell("end")
        for one in self.clients:
            one.result()
        arguments = self._register, self.server.url(), self._hosts[0], self.events, next(self._numbers)
        with procs.start(last_client, *arguments) as last:
            assert (outcome := last.result()) == "ok", f"the server is well, and a commit is {outcome}"

    # ---- faults ----------------------------------------------------------------------------------------------

    def kill_client(self) -> None:
        number = self.rng.randrange(len(self.clients))
        self.clients[number].kill()
        self.clients[number] = self._start(self.rng.choice(self._hosts))

    def stop_client(self) -> None:
        victim = self.rng.choice(self.clients)
        victim.stop()
        time.sleep(self._beyond())
        victim.cont()

    def cut(self) -> None:
        self.proxy.cut(reset=self.rng.choice([False, True]))

    def lose_reply(self) -> None:
        self.proxy.lose_reply()

    def refuse(self) -> None:
        self.proxy.refuse()
        self._for_a_while()

    def stall(self) -> None:
        self.proxy.stall()
        self._for_a_while()

    def slow(self) -> None:
        self.proxy.slow(self.rng.choice([0.01, 0.1, BEYOND]) * self.rng.uniform(0.5, 1))
        self._for_a_while()

    def stop_server(self) -> None:
        self.server.stop()
        time.sleep(self._beyond())
        self.server.cont()

    def restart_server(self) -> None:
        self.server.restart()

    def wipe_server(self) -> None:
        assert isinstance(self.server, servers.Valkey)
        with self._recorder.forgetting():
            self.server.wipe()

    def _for_a_while(self) -> None:
        time.sleep(self._beyond())
        self.proxy.forward()

    def _beyond(self) -> float:
        return self.rng.uniform(0.5, 1) * BEYOND


ALL: list[Callable[[Run], None]] = [
    Run.kill_client,
    Run.stop_client,
    Run.cut,
    Run.lose_reply,
    Run.refuse,
    Run.stall,
    Run.slow,
    Run.stop_server,
    Run.restart_server,
    Run.wipe_server,
]


def run(engine: str, register: str, seed: int, report: Report) -> None:
    """Raises: AssertionError: Contradiction, or what else was wrong; what was recorded is kept then."""
    directory = Path(tempfile.mkdtemp(prefix=f"engines-{seed}-"))
    try:
        with ExitStack() as life:
            one = Run(engine, register, random.Random(f"{engine}:{seed}"), directory, life)
            report.faults.update(one.faults())
            one.last_words()
        history = load(one.events)
        report.outcomes.update(commit.outcome for commit in history.commits)
        report.reads += len(history.reads)
        check(history)
    except AssertionError as error:
        error.add_note(f"seed {seed}, events in {directory}")
        raise
    report.runs += 1
    shutil.rmtree(directory)


def prove(engine: str, register: str, seeds: int, seed: int) -> Report:
    """Raises: AssertionError: with what was wrong."""
    report, begun = Report(engine, register, seed), time.monotonic()
    for number in range(seed, seed + seeds):
        run(engine, register, number, report)
    report.seconds = time.monotonic() - begun
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m engines.prove", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, metavar="N", help="how many runs (default: 200)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32), metavar="N")
    parser.add_argument("--engine", choices=ENGINES, default="valkey")
    parser.add_argument("--register", choices=REGISTERS, default="coheld", help="what is put to the proof")
    options = parser.parse_args()
    if options.engine != "valkey" and options.register != "coheld":
        parser.error("the registers by hand are those of a Valkey")
    print(f"seed {options.seed}, coheld {coheld.__version__}", flush=True)
    report = prove(options.engine, options.register, options.seeds, options.seed)
    print(json.dumps(vars(report), indent=1))


if __name__ == "__main__":
    main()
