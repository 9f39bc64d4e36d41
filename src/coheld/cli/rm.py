"""coheld rm: take a named resource away."""

import argparse
import sys
from typing import Any

from coheld.cli import exits
from coheld.mutex import remove

_EPILOG = """\
exit status:
  0    removed
  1    there is no such resource
  124  it is held; the message says by whom
  125  coheld itself failed
"""


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers."""
    parser = commands.add_parser(
        "rm",
        help="remove a named resource",
        description="Remove a named resource. Processes that have it open get a new one at their next call.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="the lock_name of the resource")
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Remove it. Does not wait. Raises: LockTimeout: if it is held."""
    if remove(options.name):
        return 0
    print(f"coheld: no resource named {options.name!r}", file=sys.stderr)
    return exits.NO_SUCH_RESOURCE
