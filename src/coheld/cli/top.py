"""coheld top: all resources of this user, live."""

import argparse
import sys
from typing import Any

from coheld.cli import exits

_EPILOG = """\
keys:
  up, down   choose a resource: below are who has it, who waits, and how many had to wait in the last minute
  s, r       sort by the next column; the other way round
  /          show only those with some words in them; escape shows all again
  q          end
"""


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers."""
    parser = commands.add_parser(
        "top",
        help="watch all resources, who has them and who waits",
        description="Watch the resources of this user on this machine; a look each second. Takes no lock and changes "
        "nothing. It needs textual: pip install 'coheld[top]'.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Show them until the user ends it."""
    try:
        from coheld.cli.screen import Top
    except ModuleNotFoundError as error:
        print(f"coheld: top is drawn by textual ({error}): pip install 'coheld[top]'", file=sys.stderr)
        return exits.FAILED
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("coheld: top needs a terminal; coheld ps does not", file=sys.stderr)
        return exits.FAILED
    return Top().run() or 0
