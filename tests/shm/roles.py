"""Programs that make a lock, or attach to one, and then do as a test says; each is an interpreter of its own."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from coheld.testing.support import procs, states

SERVE = """\
import os, pickle, signal, sys
from coheld import Lockable

def close_descriptors():
    for fd in os.listdir("/proc/self/fd"):
        if int(fd) > 2:
            try:
                os.close(int(fd))
            except OSError:
                pass  # the one that lists them

def tried(obj):
    if got := obj.acquire(blocking=False):
        obj.release()
    return got

def serve(obj):
    print(os.getpid())
    print(pickle.dumps(obj).hex())
    for line in sys.stdin:
        match line.strip():
            case "try":
                print(tried(obj))
            case "hold":
                print(obj.acquire(blocking=False))
            case "leave":
                print(obj.release())
            case "make":
                print(tried(Lockable()))
            case "many":
                print(all(map(tried, [Lockable() for _ in range(1_000)])))
            case "close":
                print(close_descriptors())
            case "fork":
                if os.fork():
                    os._exit(0)
                print(os.getpid())
            case "drop":
                print(obj := None)
            case "end":
                sys.exit(0)

def after(parent):
    while os.getppid() == parent:
        pass

"""

MAKER = SERVE + "serve(Lockable())"
ATTACHED = SERVE + "serve(pickle.loads(bytes.fromhex(sys.argv[1])))"
ENDS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "sys.exit": "sys.exit(0)",
    "os._exit": "os._exit(0)",
}


def forked(end: str) -> str:
    """A forked child that has the lock of a maker that has ended."""
    return (
        SERVE
        + f"""\
maker, obj = os.getpid(), Lockable()
if os.fork():
    {end}
after(maker)
serve(obj)"""
    )


def has_let_go(pid: int) -> bool:
    """Has the process ended, and let go of its files?  One that is on its way out has not yet."""
    task = states.task(pid)
    return task is None or task.state in "ZX"


class Actor:
    """The test's side: who it is, and the lock as it travels."""

    def __init__(self, worker: procs.ProgramWorker) -> None:
        self.worker = worker
        self.pid = int(worker.hear())
        self.lock = worker.hear()

    def ask(self, what: str) -> str:
        """What it prints when told so."""
        self.worker.tell(what)
        return str(self.worker.hear())

    def become_its_child(self) -> None:
        """It forks and ends; returns when it is gone, and the child answers in its place."""
        child = int(self.ask("fork"))
        self._gone()
        self.pid = child

    def end(self) -> None:
        """A normal end; returns when it is gone."""
        self.worker.tell("end")
        self._gone()

    def kill(self) -> None:
        """SIGKILL; returns when it is gone, and if nobody waited for it, a zombie."""
        os.kill(self.pid, 9)
        self._gone()

    def _gone(self) -> None:
        states.wait_until(partial(has_let_go, self.pid), f"process {self.pid} has ended")


@contextmanager
def actor(source: str, *args: str) -> Iterator[Actor]:
    """Run one of the programs; whoever still runs of it at the end of the block is killed."""
    with procs.program(source, *args) as worker:
        one = Actor(worker)
        try:
            yield one
        finally:
            if not states.gone(one.pid):
                one.kill()
            worker.kill()


def maker() -> AbstractContextManager[Actor]:
    """A process that has made an anonymous lock."""
    return actor(MAKER)


def attached(lock: str) -> AbstractContextManager[Actor]:
    """A process that got somebody's lock in a pickle."""
    return actor(ATTACHED, lock)


def orphan(end: str) -> AbstractContextManager[Actor]:
    """A forked child with its parent's lock; the parent has ended, in one of ENDS."""
    return actor(forked(ENDS[end]))


def one_lock(first: Actor, second: Actor) -> bool:
    """While one holds it the other cannot have it, and then it can."""
    return [first.ask("hold"), second.ask("try"), first.ask("leave"), second.ask("try")] == [
        "True",
        "False",
        "None",
        "True",
    ]
