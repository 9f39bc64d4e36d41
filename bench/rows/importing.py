"""`import coheld`: its time over the bare start of the interpreter, and what it must not import."""

import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

from bench import peers
from bench.measure import Plan, in_rounds
from bench.table import Bar, Line, beside

BAR = Bar(0.060, absolute=True)
BANNED = ("rich", "textual", "asyncio", "msgspec", "redis", "psycopg")
LOADED = "import sys; before = {*sys.modules}; import coheld; print(*({*sys.modules} - before))"
MODULES = {
    peers.COHELD: "coheld",
    peers.MP_RLOCK: "multiprocessing.synchronize",
    peers.PYATS: "pyats.async_.synchronize",
    peers.FILELOCK: "filelock",
    peers.FASTENERS: "fasteners",
}


def measure(plan: Plan) -> list[Line]:
    names = peers.installed(*MODULES)
    samples = in_rounds({name: _over_bare(MODULES[name]) for name in names}, plan.rounds)
    others = [name for name in MODULES if name != peers.COHELD]
    return [*beside("import, over a bare start", "s", samples, others, BAR), _banned()]


def _over_bare(module: str) -> Callable[[], float]:
    """Seconds of an interpreter that imports `module` minus seconds of one that does nothing."""
    _start(f"import {module}")  # writes the compiled files
    return lambda: _start(f"import {module}") - _start("pass")


def _start(program: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - begin


def _banned() -> Line:
    """How many of the modules that must not come along did; where none is installed it shows nothing."""
    loaded = subprocess.check_output([sys.executable, "-c", LOADED], text=True).split()
    found = [name for name in BANNED if name in loaded]
    absent = [name for name in BANNED if find_spec(name) is None]
    note = f"not installed here: {', '.join(absent)}" if absent else ""
    what = f"of {', '.join(BANNED)} imported"
    return Line(what, "modules", len(found), bar=Bar(0, absolute=True), note=", ".join(found) or note)
