"""``python -m bench``: every row measured in one run, one table at the end."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench import table
from bench.measure import QUICK, Plan
from bench.rows import (
    call,
    deadlock,
    death,
    importing,
    listing,
    making,
    million,
    permits,
    postgresql,
    readers,
    redis,
    state,
    tasks,
    throughput,
    turns,
)

ROWS: dict[str, Callable[[Plan], list[table.Line]]] = {
    "call": call.measure,
    "throughput": throughput.measure,
    "turns": turns.measure,
    "death": death.measure,
    "making": making.measure,
    "million": million.measure,
    "state": state.measure,
    "tasks": tasks.measure,
    "readers": readers.measure,
    "permits": permits.measure,
    "deadlock": deadlock.measure,
    "listing": listing.measure,
    "redis": redis.measure,
    "postgresql": postgresql.measure,
    "import": importing.measure,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print. A bar that is missed is a result, not an error."""
    options = _parser().parse_args(arguments)
    machine = table.machine()
    with _scratch():
        lines = {name: _measured(name, _plan(options)) for name in options.only or ROWS}
    _print(machine, [line for row in lines.values() for line in row])
    if options.json:
        rows = {name: [table.as_json(line) for line in row] for name, row in lines.items()}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, metavar="N", help=f"rounds of the timed loops (default: {Plan.rounds})")
    add("--only", action="append", choices=ROWS, metavar="ROW", help=f"any of {', '.join(ROWS)}")
    add("--quick", action="store_true", help="tiny rounds: shows the table, its times mean little")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    plan = QUICK if options.quick else Plan()
    return replace(plan, rounds=options.rounds) if options.rounds else plan


def _measured(name: str, plan: Plan) -> list[table.Line]:
    print(f"measuring: {name}", file=sys.stderr, flush=True)
    return ROWS[name](plan)


def _print(machine: dict[str, str], lines: list[table.Line]) -> None:
    for name, value in machine.items():
        print(f"{name}: {value}")
    print()
    print(table.render(lines))


@contextmanager
def _scratch() -> Iterator[None]:
    """A directory of this run's own for every lock, in $COHELD_DIR or shared memory; removed at the end."""
    place = os.environ.get("COHELD_DIR") or ("/dev/shm" if os.path.isdir("/dev/shm") else None)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=place) as path:
        tempfile.tempdir = path
        os.environ["COHELD_DIR"] = os.path.join(path, "coheld")
        os.mkdir(os.environ["COHELD_DIR"], 0o700)
        yield


if __name__ == "__main__":
    main()
