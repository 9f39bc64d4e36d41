"""A million live anonymous Lockables in one fresh process: whether it works, memory, and linear time."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import peers
from bench.measure import Plan
from bench.table import Bar, Line

ROOT = Path(__file__).resolve().parents[2]


def measure(plan: Plan) -> list[Line]:
    runs = [_crowd(peers.COHELD, plan.crowd) for _ in range(plan.runs)]
    peer = _crowd(peers.MP_RLOCK, plan.peer_crowd)
    what = f"{plan.crowd:,} live locks"

    def line(name: str, unit: str, figure: Callable[[dict[str, Any]], float], bar: Bar | None) -> Line:
        ours = statistics.median(map(figure, runs))
        note = f"mp.RLock with {peer['made']:,}" if unit != "locks" else ""
        return Line(f"{what}: {name}", unit, ours, peers.MP_RLOCK, figure(peer), bar=bar, note=note)

    everyone = Bar(plan.crowd, at_least=True, absolute=True)
    growth = statistics.median(map(_growth, runs))
    return [
        line("made in one process", "locks", lambda run: run["made"], everyone),
        line("memory of the process in all", "bytes", lambda run: run["bytes"], Bar(550e6, absolute=True)),
        Line(f"{what}: last quarter's pace over first's", "x", growth, bar=Bar(1.25, absolute=True)),
        line("making, each", "s", lambda run: run["seconds"] / run["made"], None),
    ]


def _growth(run: dict[str, Any]) -> float:
    paces: list[float] = run["paces"]
    quarter = len(paces) // 4
    return statistics.median(paces[-quarter:]) / statistics.median(paces[:quarter])


def _crowd(peer: str, count: int) -> dict[str, Any]:
    """What `bench.crowd` answers. Blocks. Raises: CalledProcessError: if it failed."""
    command = [sys.executable, "-m", "bench.crowd", peer, str(count)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=600)
    return dict(json.loads(done.stdout))
