"""coheld show: the shared state of a named resource, as its last commit left it."""

import argparse
import codecs
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from coheld.cli import exits

if TYPE_CHECKING:
    from coheld.state.looking import Look

_EPILOG = """\
exit status:
  0    shown
  1    there is no such resource
  125  coheld itself failed: the state is damaged, or of another version; the server cannot be asked
"""
_WIDTH = 60


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers."""
    parser = commands.add_parser(
        "show",
        help="show the shared state of a named resource",
        description="Show the shared state of a named resource. Takes no lock: it may be held, or its holder stopped. "
        "A server that COHELD_BACKEND names is asked.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON, for programs")
    parser.add_argument("name", metavar="NAME", help="the lock_name of the resource")
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Print it. Waits for nobody but a server. Raises: IncompatibleError: if it cannot be read.  BackendError: if the
    server cannot be asked."""
    from coheld.state.looking import look  # imports msgspec, which the wrapper commands need not

    found = look(options.name)
    if found is None:
        print(f"coheld: no resource named {options.name!r}", file=sys.stderr)
        return exits.NO_SUCH_RESOURCE
    if options.json:
        print(_json(found, _encoding()))
    else:
        _print(found)
    return 0


def _json(found: "Look", encoding: str) -> str:
    """In a line that a stream of that encoding can say."""
    import msgspec

    fields = {one.name: {"type": one.type, "value": _plain(one.value)} for one in found.fields}
    answer: dict[str, Any] = {
        "name": found.name,
        "commits": found.commits,
        "bytes": found.size,
        "file_bytes": found.file,
    }
    answer |= {"store": found.store or None, "token": found.token, "holder": found.holder and str(found.holder)}
    text = msgspec.json.encode(answer | {"fields": fields}, enc_hook=repr).decode()
    return text if codecs.lookup(encoding).name == "utf-8" else json.dumps(json.loads(text), separators=(",", ":"))


def _plain(value: Any) -> Any:
    """The value with nothing in it that JSON has not: numbers that are none are text, and a map is a list of pairs
    where its keys would not be different ones."""
    from coheld.state.untyped import Pairs

    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        fields = {_key(key): _plain(one) for key, one in value.items()}
        return fields if len(fields) == len(value) else _plain(Pairs(value.items()))
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _key(key: Any) -> str:
    """As JSON has it, which knows text alone."""
    import msgspec

    key = key if isinstance(key, tuple) else _plain(key)
    if isinstance(key, str):
        return key
    return str(next(iter(msgspec.json.decode(msgspec.json.encode({key: 0}, enc_hook=repr)))))


def _print(found: "Look") -> None:
    rows = [(_sayable(one.name), _sayable(one.type), _sayable(_cut(repr(one.value)))) for one in found.fields]
    held = f"held by {found.holder}" if found.holder else "free"
    called, count = found.name, f"{found.commits} commits"
    if found.store:
        called, count = f"{found.name} at {found.store}", f"token {found.token}"
    title = _sayable(f"{called}: {count}, {found.size:,} bytes, {held}")
    if sys.stdout.isatty() and _print_table(title, rows):
        return
    print(title)
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for name, text, value in rows:
        print(f"  {name:{widths[0]}}  {text:{widths[1]}}  {value}")


def _print_table(title: str, rows: list[tuple[str, str, str]]) -> bool:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        return False
    table = Table("field", "type", "value", title=escape(title))
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
    return True


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _sayable(text: str) -> str:
    """With escapes for what the stream has no characters for."""
    return text.encode(_encoding(), "backslashreplace").decode(_encoding())


def _encoding() -> str:
    """Of the stream; of one that is memory, any."""
    return sys.stdout.encoding or "utf-8"
