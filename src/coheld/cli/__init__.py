"""The command `coheld`. It renders; every rule about locks is in the layers below.

    __init__    main(), and the parser
    exits       exit statuses
    run         coheld run: a command under a named lock
    relay       how a runner passes signals on, and its command's end back
    rm          coheld rm
    ps          coheld ps: all resources of this user
    stacks      coheld ps --stack: what those who have one do
    graph       coheld graph: who has what and who waits, as lines and for Mermaid
    picture     the same as an SVG
    top         coheld top: the same as ps, live
    screen      what it draws, with textual
    show        coheld show: the shared state of a named resource
    demo        coheld demo: workers, kills, and the book-keeping that must come out exact
    testbed     what the workers of the demo share, and what they do with it
    display     the demo on a screen: rich tables, or plain lines

A wrapper must start at once: the modules above `demo` import little, and those below it are imported by its run.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from coheld._version import __version__
from coheld.cli import exits, graph, ps, rm, show, top
from coheld.errors import CoheldError, LockTimeout


class _Parser(argparse.ArgumentParser):
    """Wrong usage is our own failure, and no status that a command could have."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(exits.FAILED, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    description = "Locks between processes that survive their holders: one caller at a time, and nobody hangs."
    parser = _Parser(prog="coheld", description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in _commands():
        module.add_parser(commands)
    return parser


def _commands() -> Sequence[ModuleType]:
    """What is there on this system: the two others are made of processes as Linux has them."""
    if sys.platform != "linux":
        return [ps, top, graph, rm, show]
    from coheld.cli import demo, run

    return [run, ps, top, graph, rm, show, demo]


def _complain(error: Exception, status: int) -> int:
    print(f"coheld: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (None: the process's own) and return its exit status.

    Errors are one line on standard error. Raises: SystemExit: after --help, --version and wrong usage.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.execute(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.FAILED
    except LockTimeout as error:
        return _complain(error, exits.NOT_GOT)
    except (CoheldError, OSError, ValueError) as error:
        return _complain(error, exits.FAILED)
    return status
