"""Whole programs that use locks in all the ways there are, and then end. Each is a body for `COMMON`."""

COMMON = """\
import concurrent.futures, functools, multiprocessing, os, sys, threading
from coheld import Lockable

class Device(Lockable):
    @Lockable.locked
    def use(self, *_):
        Lockable().acquire()

def use(device, *_):
    device.use()

def make(*_):
    return Device()

def use_and_quit(device, status):
    device.use()
    sys.exit(status)

def use_after_main(device):
    threading.Thread(target=lambda: (threading.main_thread().join(), device.use())).start()

def use_after_parent(device):
    read, write = os.pipe()
    if not os.fork():
        os.close(write)
        os.read(read, 1)
        device.use()
        sys.exit(0)

def in_fork(action):
    if not (pid := os.fork()):
        action()
        sys.exit(0)
    assert not os.waitpid(pid, 0)[1]

def in_process(method, action, *args, status=0):
    worker = multiprocessing.get_context(method).Process(target=action, args=args)
    worker.start()
    worker.join()
    assert worker.exitcode == status

fork, spawn, forkserver = map(multiprocessing.get_context, ("fork", "spawn", "forkserver"))

if __name__ == "__main__":
    device = Device()
    assert os.listdir(os.environ["COHELD_DIR"])
"""

NORMAL = {
    "an object and no call": "pass",
    "a call": "device.use()",
    "many objects": "devices = [Device() for _ in range(10_000)]",
    "held at the end": "device.acquire()",
    "sys.exit": "device.use(); sys.exit(0)",
    "threads": "[threading.Thread(target=device.use).start() for _ in range(4)]",
    "a thread that outlives main": "use_after_main(device)",
    "os.fork": "in_fork(device.use)",
    "os.fork, nothing made there": "in_fork(device.acquire)",
    "os.fork, os._exit": "in_fork(lambda: (device.use(), os._exit(0)))",
    "os.fork, sys.exit in both": "in_fork(lambda: use_and_quit(device, 0)); use_and_quit(device, 0)",
    "os.fork, the parent ends first": "use_after_parent(device)",
    "os.fork, the parent ends first, nothing is made there": "device.use = device.acquire; use_after_parent(device)",
    "fork": "in_process('fork', use, device)",
    "spawn": "in_process('spawn', use, device)",
    "forkserver": "in_process('forkserver', use, device)",
    "a child that exits with a status": "in_process('fork', use_and_quit, device, 3, status=3)",
    "a child with a thread that outlives its function": "in_process('fork', use_after_main, device)",
    "a spawned child with a thread that outlives its function": "in_process('spawn', use_after_main, device)",
    "a grandchild": "in_process('fork', in_process, 'fork', use, device)",
    "children that the interpreter joins": """
        fork.Process(target=use, args=[device]).start()
        spawn.Process(target=use, args=[device]).start()""",
    "a daemonic child": """
        ready = fork.Event()
        fork.Process(target=lambda: (device.use(), ready.set(), threading.Event().wait()), daemon=True).start()
        ready.wait()""",
    "Pool, left to the interpreter": """
        pool = fork.Pool(2)
        pool.map(use, [device] * 8)
        pool.close()""",
    "Pool, by fork": """
        with fork.Pool(2) as pool:
            pool.map(use, [device] * 8)
            pool.close()
            pool.join()""",
    "Pool, by spawn": """
        with spawn.Pool(2) as pool:
            pool.map(use, [device] * 8)
            pool.close()
            pool.join()""",
    "Pool, a new worker for each task": """
        with fork.Pool(2, maxtasksperchild=1) as pool:
            pool.map(use, [device] * 8, chunksize=1)
            pool.close()
            pool.join()""",
    "Pool, objects that come back": """
        with fork.Pool(2) as pool:
            devices = pool.map(make, range(4))
            for one in devices:
                one.use()
            pool.close()
            pool.join()""",
    "concurrent.futures, by fork": """
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=fork) as pool:
            list(pool.map(use, [device] * 8))""",
    "concurrent.futures, by spawn": """
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
            list(pool.map(use, [device] * 8))""",
    "concurrent.futures, left to the interpreter": """
        pool = concurrent.futures.ProcessPoolExecutor(2, mp_context=fork)
        list(pool.map(use, [device] * 8))""",
    "an object that outlives the process that made it": """
        read, write = fork.Pipe(False)
        read_back, ended = fork.Pipe(False)
        worker = fork.Process(target=lambda: (write.send(Device()), read_back.recv()))
        worker.start()
        device = read.recv()
        ended.send(None)
        worker.join()
        device.use()""",
    "an object that outlives the process that made it, and is dropped": """
        read, write = fork.Pipe(False)
        read_back, ended = fork.Pipe(False)
        worker = fork.Process(target=lambda: (write.send(Device()), read_back.recv()))
        worker.start()
        theirs = read.recv()
        ended.send(None)
        worker.join()
        del theirs""",
}
"""How a program uses `device`; each ends with status 0, and so do its children."""

FIRSTS = {
    "alone": "",
    "after multiprocessing": "import multiprocessing.util\n",
    "after a handler at exit": "import atexit; atexit.register(lambda: Lockable().acquire())\n",
}
"""What stands before everything else: exit handlers run in the reverse order of their coming."""


def source_of(run: str, first: str = "alone") -> str:
    """The text of one of NORMAL, after one of FIRSTS."""
    body = NORMAL[run]
    return FIRSTS[first] + COMMON + (body.replace("\n    ", "\n") if "\n" in body else f"    {body}") + "\n"
