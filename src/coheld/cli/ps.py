"""coheld ps: all resources of this user, who has them, and how many wait."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from coheld.backends.survey import Resource
from coheld.backends.waiters import Waiter
from coheld.cli import exits
from coheld.inspecting import called, resources
from coheld.sight import Sight, see

_EPILOG = """\
exit status:
  0    shown
  1    there is no resource of that name
  125  coheld itself failed: the server cannot be asked
  124  with --stack: a process that has it does not show its stacks, or does not answer
"""
_ROWS = 40
"""Of the table: the busiest; --json has all."""
_HEADINGS = ["resource", "holder", "in", "for", "waiters", "taken", "contended", "deaths"]


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers."""
    parser = commands.add_parser(
        "ps",
        help="show all resources, who has them and how many wait",
        description="Show the resources of this user on this machine: who has them, since when, in which method, and "
        "how many wait. Takes no lock and changes nothing. Anonymous locks are shown while somebody has them or waits.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON for each, for programs")
    parser.add_argument("--all", action="store_true", help="anonymous locks that nobody has, as well")
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="only that one, and each of those who wait for it; a server that COHELD_BACKEND names is asked",
    )
    if sys.platform == "linux":
        one.add_argument(
            "--stack",
            metavar="NAME",
            help="what those who have that one do now: the Python stacks of their processes, where they show them",
        )
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Print them. Waits for nobody but a process that is asked for its stacks, or a server that is asked for one name,
    for seconds at most. Raises: BackendError: if that cannot be asked."""
    if getattr(options, "stack", None) is not None:
        from coheld.cli import stacks

        return stacks.show(options.stack, as_json if options.json else None)
    if options.name is not None:
        found = called(options.name)
        if not found:
            print(f"coheld: no resource named {options.name!r}", file=sys.stderr)
            return exits.NO_SUCH_RESOURCE
    else:
        found = [one for one in resources() if options.all or one.name is not None or one.busy]
    if options.json:
        for one in found:
            print(json.dumps(as_json(one)))
    elif options.name is not None:
        print(*(line for one in found for line in see(one).lines()), sep="\n")
    else:
        _print(found)
    return 0


def as_json(one: Resource) -> dict[str, Any]:
    """What programs get of a resource."""
    answer: dict[str, Any] = {"name": one.name, "kind": one.kind, "backend": one.backend, "place": one.place}
    answer |= {"store": one.store or None, "class": one.class_name or None, "holder": None}
    if holder := one.holder:
        answer["holder"] = {
            "pid": holder.pid,
            "start": holder.start,
            "thread": holder.tid,
            "thread_name": holder.thread,
            "task": holder.task or (hex(holder.task_id) if holder.task_id else None),
            "host": holder.host or None,
            "command": holder.command,
            "method": holder.method,
            "held_seconds": round(max(0.0, time.monotonic() - holder.since), 3),
            "depth": holder.depth,
        }
    counts = {"waiters": one.waiters, "acquisitions": one.acquisitions, "contended": one.contended}
    inside = [{"pid": pid, "count": count} for pid, count in one.inside.items()]
    waiting = [_waiter_as_json(waiter) for waiter in one.waiting]
    rest = {"recoveries": one.recoveries, "inside": inside, "permits": one.permits, "waiting": waiting}
    return answer | counts | rest


def _waiter_as_json(waiter: Waiter) -> dict[str, Any]:
    answer = {
        name: getattr(waiter, name) for name in ("pid", "start", "thread", "task", "method", "waits_for", "timed")
    }
    waited = round(max(0.0, time.monotonic() - waiter.since), 3)
    task_id = hex(waiter.task_id) if waiter.task_id else None
    return answer | {"thread_number": waiter.tid, "task_id": task_id, "waited_seconds": waited}


def _print(found: Sequence[Resource]) -> None:
    if not found:
        print("no resources")
        return
    rows = [_row(see(one)) for one in found[:_ROWS]]
    more = f"and {len(found) - _ROWS} more: coheld ps --json" if len(found) > _ROWS else ""
    if not (sys.stdout.isatty() and _print_table(rows)):
        print(*_aligned(rows), sep="\n")
    if more:
        print(more)


def lines_of(found: Sequence[Resource]) -> list[str]:
    """All of them as plain lines, with headings."""
    return _aligned([_row(see(one)) for one in found])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [_HEADINGS, *rows]) for column in range(len(_HEADINGS))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in [_HEADINGS, *rows]
    ]


def _print_table(rows: list[list[str]]) -> bool:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        return False
    table = Table(*_HEADINGS)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
    return True


def _row(one: Sight) -> list[str]:
    there = one.resource
    counts = (there.waiters, there.acquisitions, there.contended, there.recoveries)
    held = f"{one.held:.3g} s" if one.held is not None else ""
    return [one.name, one.holder, one.method, held, *(str(count) if count else "" for count in counts)]
